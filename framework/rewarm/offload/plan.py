"""From settings, a profile and a job to a placement; and when to think again (numpy only)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewarm.config.offload import OffloadConfig
from rewarm.errors import UserError
from rewarm.offload.placement import Scored, fits, named, place, score, subgroup_count
from rewarm.offload.routes import Job, Machine, Placement, Route, memory

_SYSTEMS = {
    "none": "resident",
    "cpu": "zero_offload",
    "streamed": "streamed",
    "twinflow": "twinflow",
    "deep_optimizer_states": "deep_optimizer_states",
    "nvme": "zero_infinity",
}


def plan(config: OffloadConfig, machine: Machine, job: Job) -> Scored:
    """The placement that the settings ask for, with its prediction.

    Args:
        config: ``mode`` and its settings.
        machine: this rank's share of the measured machine.
        job: this rank's share of the model.

    Raises:
        UserError: if it needs more memory than there is, saying which and what to change.
    """
    subgroups = subgroup_count(job, config.subgroup_size)
    if config.mode == "auto":
        return place(machine, job, subgroups, slots=config.slots, split=config.split_master)[0]
    options = {"slots": config.slots, "stride": config.stride}
    if config.resident_fraction is not None:
        options["resident"] = round(config.resident_fraction * subgroups)
    placement = named(machine, job, subgroups, _SYSTEMS[config.mode], **options)
    if config.mode == "streamed" and config.split_master and job.param_bytes == 2:
        placement = replace(placement, split=True)
    if not fits(machine, job, placement):
        raise _too_large(config, machine, job, placement)
    return score(machine, job, placement)


def _too_large(config: OffloadConfig, machine: Machine, job: Job, placement: Placement) -> UserError:
    device, host, nvme = memory(placement, job)
    if any(route.on_nvme for route in placement.routes) and machine.nvme_read <= 0:
        return UserError("offload.mode=nvme: no NVMe path was profiled", fix="set offload.nvme_paths")
    for name, need, free, fix in (
        ("GPU memory", device, machine.device_free, "lower offload.subgroup_size or slots, or use another mode"),
        ("host memory", host, machine.host_free, "raise offload.host_memory, use mode=auto or nvme, or more ranks"),
        ("NVMe space", nvme, machine.nvme_free, "free space or name more paths in offload.nvme_paths"),
    ):
        if need > free:
            return UserError(
                f"offload.mode={config.mode} needs {need / 1e9:.2f} GB of {name} per rank, "
                f"{free / 1e9:.2f} GB are free",
                fix=fix,
            )
    raise AssertionError("the placement fits")


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


def moved(before: Placement, after: Placement) -> list[tuple[int, Route, Route]]:
    """Subgroups whose route changes between two placements: what a replan migrates at a step boundary."""
    pairs = enumerate(zip(before.routes, after.routes, strict=True))
    return [(i, old, new) for i, (old, new) in pairs if old is not new]
