"""Batch, optimizer, schedule, parallel layout, and what happens beside the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rewarm.config.registry import OPTIMIZERS, SCHEDULES, SHAPES, check_chosen, chosen_settings
from rewarm.config.section import Duration, Section, ignored, parse_duration


class BatchConfig(Section):
    """Size of a step."""

    sequence_length: int = Field(256, gt=0)
    """Tokens the model sees at once; a window is one token longer."""
    global_batch_size: int = Field(32, gt=0)
    """Windows per step over all ranks; never changes with the rank count."""
    micro_batch_size: int = Field(4, gt=0)
    """Windows per forward pass on one rank; must divide global_batch_size / data-parallel ranks."""


class OptimizerBase(Section):
    """The update rule."""

    name: str = "adamw"
    """How parameters move by their gradients."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Term that keeps the division finite."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay; not applied to norms and biases."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 means no clipping."""

    @property
    def rule(self) -> Any:
        """The registered class, a subclass of :class:`rewarm.optimizers.base.UpdateRule`."""
        return OPTIMIZERS[self.name].target

    @property
    def settings(self) -> Section | None:
        """The rule's own section, with its defaults where it is not given; None if it has no settings."""
        return chosen_settings(OPTIMIZERS, self, "name")

    @property
    def eight_bit(self) -> bool:
        """True if the moments have one byte each."""
        return bool(self.rule.eight_bit)

    @property
    def has_moments(self) -> bool:
        """True if the state is more than the parameters."""
        return bool(self.rule.moments)

    @model_validator(mode="after")
    def _check_ignored(self) -> Self:
        for name in ("beta1", "beta2", "epsilon"):
            if name not in self.rule.uses and getattr(self, name) != type(self).model_fields[name].default:
                raise ignored(f"optimizer.{name}", f"optimizer.name={self.name}")
        check_chosen(OPTIMIZERS, self, "name")
        return self


if TYPE_CHECKING:
    OptimizerConfig = OptimizerBase
else:
    OptimizerConfig = OPTIMIZERS.section(OptimizerBase, "name")


OPTIONAL = frozenset({"minimum", "decay", "decay_shape", "plateau", "cooldown"})
"""The settings of a schedule that not every kind follows."""


class ScheduleBase(Section):
    """Learning rate as a pure function of the tokens trained in this stage."""

    kind: str = "cosine"
    """Shape after the warm-up."""
    peak: float = Field(3e-4, gt=0)
    """Highest learning rate."""
    minimum: float = Field(0.0, ge=0)
    """Learning rate at the end of the run: what the step after the last one would have."""
    start: Annotated[float, Field(ge=0)] | Literal["parent"] = 0.0
    """Learning rate that the warm-up rises from; its first step is already one step above it. parent: the rate of the
    parent's last step, as its lineage says it; the run's config.yaml then holds the number."""
    warmup: Duration = "1%"
    """Length of the linear warm-up from start to peak; its last step is at the peak."""
    decay: Duration = "20%"
    """Length of the final decay of wsd and infinite; "0 steps" leaves it out, for a stage that others continue."""
    decay_shape: str = "one_minus_sqrt"
    """Shape of the final decay of wsd and infinite; exponential needs a minimum above 0."""
    plateau: float | None = Field(None, gt=0)
    """Constant rate of infinite."""
    cooldown: Duration = "40%"
    """Length of infinite's cosine fall from peak to plateau."""

    @property
    def settings(self) -> Section | None:
        """The section of the chosen schedule, with its defaults where it is not given; None if it has none."""
        return chosen_settings(SCHEDULES, self, "kind")

    @model_validator(mode="after")
    def _check_ignored(self) -> Self:
        schedule = SCHEDULES[self.kind].target
        for name in sorted(OPTIONAL - set(schedule.uses)):
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ignored(f"schedule.{name}", f"schedule.kind={self.kind}")
        for name in ("minimum", "start", "plateau"):
            value = getattr(self, name)
            if isinstance(value, float) and value > self.peak:
                raise ValueError(f"schedule.{name}={value} is above schedule.peak={self.peak}")
        if self.start and parse_duration(self.warmup)[0] == 0:
            raise ignored("schedule.start", f"schedule.warmup={self.warmup}", self.start)
        check_chosen(SCHEDULES, self, "kind")
        schedule.check(self)
        return self

    @property
    def unread(self) -> list[str]:
        """Settings that no rate depends on, whatever they are. Given ones are refused, but older runs hold some."""
        found: list[str] = SCHEDULES[self.kind].target.unread(self)
        return found


if TYPE_CHECKING:
    ScheduleConfig = ScheduleBase
else:
    ScheduleConfig = SCHEDULES.section(ScheduleBase, "kind", {"decay_shape": SHAPES})


