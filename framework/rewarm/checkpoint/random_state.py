"""Random states of ranks in a checkpoint: nested names of byte tensors, as safetensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from rewarm.checkpoint.unpickle import TENSOR_NAMES, unpickle
from rewarm.errors import UserError

_BETWEEN = "/"


def save_random_state(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Write a rank's random state.

    Args:
        folder: of all ranks' random states.
        rank: whose it is.
        state: uint8 tensors, in dictionaries of any depth.
    """
    from safetensors.torch import save

    _path(folder, rank).write_bytes(save(_flatten(state)))


def load_random_state(folder: Path, rank: int) -> dict[str, Any]:
    """What :func:`save_random_state` was given; also from the pickles of the first versions, which are read without
    running anything that they name.

    Raises:
        UserError: if there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    fix = "name or resume from another checkpoint of the run"
    path, old = _path(folder, rank), folder / f"rank-{rank:05d}.pickle"
    try:
        if not path.is_file() and old.is_file():
            return _checked(unpickle(old, TENSOR_NAMES))
        return _nested(load(path.read_bytes()))
    except OSError as error:
        raise UserError(f"the random state {path} cannot be read: {error.strerror}", fix=fix) from error
    except (SafetensorError, pickle.UnpicklingError, ValueError) as error:
        where = path if path.is_file() else old
        raise UserError(f"the random state {where} is damaged: {error}", fix=fix) from error


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def _flatten(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in state.items():
        assert isinstance(name, str) and _BETWEEN not in name, f"{name!r} cannot be part of a name"
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}{_BETWEEN}")
        else:
            flat[prefix + name] = value.cpu().contiguous()
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(_BETWEEN)
        place = state
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{part} is a tensor and a group of them")
        place[last] = value
    return state


def _checked(state: Any) -> dict[str, Any]:
    """Refuse what is no nested dictionary of tensors."""
    import torch

    def is_state(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(name, str) and is_state(inner) for name, inner in value.items())
        return isinstance(value, torch.Tensor)

    if not isinstance(state, dict) or not is_state(state):
        raise ValueError("it holds no random state")
    return state
