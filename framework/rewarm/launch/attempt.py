"""What a batch script asks before and after the ranks ran: may this attempt begin, and what comes next? No torch.

The script (``job.sh`` beside this module) does what SLURM's commands can do; the judgement is here, in a container too
if the job runs in one. Answers are shell assignments on standard output, messages for people go to standard error.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.engine.environment import slurm_port
from rewarm.errors import UserError
from rewarm.files import parse_json
from rewarm.launch.records import ERRORS, STOP, Attempt, attempts, newest_step, read_jobs, record, write_jobs
from rewarm.resilience.status import read_status, this_attempt

MAX_FRUITLESS = 3
"""Attempts in a row that may end without a newer checkpoint before the job gives up."""
_SIGNALS = {
    "Terminated": "SIGTERM", "Interrupt": "SIGINT", "Hangup": "SIGHUP",
    "User defined signal 1": "SIGUSR1", "User defined signal 2": "SIGUSR2",
}  # fmt: skip
"""Endings, in srun's words, that SLURM asked for."""
_WARNINGS = ("SIGUSR1", "SIGUSR2")
"""Sent ahead of a time limit: SIGUSR2 by our batch scripts, SIGUSR1 by many others."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended."""

    outcome: str
    """As in :class:`~rewarm.launch.records.Attempt`."""
    reason: str
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What the batch script does next."""

    action: str
    """done: end with ``status``. requeue: ask SLURM to. leave: SLURM has already decided. give_up: end with ``status``
    and take the rest of the chain out of the queue."""
    message: str
    status: int = 0
    exclude: tuple[str, ...] = ()
    """Nodes that the next attempt should avoid."""


def begin(run: Path, submission: str) -> Decision:
    """Record the start of an attempt, unless there is no point in it.

    Args:
        run: the run folder.
        submission: name of the submission's folder.
    """
    status = read_status(run)
    if status is not None and status.state == "finished" and _continues(run, submission):
        return Decision("done", f"{run.name} is finished: nothing left to do")
    if (run / "slurm" / submission / STOP).exists():
        return Decision("done", f"{run.name} was stopped by rewarm cancel")
    fruitless = count_fruitless([a for a in attempts(run) if a.submission == submission], newest_step(run))
    if fruitless >= MAX_FRUITLESS:
        return Decision("give_up", _hopeless(run, fruitless), status=1)
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    errors = _errors_folder(run, submission)
    errors.mkdir(parents=True, exist_ok=True)
    _remember_job(errors.parent)
    for old in errors.iterdir():
        old.unlink()
    step = newest_step(run)
    record(run, {"event": "begin", "submission": submission, "attempt": this_attempt(), "nodes": nodes, "step": step})
    return Decision("run", f"attempt {this_attempt()} on {nodes}, from step {step}")


def end(run: Path, submission: str, exit_status: int, job_state: str, again: str) -> Decision:
    """Record the end of an attempt and decide what follows.

    Args:
        run: the run folder.
        submission: name of the submission's folder.
        exit_status: of srun.
        job_state: ``JobState`` and ``Reason`` of the job, as SLURM now gives them.
        again: ``requeue`` or ``chain`` for runs that continue after a time limit, ``no`` for those that end there.
    """
    ending = judge(run, submission, exit_status)
    step = newest_step(run)
    record(run, {"event": "end", "submission": submission, "attempt": this_attempt(), "step": step,
                 "outcome": ending.outcome, "reason": ending.reason, "bad_nodes": list(ending.bad_nodes)})  # fmt: skip
    past = [attempt for attempt in attempts(run) if attempt.submission == submission]
    if (run / "slurm" / submission / STOP).exists():
        return Decision("give_up", f"stopped after step {step} by rewarm cancel")
    return decide(run, ending, past, step, job_state, again)


def judge(run: Path, submission: str, exit_status: int) -> Ending:
    """Read the exit status, the status file and the ranks' last words."""
    reports = [report for path in _errors_folder(run, submission).glob("rank-*.json") if (report := _report(path))]
    first = min(reports, key=lambda report: report["time"]) if reports else None
    status = read_status(run)
    if exit_status == 0 and status is not None and status.attempt == this_attempt() and status.state != "running":
        return Ending("limit" if status.reason in _WARNINGS else status.state, status.reason or status.state)
    if first is not None:
        outcome = {"user": "refused", "node": "node"}.get(first["kind"], "crashed")
        bad = tuple(sorted({report["host"] for report in reports if report["kind"] == "node"}))
        return Ending(outcome, first["text"], bad)
    failure = first_failure(_errors_folder(run, submission) / "srun")
    if failure is None:
        return Ending("crashed", f"srun ended with status {exit_status} and no rank said why")
    node, how = failure
    if how in _SIGNALS:
        # Before training began nobody listens yet: the ranks just end, and there is nothing to save.
        return Ending("limit" if _SIGNALS[how] in _WARNINGS else "stopped", _SIGNALS[how])
    return Ending("crashed", f"the first rank to fail was on {node}: {how}")


