"""Where restored optimizer state lies. Fake tensors (shapes and devices, no data) stand for a GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rewarm.config.training import OptimizerConfig
from rewarm.engine.deepspeed.partitions import Partitions, open_partitions
from rewarm.engine.deepspeed.update import RuleOptimizer
from rewarm.engine.state import MOMENTS
from rewarm.kernels import native
from rewarm.optimizers.adamw import AdamW

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
RULE = AdamW(OptimizerConfig())
OPTIONS: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def partitions(stage: int, flats: list[Tensor], optimizer: Any, **wrapper: Any) -> Partitions:
    """Over what DeepSpeed would have wrapped, as far as the optimizer's state asks for it."""
    wrapper |= {"optimizer": optimizer, "single_partition_of_fp32_groups": flats, "fp32_partitioned_groups_flat": flats}
    engine = SimpleNamespace(module=nn.Module(), optimizer=SimpleNamespace(**wrapper))
    return open_partitions(engine, stage, has_moments=True, num_shares=1, share=0)


def flat(device: torch.device) -> Tensor:
    return torch.empty(8, device=device, requires_grad=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_kernels_the_count_lies_where_torchs_fused_update_reads_it(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load_cuda", lambda: None)
    flats = [flat(GPU), flat(GPU)]
    optimizer = RuleOptimizer(flats, RULE, fused=True, **OPTIONS)
    partitions(stage, flats, optimizer).set_steps(7)
    for each in flats:
        state = optimizer.state[each]
        assert {name: state[name].device for name in (*MOMENTS, "step")} == dict.fromkeys((*MOMENTS, "step"), GPU)
        assert state["step"].dtype == torch.float32 and state["step"].dim() == 0


def test_what_torch_makes_itself_lies_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is torch's: its own first step puts the count on the same device."""
    monkeypatch.setattr(native, "load_cuda", lambda: None)
    ours, theirs = flat(GPU), flat(GPU)
    for each in (ours, theirs):
        each.grad = torch.zeros_like(each)
    optimizer, plain = (
        RuleOptimizer([ours], RULE, fused=True, **OPTIONS),
        torch.optim.AdamW([theirs], fused=True, **OPTIONS),
    )
    for each in (optimizer, plain):
        each.step()
    assert optimizer.state[ours]["step"].device == plain.state[theirs]["step"].device == GPU


def test_with_kernels_the_count_lies_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count on the device would be waited for at every parameter of every step."""
    monkeypatch.setattr(native, "load_cuda", lambda: object())
    each = flat(GPU)
    optimizer = RuleOptimizer([each], RULE, fused=True, **OPTIONS)
    partitions(1, [each], optimizer).set_steps(7)
    assert optimizer.state[each]["step"].device == CPU


def test_offloaded_flats_keep_all_on_the_host() -> None:
    each = flat(CPU)
    optimizer = RuleOptimizer([each], RULE, fused=True, **OPTIONS)
    partitions(2, [each], optimizer).set_steps(7)
    assert {value.device for value in optimizer.state[each].values()} == {CPU}


def test_twinflow_restores_into_the_optimizer_that_updates() -> None:
    """DeepSpeed's CPU Adam has the sub-groups on the host; those on the device are torch's, with moments of their
    own, and a count on the host as torch's plain update has it."""
    host, device = flat(CPU), flat(GPU)
    cpu_adam = SimpleNamespace(state={host: {}, device: {}})
    beside = torch.optim.AdamW([device], **OPTIONS)
    found = partitions(3, [host, device], cpu_adam, backup_optimizer=beside)
    found.set_steps(7)
    assert cpu_adam.state[host]["step"] == 7 and not cpu_adam.state[device]
    assert beside.state[device]["exp_avg"].device == GPU and beside.state[device]["step"].device == CPU
    assert found.steps() == 7
