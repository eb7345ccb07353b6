"""The whole configuration of a stage, and the checks that span sections."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, assert_never

from pydantic import Field, create_model, field_validator, model_validator

from rewarm.config.data import DomainConfig
from rewarm.config.deepspeed import DeepSpeedConfig, check_engine
from rewarm.config.extensions import digest_of
from rewarm.config.mixture import MixtureConfig, ReplayConfig
from rewarm.config.model import ModelConfig
from rewarm.config.offload import OffloadConfig, check_offload
from rewarm.config.paths import PathText
from rewarm.config.registry import FAMILIES, HOOKS, MIXERS, OPTIMIZERS, SCHEDULES, Registry
from rewarm.config.section import MOST_TOKENS, Duration, Section, parse_duration, resolve_duration
from rewarm.config.training import (
    BatchConfig,
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    HooksConfig,
    MegatronConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrackingConfig,
)


class RunConfig(Section):
    """One stage of training: one YAML file, one run folder."""

    extensions: dict[str, str] = Field(default_factory=dict)
    """Modules with methods of your own, as a list of names. The resolved configuration keeps the digest of each file,
    and a resume refuses another one."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run and of its folder."""
    runs_folder: PathText = "runs"
    """Where run folders are made, relative to the working directory."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of the weights, of the data order and of dropout."""
    engine: Literal["megatron", "deepspeed"] = "megatron"
    """What turns a batch into an optimizer step. megatron: Megatron-Core, for the families that ``model`` can name.
    deepspeed: DeepSpeed ZeRO around any causal language model of transformers."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and activations; the optimizer always keeps fp32 parameters."""
    tokenizer: PathText | None = None
    """Folder of a Hugging Face tokenizer; null means the parent's, or the one the domains were built with."""
    parent: PathText | None = None
    """What the stage continues: a run folder, one of its checkpoints, or a Hugging Face folder. Null means random
    weights of the shape in ``model``. A run that already has checkpoints of its own resumes from those instead."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Optimizer moments at the start of the stage; keep needs a parent that is a run, and whose update rule
    has moments if this one has."""
    model: ModelConfig | None = None
    """Shape of a model without parent; refused with a parent, which brings its own."""
    data: dict[str, DomainConfig]
    """The domains of this stage, by name; at least one to train."""
    mixture: MixtureConfig = MixtureConfig()
    """How the domains share the batch."""
    replay: ReplayConfig = ReplayConfig()
    """How much of the lineage is fed back."""
    duration: Duration = "1000 steps"
    """Length of the stage, in steps or tokens; percentages in the schedule are taken of this."""
    stop_at: Duration | None = None
    """Stop, save and exit at this point of the stage, leaving the schedule as it is; the same command without it
    goes on. Null means the end."""
    batch: BatchConfig = BatchConfig()
    """Size of a step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate."""
    offload: OffloadConfig = OffloadConfig()
    """Where the optimizer's state rests and who updates it."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share the work."""
    activation_recomputation: Literal["none", "full"] = "none"
    """full: keep only each layer's input and compute the rest again in the backward pass."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out losses."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    hooks: HooksConfig = HooksConfig()
    """Methods beside the steps."""
    tracking: TrackingConfig = TrackingConfig()
    """Recording."""
    distributed: DistributedConfig = DistributedConfig()
    """The process group."""
    megatron: MegatronConfig = MegatronConfig()
    """Settings of the megatron engine."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of the deepspeed engine."""

    @field_validator("extensions", mode="before")
    @classmethod
    def _digests(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in names):
            return value
        found = {name: digest_of(name) for name in names}
        for name, digest in value.items() if isinstance(value, dict) else []:
            if digest != found[name]:
                raise ValueError(f"the file of {name} changed: its digest was {digest}, and is {found[name]}")
        return found

    @field_validator("data", mode="before")
    @classmethod
    def _paths_are_domains(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"path": domain} if isinstance(domain, str) else domain for name, domain in value.items()}

    @field_validator("data")
    @classmethod
    def _names_are_plain(cls, value: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        for name in value:
            if not name or not all(letter.isalnum() or letter in "_-" for letter in name):
                raise ValueError(f"domain name {name!r}: use letters, digits, '_' and '-' only")
        return value

    @model_validator(mode="after")
    def _check_across(self) -> RunConfig:
        _check_lineage(self)
        _check_sizes(self)
        _check_mixture(self)
        check_engine(self)
        check_offload(self)
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs_folder) / self.name

    @property
    def recomputes_activations(self) -> bool:
        """True if layers are computed again in the backward pass."""
        if self.activation_recomputation == "full":
            return True
        if self.activation_recomputation == "none":
            return False
        assert_never(self.activation_recomputation)

    @property
    def keeps_optimizer_state(self) -> bool:
        """True if the stage goes on with the moments of its parent."""
        if self.optimizer_state == "keep":
            return True
        if self.optimizer_state == "reset":
            return False
        assert_never(self.optimizer_state)

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one step."""
        return self.batch.global_batch_size * self.batch.sequence_length

    @property
    def total_tokens(self) -> int:
        """Target tokens of the stage."""
        return resolve_duration(self.duration, tokens_per_step=self.tokens_per_step)

    @property
    def total_steps(self) -> int:
        """Steps of the stage."""
        return self.total_tokens // self.tokens_per_step

    @property
    def gradient_windows(self) -> int:
        """Held-out windows of a domain whose gradients an update of the mixture compares; 0 if it compares none."""
        return self.mixture.gradient_windows(self.evaluation.windows_per_domain)

    @property
    def evaluation_micro_batch_size(self) -> int:
        """Windows per forward pass of an evaluation."""
        return self.evaluation.micro_batch_size or self.batch.micro_batch_size

    @property
    def last_step(self) -> int:
        """The step after which this invocation stops."""
        stop = self.steps(self.stop_at)
        return self.total_steps if stop is None else min(self.total_steps, stop)

    def steps(self, duration: str | None) -> int | None:
        """A duration of this run in whole steps, at least 1 unless the duration is 0; None for None."""
        if duration is None:
            return None
        tokens = resolve_duration(duration, tokens_per_step=self.tokens_per_step, total_tokens=self.total_tokens)
        return tokens // self.tokens_per_step


CHOICES: dict[str, Registry[Any]] = {
    "model": FAMILIES,
    "mixture": MIXERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
"""The section of each field that chooses a method by name."""


def run_schema() -> type[RunConfig]:
    """:class:`RunConfig`, or a subclass that also takes the methods which extensions have registered."""
    return _schema_of(tuple(registry.current for registry in CHOICES.values()), HOOKS.switches(HooksConfig))


@cache
def _schema_of(sections: tuple[type[Section], ...], hooks: type[Section]) -> type[RunConfig]:
    changed: dict[str, Any] = {}
    for name, section in zip([*CHOICES, "hooks"], [*sections, hooks], strict=True):
        annotation = RunConfig.model_fields[name].annotation
        if annotation == section | None:
            continue
        if annotation is not section:
            changed[name] = (section | None, None) if name == "model" else (section, section())
    return create_model("RunConfig", __base__=RunConfig, **changed) if changed else RunConfig


def _check_lineage(config: RunConfig) -> None:
    if config.parent is None:
        if config.model is None:
            raise ValueError("neither parent nor model is set: name what to continue, or the shape to start from")
        if config.replay.fraction > 0 or config.replay.domains:
            raise ValueError(f"replay.fraction={config.replay.fraction} needs a parent whose domains can be replayed")
        if config.replay.paths:
            raise ValueError("replay.paths needs a parent, whose domains have moved")
        if config.schedule.start == "parent":
            raise ValueError("schedule.start=parent needs a parent, whose last learning rate it stands for")
        if config.keeps_optimizer_state:
            raise ValueError("optimizer_state=keep needs a parent run to keep it from")
    elif config.model is not None:
        raise ValueError(f"model is ignored with parent={config.parent}, which brings its own shape: remove one")
    if config.replay.fraction == 0 and config.replay.domains:
        raise ValueError("replay.domains is ignored with replay.fraction=0: set a fraction")
    if config.replay.fraction == 0 and config.replay.windows != "seen":
        raise ValueError(f"replay.windows={config.replay.windows} is ignored with replay.fraction=0: set a fraction")


def _check_mixture(config: RunConfig) -> None:
    settings = {"mixture.weights": config.mixture.weights or config.data}
    settings |= {f"mixture.phased.phases[{i}].weights": p.weights for i, p in enumerate(config.mixture.phases)}
    for where, weights in settings.items():
        unknown = sorted(set(weights) - set(config.data))
        if unknown:
            raise ValueError(f"{where} names {unknown[0]!r}, which is not in data: {sorted(config.data)}")
        missing = sorted(set(config.data) - set(weights))
        if missing:
            raise ValueError(f"{where} has no weight for the domain {missing[0]!r} of data; 0 switches it off")
    if config.mixture.is_updated and config.evaluation.interval is None:
        raise ValueError(
            f"mixture.mixer={config.mixture.mixer} changes weights at evaluations, but evaluation.interval is null"
        )


def _check_sizes(config: RunConfig) -> None:
    if parse_duration(config.duration)[1] == "%":
        raise ValueError(f"duration={config.duration!r}: a percentage of itself; write steps or tokens")
    batch, parallel = config.batch, config.parallel
    number, unit = parse_duration(config.duration)
    tokens = number * config.tokens_per_step if unit == "steps" else number
    if not tokens < MOST_TOKENS:
        raise ValueError(
            f"duration={config.duration!r} with batch.global_batch_size={batch.global_batch_size} and "
            f"batch.sequence_length={batch.sequence_length} makes {tokens:.3g} tokens, more than can be counted "
            f"({MOST_TOKENS:.3g})"
        )
    if tokens < config.tokens_per_step:
        raise ValueError(
            f"duration={config.duration!r} makes {tokens:.15g} tokens, less than one step of "
            f"batch.global_batch_size={batch.global_batch_size} windows of batch.sequence_length="
            f"{batch.sequence_length}, which is {config.tokens_per_step}: train longer, or take a smaller batch"
        )
    places = {"stop_at": config.stop_at, "evaluation.interval": config.evaluation.interval}
    for where, text in (places | {"checkpoint.interval": config.checkpoint.interval}).items():
        if config.steps(text) == 0:
            raise ValueError(f"{where}={text!r} is no step at all: write one step or more, or null")
    if config.stop_at is not None and (config.steps(config.stop_at) or 0) > config.total_steps:
        raise ValueError(
            f"stop_at={config.stop_at!r} is after the end of duration={config.duration!r}, which is "
            f"{config.total_steps} steps: stop earlier, or write null"
        )
    if batch.global_batch_size % batch.micro_batch_size:
        raise ValueError(
            f"batch.global_batch_size={batch.global_batch_size} is not a multiple of "
            f"batch.micro_batch_size={batch.micro_batch_size}"
        )
    if parallel.sequence and batch.sequence_length % parallel.tensor:
        raise ValueError(
            f"parallel.sequence splits batch.sequence_length={batch.sequence_length}, which "
            f"parallel.tensor={parallel.tensor} does not divide"
        )
    model = config.model
    if model is not None and model.max_position_embeddings < batch.sequence_length:
        raise ValueError(
            f"batch.sequence_length={batch.sequence_length} is above "
            f"model.max_position_embeddings={model.max_position_embeddings}"
        )
