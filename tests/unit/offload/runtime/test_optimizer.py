"""A model trained through the adapter: the losses of offloaded and plain runs are equal to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewarm.kernels import adamw
from rewarm.offload.planning.placement import interleave
from rewarm.offload.planning.routes import Job, Placement, Route
from rewarm.offload.runtime.device import ThrottledDevice
from rewarm.offload.runtime.execute import GroupStep
from rewarm.offload.runtime.optimizer import OffloadedAdamW, Resources, layout_of
from rewarm.offload.runtime.slabs import HostPool, ParameterShard, StateLayout

SIZE = 1024
SETTINGS = [GroupStep(3e-3, weight_decay=0.1), GroupStep(3e-3)]
CLIP = 0.5


class Tied(nn.Module):
    """A little language model whose embedding is its output layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(61, 24)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 70), nn.Linear(70, 24)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        return hidden @ self.embedding.weight.T


def train(model: Tied, update: object, steps: range, accumulate: int = 2) -> list[float]:
    """Losses of some steps with gradient accumulation and clipping."""
    losses = []
    parameters = list(model.parameters())
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        total = 0.0
        for _ in range(accumulate):
            tokens = torch.randint(0, 61, (4, 9), generator=generator)
            logits = model(tokens[:, :-1]).float()
            loss = nn.functional.cross_entropy(logits.reshape(-1, 61), tokens[:, 1:].reshape(-1)) / accumulate
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients = [parameter.grad.reshape(-1) for parameter in parameters]  # type: ignore[union-attr]
        norm = math.sqrt(sum(adamw.sum_squares(gradient.contiguous()) for gradient in gradients))
        update(number, gradients, min(1.0, CLIP / norm))  # type: ignore[operator]
        for parameter in parameters:
            parameter.grad = None
    return losses


def shards_of(model: Tied) -> tuple[list[str], list[Tensor], list[int]]:
    names = [name for name, _ in model.named_parameters()]
    shards = [parameter.data.reshape(-1) for parameter in model.parameters()]
    return names, shards, [int(parameter.dim() == 1) for parameter in model.parameters()]


class Plain:
    """The kernel over each parameter, nothing offloaded."""

    def __init__(self, model: Tied) -> None:
        self.shards, self.groups = shards_of(model)[1:]
        self.state = [(x.float().clone(), torch.zeros(x.numel()), torch.zeros(x.numel())) for x in self.shards]

    def __call__(self, number: int, gradients: Sequence[Tensor], factor: float) -> None:
        for shard, group, state, gradient in zip(self.shards, self.groups, self.state, gradients, strict=True):
            settings = SETTINGS[group]
            step = adamw.AdamWStep.prepare(
                step=number,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                grad_scale=factor,
            )
            adamw.update(step, *state, gradient.contiguous())
            shard.copy_(state[0])


def placements(subgroups: int) -> list[Placement]:
    third = subgroups // 3
    mixed = interleave({Route.CPU: subgroups - 2 * third, Route.STREAMED: third, Route.RESIDENT: third})
    return [
        Placement((Route.CPU,) * subgroups, name="cpu"),
        Placement(mixed, slots=2, name="mixed"),
        Placement((Route.NVME_STREAMED,) * subgroups, slots=1, host_slots=1, name="nvme"),
    ]


def adapter(model: Tied, placement: Placement, folder: Path) -> OffloadedAdamW:
    names, shards, groups = shards_of(model)
    return OffloadedAdamW(
        names,
        shards,
        groups,
        placement,
        Job(1, 0.0, 0.0),
        ThrottledDevice(),
        Resources(HostPool(pin=False), shards[0].dtype, nvme_paths=[folder]),
        subgroup_size=SIZE,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_equal_and_so_is_a_run_that_changes_its_placement(dtype: torch.dtype, disk: Path) -> None:
    plain_model = Tied(dtype)
    plain = Plain(plain_model)
    expected = train(plain_model, plain, range(1, 31))
    model = Tied(dtype)
    names, shards, groups = shards_of(model)
    subgroups = StateLayout.of(
        [ParameterShard(*each) for each in zip(names, map(len, shards), groups, strict=True)], SIZE
    ).subgroups
    choices = placements(subgroups)
    offloaded = adapter(model, choices[0], disk)

    def update(number: int, gradients: Sequence[Tensor], factor: float) -> None:
        offloaded.step(number, gradients, SETTINGS, factor)

    losses = train(model, update, range(1, 11))
    offloaded.place(choices[1])
    losses += train(model, update, range(11, 21))
    state = offloaded.state()
    offloaded.close()
    # A new process: another placement takes over the state of the checkpoint.
    offloaded = adapter(model, choices[2], disk)
    offloaded.load(*zip(*state, strict=True))
    losses += train(model, update, range(21, 31))
    assert losses == expected
    assert losses[-1] < losses[0]
    for ours, theirs in zip(offloaded.state(), plain.state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    offloaded.close()


def by_pieces(offloaded: OffloadedAdamW, number: int, gradients: Sequence[Tensor], factor: float) -> None:
    """A step whose gradients come one after the other, the last one with its release; some are given up first."""
    arriving = [torch.full_like(gradient, math.nan) for gradient in gradients]
    offloaded.begin(number, arriving, SETTINGS)
    if number % 3 == 0:
        for shard in range(number % 4, len(gradients)):
            offloaded.ready(shard)
        offloaded.finish()
        offloaded.begin(number, arriving, SETTINGS)
    for shard in reversed(range(1, len(gradients))):
        offloaded.ready(shard, Arrival(arriving[shard], gradients[shard]))
    assert offloaded.begun and not offloaded.updating
    arriving[0].copy_(gradients[0])
    offloaded.release(factor)
    assert offloaded.updating and not offloaded.begun


class Arrival:
    """What a collective's handle is: the values are there after a wait for it."""

    def __init__(self, target: Tensor, values: Tensor) -> None:
        self.target, self.values = target, values

    def wait(self) -> None:
        self.target.copy_(self.values)


@pytest.mark.parametrize("choice", range(3))
def test_a_step_in_pieces_is_the_whole_one(choice: int, disk: Path) -> None:
    plain_model = Tied(torch.bfloat16)
    plain = Plain(plain_model)
    expected = train(plain_model, plain, range(1, 13))
    model = Tied(torch.bfloat16)
    subgroups = layout_of(*shards_of(model), SIZE).subgroups
    offloaded = adapter(model, placements(subgroups)[choice], disk)
    losses: list[float] = []

    def update(number: int, gradients: Sequence[Tensor], factor: float) -> None:
        by_pieces(offloaded, number, gradients, factor)
        if number % 2:  # the parameters are complete when all were waited for, the state when it is read
            for shard in range(len(gradients)):
                offloaded.wait(shard)
        else:
            offloaded.read(0)
            assert not offloaded.updating

    losses = train(model, update, range(1, 13))
    assert losses == expected
    for ours, theirs in zip(offloaded.state(), plain.state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    offloaded.close()


def test_gradients_of_another_type_are_refused(disk: Path) -> None:
    model = Tied(torch.bfloat16)
    shards = shards_of(model)[1]
    count = StateLayout.of([ParameterShard("all", len(x)) for x in shards], SIZE).subgroups
    offloaded = adapter(model, placements(count)[0], disk)
    with pytest.raises(AssertionError, match="as announced"):
        offloaded.step(1, [x.float() for x in shards], SETTINGS)
    offloaded.close()
