"""How many threads a rank computes with on the CPU, and how these wait for each other. No torch at import.

OpenMP's threads spin at the end of every kernel until the last one arrives. Where another program takes a core, one of
them is not running, and the others spin for whole time slices: training is 3 to 25 times slower. So they spin for some
microseconds and then sleep, and a new run starts no more of them than there are free cores and work for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from rewarm.engine.environment import this_node
from rewarm.offload.runtime.cores import divide

if TYPE_CHECKING:
    from rewarm.config.run import RunConfig
    from rewarm.engine.base import Engine
    from rewarm.model.description import ModelDescription

BUSY_CORES = "REWARM_BUSY_CORES"
"""Environment variable: cores' worth of other programs' work, as the local launcher saw it before it started ranks."""
LEAST_OPERATIONS = 32e6
"""Floating-point operations of a matrix product below which a further thread costs more than it computes: about half a
millisecond of a core. Measured on two cores: twice as many are faster with two threads, half as many with one."""
LEAST_SECONDS = 0.5
"""Shortest time over which the load of other programs is seen."""
_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "500", "KMP_BLOCKTIME": "0"}
"""500 turns of libgomp's loop are 5 to 25 microseconds: alone as fast as its default of 300,000."""
_TICKS = os.sysconf("SC_CLK_TCK")


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep where they wait long, unless the user decided how they wait. Before torch is imported:
    the runtimes read these variables when they are loaded."""
    if not _WAITING.keys() & environment.keys():
        environment.update(_WAITING)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of CPU time that control group version 2 grants, or None without a limit."""
    try:
        granted, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if granted == "max" else int(granted) / int(period)


class LoadWatch:
    """Sees from its construction on how many cores other programs keep busy.

    Args:
        usable: the cores to look at; None means those that this process may use.
        stat: where Linux counts each core's time.
    """

    def __init__(self, usable: Sequence[int] | None = None, stat: Path = Path("/proc/stat")) -> None:
        self._usable = frozenset(os.sched_getaffinity(0) if usable is None else usable)
        self._stat = stat
        self._began, self._before = time.monotonic(), self._others()

    def busy(self) -> float:
        """Cores' worth of work of other programs since the construction, waiting until that was
        :data:`LEAST_SECONDS` ago. What runs at a lower priority than this process does not count, nor what this process
        and its ended children did."""
        time.sleep(max(0.0, LEAST_SECONDS - (time.monotonic() - self._began)))
        seconds = time.monotonic() - self._began
        return min(float(len(self._usable)), max(0.0, (self._others() - self._before) / seconds))

    def _others(self) -> float:
        """Seconds that the cores have worked for others, from some origin."""
        try:
            lines = [line.split() for line in self._stat.read_text().splitlines() if line.startswith("cpu")]
        except OSError:
            return 0.0
        total = 0.0
        for name, *counts in lines:
            if name[3:].isdigit() and int(name[3:]) in self._usable:
                user, _nice, system, _idle, _wait, irq, softirq, steal = (int(count) for count in counts[:8])
                total += (user + system + irq + softirq + steal) / _TICKS
        own = os.times()
        return total - (own.user + own.system + own.children_user + own.children_system)


@dataclass(frozen=True, slots=True)
class Cores:
    """What a rank has to compute on."""

    share: float
    """Cores of its machine, or of their time, divided by the ranks that share them."""
    busy: float = 0.0
    """Of that share, what other programs keep busy."""


@dataclass(frozen=True, slots=True)
class Threads:
    """The threads of a rank, and the reason for the number."""

    number: int
    why: str


def choose(cores: Cores, operations: float | None) -> Threads:
    """As many threads as there are free cores and work for.

    Args:
        cores: of the rank.
        operations: of one large matrix product of the model; None if not known.
    """
    free = max(1, round(cores.share - cores.busy))
    useful = free if operations is None else max(1, int(operations / LEAST_OPERATIONS))
    why = f"{cores.share:g} core{'s' if cores.share > 1 else ''} a rank"
    if round(cores.busy, 1) > 0:
        why += f", {cores.busy:.1f} of them busy with other programs"
    if useful < free:
        why += "; more would wait for each other on micro-batches this small"
    return Threads(min(free, useful), why)


