"""The DeepSpeed configuration that a run stands for. A pure function of the run's settings: no torch, no DeepSpeed.

Every key whose default in DeepSpeed changes what is trained is written out, so that another version's default cannot
change it silently (``gradient_clipping``, for one, is 1.0 when it is left out of DeepSpeed 0.19).
"""

from __future__ import annotations

import json
from typing import Any, assert_never

from rewarm.config.deepspeed import DeepSpeedConfig, Device
from rewarm.config.offload import placed_by, places_state
from rewarm.config.run import RunConfig
from rewarm.engine.deepspeed.json_file import merge, read_user_file
from rewarm.errors import UserError


def deepspeed_json(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """The configuration given to ``deepspeed.initialize``, with the user's file merged in.

    Args:
        config: the resolved configuration.
        data_parallel_size: model copies that share a global batch.

    Raises:
        UserError: if the user's file cannot be read or contradicts a generated value.
    """
    batch, settings = config.batch, config.deepspeed
    half = _is_half(config)
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.global_batch_size // (batch.micro_batch_size * data_parallel_size),
        "managed_gradient_accumulation": True,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32",
        "data_types": {
            "grad_accum_dtype": "fp32",
            "param_dtype": None,
            "buffer_dtype": None,
            "keep_in_fp32_modules": "auto",
        },
        "fp16": {"enabled": False},
        "bf16": {
            "enabled": half,
            "immediate_grad_update": False,
            "check_grad_overflow": half,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(settings),
    }
    if config.parallel.model_ranks == 1:
        # DeepSpeed would multiply it by the tensor or context ranks, and check that.
        values["train_batch_size"] = batch.global_batch_size
    if config.parallel.tensor > 1:
        values["tensor_parallel"] = {
            "autotp_size": config.parallel.tensor,
            "tp_overlap_comm": False,
            # The whole row of logits is needed for the token losses.
            "vocab_parallel_lm_head": False,
        }
    if settings.json_file is not None:
        values = merge(values, read_user_file(settings.json_file), settings.json_file)
        moved = [key for key in ("offload_optimizer", "offload_param") if key in values["zero_optimization"]]
        if places_state(config) and moved:
            raise UserError(
                f"deepspeed.json_file={settings.json_file} sets zero_optimization.{moved[0]}, and "
                f"{placed_by(config)} keeps the same state elsewhere",
                fix="remove it from the file, or set offload.mode=none and optimizer.name=adamw",
            )
    return values


def show_json(config: RunConfig) -> str:
    """The generated file, for looking at it before any rank exists; ``parallel.data=auto`` counts as one.

    Raises:
        UserError: if the run does not use DeepSpeed.
    """
    if config.engine != "deepspeed":
        raise UserError(f"engine={config.engine} has no DeepSpeed configuration", fix="set engine=deepspeed")
    data = 1 if config.parallel.data == "auto" else config.parallel.data
    return json.dumps(deepspeed_json(config, data), indent=2) + "\n"


def _zero(settings: DeepSpeedConfig) -> dict[str, Any]:
    stage = settings.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": settings.bucket_size,
        "allgather_partitions": True,
        "allgather_bucket_size": settings.bucket_size,
        "overlap_comm": stage == 3,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "zenflow": None,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "zero_hpz_partition_size": 1,
        "use_multi_rank_bucket_allreduce": True,
        "legacy_stage1": False,
        "parameter_alignment": False,
    }
    if stage in (1, 2):
        zero["compute_grad_norm"] = True
    if stage == 3:
        zero |= {
            "sub_group_size": settings.sub_group_size,
            "stage3_param_persistence_threshold": settings.persistence_threshold,
            "stage3_prefetch_bucket_size": settings.bucket_size // 4,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_use_all_reduce_for_fetch_params": False,
            "memory_efficient_linear": True,
        }
    optimizer = _offload(settings.offload_optimizer, settings.nvme_path)
    if optimizer is not None:
        zero["offload_optimizer"] = optimizer | {
            "ratio": settings.offload_ratio,
            "super_offload": False,
            "fast_init": False,
        }
    parameters = _offload(settings.offload_parameters, settings.nvme_path)
    if parameters is not None:
        zero["offload_param"] = parameters
    return zero


def _offload(device: Device, nvme_path: str | None) -> dict[str, Any] | None:
    """DeepSpeed's section for what is kept on a device; None where it stays where it is."""
    if device == "none":
        return None
    if device == "cpu":
        return {"device": device, "pin_memory": True}
    if device == "nvme":
        return {"device": device, "pin_memory": True, "nvme_path": nvme_path}
    assert_never(device)


def _is_half(config: RunConfig) -> bool:
    if config.precision == "bfloat16":
        return True
    if config.precision == "float32":
        return False
    assert_never(config.precision)
