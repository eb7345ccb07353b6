"""What is printed on a terminal and in a log file, with a clock that the test moves."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console as RichConsole

from rewarm.mixing.weight_log import WeightEntry
from rewarm.tracking.console import Console, duration, short, weights_line
from rewarm.tracking.metrics import EvaluationLine, MetricsLine, evaluation_line, metrics_line
from rewarm.train.hooks.mixture import MixtureHook


def line(step: int, counts: tuple[int, int] = (4, 6)) -> MetricsLine:
    return metrics_line(step=step, tokens=step * 64, domain_names=["english", "python"], loss_sums=[10.0, 30.0],
                        token_counts=counts, weights=[0.25, 0.75], learning_rate=3e-4, grad_norm=1.5,
                        tokens_per_second=12_345.0, sample_hash="ab")  # fmt: skip


def held_out(step: int, english: float, python: float) -> EvaluationLine:
    return evaluation_line(step=step, tokens=step * 64_000, domain_names=["english", "python"],
                           loss_sums=[english, python], token_counts=[1, 1], bytes_per_token=[None, None])  # fmt: skip


class Log:
    """A console that writes into a string, and its clock."""

    def __init__(self, total_steps: int, terminal: bool = False, **values: Any) -> None:
        self.file = io.StringIO()
        self.now = 0.0
        rich = RichConsole(file=self.file, force_terminal=terminal, width=120, _environ={"TERM": "xterm"})
        self.console = Console(["english", "python"], total_steps, console=rich, clock=lambda: self.now, **values)

    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def test_a_log_gets_plain_lines_now_and_then() -> None:
    log = Log(1000)
    for step in range(1, 1001):
        log.now = step * 0.1
        log.console.step(line(step))
    log.console.close()
    assert "\x1b" not in log.file.getvalue() and "\r" not in log.file.getvalue()
    assert len(log.lines()) == 11  # step 1, one every ten seconds of a hundred, step 1000
    first, last = log.lines()[0], log.lines()[-1]
    assert first == "step 1/1,000  loss 4.0000  lr 3.00e-04  12.3k tokens/s  left ?  english 2.5000  python 5.0000"
    assert "step 1,000/1,000" in last and "left 0:00" in last


def test_a_long_run_prints_a_line_a_minute() -> None:
    log = Log(10**6)
    for step in range(1, 14_401):
        log.now = step * 2.0
        log.console.step(line(step))
    late = [text for text in log.lines() if "step 13," in text or "step 14," in text]
    assert 1401 / 30 - 2 <= len(late) <= 1401 / 30 + 2


def test_time_left_is_the_mean_pace() -> None:
    log = Log(100)
    for step in (1, 51, 91):
        log.now = 60.0 * (step - 1)
        log.console.step(line(step))
    assert [text.split("left ")[1].split("  ")[0] for text in log.lines()] == ["?", "49:00", "9:00"]


def test_domains_without_tokens_are_left_out() -> None:
    log = Log(10)
    log.console.step(line(1, (0, 6)))
    assert "english" not in log.lines()[0] and "python 5.0000" in log.lines()[0]


def test_evaluations_are_rows_of_one_table_with_changes() -> None:
    log = Log(10)
    log.console.evaluation(held_out(0, 2.0, 5.0))
    log.console.evaluation(held_out(10, 2.25, 4.0))
    heading, names, first, second = log.lines()
    assert "nats per token" in heading
    assert names.split() == ["step", "tokens", "english", "python"]
    assert first.split() == ["0", "0", "2.0000", "5.0000"]
    assert second.split() == ["10", "640k", "2.2500", "(+0.2500)", "4.0000", "(-1.0000)"]
    assert len({len(text) for text in (names, first, second)}) == 1


def test_a_resumed_run_counts_changes_from_its_beginning() -> None:
    log = Log(10, first_evaluation=held_out(0, 2.0, 5.0))
    log.console.evaluation(held_out(10, 2.25, 4.0))
    assert "(+0.2500)" in log.lines()[-1]


def test_a_terminal_gets_a_live_line_that_is_taken_away() -> None:
    log = Log(10, terminal=True)
    log.console.step(line(1))
    log.console.message("checkpoint saved: [not markup]")
    log.console.step(line(2))
    log.console.close()
    text = log.file.getvalue()
    assert "step 1/10" in text and "english 2.5000" in text
    assert "checkpoint saved: [not markup]" in text
    assert text.rstrip().endswith("\x1b[2K") and "\x1b[?25h" in text  # cleared, cursor shown again


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (9.5, "9.5"), (950, "950"), (12_345, "12.3k"), (1.2e6, "1.2M"), (3e9, "3B")]
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3661, "1:01:01"), (90_000, "1 day 1:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_of_changed_weights_holds_the_weights() -> None:
    weights = {"english": 3 << 30, "python": 1 << 30}
    entry = WeightEntry(3200, weights, "step 100: velocitune")
    assert weights_line(entry) == "weights from sample 3200: english 0.7500, python 0.2500 (step 100: velocitune)"
    entry = WeightEntry(0, weights, "start: doremi", {"english": 1 << 31, "python": 1 << 31})
    assert "python 0.2500; in the loss english 0.5000, python 0.5000 (start: doremi)" in weights_line(entry)
    many = {f"domain{number}": number << 20 for number in range(1, 65)}
    text = weights_line(WeightEntry(8, many, "phase 0"))
    assert text.startswith("weights from sample 8: domain64 0.0156, domain63") and ", and 52 more (phase 0)" in text


def test_a_run_tells_of_changes_that_are_planned_and_of_those_that_an_evaluation_makes() -> None:
    told: list[str] = []
    planned = [WeightEntry(at, {"a": 1 << 31, "b": 1 << 31}, f"phase {at}") for at in (0, 16, 64)]
    new = WeightEntry(48, {"a": 1 << 30, "b": 3 << 30}, "step 4: odm")
    controller = SimpleNamespace(
        is_active=True, last_step=-1, mixer=SimpleNamespace(needs_gradients=False), load_state_dict=lambda state: None,
        state_dict=dict, commit=lambda change, log: change.entry,
    )  # fmt: skip
    run = SimpleNamespace(
        config=SimpleNamespace(
            total_steps=20, batch=SimpleNamespace(global_batch_size=8), steps=lambda text: 4,
            evaluation=SimpleNamespace(interval="4 steps"),
        ),
        stage=SimpleNamespace(planned=planned, controller=lambda: controller), step=4, stop_reason=None,
        engine=SimpleNamespace(is_main=False, broadcast=lambda value: SimpleNamespace(entry=new)),
        feed=SimpleNamespace(first_free_sample=48, schedule=lambda entry: None),
        tracker=SimpleNamespace(message=told.append),
    )  # fmt: skip
    hook = MixtureHook()
    hook.setup(cast("Any", run))
    hook.start(cast("Any", run))
    assert told == [weights_line(planned[2]), weights_line(new)]
