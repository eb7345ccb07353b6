"""An offloaded update beside the backward pass that makes its gradients and the forward pass that uses its parameters.

A step begins when the first gradient of the last backward pass is final: its state is read and fetched from then on,
and each gradient is copied to the host once it is reduced. Updates wait for the global norm. The next forward pass
waits before each module for that module's own parameters; over data-parallel ranks, before each bucket is gathered.
File and line numbers are those of megatron-core 0.16.1, below ``megatron/core/``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rewarm.engine import device
from rewarm.engine.megatron.offloaded import OffloadedOptimizer
from rewarm.errors import ensure


class Replica(DistributedDataParallel):
    """Megatron-Core's replica of a chunk, without collectives where there is no other replica: they would copy every
    gradient and every parameter onto itself.

    Attributes:
        update: told of every gradient; None where nothing is offloaded.
    """

    update: Overlap | None = None
    _stale = False

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        """See the base class."""
        if self.dp_group.size() > 1:
            super().finish_grad_sync(*args, **kwargs)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        """See the base class."""
        if self.dp_group.size() > 1:
            super().start_param_sync(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """See the base class. What an update still reads is left until the first new gradient is added to it."""
        self._stale = self.update is not None and self.update.updating
        if not self._stale:
            super().zero_grad_buffer()
            return
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False
        for group in self.groups():
            group.reset()

    def groups(self) -> list[Any]:
        """The groups of buckets that are reduced and gathered together."""
        return [*self.bucket_groups, *self.expert_parallel_bucket_groups]

    def _make_backward_post_hook(self, parameter: Any) -> Callable[..., None]:
        add = super()._make_backward_post_hook(parameter)

        def hook(*unused: Any) -> None:
            if self.update is not None:
                if self._stale:
                    self._zero(self.update)
                self.update.adding(parameter)
            add(*unused)
            if self.update is not None:
                self.update.added(parameter)

        return hook

    def _zero(self, update: Overlap) -> None:
        update.wait_gradients()
        for buffer in (*self.buffers, *self.expert_parallel_buffers):
            buffer.reset()
        self._stale = False


class Overlap:
    """Begins an offloaded step, announces its gradients, and holds the next forward pass back where it must wait."""

    def __init__(self, optimizer: OffloadedOptimizer, chunks: Sequence[Replica], decoder: TransformerConfig) -> None:
        """Hook into the chunks.

        Args:
            optimizer: with its shards attached.
            chunks: this rank's parts of the model.
            decoder: their settings.
        """
        self._places = optimizer.places
        self._step = optimizer.optimizer
        self._reduces = chunks[0].dp_group.size() > 1
        self._late = {
            parameter
            for chunk in chunks
            for name, parameter in chunk.module.named_parameters()
            if _finalized(name, parameter, decoder)
        }
        self._per_pass: dict[Tensor, int] = {}
        self._calls: Counter[Tensor] = Counter()
        self._passes = 0
        self._rate: float | None = None
        self._pending: set[Tensor] = set()
        # Where parameters are gathered within the step it must have ended before.
        self._step.whole = self._reduces and not chunks[0].ddp_config.overlap_param_gather
        for chunk in chunks:
            chunk.update = self
            if self._reduces:
                self._watch_reductions(chunk)
            if not self._step.whole:
                self._gate(chunk)

    @property
    def updating(self) -> bool:
        """True while a step that was released may still run."""
        return self._step.offload.inner.updating

    def wait_gradients(self) -> None:
        """Block until an update that was released reads no gradient any more."""
        self._step.offload.inner.wait_gradients()

    @contextmanager
    def passes(self, number: int, learning_rate: float | None) -> Iterator[None]:
        """Around the forward and backward passes of a step.

        Args:
            number: micro-batches.
            learning_rate: of the update that follows; None if none does.
        """
        inner = self._step.offload.inner
        if inner.begun:
            inner.finish()  # undoes what passes that ended in an error have begun
        self._calls.clear()
        self._passes, self._rate = number, learning_rate
        self._pending = set(self._places) if learning_rate is not None else set()
        yield
        # Whoever is called once in each pass will be again; others are announced when all passes are over.
        self._per_pass = {parameter: calls // number for parameter, calls in self._calls.items() if not calls % number}
        if learning_rate is not None:
            self._begin()
            for parameter in sorted(self._pending, key=self._places.__getitem__, reverse=True):
                self._announce(parameter)
        self._rate = None

    def adding(self, parameter: Tensor) -> None:
        """A micro-batch's gradient is about to be added."""
        self._calls[parameter] += 1
        if self._rate is not None and self._is_last(parameter):
            self._begin()

    def added(self, parameter: Tensor) -> None:
        """A micro-batch's gradient has been added."""
        if self._rate is None or self._reduces or parameter in self._late:
            return
        ensure(parameter in self._pending, "a gradient was added to after the last one that was expected")
        if self._is_last(parameter):
            self._announce(parameter)

    def _is_last(self, parameter: Tensor) -> bool:
        return self._calls[parameter] == self._per_pass.get(parameter, 0) * self._passes

    def _begin(self) -> None:
        if not self._step.offload.inner.begun:
            assert self._rate is not None
            self._step.begin(self._rate)

    def _announce(self, parameter: Tensor, event: Any = None) -> None:
        self._pending.remove(parameter)
        self._step.offload.inner.ready(self._places[parameter], event)

    def _watch_reductions(self, chunk: Replica) -> None:
        """Announce gradients with the collective that reduces them, when it is started."""
        for group in chunk.groups():
            start = group.start_grad_sync

            def start_and_announce(
                *args: Any, group: Any = group, start: Callable[..., None] = start, **kwargs: Any
            ) -> None:
                start(*args, **kwargs)
                handle = group.grad_reduce_handle
                if handle is not None and not isinstance(handle, _Reduction):
                    handle = group.grad_reduce_handle = _Reduction(handle)
                if self._rate is None:
                    return
                self._begin()
                for parameter in (group.params & self._pending) - self._late:
                    self._announce(parameter, handle)

            group.start_grad_sync = start_and_announce

    def _gate(self, chunk: Replica) -> None:
        if self._reduces:
            for group in chunk.groups():
                self._gate_gather(group)
            return
        for module in chunk.module.modules():
            shards = [self._places[p] for p in module.parameters(recurse=False) if p in self._places]
            if shards:
                module.register_forward_pre_hook(lambda *unused, shards=shards: self._wait(shards))

    def _gate_gather(self, group: Any) -> None:
        start = group.start_param_sync
        shards = [self._places[p] for p in group.params if p in self._places]

        def wait_and_start(*args: Any, **kwargs: Any) -> None:
            self._wait(shards)
            start(*args, **kwargs)

        group.start_param_sync = wait_and_start

    def _wait(self, shards: Sequence[int]) -> None:
        for shard in shards:
            self._step.offload.inner.wait(shard)


