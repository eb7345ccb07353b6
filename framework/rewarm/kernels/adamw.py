"""The reference AdamW: one pass over flat state, the same bits on every device, thread count and cut.

Every function takes flat contiguous torch tensors, all on the CPU or all on one CUDA device, and runs the compiled
kernel of that device. Without the compiled CPU library (one warning) torch stands in: correct to rounding, but no
longer independent of how the state is cut.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rewarm.errors import ensure
from rewarm.kernels import native
from rewarm.kernels.blocks import QUANTIZED_BLOCK

_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_NONE = 0
_FEATURE = "8-bit moments"
SUM_BLOCK = 4096
"""Elements per partial sum of :func:`sum_squares`; gradients cut at multiples of it add up the same."""


class AdamWStep(ctypes.Structure):
    """What all elements of one step share; mirrors ``rewarm_adamw_step`` of ``csrc/common/adamw.h``."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            "one_minus_beta1",
            "beta2",
            "one_minus_beta2",
            "inverse_sqrt_correction2",
            "epsilon",
            "decay",
            "step_size",
            "grad_scale",
        )
    ]

    @classmethod
    def of_group(cls, group: Mapping[str, Any], grad_scale: float = 1.0) -> AdamWStep:
        """The constants of a parameter group of torch that counts its updates in ``step``, from 1."""
        beta1, beta2 = group["betas"]
        return cls.prepare(
            step=group["step"],
            learning_rate=group["lr"],
            beta1=beta1,
            beta2=beta2,
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
        )

    @classmethod
    def prepare(
        cls,
        *,
        step: int,
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        grad_scale: float = 1.0,
    ) -> AdamWStep:
        """Compute the constants in double precision and round each once.

        Args:
            step: the number of this update, from 1.
            grad_scale: what every gradient is multiplied by first: unscale factor times clip factor.
        """
        assert step >= 1, step
        constants = cls(
            1 - beta1,
            beta2,
            1 - beta2,
            1 / math.sqrt(1 - beta2**step),
            epsilon,
            1 - learning_rate * weight_decay,
            learning_rate / (1 - beta1**step),
            grad_scale,
        )
        constants.number = step
        constants.torch_settings = {
            "lr": learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "eps": epsilon,
            "weight_decay": weight_decay,
        }
        return constants

    number: int
    """The step that the constants belong to; with the settings below, for the fallback alone."""
    torch_settings: dict[str, float]


def runs_on(device: torch.device) -> bool:
    """True if the compiled kernel of a device is there."""
    return (native.load_cuda() if device.type == "cuda" else _library()) is not None


def update(
    step: AdamWStep,
    master: torch.Tensor,
    moment1: torch.Tensor,
    moment2: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    threads: int = 0,
) -> None:
    """One AdamW update in place.

    Args:
        step: constants of the step.
        master, moment1, moment2: fp32 [N], updated.
        grad: fp32, bf16 or fp16 [N], only read.
        out: bf16 or fp16 [N]; receives the rounded master. None where no 16-bit copy is wanted.
        threads: CPU threads; 0 means as many as OpenMP gives.
    """
    _check(master, (master, moment1, moment2), grad, out)
    out_type = _NONE if out is None else _TYPES[out.dtype]
    ensure(out_type != _TYPES[torch.float32], "the fp32 master is its own fp32 parameter")
    head = (_count(master), *_pointers(master, moment1, moment2, grad), _TYPES[grad.dtype])
    target = None if out is None else ctypes.c_void_p(out.data_ptr())
    if master.is_cuda:
        _cuda("rewarm_cuda_adamw", master, *head, target, out_type, ctypes.byref(step))
    elif (library := _library()) is not None:
        _succeeded(library.rewarm_adamw(*head, target, out_type, ctypes.byref(step), threads, -1))
    else:
        _update_with_torch(step, master, moment1, moment2, grad, out)


def update_split(
    step: AdamWStep,
    high: torch.Tensor,
    low: torch.Tensor,
    moment1: torch.Tensor,
    moment2: torch.Tensor,
    grad: torch.Tensor,
    *,
    threads: int = 0,
) -> None:
    """:func:`update` of a master in the form that :func:`split` makes; the same bits, with 2 bytes less per parameter.

    Args:
        high: bf16 [N], the model's parameter, updated.
        low: int16 [N], the low halves, updated.
        moment1, moment2: fp32 [N], updated; the sign of moment2 belongs to the split.
        grad: fp32, bf16 or fp16 [N].
        threads: CPU threads; 0 means as many as OpenMP gives.
    """
    _check(high, (moment1, moment2), grad, None)
    _check_split(high, low)
    head = (_count(high), *_pointers(high, low, moment1, moment2, grad), _TYPES[grad.dtype])
    if high.is_cuda:
        _cuda("rewarm_cuda_adamw_split", high, *head, ctypes.byref(step))
    elif (library := _library()) is not None:
        _succeeded(library.rewarm_adamw_split(*head, ctypes.byref(step), threads, -1))
    else:
        master = torch.empty_like(moment1)
        join(high, low, moment2, master)
        _update_with_torch(step, master, moment1, moment2, grad, None)
        split(master, high, low, moment2)


