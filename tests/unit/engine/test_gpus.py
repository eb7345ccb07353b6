"""Ranks and GPUs of a node find each other."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rewarm.engine import device, gpus, ranks
from rewarm.engine.gpus import Seat, assign, meet
from rewarm.errors import UserError

ALL = tuple("abcdefgh")


def seats(*seen: tuple[str, ...]) -> list[Seat]:
    return [Seat(10 + local, "gpu07", local, gpus) for local, gpus in enumerate(seen)]


def names(found: list[Seat]) -> list[str]:
    """The GPU of each rank, by name; no two are the same."""
    chosen = assign(found)
    taken = [seat.gpus[chosen[seat.rank]] for seat in found]
    assert len(set(taken)) == len(taken) == len(found)
    return taken


def test_a_rank_takes_the_gpu_of_its_number_where_all_see_all() -> None:
    assert names(seats(*[ALL] * 8)) == list(ALL)
    assert names(seats(*[ALL] * 3)) == ["a", "b", "c"]


def test_a_rank_takes_its_own() -> None:
    assert names(seats(("c",), ("a",), ("b",))) == ["c", "a", "b"]
    assert names(seats(("a", "b"), ("c", "d"))) == ["a", "d"]


def test_bound_to_the_closest_in_turns_over_the_sockets() -> None:
    """srun spreads tasks over sockets in turn, so that local ranks 0, 2, 4, 6 see the first four GPUs."""
    near = [ALL[:4] if local % 2 == 0 else ALL[4:] for local in range(8)]
    assert all(gpu in near[local] for local, gpu in enumerate(names(seats(*near))))


def test_ranks_make_room_for_one_that_sees_less() -> None:
    assert names(seats(("a", "b"), ("b", "c"), ("a",))) == ["b", "c", "a"]


@pytest.mark.parametrize("seen", [[("a",)] * 2, [ALL] * 9, [("a", "b"), ("a", "b"), ("b", "a"), ("c",)]])
def test_more_ranks_than_gpus_are_the_users_to_mend(seen: list[tuple[str, ...]]) -> None:
    with pytest.raises(UserError, match=r"ranks of this job run on gpu07, .* would share one"):
        assign(seats(*seen))


def test_a_rank_joins_on_the_gpu_that_the_others_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound to the closest GPUs, ranks 0 and 2 of a node see the same two; their numbers alone would be one GPU."""
    joined: dict[str, Any] = {}
    node = seats(("a", "b"), ("c", "d"), ("a", "b"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: joined.update(current=place))
    monkeypatch.setattr(gpus, "own_seat", lambda *given: node[2])
    monkeypatch.setattr(gpus, "meet", lambda *given: node)
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **options: joined.update(options))
    ranks._join(dist.HashStore(), 12, 24, timedelta(minutes=5))
    assert joined["device_id"] == joined["current"] == torch.device("cuda", 1)
    assert os.environ["LOCAL_RANK"] == "1"  # DeepSpeed's device
    assert device.local_device() == joined["current"]


def test_each_rank_meets_those_of_its_node() -> None:
    store = dist.HashStore()
    every = [Seat(rank, f"node{rank // 2}", rank % 2, (f"gpu{rank}",)) for rank in range(4)]
    met: dict[int, list[Seat]] = {}

    def come(seat: Seat) -> None:
        met[seat.rank] = meet(store, seat, len(every), timedelta(minutes=5))

    threads = [threading.Thread(target=come, args=(seat,)) for seat in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, found in met.items():
        assert {seat.rank: seat for seat in found} == {s.rank: s for s in every if s.node == every[rank].node}
