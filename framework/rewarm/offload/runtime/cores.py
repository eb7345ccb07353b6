"""Which cores each rank of a node updates on: its own, on the NUMA node of its GPU (standard library only)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_SYSTEM = Path("/sys")


def cores_of_node(node: int, system: Path = _SYSTEM) -> frozenset[int]:
    """Cores of a NUMA node, none if Linux does not say."""
    return _numbers(system / f"devices/system/node/node{node}/cpulist")


def divide(
    usable: Sequence[Sequence[int]], nodes: Sequence[int | None], system: Path = _SYSTEM
) -> list[tuple[int, ...]]:
    """A share of the cores for each rank of a machine; no core is in two of them.

    A rank keeps to the NUMA node of its GPU where its affinity mask allows that: the state that it updates lies there.
    Ranks that may use the same cores divide them evenly, with the hardware threads of a core side by side.

    Args:
        usable: affinity mask of each rank.
        nodes: NUMA node of each rank's GPU, None where it is not known.
        system: where Linux describes the machine.

    Returns:
        Cores of each rank, sorted; none where more ranks want the same cores than there are.
    """
    wanted = []
    for mask, node in zip(usable, nodes, strict=True):
        near = frozenset(mask) & (frozenset() if node is None else cores_of_node(node, system))
        wanted.append(near or frozenset(mask))
    taken: set[int] = set()
    found: list[tuple[int, ...]] = [()] * len(wanted)
    # The smallest choice first: who may use few cores is not left without.
    for choice in sorted(set(wanted), key=lambda cores: (len(cores), sorted(cores))):
        ranks = [rank for rank, cores in enumerate(wanted) if cores == choice]
        free = sorted(choice - taken, key=lambda core: (_first_sibling(core, system), core))
        size = len(free) // len(ranks)
        for place, rank in enumerate(ranks):
            found[rank] = tuple(sorted(free[place * size : (place + 1) * size]))
        taken |= choice
    return found


def _first_sibling(core: int, system: Path) -> int:
    """Lowest hardware thread of the core that a hardware thread belongs to."""
    folder = system / f"devices/system/cpu/cpu{core}/topology"
    return min(_numbers(folder / "thread_siblings_list"), default=core)


def _numbers(path: Path) -> frozenset[int]:
    """What a list such as ``0-3,8`` names, none if there is no such file."""
    try:
        parts = path.read_text().strip().split(",")
    except OSError:
        return frozenset()
    ranges = [part.partition("-") for part in parts if part]
    return frozenset(core for first, _, last in ranges for core in range(int(first), int(last or first) + 1))
