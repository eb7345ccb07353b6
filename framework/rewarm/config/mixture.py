"""Mixture and replay: which mixer shares the batch among the domains, and its settings."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rewarm.config.paths import PathText
from rewarm.config.section import Duration, Section, ignored


class TemperatureConfig(Section):
    """Weights in proportion to ``tokens ** (1 / temperature)``."""

    temperature: float = Field(5.0, ge=1)
    """1 is proportional to tokens; the higher, the closer to equal weights. 5 is common, not measured here."""
    cooldown_at: Duration | None = None
    """Where in the stage the temperature changes to ``cooldown_temperature``; null means never."""
    cooldown_temperature: float = Field(1.0, ge=1)
    """Temperature after ``cooldown_at`` (Li et al. 2024 end at 1)."""

    @model_validator(mode="after")
    def _check_ignored(self) -> TemperatureConfig:
        if self.cooldown_at is None and self.cooldown_temperature != 1.0:
            raise ValueError("cooldown_temperature is ignored without cooldown_at: set where the cooldown begins")
        return self


class UniMaxConfig(Section):
    """Weights as equal as a cap on repetition allows (Chung et al. 2023)."""

    max_epochs: float = Field(4.0, gt=0)
    """Most passes over each domain; what a small domain cannot take goes to the larger ones. The paper tries 1 to 10;
    repeating up to 4 times costs little (Muennighoff et al. 2023)."""


class PhaseConfig(Section):
    """Weights that hold from a trigger on, until another phase begins. Exactly one trigger."""

    weights: dict[str, float]
    """Weight of every new domain, any positive scale."""
    at: Duration | None = None
    """Where in the stage it begins: steps, tokens or a percentage."""
    learning_rate_fraction: float | None = Field(None, gt=0, lt=1)
    """It begins when the learning rate has fallen to this fraction of the schedule's peak. 0.2 is the switch of
    Parmar et al. 2024, "Reuse, Don't Retrain"."""
    loss_below: dict[str, float] | None = None
    """It begins at the first evaluation where every domain named here has a held-out loss below its value, in nats
    per token."""

    @model_validator(mode="after")
    def _check(self) -> PhaseConfig:
        triggers = {"at", "learning_rate_fraction", "loss_below"}
        given = sorted(name for name in triggers if getattr(self, name) is not None)
        if len(given) != 1:
            raise ValueError(f"a phase needs exactly one of {sorted(triggers)}; given: {given or 'none'}")
        check_shares(self.weights, "a phase's weights")
        return self


class PhasedConfig(Section):
    """Blends one after the other; the first is ``mixture.weights``."""

    phases: list[PhaseConfig] = Field(min_length=1)
    """The blends that follow."""


class _Targets(Section):
    targets: dict[str, float] | PathText
    """Loss that each new domain should reach, in nats per token; or the file that ``rewarm mixture targets`` wrote."""


class VelocituneConfig(_Targets):
    """Weights grow where learning lags behind its target (Luo et al. 2024)."""

    step_size: float = Field(1.0, gt=0)
    """Factor of the velocities before the exponential; 1 is the paper's rule. The log-ratio of two weights grows by at
    most this per update, so many updates need a smaller one: keep step_size * updates near 10."""
    floor: float = Field(0.0, ge=0, lt=1)
    """Share of the batch that is spread equally whatever the velocities; 0 is the paper's rule."""
    learned_margin: float = Field(0.0, ge=0)
    """A domain whose initial loss is at most this far above its target, in nats, counts as learned: velocity 0."""


class DynamicBatchLoadingConfig(_Targets):
    """Weights grow with the excess of the loss over its target (Xia et al. 2023, Sheared LLaMA)."""

    step_size: float = Field(1.0, gt=0)
    """Factor of the excess losses."""
    floor: float = Field(1e-4, ge=0, lt=1)
    """Share of the batch that is spread equally; the default is the published code's."""


