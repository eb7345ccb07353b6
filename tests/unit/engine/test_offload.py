"""From settings to a placement: what ranks share, and what the machine refuses."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewarm.engine.placement import free_space, stretched
from rewarm.errors import UserError
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.routes import Placement, Route
from rewarm.offload.runtime.slabs import HostPool


@given(st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any), st.integers(1, 60))
def test_ranks_with_more_or_fewer_subgroups_keep_the_shares(shares: list[int], subgroups: int) -> None:
    counts = dict(zip(Route, shares, strict=True))
    placement = Placement(interleave(counts), slots=2, split=True, early=sum(shares) // 2)
    other = stretched(placement, subgroups)
    assert len(other.routes) == subgroups and other.slots == 2 and other.split
    assert 0 <= other.early <= subgroups
    for route in Route:
        exact = counts[route] * subgroups / sum(shares)
        assert abs(other.count(route) - exact) <= 1


def test_memory_that_cannot_be_locked_is_told_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA answers when the limit of locked memory is passed; there is no other way to have it here."""
    refusing = SimpleNamespace(cudaHostRegister=lambda pointer, size, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(UserError, match=r"cannot lock 0\.01 GB .*ulimit -l is") as caught:
        HostPool(pin=True).take(1 << 20, torch.float64)
    assert "LimitMEMLOCK" in str(caught.value)


def test_two_folders_of_a_drive_have_its_space_once(tmp_path: Path) -> None:
    """The system's drive and the one in memory that Linux has at /dev/shm."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    one, other = free_space([str(folders[0])]), free_space(["/dev/shm"])
    assert os.stat(tmp_path).st_dev != os.stat("/dev/shm").st_dev
    # Others write meanwhile.
    assert free_space([*map(str, folders)]) == pytest.approx(one, rel=0.1)
    assert free_space([*map(str, folders), "/dev/shm"]) == pytest.approx(one + other, rel=0.1)
    assert free_space([]) == 0
