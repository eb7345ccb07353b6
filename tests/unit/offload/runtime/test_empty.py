"""A rank without shards goes through the calls of a step like any other."""

from __future__ import annotations

import pytest

from rewarm.offload.planning.routes import Placement
from rewarm.offload.runtime.empty import EmptyAdamW
from rewarm.offload.runtime.optimizer import OffloadedAdamW


def test_a_step_without_shards() -> None:
    empty = EmptyAdamW(Placement(()))
    assert not empty.begun
    empty.begin(1, [], [])
    assert empty.begun and not empty.updating
    empty.release()
    assert not empty.begun and empty.finish() is None and empty.timeline is None
    empty.begin(2, [], [])
    empty.settle()
    assert not empty.begun and empty.step(2, [], []).seconds == 0.0 and empty.device_bytes() == 0
    other = Placement((), slots=5)
    empty.place(other)
    assert empty.placement is other
    empty.wait_gradients()
    empty.close()
    with pytest.raises(AssertionError, match="without shards"):
        empty.ready(0)


def test_every_call_that_the_engines_make_is_answered_without_shards() -> None:
    """What is inherited would look for state: only what a shard is named for may be."""
    inherited = {name for name in vars(OffloadedAdamW) if not name.startswith("_")} - set(vars(EmptyAdamW))
    assert inherited == {"read", "write", "wait", "state", "load"}
