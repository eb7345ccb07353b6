"""A user's own DeepSpeed JSON: what it may add to the generated configuration, and what it may not contradict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewarm.config.json_text import parse_json
from rewarm.errors import UserError, nearest

DECIDED_ELSEWHERE = {
    "activation_checkpointing": "activation_recomputation",
    "amp": "precision",
    "autotuning": "the settings of the run",
    "bfloat16": "precision",
    "checkpoint": "the checkpoint section",
    "compile": "the engine, which never compiles the model",
    "curriculum_learning": "the mixture section",
    "data_efficiency": "the data and mixture sections",
    "dataloader_drop_last": "the data section",
    "elasticity": "the checkpoint, which loads on any number of ranks",
    "expert_parallel": "the engine, which cuts no experts",
    "hybrid_engine": "the engine, which only trains",
    "optimizer": "the optimizer section",
    "pipeline": "the engine, which has no pipeline",
    "scheduler": "the schedule section",
    "tensor_parallel": "parallel.tensor",
    "train_batch_size": "batch.global_batch_size",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_parameters",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "deepspeed.offload_parameters",
    "zero_optimization.prefetch_bucket_size": "deepspeed.bucket_size",
    "zero_optimization.param_persistence_threshold": "deepspeed.persistence_threshold",
    "zero_optimization.stage3_param_persistence_threshold": "deepspeed.persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size": "deepspeed.bucket_size",
    "zero_optimization.sub_group_size": "deepspeed.sub_group_size",
}
"""Keys that a file may only repeat where they are generated, by what decides them."""

ADDABLE = (
    "aio", "comms_logger", "comet", "csv_monitor", "disable_python_gc", "dump_state", "flops_profiler", "log_level",
    "memory_breakdown", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb",
)  # fmt: skip
"""Top-level keys that a file may add. DeepSpeed reads over those that it does not know."""


def read_user_file(path: str) -> dict[str, Any]:
    """The user's DeepSpeed JSON.

    Raises:
        UserError: if it cannot be read or is not a JSON object.
    """
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"deepspeed.json_file={path} cannot be read: {error.strerror}", fix="check the path") from error
    except ValueError as error:
        raise UserError(
            f"deepspeed.json_file={path} is not valid JSON: {error}", fix="mend the file at that place"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"deepspeed.json_file={path} holds {type(values).__name__}, not an object",
            fix="put its keys between braces",
        )
    return values


def merge(values: dict[str, Any], user: dict[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """The generated values with those of the user added.

    Args:
        values: generated.
        user: the user's; ``"auto"`` stands for whatever is generated.
        source: the user's file, for messages.
        prefix: of the keys, when nested.

    Raises:
        UserError: at the first key that both set to different values, or that the file may not add.
    """
    merged = dict(values)
    for key, value in user.items():
        name = f"{prefix}{key}"
        if key not in values:
            _check_added(name, value, list(values), source)
            merged[key] = value
        elif isinstance(value, dict) and isinstance(values[key], dict):
            merged[key] = merge(values[key], value, source, f"{name}.")
        elif value not in ("auto", values[key]):
            raise UserError(
                f"deepspeed.json_file={source} has {name}={json.dumps(value)}, but the run's settings give "
                f"{json.dumps(values[key])}",
                fix="change one of the two, or remove the key from the file",
            )
    return merged


def _check_added(name: str, value: Any, generated: list[str], source: str) -> None:
    """Refuse a key that is not generated, unless DeepSpeed reads it and no setting stands for it."""
    if name in DECIDED_ELSEWHERE:
        raise UserError(
            f"deepspeed.json_file={source} sets {name}={json.dumps(value)}, but {DECIDED_ELSEWHERE[name]} decides that",
            fix=f"remove {name} from the file",
        )
    if "." not in name and name not in ADDABLE:
        close = nearest(name, [*generated, *ADDABLE])
        raise UserError(
            f"deepspeed.json_file={source} sets {name}, which has no effect in this engine",
            fix=f"did you mean {close}?" if close else f"remove {name} from the file",
        )
    if value == "auto":
        raise UserError(
            f'deepspeed.json_file={source} leaves {name} to "auto", but nothing here stands for it',
            fix=f"give {name} a value or remove it",
        )
