"""``config.json`` of Llama, Mistral, Qwen2 and Qwen3 to :class:`Architecture` and back, without transformers.

Every key is sorted into one of four kinds: those that shape the model and are honoured, those that name a feature
which nothing here computes (refused unless switched off), those that do not change the model's function (kept for
the export), and unknown ones, which are refused: a key nobody looked at may change the function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from rewarm.errors import UserError
from rewarm.model.architecture import Architecture, Family, check_family
from rewarm.model.rope import SCALING_KEYS

ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""transformers' class of each family."""


def _words(text: str) -> list[str]:
    return text.split()


_HONOURED = frozenset(
    _words(
        "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps "
        "tie_word_embeddings rope_theta rope_scaling rope_parameters sliding_window use_sliding_window "
        "max_window_layers layer_types"
    )
)

_OFF = (None, False, 0, 0.0)
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        _words(
            "attention_bias mlp_bias use_bias attention_dropout hidden_dropout resid_pdrop embd_pdrop "
            "quantization_config compression_config attn_logit_softcapping final_logit_softcapping "
            "attention_chunk_size num_experts num_local_experts num_experts_per_tok moe_intermediate_size "
            "num_nextn_predict_layers no_rope_layers rope_interleaved use_qk_norm qk_layernorm is_encoder_decoder "
            "add_cross_attention cross_attention_hidden_size tie_encoder_decoder auto_map adapter_config"
        ),
        _OFF,
    ),
    "partial_rotary_factor": (None, 1),
    "logit_scale": (None, 1),
    "pruned_heads": (None, {}),
}
"""Features that nothing here computes, with the values that switch each off."""

_HARMLESS = frozenset(
    _words(
        "transformers_version torch_dtype dtype _name_or_path name_or_path use_cache bos_token_id eos_token_id "
        "pad_token_id sep_token_id decoder_start_token_id pretraining_tp return_dict output_attentions "
        "output_hidden_states id2label label2id num_labels problem_type tokenizer_class prefix finetuning_task "
        "task_specific_params torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_decoder "
        "_attn_implementation attn_implementation _attn_implementation_autoset _commit_hash max_length min_length "
        "do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
        "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
        "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
        "is_llama_config keys_to_ignore_at_inference license"
    )
)
_HARMLESS_PREFIXES = ("unsloth_", "transformers.js")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face folder.

    Raises:
        UserError: if there is none or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}",
            fix="give the folder of a Hugging Face model: config.json and *.safetensors lie in it",
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", fix="download the folder again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not an object")
    return values


def architecture_from_huggingface(folder: str | Path) -> Architecture:
    """The architecture that a Hugging Face folder's config.json describes.

    Args:
        folder: holds config.json; the weights are not read.

    Raises:
        UserError: naming the key and the value that cannot be honoured.
    """
    return architecture_from_values(read_config(folder), str(Path(folder) / "config.json"))


