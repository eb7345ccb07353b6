"""What a configuration stands for once every name in it is looked up and checked. No torch, no ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.checkpoint.distributed import read_state
from rewarm.config.run import RunConfig
from rewarm.data.boundaries import boundary_notices
from rewarm.data.conditioning import Conditioning, prefix_tokens
from rewarm.data.domain import Domain, open_domain
from rewarm.engine.layout import check_layout
from rewarm.errors import UserError, ensure
from rewarm.mixing.clock import Clock
from rewarm.mixing.controller import MixtureController
from rewarm.mixing.mixers.build import build_mixer
from rewarm.mixing.mixture import (
    check_phases_by_loss,
    cooldown_sample,
    initial_weights,
    planned_changes,
    planned_entry,
)
from rewarm.mixing.objective import Objective
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL, align, fractions
from rewarm.model.architecture import Architecture
from rewarm.model.description import ModelDescription, from_scratch
from rewarm.model.tokenizer_check import required_rows
from rewarm.replay.lineage import ConsumedDomain, Lineage, measure_identity, order_identity
from rewarm.replay.lineage import Stage as LineageStage
from rewarm.replay.windows import ReplayOrder, replay_order
from rewarm.schedule.learning_rate import LearningRate
from rewarm.train.old_domains import OldDomains, open_old_domains
from rewarm.train.origin import Origin, find_origin
from rewarm.train.parent_rate import with_parent_rate
from rewarm.train.reference import reference_losses
from rewarm.train.tokenizers import check_tokenizers, choose_tokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Stage:
    """A resolved stage."""

    config: RunConfig
    origin: Origin
    architecture: ModelDescription
    tokenizer: Path | None
    """Folder of the tokenizer; None when nothing names one (bare token files and a model without one)."""
    trained: list[Domain]
    """New domains, then replayed ones: the order of every per-domain array."""
    evaluated: list[Domain]
    """The trained domains, then those of the lineage that are only watched."""
    initial_weights: np.ndarray
    """int64 [D]."""
    planned: list[WeightEntry]
    """What the weight log of a new run begins with: the weights of the first sample, and the changes that are known
    before it."""
    messages: list[str] = field(default_factory=list)
    """What the user should know before the first step."""
    replay_orders: dict[str, ReplayOrder] = field(default_factory=dict)
    """How the windows of each replayed domain come."""
    replay_windows: str | None = None
    """``replay.windows`` as the checkpoints keep it; None for a run that began before there was this setting."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.folder

    @property
    def names(self) -> list[str]:
        """Names of the trained domains."""
        return [domain.name for domain in self.trained]

    def sampler(self, state: Mapping[str, Any] | None, log_entries: Iterable[WeightEntry]) -> Sampler:
        """A sampler at the first sample, or where a checkpoint left it.

        Args:
            state: the ``sampler`` part of a checkpoint, or None.
            log_entries: the weight log, which says what comes after the checkpoint.
        """
        sampled = []
        for domain in self.trained:
            order = self._order(domain)
            limit = self._max_epochs(domain.name)
            size, content = len(domain.train), domain.fingerprint
            sampled.append(SampledDomain(domain.name, size, content, limit, order.start, order.parts, order.once))
        sampler = Sampler(sampled, self.config.seed, self.initial_weights)
        if state is not None:
            sampler.load_state_dict(state)
        for entry in log_entries:
            if entry.sample > sampler.sample_index:
                sampler.schedule_weights(align(entry.weights, sampler.names), entry.sample)
        if state is None or not self.config.mixture.is_updated:
            sampler.plan(self.config.total_steps * self.config.batch.global_batch_size)
        return sampler

    def objective(self, state: Mapping[str, Any] | None, log_entries: Iterable[WeightEntry]) -> Objective:
        """What each sample counts in the loss, from the same arguments as :meth:`sampler`."""
        objective = Objective(self.names)
        if state is not None:
            objective.load_state_dict(state.get("objective", []))
        for entry in log_entries:
            if state is None or entry.sample > state["sample_index"]:
                objective.schedule(entry)
        return objective

    def conditioning(self) -> Conditioning | None:
        """The texts in front of the domains' documents, and where they end.

        Raises:
            UserError: if one is of no domain of the stage, cannot be made into tokens, or the end is not in the stage.
        """
        settings = self.config.mixture.conditioning
        if settings is None:
            return None
        unknown = sorted(set(settings.prefixes) - set(self.names))
        if unknown:
            raise UserError(
                f"mixture.conditioning.prefixes names {unknown[0]!r}, which is no domain that the stage trains on",
                fix=f"name some of {', '.join(self.names)}",
            )
        tokens = prefix_tokens(settings.prefixes, self.tokenizer, self.config.batch.sequence_length // 2)
        return Conditioning(tokens, cooldown_sample(settings, _clock(self.config)))

    def _order(self, domain: Domain) -> ReplayOrder:
        if domain.name in self.replay_orders:
            return self.replay_orders[domain.name]
        order = order_identity(domain.fingerprint, len(domain.train), self.config.seed)
        return ReplayOrder(order, self.origin.lineage.drawn(order))

    def controller(self) -> MixtureController:
        """What steers the weights of the new domains after evaluations, as it stands at the first step."""
        config, num_new = self.config, len(self.config.data)
        weights = fractions(self.initial_weights[:num_new])
        mixer = build_mixer(
            config.mixture,
            self.names[:num_new],
            weights,
            lambda text: config.steps(text) or 0,
            lambda place: reference_losses(Path(place), config, self.trained[:num_new]),
            config.batch.global_batch_size,
        )
        return MixtureController(
            config.mixture,
            mixer,
            replayed=dict(zip(self.names[num_new:], self.initial_weights[num_new:].tolist(), strict=True)),
            replay_fraction=config.replay.fraction,
            total_samples=config.total_steps * config.batch.global_batch_size,
            held_out={domain.name: domain.held_out_fingerprint for domain in self.trained},
        )

    def _max_epochs(self, name: str) -> float | None:
        return self.config.data[name].max_epochs if name in self.config.data else None

    def measured_on(self, domain: Domain) -> str:
        """Identity of the held-out windows that a domain is evaluated on."""
        num_windows = min(self.config.evaluation.windows_per_domain, len(domain.held_out))
        return measure_identity(domain.held_out_fingerprint, self.config.batch.sequence_length, num_windows)

    def lineage(
        self,
        learning_rate: float | None,
        tokens: int,
        cursors: Mapping[str, int],
        losses: Mapping[str, float | None] | None = None,
    ) -> Lineage:
        """The lineage that ends with this run.

        Args:
            learning_rate: of its last step.
            tokens: trained so far.
            cursors: windows drawn of each trained domain.
            losses: held-out loss of each domain at the last evaluation, nats per token.
        """
        losses = losses or {}
        length = self.config.batch.sequence_length
        consumed = tuple(
            ConsumedDomain(
                name=domain.name,
                path=str(Path(domain.path).resolve()),
                held_out=_absolute(domain.settings.held_out),
                held_out_fraction=domain.settings.held_out_fraction,
                fingerprint=domain.fingerprint,
                tokens=cursors[domain.name] * length,
                windows=cursors[domain.name],
                tokenizer_fingerprint=domain.tokenizer_fingerprint or "",
                order=self._order(domain).order,
                replayed=self._order(domain).replayed,
                held_out_loss=losses.get(domain.name),
                measured_on=self.measured_on(domain),
            )
            for domain in self.trained
        )
        own = LineageStage(
            self.config.name, "run", str(self.folder.resolve()), learning_rate, tokens, consumed, self.origin.run_id
        )
        return self.origin.lineage.extended(own)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def resolve_stage(config: RunConfig, num_ranks: int) -> Stage:
    """Look up everything that a configuration names.

    Args:
        config: the stage.
        num_ranks: ranks it will run on.

    Raises:
        UserError: for whatever is missing, does not fit together or would be ignored.
    """
    if not config.data:
        raise UserError("data is empty: there is nothing to train on", fix="name at least one domain under data")
    origin = find_origin(config)
    config = with_parent_rate(config, origin.lineage)
    config, replay_windows, messages = _replay_as_begun(config, origin)
    length = config.batch.sequence_length
    new = [open_domain(name, domain, length) for name, domain in config.data.items()]
    tokenizer = choose_tokenizer(config, origin, new)
    architecture = origin.architecture or _new_architecture(config, tokenizer, new)
    check_layout(config, architecture, num_ranks)
    old = open_old_domains(config, origin.lineage, new)
    old.messages.extend(messages)
    orders = _replay_orders(config, origin.lineage, old)
    tokens = {domain.name: domain.train.num_tokens for domain in new}
    shares = {domain.name: share for domain, share in old.replayed}
    names, weights = initial_weights(config.mixture, config.replay, tokens, shares, total_tokens=config.total_tokens)
    start = planned_entry(config.mixture, 0, names, weights, f"start: {config.mixture.mixer}")
    planned = [start, *planned_changes(config.mixture, config.replay, tokens, shares, _clock(config))]
    trained = new + [domain for domain, _ in old.replayed]
    ensure(names == [domain.name for domain in trained], f"the domains of the samples are {names}, others are opened")
    check_tokenizers(tokenizer, architecture, trained)
    if tokenizer is not None:
        old.messages.extend(boundary_notices(new, tokenizer, has_parent=origin.parent is not None))
    parent = origin.parent
    if parent is not None and parent.checkpoint == parent.folder and config.tokenizer is None:
        old.messages.append(
            f"parent={parent.folder} lies outside of its run, where its tokenizer is: "
            + ("none is known" if tokenizer is None else f"{tokenizer} of the domains is taken")
        )
    evaluated = trained + _watchable(old, tokenizer, architecture)
    _check_enough_windows(config, trained, weights, orders)
    if origin.checkpoint is None:  # a run that has begun goes on: what a phase may cost the objective is in its log
        check_phases_by_loss(config.mixture, shares, config.replay.fraction)
    stage = Stage(
        config, origin, architecture, tokenizer, trained, evaluated, weights, planned, list(old.messages),
        replay_orders=orders, replay_windows=replay_windows,
    )  # fmt: skip
    # All refuse what could only fail after the ranks have started.
    stage.sampler(None, planned)
    _check_gradients(stage)
    stage.conditioning()
    return stage


def _replay_as_begun(config: RunConfig, origin: Origin) -> tuple[RunConfig, str | None, list[str]]:
    """A run that began before ``replay.windows`` was a setting goes on as it began, with what is now called all.

    Returns:
        The configuration, what the checkpoints keep of it, and what the user should know.
    """
    if origin.checkpoint is None or read_state(origin.checkpoint).get("replay") is not None:
        return config, config.replay.windows, []
    if config.replay.fraction == 0:
        return config, None, []
    replay = config.replay.model_copy(update={"windows": "all"})
    message = "this run began before replay.windows was a setting, and goes on as it began, with replay.windows=all"
    return config.model_copy(update={"replay": replay}), None, [message]


def _replay_orders(config: RunConfig, lineage: Lineage, old: OldDomains) -> dict[str, ReplayOrder]:
    known = {domain.fingerprint: domain for domain in lineage.domains()}
    return {
        domain.name: replay_order(
            lineage, config.replay.windows, known[domain.fingerprint], len(domain.train), config.seed
        )
        for domain, _ in old.replayed
    }


def _check_gradients(stage: Stage) -> None:
    """Build the controller, and refuse a domain whose gradients it could not compare."""
    if not stage.controller().mixer.needs_gradients:
        return
    for domain in stage.trained[: len(stage.config.data)]:
        if len(domain.held_out) < 2:
            raise UserError(
                f"mixture.mixer={stage.config.mixture.mixer} compares gradients over held-out windows, and domain "
                f"{domain.name!r} has 1",
                fix="hold out more of it",
            )


def _watchable(old: OldDomains, tokenizer: Path | None, architecture: ModelDescription) -> list[Domain]:
    """The watched domains that the model can be evaluated on; why another one is left out is added to the messages."""
    watchable = []
    for domain in old.watched:
        try:
            check_tokenizers(tokenizer, architecture, [domain])
            watchable.append(domain)
        except UserError as error:
            old.messages.append(f"not watched for forgetting: {error.message}")
    return watchable


def _clock(config: RunConfig) -> Clock:
    schedule = LearningRate(config.schedule, config.total_tokens, config.tokens_per_step)
    return Clock(
        total_steps=config.total_steps,
        global_batch_size=config.batch.global_batch_size,
        steps=lambda duration: config.steps(duration) or 0,
        learning_rate=lambda step: schedule.at(step * config.tokens_per_step),
    )


def _new_architecture(config: RunConfig, tokenizer: Path | None, new: list[Domain]) -> ModelDescription:
    assert config.model is not None, "RunConfig refuses a stage without parent and model"
    vocab_size = config.model.vocab_size or next((d.vocab_size for d in new if d.vocab_size), None)
    if vocab_size is None and tokenizer is not None:
        vocab_size = required_rows(tokenizer)
    if vocab_size is None:
        raise UserError(
            "the size of the vocabulary is not known: model.vocab_size and tokenizer are not set, and no domain "
            "names the tokenizer it was built with",
            fix="set tokenizer to the folder of the tokenizer that the token files were made with",
        )
    return from_scratch(Architecture.from_config(config.model, vocab_size), config.engine, config.precision)


def _check_enough_windows(
    config: RunConfig, trained: list[Domain], weights: np.ndarray, orders: Mapping[str, ReplayOrder]
) -> None:
    """Refuse a domain that would repeat within a single step."""
    for domain, weight in zip(trained, weights.tolist(), strict=True):
        share = math.ceil(weight / TOTAL * config.batch.global_batch_size)
        parts = orders[domain.name].parts if domain.name in orders else ()
        among = f" that replay.windows={config.replay.windows} allows" if parts else ""
        count = SampledDomain(domain.name, len(domain.train), domain.fingerprint, parts=parts).pool
        if count < share:
            raise UserError(
                f"domain {domain.name!r} ({domain.path}) has {count} windows of "
                f"{config.batch.sequence_length} tokens{among}, but one step takes {share} of it "
                f"(weight {weight / TOTAL:.3g}, batch.global_batch_size={config.batch.global_batch_size})",
                fix="give it more text, or lower its weight, batch.global_batch_size or batch.sequence_length",
            )
