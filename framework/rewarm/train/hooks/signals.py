"""Stopping on a signal: finish the step, save, exit cleanly."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from rewarm.config.registry import HOOKS
from rewarm.train.hooks.base import Hook

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM: a scheduler's or an operator's stop. SIGINT: the keyboard. SIGHUP: the terminal is gone. SIGUSR1 and
SIGUSR2: the usual warnings ahead of a limit."""


@HOOKS.register("signals")
class SignalHook(Hook):
    """Asks for a stop when any rank received a signal.

    It stands first, so that the others know of a stop: evaluation is then left to the resume, which finds it due, and
    the checkpoint is written at once.

    A second SIGINT ends the process at once, for those who do not want to wait for the step.
    """

    name = "signals"
    order = 0
    transient = ("_received", "_before")
    """A signal ends the invocation that received it, and no other."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def start(self, run: Run) -> None:
        """Listen."""
        # Under nohup a terminal that is gone changes nothing.
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        run.poll_stop = lambda: self._poll(run)

    def after_step(self, run: Run, record: StepRecord) -> None:
        """Let all ranks agree."""
        self._poll(run)

    def finish(self, run: Run) -> None:
        """Stop listening."""
        self.close(run)

    def close(self, run: Run) -> None:
        """Put the handlers back that were there before."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

    def _poll(self, run: Run) -> bool:
        if run.stop_reason is None and run.engine.any_rank(self._received is not None):
            run.stop_reason = next(name for name in run.engine.gather(self._received) if name is not None)
            run.tracker.message(f"{run.stop_reason} received: saving and stopping after step {run.step}")
        return run.stop_reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
