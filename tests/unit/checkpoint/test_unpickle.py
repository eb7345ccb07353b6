"""A checkpoint cannot run code; those of the first versions, which hold pickles, are still read."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rewarm.checkpoint.random_state import load_random_state, save_random_state
from rewarm.checkpoint.unpickle import METADATA_NAMES, TENSOR_NAMES, unpickle
from rewarm.errors import UserError
from saved_runs import flip, unpack_runs


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path, function: Any = os.mkdir) -> None:
        self.marker, self.function = str(marker), function

    def __reduce__(self) -> Any:
        return self.function, (self.marker,)


class Indirect(Attack):
    """The same through what torch itself puts into pickles of tensors."""

    def __reduce__(self) -> Any:
        content = io.BytesIO()
        torch.save(Attack(Path(self.marker)), content, _use_new_zipfile_serialization=False)
        return torch.storage._load_from_bytes, (content.getvalue(),)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_runs(tmp_path_factory.mktemp("old")) / "runs/continue/checkpoints/step-4"


@pytest.mark.parametrize("attack", [Attack, Indirect])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("names", [METADATA_NAMES, TENSOR_NAMES])
def test_what_a_pickle_names_is_not_run(tmp_path: Path, attack: type, wrapped: bool, names: Any) -> None:
    marker = tmp_path / "ran"
    attacked: Any = attack(marker)
    (tmp_path / "file").write_bytes(pickle.dumps({"device": {"cpu": attacked}} if wrapped else attacked))
    with pytest.raises(pickle.UnpicklingError):
        unpickle(tmp_path / "file", names)
    assert not marker.exists()
    pickle.loads((tmp_path / "file").read_bytes()) if attack is Attack else None
    assert marker.exists() == (attack is Attack), "the attack would have worked"


def test_random_states_of_the_first_version_are_read_without_running_anything(old: Path, tmp_path: Path) -> None:
    state = load_random_state(old / "random", 0)
    expected = pickle.loads((old / "random/rank-00000.pickle").read_bytes())
    assert torch.equal(state["device"]["cpu"], expected["device"]["cpu"])
    assert state["tracker"].keys() == expected["tracker"].keys()
    for name, value in expected["tracker"].items():
        assert torch.equal(state["tracker"][name], value)
    (tmp_path / "rank-00000.pickle").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(UserError, match="mkdir, which no checkpoint holds"):
        load_random_state(tmp_path, 0)


def test_random_states_come_back(tmp_path: Path) -> None:
    state = {"device": {"cpu": torch.get_rng_state()}, "tracker": {"a": torch.arange(9, dtype=torch.uint8)}}
    save_random_state(tmp_path, 3, state)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00003.safetensors"]
    found = load_random_state(tmp_path, 3)
    assert torch.equal(found["device"]["cpu"], state["device"]["cpu"])
    assert torch.equal(found["tracker"]["a"], state["tracker"]["a"])
    with pytest.raises(UserError, match="rank-00004"):
        load_random_state(tmp_path, 4)
    flip(tmp_path / "rank-00003.safetensors", 0.001)
    with pytest.raises(UserError, match=r"rank-00003\.safetensors is damaged"):
        load_random_state(tmp_path, 3)


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", pickle.dumps([1, 2]), pickle.dumps({"a": "text"})])
def test_damaged_pickles_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rank-00000.pickle").write_bytes(content)
    with pytest.raises(UserError, match=r"rank-00000\.pickle is damaged"):
        load_random_state(tmp_path, 0)


def test_metadata_of_sharded_checkpoints(old: Path, tmp_path: Path) -> None:
    from rewarm.engine.megatron.sharded_reader import _Planner, _Reader

    metadata = _Reader(old / "model").read_metadata()
    assert "output_layer.weight" in metadata.state_dict_metadata
    place, stored = next(iter(metadata.storage_data.items()))
    stored.relative_path = "../../secret"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="outside"):
        _Reader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        _Reader(tmp_path).read_metadata()
    with pytest.raises(pickle.UnpicklingError, match="no tensor"):
        _Planner().load_bytes(type("Item", (), {"dest_index": place})(), io.BytesIO())
    assert not (tmp_path / "ran").exists()
