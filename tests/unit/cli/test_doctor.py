"""Findings from machines that are described, and one report of the machine that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import rewarm
from patience import PATIENCE
from rewarm.cli import doctor
from rewarm.cli.doctor import Finding, Level


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_versions_against_ranges() -> None:
    fine, missing, outside, optional = sorted(
        doctor.packages({"pydantic": ">=2", "torch": ">=99", "no-such-package": ">=1", "pytest": "<1"}),
        key=lambda finding: ["packages", "no-such-package", "torch", "pytest"].index(finding.subject),
    )
    assert fine.level is Level.OK and fine.detail.startswith("pydantic 2")
    assert missing.level is Level.NOTE and "not installed" in missing.detail
    assert outside.level is Level.BROKEN and outside.fix == "pip install 'torch>=99'"
    assert optional.level is Level.NOTE and "outside <1" in optional.detail


def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_upgraded.py").write_text("raise ImportError('undefined symbol: xyz')")
    (tmp_path / "crashing.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = doctor.imports(["half_upgraded", "crashing", "json", "not_installed_at_all"])
    assert first.level is Level.BROKEN and "undefined symbol: xyz" in first.detail
    assert second.level is Level.BROKEN and "exit status -6" in second.detail


@pytest.mark.parametrize(
    ("threads", "usable", "quota", "busy", "level", "says"),
    [
        (None, 8, None, 0.1, Level.OK, "up to 8"),
        ("4", 8, None, 0.0, Level.OK, "4 a rank, by OMP_NUM_THREADS"),
        ("16", 8, None, 0.0, Level.SLOW, "more than the cores"),
        ("4", 8, 2.0, 0.0, Level.SLOW, "more than the cores"),
        (None, 8, 2.0, 0.0, Level.OK, "up to 2"),
        (None, 2, 8.0, 0.0, Level.OK, "up to 2"),
        (None, 2, None, 1.0, Level.SLOW, "would start 1 (2 cores a rank, 1.0 of them busy with other programs)"),
        (None, 2, None, 5.0, Level.SLOW, "would start 1"),
    ],
)
def test_threads_for_the_cores(
    threads: str | None, usable: int, quota: float | None, busy: float, level: Level, says: str
) -> None:
    environment = {} if threads is None else {"OMP_NUM_THREADS": threads}
    cores, found = doctor.cores(environment, usable, quota, busy, 1.5)
    assert f"{busy:.1f} busy with other programs, load average 1.50" in cores.detail
    assert found.level is level and says in found.detail, found


def test_threads_that_never_sleep_are_noticed() -> None:
    *_, waiting = doctor.cores({"OMP_WAIT_POLICY": "ACTIVE"}, 2, None, 0.0, 0.0)
    assert waiting.level is Level.SLOW and "OMP_WAIT_POLICY" in waiting.detail


def test_container_limits(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  67108864 kB\nMemFree: 1 kB\nMemAvailable:   33554432 kB\n")
    assert doctor.memory(tmp_path, meminfo).detail == "32.0 GiB free of 64.0 GiB"
    (tmp_path / "memory.max").write_text(str(8 * 2**30))
    (tmp_path / "memory.current").write_text(str(7 * 2**30))
    tight = doctor.memory(tmp_path, meminfo)
    assert tight.detail == "1.0 GiB free of 8.0 GiB" and tight.level is Level.SLOW


def test_a_launcher_that_set_half_its_variables_is_broken() -> None:
    assert doctor.ranks({}).level is Level.OK
    half = doctor.ranks({"RANK": "0", "WORLD_SIZE": "2"})
    assert half.level is Level.BROKEN and "MASTER_ADDR" in half.detail and half.fix
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert doctor.ranks(whole).detail == "rank 1 of 2, by torchrun"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert [finding.level for finding in doctor.disks(tmp_path, tmp_path)] == [Level.BROKEN, Level.BROKEN]


def test_bfloat16_on_the_cpu() -> None:
    assert doctor.cpu_kernels("AVX512", {"avx512_bf16"}).level is Level.OK
    assert "emulated" in doctor.cpu_kernels("AVX2", {"avx2"}).detail


def test_missing_gpu_libraries_matter_only_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert {finding.level for finding in doctor.accelerated_libraries(False)} == {Level.NOTE}
    assert {finding.level for finding in doctor.accelerated_libraries(True)} == {Level.SLOW}


def test_a_cpu_build_of_torch_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available() or torch.version.cuda is not None:
        pytest.skip("needs a CPU build of torch")
    with_gpu = {finding.subject: finding for finding in doctor.devices(True)}
    assert with_gpu["gpu"].level is Level.SLOW and "CPU build" in with_gpu["gpu"].detail
    assert {finding.subject: finding for finding in doctor.devices(False)}["gpu"].level is Level.NOTE


def test_report_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "imports", lambda modules: iter(()))  # seconds, and tested above
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    doctor.doctor()
    report = capsys.readouterr().out
    assert "nothing is broken" in report
    for subject in ("packages", "cores", "memory", "disk", "wandb", "native cpu library", "ulimit -l"):
        assert subject in report
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(typer.Exit) as ended:
        doctor.doctor()
    assert ended.value.exit_code == 1
    report = capsys.readouterr().out
    assert "broken: ranks: start the ranks with torchrun or srun" in report
    assert report.rstrip().endswith("broken: ranks")


def test_the_verbs_load_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'wandb', 'transformers'}"
    code = f"import sys, rewarm.cli.doctor, rewarm.cli.config; sys.exit(bool({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(rewarm.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=PATIENCE, env=environment).returncode == 0