class DoReMiConfig(Section):
    """Weights of the loss, not of the samples, that grow where the model is worse than a reference (Xie et al. 2023).

    The samples keep ``mixture.weights``, equal if not given, which is also what the weights of the loss start from.
    The method's result is their mean: ``rewarm mixture average RUN``.
    """

    reference: dict[str, float] | PathText
    """Held-out loss of a reference model on each new domain, in nats per token; or a run or checkpoint that evaluated
    the same held-out windows; or the output of ``rewarm evaluate --json``."""
    step_size: float = Field(1.0, gt=0)
    """Factor of the excess losses, which are clipped at 0; 1 in the paper."""
    floor: float = Field(1e-3, ge=0, lt=1)
    """Share of the loss that is spread equally; the paper's smoothing."""


class ODMConfig(Section):
    """Online data mixing: a bandit whose reward is the training loss (Albalak et al. 2023)."""

    decay: float = Field(0.9, ge=0, lt=1)
    """Share of the old reward that each update keeps; second-hand default, scripts with 0.5 exist."""
    warmup: Duration = "0 steps"
    """Weights stay until then. The published runs wait 2000 steps (second-hand)."""


class ADOConfig(Section):
    """Adaptive data optimisation: weights from a scaling law of each domain, refitted as it trains (Jiang et al. 2024).

    Defaults are those of the published code.
    """

    warmup: Duration = "1000 steps"
    """Weights stay natural until then; the losses before it are left out of the fits."""
    smoothing: float = Field(0.1, gt=0, le=1)
    """Weight of the newest preference against the average of all before it."""
    credit_decay: float = Field(0.9, ge=0, lt=1)
    """How slowly the credit for data seen recently follows the weights."""
    credit_power: float = Field(0.5, ge=0)
    """Exponent of that credit."""
    floor: float = Field(0.01, ge=0, lt=1)
    """Smallest share of a domain."""


class SkillItConfig(Section):
    """Weights from recent losses through a graph of which domain helps which (Chen et al. 2023)."""

    graph: dict[str, dict[str, float]]
    """graph[a][b]: how much training on a lowers the loss on b; pairs that are left out count 0."""
    step_size: float = Field(0.5, gt=0)
    """Factor before the exponential; second-hand default, the paper tunes it."""
    memory: int = Field(3, ge=1)
    """Evaluations whose losses are summed."""


class AioliConfig(Section):
    """Weights from how much training on each domain lowers every loss, measured by probes (Chen et al. 2024).

    At each evaluation of a round's first part another domain's probe begins; then the mixture that they ask for holds.
    The probes are ordinary training steps of the run.
    """

    step_size: float = Field(0.2, gt=0)
    """Factor before the exponential; 0.1 to 0.5 in the published runs."""
    probe_share: float = Field(0.625, gt=0, le=1)
    """Share of the probed domain among the new ones, above an equal share; the others divide the rest. The published
    runs take 0.5 to 0.625."""
    probes_per_domain: int = Field(4, ge=1)
    """Probes of each domain in a round, one evaluation interval each; 4 in the published runs."""
    hold: int = Field(16, ge=1)
    """Evaluations that the mixture holds before the next round of probes."""
    matrix_decay: float = Field(0.0, ge=0, lt=1)
    """Share of the older rounds' measurements that each round keeps."""


class _Gradients(Section):
    windows_per_domain: int | None = Field(None, ge=2)
    """Held-out windows of each new domain whose gradients an update compares, others at every update in turn. An update
    costs a forward and a backward pass over them; the noise of what it measures falls with the square root of their
    number. Null means an eighth of evaluation.windows_per_domain, so that an update costs no more than the evaluation
    before it. All of them when the split has fewer."""


class PiKEConfig(_Gradients):
    """More of what has a large gradient, less of what is mostly noise (Li et al. 2025); for domains whose gradients
    hardly conflict."""

    norm_factor: float = Field(1.0, ge=0)
    """Factor of the squared norm of a domain's gradient, zeta 1; no default is known to be right, as gradients scale
    with the model: try ``rewarm mixture simulate``."""
    variance_factor: float = Field(1.0, ge=0)
    """Factor of the gradient's variance over twice batch.global_batch_size, zeta 2."""


class DoGEConfig(_Gradients):
    """More of what lowers the loss on the others too, by the inner products of gradients (Fan et al. 2023)."""

    learning_rate: float = Field(5e-4, gt=0)
    """Factor of the products, and a fifth of the largest score; the proxy's learning rate in the paper."""
    regularisation: float = Field(0.01, gt=0)
    """Strength of the pull towards the last weights; 0.01 in the published universal runs."""


