"""config.json files as they are published, and which of their keys matter, with transformers as the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewarm.config.registry import FAMILIES
from rewarm.errors import UserError
from rewarm.model.config_keys import (
    FEATURES,
    HONOURED,
    causal_language_models,
    read_by_transformers,
    unsupported,
)
from rewarm.model.description import describe
from rewarm.model.huggingface import architecture_from_values, config_for_huggingface
from unit.model.families import NAMES, transformers_config
from unit.model.test_huggingface_config import LLAMA, MISTRAL, QWEN2, QWEN3

ALL = [json.loads(line) for line in (Path(__file__).parent / "published_configs.jsonl").read_text().splitlines()]
TAKEN = {each["source"]: each["config"] for each in ALL if "refused" not in each}
REFUSED = {each["source"]: (each["config"], each["refused"]) for each in ALL if "refused" in each}


def _theirs(values: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[values["model_type"]].from_dict(json.loads(json.dumps(values)))


def test_there_are_as_many_as_it_takes() -> None:
    assert len(TAKEN) >= 40
    assert len(REFUSED) >= 20
    assert (
        {values["model_type"] for values in TAKEN.values()} == {"llama", "mistral", "qwen2", "qwen3"} <= set(FAMILIES)
    )


@pytest.mark.parametrize("source", TAKEN)
def test_a_published_config_means_what_it_means_to_transformers(source: str) -> None:
    values = TAKEN[source]
    found, theirs = architecture_from_values(values, source), _theirs(values)
    assert (found.num_layers, found.hidden_size) == (theirs.num_hidden_layers, theirs.hidden_size)
    assert (found.num_attention_heads, found.num_key_value_heads) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    usual = theirs.hidden_size // theirs.num_attention_heads
    assert found.head_dim == (getattr(theirs, "head_dim", None) or usual)
    assert (found.vocab_size, found.ffn_hidden_size) == (theirs.vocab_size, theirs.intermediate_size)
    assert found.max_position_embeddings == theirs.max_position_embeddings
    assert found.norm_epsilon == theirs.rms_norm_eps
    assert found.tie_embeddings == theirs.tie_word_embeddings
    rope = dict(theirs.rope_parameters)
    assert found.rope_theta == rope.pop("rope_theta")
    rope.pop("type", None)
    assert (found.rope_scaling or {"rope_type": "default"}) == rope
    # The export says the same, with whatever was beside the shape.
    written = config_for_huggingface(found, "bfloat16")
    assert written.items() >= {k: v for k, v in values.items() if k not in HONOURED | {"dtype", "torch_dtype"}}.items()
    assert architecture_from_values(written, "export") == found


@pytest.mark.parametrize("source", REFUSED)
def test_what_is_not_computed_is_refused_with_every_key_that_asks_for_it(source: str, tmp_path: Path) -> None:
    values, keys = REFUSED[source]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        describe(tmp_path, "megatron")
    for key in keys:
        assert f"{key} = " in caught.value.message, key
    assert caught.value.fix
    if values["model_type"] not in FAMILIES and values["model_type"] in causal_language_models():
        assert "set engine=deepspeed, which runs it" in caught.value.fix
    describe(tmp_path, "deepspeed")


@pytest.mark.parametrize("key", sorted(FEATURES))
def test_a_feature_that_is_switched_off_passes(key: str) -> None:
    for value in FEATURES[key].off:
        for values in (LLAMA, MISTRAL, QWEN2, QWEN3):
            architecture_from_values({**values, key: value}, "config.json")


WITHOUT_EFFECT: dict[str, Any] = {
    "unk_token_id": 0,
    "_name_or_path": "/fsx/600k",
    "context_window_size": 2048,
    "something_new": {"a": [1]},
    "summary_first_dropout": 0.1,
    "classifier_dropout": 0.1,
    "pretraining_tp": 2,
    "neftune_noise_alpha": 5,
    "router_aux_loss_coef": 0.001,
    "ffn_dim_multiplier": 1.3,
    "layer_norm_eps": 1e-5,
    "output_scores": True,
}


@pytest.mark.parametrize("key, value", WITHOUT_EFFECT.items(), ids=WITHOUT_EFFECT)
def test_a_key_that_no_class_reads_passes_and_goes_along(key: str, value: Any) -> None:
    for values in (LLAMA, MISTRAL, QWEN2, QWEN3):
        found = architecture_from_values({**values, key: value}, "config.json")
        assert config_for_huggingface(found, "float32")[key] == value


def test_all_that_is_refused_is_named_at_once_with_what_runs_it() -> None:
    with pytest.raises(UserError) as caught:
        architecture_from_values({**LLAMA, "mlp_bias": True, "attention_bias": True, "hidden_act": "relu"}, "x")
    for text in ("mlp_bias = true", "attention_bias = true", 'hidden_act = "relu"'):
        assert text in caught.value.message
    assert "engine=deepspeed" in str(caught.value.fix)
    with pytest.raises(UserError) as caught:
        architecture_from_values({**LLAMA, "scale_emb": 12, "use_mrope": True}, "x")
    assert "scale_emb = 12" in caught.value.message and "use_mrope = true" in caught.value.message
    # transformers would train another model than the one that the file speaks of, without a word.
    assert "engine=deepspeed" not in str(caught.value.fix)


def test_a_family_says_of_itself_what_it_has() -> None:
    architecture_from_values({**QWEN2, "attention_bias": True}, "x")
    architecture_from_values({**QWEN3, "use_qk_norm": True}, "x")
    with pytest.raises(UserError, match="use_qk_norm"):
        architecture_from_values({**QWEN2, "use_qk_norm": True}, "x")


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 32},
        {"type": "linear", "factor": 2.0, "finetuned": True},
        {"rope_type": "default", "factor": 1.0},
        {},
    ],
)
def test_numbers_that_a_kind_of_positions_does_not_take_are_passed_over(scaling: dict[str, Any]) -> None:
    found = architecture_from_values({**LLAMA, "rope_scaling": scaling}, "x")
    linear = scaling.get("type") == "linear"
    assert found.rope_scaling == ({"rope_type": "linear", "factor": 2.0} if linear else None)


@pytest.mark.parametrize("theta", ["1e4", True, -1.0, 0])
def test_a_base_of_positions_that_is_no_number_is_refused(theta: Any) -> None:
    with pytest.raises(UserError, match="rope_theta"):
        architecture_from_values({**LLAMA, "rope_theta": theta}, "x")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("llama3", "qwen2_tied")])
def test_every_key_that_transformers_reads_is_known(name: str) -> None:
    """By its source, and by watching what it reads while a model is built and run."""
    import torch
    from transformers import AutoModelForCausalLM

    config = transformers_config(name)
    read: set[str] = set()

    class Watched(type(config)):  # type: ignore[misc]
        def __getattribute__(self, key: str) -> Any:
            read.add(key)
            return super().__getattribute__(key)

    plain = type(config)
    config.__class__ = Watched
    AutoModelForCausalLM._model_mapping._extra_content[Watched] = AutoModelForCausalLM._model_mapping[plain]
    try:
        model = AutoModelForCausalLM.from_config(config)
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    finally:
        del AutoModelForCausalLM._model_mapping._extra_content[Watched]
    family = config.model_type
    named = {key: getattr(plain(), key) for key in read_by_transformers(family) if hasattr(plain(), key)}
    declared = {key: value for key, value in named.items() if not callable(value)}
    assert {"rms_norm_eps", "rope_parameters", "num_key_value_heads"} <= read & declared.keys()
    for key, value in declared.items():
        assert key in HONOURED or unsupported(key, value, family) is None, (key, value)
    # What the base class has for every model is not of the family: labels, generation, saving.
    from transformers import PretrainedConfig

    of_the_family = {key for key in read if not hasattr(PretrainedConfig(), key) and hasattr(plain(), key)}
    assert of_the_family <= read_by_transformers(family) | {"initializer_range", "tie_word_embeddings"}
    assert FAMILIES[family].target.default_positions == plain().max_position_embeddings


def test_an_unknown_key_of_a_newer_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewarm.model import config_keys

    monkeypatch.setattr(config_keys, "read_by_transformers", lambda family: frozenset({"hyper_connections"}))
    with pytest.raises(UserError, match="hyper_connections = 4"):
        architecture_from_values({**LLAMA, "hyper_connections": 4}, "x")