@contextmanager
def forward_seconds(chunks: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Collects the seconds of each forward pass through the chunks, those of recomputation left out."""
    began, found = [0.0], []

    def before(*unused: Any) -> None:
        device.synchronize()
        began[0] = time.perf_counter()

    def after(*unused: Any) -> None:
        device.synchronize()
        found.append(time.perf_counter() - began[0])

    handles = [chunk.register_forward_pre_hook(before) for chunk in chunks]
    handles += [chunk.register_forward_hook(after) for chunk in chunks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Reduction:
    """Handle of an asynchronous reduction that several threads may wait for.

    gloo's handle copies the result into the gradients at every wait: one that came late would undo what was computed
    from them since. NCCL's lets the current stream wait, so each stream has to.
    """

    def __init__(self, handle: Any) -> None:
        self._handle, self._lock, self._done = handle, threading.Lock(), False

    def wait(self) -> None:
        """Wait for the collective: on a GPU the current stream, else the thread."""
        if device.is_gpu():
            self._handle.wait()
            return
        with self._lock:
            if not self._done:
                self._handle.wait()
                self._done = True


def _finalized(name: str, parameter: Any, decoder: TransformerConfig) -> bool:
    """True if a gradient is changed after the data-parallel reduction (distributed/finalize_model_grads.py:347-390 and
    :205-253): copies that tensor ranks hold, and embeddings that two pipeline stages share."""
    if decoder.pipeline_model_parallel_size > 1 and getattr(parameter, "shared_embedding", False):
        return True
    if decoder.tensor_model_parallel_size == 1 or getattr(parameter, "tensor_model_parallel", False):
        return False
    averaged = getattr(parameter, "average_gradients_across_tp_domain", False)
    return averaged or decoder.sequence_parallel or decoder.qk_layernorm