class ConditioningConfig(Section):
    """Metadata conditioning, then cooldown (Gao et al. 2025): a text before each document of a domain, without loss of
    its own, for the first part of the stage; plain windows for the rest, so that the model needs no text in front."""

    prefixes: dict[str, str] = Field(min_length=1)
    """Text by domain, as "source: wikipedia\\n\\n"; replayed domains may be named too. A domain that is left out is
    always plain, and so is every evaluation. It stands at the start of each window and before each document that
    begins in it; what it pushes beyond the window's end is not trained on in this pass over the domain."""
    until: Duration | None = None
    """Where in the stage the cooldown begins: steps, tokens or a percentage. Null means 90%, as in the paper, unless
    ``until_learning_rate_fraction`` is set."""
    until_learning_rate_fraction: float | None = Field(None, gt=0, lt=1)
    """The cooldown begins when the learning rate has fallen to this fraction of the schedule's peak."""

    @model_validator(mode="after")
    def _check_trigger(self) -> ConditioningConfig:
        if self.until is not None and self.until_learning_rate_fraction is not None:
            raise ValueError("conditioning ends by until or by until_learning_rate_fraction: remove one of the two")
        return self


MIXER_SECTIONS: dict[str, type[Section]] = {
    "temperature": TemperatureConfig,
    "unimax": UniMaxConfig,
    "phased": PhasedConfig,
    "velocitune": VelocituneConfig,
    "dynamic_batch_loading": DynamicBatchLoadingConfig,
    "doremi": DoReMiConfig,
    "odm": ODMConfig,
    "ado": ADOConfig,
    "pike": PiKEConfig,
    "doge": DoGEConfig,
    "skill_it": SkillItConfig,
    "aioli": AioliConfig,
}
"""The section of each mixer that has settings."""

CLOSED_LOOP = frozenset(
    {"velocitune", "dynamic_batch_loading", "doremi", "odm", "ado", "skill_it", "aioli", "pike", "doge"}
)
"""Mixers that are updated at evaluations."""


