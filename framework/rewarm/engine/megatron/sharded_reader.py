"""Megatron-Core's reading of sharded checkpoints, without unpickling anything that could run.

torch reads ``.metadata`` with a plain unpickler, and so it reads every entry that the metadata calls bytes: whoever
wrote the folder could have any code run. A checkpoint of this project needs neither: the metadata names a dozen
classes, and its entries are tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_sharded
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from rewarm.checkpoint.unpickle import METADATA_NAMES, ForbiddenName, unpickle


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See the base class."""
        metadata = unpickle(Path(self.path) / ".metadata", METADATA_NAMES)
        if not isinstance(metadata, Metadata):
            raise ForbiddenName(".metadata holds no metadata")
        for stored in (metadata.storage_data or {}).values():
            name = str(stored.relative_path)
            if name in ("", ".", "..") or "/" in name:
                raise ForbiddenName(f".metadata names a file outside of the checkpoint: {name}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def check_metadata(folder: Path) -> None:
    """Refuse metadata that names what no checkpoint holds.

    Raises:
        pickle.UnpicklingError: if it does, or is damaged.
        OSError: if it cannot be read.
    """
    _Reader(folder).read_metadata()


class _Planner(MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        """See the base class, which unpickles."""
        raise ForbiddenName(f"{read_item.dest_index.fqn} is no tensor")


class TensorsOnly(TorchDistLoadShardedStrategy):
    """Loads sharded tensors and refuses everything else."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        """See the base class, of which this is the same with another reader and planner."""
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        flat, mapping, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(flat, True)
        planner = _Planner(
            shapes_validation_sharded_tensors=[value for value in tensors if not value.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={value.key: value for value in tensors if value.allow_shape_mismatch},
        )
        load_sharded(state, storage_reader=_Reader(checkpoint_dir), planner=planner)
        found = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        found = _replace_sharded_keys_with_state_dict_keys(found, mapping, renamed)
        _restore_dict_types(found, sharded_state_dict)
        return found
