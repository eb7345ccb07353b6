"""What the report on Velocitune's arms says of the runs' files, whoever won."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ARMS = ("static", "dynamic batch loading", "static at mean weights", "velocitune")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``scripts/velocitune_arms.py`` as a module."""
    place = Path(__file__).parents[3] / "scripts" / "velocitune_arms.py"
    spec = importlib.util.spec_from_file_location("velocitune_arms", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["velocitune_arms"] = module
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, name: str, losses: tuple[float, float], history: list[tuple[int, float]]) -> None:
    """The files of a run of 8 steps on domains a and b: final losses, and (sample, weight of a)."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    evaluations = [{"domains": {n: {"loss": loss} for n, loss in zip("abx", row, strict=True)}}
                   for row in ((3.0, 4.0, 2.0), (*losses, 2.5))]  # fmt: skip
    log = [{"sample": at, "weights": {"a": int(w * 2**32), "b": int((1 - w) * 2**32)}} for at, w in history]
    for file, lines in (("evaluation", evaluations), ("mixture", log), ("metrics", [{"step": 8}])):
        (run / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def results(script: ModuleType, tmp_path: Path) -> dict[str, Any]:
    """Three seeds: Velocitune beats static always, dynamic batch loading never, and its mean weights twice."""
    ends = {"static": (2.0, 3.0), "dynamic batch loading": (1.0, 1.0), "static at mean weights": (1.5, 2.5)}
    for seed in (1, 2, 3):
        for arm, losses in ends.items():
            history = [(0, 0.5), (32, 0.75), (64, 0.25)] if "dynamic" in arm else [(0, 0.5)]
            write_run(tmp_path, script.run_name(arm, seed), losses, history)
        mine = (1.5 - 0.1 * (seed < 3), 2.5 + 0.05 * (seed == 3))
        write_run(tmp_path, f"velocitune-{seed}", mine, [(0, 0.5), (32, 0.75), (64, 0.75)])
    fits = {"targets": {"a": 1.0, "b": 2.0}, "laws": {}}
    found: dict[str, Any] = script.gather(script.Experiment(tmp_path, None), {"a": 100, "b": 300}, fits, [1, 2, 3])
    return found


def test_weights_are_averaged_over_samples_and_settling_is_counted_in_updates(results: dict[str, Any]) -> None:
    velocitune, loading = results["arms"]["velocitune"][0], results["arms"]["dynamic batch loading"][0]
    # 128 samples: 32 at 1/2, 32 at 3/4, 64 at 1/4 or 3/4.
    assert loading["mean_weights"] == pytest.approx({"a": 0.4375, "b": 0.5625})
    assert velocitune["mean_weights"] == pytest.approx({"a": 0.6875, "b": 0.3125})
    assert (velocitune["settled_at"], loading["settled_at"]) == (0.5, 1.0)
    assert results["steps"] == 8 and results["initial"] == {"a": 3.0, "b": 4.0, "x": 2.0}


def test_means_and_spreads(script: ModuleType, results: dict[str, Any]) -> None:
    columns = script.averages(results, "velocitune")
    assert columns["a"] == pytest.approx([1.4, 1.4, 1.5])
    assert columns["mean"] == pytest.approx([1.95, 1.95, 2.025])
    assert columns["by tokens"] == pytest.approx([2.225, 2.225, 2.2875])
    assert script.spread([1.4, 1.4, 1.5]) == "1.4333 ± 0.0577"


def test_the_report_says_also_what_was_not_confirmed(script: ModuleType, results: dict[str, Any]) -> None:
    text = script.report(results, "python scripts/velocitune_arms.py", "1 minute")
    assert "Mean: Velocitune below static: -0.5250 ± 0.0433 nats. **seen**." in text
    assert "below dynamic batch loading: +0.9750 ± 0.0433 nats. **not confirmed**: the opposite was seen." in text
    assert "below static at mean weights: -0.0250 ± 0.0433 nats. **not confirmed**: the seeds disagree." in text
    assert "lower in every seed: a, b; higher in every seed: none" in text
    assert "after 50% of the updates against 100%, to within 0.02 of where they end. **seen**." in text
    for arm in ARMS:
        assert f"| {arm} | " in text
    assert "ends below the target on no domain" in text
    assert script.verdict([1.0], [2.0], "A", "B").endswith("seen, in one seed, which decides nothing.")
    assert script.verdict([1.0, 1.0], [1.1, 9.0], "A", "B").endswith("but **no larger than its spread**.")
