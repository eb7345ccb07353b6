"""Sharded checkpoints: saved on one layout, continued on another, and failing on every rank or on none."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest

from ranks import workers
from ranks.harness import run_ranks
from ranks.test_parity import LAYOUTS, TOLERANCE, difference
from rewarm.engine.base import StepResult

BEFORE, AFTER = 3, 3
DECAY = {"optimizer": {"weight_decay": 0.1}}


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepResult]]:
    """A checkpoint of tensor 2 x pipeline 2 after three steps, and the unbroken run's next three."""
    folder = _folder(tmp_path_factory.mktemp("saved"))
    num_ranks, parallel = LAYOUTS["tensor 2, pipeline 2"]
    results = run_ranks(workers.save_and_continue, num_ranks, {**DECAY, "parallel": parallel}, folder, BEFORE, AFTER)
    return folder, results[0]


@pytest.mark.parametrize("layout", ["single", "tensor 2, pipeline 2", "data 2", "pipeline 2, interleaved"])
def test_continues_on_another_layout(layout: str, saved: tuple[Path, list[StepResult]]) -> None:
    folder, expected = saved
    num_ranks, parallel = (1, {}) if layout == "single" else LAYOUTS[layout]
    for results in run_ranks(
        workers.load_and_continue, num_ranks, {**DECAY, "parallel": parallel}, folder, BEFORE, AFTER
    ):
        if layout == "tensor 2, pipeline 2":
            assert difference(results, expected) == 0  # the same layout resumes bit by bit
        else:
            assert difference(results, expected) < TOLERANCE


def test_moments_matter(saved: tuple[Path, list[StepResult]]) -> None:
    """The comparison can fail: without the moments the weights are the same and the second step is another."""
    folder, expected = saved
    (results,) = run_ranks(workers.load_and_continue, 1, DECAY, folder, BEFORE, AFTER, False)
    assert results[0].loss == pytest.approx(expected[0].loss, abs=TOLERANCE)
    assert difference(results, expected) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tensor 2, pipeline 2, data 2", "single"),
        ("pipeline 2, interleaved", "tensor 2, sequence"),
        ("single", "tensor 2, pipeline 2, data 2"),
    ],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_any_layout_to_any_other(source: str, target: str, tied: bool, tmp_path: Path) -> None:
    layouts: dict[str, tuple[int, dict[str, Any]]] = {**LAYOUTS, "single": (1, {})}
    folder, settings = _folder(tmp_path), {"model": {"tie_embeddings": tied, "family": "qwen3", "qk_norm": True}}
    num_ranks, parallel = layouts[source]
    expected = run_ranks(
        workers.save_and_continue, num_ranks, {**settings, "parallel": parallel}, folder, BEFORE, AFTER
    )[0]
    num_ranks, parallel = layouts[target]
    results = run_ranks(
        workers.load_and_continue, num_ranks, {**settings, "parallel": parallel}, folder, BEFORE, AFTER
    )[0]
    assert difference(results, expected) < TOLERANCE


@pytest.mark.parametrize("divisor", [1, 300])
def test_continues_with_another_padding(divisor: int, saved: tuple[Path, list[StepResult]]) -> None:
    """500 rows, padded to 512 when saved and to 500 or 600 when loaded into undefined memory."""
    folder, expected = saved
    settings = {**DECAY, "megatron": {"vocab_divisor": divisor}}
    (results,) = run_ranks(workers.continue_parent, 1, settings, folder, BEFORE, AFTER)
    assert difference(results, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, {"model": {"tie_embeddings": True}}),
        (2, {"precision": "bfloat16", "parallel": {"tensor": 2}, "megatron": {"vocab_divisor": 512}}),
    ],
    ids=["tied", "a rank of padding alone, bfloat16"],
)
def test_rows_of_padding_reach_no_loss_gradient_or_export(
    num_ranks: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever they hold: not in the run, nor in a child with another padding."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    parent.mkdir(), child.mkdir()
    outcomes = run_ranks(workers.with_garbage_in_padding, num_ranks, {**DECAY, **settings}, parent, child)
    for outcome in outcomes:
        assert outcome["zero"] == outcome["garbage"] and outcome["zero"][1] == 0
        assert outcome["parent"] and outcome["child"]


def test_bfloat16_keeps_its_fp32_main_parameters(tmp_path: Path) -> None:
    folder, settings = _folder(tmp_path), {"precision": "bfloat16"}
    (expected,) = run_ranks(workers.save_and_continue, 1, settings, folder, BEFORE, AFTER)
    (results,) = run_ranks(workers.load_and_continue, 1, settings, folder, BEFORE, AFTER)
    assert difference(results, expected) == 0


def test_settings_of_the_new_run_win(saved: tuple[Path, list[StepResult]]) -> None:
    """Moments are taken over; the decay and the betas that a checkpoint carries are not."""
    folder, _ = saved
    changed = run_ranks(workers.optimizer_settings, 1, {"optimizer": {"weight_decay": 0.3, "beta2": 0.9}}, folder)[0]
    assert changed["weight_decay"] == {0.0, 0.3}
    assert changed["betas"] == {(0.9, 0.9)}
    assert changed["step"] == {BEFORE}


@pytest.mark.parametrize("blocked", ["__0_0.distcp", "__3_0.distcp", ".metadata.tmp", "common.pt", "metadata.json"])
def test_full_disk_raises_on_every_rank(blocked: str, tmp_path: Path) -> None:
    """One file of one rank meets a full disk; all ranks hear of it, at once, and could go on training."""
    folder = _folder(tmp_path)
    (folder / blocked).symlink_to("/dev/full")
    num_ranks, parallel = LAYOUTS["tensor 2, pipeline 2"]
    for number, loss_before, loss_after in run_ranks(workers.fail_to_save, num_ranks, {"parallel": parallel}, folder):
        assert number == errno.ENOSPC
        assert loss_after == loss_before


def test_unwritable_folder_raises_on_every_rank(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "__1_0.distcp").mkdir()  # a folder where a file is wanted
    outcomes = run_ranks(workers.fail_to_save, 2, {"parallel": {"tensor": 2}}, folder)
    assert [number for number, _, _ in outcomes] == [errno.EISDIR] * 2


def test_refuses_another_model(saved: tuple[Path, list[StepResult]]) -> None:
    folder, _ = saved
    for message in run_ranks(
        workers.fail_to_load, 2, {"model": {"ffn_hidden_size": 192}, "parallel": {"tensor": 2}}, folder
    ):
        assert "ffn_hidden_size=160, expected 192" in message


def test_refuses_a_damaged_or_foreign_folder(saved: tuple[Path, list[StepResult]], tmp_path: Path) -> None:
    folder, _ = saved
    assert "not a readable checkpoint" in run_ranks(workers.fail_to_load, 1, {}, tmp_path)[0]
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (copy / file.name).write_bytes(content[: len(content) // 2] if re.match(r"__2_", file.name) else content)
    for message in run_ranks(workers.fail_to_load, 2, {"parallel": {"tensor": 2}}, copy):
        assert str(copy) in message
