"""Layouts are checked with numbers that a user sees."""

from __future__ import annotations

from typing import Any

import pytest

from ranks.tiny import VOCAB_SIZE, tiny_config
from rewarm.engine.layout import check_layout
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture


def _check(world_size: int, **settings: Any) -> Any:
    config = tiny_config(**settings)
    assert config.model is not None
    return check_layout(config, Architecture.from_config(config.model, VOCAB_SIZE), world_size)


def test_data_parallel_ranks_are_what_is_left() -> None:
    layout = _check(8, parallel={"tensor": 2, "pipeline": 2}, batch={"micro_batch_size": 2})
    assert (layout.data, layout.num_microbatches) == (2, 2)


@pytest.mark.parametrize(
    ("world_size", "settings", "parts"),
    [
        (3, {"parallel": {"tensor": 2}}, ["3 ranks", "parallel.tensor=2", "multiple of 2 ranks"]),
        (4, {"parallel": {"tensor": 2, "data": 4}}, ["needs 8 ranks", "4 were started"]),
        (3, {"parallel": {"tensor": 3}}, ["parallel.tensor=3", "num_attention_heads=4"]),
        (4, {"parallel": {"tensor": 4}}, ["parallel.tensor=4", "num_key_value_heads=2"]),
        (2, {"parallel": {"tensor": 2}, "model": {"ffn_hidden_size": 161}}, ["tensor=2", "ffn_hidden_size=161"]),
        (3, {"parallel": {"pipeline": 3}}, ["parallel.pipeline=3", "num_layers=4"]),
        (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 4}}, ["virtual_pipeline=4", "num_layers=4"]),
        (3, {}, ["global_batch_size=8", "3 data-parallel ranks", "multiple of 3"]),
        (4, {"batch": {"micro_batch_size": 4}}, ["global_batch_size=8", "micro_batch_size=4 = 16"]),
        (
            4,
            {
                "parallel": {"pipeline": 4, "virtual_pipeline": 2},
                "model": {"num_layers": 8},
                "batch": {"micro_batch_size": 4},
            },
            ["2 micro-batches", "parallel.pipeline=4", "multiple of 16"],
        ),
        (1, {"model": {"head_dim": 15}}, ["head_dim=15 is odd"]),
    ],
)
def test_refuses_what_does_not_divide(world_size: int, settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        _check(world_size, **settings)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.fix


def test_a_parent_with_short_positions_is_refused() -> None:
    config = tiny_config()
    assert config.model is not None
    short = Architecture.from_config(config.model.model_copy(update={"max_position_embeddings": 16}), VOCAB_SIZE)
    with pytest.raises(UserError, match="sequence_length=32 is above the model's max_position_embeddings=16"):
        check_layout(config, short, 1)