def without_unread(schedule: Any) -> Any:
    """A section as a run of an older version may have kept it, without the settings that are refused by now since no
    rate depends on them; anything else as it is."""
    try:
        unread = ScheduleConfig.model_construct(**schedule).unread
    except (TypeError, ValueError):
        return schedule
    return {name: value for name, value in schedule.items() if name not in unread}


class ParallelConfig(Section):
    """How the ranks share the work."""

    data: int | Literal["auto"] = "auto"
    """Data-parallel ranks; auto means what the other axes leave of the ranks found, or 1 when rewarm starts
    the ranks itself on a machine without GPUs."""
    tensor: int = Field(1, gt=0)
    """Ranks that split each layer's matrices."""
    sequence: bool = False
    """Split the activations between layers along the sequence over the tensor ranks; needs tensor > 1."""
    pipeline: int = Field(1, gt=0)
    """Ranks that split the layers."""
    virtual_pipeline: int = Field(1, gt=0)
    """Model chunks per pipeline rank (interleaved 1F1B); needs pipeline > 1."""
    context: int = Field(1, gt=0)
    """Ranks that split every sequence, for long ones (Ulysses attention); engine=deepspeed only."""

    @property
    def model_ranks(self) -> int:
        """Ranks that work on the same windows."""
        return self.tensor * self.pipeline * self.context

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.data != "auto" and self.data < 1:
            raise ValueError(f"parallel.data={self.data} must be at least 1, or auto")
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence=true is ignored with parallel.tensor=1: set tensor above 1 or sequence false"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} is ignored with parallel.pipeline=1: "
                "set pipeline above 1 or virtual_pipeline 1"
            )
        return self


class EvaluationConfig(Section):
    """Held-out loss of every domain, old and new."""

    interval: Duration | None = "100 steps"
    """Distance between evaluations; one at step 0 and one at the end are always made. Null means only those."""
    windows_per_domain: int = Field(64, gt=0)
    """Held-out windows per domain, the same ones every time; all of them when the split has fewer."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Windows per forward pass; null means batch.micro_batch_size, so that an evaluation needs no more memory than
    training. The losses do not depend on it, but for rounding."""


class CheckpointConfig(Section):
    """When the state of the run is saved."""

    interval: Duration | None = "200 steps"
    """Distance between checkpoints; the last step is always saved. Null means only the last."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep; older ones are removed after a newer one is whole."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: what ``WANDB_MODE`` says, else online when a key is configured, otherwise offline."""
    project: str = "rewarm"
    """Project the run is listed under."""
    entity: str | None = None
    """Team or user; null means the key's default."""
    group: str | None = None
    """Group the run is listed under; null means none."""

    @model_validator(mode="after")
    def _check_ignored(self) -> WandbConfig:
        for name in ("project", "entity", "group"):
            if self.mode == "disabled" and getattr(self, name) != type(self).model_fields[name].default:
                raise ignored(f"tracking.wandb.{name}", "tracking.wandb.mode=disabled", getattr(self, name))
        return self


class HooksConfig(Section):
    """What happens beside the steps, apart from what every stage does. A hook is on when its section is given, be it
    empty: ``hooks.my_hook={}``. Modules under extensions add their own."""


class TrackingConfig(Section):
    """What is recorded while the run trains."""

    interval: int = Field(1, gt=0)
    """Steps between metrics lines; per-domain sums cover all steps since the last line."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases settings."""
    tensorboard: bool = False
    """Also write TensorBoard event files to the run's folder ``tensorboard``; needs the tensorboard package."""


class DistributedConfig(Section):
    """The process group."""

    timeout: float = Field(30.0, gt=0, le=525_600)
    """Minutes until a collective that a lost rank never joins fails."""
    stop_timeout: float = Field(10.0, gt=0)
    """Minutes without anything written after which ranks that ``rewarm train`` started on this machine, and asked to
    save and stop, count as hanging and are killed. A second Ctrl-C or SIGTERM does not wait for that."""
    threads: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Threads each rank computes with on the CPU. auto: those of the checkpoint that a run resumes from on the same
    layout, as another number may round differently; else OMP_NUM_THREADS; else the cores that are free for a rank,
    or fewer where a micro-batch is too small for them."""


class MegatronConfig(Section):
    """Settings that only the megatron engine has."""

    attention: Literal["sdpa", "local", "transformer_engine"] = "sdpa"
    """sdpa: torch's scaled-dot-product kernels. local: Megatron's unfused attention (slower). transformer_engine:
    Transformer Engine's layers, which must be installed; tested with a stand-in of their layout, not on a GPU."""
    vocab_divisor: int = Field(128, gt=0)
    """The embedding is padded to a multiple of this times parallel.tensor; padded rows never leave in an export."""
    overlap_communication: bool = True
    """Reduce gradients and gather parameters while computing; on data-parallel ranks only."""
