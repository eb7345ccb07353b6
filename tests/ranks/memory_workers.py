"""What a rank really holds during a step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranks.tiny import DOMAINS, VOCAB_SIZE, global_batch, local_batch, tiny_config
from rewarm.engine.build import build_engine
from rewarm.engine.megatron.engine import MegatronEngine
from rewarm.model.architecture import Architecture
from rewarm.model.layout import Layout


class _Held:
    """Bytes of storages that wait for a backward pass, now and at most."""

    def __init__(self, ignored: set[int]) -> None:
        self._users: Counter[int] = Counter()
        self._ignored = ignored
        self.now = self.most = 0

    def take(self, tensor: Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._ignored:
            return _Saved(self, tensor, 0)
        self._users[storage.data_ptr()] += 1
        if self._users[storage.data_ptr()] == 1:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        return _Saved(self, tensor, storage.data_ptr())

    def drop(self, place: int, size: int) -> None:
        if place:
            self._users[place] -= 1
            if self._users[place] == 0:
                self.now -= size


class _Saved:
    def __init__(self, held: _Held, tensor: Tensor, place: int) -> None:
        self._held, self.tensor, self._place = held, tensor, place

    def __del__(self) -> None:
        self._held.drop(self._place, self.tensor.untyped_storage().nbytes())


def held_bytes(settings: dict[str, Any]) -> tuple[Layout, dict[str, int]]:
    """Bytes of the kinds that a plan predicts, counted on the rank's own tensors."""
    config = tiny_config(**settings)
    assert config.model is not None
    engine = build_engine(config, Architecture.from_config(config.model, VOCAB_SIZE), DOMAINS)
    assert isinstance(engine, MegatronEngine)
    parameters = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    held = _Held({parameter.untyped_storage().data_ptr() for parameter in parameters})
    with saved_tensors_hooks(held.take, lambda saved: saved.tensor):
        engine.train_step(local_batch(engine, 0), 1e-3)
    optimizer = engine._optimizer.sharded.optimizer
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if config.precision == "bfloat16":
        state += owned
    buffers = [buffer for chunk in engine._wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    sizes = {
        "parameters": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "gradients": sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
        "optimizer": sum(tensor.numel() * tensor.element_size() for tensor in state),
        "for backward": held.most,
    }
    layout = engine.layout
    engine.close()
    return layout, sizes


class _New(TorchDispatchMode):
    """Bytes of the storages that operators have made in this block, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Callable[[], Any]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if not isinstance(each, Tensor):
                continue
            storage = each.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._alive:
                # One object stands for a storage as long as that lives; its size may change.
                self._alive[storage._cdata] = weakref.ref(storage)
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        held = [find() for find in list(self._alive.values())]
        self.most = max(self.most, sum(storage.nbytes() for storage in held if storage is not None))
        return result


def _most_new(action: Callable[[], Any]) -> int:
    with _New() as new:
        action()
    return new.most


def peaks(settings: dict[str, Any]) -> dict[str, int]:
    """Most bytes that are made, and held at once, in a step and in evaluations."""
    config = tiny_config(**settings)
    assert config.model is not None
    engine = build_engine(config, Architecture.from_config(config.model, VOCAB_SIZE), DOMAINS)
    engine.train_step(local_batch(engine, 0), 1e-3)
    tokens, size = np.concatenate([global_batch(step).tokens for step in range(2)]), config.evaluation_micro_batch_size
    return {
        "training": _most_new(lambda: engine.train_step(local_batch(engine, 1), 1e-3)),
        "evaluation": _most_new(lambda: engine.evaluate(tokens, size)),
        "evaluation of 8": _most_new(lambda: engine.evaluate(tokens, 8)),
    }


def main_parameters(settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes that Megatron-Core holds at once while it makes the fp32 main parameters, and bytes of all of them."""
    from rewarm.engine.megatron.offloaded import OffloadedOptimizer

    name, most = "_build_model_and_main_param_groups", []
    build = getattr(OffloadedOptimizer, name)

    def watched(cls: type, *args: Any) -> Any:
        with _New() as new:
            result = build(*args)
        most.append(new.most)
        return result

    setattr(OffloadedOptimizer, name, classmethod(watched))
    config = tiny_config(precision="bfloat16", **settings)
    assert config.model is not None
    engine = build_engine(config, Architecture.from_config(config.model, VOCAB_SIZE), DOMAINS)
    assert isinstance(engine, MegatronEngine)
    owned = engine._optimizer.sharded.optimizer.owned
    assert all(each.main.untyped_storage().nbytes() == 0 and each.main.dtype == torch.float32 for each in owned)
    return most[0], sum(4 * each.shard.numel() for each in owned)
