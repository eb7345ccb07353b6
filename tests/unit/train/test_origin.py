"""What a stage may take over from its parent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewarm.checkpoint import store
from rewarm.config.load import build, dump
from rewarm.config.model import ModelConfig
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.replay.lineage import Lineage
from rewarm.train.origin import find_origin


def trained(folder: Path, optimizer: str) -> Path:
    """A run with one checkpoint, without its tensors."""
    checkpoints = folder / "checkpoints"
    partial = store.begin(checkpoints, 3)
    architecture = Architecture.from_config(ModelConfig(), 64)
    (partial / "state.json").write_text(json.dumps({"engine": "megatron", "architecture": architecture.to_dict()}))
    Lineage().save(partial)
    store.commit(partial, 3, store.digest_files(partial, store.content_files(partial)))
    own = {"name": folder.name, "model": {}, "data": {"a": "p"}, "optimizer": {"name": optimizer}}
    (folder / "config.yaml").write_text(dump(build(own)))
    return folder


@pytest.mark.parametrize(
    ("before", "now", "state", "fits"),
    [
        ("adamw", "adamw", "keep", True),
        ("adamw", "adamw_8bit", "keep", True),
        ("adamw_8bit", "adamw", "keep", True),
        ("sgd", "sgd", "keep", True),
        ("adamw_8bit", "sgd", "keep", False),
        ("sgd", "adamw", "keep", False),
        ("adamw", "sgd", "keep", False),
        ("sgd", "adamw", "reset", True),
    ],
)
def test_moments_are_kept_only_between_rules_that_have_them(
    tmp_path: Path, before: str, now: str, state: str, fits: bool
) -> None:
    parent = str(trained(tmp_path / "parent", before))
    values = {"name": "child", "runs_folder": str(tmp_path), "data": {"a": "p"}, "parent": parent}
    child = build({**values, "optimizer_state": state, "optimizer": {"name": now}})
    if fits:
        assert find_origin(child).parent is not None
        return
    with pytest.raises(UserError) as error:
        find_origin(child)
    for part in (f"parent={parent}", f"optimizer.name={before}", f"optimizer.name={now}", "optimizer_state=reset"):
        assert part in str(error.value)
