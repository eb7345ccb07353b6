"""The weight log survives crashes and is read back as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewarm.errors import UserError
from rewarm.mixing.weight_log import WeightLog
from rewarm.mixing.weights import TOTAL

HALF = {"a": TOTAL // 2, "b": TOTAL // 2}
ONE = {"a": TOTAL, "b": 0}


def test_entries_come_back(tmp_path: Path) -> None:
    log = WeightLog(tmp_path / "mixture.jsonl")
    assert log.entries() == [] and log.effective(10) is None
    log.append(0, HALF, "start")
    log.append(50, ONE, "velocitune at step 5")
    log.append(50, HALF, "again")
    read = WeightLog(tmp_path / "mixture.jsonl")
    assert read.entries() == log.entries()
    assert [(e.sample, e.reason) for e in read.entries()] == [(0, "start"), (50, "velocitune at step 5"), (50, "again")]
    at, before, after = read.at(50), read.effective(49), read.effective(50)
    assert at and before and after
    assert (at.reason, before.reason, after.reason) == ("again", "start", "again")
    assert read.at(51) is None
    assert (tmp_path / "mixture.jsonl").read_text().splitlines()[1] == (
        '{"sample": 50, "weights": {"a": 4294967296, "b": 0}, "reason": "velocitune at step 5"}'
    )


def test_a_line_torn_at_any_byte_is_cut_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "mixture.jsonl"
    log = WeightLog(path)
    log.append(0, HALF, "start")
    whole = path.stat().st_size
    log.append(50, ONE, "next")
    content = path.read_bytes()
    for length in range(whole, len(content)):
        path.write_bytes(content[:length])
        torn = WeightLog(path)
        assert [e.sample for e in torn.entries()] == [0]
        torn.append(70, ONE, "after the crash")
        assert [e.sample for e in WeightLog(path).entries()] == [0, 70]


@pytest.mark.parametrize(
    "line", ["nonsense", '{"sample": 3}', '{"sample": 1, "weights": {"a": 5}, "reason": ""}', "[]"]
)
def test_damage_elsewhere_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mixture.jsonl"
    log = WeightLog(path)
    log.append(0, HALF, "start")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"mixture\.jsonl:2"):
        WeightLog(path)


def test_a_planned_change_may_be_written_before_an_earlier_one(tmp_path: Path) -> None:
    log = WeightLog(tmp_path / "mixture.jsonl")
    log.append(0, HALF, "start")
    log.append(90, ONE, "planned")
    log.append(50, {"a": 1, "b": TOTAL - 1}, "decided later")
    reasons = [entry.reason for sample in (0, 49, 50, 89, 90) if (entry := log.effective(sample))]
    assert reasons == ["start", "start", "decided later", "decided later", "planned"]


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the weight log"):
        WeightLog(tmp_path / "missing" / "mixture.jsonl").append(0, HALF, "start")


def test_a_reader_leaves_a_live_log_alone(tmp_path: Path) -> None:
    path = tmp_path / "mixture.jsonl"
    writer = WeightLog(path)
    writer.append(0, HALF, "start")
    whole = path.read_bytes()
    for torn in (b'{"sam', b"{", b"\xff"):
        path.write_bytes(whole + torn)
        reader = WeightLog(path)
        assert [entry.sample for entry in reader.entries()] == [0] and reader.effective(5)
        assert path.read_bytes() == whole + torn
    path.write_bytes(whole)
    writer.append(50, ONE, "the writer was not disturbed")
    assert [entry.sample for entry in WeightLog(path).entries()] == [0, 50]
