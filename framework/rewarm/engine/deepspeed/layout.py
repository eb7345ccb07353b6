"""What DeepSpeed demands of the model and of the machine. No torch: it is also checked before the ranks are started."""

from __future__ import annotations

from pathlib import Path

from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.config.run import RunConfig
from rewarm.engine.deepspeed.extensions import check_compiler
from rewarm.engine.deepspeed.json import deepspeed_json
from rewarm.engine.deepspeed.swap import check_folder
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel


def check_model(config: RunConfig, model: HuggingFaceModel) -> None:
    """Refuse what could only fail later, on every rank at once.

    Raises:
        UserError: naming the setting and the value of the model that do not fit.
    """
    longest = model.max_position_embeddings
    if longest is not None and config.batch.sequence_length > longest:
        raise UserError(
            f"batch.sequence_length={config.batch.sequence_length} is above the model's "
            f"max_position_embeddings={longest}",
            fix=f"set batch.sequence_length to at most {longest}",
        )
    check_code(config.deepspeed, model)
    if config.parallel.tensor > 1:
        _check_tensor_parallel(config.parallel.tensor, model)
    if config.parallel.context > 1:
        _check_context(config, model)
    check_folder(config.deepspeed)
    check_compiler(config.deepspeed)


def check_code(settings: DeepSpeedConfig, model: HuggingFaceModel) -> None:
    """Refuse to run, or to be asked to run, Python files of the model where that does not fit.

    Raises:
        UserError: naming the folder and the setting.
    """
    if model.code_folder is None:
        if settings.trust_remote_code:
            raise UserError(
                "deepspeed.trust_remote_code=true, but the model brings no code of its own",
                fix="remove deepspeed.trust_remote_code",
            )
        return
    if not settings.trust_remote_code:
        from transformers import CONFIG_MAPPING

        if model.model_type not in CONFIG_MAPPING:
            raise UserError(
                f"the {model.model_type!r} model in {model.code_folder} brings Python files of its own, which are not "
                "run unless asked for",
                fix="read them, then give deepspeed.trust_remote_code=true on the command line",
            )
    elif not Path(model.code_folder).is_dir():
        raise UserError(
            f"the Python files of the {model.model_type!r} model were in {model.code_folder}, which is gone",
            fix="put the folder back",
        )


def check_file(config: RunConfig, data_parallel_size: int) -> None:
    """Refuse a user's DeepSpeed JSON that contradicts the run's settings.

    Raises:
        UserError: naming the key and both values.
    """
    if config.deepspeed.json_file is not None:
        deepspeed_json(config, data_parallel_size)


def _check_context(config: RunConfig, model: HuggingFaceModel) -> None:
    """Refuse attention over less than the whole sequence, and positions that depend on the longest one seen."""
    values = model.config
    found = None
    window = values.get("sliding_window")
    if isinstance(window, int) and values.get("use_sliding_window", True) and window < config.batch.sequence_length:
        found = f"sliding_window={window}"
    for kind in values.get("layer_types") or []:
        if kind != "full_attention":
            found = f"{kind} layers"
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        found = f"{rope.get('rope_type', rope.get('type'))} rotary positions"
    if found is not None:
        raise UserError(
            f"parallel.context={config.parallel.context} is not possible for this {model.model_type} model: it has "
            f"{found}, which a part of a sequence would get wrong",
            fix="set parallel.context=1",
        )


def _check_tensor_parallel(tensor: int, model: HuggingFaceModel) -> None:
    from transformers import CONFIG_MAPPING

    known = model.model_type in CONFIG_MAPPING
    if not known or not getattr(CONFIG_MAPPING[model.model_type], "base_model_tp_plan", None):
        raise UserError(
            f"parallel.tensor={tensor} is not possible for this model: transformers has no tensor-parallel plan for "
            f"{model.model_type} models, and DeepSpeed would have to guess one from the names of the layers",
            fix="set parallel.tensor=1 and share memory with deepspeed.zero_stage",
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = model.config.get(name)
        if isinstance(value, int) and value % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide the model's {name}={value}",
                fix=f"set parallel.tensor to a divisor of {value}",
            )
