"""The tokenizing processes end with the build, however that ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from patience import PATIENCE
from unit.data.helpers import start_python

_STUCK = """
import multiprocessing, os, re, sys, time
from rewarm.data import pool

def stuck(parent):
    pool._start_worker(None, parent, 1)
    print(os.getpid(), flush=True)
    # Never ends, and never lets another thread of this process run.
    re.match("(a|a)*b", "a" * 60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=stuck, args=(os.getpid(),)).start()
    time.sleep(600)
"""
_BUILD = """
import sys, time
from pathlib import Path
from rewarm.data import inputs, pool
from rewarm.data.build import BuildSettings, build_domain
inputs.SHARD_BYTES = 1
pool.encode_batch = lambda *_: time.sleep(10**6)  # in the workers too, which import this file
if __name__ == "__main__":
    places = (sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3])
    build_domain(BuildSettings(*places, held_out=0, workers=2), lambda what, done, _: print(what, done, flush=True))
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_stuck_in_a_library_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "script.py"
    script.write_text(_STUCK)
    process = start_python(str(script))
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.send_signal(number)
    process.wait()
    limit = time.monotonic() + PATIENCE
    try:
        while _runs(worker):
            assert time.monotonic() < limit, "the worker outlived its parent"
            time.sleep(0.05)
    finally:
        if _runs(worker):
            os.kill(worker, signal.SIGKILL)


def test_an_interrupt_does_not_wait_for_documents_in_hand(tmp_path: Path, tokenizer_folder: Path) -> None:
    script, inputs = tmp_path / "script.py", tmp_path / "inputs"
    script.write_text(_BUILD)
    inputs.mkdir()
    for name in ("a", "b"):
        (inputs / f"{name}.txt").write_text("a document that takes hours")
    process = start_python(str(script), str(inputs), str(tmp_path / "out"), str(tokenizer_folder))
    assert process.stdout is not None
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert "KeyboardInterrupt" in errors and len(children) == 3  # two workers and multiprocessing's tracker
    limit = time.monotonic() + PATIENCE
    while any(_runs(int(child)) for child in children):
        assert time.monotonic() < limit, "a worker outlived its parent"
        time.sleep(0.05)
