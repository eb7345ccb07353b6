"""Files of lines: exact numbers, kills, and resumes that leave no line out and none twice."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarm.errors import UserError
from rewarm.tracking.metrics import JsonLines, Truncation, evaluation_line, metrics_line, read_lines


def line(step: int, **values: Any) -> Any:
    given: dict[str, Any] = {
        "step": step,
        "tokens": step * 64,
        "domain_names": ["english", "python"],
        "loss_sums": [10.0, 30.0],
        "token_counts": [4, 6],
        "weights": [0.25, 0.75],
        "learning_rate": 3e-4,
        "grad_norm": 1.5,
        "tokens_per_second": 1e4,
        "sample_hash": "ab",
    }
    return metrics_line(**{**given, **values})


def test_metrics_line_has_the_keys_of_the_contract_in_order() -> None:
    found = line(3)
    assert list(found) == ["step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "sample_hash",
                           "domains"]  # fmt: skip
    assert found["loss"] == 4.0
    assert found["domains"] == {
        "english": {"loss": 2.5, "tokens": 4, "weight": 0.25},
        "python": {"loss": 5.0, "tokens": 6, "weight": 0.75},
    }


def test_a_domain_without_tokens_has_no_loss() -> None:
    found = line(1, loss_sums=np.array([0.0, 12.0]), token_counts=np.array([0, 6]))
    assert found["domains"]["english"] == {"loss": None, "tokens": 0, "weight": 0.25}
    assert found["loss"] == 2.0


def test_evaluation_line_in_nats_and_bits() -> None:
    """Uniform over 256 bytes is 8 bits per byte, whatever the tokens are."""
    found = evaluation_line(
        step=0,
        tokens=0,
        domain_names=["bytes", "pairs", "unknown"],
        loss_sums=[math.log(256) * 10, 2 * math.log(256) * 10, 5.0],
        token_counts=[10, 10, 10],
        bytes_per_token=[1.0, 2.0, None],
    )
    assert list(found) == ["step", "tokens", "domains"]
    assert found["domains"]["bytes"]["bits_per_byte"] == pytest.approx(8.0)
    assert found["domains"]["pairs"]["bits_per_byte"] == pytest.approx(8.0)
    assert found["domains"]["unknown"] == {"loss": 0.5, "bits_per_byte": None}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    file = JsonLines(path)
    file.append({"step": 1, "loss": value})
    file.close()
    assert read_lines(path)[0]["loss"].hex() == value.hex()


def test_no_number_that_json_lacks(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append(line(1, grad_norm=math.inf, loss_sums=[math.nan, 1.0]))

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert found["grad_norm"] is None and found["loss"] is None
    assert found["domains"]["english"] == {"loss": None, "tokens": 4, "weight": 0.25}


@given(num_lines=st.integers(1, 12), data=st.data())
def test_kill_at_any_byte_and_resume_is_the_unbroken_file(
    tmp_path_factory: pytest.TempPathFactory, num_lines: int, data: st.DataObject
) -> None:
    """Cut the file anywhere at or after the checkpoint's last line, resume there, and write the rest again."""
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    unbroken = JsonLines(path)
    for step in range(1, num_lines + 1):
        unbroken.append(line(step, grad_norm=step / 7))
    unbroken.close()
    whole = path.read_bytes()
    checkpoint = data.draw(st.integers(0, num_lines))
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    path.write_bytes(whole[: data.draw(st.integers(ends[checkpoint], len(whole)))])

    resumed = JsonLines(path)
    assert resumed.truncate_after(checkpoint).kept == checkpoint
    for step in range(checkpoint + 1, num_lines + 1):
        resumed.append(line(step, grad_norm=step / 7))
    resumed.close()
    assert path.read_bytes() == whole
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_needs_no_change_is_not_touched(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.append({"step": step})
    before = os.stat(file.path)
    assert file.truncate_after(2) == Truncation(kept=2, dropped=0, damaged=0)
    assert os.stat(file.path).st_ino == before.st_ino


def test_damaged_lines_are_counted_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"loss": 3}\n[1]\n{"step": 2}\n{"step": 3}\n{"step": 4')
    assert [found.get("step") for found in read_lines(path)] == [1, None, 2, 3]
    file = JsonLines(path)
    assert file.truncate_after(2) == Truncation(kept=2, dropped=1, damaged=4)
    file.append({"step": 3, "again": True})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_another_key_orders_the_weight_log(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "mixture.jsonl", key="sample")
    for sample in (0, 64, 128):
        file.append({"sample": sample})
    file.truncate_after(64)
    assert [found["sample"] for found in read_lines(file.path)] == [0, 64]


def test_a_line_is_in_the_file_before_the_next_is_written(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    file.sync()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/metrics\.jsonl"):
        JsonLines(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named() -> None:
    with pytest.raises(UserError, match="No space left"):
        JsonLines("/dev/full").append({"step": 1})


def test_reading_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_lines(tmp_path / "metrics.jsonl")
