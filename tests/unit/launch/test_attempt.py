"""What a batch script does after its ranks ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewarm.launch.attempt import MAX_FRUITLESS, begin, end
from rewarm.launch.records import attempts
from rewarm.resilience.status import write_status

RUNNING = "JobState=RUNNING Reason=None"
COMPLETING = "JobState=COMPLETING Reason=None"
TIMED_OUT = "JobState=COMPLETING Reason=TimeLimit"


class Job:
    """A run folder and the job that trains it."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.restarts, self._environment = run, 0, monkeypatch
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")

    def begin(self) -> str:
        self._environment.setenv("SLURM_RESTART_COUNT", str(self.restarts))
        self.restarts += 1
        return begin(self.run, "001").action

    def checkpoint(self, step: int) -> None:
        (self.run / "checkpoints" / f"step-{step}").mkdir(parents=True)

    def report(self, kind: str, text: str, host: str = "node2") -> None:
        path = self.run / "slurm" / "001" / "errors" / "rank-1.json"
        path.write_text(json.dumps({"rank": 1, "time": 1.0, "text": text, "kind": kind, "host": host}))

    def srun(self, *lines: str) -> None:
        (self.run / "slurm" / "001" / "errors" / "srun").write_text("a rank's warning\n" + "\n".join(lines) + "\n")

    def end(self, status: int = 0, state: str = RUNNING, again: str = "requeue") -> tuple[str, str]:
        decision = end(self.run, "001", status, state, again)
        return decision.action, attempts(self.run)[-1].outcome


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def test_finished_is_done_and_the_rest_of_a_chain_has_nothing_to_do(job: Job) -> None:
    assert job.begin() == "run"
    write_status(job.run, "finished", 40, 40)
    assert job.end() == ("done", "finished")
    assert job.begin() == "done"


@pytest.mark.parametrize(("again", "action"), [("requeue", "requeue"), ("chain", "done"), ("no", "done")])
def test_the_warning_of_a_time_limit(job: Job, again: str, action: str) -> None:
    job.begin()
    job.checkpoint(9)
    write_status(job.run, "stopped", 9, 40, "SIGUSR2")
    assert job.end(again=again) == (action, "limit")


def test_a_limit_that_was_hit_while_saving_is_a_limit_too(job: Job) -> None:
    job.begin()
    assert job.end(143, TIMED_OUT)[0] == "requeue"


@pytest.mark.parametrize("again", ["requeue", "chain", "no"])
def test_preemption_is_requeued_whatever_a_limit_does(job: Job, again: str) -> None:
    job.begin()
    job.checkpoint(9)
    write_status(job.run, "stopped", 9, 40, "SIGTERM")
    assert job.end(again=again) == ("requeue", "stopped")


def test_what_was_cancelled_stays_cancelled(job: Job) -> None:
    job.begin()
    write_status(job.run, "stopped", 9, 40, "SIGTERM")
    assert job.end(0, COMPLETING) == ("leave", "stopped")


def test_a_status_of_an_earlier_attempt_says_nothing_of_this_one(job: Job) -> None:
    job.begin()
    write_status(job.run, "finished", 40, 40)
    job.restarts = 5
    job._environment.setenv("SLURM_RESTART_COUNT", "5")
    assert job.end()[1] != "finished"


def test_what_the_user_must_mend_is_not_tried_again(job: Job) -> None:
    job.begin()
    job.report("user", "rewarm: no such file")
    assert job.end(2) == ("give_up", "refused")


def test_an_unfit_node_is_excluded(job: Job) -> None:
    job.begin()
    job.report("node", "rewarm: node node2: no GPU")
    decision = end(job.run, "001", 3, RUNNING, "no")
    assert (decision.action, decision.exclude) == ("requeue", ("node2",))
    assert "without node2" in decision.message


def test_crashes_are_retried_while_checkpoints_advance(job: Job) -> None:
    for step in (10, 20, 30, 40, 50):
        job.begin()
        job.checkpoint(step)
        assert job.end(137) == ("requeue", "crashed")
    for _ in range(MAX_FRUITLESS - 1):
        job.begin()
        assert job.end(137) == ("requeue", "crashed")
    job.begin()
    assert job.end(137) == ("give_up", "crashed")


def test_attempts_that_were_lost_with_their_node_count(job: Job) -> None:
    for _ in range(MAX_FRUITLESS):
        assert job.begin() == "run"
    assert job.begin() == "give_up"


def test_preemptions_never_exhaust_the_attempts(job: Job) -> None:
    for _ in range(3 * MAX_FRUITLESS):
        assert job.begin() == "run"
        job.srun("srun: error: node[1-2]: tasks 0-1: Terminated")
        assert job.end(143) == ("requeue", "stopped")


def test_a_limit_too_short_for_a_checkpoint_is_given_up(job: Job) -> None:
    for _ in range(MAX_FRUITLESS - 1):
        job.begin()
        job.srun("srun: error: node1: task 0: User defined signal 2")
        assert job.end(140) == ("requeue", "limit")
    job.begin()
    job.srun("srun: error: node1: task 0: User defined signal 2")
    assert job.end(140) == ("give_up", "limit")


def test_ranks_that_srun_ended_after_a_crash_do_not_hide_it(job: Job) -> None:
    """As srun 22.05 prints it, with an exit status of 143, when the first rank is killed."""
    job.begin()
    job.srun(
        "srun: error: node1: task 0: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=26.0",
        "srun: error: node2: task 1: Terminated",
    )
    assert job.end(143) == ("requeue", "crashed")
    assert attempts(job.run)[-1].reason == "the first rank to fail was on node1: Killed"
