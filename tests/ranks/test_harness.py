"""The harness itself: ranks that hang or die are noticed, and none is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from patience import PATIENCE
from ranks import workers
from ranks.harness import RanksFailed, run_ranks


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_in_rank_order() -> None:
    assert [rank for rank, _ in run_ranks(workers.identity, 3)] == ["0", "1", "2"]


def test_a_hanging_rank_is_ended(tmp_path: Path) -> None:
    for seconds in (10.0, 100.0, 1000.0):  # a slow machine needs some to start the ranks
        with pytest.raises(RanksFailed, match="--- rank 1 ---\ndid not finish"):
            run_ranks(workers.hang_on_rank_one, 2, tmp_path, timeout=seconds)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        if len(pids) >= 2:
            break
    assert len(pids) >= 2
    deadline = time.monotonic() + PATIENCE
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))
    assert os.getpid() not in pids


def test_a_dying_rank_is_noticed_before_the_time_is_up() -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(workers.die_on_rank_one, 2)
    assert "--- rank 0 ---\nwas still waiting for the others" in str(caught.value)
    assert "--- rank 1 ---\nended without a result" in str(caught.value)
