"""How many threads a rank computes with, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from rewarm.config.run import RunConfig
from rewarm.engine import threads
from rewarm.engine.base import Engine
from rewarm.engine.threads import BUSY_CORES, Cores, LoadWatch, choose, product_operations, set_threads
from rewarm.model.architecture import Architecture
from rewarm.model.description import HuggingFaceModel

BIG, SMALL = 1e12, 1e6


@pytest.mark.parametrize(
    ("cores", "operations", "number", "says"),
    [
        (Cores(2), BIG, 2, "2 cores a rank"),
        (Cores(1), BIG, 1, "1 core a rank"),
        (Cores(2, 1.0), BIG, 1, "1.0 of them busy with other programs"),
        (Cores(2, 0.2), BIG, 2, "0.2 of them busy"),
        (Cores(2, 2.0), BIG, 1, "2.0 of them busy"),
        (Cores(16, 4.0), BIG, 12, "4.0 of them busy"),
        (Cores(1.5), BIG, 2, "1.5 cores a rank"),
        (Cores(16), SMALL, 1, "more would wait for each other"),
        (Cores(16), 4 * threads.LEAST_OPERATIONS, 4, "more would wait for each other"),
        (Cores(4), None, 4, "4 cores a rank"),
    ],
)
def test_free_cores_and_work_decide(cores: Cores, operations: float | None, number: int, says: str) -> None:
    chosen = choose(cores, operations)
    assert chosen.number == number and says in chosen.why, chosen


def test_the_product_of_a_micro_batch_is_counted() -> None:
    config = stage(batch={"micro_batch_size": 16, "global_batch_size": 16, "sequence_length": 128})
    assert product_operations(config, architecture()) == 2 * 16 * 128 * 128 * 352
    halved = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": 2})})
    assert product_operations(halved, architecture()) == 16 * 128 * 128 * 352
    for values, expected in (
        ({"hidden_size": 64, "intermediate_size": 100}, 64 * 100),
        ({"n_embd": 64, "n_inner": None}, 64 * 256),
        ({"text_config": {"hidden_size": 8, "intermediate_size": 16}}, 8 * 16),
    ):
        assert product_operations(config, HuggingFaceModel(dict(values))) == 2 * 16 * 128 * expected
    assert product_operations(config, HuggingFaceModel({"model_type": "odd"})) is None


def stat(path: Path, *busy: int, nice: int = 0) -> Path:
    """A /proc/stat in which each core has worked some hundredths of a second."""
    cores = [f"cpu{number} {ticks} {nice} 0 1000 5 0 0 0 0 0" for number, ticks in enumerate(busy)]
    path.write_text("\n".join([f"cpu  {sum(busy)} 0 0 1000 5 0 0 0 0 0", *cores, "intr 1 2 3"]))
    return path


def test_work_of_other_programs_is_seen_on_the_usable_cores_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    times = [0.0, 0.0]
    own = lambda: os.times_result((times[0], 0.0, times[1], 0.0, 0.0))  # noqa: E731
    monkeypatch.setattr(threads.os, "times", own)
    ticks = threads._TICKS
    watch = LoadWatch([0, 1], stat(tmp_path / "stat", 0, 0, 0))
    stat(tmp_path / "stat", ticks, ticks // 2, 10 * ticks, nice=5 * ticks)
    assert watch.busy() == 2.0 and now[0] == threads.LEAST_SECONDS
    now[0] = 2.0
    assert watch.busy() == pytest.approx(0.75)
    times[:] = [0.5, 0.5]  # of this process, and of a child of its that ended
    assert watch.busy() == pytest.approx(0.25)
    times[:] = [5.0, 0.0]
    assert watch.busy() == 0.0
    assert LoadWatch([0], tmp_path / "nothing").busy() == 0.0


class _Ranks:
    """Two ranks of one machine that may use the same two cores; this is the second."""

    rank = 1

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


@pytest.fixture
def threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_put_back")
def test_what_decides_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting, then the checkpoint, then OMP_NUM_THREADS, then the machine as it is now."""
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    monkeypatch.delenv(BUSY_CORES, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    large = stage(batch={"micro_batch_size": 1024, "global_batch_size": 1024, "sequence_length": 128})
    ranks = cast(Engine, _Ranks())
    fixed = stage(distributed={"threads": 2}, batch=large.batch.model_dump())
    numbers, message = set_threads(fixed, architecture(), ranks, [5, 5], 0.0)
    assert (numbers, message) == ([2, 2], "2 CPU threads a rank (distributed.threads)")
    numbers, message = set_threads(large, architecture(), ranks, [1, 5], 4.0)
    assert numbers == [5, 5] and torch.get_num_threads() == 5
    assert message is not None and "as the checkpoint was made with" in message and "OMP_NUM_THREADS=3" in message
    assert set_threads(large, architecture(), ranks, None, 0.0)[0] == [3, 3]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set_threads(large, architecture(), ranks, None, 0.0)[0] == [4, 4]
    assert set_threads(large, architecture(), ranks, None, 4.0)[0] == [2, 2]
    # The local launcher has looked for its ranks, and bounds other libraries by OMP_NUM_THREADS.
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv(BUSY_CORES, "6.0")
    assert set_threads(large, architecture(), ranks, None, None) == (
        [1, 1],
        "1 CPU thread a rank (4 cores a rank, 3.0 of them busy with other programs)",
    )


def test_container_quota(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.cpu_quota(tmp_path) is None


def test_threads_sleep_unless_the_user_decided() -> None:
    environment: dict[str, str] = {}
    threads.wait_passively(environment)
    assert environment == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "500", "KMP_BLOCKTIME": "0"}
    for own in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        given = dict(own)
        threads.wait_passively(given)
        assert given == own


def test_the_command_decides_before_torch_is_loaded() -> None:
    code = (
        "import os, runpy, sys; sys.argv = ['rewarm', '--help']\n"
        "try: runpy.run_module('rewarm', run_name='__main__')\n"
        "finally: print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in threads._WAITING}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "passive False"


def architecture() -> Architecture:
    config = stage()
    assert config.model is not None
    return Architecture.from_config(config.model, 300)


def stage(**sections: Any) -> RunConfig:
    shape = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4}
    return RunConfig.model_validate({"name": "a", "data": {"a": "a"}, "model": shape, **sections})
