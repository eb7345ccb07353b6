"""config.json to an architecture and back, checked against what transformers makes of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewarm.config.model import ModelConfig
from rewarm.config.registry import FAMILIES
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.huggingface import (
    architecture_from_huggingface,
    architecture_from_values,
    config_for_huggingface,
)
from unit.model.families import LLAMA3_SCALING, NAMES, SHARED, transformers_config

LLAMA = {
    **SHARED,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
OTHERS = [
    {**LLAMA, "model_type": name, "architectures": [FAMILIES[name].target.huggingface_class]}
    for name in sorted(set(FAMILIES) - {"llama", "mistral", "qwen2", "qwen3"})
]
"""Of families that need no key of their own."""


def _transformers_view(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    view = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in view.items() if key not in ("_name_or_path", "transformers_version")}


def _write(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def _bare(values: dict[str, Any], *drop: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in drop}


@pytest.mark.parametrize("name", NAMES)
def test_shape_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    config = transformers_config(name)
    config.architectures = [FAMILIES[config.model_type].target.huggingface_class]
    config.save_pretrained(tmp_path)
    found = architecture_from_huggingface(tmp_path)
    assert found.num_layers == config.num_hidden_layers
    assert found.hidden_size == config.hidden_size
    assert found.ffn_hidden_size == config.intermediate_size
    assert found.num_attention_heads == config.num_attention_heads
    assert found.num_key_value_heads == config.num_key_value_heads
    assert found.head_dim == (getattr(config, "head_dim", None) or 16)
    assert found.vocab_size == config.vocab_size
    assert found.rope_theta == config.rope_parameters["rope_theta"]
    assert found.norm_epsilon == config.rms_norm_eps
    assert found.tie_embeddings == config.tie_word_embeddings
    assert found.rope_scaling == (LLAMA3_SCALING if name == "llama3" else None)


@pytest.mark.parametrize("name", NAMES)
def test_exported_config_means_the_same_to_transformers(name: str, tmp_path: Path) -> None:
    config = transformers_config(name)
    family = FAMILIES[config.model_type].target
    config.architectures, config.dtype = [family.huggingface_class], "float32"
    config.save_pretrained(tmp_path / "before")
    architecture = architecture_from_huggingface(tmp_path / "before")
    _write(tmp_path / "after", config_for_huggingface(architecture, "float32"))
    assert _transformers_view(tmp_path / "after") == _transformers_view(tmp_path / "before")
    assert architecture_from_huggingface(tmp_path / "after") == architecture


@pytest.mark.parametrize("values", [LLAMA, MISTRAL, QWEN2, QWEN3, *OTHERS], ids=lambda v: v["model_type"])
@pytest.mark.parametrize(
    "key", ["rms_norm_eps", "rope_theta", "tie_word_embeddings", "initializer_range", "head_dim", "hidden_act"]
)
def test_missing_keys_take_the_defaults_of_transformers_or_are_refused(
    values: dict[str, Any], key: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    folder = _write(tmp_path, _bare(values, key))
    if key == "head_dim" and values is QWEN3:
        with pytest.raises(UserError, match="head_dim"):
            architecture_from_huggingface(folder)
        return
    found, theirs = architecture_from_huggingface(folder), AutoConfig.from_pretrained(folder)
    assert found.norm_epsilon == theirs.rms_norm_eps
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]
    assert found.tie_embeddings == theirs.tie_word_embeddings
    assert found.initializer_range == theirs.initializer_range
    assert found.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert theirs.hidden_act == "silu"


def test_old_and_new_spelling_of_rotary_settings_are_the_same() -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}
    new = {**_bare(LLAMA, "rope_theta"), "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}}
    legacy = {**old, "rope_scaling": {**_bare(LLAMA3_SCALING, "rope_type"), "type": "llama3"}}
    both = {**old, "rope_parameters": new["rope_parameters"]}
    expected = architecture_from_values(old, "old")
    assert expected.rope_theta == 5e5 and expected.rope_scaling == LLAMA3_SCALING
    for values in (new, legacy, both):
        assert architecture_from_values(values, "new") == expected


def test_what_lies_beside_the_shape_is_carried_over() -> None:
    extra = {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "pretraining_tp": 1, "unsloth_fixed": True}
    architecture = architecture_from_values({**LLAMA, **extra}, "config.json")
    architecture = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    written = config_for_huggingface(architecture, "bfloat16", {"pad_token_id": 5})
    assert {key: written[key] for key in extra} == extra
    assert written["torch_dtype"] == "bfloat16" and written["pad_token_id"] == 5


def test_a_model_of_our_own_is_written_without_foreign_token_ids(tmp_path: Path) -> None:
    architecture = Architecture.from_config(ModelConfig(family="mistral"), vocab_size=1000)
    view = _transformers_view(_write(tmp_path, config_for_huggingface(architecture, "float32")))
    assert view["bos_token_id"] is None and view["eos_token_id"] is None
    assert view["sliding_window"] is None
    assert architecture_from_huggingface(tmp_path) == architecture


REFUSED = {
    "gpt2": ({"model_type": "gpt2"}, "model_type", "gpt2"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "Classification"),
    "attention bias": ({"attention_bias": True}, "attention_bias", "true"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias", "true"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling", "yarn"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters", "dynamic"),
    "partial rotary inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters", "0.5"),
    "per layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters", "full_att"),
    "llama3 incomplete": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling", "low_freq_factor"),
    "negative factor": ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "rope_scaling", "-2.0"),
    "two thetas": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta", "500000.0"),
    "two scalings": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 4.0}},
        "rope_scaling",
        "4.0",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config", "bits"),
    "experts": ({"num_local_experts": 8}, "num_local_experts", "8"),
    "softcapping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping", "30.0"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout", "0.1"),
    "own code": ({"auto_map": {"AutoModel": "modeling.py"}}, "auto_map", "modeling.py"),
    "factor": ({"residual_scale": 0.5}, "residual_scale", "0.5"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "sliding_attention"),
    "groups": ({"num_key_value_heads": 3}, "num_key_value_heads", "3"),
    "odd head": ({"head_dim": 15}, "head_dim", "15"),
    "text for a number": ({"hidden_size": "64"}, "hidden_size", "64"),
    "truth for a number": ({"num_hidden_layers": True}, "num_hidden_layers", "true"),
    "number for truth": ({"tie_word_embeddings": 1}, "tie_word_embeddings", "1"),
    "negative epsilon": ({"rms_norm_eps": -1e-5}, "rms_norm_eps", "-1e-05"),
}


@pytest.mark.parametrize("change, key, value", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], key: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        architecture_from_values({**LLAMA, **change}, "there/config.json")
    assert "there/config.json" in caught.value.message
    assert key in caught.value.message and value in caught.value.message
    assert architecture_from_values(LLAMA, "config.json").family == "llama"


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} is missing"):
        architecture_from_values(_bare(LLAMA, key), "config.json")


@pytest.mark.parametrize(
    "values, in_effect",
    [
        ({**MISTRAL, "sliding_window": 32}, True),
        ({**MISTRAL, "sliding_window": 64}, False),
        ({**_bare(MISTRAL, "sliding_window"), "max_position_embeddings": 8192}, True),
        ({**_bare(MISTRAL, "sliding_window"), "max_position_embeddings": 4096}, False),
        ({**QWEN2, "sliding_window": 32, "use_sliding_window": False}, False),
        ({**QWEN2, "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, True),
        ({**QWEN2, "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 4}, False),
        ({**QWEN3, "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, True),
    ],
)
def test_a_sliding_window_is_refused_exactly_where_it_changes_the_model(
    values: dict[str, Any], in_effect: bool
) -> None:
    if in_effect:
        with pytest.raises(UserError, match=r"sliding_window = (32|4096)"):
            architecture_from_values(values, "config.json")
    else:
        architecture_from_values(values, "config.json")


@pytest.mark.parametrize(
    "text, reason",
    [(None, "cannot read"), ("{", "not valid JSON"), ("[1]", "holds list")],
    ids=["none", "torn", "list"],
)
def test_a_folder_without_a_usable_config_is_named(text: str | None, reason: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        architecture_from_huggingface(tmp_path)
    assert str(tmp_path / "config.json") in caught.value.message


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"family": "llama", "qkv_bias": True}, "qkv_bias"),
        ({"family": "qwen2", "qkv_bias": False}, "qkv_bias"),
        ({"family": "qwen2", "qkv_bias": True, "qk_norm": True}, "qk_norm"),
        ({"family": "llama", "hidden_size": 130, "head_dim": 32}, "hidden_size"),
    ],
)
def test_a_shape_that_no_export_could_express_is_refused_before_training(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        Architecture.from_config(ModelConfig(**settings), vocab_size=100)
