"""The commands of the README, shortened, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quickstart needs of the project, without its runs and its data."""
    folder = tmp_path_factory.mktemp("quickstart")
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def shell(place: Path, command: str, timeout: float = PATIENCE) -> str:
    """Run a command with the interpreter of the tests instead of a new environment."""
    environment = {
        **os.environ,
        "REWARM_USE_ACTIVE_PYTHON": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "framework"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "150",
        "WANDB_MODE": "offline",
    }
    ran = subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment, text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert "Traceback" not in ran.stdout and "Warning" not in ran.stdout, ran.stdout
    return ran.stdout


@pytest.fixture(scope="module")
def first(place: Path) -> str:
    """What the quickstart prints, in a folder where it was not run before."""
    return shell(place, "bash scripts/quickstart.sh 'duration=12 steps'")


def check_exports(output: str) -> None:
    for domain in ("english", "python", "cpp"):
        assert re.search(rf"{domain}: engine (\d+\.\d+), transformers \d+\.\d+ nats/token, equal to 0.0001", output)
    assert re.search(r"it writes: .The module", output)


def test_quickstart_twice_and_its_configs_on_four_ranks(place: Path, first: str) -> None:
    assert "bash scripts/quickstart.sh" in (ROOT / "README.md").read_text()
    again = shell(place, "bash scripts/quickstart.sh 'duration=12 steps'")
    check_exports(first)
    check_exports(again)
    table = [line for line in first.splitlines() if "learned" in line or "forgot" in line]
    assert table == [line for line in again.splitlines() if "learned" in line or "forgot" in line] and len(table) >= 4
    export = place / "runs" / "quickstart-continue" / "huggingface"
    assert (export / "model.safetensors").exists()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((export / name).read_text())["eos_token_id"] == 0, "nothing would end what the model writes"
    # The same stage on four ranks, as in the README, ends where one process did.
    command = "rewarm train configs/quickstart/continue.yaml parallel.tensor=2 parallel.pipeline=2"
    assert command in (ROOT / "README.md").read_text()
    shell(place, f"{command} name=ranks 'duration=12 steps'")
    ends = [shell(place, f"rewarm evaluate runs/{run} --json").strip() for run in ("quickstart-continue", "ranks")]
    losses = [re.findall(r'"loss": ([\d.]+)', end) for end in ends]
    assert len(losses[0]) == 3
    for one, four in zip(*losses, strict=True):
        assert float(four) == pytest.approx(float(one), abs=1e-4)


def test_quickstart_under_deepspeed_ends_where_megatron_does(place: Path, first: str) -> None:
    check_exports(shell(place, "bash scripts/quickstart.sh engine=deepspeed 'duration=12 steps'"))
    for stage in ("base", "continue"):
        ours, theirs = (evaluations(place / "runs" / f"quickstart-{stage}{engine}") for engine in ("", "-deepspeed"))
        assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 12]
        for one, other in zip(ours, theirs, strict=True):
            assert one["domains"].keys() == other["domains"].keys()
            for name, domain in one["domains"].items():
                assert other["domains"][name]["loss"] == pytest.approx(domain["loss"], abs=1e-4), (stage, name)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
