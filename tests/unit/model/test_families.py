"""The table of every family against the model that transformers builds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rewarm.config.registry import FAMILIES
from rewarm.model.architecture import Architecture, parameter_count
from rewarm.model.families.base import family_of
from rewarm.model.huggingface import architecture_from_values
from rewarm.model.tensors import tensor_shapes
from unit.model.families import NAMES, transformers_config


def _architecture(config: Any) -> Architecture:
    return architecture_from_values({**config.to_dict(), "architectures": None, "dtype": None}, "config.json")


def test_every_family_is_among_the_models() -> None:
    assert {transformers_config(name).model_type for name in NAMES} == set(FAMILIES)
    for method in FAMILIES.methods():
        assert method.summary


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_their_order_are_those_of_transformers(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = transformers_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == FAMILIES[config.model_type].target.huggingface_class
    theirs = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    architecture = _architecture(config)
    assert tensor_shapes(architecture) == theirs
    assert parameter_count(architecture) == sum(math.prod(shape) for shape in theirs.values())


@pytest.mark.parametrize("name", NAMES)
def test_tensor_ranks_share_matrices_and_repeat_norms(name: str) -> None:
    architecture = _architecture(transformers_config(name))
    page = family_of(architecture)
    whole, half = (page.layer_parameters(architecture, ranks) for ranks in (1, 2))
    norms = sum(math.prod(each.dimensions(architecture)) for each in page.tensors if "norm" in each.name)
    assert 2 * half == whole + norms


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_in_one_parameter(name: str) -> None:
    page = FAMILIES[name].target
    fused = {tensor.fused for tensor in page.tensors} - {None}
    held = [part for megatron, (_, parts) in page.parameters().items() if megatron not in fused for part in parts]
    assert sorted(held) == sorted(tensor.name for tensor in page.tensors)
