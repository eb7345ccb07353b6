"""Runs a placement: the tasks of :mod:`rewarm.offload.planning.pipeline` on one thread per stream.

Each stream takes its tasks in order, waits for what each depends on, does it, and says so. On CUDA a stream's thread
issues on a stream of its own. The engine signals gradients as they become ready, releases the update once the global
norm is known, and waits for each subgroup's parameters before the layers that use them.

Strict by construction: every route runs the same correctly rounded update on the same numbers, and what moves is
moved as it is, so parameters and moments have the bits of the update without offload.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rewarm.errors import ensure
from rewarm.kernels import adamw
from rewarm.offload.planning.pipeline import step_tasks
from rewarm.offload.planning.routes import Job, Machine, Placement
from rewarm.offload.planning.simulate import Task, Timeline
from rewarm.offload.runtime.device import Device
from rewarm.offload.runtime.pieces import Pieces
from rewarm.offload.runtime.slabs import StateLayout
from rewarm.offload.runtime.states import States

log = logging.getLogger(__name__)

_EXTERNAL = ("backward", "barrier", "forward")


@dataclass(frozen=True, slots=True)
class GroupStep:
    """Settings of one parameter group in one step."""

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> GroupStep:
        """Of a parameter group of torch."""
        beta1, beta2 = group["betas"]
        return cls(group["lr"], group["weight_decay"], beta1, beta2, group["eps"])

    def constants(self, number: int, grad_scale: float = 1.0) -> adamw.AdamWStep:
        """What the kernel is given.

        Args:
            number: the step, from 1.
            grad_scale: unscale factor times clip factor.
        """
        return adamw.AdamWStep.prepare(
            step=number,
            learning_rate=self.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
            weight_decay=self.weight_decay,
            grad_scale=grad_scale,
        )


@dataclass
class _Step:
    """What the streams of one step share."""

    number: int
    groups: Sequence[GroupStep]
    done: list[threading.Event]
    start: list[float]
    end: list[float]
    events: dict[int, Sequence[Any]] = field(default_factory=dict)
    constants: list[adamw.AdamWStep] = field(default_factory=list)
    error: BaseException | None = None
    released: bool = False
    abandoned: bool = False

    @property
    def stopped(self) -> bool:
        """True if what is left of it must not be done."""
        return self.abandoned or self.error is not None


class Executor:
    """AdamW over the flat state of one rank under a placement."""

    def __init__(
        self,
        layout: StateLayout,
        placement: Placement,
        job: Job,
        device: Device,
        states: States,
        *,
        parameters: torch.Tensor | Pieces,
        gradients: torch.Tensor | Pieces,
        cpu_threads: int = 1,
        cores: Sequence[int] | None = None,
    ) -> None:
        """Bind the executor to an engine's buffers.

        Args:
            layout: the flat state and its cut.
            placement: a route for each of its subgroups.
            job: widths of gradients and parameters, and whether the update waits for :meth:`release`.
            device: where parameters and gradients are.
            states: the optimizer state, allocated for the same placement.
            parameters: the engine's, bf16, fp16 or fp32 on the device, or a flat [layout.numel]; rewritten.
            gradients: the engine's, on the device, or a flat [layout.numel]; read by each step.
            cpu_threads: threads of the CPU's update.
            cores: cores that these threads are pinned to; None leaves them alone.
        """
        assert len(placement.routes) == layout.subgroups
        self.layout, self.placement, self.job, self.device, self.states = layout, placement, job, device, states
        self.parameters, self.gradients = parameters, gradients
        self._parameters = parameters if isinstance(parameters, Pieces) else Pieces(layout, parameters)
        self._gradients = gradients if isinstance(gradients, Pieces) else Pieces(layout, gradients)
        self.cpu_threads = max(1, round(cpu_threads * placement.cpu_share))
        self.cores = cores
        self.tasks = step_tasks(_UNIT_MACHINE, job, placement)
        self.index = {(task.kind, task.subgroup): i for i, task in enumerate(self.tasks)}
        self.step: _Step | None = None
        self.failure: BaseException | None = None
        self._actions = self._table()
        self._streams = self._start_streams()

    def begin(self, number: int, groups: Sequence[GroupStep]) -> None:
        """Start a step; its fetches begin at once.

        Args:
            number: the step, from 1.
            groups: settings of each parameter group of the layout.
        """
        ensure(self.step is None, "the step before has not been finished")
        ensure(self.failure is None, "a stream failed in an earlier step: the state is not whole any more")
        count = len(self.tasks)
        step = _Step(number, groups, [threading.Event() for _ in range(count)], [0.0] * count, [0.0] * count)
        self.step, self._began = step, time.perf_counter()
        if not self.job.clip:
            self._prepare(step, 1.0)
        for tasks in self._streams.values():
            tasks.put(step)

    def use_gradients(self, gradients: Pieces) -> None:
        """Read other tensors from the next step on."""
        ensure(self.step is None, "the step before has not been finished")
        self.gradients = self._gradients = gradients

    def gradient_ready(self, subgroup: int, events: Sequence[Any] | None = None) -> None:
        """A subgroup's gradient is there as soon as the work that was queued for it is done.

        Args:
            subgroup: its index.
            events: of all that work (:meth:`~rewarm.offload.runtime.device.Device.wait`); None means that the calling
                thread has queued it.
        """
        self._signal("backward", subgroup, events)

    def release(self, grad_scale: float = 1.0) -> None:
        """Begin the updates.

        Args:
            grad_scale: unscale factor times clip factor. Without clipping the updates have begun as gradients became
                ready, and the factor must be 1.
        """
        step = self._running()
        ensure(self.job.clip or grad_scale == 1.0, "without clipping the update does not wait for a factor")
        if self.job.clip:
            self._prepare(step, grad_scale)
        step.released = True
        self._signal("barrier", None)

    def abandon(self) -> None:
        """Undo a step that was begun and not released; returns when nothing of it runs any more.

        What has happened until then leaves no trace: state was copied into slots, gradients to the host.
        """
        step = self._running()
        ensure(self.job.clip and not step.released, "updates may have been made already")
        step.abandoned = True
        for i, task in enumerate(self.tasks):
            if task.kind in _EXTERNAL:
                step.done[i].set()
        self._drain(step)

    def wait_parameters(self, subgroup: int) -> None:
        """Block until a subgroup's new parameters are on the device."""
        step = self._running()
        key = ("upload", subgroup) if ("upload", subgroup) in self.index else ("update", subgroup)
        step.done[self.index[key]].wait()
        self._raise(step)
        gate = self.index[("forward", subgroup)]
        if not step.done[gate].is_set():
            self._signal("forward", subgroup, ())

    def wait_gradients(self) -> None:
        """Block until nothing of this step reads a gradient any more."""
        step = self._running()
        for i, task in enumerate(self.tasks):
            # The device updates from the gradients themselves, the CPU from its copy.
            reads = task.kind == "update" and self.placement.routes[_subgroup(task)].on_device
            if reads or task.kind == "gradient":
                step.done[i].wait()
        self._raise(step)

    def finish(self) -> Timeline:
        """Block until the step's last copy is done.

        Returns:
            When each task ran, seconds from :meth:`begin`; a compute task has the moment at which it was signalled,
            and a forward task is there if its parameters were waited for.
        """
        step = self._running()
        self._drain(step)
        shift = self._began
        start = tuple(max(0.0, moment - shift) for moment in step.start)
        end = tuple(max(0.0, moment - shift) for moment in step.end)
        rows = [i for i, task in enumerate(self.tasks) if task.kind != "forward" or step.done[i].is_set()]
        renumbered = tuple(self.tasks[i] for i in rows)
        return Timeline(renumbered, tuple(start[i] for i in rows), tuple(end[i] for i in rows))

    def run_step(self, number: int, groups: Sequence[GroupStep], grad_scale: float = 1.0) -> Timeline:
        """A whole step with gradients that are all there."""
        self.begin(number, groups)
        for subgroup in reversed(range(self.layout.subgroups)):
            self.gradient_ready(subgroup)
        self.release(grad_scale)
        return self.finish()

    def close(self) -> None:
        """End the streams, after what was released. The state stays where it is."""
        step, patience = self.step, None
        if step is not None and not step.released:
            # After an error elsewhere: a stream may stand in a collective that never ends, and holds nothing else.
            step.abandoned, patience = True, 5.0
            for event in step.done:
                event.set()
        for tasks in self._streams.values():
            tasks.put(None)
        for thread in self._threads:
            thread.join(patience)
        if step is not None and step.error is not None and self.failure is None:
            log.error("the last update of the optimizer's state failed", exc_info=step.error)

    def _running(self) -> _Step:
        assert self.step is not None, "no step has begun"
        return self.step

    def _prepare(self, step: _Step, grad_scale: float) -> None:
        step.constants.extend(group.constants(step.number, grad_scale) for group in step.groups)

    def _signal(self, kind: str, subgroup: int | None, events: Sequence[Any] | None = None) -> None:
        step = self._running()
        i = self.index[(kind, subgroup)]
        step.events[i] = (self.device.record_event(),) if events is None else events
        step.start[i] = step.end[i] = time.perf_counter()
        step.done[i].set()

    def _drain(self, step: _Step) -> None:
        for i, task in enumerate(self.tasks):
            if task.kind not in _EXTERNAL:
                step.done[i].wait()
        self.step = None
        self._raise(step)

    def _raise(self, step: _Step) -> None:
        if step.error is not None:
            self.failure = step.error
            raise step.error

    def _start_streams(self) -> dict[str, queue.SimpleQueue[_Step | None]]:
        work: dict[str, list[int]] = {}
        for i, task in enumerate(self.tasks):
            if task.kind not in _EXTERNAL:
                work.setdefault(task.stream, []).append(i)
        queues: dict[str, queue.SimpleQueue[_Step | None]] = {stream: queue.SimpleQueue() for stream in work}
        self._threads = [
            threading.Thread(
                target=self._run_stream,
                args=(stream, work[stream], queues[stream]),
                name=f"offload-{stream}",
                daemon=True,
            )
            for stream in work
        ]
        for thread in self._threads:
            thread.start()
        return queues

    def _run_stream(self, name: str, work: list[int], steps: queue.SimpleQueue[_Step | None]) -> None:
        if name == "cpu" and self.cores:
            self._pin(self.cores)
        with self.device.stream(name):
            while (step := steps.get()) is not None:
                for i in work:
                    self._run(step, i, self.tasks[i])

    def _pin(self, cores: Sequence[int]) -> None:
        """Keep this thread on its cores; the threads of its OpenMP team inherit that."""
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:  # the job's cores were changed since they were counted
            log.warning("the update runs on any core: this process may not use %s: %s", list(cores), error.strerror)

    def _run(self, step: _Step, i: int, task: Task) -> None:
        try:
            for earlier in task.after:
                step.done[earlier].wait()
                for event in () if step.stopped else step.events.get(earlier, ()):
                    self.device.wait(event)
            step.start[i] = time.perf_counter()
            if not step.stopped:
                self._actions[task.kind](step, task)
        except BaseException as error:
            step.error = step.error or error
        finally:
            # Even after an error everyone is woken, so that finish() can raise it.
            step.end[i] = time.perf_counter()
            step.done[i].set()

    def _table(self) -> Mapping[str, Callable[[_Step, Task], None]]:
        return {
            "gradient": self._copy_gradient,
            "read": lambda step, task: self.states.read(_subgroup(task), task.host_slot),
            "fetch": lambda step, task: self.states.fetch(_subgroup(task), task.slot, task.host_slot),
            "update": self._update,
            "upload": self._upload,
            "flush": lambda step, task: self.states.flush(_subgroup(task), task.slot, task.host_slot),
            "write": lambda step, task: self.states.write(_subgroup(task), task.host_slot),
        }

    def _copy_gradient(self, step: _Step, task: Task) -> None:
        subgroup = _subgroup(task)
        target = self.states.host_gradient(subgroup)
        for piece in self._gradients.of(subgroup):
            self.device.copy(target[piece.span], piece.tensor, "d2h")

    def _upload(self, step: _Step, task: Task) -> None:
        subgroup = _subgroup(task)
        source = self.states.host_parameters(subgroup, task.host_slot)
        for piece in self._parameters.of(subgroup):
            self.device.copy(piece.tensor, source[piece.span], "h2d")

    def _update(self, step: _Step, task: Task) -> None:
        subgroup, began = _subgroup(task), time.perf_counter()
        on_device = self.placement.routes[subgroup].on_device
        state = self.states.working(subgroup, task.slot, task.host_slot)
        half = self._parameters.dtype != torch.float32
        out = None if on_device or not half else self.states.host_parameters(subgroup, task.host_slot)
        host_gradient = None if on_device else self.states.host_gradient(subgroup)
        for piece, gradient in zip(self._parameters.of(subgroup), self._gradients.of(subgroup), strict=True):
            span, parameter = piece.span, piece.tensor
            grad = gradient.tensor if host_gradient is None else host_gradient[span]
            target = (parameter if out is None else out[span]) if half else None
            state.update(step.constants[piece.group], span, parameter, grad, target, self.cpu_threads)
            if on_device and not half and state.master is not None:
                parameter.copy_(state.master[span])
        self.device.settle()
        if not on_device:
            self.device.pace_host(state.moment1.numel(), began)


def _subgroup(task: Task) -> int:
    assert task.subgroup is not None
    return task.subgroup


_UNIT_MACHINE = Machine(
    h2d=1.0,
    d2h=1.0,
    duplex=2.0,
    dram=1.0,
    cpu_rate=1.0,
    device_rate=1.0,
    device_free=0.0,
    host_free=0.0,
    device_free_backward=1e30,
    nvme_read=1.0,
    nvme_write=1.0,
)
"""Rates play no part in the order of the tasks. Slots are taken from the start: the executor owns their memory."""
