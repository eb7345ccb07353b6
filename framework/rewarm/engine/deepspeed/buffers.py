"""The part of a model's state that has no gradient: persistent buffers, and parameters that are not trained.

Such are a router's ``e_score_correction_bias`` in several families with experts, or the ``layer_scalar`` of Gemma 4.
Each rank holds all of them, in the type that transformers gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rewarm.errors import UserError
from rewarm.model.safetensors_io import BROKEN_MODEL, check_no_nan

FILE = "buffers.safetensors"


def freeze(module: nn.Module) -> None:
    """Turn parameters that are not trained into buffers: ZeRO would neither fill, save nor export them."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if name not in parameters and isinstance(value, Tensor)}


def aliases(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that are used in several places, with the first name of each."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def write_buffers(module: nn.Module, folder: Path) -> None:
    """Write the buffers into a folder, if there are any."""
    from safetensors.torch import save_file

    buffers = {name: value.detach().cpu().contiguous() for name, value in persistent_buffers(module).items()}
    if buffers:
        save_file(buffers, folder / FILE)


def read_buffers(module: nn.Module, folder: Path) -> None:
    """Put back what :func:`write_buffers` wrote.

    Raises:
        UserError: if a buffer of the model is not there.
    """
    from safetensors.torch import load_file

    fill_buffers(module, load_file(folder / FILE) if (folder / FILE).is_file() else {}, str(folder), BROKEN_MODEL)


@torch.no_grad()
def fill_buffers(module: nn.Module, values: Mapping[str, Tensor], source: str, fix: str) -> None:
    """Set every buffer of the model's state.

    Args:
        module: the model.
        values: by name; more than is needed does no harm.
        source: where they are from, for messages.
        fix: what to do if they are not numbers.

    Raises:
        UserError: if one is missing, has another shape, or is not a number.
    """
    for name, buffer in persistent_buffers(module).items():
        value = values.get(name)
        if value is None or value.shape != buffer.shape:
            found = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise UserError(
                f"{source} holds {found} for {name}, a part of the model's state of shape {tuple(buffer.shape)}",
                fix="start again from the folder that the model came from",
            )
        check_no_nan(value, name, source, fix)
        buffer.copy_(value)