def _report(path: Path) -> dict[str, Any] | None:
    """A rank's last words; None where the file is damaged, as on a disk that was full."""
    try:
        report = parse_json(path.read_bytes())
        texts = {key: str(report[key]) for key in ("kind", "text", "host")}
        return {**texts, "time": float(report["time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def first_failure(messages: Path) -> tuple[str, str] | None:
    """Node and manner of the first task that ended badly, from what srun printed.

    The exit status will not do: srun ends the other tasks with SIGTERM, and may report that.
    """
    try:
        text = messages.read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"(?m)^srun: error: (\S+): tasks? \S+: (.+?)( \(core dumped\))?$", text)
    return None if match is None else (match.group(1), match.group(2))


def decide(run: Path, ending: Ending, past: list[Attempt], step: int, job_state: str, again: str) -> Decision:
    """What follows an ending.

    Args:
        run: the run folder.
        ending: of the attempt that ``past`` ends with.
        past: the attempts of this submission.
        step: of the newest checkpoint.
        job_state: ``JobState`` and ``Reason``.
        again: as for :func:`end`.
    """
    if ending.outcome in ("finished", "paused"):
        return Decision("give_up" if ending.outcome == "paused" else "done", f"{ending.outcome} at step {step}")
    if ending.outcome == "refused":
        return Decision("give_up", f"{ending.reason}\nnot queued again: the next attempt would end the same way", 2)
    if "COMPLETING" in job_state and "TimeLimit" not in job_state:
        return Decision("leave", f"ended at step {step}: the job was cancelled or requeued from outside")
    limit = ending.outcome == "limit" or "TimeLimit" in job_state
    if limit and again == "no":
        return Decision("done", f"stopped at step {step}, ahead of the time limit; submit again to go on")
    if limit and again == "chain":
        return Decision("done", f"stopped at step {step}, ahead of the time limit; the next job of the chain goes on")
    fruitless = count_fruitless(past, step)
    if fruitless >= MAX_FRUITLESS:
        return Decision("give_up", f"{ending.reason}\n{_hopeless(run, fruitless)}", status=1)
    exclude = sorted({node for attempt in past for node in attempt.bad_nodes})
    message = f"{ending.reason}\nrequeued; goes on from step {step}"
    return Decision("requeue", message + (f", without {', '.join(exclude)}" if exclude else ""), 0, tuple(exclude))


def count_fruitless(past: list[Attempt], step: int) -> int:
    """Attempts at the end of ``past`` that started from the checkpoint of ``step`` and left no newer one.

    Those that a signal ended are not counted, as a busy cluster may preempt a job any number of times, except by a
    time limit: one that is too short for a single checkpoint stays so.
    """
    count = 0
    for attempt in reversed(past):
        if attempt.first_step != step:
            break
        count += attempt.outcome not in ("stopped", "finished", "paused")
    return count


def _hopeless(run: Path, fruitless: int) -> str:
    return f"giving up: {fruitless} attempts in a row left no newer checkpoint; see rewarm logs {run}"


def _continues(run: Path, submission: str) -> bool:
    """Whether a job of this submission came before: a new submission of a finished run still reports its end."""
    return any(attempt.submission == submission for attempt in attempts(run))


def _remember_job(folder: Path) -> None:
    """A script that was queued by hand is one of the run's jobs too."""
    job, known = os.environ["SLURM_JOB_ID"], read_jobs(folder)
    if job not in known:
        write_jobs(folder, [*known, job])


def _errors_folder(run: Path, submission: str) -> Path:
    return run / "slurm" / submission / ERRORS


def free_port(wanted: int) -> int:
    """A port that nobody listens on here, the wanted one if possible."""
    for port in (wanted + 101 * turn for turn in range(50)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    return wanted


def locate(config: str, *overrides: str) -> dict[str, str]:
    """What ``job.sh`` needs for a batch script that a person wrote: the run folder, and a name for the job in it."""
    from rewarm.config.load import load

    folder = load(config, overrides).folder.resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return {"run": str(folder), "submission": f"job-{os.environ['SLURM_JOB_ID']}"}


def _answer(values: dict[str, str]) -> None:
    for name, value in values.items():
        print(f"{name}={shlex.quote(value)}")


def main() -> None:
    """``python -m rewarm.launch.attempt locate CONFIG [a.b.c=value ...]``, or ``begin`` and ``end`` with the options
    that ``job.sh`` gives them."""
    if sys.argv[1:2] == ["locate"]:
        try:
            _answer(locate(*sys.argv[2:]))
        except UserError as error:
            sys.exit(f"rewarm: {error}")
        return
    _begin_or_end(sys.argv[1:])


def _begin_or_end(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="rewarm.launch.attempt")
    parser.add_argument("event", choices=["begin", "end"])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--submission", required=True)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--job-state", default="")
    parser.add_argument("--again", choices=["no", "requeue", "chain"], default="no")
    given = parser.parse_args(arguments)
    answers: dict[str, str] = {}
    if given.event == "begin":
        decision = begin(given.run, given.submission)
        answers["REWARM_ERROR_FOLDER"] = str(_errors_folder(given.run, given.submission))
        # The ranks meet on the first node, where this runs too.
        answers["MASTER_PORT"] = str(free_port(slurm_port()))
    else:
        decision = end(given.run, given.submission, given.status, given.job_state, given.again)
        queued = read_jobs(given.run / "slurm" / given.submission)
        answers["rest"] = " ".join(job for job in queued if job != os.environ.get("SLURM_JOB_ID"))
    print(f"rewarm: {decision.message}", file=sys.stderr)
    answers |= {"next": decision.action, "status": str(decision.status), "exclude": ",".join(decision.exclude)}
    _answer(answers)


if __name__ == "__main__":
    main()
