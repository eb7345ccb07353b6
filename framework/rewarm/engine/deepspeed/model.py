"""Building the model that transformers describes, without its weights."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from typing import Any, assert_never

import torch
from torch import nn

from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.config.run import RunConfig
from rewarm.engine import device, ranks
from rewarm.engine.deepspeed.buffers import freeze
from rewarm.engine.deepspeed.layout import check_code
from rewarm.engine.deepspeed.swap import check_room
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel
from rewarm.model.reference import quiet_transformers


def load_config(model: HuggingFaceModel, settings: DeepSpeedConfig) -> Any:
    """transformers' configuration object of a model.

    Raises:
        UserError: if transformers does not know the model, or knows it only by code that is not trusted.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    check_code(settings, model)
    values = {key: value for key, value in model.config.items() if key not in ("transformers_version",)}
    if model.model_type in CONFIG_MAPPING and not (settings.trust_remote_code and model.code_folder):
        values.pop("auto_map", None)
        try:
            return CONFIG_MAPPING[model.model_type].from_dict(values)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"transformers cannot read this {model.model_type} config.json: {error}") from error
    if model.code_folder is None:
        raise UserError(
            f"transformers {_version()} knows no model_type {model.model_type!r}",
            fix="install a newer transformers, or name another model",
        )
    return AutoConfig.from_pretrained(model.code_folder, trust_remote_code=True, local_files_only=True)


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def build_model(config: RunConfig, model: HuggingFaceModel, deepspeed: Any, values: dict[str, Any]) -> nn.Module:
    """The model in the run's precision with undefined weights; under stage 3 cut over the ranks already.

    Args:
        config: the resolved configuration.
        model: what to build.
        deepspeed: the module.
        values: the DeepSpeed configuration.

    Raises:
        UserError: if transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    settings = config.deepspeed
    options = {"dtype": device.dtype_of(config.precision), **attention_options(settings)}
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.enter_context(no_init_weights())
        try:
            built = AutoModelForCausalLM.from_config(
                load_config(model, settings), trust_remote_code=settings.trust_remote_code, **options
            )
        except (ValueError, ImportError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"transformers cannot build this {model.model_type} model: {reason}") from error
    built.tie_weights()  # which belongs to the initialisation that was left out
    freeze(built)
    if torch.distributed.get_world_size() > 1 and settings.zero_stage > 0:
        check_experts(built)
    built.config.use_cache = False
    _train_every_embedding(built)
    if config.recomputes_activations:
        if not getattr(built, "supports_gradient_checkpointing", False):
            raise UserError(
                f"activation_recomputation=full is not possible: transformers has no gradient checkpointing for "
                f"{model.model_type} models",
                fix="set activation_recomputation=none",
            )
        with quiet_transformers():  # version 5 has another name for it and says so
            built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.nvme_path is not None:
        _check_nvme(config, built)
    if settings.zero_stage == 3 and config.parallel.tensor == 1:
        _cut(built, deepspeed, values)
    return built.train()


def attention_options(settings: DeepSpeedConfig) -> dict[str, Any]:
    """What transformers is told of ``deepspeed.attention``; nothing under auto, where it chooses."""
    match settings.attention:
        case "auto":
            return {}
        case "sdpa" | "eager" | "flash_attention_2":
            return {"attn_implementation": settings.attention}
    assert_never(settings.attention)


def check_experts(model: nn.Module) -> None:
    """Refuse experts that are modules of their own, under ZeRO on several ranks.

    One that no token of a rank's micro-batch is sent to has no gradient on that rank and has one elsewhere, or is not
    gathered there: ZeRO then adds up the wrong gradients, or waits for ever. Experts that are slices of one parameter,
    as transformers 5 has them, always have a gradient, and averaging it is right.

    Raises:
        UserError: naming the module.
    """
    for name, part in model.named_modules():
        if "expert" in name.rsplit(".", 1)[-1] and isinstance(part, nn.ModuleList) and len(part) > 1:
            raise UserError(
                f"{name} of this model is a list of {len(part)} experts, of which a rank's batch may leave some out: "
                "ZeRO would add up the wrong gradients",
                fix="install transformers 5 or newer, which keeps experts in one tensor where it knows the family; or "
                "set deepspeed.zero_stage=0; or train in one process",
            )


def _check_nvme(config: RunConfig, model: nn.Module) -> None:
    hosts: list[str] = ranks.gather(platform.node())
    shares = [-(-parameter.numel() // len(hosts)) for parameter in model.parameters()]
    here, width = hosts.count(platform.node()), device.dtype_of(config.precision).itemsize
    ranks.on_every_rank(lambda: check_room(config.deepspeed, shares, ranks=here, parameter_bytes=width))


def _train_every_embedding(model: Any) -> None:
    """Let the padding token's embedding have a gradient, which transformers withholds.

    Windows hold no padding: where that token occurs it is text, most often the end of one, in models that pad with it.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def _cut(module: nn.Module, deepspeed: Any, values: dict[str, Any]) -> None:
    """Cut the parameters over the ranks, one at a time, before a device would have to hold them all.

    Building the model inside ``zero.Init`` would round its rotary frequencies to bfloat16. Built first, its parameters
    are memory that nothing has touched yet. The type is left out on purpose: what is passed for it is ignored.
    """
    deepspeed.zero.Init(module=module, config_dict_or_path=values)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device.local_device())
