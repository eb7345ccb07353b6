"""Output that nobody can read any more ends no run."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from rich.console import Console
from rewarm.launch.terminal import keep_going_without_terminal
keep_going_without_terminal()
print("first", flush=True)
sys.stdin.readline()
for number in range(2000):
    print("lost", flush=True)
    Console().print("lost too")
    print("and this", file=sys.stderr)
open(sys.argv[1], "w").write(f"{sys.stdout.isatty()} {sys.stdout.fileno()} {sys.stdout.encoding}")
"""


def start(path: Path, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(path)], stdin=subprocess.PIPE, stdout=output, stderr=output,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"}, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full disk"])
def test_a_process_ends_well_whose_output_cannot_be_written(tmp_path: Path, kind: str) -> None:
    if kind == "full disk":
        reader, writer = -1, os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    process = start(tmp_path / "end", writer)
    os.close(writer)
    if reader >= 0:
        assert os.read(reader, 5) == b"first"
        os.close(reader)
    assert process.stdin is not None
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.wait() == 0
    terminal, descriptor, encoding = (tmp_path / "end").read_text().split()
    assert descriptor == "1" and encoding == "utf-8" and terminal in ("True", "False")


def test_what_can_be_written_arrives_whole_and_in_order(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = start(tmp_path / "end", writer)
    os.close(writer)
    assert process.stdin is not None
    process.stdin.write(b"go on\n")
    process.stdin.close()
    with open(reader) as file:
        lines = file.read().splitlines()
    assert process.wait() == 0
    assert lines == ["first", *["lost", "lost too", "and this"] * 2000]
