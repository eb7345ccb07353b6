"""Where the fp32 optimizer state rests and who updates it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from rewarm.config.paths import PathText
from rewarm.config.section import Section, ignored

if TYPE_CHECKING:
    from rewarm.config.run import RunConfig

_PLACED = ("auto", "cpu", "streamed", "twinflow", "deep_optimizer_states", "nvme")
_ONLY: dict[str, tuple[str, ...]] = {
    "subgroup_size": _PLACED,
    "slots": ("auto", "streamed", "deep_optimizer_states"),
    "stride": ("deep_optimizer_states",),
    "resident_fraction": ("twinflow",),
    "split_master": ("auto", "streamed"),
    "device_memory": ("auto", "twinflow"),
    "host_memory": _PLACED,
    "cpu_threads": _PLACED,
    "nvme_paths": ("auto", "nvme"),
    "profile": ("auto", "nvme"),
    "stand_in": _PLACED,
}


class OffloadConfig(Section):
    """Optimizer state outside GPU memory. Every mode gives the bits of the update without offload."""

    mode: Literal["auto", "none", "cpu", "streamed", "twinflow", "deep_optimizer_states", "nvme"] = "none"
    """auto: the fastest placement for this machine and model, or none or cpu where nothing else gains 3%. none: state
    stays on the GPU. cpu: state and update on the CPU (ZeRO-Offload). streamed: state in host memory, updated on the
    GPU. twinflow: a fixed part stays on the GPU, the rest on the CPU. deep_optimizer_states: every stride-th subgroup
    is streamed, the others are updated by the CPU. nvme: state on local drives."""
    subgroup_size: int = Field(50_000_000, ge=64)
    """Parameters per subgroup, the unit that moves. Each slot takes 12 bytes per parameter of it on the GPU
    (6 with 8-bit moments)."""
    slots: int = Field(3, ge=1)
    """Subgroups that may be on the GPU at once on their way through it."""
    stride: int = Field(2, ge=1)
    """deep_optimizer_states: one of this many subgroups is streamed."""
    resident_fraction: float | None = Field(None, ge=0, le=1)
    """twinflow: part of the state that stays on the GPU; null means as much as fits."""
    split_master: bool = True
    """With bfloat16 parameters and fp32 moments, move only the 16 bits of the fp32 master that the parameter does not
    hold: 10 bytes instead of 12 per parameter each way, without loss."""
    device_memory: float | None = Field(None, ge=0)
    """GB of GPU memory per rank for state and slots; null means what is free beside the model and its activations."""
    host_memory: float | None = Field(None, gt=0)
    """GB of host memory per rank for state; null means 80% of what is free, divided by the ranks of the node."""
    cpu_threads: int | None = Field(None, gt=0)
    """Threads per rank of the CPU's update; null means the cores a rank may use, less one."""
    nvme_paths: list[PathText] = Field(default_factory=list)
    """Folders on local drives, best one per drive; their bandwidths decide how much each takes."""
    profile: PathText | None = None
    """File of ``rewarm offload profile`` to place by; null means the one in the cache, measured if there is none."""
    stand_in: float | None = Field(None, gt=0)
    """Without a GPU: GB/s each way of a link that stands in for one; null means as fast as memory."""

    @model_validator(mode="after")
    def _check_ignored(self) -> OffloadConfig:
        for name, modes in _ONLY.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if self.mode not in modes and getattr(self, name) != default:
                other = "a mode other than none" if modes is _PLACED else " and ".join(modes)
                by = f"offload.mode={self.mode}, and belongs to {other}"
                raise ignored(f"offload.{name}", by)
        if self.resident_fraction is not None and self.device_memory is not None:
            raise ValueError("offload.resident_fraction and offload.device_memory both say what stays: set one")
        if self.mode == "nvme" and not self.nvme_paths:
            raise ValueError("offload.mode=nvme needs offload.nvme_paths, a list of folders on local drives")
        return self


def places_state(config: RunConfig) -> bool:
    """True if the optimizer's state is kept by the offload package, be it on the device, and not by torch."""
    return config.offload.mode != "none" or config.optimizer.eight_bit


def placed_by(config: RunConfig) -> str:
    """The setting because of which :func:`places_state` is true."""
    mode = config.offload.mode
    return f"optimizer.name={config.optimizer.name}" if mode == "none" else f"offload.mode={mode}"


def check_offload(config: RunConfig) -> None:
    """Refuse offload where the run has nothing that it could move, and a second one of the same state.

    Raises:
        ValueError: naming the setting and what to change.
    """
    mode, deepspeed = config.offload.mode, config.deepspeed
    if not config.offload.split_master and (config.precision != "bfloat16" or config.optimizer.eight_bit):
        by = placed_by(config) if config.optimizer.eight_bit else f"precision={config.precision}"
        raise ignored("offload.split_master", f"{by}, under which nothing is split", False)
    if not places_state(config):
        return
    if not config.optimizer.rule.can_be_offloaded:
        raise ValueError(
            f"offload.mode={mode} moves the state of AdamW, and not that of optimizer.name={config.optimizer.name}: "
            "set offload.mode=none or optimizer.name=adamw"
        )
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(deepspeed, name) != "none":
            other = "set one of them to none" if mode != "none" else f"use offload.mode instead of deepspeed.{name}"
            raise ValueError(
                f"{placed_by(config)} and deepspeed.{name}={getattr(deepspeed, name)} both move what the optimizer "
                f"works on: {other}"
            )
