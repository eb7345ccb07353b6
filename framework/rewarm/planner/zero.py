"""Memory that DeepSpeed ZeRO keeps between steps (Rajbhandari et al., 2020, arXiv:1910.02054, section 5)."""

from __future__ import annotations

from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel
from rewarm.model.layout import Layout
from rewarm.planner.cluster import Cluster
from rewarm.planner.memory import BYTES, GIB, state_on_device


def count_parameters(model: HuggingFaceModel) -> int | None:
    """Parameters of a model that transformers knows, a tied one once; None for one that brings its own code."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if model.model_type not in CONFIG_MAPPING:
        return None
    values = {key: value for key, value in model.config.items() if key != "auto_map"}
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model.model_type].from_dict(values))
    built.tie_weights()
    return sum(parameter.numel() for parameter in built.parameters())


def state_bytes(config: RunConfig, num_parameters: int, layout: Layout) -> dict[str, int]:
    """Least bytes of device memory per rank, by kind.

    Args:
        config: the resolved configuration.
        num_parameters: of the whole model.
        layout: how the ranks share it; tensor ranks are taken to split everything.
    """
    settings, size = config.deepspeed, BYTES[config.precision]
    stage, own = settings.zero_stage, -(-num_parameters // layout.tensor)
    share = -(-own // layout.data)
    # Stages 1 to 3 keep fp32 main parameters of their own even of fp32 parameters.
    optimizer = (4 * share if stage else 0) + state_on_device(config, share if stage else own, 4)
    return {
        "parameters": 0 if settings.offload_parameters != "none" else size * (share if stage == 3 else own),
        "gradients": size * (share if stage >= 2 else own),
        "optimizer": 0 if settings.offload_optimizer != "none" else optimizer,
    }


def check_state(config: RunConfig, model: HuggingFaceModel, layout: Layout, cluster: Cluster) -> str:
    """Compare what ZeRO keeps between steps with a cluster's GPUs. Activations depend on how transformers wrote the
    model and are not planned.

    Returns:
        One line for the user.

    Raises:
        UserError: if not even the state fits.
    """
    count = count_parameters(model)
    if count is None:
        return f"memory is not planned: transformers does not know {model.model_type} models"
    parts = state_bytes(config, count, layout)
    total = sum(parts.values()) / GIB
    usable = cluster.gpu_memory * (1 - cluster.reserved)
    shown = f"{total:.1f} GiB ({', '.join(f'{name} {value / GIB:.1f}' for name, value in parts.items())})"
    if total > usable:
        raise UserError(
            f"parameters, gradients and optimizer state take at least {shown} of a rank, but a GPU of {cluster.name} "
            f"has {cluster.gpu_memory:g} GiB, of which {cluster.reserved:.0%} are left free: {usable:.1f} GiB",
            fix="a higher deepspeed.zero_stage, more nodes, offload.mode=cpu, or more parallel.tensor",
        )
    return f"planned memory: at least {shown} of {usable:.1f} GiB usable on {cluster.name}, without activations"
