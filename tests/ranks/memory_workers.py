"""What a rank really holds during a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ranks.tiny import DOMAINS, VOCAB_SIZE, local_batch, tiny_config
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
