"""The compiled library is really built, belongs to these sources, and its absence is told once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from patience import PATIENCE
from rewarm import native

ROOT = Path(__file__).parents[2]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Compile the libraries of this tree below a folder, as an installation does; no CUDA, to be quick."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library compiled from this tree."""
    folder = tmp_path_factory.mktemp("build")
    result = build(folder)
    assert result.returncode == 0, result.stderr
    return folder / "rewarm" / "_native" / "librewarm_cpu.so"


def test_a_build_makes_a_library_that_loads(built: Path) -> None:
    library, problem = native.open_library(built, ROOT / "csrc")
    assert problem is None and library is not None
    assert library.rewarm_max_threads() >= 1


def test_this_tree_has_its_library_built() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.load.cache_clear()
        assert native.load() is not None, f"build it: {native.REBUILD}"


def test_loading_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; from rewarm import native; native.load(); print({'torch', 'numpy'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "framework")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.stdout.strip() == "set()", result.stderr


def test_only_prefixed_names_are_exported(built: Path) -> None:
    listing = subprocess.run(["nm", "-D", "--defined-only", str(built)], capture_output=True, text=True, check=True)
    names = [line.split()[2] for line in listing.stdout.splitlines() if " T " in line]
    plain = [name for name in names if not name.startswith(("_init", "_fini", "_Z"))]
    assert "rewarm_build" in plain
    assert all(name.startswith("rewarm_") for name in plain)


def test_a_library_of_other_sources_is_refused(built: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc" / "cpu" / "library.cpp").open("a").write("// edited\n")
    library, problem = native.open_library(built, tmp_path / "csrc")
    assert library is None and problem is not None and "older or newer" in problem


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    torn = tmp_path / "librewarm_cpu.so"
    torn.write_bytes(b"\x7fELF torn")
    library, problem = native.open_library(torn)
    assert library is None and problem is not None and "cannot be loaded" in problem


def test_without_a_compiler_the_build_passes_and_says_one_line(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 0
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "was not compiled" in line]
    assert len(lines) == 1 and "no-such-compiler" in lines[0]


def test_a_missing_library_warns_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY_FOLDER", tmp_path)
    native.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="setup.py build_ext --inplace") as caught:
            assert native.load() is None
            assert native.load() is None
        assert len(caught) == 1
    finally:
        native.load.cache_clear()


def fake_nvcc(home: Path, listed: str, refused: str = "") -> dict[str, str]:
    """The environment of a build with an nvcc that lists some architectures and refuses some; it compiles nothing."""
    script = home / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    answer = f"echo {listed}" if listed else "false"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then {answer}; exit; fi
for bad in {refused}; do case "$*" in *compute_$bad,*)
    echo "nvcc fatal   : Unsupported gpu architecture 'compute_$bad'" >&2; exit 1;; esac; done
while [ $# -gt 1 ]; do [ "$1" = -o ] && output=$2; case $1 in -gencode*) all="$all $1";; esac; shift; done
echo $all > "$output"
"""
    )
    script.chmod(0o755)
    return {"CUDA_HOME": str(home), "CXX": "true"}


@pytest.mark.parametrize(
    ("listed", "refused", "wanted", "built_for", "said"),
    [
        ("compute_80 compute_90 compute_100", "", "", "80 90a 100", None),
        ("compute_80 compute_90", "100", "", "80 90a", "100"),  # CUDA 12.0 to 12.6
        ("compute_80 compute_90", "90a 100", "", "80", "90a"),  # a list that is longer than what works
        ("", "100", "", "80 90a", "100"),  # no list
        ("compute_80 compute_90", "100 120", "100;120", "90", "100, 120"),
        ("compute_75 compute_80 compute_90", "", "8.0 sm_90a", "80 90a", None),
    ],
)
def test_an_unknown_gpu_architecture_leaves_only_itself_out(
    tmp_path: Path, listed: str, refused: str, wanted: str, built_for: str, said: str | None
) -> None:
    result = build(tmp_path, **fake_nvcc(tmp_path / "cuda", listed, refused), REWARM_CUDA_ARCHS=wanted)
    assert result.returncode == 0, result.stderr
    targets = (tmp_path / "rewarm" / "_native" / "librewarm_cuda.so").read_text().split()
    ptx = built_for.split()[0].rstrip("a")
    names = [*(f"compute_{name},code=sm_{name}" for name in built_for.split()), f"compute_{ptx},code=compute_{ptx}"]
    assert targets == [f"-gencode=arch={name}" for name in names]
    lines = [line for line in result.stderr.splitlines() if "does not know GPU architecture" in line]
    assert bool(lines) == (said is not None)
    assert said is None or any(f"architecture {said}: left out" in line for line in lines)


def test_a_wrong_architecture_is_an_error(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "cuda", "compute_80")
    result = build(tmp_path, **nvcc, REWARM_CUDA_ARCHS="80;hopper")
    assert result.returncode != 0
    assert "REWARM_CUDA_ARCHS=80;hopper: 'hopper' is no architecture" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_cuda_sources_compile(architecture: str, tmp_path: Path) -> None:
    assert CUDA_SOURCES
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture.rstrip('a')}" not in listed:
        pytest.skip("this nvcc does not know it")
    for source in CUDA_SOURCES:
        output = tmp_path / f"{source.stem}.o"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Werror", "all-warnings"]
        command += ['-DREWARM_BUILD="test"', "-c", str(source), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert result.returncode == 0, result.stderr
        assert output.stat().st_size > 0