def architecture_from_values(values: Mapping[str, Any], source: str) -> Architecture:
    """As :func:`architecture_from_huggingface`, from parsed values; ``source`` names them in messages."""
    config = _Values(values, source)
    family = _family(config)
    _check_keys(config, family)
    _check_windows(config, family)
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    if family == "qwen3" and config.get("head_dim") is None:
        raise config.refusal("head_dim", "is missing", "write the width of one head into config.json")
    if family != "llama" and "num_key_value_heads" not in values:
        raise config.refusal("num_key_value_heads", "is missing", "write the number of key heads into config.json")
    if hidden % heads and config.get("head_dim") is None:
        raise UserError(f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    groups = config.count("num_key_value_heads", default=heads)
    if heads % groups:
        raise UserError(f"{source}: num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
    head_dim = config.count("head_dim", default=hidden // heads)
    if head_dim % 2:
        raise config.refusal("head_dim", f"= {head_dim} is odd", "rotary positions need an even width")
    theta, scaling = _rope(config)
    return Architecture(
        family=family,
        num_layers=config.count("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.count("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=config.count("vocab_size"),
        max_position_embeddings=config.count("max_position_embeddings"),
        rope_theta=theta,
        norm_epsilon=config.number("rms_norm_eps", default=1e-6),
        tie_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        initializer_range=config.number("initializer_range", default=0.02),
        rope_scaling=scaling,
        huggingface_config=dict(values),
    )


def config_for_huggingface(
    architecture: Architecture, dtype: str, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of an export, which transformers 4.57 and 5 read alike.

    What is beside the shape (token ids, labels, ...) is carried over from the config.json the model came from.
    Rotary settings are written as ``rope_theta`` and ``rope_scaling``: version 5 reads them too, while version 4
    would pass over ``rope_parameters`` and silently take theta = 10000.

    Args:
        architecture: the model.
        dtype: ``"float32"`` or ``"bfloat16"``, of the tensors beside it.
        extra: keys that win over carried ones, such as ``bos_token_id``.

    Raises:
        UserError: if the family cannot express the architecture.
    """
    check_family(architecture)
    original = architecture.huggingface_config or {}
    config = {key: value for key, value in original.items() if key not in ("rope_parameters", "dtype")}
    config |= {
        "architectures": [ARCHITECTURES[architecture.family]],
        "model_type": architecture.family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "hidden_act": original.get("hidden_act") or "silu",
        "max_position_embeddings": architecture.max_position_embeddings,
        "initializer_range": architecture.initializer_range,
        "rms_norm_eps": architecture.norm_epsilon,
        "tie_word_embeddings": architecture.tie_embeddings,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": architecture.rope_scaling,
        "torch_dtype": dtype,
    }
    usual = architecture.hidden_size // architecture.num_attention_heads
    if architecture.family == "qwen3" or "head_dim" in original or architecture.head_dim != usual:
        config["head_dim"] = architecture.head_dim
    if architecture.family == "mistral":
        config.setdefault("sliding_window", None)  # transformers' default for a missing key is 4096
    if not original:
        config |= {"bos_token_id": None, "eos_token_id": None}  # the defaults are ids of the Llama 2 tokenizer
    return config | dict(extra or {})


class _Values:
    """Typed access to config.json with messages that name the key and the value."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def refusal(self, key: str, what: str, fix: str | None = None) -> UserError:
        return UserError(f"{self.source}: {key} {what}", fix=fix)

    def unsupported(self, key: str, fix: str | None = None) -> UserError:
        usual = "it changes what the model computes and nothing here computes it; continue a model without it"
        return self.refusal(key, f"= {_shown(self.get(key))} is not supported", fix or usual)

    def count(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.refusal(key, "is missing", "download the folder again")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refusal(key, f"= {_shown(value)} is not a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refusal(key, f"= {_shown(value)} is not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value not in (None, True, False) or type(value) is int:
            raise self.refusal(key, f"= {_shown(value)} is not true or false")
        return bool(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _family(config: _Values) -> Family:
    family = config.get("model_type")
    known = get_args(Family)
    if family not in known:
        raise config.refusal("model_type", f"= {_shown(family)} is not supported", f"known: {', '.join(known)}")
    classes = config.get("architectures")
    if classes is not None and classes != [ARCHITECTURES[family]]:
        raise config.refusal(
            "architectures",
            f"= {_shown(classes)} is not supported with model_type={family}",
            f"only the causal language model {ARCHITECTURES[family]} can be continued",
        )
    if config.get("hidden_act") not in (None, "silu", "swish"):
        raise config.unsupported("hidden_act", "only silu (SwiGLU) is computed here; continue a model that uses it")
    return family


def _check_keys(config: _Values, family: Family) -> None:
    for key, value in config.values.items():
        if key in _HONOURED or key in _HARMLESS or key.startswith(_HARMLESS_PREFIXES):
            continue
        if key not in _UNSUPPORTED:
            raise config.refusal(
                key,
                f"= {_shown(value)} is not a key known for {family} models, and it may change what the model computes",
                "if it does not, remove it from config.json",
            )
        if value not in _UNSUPPORTED[key]:
            raise config.unsupported(key)


def _check_windows(config: _Values, family: Family) -> None:
    """Refuse attention that does not reach back over the whole sequence."""
    layer_types = config.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or set(layer_types) - {"full_attention"}):
        raise config.unsupported("layer_types", "only full_attention is computed here; continue a model that uses it")
    window = config.get("sliding_window")
    if family in ("qwen2", "qwen3"):
        if not config.flag("use_sliding_window"):
            return
        window = config.count("sliding_window", default=4096) if "sliding_window" not in config.values else window
        if config.count("max_window_layers", default=28, minimum=0) >= config.count("num_hidden_layers"):
            return
    elif family == "mistral" and "sliding_window" not in config.values:
        window = 4096  # what transformers takes for a missing key
    longest = config.count("max_position_embeddings")
    if window is None or window >= longest:
        return
    raise config.refusal(
        "sliding_window",
        f"= {window} is not supported below max_position_embeddings = {longest}",
        f"continue a model with full attention; or, if no sequence will ever exceed {window} tokens, where the window "
        f'changes nothing, set "sliding_window": null and "max_position_embeddings": {window} in config.json',
    )


def _rope(config: _Values) -> tuple[float, dict[str, Any] | None]:
    """Base of the rotary frequencies and their scaling, from the spelling of version 4, of version 5 or of both."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise config.refusal(key, f"= {_shown(value)} is not an object")
        if any(isinstance(inner, dict) for inner in (value or {}).values()):
            raise config.unsupported(key, "only one rotary setting for all layers is computed here")
    thetas = {float(v) for v in (config.get("rope_theta"), *((d or {}).get("rope_theta") for d in (old, new))) if v}
    if len(thetas) > 1:
        raise config.refusal("rope_theta", f"has contradicting values {sorted(thetas)}", "leave one of them")
    scalings = [_scaling(config, key) for key, value in (("rope_scaling", old), ("rope_parameters", new)) if value]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise config.refusal("rope_scaling", f"= {_shown(old)} contradicts rope_parameters = {_shown(new)}")
    return (thetas.pop() if thetas else 10000.0), (scalings[0] if scalings else None)


def _scaling(config: _Values, key: str) -> dict[str, Any] | None:
    values = dict(config.get(key))
    values.pop("rope_theta", None)
    kinds = {values.pop(name) for name in ("rope_type", "type") if values.get(name) is not None} or {"default"}
    kind = kinds.pop()
    if kinds or (kind != "default" and kind not in SCALING_KEYS):
        known = ", ".join(["default", *SCALING_KEYS])
        raise config.unsupported(key, f"rope types computed here: {known}; continue a model with one of them")
    if values.pop("partial_rotary_factor", 1) not in (1, None):
        raise config.unsupported(key, "partial_rotary_factor other than 1 is not computed here")
    needed = SCALING_KEYS.get(kind, ())
    if set(values) != set(needed):
        names = ", ".join(needed) or "no further keys"
        raise config.refusal(key, f"= {_shown(config.get(key))}: rope_type {kind} takes {names}")
    for name in needed:
        if isinstance(values[name], bool) or not isinstance(values[name], int | float) or values[name] <= 0:
            raise config.refusal(key, f"= {_shown(config.get(key))}: {name} must be a positive number")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise config.refusal(key, f"= {_shown(config.get(key))}: high_freq_factor must exceed low_freq_factor")
    return {"rope_type": kind, **values} if kind != "default" else None
