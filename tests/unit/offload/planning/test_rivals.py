"""The benchmark against rivals: what it computes from times, and that it runs from end to end without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE

FOLDER = Path(__file__).parents[4] / "scripts" / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def result(seconds: dict[str, tuple[float, float]], losses: dict[str, list[float]] | None = None) -> Any:
    """Of contestants' seconds at 1 and 16 micro-batches, on a GPU with a link of 50 GB/s."""
    from rivals.report import Result
    from rivals.sizes import SHAPES
    from rivals.turns import Record

    options = Namespace(micro_batches=[1, 16], keep=False, rounds=2, steps=2, warm=1)
    records = []
    for name, both in seconds.items():
        for count, median in zip((1, 16), both, strict=True):
            record = Record(name, count, [median * 0.9, median, median * 1.3])
            record.losses = (losses or {}).get(name, [6.0, 5.0])
            records.append(record)
    return Result(
        options, SHAPES[0], 80e9, 40e9, records, machine={"h2d": 50e9, "d2h": 50e9, "duplex": 90e9, "dram": 4e11}
    )


def verdicts(found: Any) -> list[str]:
    from rivals.report import goals

    return [verdict for _, _, verdict in goals(found)[:2]]


def test_goals_are_held_against_the_fastest_rival() -> None:
    assert verdicts(result({"auto": (1.0, 4.0), "deepspeed-2": (3.0, 5.0), "deepspeed-3": (2.6, 4.1)})) == ["met"] * 2
    slower = result({"auto": (1.0, 4.0), "deepspeed-2": (3.0, 5.0), "deepspeed-3": (2.4, 4.1), "hybrid": (9.0, 3.9)})
    assert verdicts(slower) == ["not met"] * 2
    assert verdicts(result({"auto": (1.0, 4.0), "none": (0.5, 2.0)})) == ["not measured"] * 2


def test_who_fails_is_left_out_and_named() -> None:
    from rivals.report import markdown

    found = result({"streamed": (1.0, 4.0), "deepspeed-2": (3.0, 5.0), "twinflow": (0.1, 0.1)})
    for record in found.records:
        record.facts = {"gpu_bytes": 1e9, "host_bytes": 2e9, "resident_bytes": 3e9}
        if record.name == "twinflow":
            record.failed = "out of memory"
    assert found.judged() == "streamed" and verdicts(found) == ["met"] * 2
    assert "failed: out of memory" in markdown(found)


def test_the_use_of_the_link_counts_bytes_and_the_seconds_of_the_update() -> None:
    from rivals.contestant import traffic
    from rivals.report import use_of_machine

    from rewarm.offload.planning.routes import Placement, Route

    moved = traffic(Placement((Route.STREAMED, Route.CPU)))
    assert moved == {"h2d": (12 + 2) / 2, "d2h": (12 + 4) / 2, "dram": (24 + 4 + 24 + 2 + 6) / 2}
    found = result({"streamed": (1.0, 4.0)})
    record = found.records[0]
    # 7 and 8 bytes of 5 billion parameters in 0.8 s: 43.75 and 50 of 50 GB/s.
    record.facts = {"parameters": 5e9, "traffic": moved}
    record.update = [{"seconds": value, "h2d": 1.0, "d2h": 1.0, "dram": 1.0} for value in (0.8, 0.8, 2.0)]
    _, text, verdict = use_of_machine(found, "streamed", 1)
    assert verdict == "met" and "h2d 88%" in text and "d2h 100%" in text
    record.update = [record.update[0] | {"h2d": 0.5}]  # the other half was copied before the update's release
    assert "h2d 44%" in use_of_machine(found, "streamed", 1)[1]
    record.update = [record.update[0] | {"h2d": 1.0, "seconds": 1.0}]
    assert use_of_machine(found, "streamed", 1)[2] == "not met"


def test_only_what_ran_after_the_release_counts() -> None:
    from rivals.contestant import after_release

    from rewarm.offload.planning.simulate import Task, Timeline

    tasks = {"gradient": "d2h", "barrier": "compute", "fetch": "h2d", "update": "device", "flush": "d2h"}
    found = after_release(
        Timeline(
            tuple(Task(kind, stream, 0.0) for kind, stream in tasks.items()), (0, 1, 0.5, 1.5, 2), (1, 1, 1.5, 2, 4)
        )
    )
    assert found == pytest.approx({"seconds": 3, "h2d": 0.5, "d2h": 2 / 3, "dram": 3 / 4.5})


def test_other_losses_are_found_out() -> None:
    losses = {"auto": [6.0, 5.0], "none": [6.0, 5.0], "cpu": [6.0, 5.0001], "hybrid": [6.0, 5.9]}
    found = result(dict.fromkeys(losses, (1.0, 1.0)), losses)
    assert found.strangers() == ["hybrid at 1", "hybrid at 16"]
    assert found.equal_bits() == ["auto at 1", "auto at 16"]


def test_both_directions_at_once(tmp_path: Path) -> None:
    from rivals.overlap import of_profiler, shares

    assert shares([(0, 2), (1, 3)], [(2, 5)]) == pytest.approx(
        {"h2d_busy": 3, "d2h_busy": 3, "both_busy": 1, "either_busy": 5, "share_both": 0.2}
    )
    names = ("Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)", "Memcpy DtoD (Device -> Device)")
    events = [{"cat": "gpu_memcpy", "name": name, "ts": 1e6 * i, "dur": 2e6} for i, name in enumerate(names)]
    (tmp_path / "trace").write_text(json.dumps({"traceEvents": [*events, {"cat": "kernel", "name": "HtoD"}]}))
    found = of_profiler(tmp_path / "trace")
    assert found["both_busy"] == pytest.approx(1) and found["share_both"] == pytest.approx(1 / 3)
    assert found["pageable"] == 1


def test_the_model_does_not_fit_with_its_state() -> None:
    from rivals import sizes

    for gpu, host in ((80e9, 1000e9), (24e9, 64e9), (139e9, 128e9)):
        shape = sizes.choose(gpu, host)
        left = sizes.cap(shape, gpu)
        assert sizes.room_beside(shape) < left < sizes.room_beside(shape) + sizes.state(shape), shape
        assert left <= gpu and shape.parameters * sizes.HOST_BYTES < host


def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1] / "framework"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, str(FOLDER / "offload_rivals.py"), "--device", "cpu", "--rounds", "1", "--steps", "2",
        "--contestants", "none", "streamed", "hybrid", "--micro-batches", "2", "--subgroup", "100000",
        "--timeout", str(PATIENCE),
        "--output", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    none, streamed, hybrid = report["contestants"]
    assert len(none["seconds"]) == 1 and none["losses"] == streamed["losses"] and len(none["losses"]) == 4
    assert none["losses"][-1] < none["losses"][0] - 0.5, "it does not learn"
    assert none["facts"]["parameters"] == 533120
    assert streamed["facts"]["placement"].startswith("100% streamed") and len(streamed["update"]) == 2
    assert "CUDA device" in hybrid["failed"]
    assert report["overlap"]["h2d_busy"] > 0 and (tmp_path / "streamed.trace.json").exists()
    assert {goal["verdict"] for goal in report["goals"]} == {"not measured"}
    assert "| streamed | 0." in (tmp_path / "report.md").read_text()
