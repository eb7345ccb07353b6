"""Megatron-Core's distributed optimizer with the state of its shards under the run's offload section.

The checkpoint is that of the plain optimizer: both read and set a shard's main parameter and moments through the same
two methods, which here go to wherever the state rests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from rewarm.config.offload import OffloadConfig
from rewarm.engine.megatron import compat
from rewarm.engine.megatron.update import ShardOptimizer
from rewarm.engine.offload import Offload
from rewarm.engine.state import MOMENTS
from rewarm.offload.runtime.execute import GroupStep


@dataclass(frozen=True, slots=True)
class _Owned:
    """This rank's shard of a parameter."""

    parameter: Any
    """The model's, whole."""
    shard: Tensor
    """Flat view of this rank's part of it."""
    main: Tensor
    """What the inner optimizer holds in its groups: the shard itself in fp32, else an fp32 tensor of its shape, without
    memory."""
    gradient: Tensor
    """Flat view of Megatron-Core's buffer of gradients."""
    group: int


class OffloadedAdamWStep(ShardOptimizer):
    """AdamW whose moments, and fp32 parameters where the model's are 16 bits, are not torch's to hold.

    Attributes:
        whole: a step has ended when :meth:`step` returns; else it runs on beside what follows.
    """

    offload: Offload
    owned: list[_Owned]
    gradients: list[Tensor]
    whole = True

    def allocate(self) -> None:
        """Mark every parameter as having state, so that nothing is allocated for it at a load."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {}

    def begin(self, learning_rate: float) -> None:
        """Start a step whose gradients are still to come; :meth:`step` lets it update."""
        groups = [GroupStep.of({**group, "lr": learning_rate}) for group in self.param_groups]
        self.offload.inner.begin(self.param_groups[0]["step"] + 1, self.gradients, groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every shard where its state rests, in the step that was begun."""
        for group in self.param_groups:
            group["step"] += 1
        self.offload.release(self.grad_scale)
        if self.whole:
            self.offload.finish()


class OffloadedOptimizer(DistributedOptimizer):
    """The distributed optimizer around an :class:`OffloadedAdamWStep`.

    Attributes:
        places: index of each parameter's shard, of those that this rank updates.
    """

    optimizer: OffloadedAdamWStep
    places: dict[Any, int]

    def attach(self, settings: OffloadConfig, names: Mapping[int, str], *, eight_bit: bool) -> None:
        """Hand this rank's shards over. Collective.

        Args:
            settings: the run's offload section.
            names: of the model's parameters by ``id``.
            eight_bit: keep the moments as one byte each.
        """
        owned = self._owned_shards()
        self.places = {each.parameter: i for i, each in enumerate(owned)}
        self.optimizer.owned, self.optimizer.gradients = owned, [each.gradient for each in owned]
        self.optimizer.offload = Offload(
            settings,
            [names[id(each.parameter)] for each in owned],
            [each.shard for each in owned],
            [each.group for each in owned],
            gradient_type=torch.float32,
            eight_bit=eight_bit,
        )

    @classmethod
    def _build_model_and_main_param_groups(cls, *args: Any, **kwargs: Any) -> Any:
        """See the base class. Of an fp32 main parameter only the shape, and its gradient, are asked for: its values
        are read from the model's parameters, piece by piece, to where the state rests."""
        with compat.without_main_parameters():
            return super()._build_model_and_main_param_groups(*args, **kwargs)

    def _owned_shards(self) -> list[_Owned]:
        """In the order of the forward pass: buffers hold the parameters of a chunk from the last to the first."""
        found = []
        for ranges in self.gbuf_ranges:
            parameters = [p for buckets in ranges.values() for bucket in buckets for p in bucket["param_map"]]
            for parameter in reversed(parameters):
                group, place = self.model_param_group_index_map[parameter]
                span = self._get_model_param_range_map(parameter)["param"]
                shard, gradient = (
                    whole.detach().view(-1)[span.start : span.end] for whole in (parameter, parameter.main_grad)
                )
                main = self.optimizer.param_groups[group]["params"][place]
                found.append(_Owned(parameter, shard, main, gradient, group))
        return found

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        values = self._state.read(self.places[model_param])
        return dict(zip(("param", *MOMENTS), values, strict=True))

    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        self._state.write(self.places[model_param], *(tensors[name] for name in ("param", *MOMENTS)))

    def _copy_main_params_to_model_params(self) -> None:
        """The update has written the model's parameters already."""

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        assert state_dict is None
        for i, each in enumerate(self.optimizer.owned):
            _, *moments = self._state.read(i)
            self._state.write(i, each.shard, *moments)

    @property
    def _state(self) -> Any:
        return self.optimizer.offload.inner
