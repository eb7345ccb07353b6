"""The native sampler, compiled for the tests, so that both paths are tried whether or not the package was installed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from patience import PATIENCE
from rewarm.mixing.native import declare

SOURCE = Path(__file__).parents[3] / "csrc" / "cpu" / "sampler.cpp"


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    target = tmp_path_factory.mktemp("native") / "sampler.so"
    command = [compiler, "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(target), str(SOURCE)]
    subprocess.run(command, check=True, timeout=PATIENCE)
    return declare(ctypes.CDLL(str(target)))
