"""The planned memory is what ranks hold."""

from __future__ import annotations

from typing import Any

import pytest

from ranks import memory_workers
from ranks.harness import run_ranks
from ranks.tiny import VOCAB_SIZE, tiny_config
from rewarm.model.architecture import Architecture
from rewarm.planner.memory import plan_memory

QWEN3 = {"family": "qwen3", "qk_norm": True, "tie_embeddings": True}


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, {}),
        (1, {"model": {"tie_embeddings": True}, "megatron": {"attention": "local"}}),
        (1, {"activation_recomputation": "full", "model": QWEN3}),
        (2, {"parallel": {"tensor": 2, "sequence": True}}),
        (2, {"parallel": {"pipeline": 2}, "model": QWEN3}),
        (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
        (2, {"precision": "bfloat16"}),
    ],
    ids=str,
)
def test_plan_against_tensors(num_ranks: int, settings: dict[str, Any]) -> None:
    # Long enough that the tensors which do not grow with the sequence, such as rotary tables, hardly count.
    settings = {**settings, "batch": {"sequence_length": 32, "micro_batch_size": 2 if num_ranks == 1 else 1}}
    results = run_ranks(memory_workers.held_bytes, num_ranks, settings)
    config = tiny_config(**settings)
    assert config.model is not None
    plan = plan_memory(config, Architecture.from_config(config.model, VOCAB_SIZE), results[0][0])
    for rank, (layout, held) in enumerate(results):
        planned = plan[rank if layout.pipeline > 1 else 0]
        assert planned.parameters == held["parameters"]
        # Megatron-Core pads each parameter in its buffers to 64 elements.
        assert planned.gradients == pytest.approx(held["gradients"], rel=5e-3)
        assert planned.optimizer == pytest.approx(held["optimizer"], rel=5e-3)
        if config.precision == "float32":  # bfloat16 norms are other kernels on a GPU than here
            assert planned.activations + planned.output == pytest.approx(held["for backward"], rel=0.1)


@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16"}, {"parallel": {"tensor": 2}}], ids=str)
def test_an_evaluation_takes_no_more_than_training(settings: dict[str, Any]) -> None:
    """The default must not: it comes before the first step, and a plan knows the step only."""
    for found in run_ranks(memory_workers.peaks, 2, {"batch": {"micro_batch_size": 1}, **settings}):
        assert found["evaluation"] < found["training"] < found["evaluation of 8"], found


@pytest.mark.parametrize("mode", ["cpu", "streamed", "auto"])
def test_offloaded_main_parameters_are_never_whole_on_the_device(mode: str) -> None:
    for held, whole in run_ranks(memory_workers.main_parameters, 1, {"offload": {"mode": mode}}):
        assert held < whole / 2
