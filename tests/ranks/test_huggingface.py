"""Hugging Face folders into live Megatron chunks and back, on several layouts, against transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ranks.harness import run_ranks
from ranks.huggingface_workers import (
    bytes_read,
    damaged,
    failed_exports,
    main_parameters,
    round_trips,
    with_another_theta,
)
from rewarm.errors import UserError
from rewarm.model.reference import window_losses
from unit.model.families import NAMES, save_model, stored_tensors, windows

TOKENS = windows(6, 33).numpy()
ONE: dict[str, Any] = {}
TENSOR2_PIPELINE2 = {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}
INTERLEAVED = {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}
TENSOR2_DATA2 = {"parallel": {"tensor": 2, "data": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, in several files, with the logits that transformers computes."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        model = save_model(name, root / name, max_shard_size="100KB")
        (root / name / "tokenizer.json").write_text("{}")
        with torch.no_grad():
            logits = model(torch.from_numpy(TOKENS[:1])).logits[0, [0, 7, 29]]
        np.save(root / f"{name}.npy", logits.numpy())
    return root


def _check(folders: Path, output: Path, name: str, results: list[dict[str, dict[str, np.ndarray]]]) -> None:
    logits, losses = np.load(folders / f"{name}.npy"), window_losses(folders / name, TOKENS)
    assert logits.std() > 1
    for result in results:
        np.testing.assert_allclose(result[name]["logits"], logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(result[name]["losses"] / 32, losses / 32, rtol=0, atol=1e-5)
    before, after = stored_tensors(folders / name), stored_tensors(output / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    np.testing.assert_array_equal(window_losses(output / name, TOKENS), losses)
    assert (output / name / "tokenizer.json").exists() and (output / name / "generation_config.json").exists()


@pytest.mark.parametrize(
    "settings, num_ranks, names",
    [
        (ONE, 1, NAMES),
        (TENSOR2_PIPELINE2, 4, NAMES),
        (INTERLEAVED, 2, ("llama3", "qwen3")),
        (TENSOR2_DATA2, 4, ("qwen2", "qwen2_tied")),
    ],
    ids=["one", "tensor2-pipeline2", "pipeline2-virtual2", "tensor2-data2"],
)
def test_round_trip_is_bit_exact_and_logits_are_those_of_transformers(
    settings: dict[str, Any], num_ranks: int, names: tuple[str, ...], folders: Path, tmp_path: Path
) -> None:
    results = run_ranks(round_trips, num_ranks, folders, names, tmp_path, settings, TOKENS, "float32")
    for name in names:
        _check(folders, tmp_path, name, results)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_wrong_rotary_base_would_be_seen(folders: Path) -> None:
    (losses,) = run_ranks(with_another_theta, 1, folders / "qwen2", ONE, TOKENS)
    assert np.abs(losses - window_losses(folders / "qwen2", TOKENS)).max() / 32 > 0.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_folders_come_back_bit_exact(precision: str, tmp_path: Path) -> None:
    save_model("qwen3", tmp_path / "qwen3", dtype=torch.bfloat16)
    settings = {"precision": precision, "parallel": {"tensor": 2}}
    run_ranks(round_trips, 2, tmp_path, ("qwen3",), tmp_path / "out", settings, TOKENS, "bfloat16")
    before, after = stored_tensors(tmp_path / "qwen3"), stored_tensors(tmp_path / "out" / "qwen3")
    assert before.keys() == after.keys()
    assert all(after[key].dtype == torch.bfloat16 and torch.equal(before[key], after[key]) for key in before)
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "out" / "qwen3").dtype == torch.bfloat16


def test_every_rank_reads_only_what_it_holds(folders: Path) -> None:
    read = run_ranks(bytes_read, 4, folders / "mistral", {"parallel": {"tensor": 2, "pipeline": 2}})
    whole = sum(tensor.nbytes for tensor in stored_tensors(folders / "mistral").values())
    assert all(bytes_from_disk <= bytes_held < 0.35 * whole for bytes_from_disk, bytes_held in read)
    assert sum(bytes_from_disk for bytes_from_disk, _ in read) >= whole


def test_an_export_that_cannot_be_written_fails_on_every_rank_and_leaves_nothing(folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "export"
    first, second = run_ranks(failed_exports, 2, folders / "llama2", output, {"parallel": {"pipeline": 2}})
    assert first == second
    assert "exists already" in first[0] and "Not a directory" in first[1] and "File too large" in first[2]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert len(stored_tensors(output)) == len(stored_tensors(folders / "llama2"))


@pytest.mark.parametrize(
    "settings, num_ranks, dtype",
    [
        ({"parallel": {"pipeline": 1}}, 1, torch.float16),
        (TENSOR2_DATA2, 4, torch.float32),
        ({"offload": {"mode": "cpu"}}, 2, torch.float32),
        ({"optimizer": {"name": "adamw_8bit"}}, 1, torch.float32),
    ],
    ids=["float16", "tensor2-data2", "offload", "8-bit"],
)
def test_the_digits_of_a_folder_stay_in_the_main_parameters_of_a_bfloat16_run(
    settings: dict[str, Any], num_ranks: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_model("qwen2_tied", tmp_path / "model", dtype=dtype)
    for found in run_ranks(main_parameters, num_ranks, tmp_path / "model", settings, tmp_path / "saved"):
        assert found["imported"] == 0 and found["loaded"] == 0
        assert 0 < found["imported and rounded"] == found["loaded and rounded"]


@pytest.mark.parametrize("settings, num_ranks", [(ONE, 1), ({"parallel": {"pipeline": 2}}, 2)], ids=["one", "pipeline"])
def test_weights_that_are_not_finite_are_refused_by_name_on_every_rank(
    settings: dict[str, Any], num_ranks: int, folders: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(folders / "qwen3", broken, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = stored_tensors(folders / "qwen3")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for messages in run_ranks(damaged, num_ranks, folders / "qwen3", broken, settings, tmp_path):
        imported, loaded, exported = messages
        assert "model.layers.3.mlp.up_proj.weight" in imported and str(broken) in imported
        assert "model.norm.weight" in loaded and "checkpoint" in loaded
        assert "model.norm.weight" in exported
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "checkpoint"]
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        window_losses(broken, TOKENS)
