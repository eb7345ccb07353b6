"""Where the fp32 optimizer state rests and who updates it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rewarm.config.section import Section

_NVME_MODES = ("auto", "nvme")
_ONLY: dict[str, tuple[str, ...]] = {
    "stride": ("deep_optimizer_states",),
    "resident_fraction": ("twinflow",),
    "split_master": ("auto", "streamed"),
    "nvme_paths": _NVME_MODES,
}


class OffloadConfig(Section):
    """Optimizer state outside GPU memory. Every mode gives the bits of the update without offload."""

    mode: Literal["auto", "none", "cpu", "streamed", "twinflow", "deep_optimizer_states", "nvme"] = "none"
    """auto: the fastest placement for this machine and model, or none or cpu where nothing else gains 3%. none: state
    stays on the GPU. cpu: state and update on the CPU (ZeRO-Offload). streamed: state in host memory, updated on the
    GPU. twinflow: a fixed part stays on the GPU, the rest on the CPU. deep_optimizer_states: every stride-th subgroup
    is streamed, the others are updated by the CPU. nvme: state on local drives."""
    subgroup_size: int = Field(50_000_000, ge=1_000_000)
    """Parameters per subgroup, the unit that moves. Each slot takes 12 bytes per parameter of it on the GPU."""
    slots: int = Field(3, ge=1)
    """Subgroups that may be on the GPU at once on their way through it."""
    stride: int = Field(2, ge=1)
    """deep_optimizer_states: one of this many subgroups is streamed."""
    resident_fraction: float | None = Field(None, ge=0, le=1)
    """twinflow: part of the state that stays on the GPU; null means as much as fits."""
    split_master: bool = True
    """With bfloat16 parameters, move only the 16 bits of the fp32 master that the parameter does not hold: 10 bytes
    instead of 12 per parameter each way, without loss."""
    host_memory: float | None = Field(None, gt=0)
    """GB of host memory per rank for state; null means 80% of what is free, divided by the ranks of the node."""
    cpu_threads: int | None = Field(None, gt=0)
    """Threads per rank of the CPU's update; null means the node's cores divided by its ranks, less one."""
    nvme_paths: list[str] = Field(default_factory=list)
    """Folders on local drives, best one per drive; their bandwidths decide how much each takes."""

    @model_validator(mode="after")
    def _check_ignored(self) -> OffloadConfig:
        for name, modes in _ONLY.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if name in self.model_fields_set and self.mode not in modes and getattr(self, name) != default:
                raise ValueError(
                    f"offload.{name} is ignored by offload.mode={self.mode}: it belongs to {' and '.join(modes)}"
                )
        if self.mode == "nvme" and not self.nvme_paths:
            raise ValueError("offload.mode=nvme needs offload.nvme_paths, a list of folders on local drives")
        return self
