"""What the person in front of the run sees.

On a terminal: a live line with a bar. In a log file (SLURM, ``tee``): one plain line now and then, without control
characters. Evaluations are rows of one table that grows with the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL
from rewarm.tracking.metrics import EvaluationLine, MetricsLine

ROWS_PER_HEADER = 25
MOST_SHARES = 12
"""Domains whose weights a line shows."""


class Console:
    """Progress of one run.

    Args:
        domain_names: the domains that are evaluated, in order.
        total_steps: steps of the stage.
        first_evaluation: the evaluation that changes are counted from, where the run was resumed.
        console: where to print; None means standard output.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        domain_names: Sequence[str],
        total_steps: int,
        *,
        first_evaluation: EvaluationLine | None = None,
        console: RichConsole | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = list(domain_names)
        self._total_steps = total_steps
        self._first_evaluation = first_evaluation
        self._console = console or RichConsole()
        self._clock = clock
        self._live: Live | None = None
        self._progress = Progress(
            BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console, auto_refresh=False
        )
        self._task = self._progress.add_task("", total=total_steps)
        self._origin: tuple[float, int] | None = None
        self._printed: float | None = None
        self._rows = 0

    def step(self, line: MetricsLine) -> None:
        """Show a metrics line: always on a terminal, now and then in a log."""
        now = self._clock()
        self._origin = self._origin or (now, line["step"])
        head, losses = self._summary(line, now)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._progress.update(self._task, completed=line["step"], description=head)
            shown = Group(self._progress, Text("  " + losses, style="dim"))
            if self._live is None:
                self._live = Live(shown, console=self._console, refresh_per_second=4, transient=True)
                self._live.start(refresh=True)
            self._live.update(shown)
        elif self._is_due(now, line["step"]):
            self._printed = now
            self.message(f"{head}  {losses}")

    def evaluation(self, line: EvaluationLine) -> None:
        """Add a row to the table of held-out losses."""
        if self._rows % ROWS_PER_HEADER == 0:
            names = "".join(f"  {name:>{self._width(name)}}" for name in self._names)
            self.message(f"held-out loss in nats per token (change since the start)\n{'step':>8}  {'tokens':>7}{names}")
        self._rows += 1
        self._first_evaluation = self._first_evaluation or line
        cells = "".join(f"  {self._cell(line, name):>{self._width(name)}}" for name in self._names)
        self.message(f"{line['step']:>8}  {short(line['tokens']):>7}{cells}")

    def message(self, text: str) -> None:
        """Print above the live line; no markup, no wrapping of what others may copy."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the live line away; the terminal is as before."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_due(self, now: float, step: int) -> bool:
        """At the first and last step, and between them every 10 s at first and every minute in a long run."""
        if self._printed is None or step >= self._total_steps:
            return True
        assert self._origin is not None
        pause = min(60.0, max(10.0, (now - self._origin[0]) / 60))
        return now - self._printed >= pause

    def _summary(self, line: MetricsLine, now: float) -> tuple[str, str]:
        parts = [
            f"step {line['step']:,}/{self._total_steps:,}",
            f"loss {_loss(line['loss'])}",
            f"lr {line['learning_rate']:.2e}",
            f"{short(line['tokens_per_second'])} tokens/s",
            f"left {self._left(line['step'], now)}",
        ]
        losses = "  ".join(
            f"{name} {_loss(domain['loss'])}" for name, domain in line["domains"].items() if domain["tokens"]
        )
        return "  ".join(parts), losses

    def _left(self, step: int, now: float) -> str:
        """Time to the last step at the mean pace since the first line, evaluations and checkpoints included."""
        assert self._origin is not None
        began, first = self._origin
        if step >= self._total_steps:
            return "0:00"
        if step <= first:
            return "?"
        return duration((now - began) / (step - first) * (self._total_steps - step))

    def _width(self, name: str) -> int:
        return max(len(name), len("2.3456 (+0.1234)"))

    def _cell(self, line: EvaluationLine, name: str) -> str:
        loss = line["domains"][name]["loss"]
        assert self._first_evaluation is not None
        first = self._first_evaluation["domains"].get(name, {"loss": None})["loss"]
        if loss is None or first is None or line["step"] == self._first_evaluation["step"]:
            return _loss(loss)
        return f"{loss:.4f} ({loss - first:+.4f})"


def weights_line(entry: WeightEntry) -> str:
    """Weights that begin to hold, as a share of the samples, and of the loss where it stands for another mixture."""
    parts = [_shares(entry.weights)]
    if entry.objective is not None:
        parts.append(f"in the loss {_shares(entry.objective)}")
    return f"weights from sample {entry.sample}: {'; '.join(parts)} ({entry.reason})"


def _shares(weights: Mapping[str, int]) -> str:
    """The largest shares first where there are more than a line holds."""
    names = list(weights)
    if len(names) > MOST_SHARES:
        names = sorted(names, key=lambda name: -weights[name])[:MOST_SHARES]
    more = f", and {len(weights) - len(names)} more" if len(names) < len(weights) else ""
    return ", ".join(f"{name} {weights[name] / TOTAL:.4f}" for name in names) + more


def short(number: float) -> str:
    """A count in at most six characters: ``950``, ``12.3k``, ``1.20M``, ``3.00B``."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def duration(seconds: float) -> str:
    """``m:ss``, ``h:mm:ss`` or ``d days h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    clock = f"{hour}:{minute:02d}:{second:02d}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
