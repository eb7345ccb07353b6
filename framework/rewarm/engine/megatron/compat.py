"""Megatron-Core on machines without CUDA, and its distributed optimizer without Apex or Transformer Engine.

Megatron-Core has no setting for the device. On a CPU its modules therefore get a stand-in for their ``torch`` global
whose ``cuda`` namespace and tensor factories mean the CPU; nothing outside ``megatron.core`` sees it. With CUDA only
the optimizer patch is applied. File and line numbers are those of megatron-core 0.16.1, below ``megatron/core/``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rewarm.engine import device
from rewarm.versions import require

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "as_tensor",
              "empty_like", "zeros_like", "ones_like")  # fmt: skip
_PREFIX = "megatron.core"


class _Stream:
    """One queue that is always in order: what a CUDA stream or event means on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _Cuda(types.ModuleType):
    """What ``torch.cuda`` means to megatron.core on a CPU.

    current_device: p2p_communication.py:313, param_and_grad_buffer.py:800, tensor_parallel/layers.py:552,
    mappings.py:141, utils.py:631, distrib_optimizer.py:791, state_dict_saver.py:252.
    synchronize and streams: p2p_communication.py:398, async_utils.py:212.
    Random state: tensor_parallel/random.py:235.
    """

    Stream = Event = _Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        """The CPU, which every factory accepts as a device."""
        return _CPU

    def synchronize(self, *args: Any) -> None:
        """A CPU has no queue."""

    def current_stream(self, *args: Any) -> _Stream:
        """The only queue."""
        return _Stream()

    default_stream = current_stream

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU generator."""
        torch.manual_seed(seed)

    def get_rng_state(self, *args: Any) -> torch.Tensor:
        """State of the CPU generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *args: Any) -> None:
        """Set the CPU generator."""
        torch.set_rng_state(state)


def _means_cuda(target: Any) -> bool:
    return target is not None and str(target).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory for which ``device="cuda"`` means the CPU and memory is never pinned.

    schedules.py:596,983,2138, clip_grads.py:103, optimizer.py:481,485, distrib_optimizer.py:1089.
    """

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _stand_in() -> types.ModuleType:
    """The module that megatron.core sees as ``torch``. A copy of the namespace keeps look-ups as fast as torch's."""
    module = types.ModuleType("torch")
    module.__dict__.update(torch.__dict__)
    module.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    module.__dict__["cuda"] = _Cuda("torch.cuda")
    module.__dict__.update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    return module


class _Finder(importlib.abc.MetaPathFinder):
    """Gives the stand-in to megatron.core modules that are imported later."""

    def __init__(self, stand_in: types.ModuleType) -> None:
        self.stand_in = stand_in

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The ordinary spec, whose loader also swaps the module's ``torch``."""
        if not name.startswith(_PREFIX + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        execute = spec.loader.exec_module

        def execute_and_swap(module: types.ModuleType) -> None:
            execute(module)
            _swap(module, self.stand_in)

        spec.loader.exec_module = execute_and_swap  # type: ignore[method-assign]
        return spec


def _swap(module: types.ModuleType, stand_in: types.ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = stand_in


@contextlib.contextmanager
def _no_compilation() -> Iterator[None]:
    """``jit_fuser`` is ``torch.compile``, applied while megatron.core is imported (jit.py:22), where
    ``disable_jit_fuser`` comes too late. On a CPU compiling takes longer than it can ever win back."""
    real = torch.compile
    torch.compile = lambda model=None, *args, **kwargs: model if model is not None else lambda function: function
    try:
        yield
    finally:
        torch.compile = real


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron-Core warns at import about optional packages that are meant to be absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _silence_deprecations() -> None:
    """torch announces, on every use, the end of names that this Megatron-Core still calls; a user can do nothing."""
    for message in (
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        r"`load_state_dict` is deprecated",
        r"Please use DTensor instead",
        r"full scope is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """``Tensor.type()`` of a CPU tensor as the CUDA name that distrib_optimizer.py:361,420,582 compare with."""
    real = torch.Tensor.type

    def type_name(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and tensor.device.type == "cpu":
            return real(tensor).replace("torch.", "torch.cuda.", 1)
        return real(tensor, dtype, *args, **kwargs)

    with _replaced(torch.Tensor, "type", type_name):
        yield


@contextlib.contextmanager
def cuda_is_identity() -> Iterator[None]:
    """``Tensor.cuda()`` as the identity; without CUDA it can only fail (language_module.py:244)."""
    with _replaced(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor):
        yield


@contextlib.contextmanager
def without_main_parameters() -> Iterator[None]:
    """``Tensor.float()`` of 16 bits as a tensor without memory: distrib_optimizer.py:399 makes the fp32 main parameters
    with it, all of them on the device, where offloaded ones are not kept."""
    real = torch.Tensor.float

    def shape_only(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.dtype == torch.float32:
            return real(tensor, *args, **kwargs)
        main = torch.empty_like(tensor, dtype=torch.float32)
        main.untyped_storage().resize_(0)
        return main

    with _replaced(torch.Tensor, "float", shape_only):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _inside(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return wrapped


def _import_megatron() -> None:
    import megatron.core
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401


def _patch_random_state() -> None:
    """Unpatched, setting a CUDA state without CUDA only queues it (tensor_parallel/random.py:250-277,422-457)."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # The tracker warns when the CPU generator moves while it is forked: on a CPU that is the point.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_cuda_names() -> None:
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer.__init__ = _inside(cuda_type_names, DistributedOptimizer.__init__)
    name = "setup_embeddings_and_output_layer"
    setattr(LanguageModule, name, _inside(cuda_is_identity, getattr(LanguageModule, name)))


def accept_optimizer(optimizer: type) -> None:
    """Make the distributed optimizer treat a class as FusedAdam, whose state layout is the only one it reloads.

    Without Apex and Transformer Engine it expects torch's layout and fails: before the first step on
    ``len(steps) == 1`` (distrib_optimizer.py:642), later on ``KeyError 'step'`` (:940).
    """
    from megatron.core.optimizer import distrib_optimizer

    distrib_optimizer.Adam = optimizer
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


@functools.cache
def install() -> None:
    """Import Megatron-Core, ready for this machine's device. Idempotent; call before any other use of it.

    Raises:
        rewarm.errors.UserError: if its version is outside the tried range.
    """
    require("megatron-core")
    _silence_deprecations()
    if device.is_gpu():
        with _quiet():
            _import_megatron()
        return
    with _quiet(), _no_compilation():
        _import_megatron()
    stand_in = _stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith(_PREFIX):
            _swap(module, stand_in)
    sys.meta_path.insert(0, _Finder(stand_in))
    _patch_random_state()
    _patch_cuda_names()
