"""Domains of the lineage: replayed when asked, watched in any case."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewarm.config.data import DomainConfig, ReplayConfig
from rewarm.config.run import RunConfig
from rewarm.data.domain import Domain, open_domain
from rewarm.errors import UserError
from rewarm.replay.lineage import ConsumedDomain, Lineage
from rewarm.replay.select import check_names, resolve_replay


@dataclass(slots=True)
class OldDomains:
    """What became of the lineage's domains."""

    replayed: list[tuple[Domain, float]] = field(default_factory=list)
    """With their proportions among each other."""
    watched: list[Domain] = field(default_factory=list)
    """Only evaluated, so that forgetting is seen."""
    messages: list[str] = field(default_factory=list)
    """What could not be watched, and why."""


def open_old_domains(config: RunConfig, lineage: Lineage, new: list[Domain]) -> OldDomains:
    """Open the lineage's domains.

    A replayed domain must be there with the content it had. One that would only be watched and is not there is left
    out with a message: not seeing old losses is no reason to refuse the training of new ones.

    Raises:
        UserError: if a domain to replay is unknown, gone or changed.
    """
    old = OldDomains()
    names = {domain.name: domain.fingerprint for domain in new}
    opened: dict[str, Domain] = {}

    def fingerprint_of(domain: ConsumedDomain, path: str) -> str:
        opened[domain.fingerprint] = _open(domain, path, config)
        return opened[domain.fingerprint].fingerprint

    if config.replay.fraction > 0:
        for chosen in resolve_replay(lineage, config.replay, names, fingerprint_of):
            old.replayed.append((opened[chosen.fingerprint], chosen.proportion))
    else:
        check_names(lineage.domains(), dict.fromkeys(config.replay.paths, "paths"))
    used = set(names.values()) | {domain.fingerprint for domain, _ in old.replayed}
    taken = set(names) | {domain.name for domain, _ in old.replayed}
    for domain in lineage.domains():
        if domain.fingerprint in used:
            continue
        alone = ReplayConfig(fraction=0.5, domains={domain.name: 1.0}, paths=_paths_of(config, domain.name))
        try:
            if domain.name in taken:
                raise UserError(f"the name {domain.name!r} is taken by other content")
            resolve_replay(lineage, alone, names, fingerprint_of)
        except UserError as error:
            # The usual fix also speaks of replay.domains, which says nothing of what is only watched.
            mend = f"; set replay.paths.{domain.name} to its new place" if isinstance(error.__cause__, OSError) else ""
            old.messages.append(f"not watched for forgetting: {error.message}{mend}")
            continue
        old.watched.append(opened[domain.fingerprint])
        taken.add(domain.name)
    return old


def _open(domain: ConsumedDomain, path: str, config: RunConfig) -> Domain:
    """Open a lineage domain; a missing one is an OSError, which the caller names with its own fix."""
    # Not checked as a setting: the lineage holds whole paths, in which nothing stands for anything else.
    settings = DomainConfig.model_construct(
        path=path, held_out=domain.held_out, held_out_fraction=domain.held_out_fraction
    )
    try:
        return open_domain(domain.name, settings, config.batch.sequence_length, section=None)
    except UserError as error:
        raise OSError(error.message.removeprefix(f"{path}: ")) from error


def _paths_of(config: RunConfig, name: str) -> dict[str, str]:
    return {name: config.replay.paths[name]} if name in config.replay.paths else {}
