"""Which keys of a config.json change what a model computes.

transformers' own classes are the judge: a key that the class of the model's family does not read cannot change what
the folder computes, and passes. Two kinds of keys are refused unless they are switched off: those by which some model
of the Llama kind computes something that is not computed here, whoever reads them, and those that the class of the
installed transformers reads and that nothing here knows.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.config.registry import FAMILIES
from rewarm.errors import UserError


def _words(text: str) -> list[str]:
    return text.split()


HONOURED = frozenset(
    _words(
        "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps "
        "tie_word_embeddings rope_theta rope_scaling rope_parameters sliding_window use_sliding_window "
        "max_window_layers layer_types"
    )
)
"""Keys that shape the model; :mod:`rewarm.model.huggingface` reads them."""

_WITHOUT_EFFECT = frozenset(
    _words(
        "bos_token_id eos_token_id pad_token_id use_cache use_return_dict output_attentions output_hidden_states "
        "return_dict gradient_checkpointing num_labels problem_type dtype torch_dtype _attn_implementation "
        # A linear layer cut into this many pieces, whose results are added up: the same function.
        "pretraining_tp"
    )
)
"""What transformers' classes read without computing something else for it."""

_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that a model may compute and that nothing here does."""

    what: str
    """In words, for messages."""
    off: tuple[Any, ...] = _OFF
    """Values that switch it off."""


def _features(names: str, feature: Feature) -> dict[str, Feature]:
    return dict.fromkeys(_words(names), feature)


_ONE = (None, 1, 1.0)
FEATURES: dict[str, Feature] = {
    **_features(
        "attention_bias mlp_bias use_bias bias qkv_bias use_qkv_bias add_qkv_bias attention_qkv_bias "
        "attention_out_bias attention_output_bias add_bias_linear lm_head_bias norm_bias",
        Feature("biases of linear layers"),
    ),
    **_features(
        "attention_dropout attn_dropout attention_dropout_prob hidden_dropout hidden_dropout_prob embedding_dropout "
        "embed_dropout resid_dropout residual_dropout resid_pdrop embd_pdrop attn_pdrop dropout activation_dropout",
        Feature("dropout"),
    ),
    **_features(
        "quantization_config compression_config quantization quant_config",
        Feature("weights of few bits, which cannot be trained"),
    ),
    **_features(
        "attn_logit_softcapping final_logit_softcapping attn_logit_softcap final_logit_softcap logits_soft_cap "
        "logit_softcap attention_logit_cap",
        Feature("logits under a soft cap"),
    ),
    **_features(
        "logit_scale logits_scale logits_scaling logit_multiplier output_multiplier output_multiplier_scale "
        "lm_head_multiplier embedding_multiplier embedding_multiplier_scale embedding_scale embed_scale scale_emb "
        "embeddings_scale residual_multiplier residual_scale residual_scaling key_multiplier mup_embeddings_scale "
        "mup_width_scale mup_attn_multiplier mup_base_width width_multiplier",
        Feature("a factor in the forward pass", off=_ONE),
    ),
    **_features(
        "attention_multiplier attention_scale attn_scale query_pre_attn_scalar scale_depth dim_model_base "
        "scale_embeddings scale_embedding normalize_embedding normalize_embeddings mup use_mup",
        Feature("a factor in the forward pass", off=(None, False)),
    ),
    **_features(
        "partial_rotary_factor rotary_pct rotary_percent rope_percentage rope_pct rotary_emb_fraction rope_ratio",
        Feature("rotary positions of another kind", off=_ONE),
    ),
    **_features(
        "rope_interleaved rope_interleave rotary_interleaved rope_traditional use_mrope mrope_section "
        "mrope_interleaved use_dynamic_ntk use_logn_attn rope_local_base_freq",
        Feature("rotary positions of another kind"),
    ),
    **_features(
        "no_rope_layers no_rope_layer_interval nope_layers nope_layer_interval",
        Feature("layers without positions"),
    ),
    **_features("use_rope use_rotary rope rotary", Feature("layers without positions", off=(None, True))),
    **_features("alibi use_alibi", Feature("positions by linear biases")),
    "position_embedding_type": Feature("positions of another kind", off=(None, "rope", "rotary")),
    "is_causal": Feature("attention to what comes later", off=(None, True)),
    **_features(
        "use_bidirectional_attention bidirectional bidirectional_attention is_prefix_lm prefix_lm "
        "is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder",
        Feature("attention to something else than what came before"),
    ),
    **_features(
        "attention_chunk_size sliding_window_pattern global_attn_every_n_layers interleaved_sliding_window",
        Feature("attention over a part of the sequence"),
    ),
    **_features(
        "use_qk_norm qk_norm qk_layernorm qk_layer_norm qk_layer_norms clip_qkv attn_output_gate attention_sink "
        "use_attention_sinks use_sinks kv_lora_rank q_lora_rank num_kv_shared_layers use_cla",
        Feature("attention of another kind"),
    ),
    **_features(
        "use_parallel_residual parallel_residual parallel_attn use_post_norm post_norm sandwich_norm norm_after "
        "apply_residual_connection_post_layernorm",
        Feature("layers wired in another way"),
    ),
    "hidden_activation": Feature("another activation", off=(None, "silu", "swish")),
    **_features(
        "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts num_experts_per_tok "
        "num_experts_per_token moe_intermediate_size n_shared_experts num_shared_experts moe_topk moe_top_k moe_config",
        Feature("a mixture of experts"),
    ),
    **_features(
        "num_nextn_predict_layers num_mtp_layers mtp_num_layers mtp_num_hidden_layers",
        Feature("the prediction of several tokens"),
    ),
    **_features("per_layer_config block_configs layers_block_type ffn_multipliers", Feature("layers of several kinds")),
    **_features("text_config vision_config audio_config", Feature("more than text")),
    "pruned_heads": Feature("layers without some of their heads"),
    "adapter_config": Feature("an adapter over the weights"),
    "auto_map": Feature("Python code that comes with the model"),
}
"""Keys that change what some model of the Llama kind computes, by name."""


def unsupported(key: str, value: Any, family: str) -> Feature | None:
    """What a key asks for that is not computed here; None if it asks for nothing.

    Args:
        key: of a config.json.
        value: what it is set to.
        family: transformers' name of it, one of those that are mapped.
    """
    if key in HONOURED or key in _WITHOUT_EFFECT:
        return None
    if key in FEATURES:
        if value is True and key in FAMILIES[family].target.own_keys:
            return None
        return None if _is_off(value, FEATURES[key].off) or _all_layers_turn(key, value) else FEATURES[key]
    if value is not None and key in read_by_transformers(family):
        return Feature(f"what transformers' {family} class reads it for")
    return None


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    # True equals 1, which would switch a factor off, and False equals 0.
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in off)


def _all_layers_turn(key: str, value: Any) -> bool:
    """``no_rope_layers`` holds 1 for each layer that has rotary positions."""
    return key == "no_rope_layers" and isinstance(value, list) and all(each == 1 for each in value)


@functools.cache
def read_by_transformers(family: str) -> frozenset[str]:
    """Names that transformers' classes of a family declare in their configuration, or read from it.

    Found in the source of the installed version, without importing it.

    Raises:
        UserError: if transformers is not installed.
    """
    root = _transformers()
    names = set(_declared(root / "models" / family / f"configuration_{family}.py"))
    for file in (root / "models" / family / f"modeling_{family}.py", root / "masking_utils.py"):
        names |= set(_read_from_config(file))
    return frozenset(names)


@functools.cache
def causal_language_models() -> frozenset[str]:
    """Model types of which the installed transformers has a causal language model, found without importing it.

    Raises:
        UserError: if transformers is not installed.
    """
    text = (_transformers() / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(name, ast.Name) and name.id == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" for name in targets):
            pairs = (part.elts for part in ast.walk(node) if isinstance(part, ast.Tuple) and len(part.elts) == 2)
            return frozenset(str(key.value) for key, _ in pairs if isinstance(key, ast.Constant))
    raise AssertionError("transformers lists its causal language models under another name")


def _transformers() -> Path:
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        raise UserError("transformers is not installed", fix="install rewarm again: pip install rewarm")
    return Path(found.submodule_search_locations[0])


def _declared(file: Path) -> Iterator[str]:
    """Fields of the classes of a file (version 5), and arguments of their constructors (version 4)."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    yield part.target.id
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    yield from (argument.arg for argument in [*part.args.args, *part.args.kwonlyargs])


def _read_from_config(file: Path) -> Iterator[str]:
    """``config.NAME``, ``self.config.NAME`` and ``getattr(config, "NAME")`` of a file."""
    if not file.is_file():
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if _is_config(node.args[0]) and isinstance(name, ast.Constant):
                yield str(name.value)


def _is_config(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "config") or (
        isinstance(node, ast.Attribute) and node.attr == "config"
    )
