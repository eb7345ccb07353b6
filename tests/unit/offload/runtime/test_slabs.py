"""Layouts hold every element once; the pool wastes less than a page and never more than its limit."""

from __future__ import annotations

import ctypes
import mmap
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.errors import UserError
from rewarm.offload.runtime.slabs import ALIGNMENT, HostPool, ParameterShard, StateLayout, bind_to_node

SHARDS = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 2)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(1, 4000))
def test_every_element_belongs_to_one_segment_of_its_group(sizes: list[tuple[int, int]], size: int) -> None:
    layout = StateLayout.of([ParameterShard(str(i), numel, group) for i, (numel, group) in enumerate(sizes)], size)
    assert layout.subgroup_size % ALIGNMENT == 0 and layout.numel % ALIGNMENT == 0
    group = torch.full((layout.numel,), -1)
    for subgroup in range(layout.subgroups):
        start, stop = layout.bounds(subgroup)
        end = 0
        for segment in layout.segments(subgroup):
            assert segment.start == end
            group[start + segment.start : start + segment.stop] = segment.group
            end = segment.stop
        assert end == stop - start
    flat = torch.arange(layout.numel)
    seen: set[int] = set()
    for i, shard in enumerate(layout.shards):
        view = layout.view(flat, i)
        assert bool((layout.view(group, i) == shard.group).all())
        assert seen.isdisjoint(view.tolist())
        seen.update(view.tolist())
        touched = {position // layout.subgroup_size for position in view.tolist()}
        assert touched == set(layout.subgroups_of(i))


def test_buffers_begin_on_a_page_and_take_their_size() -> None:
    pool = HostPool(pin=False)
    size = 3 * (1 << 20) + 5
    buffer = pool.take(size, torch.uint8)
    assert buffer.data_ptr() % mmap.PAGESIZE == 0 and buffer.numel() == size
    assert pool.taken - size < mmap.PAGESIZE
    assert pool.take(1000, torch.float32).dtype == torch.float32


def test_a_returned_buffer_is_used_again_and_neighbours_are_left_alone() -> None:
    pool = HostPool(pin=False)
    first, second = pool.take(10_000, torch.float32), pool.take(10_000, torch.float32)
    first.fill_(1.0)
    second.fill_(2.0)
    pointer, taken = first.data_ptr(), pool.taken
    pool.give(first)
    again = pool.take(10_000, torch.float32)
    assert again.data_ptr() == pointer and pool.taken == taken
    again.fill_(3.0)
    assert bool((second == 2.0).all())


def test_the_limit_is_told_in_figures() -> None:
    pool = HostPool(pin=False, limit=1e6)
    with pytest.raises(UserError, match="limited to 0.00 GB, 0.01 GB are needed"):
        pool.take(2_000_000, torch.float32)


def resident() -> int:
    """Bytes of anonymous memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_what_nobody_uses_makes_room_for_other_sizes() -> None:
    size = 96 << 20
    pool = HostPool(pin=False, limit=size + (8 << 20))
    first, kept = pool.take(size, torch.uint8).fill_(1), pool.take(4096, torch.uint8).fill_(2)
    held = resident()
    pool.give(first)
    del first
    assert pool.taken == size + 4096  # kept for the next one of its size
    half = pool.take(size // 2, torch.uint8).fill_(3)  # for which there is no room beside it
    assert pool.taken == size // 2 + 4096
    assert resident() < held - size // 4
    assert bool((kept == 2).all()) and bool((half == 3).all())


def policy_of(pointer: int) -> tuple[int, int]:
    """NUMA policy and nodes of a page, from the kernel."""
    mode, mask, of_address, bits = ctypes.c_int(-1), ctypes.c_ulong(0), 2, 64
    number = {"x86_64": 239, "aarch64": 236}[platform.machine()]
    wide = (ctypes.c_ulong(bits), ctypes.c_ulong(pointer), ctypes.c_ulong(of_address))
    answer = ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.byref(mode), ctypes.byref(mask), *wide)
    if answer != 0:
        pytest.skip("this kernel does not tell")
    return mode.value, mask.value


def test_memory_is_bound_to_the_node_before_it_is_touched() -> None:
    free = HostPool(pin=False).take(1 << 20, torch.uint8)
    bound = HostPool(pin=False, node=0).take(1 << 20, torch.uint8)
    if not bind_to_node(free.data_ptr(), 4096, 0):
        pytest.skip("a container may forbid it")
    default, preferred = 0, 1
    assert policy_of(free.data_ptr() + 4096)[0] == default
    assert policy_of(bound.data_ptr()) == (preferred, 1) == policy_of(bound.data_ptr() + (1 << 20) - 4096)
    assert bound.fill_(7).sum() == 7 << 20


def test_an_absent_node_is_refused() -> None:
    buffer = HostPool(pin=False).take(1 << 20, torch.uint8)
    assert not bind_to_node(buffer.data_ptr(), 1 << 20, 50)


def test_memory_that_cannot_be_had_is_told() -> None:
    with pytest.raises(UserError, match=r"cannot get 1125899\.91 GB of host memory: Cannot allocate") as caught:
        HostPool(pin=False).take(1 << 50, torch.uint8)
    assert "offload.host_memory" in str(caught.value)


def flags_of(pointer: int) -> set[str]:
    """What the kernel has noted of the mapping that an address lies in."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            here = start <= pointer < end
        elif here and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("it is not mapped")


def test_a_child_gets_no_copy_of_what_a_drive_may_be_writing() -> None:
    """After a fork Linux may give the bytes of a direct read to either of the two that share a page."""
    not_copied = "dc"
    assert not_copied in flags_of(HostPool(pin=False).take(1 << 20, torch.uint8).data_ptr())
    assert not_copied not in flags_of(torch.ones(1 << 22).data_ptr())