class MixtureConfig(Section):
    """How the new domains share the batch. Replay keeps its own fraction beside them."""

    mixer: Literal[
        "static", "proportional", "temperature", "unimax", "phased",
        "velocitune", "dynamic_batch_loading", "doremi", "odm", "ado", "skill_it", "aioli", "pike", "doge",
    ] = "static"  # fmt: skip
    """static: the given weights. proportional: by each domain's tokens. temperature, unimax: between proportional and
    equal. phased: one blend after the other. velocitune, dynamic_batch_loading, odm, ado, skill_it, aioli: weights that
    follow the losses, see their sections. pike, doge: weights that follow the gradients on held-out windows, see
    their ``windows_per_domain``. doremi: static weights of the samples, and weights of the loss
    that follow it."""
    weights: dict[str, float] | None = None
    """Weight of each domain at the start, any positive scale; null means equal weights (ado: by tokens). Refused by the
    mixers that compute them: proportional, temperature and unimax."""
    objective: dict[str, float] | None = None
    """Weights of domains in the loss, where it should stand for another mixture than the one that is sampled: each
    window counts (share of the objective) / (share of the samples) times. Any positive scale; the domains named here
    divide what they are sampled at together, a replayed one may be named too, and the others count once. Null means
    that every window counts once."""
    conditioning: ConditioningConfig | None = None
    """A text in front of each domain's documents for the first part of the stage; null means none."""
    temperature: TemperatureConfig | None = None
    """Settings of mixer temperature."""
    unimax: UniMaxConfig | None = None
    """Settings of mixer unimax."""
    phased: PhasedConfig | None = None
    """Settings of mixer phased."""
    velocitune: VelocituneConfig | None = None
    """Settings of mixer velocitune."""
    dynamic_batch_loading: DynamicBatchLoadingConfig | None = None
    """Settings of mixer dynamic_batch_loading."""
    doremi: DoReMiConfig | None = None
    """Settings of mixer doremi."""
    odm: ODMConfig | None = None
    """Settings of mixer odm."""
    ado: ADOConfig | None = None
    """Settings of mixer ado."""
    pike: PiKEConfig | None = None
    """Settings of mixer pike."""
    doge: DoGEConfig | None = None
    """Settings of mixer doge."""
    skill_it: SkillItConfig | None = None
    """Settings of mixer skill_it."""
    aioli: AioliConfig | None = None
    """Settings of mixer aioli."""

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None:
            check_shares(weights, "mixture.weights")
        return weights

    @field_validator("objective")
    @classmethod
    def _check_objective(cls, objective: dict[str, float] | None) -> dict[str, float] | None:
        if objective is not None:
            check_shares(objective, "mixture.objective")
        return objective

    @model_validator(mode="after")
    def _check_ignored(self) -> MixtureConfig:
        if self.mixer in ("proportional", "temperature", "unimax") and self.weights is not None:
            raise ignored("mixture.weights", f"mixture.mixer={self.mixer}")
        if self.mixer == "doremi" and self.objective is not None:
            raise ignored("mixture.objective", "mixture.mixer=doremi, which sets it")
        for name, section in MIXER_SECTIONS.items():
            if getattr(self, name) is not None and name != self.mixer:
                raise ignored(f"mixture.{name}", f"mixture.mixer={self.mixer}")
            required = [key for key, field in section.model_fields.items() if field.is_required()]
            if name == self.mixer and getattr(self, name) is None and required:
                raise ValueError(f"mixture.mixer={name} needs mixture.{name}.{required[0]}")
        return self

    @property
    def is_updated(self) -> bool:
        """True if evaluations can change the weights."""
        return self.mixer in CLOSED_LOOP or any(phase.loss_below for phase in self.phases)

    @property
    def phases(self) -> list[PhaseConfig]:
        """The phases of mixer phased; empty under the others."""
        return self.phased.phases if self.phased is not None else []

    def gradient_windows(self, evaluated: int) -> int:
        """Held-out windows of a domain whose gradients an update compares; 0 if the mixer compares none.

        Args:
            evaluated: ``evaluation.windows_per_domain``.
        """
        settings = self.settings
        if not isinstance(settings, _Gradients):
            return 0
        return settings.windows_per_domain or max(2, evaluated // 8)

    @property
    def settings(self) -> Section | None:
        """The section of the chosen mixer, with its defaults where it is not given; None if it has none."""
        if self.mixer not in MIXER_SECTIONS:
            return None
        given: Section | None = getattr(self, self.mixer)
        return given if given is not None else MIXER_SECTIONS[self.mixer]()


class ReplayConfig(Section):
    """Old domains fed back, so that what the model knows is kept."""

    fraction: float = Field(0.0, ge=0, lt=1)
    """Share of all sampled windows that comes from the lineage's domains; it replaces new tokens, so the cost
    of the run does not change (Ibrahim et al. 2024)."""
    domains: dict[str, float] | None = None
    """Which domains of the lineage and in which proportion; null means all, by the tokens each was trained on."""
    windows: Literal["seen", "unseen", "all"] = "seen"
    """Which windows of these domains. seen: what the lineage trained on, in the order in which it did; a later stage
    goes on where this one stopped, and after the last comes the first again. unseen: what it has not trained on, each
    once; more than there is is refused. all: as of a domain under data, whose order goes on where the lineage stopped,
    so that the unseen comes first and then all of it again."""
    paths: dict[str, PathText] = Field(default_factory=dict)
    """New place of a lineage domain whose files moved, replayed or only watched; the content must be the same."""

    @field_validator("domains")
    @classmethod
    def _check_domains(cls, domains: dict[str, float] | None) -> dict[str, float] | None:
        if domains is not None:
            check_shares(domains, "replay.domains")
        return domains


def check_shares(weights: dict[str, float], where: str) -> None:
    """Refuse weights by domain that are no mixture; ``where`` names the setting in the message."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight of domain {name!r} in {where} is {weight}: it must be finite and not negative")
    if sum(weights.values()) <= 0:
        raise ValueError(f"{where} sum to 0: give at least one domain a positive weight")