@dataclass(frozen=True, slots=True)
class Moments8bit:
    """Both moments as one byte per element (approximate by name).

    Block-wise dynamic quantisation (Dettmers et al., 2021): a code is a decade and a linear cell in it, the scale is
    the largest magnitude of 2048 elements. An element's first moment is off by at most 0.7% of its block's largest, its
    second by at most 0.35%, each by at most half a cell of its own decade; a first moment without gradients is let go
    of by a cell more. Quantised again, values keep all bits.
    """

    codes1: torch.Tensor
    """uint8 [N], first moment."""
    codes2: torch.Tensor
    """uint8 [N], second moment."""
    scales1: torch.Tensor
    scales2: torch.Tensor
    """fp32 [ceil(N / 2048)]."""

    @classmethod
    def zeros(cls, numel: int, device: torch.device | str = "cpu") -> Moments8bit:
        """Moments before the first step."""
        blocks = -(-numel // QUANTIZED_BLOCK)
        codes = (torch.zeros(numel, dtype=torch.uint8, device=device) for _ in range(2))
        return cls(*codes, *(torch.zeros(blocks, device=device) for _ in range(2)))

    @classmethod
    def of(cls, moment1: torch.Tensor, moment2: torch.Tensor) -> Moments8bit:
        """Quantise fp32 moments [N] on the host; a block begins with the first element."""
        _check(moment1, (moment1, moment2), None, None)
        found = cls.zeros(moment1.numel())
        arguments = _count(moment1), *_pointers(moment1, moment2, *found.arrays())
        _library_for(_FEATURE).rewarm_quantize_moments(*arguments, 0)
        return found

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First and second moment as new fp32 host tensors [N]."""
        arrays = [array.cpu() for array in self.arrays()]
        found = torch.empty(arrays[0].numel()), torch.empty(arrays[0].numel())
        _library_for(_FEATURE).rewarm_dequantize_moments(_count(found[0]), *_pointers(*arrays, *found), 0)
        return found

    def arrays(self) -> tuple[torch.Tensor, ...]:
        """In the order in which the kernels take them."""
        return self.codes1, self.codes2, self.scales1, self.scales2


def update_8bit(
    step: AdamWStep,
    master: torch.Tensor,
    moments: Moments8bit,
    grad: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    threads: int = 0,
) -> None:
    """:func:`update` with moments of one byte each: not its bits, but the same for every device and thread count.

    Args:
        step: constants of the step.
        master: fp32 [N], updated. A cut of the state must fall on multiples of 2048 elements.
        moments: updated.
        grad: fp32, bf16 or fp16 [N], only read.
        out: bf16 or fp16 [N]; receives the rounded master.
        threads: CPU threads; 0 means as many as OpenMP gives.

    Raises:
        RuntimeError: without the compiled library, which no torch function stands in for.
    """
    _check(master, (master,), grad, out)
    arrays = moments.arrays()
    _alike(torch.uint8, master.numel(), master.device, *arrays[:2])
    _alike(torch.float32, -(-master.numel() // QUANTIZED_BLOCK), master.device, *arrays[2:])
    out_type = _NONE if out is None else _TYPES[out.dtype]
    target = None if out is None else ctypes.c_void_p(out.data_ptr())
    pointers = _count(master), *_pointers(master, *arrays, grad)
    head = (*pointers, _TYPES[grad.dtype], target, out_type, ctypes.byref(step))
    if master.is_cuda:
        _cuda("rewarm_cuda_adamw_8bit", master, *head)
    else:
        _succeeded(_library_for(_FEATURE).rewarm_adamw_8bit(*head, threads, -1))


def split(master: torch.Tensor, high: torch.Tensor, low: torch.Tensor, moment2: torch.Tensor) -> None:
    """Cut the fp32 master into its bf16 rounding and 16 more bits, without loss.

    Rounding to nearest even maps two fp32 numbers, half a step below and half a step above, to one even bf16 number
    with equal low halves. Which it was is kept in the sign of ``moment2``, which is never negative by itself.

    Args:
        master: fp32 [N], only read.
        high: bf16 [N], the rounding.
        low: int16 [N], the low halves of the master's bits.
        moment2: fp32 [N], its sign is set on ties that were rounded up and cleared elsewhere.
    """
    _check(master, (master, moment2), None, None)
    _check_split(high, low)
    pointers = _pointers(master, high, low, moment2)
    if master.is_cuda:
        _cuda("rewarm_cuda_split", master, _count(master), *pointers)
    elif (library := _library()) is not None:
        library.rewarm_split(_count(master), *pointers, 0)
    else:
        bits = master.view(torch.int32)
        high.copy_(master)
        low.copy_(torch.where(master.isnan(), 0, bits).to(torch.int16))
        tie_up = (low == -0x8000) & ((bits >> 16) & 1 == 1)
        moment2.copy_(torch.where(tie_up, -moment2.abs(), moment2.abs()))


def join(high: torch.Tensor, low: torch.Tensor, moment2: torch.Tensor, master: torch.Tensor) -> None:
    """The inverse of :func:`split`: fills ``master`` and clears the sign of ``moment2``. A NaN stays a NaN."""
    _check(master, (master, moment2), None, None)
    _check_split(high, low)
    pointers = _pointers(high, low, moment2, master)
    if master.is_cuda:
        _cuda("rewarm_cuda_join", master, _count(master), *pointers)
    elif (library := _library()) is not None:
        library.rewarm_join(_count(master), *pointers, 0)
    else:
        remainder = low.to(torch.int32) & 0xFFFF
        rounded_up = (remainder + 0x7FFF + moment2.signbit().to(torch.int32)) >> 16
        bits = ((high.view(torch.int16).to(torch.int32) - rounded_up) << 16) | remainder
        master.view(torch.int32).copy_(bits)
        moment2.abs_()


def cast(source: torch.Tensor, target: torch.Tensor, *, threads: int = 0) -> None:
    """Convert between fp32, bf16 and fp16 of the same length on the same device, to nearest."""
    _alike(None, source.numel(), source.device, source, target)
    arguments = (
        _count(source),
        *_pointers(source),
        _TYPES[source.dtype],
        *_pointers(target),
        _TYPES[target.dtype],
    )
    if source.is_cuda:
        _cuda("rewarm_cuda_cast", source, *arguments)
    elif (library := _library()) is not None:
        _succeeded(library.rewarm_cast(*arguments, threads))
    else:
        target.copy_(source)


def sum_squares(values: torch.Tensor, *, threads: int = 0) -> float:
    """Sum of squares of an fp32, bf16 or fp16 CPU tensor in double precision, for clipping.

    Independent of the thread count; not finite exactly when an element is not, so it is the overflow check as well.
    """
    _alike(None, values.numel(), torch.device("cpu"), values)
    library = _library()
    if library is None:
        return float(values.double().square().sum())
    partial = (ctypes.c_double * max(1, -(-values.numel() // SUM_BLOCK)))()
    return float(library.rewarm_sum_squares(_count(values), *_pointers(values), _TYPES[values.dtype], partial, threads))


def _check(
    first: torch.Tensor, state: tuple[torch.Tensor, ...], grad: torch.Tensor | None, out: torch.Tensor | None
) -> None:
    _alike(torch.float32, first.numel(), first.device, *state)
    _alike(None, first.numel(), first.device, *(extra for extra in (grad, out) if extra is not None))


def _check_split(high: torch.Tensor, low: torch.Tensor) -> None:
    _alike(torch.bfloat16, high.numel(), high.device, high)
    _alike(torch.int16, high.numel(), high.device, low)


def _alike(dtype: torch.dtype | None, numel: int, place: torch.device, *tensors: torch.Tensor) -> None:
    """Kernels are given addresses: a tensor that is not what they take would be read and written beyond its end."""
    for tensor in tensors:
        right = dtype in (None, tensor.dtype) and tensor.numel() == numel and tensor.device == place
        if not (right and tensor.is_contiguous()):
            found = f"{tensor.dtype} [{tensor.numel()}] on {tensor.device}"
            raise AssertionError(f"{found} where {dtype} [{numel}] on {place}, contiguous, is meant")


def _succeeded(status: int) -> None:
    ensure(status == 0, f"a compiled kernel refuses its arguments (status {status})")


def _count(tensor: torch.Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(tensor.numel())


def _pointers(*tensors: torch.Tensor) -> tuple[ctypes.c_void_p, ...]:
    return tuple(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)


def _library() -> Any:
    library = native.load()
    if library is not None and library.rewarm_sum_squares.restype is not ctypes.c_double:
        library.rewarm_sum_squares.restype = ctypes.c_double
    return library


def _library_for(feature: str) -> Any:
    """The compiled library, which the feature cannot do without."""
    library = _library()
    if library is None:
        raise RuntimeError(f"the compiled library is needed for {feature}: {native.REBUILD}")
    return library


def _cuda(name: str, tensor: torch.Tensor, *arguments: Any) -> None:
    """Call a CUDA function on the tensor's device and its current stream."""
    library = native.load_cuda()
    if library is None:
        raise RuntimeError(f"{native.why_no_cuda()}: {native.REBUILD}, with nvcc installed")
    with torch.cuda.device(tensor.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(library, name)(*arguments, stream)
    if code != 0:
        library.rewarm_cuda_error.restype = ctypes.c_char_p
        raise RuntimeError(f"{name}: {library.rewarm_cuda_error(code).decode()}")


def _update_with_torch(
    step: AdamWStep,
    master: torch.Tensor,
    moment1: torch.Tensor,
    moment2: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    scaled = grad.float() * step.grad_scale
    number = [torch.tensor(float(step.number))]
    settings = {**step.torch_settings, "amsgrad": False, "maximize": False}
    torch._fused_adamw_([master], [scaled], [moment1], [moment2], [], number, **settings)
    if out is not None:
        out.copy_(master)
