"""The modules of a layer."""

from __future__ import annotations

from typing import Any, cast

import pytest

from rewarm.config.model import ModelConfig
from rewarm.engine.megatron.transformer import layer_spec
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture


def test_norms_after_do_not_fit_transformer_engine() -> None:
    olmo2 = Architecture.from_config(ModelConfig(family="olmo2", qk_norm=True), vocab_size=100)
    with pytest.raises(UserError, match=r"transformer_engine(.|\n)*olmo2"):
        layer_spec("transformer_engine", olmo2, cast(Any, None))
