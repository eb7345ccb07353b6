"""The whole fan-out, files and TensorBoard read back, across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewarm.config.training import TrackingConfig
from rewarm.tracking.metrics import EvaluationLine, MetricsLine, evaluation_line, metrics_line, read_lines
from rewarm.tracking.tracker import Tracker

NAMES = ["english", "python"]


def line(step: int) -> MetricsLine:
    return metrics_line(step=step, tokens=step * 64, domain_names=NAMES, loss_sums=[10.0 / step, 0.0],
                        token_counts=[4, 0], weights=[1.0, 0.0], learning_rate=3e-4, grad_norm=1.5,
                        tokens_per_second=1.0, sample_hash="ab")  # fmt: skip


def held_out(step: int) -> EvaluationLine:
    return evaluation_line(step=step, tokens=step * 64, domain_names=NAMES, loss_sums=[3.0, 4.0],
                           token_counts=[1, 1], bytes_per_token=[4.0, None])  # fmt: skip


def tracker(folder: Path, resumed_step: int | None, is_main: bool = True, **values: Any) -> Tracker:
    config = TrackingConfig.model_validate({"wandb": {"mode": "disabled"}, **values})
    return Tracker(folder, config, NAMES, 6, resumed_step, {}, is_main)


def train(folder: Path, resumed_step: int | None, last: int, **values: Any) -> None:
    run = tracker(folder, resumed_step, **values)
    if not resumed_step:
        run.evaluation(held_out(0))
    for step in range((resumed_step or 0) + 1, last + 1):
        run.step(line(step))
        if step % 2 == 0:
            run.evaluation(held_out(step))
    run.sync()
    run.close(0)
    run.close(0)


@pytest.mark.parametrize(("broken_at", "checkpoint"), [(5, 4), (5, 2), (6, 4), (3, None), (1, 0)])
def test_a_broken_and_resumed_run_leaves_the_files_of_an_unbroken_one(
    tmp_path: Path, broken_at: int, checkpoint: int | None
) -> None:
    train(tmp_path / "whole", None, 6)
    train(tmp_path / "broken", None, broken_at)
    train(tmp_path / "broken", checkpoint, 6)
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [found["step"] for found in read_lines(tmp_path / "whole" / "evaluation.jsonl")] == [0, 2, 4, 6]


def test_the_last_evaluation_is_known_across_a_resume(tmp_path: Path) -> None:
    run = tracker(tmp_path, None)
    assert run.last_evaluated_step is None
    run.evaluation(held_out(0))
    assert run.last_evaluated_step == 0
    run.close(0)
    train(tmp_path, None, 5)
    assert [tracker(tmp_path, step).last_evaluated_step for step in (4, 3, 0)] == [4, 2, None]


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    run = tracker(tmp_path / "run", None, is_main=False, tensorboard=True)
    run.step(line(1))
    run.evaluation(held_out(0))
    run.message("x")
    run.sync()
    run.close(1)
    assert run.last_evaluated_step is None
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, None, 5, tensorboard=True)
    train(tmp_path, 3, 6, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("loss/english")}
    assert [event.step for event in events.Scalars("loss/english")] == [1, 2, 3, 4, 5, 6]
    assert points[4] == pytest.approx(10 / 4 / 4)
    assert "loss/python" not in events.Tags()["scalars"]  # it never had tokens
    assert [event.step for event in events.Scalars("held_out_loss/python")] == [0, 2, 4, 6]


def test_lines_lost_before_the_checkpoint_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, None, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'{"st\0\0\0').replace(b'{"step": 3', b"\0"))
    capsys.readouterr()
    tracker(tmp_path, 4).close(0)
    assert "2 unreadable lines" in capsys.readouterr().out.replace("\n", " ")
