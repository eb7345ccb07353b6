"""One contestant in a process of its own: builds its model, then makes steps when it is told to.

The parent writes one JSON line per request and reads one per answer; the rest of what a contestant prints goes to its
log. Every contestant trains the same weights on the same tokens in bfloat16 with AdamW and clipping.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rivals.sizes import Shape

MARK = "@rivals "
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIPPING = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
OURS = {"none": "none", "cpu": "cpu", "streamed": "streamed", "dos": "deep_optimizer_states", "auto": "auto"}
DEEPSPEED = ("deepspeed-2", "deepspeed-3", "twinflow")
NAMES = (*OURS, *DEEPSPEED, "hybrid")


@dataclass(frozen=True, slots=True)
class Order:
    """What a contestant is told at its start."""

    name: str
    shape: Shape
    micro_batches: int
    subgroup: int
    twinflow_ratio: float
    hybrid_fraction: float
    link: float | None
    """GB/s each way of what stands in for a link where there is no GPU."""

    def dump(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Order:
        """The inverse of :meth:`dump`."""
        values = json.loads(text)
        return cls(**{**values, "shape": Shape(**values["shape"])})


class Trainer(Protocol):
    """What a contestant is, once it is built."""

    parameters: int

    def rehearse(self, tokens: Any) -> None:
        """What a run does before its first step, if anything."""

    def step(self, tokens: Any) -> float:
        """Train on windows [micro-batches, S + 1]; the mean loss before the update, which may run on."""

    def finish(self) -> None:
        """Wait until the update of the last step has ended."""


def serve(order: Order) -> None:
    """Build, and answer requests until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log

    def answer(values: dict[str, Any]) -> None:
        out.write(MARK + json.dumps(values) + "\n")
        out.flush()

    try:
        before, began = available(), time.perf_counter()
        trainer = build(order)
        trainer.rehearse(windows(order, 0))
        answer({"parameters": trainer.parameters, "seconds": time.perf_counter() - began})
        session = Session(order, trainer, before)
        for line in sys.stdin:
            request = json.loads(line)
            answer(getattr(session, request.pop("do"))(**request))
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer({"failed": reason(error)})


class Session:
    """A built contestant and what it has done."""

    def __init__(self, order: Order, trainer: Trainer, before: float) -> None:
        self.order, self.trainer, self.before = order, trainer, before
        self.number, self.last = 0, None

    def steps(self, count: int) -> dict[str, Any]:
        """Some steps: their mean seconds, the loss of each, and the most memory so far.

        An update may run beside the step after it, so only a whole turn has a length: none is running at its start, and
        the last has ended at its end.
        """
        tokens = [windows(self.order, self.number + i) for i in range(count)]
        synchronize()
        began = time.perf_counter()
        losses = [self.trainer.step(each) for each in tokens]
        self.trainer.finish()
        synchronize()
        seconds = (time.perf_counter() - began) / count
        self.number += count
        return {"seconds": seconds, "losses": losses, **memory(self.before), **self._update()}

    def trace(self, path: str) -> dict[str, Any]:
        """One step under torch's profiler, or the executor's own times where there is no GPU."""
        import torch

        from rivals import overlap

        if not torch.cuda.is_available():
            from rewarm.offload.planning.simulate import chrome_trace

            self.steps(1)
            Path(path).write_text(chrome_trace(self.last))
            return overlap.of_timeline(self.last)
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            self.steps(1)
        profiler.export_chrome_trace(path)
        return overlap.of_profiler(Path(path))

    def _update(self) -> dict[str, Any]:
        timelines = getattr(self.trainer, "timelines", None)
        if not timelines:
            return {}
        placement = self.trainer.offload.inner.placement  # type: ignore[attr-defined]
        times = [after_release(timeline) for timeline in timelines]
        self.last = timelines[-1]
        timelines.clear()
        return {"update": times, "placement": placement.describe(), "traffic": traffic(placement)}


