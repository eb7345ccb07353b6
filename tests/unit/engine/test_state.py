"""The view of the state against plain torch, under both engines and over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranks import state_workers as workers
from ranks.deepspeed_models import deepspeed_config, plain_steps, write_model
from ranks.harness import run_ranks
from rewarm.engine.state import StateTensor, lending

MEGATRON: dict[str, Any] = {"engine": "megatron"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """Reptile written out with plain torch: losses, squared way from the start, weights at the end."""
    losses, slow, first, last = [], {}, {}, {}
    for step, (loss, _, model) in enumerate(plain_steps(folder, deepspeed_config(folder), workers.STEPS)):
        losses.append(loss)
        last = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if not step:
            from safetensors.torch import load_file

            first = load_file(folder / "model.safetensors")
            slow = {name: value.clone() for name, value in first.items()}
        if (step + 1) % workers.EVERY == 0:
            for name, value in last.items():
                value.copy_(slow[name] + workers.RATE * (value - slow[name]))
                slow[name] = value.clone()
    way = sum(float((value - first[name]).double().square().sum()) for name, value in last.items())
    return losses, way, last


def check(found: dict[str, Any], expected: tuple[list[float], float, dict[str, torch.Tensor]]) -> None:
    assert found["losses"] == pytest.approx(expected[0], rel=1e-5)
    assert found["distance"] == pytest.approx(expected[1], rel=1e-3)
    assert found["rounded"] and found["kept"]


def whole(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The parameters put together from all ranks; every element is owned once, and alike wherever it is held."""
    values: dict[str, np.ndarray] = {}
    owners: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, shape, indices, tensor, owned in rank["pieces"]:
            values.setdefault(name, np.zeros(shape, np.float32)).reshape(-1)[indices[owned]] = tensor[owned]
            owners.setdefault(name, np.zeros(shape, int)).reshape(-1)[indices[owned]] += 1
    for name, count in owners.items():
        assert np.all(count == 1), name
    for rank in ranks:
        for name, _, indices, tensor, _ in rank["pieces"]:
            np.testing.assert_array_equal(values[name].reshape(-1)[indices], tensor, err_msg=name)
    return values


def test_interpolation_on_one_rank_is_that_of_plain_torch(
    folder: Path, expected: tuple[list[float], float, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    cases = [{"deepspeed": {"zero_stage": stage}} for stage in (0, 2)]
    drive = {"mode": "nvme", "nvme_paths": [str(tmp_path)], "subgroup_size": 8192}
    half: dict[str, Any] = {**MEGATRON, "precision": "bfloat16"}
    coarse = {"optimizer": {"name": "adamw_8bit"}}
    cases += [MEGATRON, half, {**half, "offload": drive}]
    cases += [{"deepspeed": {"zero_stage": 2}, "offload": drive, **coarse}]
    (found,) = run_ranks(workers.retained, 1, [(folder, settings) for settings in cases])
    for each in found[:3]:
        check(each, expected)
    for each in found[:2]:
        values = whole([each])
        for name, value in expected[2].items():
            np.testing.assert_allclose(values[name], value.numpy(), atol=1e-5, err_msg=name)
    assert all(each["rounded"] and each["kept"] for each in found)
    plain, offloaded = found[3]["state"], found[4]["state"]
    assert plain.keys() == offloaded.keys()
    for key, value in plain.items():
        np.testing.assert_array_equal(value, offloaded[key], err_msg=key)


def test_over_ranks_every_replica_agrees(
    folder: Path, expected: tuple[list[float], float, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Also a tied embedding, of which the last pipeline stage holds a copy."""
    layouts: list[dict[str, Any]] = [{"parallel": {"tensor": 2}}, {"parallel": {"pipeline": 2}}, {}]
    cases = [{"deepspeed": {"zero_stage": stage}} for stage in (0, 3)] + [{**MEGATRON, **each} for each in layouts]
    tied = write_model("llama", tmp_path, tie_word_embeddings=True), {**MEGATRON, "parallel": {"pipeline": 2}}
    ranks = run_ranks(workers.retained, 2, [*((folder, settings) for settings in cases), tied])
    together = [whole([rank[number] for rank in ranks]) for number in range(len(cases))]
    assert len(whole([rank[-1] for rank in ranks])) == len(together[-1]) - 1
    for rank in ranks:
        for each in rank[:-1]:
            check(each, expected)
    for values in together[1:]:
        assert sum(value.size for value in values.values()) >= sum(value.numel() for value in expected[2].values())
    for other in together[3:]:  # another layout of the same engine has the same names
        assert other.keys() == together[2].keys()
        for name, value in other.items():
            np.testing.assert_allclose(value[:500], together[2][name][:500], atol=1e-5, err_msg=name)


def pieces(returned: list[int]) -> Iterator[StateTensor]:
    """Three tensors; notes each that was given back."""
    for number in range(3):
        yield StateTensor("w", "weight", (6,), (6,), 2 * number, slice(0, 2), torch.zeros(2))
        returned.append(number)


def test_a_loop_that_ends_early_gives_back_what_it_was_lent_before_others_are_told() -> None:
    returned: list[int] = []
    told: list[int] = []
    with lending(pieces(returned), lambda: told.extend(returned)) as tensors:
        next(tensors)
    assert returned == told == [0, 1, 2]


def test_after_an_error_there_is_no_collective() -> None:
    returned: list[int] = []
    told: list[bool] = []
    with pytest.raises(ValueError, match="mine"), lending(pieces(returned), lambda: told.append(True)) as tensors:
        next(tensors)
        raise ValueError("mine")
    assert not told and not returned
