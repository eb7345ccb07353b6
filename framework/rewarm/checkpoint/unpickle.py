"""Reading the pickles that older checkpoints and torch's format of sharded ones hold, without running what they name.

A pickle may name any function of any module to be called. Here only the classes and functions that these files are
known to hold can be named; everything else makes the file a damaged one.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

_METADATA = "torch.distributed.checkpoint.metadata"
METADATA_NAMES = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
        *((_METADATA, name) for name in ("TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta")),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("collections", "OrderedDict"),
    }
)
"""What the ``.metadata`` of a sharded checkpoint holds, beside torch's types of numbers."""
TENSOR_NAMES = frozenset({("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")})
"""What a pickle of tensors in plain containers holds, beside the storages, which are read as weights only."""


class ForbiddenName(pickle.UnpicklingError):
    """A pickle that names what has no business in it."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, names: frozenset[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(content))
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in self._names:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.storage", "_load_from_bytes") and self._names is TENSOR_NAMES:
            return _load_storage
        raise ForbiddenName(f"it names {module}.{name}, which no checkpoint holds")


def _load_storage(content: bytes) -> Any:
    """torch's own reads a pickle without any restriction."""
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)


def unpickle(path: Path, names: frozenset[tuple[str, str]]) -> Any:
    """The content of a pickle that names nothing but what is allowed.

    Args:
        path: the file.
        names: module and name of what it may name.

    Raises:
        pickle.UnpicklingError: if it names anything else, or is damaged.
        OSError: if it cannot be read.
    """
    content = path.read_bytes()
    try:
        return _Unpickler(content, names).load()
    except (pickle.UnpicklingError, OSError):
        raise
    except Exception as error:  # a damaged pickle fails in any way that its instructions can
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
