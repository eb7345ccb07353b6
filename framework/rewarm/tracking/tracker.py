"""One place that every line of a run goes through on its way to files, console, wandb and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rewarm.config.training import TrackingConfig
from rewarm.tracking.metrics import EvaluationLine, JsonLines, MetricsLine, Truncation, read_lines
from rewarm.tracking.scalars import evaluation_scalars, metrics_scalars


def check_trackers(config: TrackingConfig) -> None:
    """Refuse a tracker that could not be made, before anything is written.

    Raises:
        UserError: if tensorboard is asked for and missing.
    """
    if config.tensorboard:
        from rewarm.tracking.tensorboard import load_writer

        load_writer()


class Tracker:
    """Fans a run's lines out; does nothing at all off the main rank.

    Making one brings the run's files to the checkpoint: lines above ``resumed_step`` are dropped, because their
    steps will be trained again.

    Args:
        run_folder: the run; made if missing.
        config: what is recorded.
        domain_names: the domains that are evaluated, in order.
        total_steps: steps of the stage.
        resumed_step: step of the checkpoint that the run continues from; None or 0 for a run that begins at
            step 0, whose files begin anew.
        config_dump: the resolved configuration, for wandb.
        is_main: True on the one rank that writes.

    Raises:
        UserError: if the files cannot be written, or tensorboard is asked for and missing.
    """

    def __init__(
        self,
        run_folder: Path,
        config: TrackingConfig,
        domain_names: Sequence[str],
        total_steps: int,
        resumed_step: int | None,
        config_dump: Mapping[str, Any],
        is_main: bool,
    ) -> None:
        self._is_main = is_main
        self._closed = False
        self._last_evaluation: EvaluationLine | None = None
        if not is_main:
            return
        from rewarm.tracking.console import Console
        from rewarm.tracking.tensorboard import TensorBoardWriter
        from rewarm.tracking.wandb import WandbWriter, resolve_mode

        last = resumed_step or -1
        self._metrics = JsonLines(run_folder / "metrics.jsonl")
        self._evaluation = JsonLines(run_folder / "evaluation.jsonl")
        cuts = [(file, file.truncate_after(last)) for file in (self._metrics, self._evaluation)]
        evaluations = read_lines(self._evaluation.path)
        first = cast(EvaluationLine, evaluations[0]) if evaluations else None
        self._last_evaluation = cast(EvaluationLine, evaluations[-1]) if evaluations else None
        self._console = Console(domain_names, total_steps, first_evaluation=first)
        for file, cut in cuts:
            self._tell_damage(file, cut, last)
        resumed = last > 0
        self._tensorboard = (
            TensorBoardWriter(run_folder / "tensorboard", last if resumed else None) if config.tensorboard else None
        )
        self._wandb = (
            WandbWriter(
                run_folder, config.wandb, config_dump, resumed, self._console.message, lambda: self._recorded(last)
            )
            if resolve_mode(config.wandb) != "disabled"
            else None
        )

    def step(self, line: MetricsLine) -> None:
        """Record a line of :func:`rewarm.tracking.metrics.metrics_line`."""
        if not self._is_main:
            return
        self._metrics.append(line)
        self._console.step(line)
        self._draw(line["step"], metrics_scalars(line))

    def evaluation(self, line: EvaluationLine) -> None:
        """Record a line of :func:`rewarm.tracking.metrics.evaluation_line`."""
        if not self._is_main:
            return
        self._evaluation.append(line)
        self._last_evaluation = line
        self._console.evaluation(line)
        self._draw(line["step"], evaluation_scalars(line))

    @property
    def last_evaluated_step(self) -> int | None:
        """Step of the newest evaluation line, those from before a resume included; None without one and off the
        main rank."""
        return None if self._last_evaluation is None else self._last_evaluation["step"]

    @property
    def last_losses(self) -> dict[str, float | None]:
        """Held-out loss of each domain at the newest evaluation, nats per token; None where it was not finite."""
        domains = {} if self._last_evaluation is None else self._last_evaluation["domains"]
        return {name: domain["loss"] for name, domain in domains.items()}

    def message(self, text: str) -> None:
        """Print a line for the user."""
        if self._is_main:
            self._console.message(text)

    def sync(self) -> None:
        """Wait until the files are on the disk; called before a checkpoint is published."""
        if self._is_main:
            self._metrics.sync()
            self._evaluation.sync()

    def close(self, exit_code: int = 0, *, hurried: bool = False) -> None:
        """Finish every record; 0 marks the run as done, hurried waits for no service longer than ten seconds.
        Closing twice is harmless."""
        if not self._is_main or self._closed:
            return
        self._closed = True
        self._console.close()
        if self._wandb is not None:
            self._wandb.close(exit_code, hurried=hurried)
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._metrics.close()
        self._evaluation.close()

    def _recorded(self, last: int) -> list[tuple[int, dict[str, float]]]:
        """Step and curves of every line up to a step in the run's files; a step's evaluation after its metrics."""
        steps = [cast(MetricsLine, line) for line in read_lines(self._metrics.path)]
        evaluations = [cast(EvaluationLine, line) for line in read_lines(self._evaluation.path)]
        curves = [(line["step"], metrics_scalars(line)) for line in steps]
        curves += [(line["step"], evaluation_scalars(line)) for line in evaluations]
        return sorted((curve for curve in curves if curve[0] <= last), key=lambda curve: curve[0])

    def _draw(self, step: int, scalars: dict[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.log(step, scalars)
        if self._tensorboard is not None:
            self._tensorboard.log(step, scalars)

    def _tell_damage(self, file: JsonLines, cut: Truncation, last: int) -> None:
        """A torn line after the checkpoint is ordinary; a damaged one before it left a hole."""
        if cut.damaged > 1 and last > 0:
            self._console.message(f"warning: {cut.damaged} unreadable lines were dropped from {file.path}")
