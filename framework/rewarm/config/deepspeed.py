"""Settings of the deepspeed engine, and what each engine refuses rather than ignores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from rewarm.config.paths import PathText
from rewarm.config.section import Section, ignored

if TYPE_CHECKING:
    from rewarm.config.run import RunConfig

Device = Literal["none", "cpu", "nvme"]


class DeepSpeedConfig(Section):
    """Settings that only the deepspeed engine has."""

    zero_stage: int = Field(1, ge=0, le=3)
    """What the data-parallel ranks share instead of each holding all of it: 0 nothing, 1 the optimizer's state,
    2 also the gradients, 3 also the parameters."""
    offload_optimizer: Device = "none"
    """Where the optimizer's state lives and its update runs: none means the rank's device, cpu its memory, nvme
    files in nvme_path (stage 3 only)."""
    offload_parameters: Device = "none"
    """Where the parameters wait between their uses; stage 3 only."""
    offload_ratio: float = Field(1.0, gt=0, le=1)
    """Share of the optimizer's sub-groups that offload_optimizer=cpu moves; the rest is updated on the device
    (TwinFlow). Below 1 it needs stage 3, and a C++ compiler for DeepSpeed's CPU Adam."""
    nvme_path: PathText | None = None
    """Folder on a fast local disk for what is offloaded to nvme."""
    sub_group_size: int = Field(100_000_000, gt=0)
    """Stage 3: parameters that are updated, and moved to and from offload, at a time."""
    bucket_size: int = Field(200_000_000, gt=0)
    """Elements that are reduced or gathered in one message."""
    persistence_threshold: int = Field(100_000, ge=0)
    """Stage 3: parameters of fewer elements stay whole on every rank."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """transformers' attention implementation; auto leaves the choice to it."""
    trust_remote_code: bool = False
    """Run the Python files that the model's folder brings; without it such a model is refused. Only the command line
    can say so, every time: in a file it is refused, and what a run folder says of it counts for nothing. Those of a
    tokenizer are never run."""
    json_file: PathText | None = None
    """A DeepSpeed JSON file to merge in, for keys that no setting here stands for. A key that contradicts the
    generated configuration is an error."""
    extensions_folder: PathText | None = None
    """Where DeepSpeed's compiled extensions are kept; null means ~/.cache/rewarm/deepspeed."""
    build_timeout: float = Field(15.0, gt=0, le=525_600)
    """Minutes that compiling one extension may take."""

    @property
    def needs_cpu_adam(self) -> bool:
        """True if the update uses DeepSpeed's compiled CPU Adam instead of torch's."""
        return self.offload_ratio < 1

    @property
    def needs_async_io(self) -> bool:
        """True if something is offloaded to NVMe."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        stage = self.zero_stage
        if self.offload_optimizer == "cpu" and stage == 0:
            raise ValueError("deepspeed.offload_optimizer=cpu needs deepspeed.zero_stage of 1, 2 or 3, not 0")
        if self.offload_optimizer == "nvme" and stage != 3:
            raise ValueError(f"deepspeed.offload_optimizer=nvme needs deepspeed.zero_stage=3, not {stage}")
        if self.offload_parameters != "none" and stage != 3:
            raise ValueError(
                f"deepspeed.offload_parameters={self.offload_parameters} needs deepspeed.zero_stage=3, not {stage}"
            )
        if self.offload_ratio < 1 and (stage != 3 or self.offload_optimizer != "cpu"):
            raise ValueError(
                f"deepspeed.offload_ratio={self.offload_ratio} needs deepspeed.zero_stage=3 and "
                f"deepspeed.offload_optimizer=cpu, not {stage} and {self.offload_optimizer}"
            )
        if self.needs_async_io and self.nvme_path is None:
            raise ValueError("offload to nvme needs deepspeed.nvme_path, a folder on a fast local disk")
        if self.nvme_path is not None and not self.needs_async_io:
            why = f"deepspeed.offload_optimizer={self.offload_optimizer} and deepspeed.offload_parameters="
            raise ignored(
                "deepspeed.nvme_path", f"{why}{self.offload_parameters}, neither of them nvme", self.nvme_path
            )
        self._check_ignored()
        return self

    def _check_ignored(self) -> None:
        stage = self.zero_stage
        unused = dict.fromkeys(("sub_group_size", "persistence_threshold"), stage != 3) | {"bucket_size": stage == 0}
        for name, is_unused in unused.items():
            if is_unused and getattr(self, name) != type(self).model_fields[name].default:
                raise ignored(f"deepspeed.{name}", f"deepspeed.zero_stage={stage}", getattr(self, name))
        for name in ("extensions_folder", "build_timeout"):
            if getattr(self, name) != type(self).model_fields[name].default and not (
                self.needs_cpu_adam or self.needs_async_io
            ):
                why = "deepspeed.offload_ratio=1 without offload to nvme, which needs no compiled extension"
                raise ignored(f"deepspeed.{name}", why, getattr(self, name))


def check_engine(config: RunConfig) -> None:
    """Refuse what the chosen engine would ignore or get wrong.

    Raises:
        ValueError: naming the setting and what to change.
    """
    other = "deepspeed" if config.engine == "megatron" else "megatron"
    section = getattr(config, other)
    for name, field in type(section).model_fields.items():
        if getattr(section, name) != field.default:
            raise ignored(f"{other}.{name}", f"engine={config.engine}", getattr(section, name))
    if config.engine == "deepspeed":
        _check_deepspeed(config)
        _check_context(config)
    elif config.parallel.context > 1:
        raise ValueError(
            f"parallel.context={config.parallel.context} is not possible with engine=megatron, whose context "
            "parallelism needs an attention that is not used here; use engine=deepspeed for it"
        )


def _check_context(config: RunConfig) -> None:
    context, length = config.parallel.context, config.batch.sequence_length
    if context == 1:
        return
    if config.parallel.tensor > 1:
        raise ValueError(
            f"parallel.context={context} cannot be combined with parallel.tensor={config.parallel.tensor}: "
            "both divide the heads; set one of them to 1"
        )
    if config.deepspeed.attention not in ("auto", "sdpa"):
        raise ValueError(
            f"deepspeed.attention={config.deepspeed.attention} is not possible with parallel.context={context}, which "
            "splits torch's attention kernels; set it to sdpa"
        )
    if length % context:
        raise ValueError(f"batch.sequence_length={length} is not a multiple of parallel.context={context}")


def _check_deepspeed(config: RunConfig) -> None:
    parallel, settings = config.parallel, config.deepspeed
    if parallel.pipeline > 1:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} is not possible with engine=deepspeed, which runs the model as "
            "transformers wrote it; use parallel.tensor and deepspeed.zero_stage, or engine=megatron"
        )
    if parallel.sequence:
        raise ValueError("parallel.sequence=true is not possible with engine=deepspeed; use engine=megatron for it")
    if config.precision == "bfloat16" and settings.zero_stage == 0:
        raise ValueError(
            "precision=bfloat16 with deepspeed.zero_stage=0 drifts ten times further from fp32 than stage 1 does in "
            "DeepSpeed 0.19; set deepspeed.zero_stage to 1 or more"
        )
    if config.optimizer.name != "adamw" and (settings.needs_cpu_adam or settings.offload_optimizer == "nvme"):
        raise ValueError(
            f"optimizer.name={config.optimizer.name} cannot be used with deepspeed.offload_ratio below 1 or "
            "deepspeed.offload_optimizer=nvme, which move the state of Adam"
        )
