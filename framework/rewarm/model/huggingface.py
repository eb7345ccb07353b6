"""``config.json`` of the registered families to :class:`Architecture` and back, without transformers.

Keys that shape the model are honoured; those by which it computes something that nothing here does are refused, all
at once, unless they are switched off (:mod:`rewarm.model.config_keys`); all others are kept for the export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewarm.config.registry import FAMILIES
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture, check_family
from rewarm.model.config_keys import causal_language_models, unsupported
from rewarm.model.config_values import Values, shown
from rewarm.model.families.base import Family, family_of
from rewarm.model.rope import SCALING_KEYS


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
    config = Values(values, source)
    name, family = _family(config)
    _check_keys(config, name)
    _check_windows(config, family)
    theta, scaling = _rope(config, name)
    config.check(name)
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    family.check_config(config)
    if hidden % heads and config.get("head_dim") is None:
        raise UserError(f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    groups = config.count("num_key_value_heads", default=heads)
    if heads % groups:
        raise UserError(f"{source}: num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
    head_dim = config.count("head_dim", default=hidden // heads)
    if head_dim % 2:
        raise config.refusal("head_dim", f"= {head_dim} is odd", "rotary positions need an even width")
    return Architecture(
        family=name,
        num_layers=config.count("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.count("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        vocab_size=config.count("vocab_size"),
        max_position_embeddings=_positions(config, family),
        rope_theta=theta,
        norm_epsilon=config.number("rms_norm_eps", default=family.default_norm_epsilon),
        tie_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=family.has_qkv_bias(),
        qk_norm=family.qk_norm() != "none",
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
        "architectures": [family_of(architecture).huggingface_class],
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
    config |= family_of(architecture).written(architecture, original)
    if not original:
        config |= {"bos_token_id": None, "eos_token_id": None}  # the defaults are ids of the Llama 2 tokenizer
    return config | dict(extra or {})


def _family(config: Values) -> tuple[str, type[Family]]:
    """The name and the page of the family that a config.json names."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise config.refusal("model_type", f"= {shown(name)} is not supported", _advice(name, config))
    family: type[Family] = FAMILIES[name].target
    classes, expected = config.get("architectures"), family.huggingface_class
    # The first folders of Llama call it LLaMAForCausalLM.
    if classes is not None and [str(each).lower() for each in classes] != [expected.lower()]:
        raise config.refusal(
            "architectures",
            f"= {shown(classes)} is not supported with model_type={name}",
            f"only the causal language model {expected} can be continued",
        )
    return name, family


def _advice(model_type: Any, config: Values) -> str:
    """What to do with a family that is not mapped."""
    mapped = f"engine=megatron knows {', '.join(FAMILIES)}"
    if model_type in causal_language_models():
        return f"set engine=deepspeed, which runs it; {mapped}"
    if config.get("auto_map"):
        return f"set engine=deepspeed, which runs its own code with deepspeed.trust_remote_code=true; {mapped}"
    return f"the installed transformers has no causal language model of this type; {mapped}"


def _check_keys(config: Values, family: str) -> None:
    if config.get("hidden_act") not in (None, "silu", "swish"):
        config.unsupported("hidden_act", "only silu, as SwiGLU, is computed here")
    for key, value in config.values.items():
        feature = unsupported(key, value, family)
        if feature is not None:
            config.unsupported(key, f"{feature.what}: not computed here")


def _check_windows(config: Values, family: type[Family]) -> None:
    """Find attention that does not reach back over the whole sequence."""
    layer_types = config.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or set(layer_types) - {"full_attention"}):
        config.unsupported("layer_types", "only full_attention is computed here")
    window, longest = family.window(config), _positions(config, family)
    if window is None or window is False:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise config.refusal("sliding_window", f"= {shown(window)} is not a whole number")
    if window >= longest:
        return
    config.unsupported(
        "sliding_window",
        f"attention over less than max_position_embeddings = {longest}; if no sequence will ever exceed {window} "
        f'tokens, where the window changes nothing, set "sliding_window": null and "max_position_embeddings": {window} '
        "in config.json",
        window,
    )


def _positions(config: Values, family: type[Family]) -> int:
    return config.count("max_position_embeddings", default=family.default_positions)


def _rope(config: Values, family: str) -> tuple[float, dict[str, Any] | None]:
    """Base of the rotary frequencies and their scaling, from the spelling of version 4, of version 5 or of both."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    given = {key: value for key, value in (("rope_scaling", old), ("rope_parameters", new)) if value}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise config.refusal(key, f"= {shown(value)} is not an object")
        if any(isinstance(inner, dict) for inner in value.values()):
            config.unsupported(key, "only one rotary setting for all layers is computed here")
            return 10000.0, None
    places = [config.values, *given.values()]
    thetas = {Values(place, config.source).number("rope_theta", default=0.0) for place in places} - {0.0}
    if len(thetas) > 1:
        raise config.refusal("rope_theta", f"has contradicting values {sorted(thetas)}", "leave one of them")
    scalings = [_scaling(config, key, family) for key in given]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise config.refusal("rope_scaling", f"= {shown(old)} contradicts rope_parameters = {shown(new)}")
    return (thetas.pop() if thetas else 10000.0), (scalings[0] if scalings else None)


def _scaling(config: Values, key: str, family: str) -> dict[str, Any] | None:
    """The kind of scaling with the numbers that it takes; transformers passes over others."""
    values = {name: value for name, value in config.get(key).items() if name != "rope_theta"}
    kinds = {values.pop(name) for name in ("rope_type", "type") if values.get(name) is not None} or {"default"}
    kind = kinds.pop()
    if kinds or (kind != "default" and kind not in SCALING_KEYS):
        config.unsupported(key, f"rope types computed here: {', '.join(['default', *SCALING_KEYS])}")
        return None
    for name, value in values.items():
        feature = unsupported(name, value, family)
        if feature is not None:
            config.unsupported(key, f"{name}: {feature.what}, not computed here")
    needed = SCALING_KEYS.get(kind, ())
    if not set(needed) <= set(values):
        raise config.refusal(key, f"= {shown(config.get(key))}: rope_type {kind} takes {', '.join(needed)}")
    for name in needed:
        if isinstance(values[name], bool) or not isinstance(values[name], int | float) or values[name] <= 0:
            raise config.refusal(key, f"= {shown(config.get(key))}: {name} must be a positive number")
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise config.refusal(key, f"= {shown(config.get(key))}: high_freq_factor must exceed low_freq_factor")
    return {"rope_type": kind, **{name: values[name] for name in needed}} if kind != "default" else None
