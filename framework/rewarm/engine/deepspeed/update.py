"""The update rules as DeepSpeed's client optimizer, with their state where the run wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewarm.config.offload import OffloadConfig
from rewarm.engine.offload import Offload
from rewarm.engine.state import MOMENTS
from rewarm.errors import ensure
from rewarm.kernels import adamw
from rewarm.offload.runtime.execute import GroupStep
from rewarm.optimizers.adamw import AdamW
from rewarm.optimizers.base import UpdateRule


class StatelessOptimizer(torch.optim.Optimizer):
    """An update rule that keeps no state."""

    def __init__(self, groups: list[dict[str, Any]], rule: UpdateRule) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            owned = [parameter for parameter in group["params"] if parameter.grad is not None]
            if owned:  # stage 3 updates one sub-group at a time
                self.rule.update(group, owned, [parameter.grad for parameter in owned], [{}] * len(owned), 1.0)


class RuleOptimizer(torch.optim.AdamW):
    """An update rule with the state layout of torch's AdamW, which DeepSpeed knows.

    Args:
        groups: of parameters.
        rule: AdamW on a GPU without the compiled kernel is torch's own.
        options: of torch's AdamW.
    """

    def __init__(self, groups: Any, rule: UpdateRule, **options: Any) -> None:
        super().__init__(groups, **options)
        self.rule = rule

    def uses_kernels(self, parameter: Tensor) -> bool:
        """True if a parameter's update is ours, which reads ``step`` on the host; torch's reads it on the device."""
        return not isinstance(self.rule, AdamW) or adamw.runs_on(parameter.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        owned = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not all(self.uses_kernels(parameter) for _, parameter in owned):
            super().step()
            return
        for group, parameter in owned:
            state = self.state[parameter]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            state["step"] = state.get("step", torch.tensor(0.0)) + 1
            counted = {**group, "step": int(state["step"])}
            self.rule.update(counted, [parameter], [parameter.grad], [state], 1.0)


class OffloadedStep(RuleOptimizer):
    """The same with the moments under the offload section, and off the device a second fp32 copy of what DeepSpeed
    hands it.

    DeepSpeed updates one piece of the parameters after the other, and takes each over into the model at once. The
    pieces are only noted here, until the last one has come and all can be updated in one pipeline.
    """

    offload: Offload | None = None

    def attach(
        self, settings: OffloadConfig, flats: Sequence[Tensor], take_over: Callable[[], None], *, eight_bit: bool
    ) -> None:
        """Hand the pieces over. Collective.

        Args:
            settings: the run's offload section.
            flats: all fp32 tensors that DeepSpeed updates on this rank.
            take_over: copies all of them into the model's own parameters.
            eight_bit: keep the moments as one byte each.
        """
        self._places = {id(flat): i for i, flat in enumerate(flats)}
        self._noted: dict[int, tuple[Tensor, GroupStep]] = {}
        self._take_over = take_over
        for flat in flats:
            self.state[flat]["step"] = torch.tensor(0.0)
        self.offload = Offload(
            settings,
            [f"piece {i}" for i in range(len(flats))],
            [flat.detach().view(-1) for flat in flats],
            range(len(flats)),
            gradient_type=torch.float32,
            eight_bit=eight_bit,
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Note the pieces that have come; with the last one, update all."""
        assert self.offload is not None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                ensure(parameter.grad is not None, "a parameter took no part in the step")
                place = self.place_of(parameter)
                self._noted[place] = parameter.grad.detach().view(-1), GroupStep.of(group)
                self.state[parameter]["step"] += 1
                number = int(self.state[parameter]["step"])
        if len(self._noted) < len(self._places):
            return
        noted = [self._noted[place] for place in range(len(self._places))]
        self._noted = {}
        # Each piece is a group of its own: DeepSpeed may show its groups one at a time.
        self.offload.step(number, [gradient for gradient, _ in noted], [settings for _, settings in noted])
        self._take_over()

    def place_of(self, flat: Tensor) -> int:
        """Index of a piece in the offloaded state."""
        return self._places[id(flat)]