def after_release(timeline: Any) -> dict[str, float]:
    """Seconds from the release of an update to its end, and the shares of its work that fell into them.

    Gradients are copied, and some state is fetched, while the backward pass still runs.

    Returns:
        ``seconds``, and the share of the time of copies each way and of all tasks, ``h2d``, ``d2h`` and ``dram``.
    """
    from rewarm.offload.planning.plan import update_seconds
    from rivals.overlap import WAYS

    released = timeline.end_of("barrier")
    spans = list(zip(timeline.tasks, timeline.start, timeline.end, strict=True))
    found = {"seconds": update_seconds(timeline)}
    for way in ("h2d", "d2h", "dram"):
        mine = [
            (start, end)
            for task, start, end in spans
            if task.stream != "compute" and way in ("dram", WAYS.get(task.kind))
        ]
        whole = sum(end - start for start, end in mine)
        late = sum(max(0.0, end - max(start, released)) for start, end in mine)
        found[way] = late / whole if whole else 0.0
    return found


def build(order: Order) -> Trainer:
    """The contestant of an order."""
    cheap_weights()
    from rivals import builders

    if order.name in OURS:
        return builders.Ours(order, OURS[order.name])
    if order.name in DEEPSPEED:
        return builders.DeepSpeed(order)
    return builders.Hybrid(order)


def cheap_weights() -> None:
    """Draw a million numbers for each matrix and repeat them: drawing billions takes longer than all steps."""
    import torch

    from rewarm.model.initial import RandomTensors

    draw, block = RandomTensors.draw, 1 << 20

    def repeated(self: Any, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        numel = int(torch.Size(shape).numel())
        if len(shape) == 1 or numel <= block:
            return draw(self, name)
        self._shapes = {**self._shapes, name: (block // 64, 64)}
        found = draw(self, name).reshape(-1)
        self._shapes = {**self._shapes, name: shape}
        return found.repeat(-(-numel // block))[:numel].view(shape)

    RandomTensors.draw = repeated  # type: ignore[method-assign]


def windows(order: Order, number: int) -> Any:
    """Tokens of one step, int64 [micro-batches, S + 1]: few of them are frequent, so that a loss that falls shows."""
    import numpy as np

    shape, rng = order.shape, np.random.default_rng(number)
    drawn = rng.zipf(1.3, (order.micro_batches, shape.sequence_length + 1))
    return np.minimum(drawn - 1, shape.vocab_size - 1)


def traffic(placement: Any) -> dict[str, float]:
    """Bytes per parameter and step over the link each way and in host memory, with fp32 gradients."""
    from rewarm.offload.planning.routes import Job, costs

    job = Job(1, 0.0, 0.0, grad_bytes=4)
    found = {"h2d": 0.0, "d2h": 0.0, "dram": 0.0}
    for route in placement.routes:
        cost = costs(route, job, placement.split)
        share = 1 / len(placement.routes)
        found["h2d"] += share * cost.h2d
        found["d2h"] += share * (cost.d2h_gradient + cost.d2h_state)
        found["dram"] += share * cost.dram
    return found


def measure_machine(threads: int, seconds: float) -> dict[str, float]:
    """Bytes/s of the link alone and both ways together, and of host memory, as ``rewarm offload profile`` has them."""
    from rewarm.offload.runtime.device import open_device
    from rewarm.offload.runtime.profile import measure

    found = measure(open_device(), threads=threads, seconds=seconds)
    return {name: getattr(found, name) for name in ("h2d", "d2h", "duplex", "dram")}


def memory(before: float) -> dict[str, float]:
    """Most bytes on the GPU so far, resident in this process so far, and gone from the machine's free memory now."""
    import torch

    gpu = float(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else 0.0
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return {"gpu_bytes": gpu, "resident_bytes": resident, "host_bytes": before - available()}


def available() -> float:
    """Bytes of host memory that are free to be taken."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """One line."""
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    if not lines:
        return kind
    return lines[0] if kind in ("UserError", "RivalMissing") else f"{kind}: {lines[0]}"
