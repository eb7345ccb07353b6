"""The one place that touches names of DeepSpeed which it does not promise to keep."""

from __future__ import annotations

import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rewarm import versions
from rewarm.engine import device
from rewarm.errors import UserError


def load_deepspeed() -> Any:
    """Import DeepSpeed for this machine's device, without its noise unless ``REWARM_DEBUG`` is set.

    Raises:
        UserError: if it is missing or not a version that was tried.
    """
    versions.require("deepspeed")
    debug = bool(os.environ.get("REWARM_DEBUG"))
    # Left to itself DeepSpeed probes for a dozen kinds of accelerator and warns about each.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.is_gpu() else "cpu")
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|deepspeed")
    import deepspeed

    if not debug:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow what DeepSpeed prints, such as its memory reports, unless ``REWARM_DEBUG`` is set."""
    if os.environ.get("REWARM_DEBUG"):
        yield
        return
    with redirect_stdout(io.StringIO()):
        yield


def adopt_process_group(deepspeed: Any) -> None:
    """Let DeepSpeed use the default process group, which this process has joined already."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even where nobody launched anything
    if not device.is_gpu():
        # It counts CPUs by starting numactl, several times a step.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # On a CPU DeepSpeed would first compile a shared-memory all-reduce, half a minute for an operation that only
    # inference uses, behind a lock file that hangs every later start if the compilation is killed.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        dist_backend=device.communication_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=True
    )


def initialize(deepspeed: Any, module: Any, optimizer: Any, values: dict[str, Any], source: str | None) -> Any:
    """What ``deepspeed.initialize`` wraps the model in.

    Args:
        deepspeed: the module.
        module: the model.
        optimizer: over its parameters.
        values: the DeepSpeed configuration.
        source: the user's file that was merged into it, if any.

    Raises:
        UserError: if DeepSpeed refuses a key that the user's file added.
    """
    from pydantic import ValidationError

    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=values, dist_init_required=False)[0]
    except ValidationError as error:
        if source is None:
            raise
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"DeepSpeed refuses {key}={first['input']!r}: {first['msg']}",
            fix=f"mend it in deepspeed.json_file={source}",
        ) from error


def leave_process_group() -> None:
    """Let DeepSpeed forget the default process group, which is about to be destroyed."""
    importlib.import_module("deepspeed.comm.comm").cdb = None  # type: ignore[attr-defined]


def forget_groups() -> None:
    """Drop the groups of an engine that is gone, so that another one in this process makes its own."""
    from deepspeed.utils import groups

    groups._release_process_group_references(None)


def tensor_group() -> Any:
    """The process group of the ranks that hold one model copy together."""
    from deepspeed.utils import groups

    return groups.get_tensor_model_parallel_group()


def shard_map(parameter: Any) -> Any:
    """How AutoTP cut a parameter over the tensor ranks: a ``ParamAffineMap``, or None if each rank holds all of it.

    Raises:
        NotImplementedError: if DeepSpeed cannot describe the cut.
    """
    from deepspeed.checkpoint.affine import ParamAffineMap
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    meta = (getattr(parameter, DS_AUTOTP_UC_META, None) or {}).get("conversion")
    if not meta or (meta.get("replicated") and not meta.get("unsupported_reason")):
        return None
    if meta.get("affine_map") is None:
        raise NotImplementedError(meta.get("unsupported_reason") or "its cut is not described")
    return ParamAffineMap.from_dict(meta["affine_map"])


def forget_gradients(engine: Any) -> None:
    """Drop the gradients of a step that was not made.

    Under stages 1 and 2 with offload DeepSpeed 0.19 keeps the fp32 sums of a bfloat16 run, and would add all later
    gradients to what is not a number.
    """
    sums = getattr(engine.optimizer, "averaged_gradients", None)
    if isinstance(sums, dict):
        for group in sums:
            sums[group] = None


def full_gradient(parameter: Any) -> Any:
    """The reduced gradient of a parameter between the backward pass and the step, put together from the ranks under
    ZeRO; None where it has none. Collective."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def norm_of_gradients(engine: Any) -> float:
    """Norm of the reduced gradients of a stage-0 engine over all ranks, -1 or not finite if one of them is not."""
    from deepspeed.runtime.utils import clip_grad_norm_

    return float(clip_grad_norm_(engine.module.parameters(), max_norm=float("inf"), mpu=engine.mpu))
