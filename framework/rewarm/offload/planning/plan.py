"""From settings, a profile and a job to a placement; and when to think again (numpy only)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewarm.config.offload import OffloadConfig
from rewarm.errors import UserError
from rewarm.offload.planning.placement import SIMPLER_IF_WITHIN, Scored, fits, named, place, score, subgroup_count
from rewarm.offload.planning.routes import Job, Machine, Placement, Route, memory
from rewarm.offload.planning.simulate import Timeline

_SYSTEMS = {
    "none": "resident",
    "cpu": "zero_offload",
    "streamed": "streamed",
    "twinflow": "twinflow",
    "deep_optimizer_states": "deep_optimizer_states",
    "nvme": "zero_infinity",
}


def choose(config: OffloadConfig, machine: Machine, job: Job) -> Placement:
    """The placement that a mode other than auto stands for; of the machine, only its memory is looked at.

    Args:
        config: ``mode`` and its settings.
        machine: this rank's share of the machine.
        job: this rank's share of the model.

    Raises:
        UserError: if it needs more memory than there is, saying which and what to change.
    """
    subgroups = subgroup_count(job, config.subgroup_size)
    options = {"slots": config.slots, "stride": config.stride}
    if config.resident_fraction is not None:
        options["resident"] = round(config.resident_fraction * subgroups)
    placement = named(machine, job, subgroups, _SYSTEMS[config.mode], **options)
    if config.mode == "streamed" and config.split_master and job.can_split:
        placement = replace(placement, split=True)
    if not fits(machine, job, placement):
        raise _too_large(config, machine, job, placement)
    return placement


def plan(config: OffloadConfig, machine: Machine, job: Job, beside: float = 0.0) -> Scored:
    """The placement that the settings ask for, with its prediction.

    Args:
        config: ``mode`` and its settings.
        machine: this rank's share of the measured machine.
        job: this rank's share of the model.
        beside: seconds of a step that the job does not count; what is gained is held against the whole step.

    Raises:
        UserError: if it needs more memory than there is, saying which and what to change.
    """
    if config.mode != "auto":
        return score(machine, job, choose(config, machine, job))
    subgroups = subgroup_count(job, config.subgroup_size)
    best = place(machine, job, subgroups, slots=config.slots, split=config.split_master)[0]
    for name in ("resident", "zero_offload"):
        simple = named(machine, job, subgroups, name)
        if fits(machine, job, simple):
            scored = score(machine, job, simple)
            if scored.seconds - best.seconds <= SIMPLER_IF_WITHIN * (beside + scored.seconds):
                return scored
    return best


def _too_large(config: OffloadConfig, machine: Machine, job: Job, placement: Placement) -> UserError:
    device, host, nvme = memory(placement, job)
    if any(route.on_nvme for route in placement.routes) and machine.nvme_read <= 0:
        return UserError(f"offload.mode={config.mode}: no NVMe path was profiled", fix="set offload.nvme_paths")
    for name, need, free, fix in (
        ("GPU memory", device, machine.device_free, _device_fix(config)),
        ("host memory", host, machine.host_free, "raise offload.host_memory, use mode=auto or nvme, or more ranks"),
        ("NVMe space", nvme, machine.nvme_free, "free space or name more paths in offload.nvme_paths"),
    ):
        if need > free:
            return UserError(
                f"offload.mode={config.mode} needs {_gigabytes(need)} of {name} per rank, {_gigabytes(free)} are free",
                fix=fix,
            )
    raise AssertionError("the placement fits")


def _device_fix(config: OffloadConfig) -> str:
    if config.mode == "none":
        return "set offload.mode=cpu, or use more ranks"
    return "lower offload.subgroup_size or slots, or use another mode"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 or size == 0 else f"{size / 1e9:.2g} GB"


@dataclass
class Drift:
    """Tells when prediction and measurement have parted for good."""

    predicted: float
    """Predicted seconds of the watched time."""
    limit: float = 0.10
    """Difference, as a share of the prediction, that counts."""
    patience: int = 20
    """Steps in a row that must differ."""
    _steps: int = 0

    def observe(self, measured: float) -> bool:
        """Record a step; True when it is time to measure and place again (then start a new one)."""
        away = abs(measured - self.predicted) > self.limit * self.predicted
        self._steps = self._steps + 1 if away else 0
        return self._steps >= self.patience


def update_seconds(timeline: Timeline) -> float:
    """From the release of the updates to the end of the last of them and its copies; what the engine computes beside
    them does not count."""
    released = timeline.end_of("barrier")
    rows = zip(timeline.tasks, timeline.end, strict=True)
    return max((end for task, end in rows if task.stream != "compute"), default=released) - released


def moved(before: Placement, after: Placement) -> list[tuple[int, Route, Route]]:
    """Subgroups whose route changes between two placements: what a replan migrates at a step boundary."""
    pairs = enumerate(zip(before.routes, after.routes, strict=True))
    return [(i, old, new) for i, (old, new) in pairs if old is not new]


_RATES = {"h2d": "h2d", "d2h": "d2h", "device": "device_rate", "nvme_read": "nvme_read", "nvme_write": "nvme_write"}
"""Shared resource of a task -> the machine's rate that it draws on."""


def calibrated(machine: Machine, job: Job, placement: Placement, timeline: Timeline) -> Machine:
    """A machine whose rates are those that one executed step saw; what the step did not use stays as it was.

    Args:
        machine, job: what the placement was made for.
        placement: what was executed.
        timeline: when each task ran.
    """
    work: dict[str, float] = {}
    spent: dict[str, float] = {}
    size = job.parameters / len(placement.routes)
    for task, start, end in zip(timeline.tasks, timeline.start, timeline.end, strict=True):
        if task.stream == "cpu":
            name, amount = "cpu_rate", size / placement.cpu_share
        else:
            name = next((key for key in _RATES if key in task.uses), "")
            amount = task.uses.get(name, 0.0)
        if name:
            work[name] = work.get(name, 0.0) + amount
            spent[name] = spent.get(name, 0.0) + end - start
    rates = {_RATES.get(name, name): work[name] / spent[name] for name in work if spent[name] > 0}
    found = replace(machine, **rates)
    return replace(found, duplex=min(found.h2d + found.d2h, machine.duplex))
