"""Mixture and replay: which mixer shares the batch among the domains. Each mixer's own settings stand in its file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewarm.config.paths import PathText
from rewarm.config.registry import MIXERS, check_chosen, chosen_settings
from rewarm.config.section import Duration, Section, check_shares, ignored


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


class MixtureBase(Section):
    """How the new domains share the batch. Replay keeps its own fraction beside them."""

    mixer: str = "static"
    """What decides the weights of the new domains."""
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
    def _check_ignored(self) -> Self:
        method = MIXERS[self.mixer].target
        if not method.takes_weights and self.weights is not None:
            raise ignored("mixture.weights", f"mixture.mixer={self.mixer}")
        if method.steers_objective and self.objective is not None:
            raise ignored("mixture.objective", f"mixture.mixer={self.mixer}, which sets it")
        check_chosen(MIXERS, self, "mixer")
        return self

    @property
    def is_updated(self) -> bool:
        """True if evaluations can change the weights."""
        return bool(MIXERS[self.mixer].target.is_updated(self.settings))

    @property
    def phases(self) -> list[Any]:
        """The phases of mixer phased; empty under the others."""
        return list(getattr(self.settings, "phases", []))

    def gradient_windows(self, evaluated: int) -> int:
        """Held-out windows of a domain whose gradients an update compares; 0 if the mixer compares none.

        Args:
            evaluated: ``evaluation.windows_per_domain``.
        """
        if not MIXERS[self.mixer].target.compares_gradients():
            return 0
        given: int | None = getattr(self.settings, "windows_per_domain", None)
        return given or max(2, evaluated // 8)

    @property
    def settings(self) -> Section | None:
        """The section of the chosen mixer, with its defaults where it is not given; None if it has none."""
        return chosen_settings(MIXERS, self, "mixer")


if TYPE_CHECKING:
    MixtureConfig = MixtureBase
else:
    MixtureConfig = MIXERS.section(MixtureBase, "mixer")


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
