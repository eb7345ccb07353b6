"""The one place that knows CPU from GPU. Everything else asks here and runs the same code on both."""

from __future__ import annotations

import os
import resource
from typing import Any

import torch


def is_gpu() -> bool:
    """True if this machine has a CUDA device that torch can use."""
    return torch.cuda.is_available()


def local_device() -> torch.device:
    """The device of this rank: of the GPUs that it sees the one numbered ``LOCAL_RANK``, or the CPU.

    A rank that sees fewer GPUs than that, as each sees its own one under ``srun --gpus-per-task=1``, counts around;
    :func:`rewarm.engine.ranks.join` makes sure that no other rank has taken the same one.
    """
    if is_gpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))
    return torch.device("cpu")


def activate() -> torch.device:
    """Make :func:`local_device` the current one and return it."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def communication_backend() -> str:
    """Process-group backend that fits the device."""
    return "nccl" if is_gpu() else "gloo"


def synchronize() -> None:
    """Wait until the device has done all that was queued."""
    if is_gpu():
        torch.cuda.synchronize()


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` count from now on; nothing on a CPU, where the kernel's figure is for good."""
    if is_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Most bytes held so far: allocated on this rank's GPU since :func:`forget_peak_memory`, or resident in this
    process on a CPU."""
    if is_gpu():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rng_state() -> dict[str, Any]:
    """Random state of torch on the CPU and, where there is one, on this rank's GPU."""
    state = {"cpu": torch.get_rng_state()}
    if is_gpu():
        state["gpu"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned; a GPU state is left alone on a machine without GPU."""
    torch.set_rng_state(state["cpu"])
    if is_gpu() and "gpu" in state:
        torch.cuda.set_rng_state(state["gpu"])


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """The torch type of a ``precision``.

    Raises:
        ValueError: if it is none of those that the configuration offers; torch has many more.
    """
    if precision not in _DTYPES:
        raise ValueError(f"there is no precision {precision!r}: {', '.join(_DTYPES)}")
    return _DTYPES[precision]