def product_operations(config: RunConfig, model: ModelDescription) -> float | None:
    """Floating-point operations of the feed-forward block's first product on a micro-batch, on one rank; None if the
    model does not say how large it is."""
    from rewarm.model.architecture import Architecture

    if isinstance(model, Architecture):
        hidden, inner = model.hidden_size, model.ffn_hidden_size
    else:
        text = model.config.get("text_config")
        values = {**model.config, **(text if isinstance(text, dict) else {})}
        hidden = _first_size(values, ("hidden_size", "n_embd", "d_model"))
        inner = _first_size(values, ("intermediate_size", "n_inner", "ffn_dim")) or 4 * hidden
    if not hidden:
        return None
    tokens = config.batch.micro_batch_size * config.batch.sequence_length / config.parallel.context
    return 2.0 * tokens * hidden * inner / config.parallel.tensor


def _first_size(values: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The first of some keys that gives a size; 0 if none does."""
    return next((value for value in map(values.get, keys) if isinstance(value, int)), 0)


def set_threads(
    config: RunConfig, model: ModelDescription, engine: Engine, recorded: Sequence[int] | None, busy: float | None
) -> tuple[list[int], str | None]:
    """Decide how many threads each rank computes with, and start no more from here on. Collective.

    A number that is set wins; then what the checkpoint was made with, since sums in other parts may round otherwise;
    then OMP_NUM_THREADS; else it is chosen.

    Args:
        config: the stage.
        model: what it trains.
        engine: the ranks.
        recorded: threads of each rank, of a checkpoint that was saved on this layout.
        busy: cores' worth of other programs on this machine; None if nobody looked.

    Returns:
        The number of every rank, and a message about them, None on GPUs, where they hardly matter.
    """
    import torch

    from rewarm.engine import device

    given = None if BUSY_CORES in os.environ else os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    setting = config.distributed.threads
    cores = _cores_of_rank(engine, _busy(os.environ) if busy is None else busy)
    if isinstance(setting, int):
        threads = Threads(setting, "distributed.threads")
    elif setting != "auto":
        assert_never(setting)
    elif recorded is not None:
        threads = Threads(recorded[engine.rank], "as the checkpoint was made with")
        if given and given != str(threads.number):
            threads = Threads(
                threads.number, f"{threads.why}; OMP_NUM_THREADS={given} would be distributed.threads now"
            )
    elif given and given.isdigit() and int(given) > 0:
        threads = Threads(int(given), "OMP_NUM_THREADS")
    elif device.is_gpu():
        threads = Threads(torch.get_num_threads(), "torch's default")
    else:
        threads = choose(cores, product_operations(config, model))
    torch.set_num_threads(threads.number)
    numbers: list[int] = engine.gather(threads.number)
    if device.is_gpu():
        return numbers, None
    return numbers, f"{threads.number} CPU thread{'s' if threads.number > 1 else ''} a rank ({threads.why})"


def _busy(environment: Mapping[str, str]) -> float:
    return float(environment.get(BUSY_CORES, "0"))


def _cores_of_rank(engine: Any, busy: float) -> Cores:
    """This rank's part of its machine: cores that several ranks may use are divided among them."""
    mask = tuple(sorted(os.sched_getaffinity(0)))
    seats = engine.gather((this_node(), mask))
    here = [rank for rank, (node, _) in enumerate(seats) if node == this_node()]
    shares = divide([seats[rank][1] for rank in here], [None] * len(here))
    share = float(max(1, len(shares[here.index(engine.rank)])))
    quota = cpu_quota()
    if quota is not None:
        share = min(share, quota / len(here))
    return Cores(share, busy / len(here))
