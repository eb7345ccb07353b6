"""Which domains of the lineage a stage replays, where their files are, and in which proportion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rewarm.config.mixture import ReplayConfig
from rewarm.errors import UserError, nearest
from rewarm.replay.lineage import ConsumedDomain, Lineage


@dataclass(frozen=True, slots=True)
class ReplayDomain:
    """A domain of the lineage with its files found and its content checked."""

    name: str
    path: str
    held_out: str | None
    fingerprint: str
    tokenizer_fingerprint: str
    proportion: float
    """Its part of the replayed windows, any scale."""


def resolve_replay(
    lineage: Lineage,
    replay: ReplayConfig,
    new: Mapping[str, str],
    fingerprint_of: Callable[[ConsumedDomain, str], str],
) -> list[ReplayDomain]:
    """Find the domains to replay.

    All domains of the lineage are taken unless ``replay.domains`` names some. A domain with the content of a new one
    is left out: it is being trained on already.

    Args:
        lineage: of the run's parent.
        replay: the configuration section.
        new: name to content fingerprint of the stage's new domains.
        fingerprint_of: content fingerprint of a lineage domain at a path; may raise OSError.

    Returns:
        Domains in the order of the lineage; their proportions are those of ``replay.domains``, or the tokens that
        each was trained on.

    Raises:
        UserError: if a name is unknown, a file has moved, a content changed, or a name clashes with a new domain.
    """
    known = lineage.domains()
    check_names(known, {**dict.fromkeys(replay.domains or {}, "domains"), **dict.fromkeys(replay.paths, "paths")})
    resolved = []
    for domain in known:
        if replay.domains is not None and replay.domains.get(domain.name, 0) == 0:
            continue
        if domain.fingerprint in new.values():
            _refuse_named(domain, replay, new)
            continue
        if domain.name in new:
            raise UserError(
                f"domain {domain.name!r} of the lineage and the new domain of that name have different content",
                fix="give the new one another name under data, or leave the old one out of replay.domains",
            )
        path = _checked_path(domain, replay.paths.get(domain.name), fingerprint_of)
        proportion = float(domain.tokens) if replay.domains is None else replay.domains[domain.name]
        # A held-out pair at its old place does not follow a moved folder; the folder's own split does.
        resolved.append(
            ReplayDomain(
                domain.name, path, domain.held_out, domain.fingerprint, domain.tokenizer_fingerprint, proportion
            )
        )
    return resolved


def check_names(known: list[ConsumedDomain], asked: Mapping[str, str]) -> None:
    """Refuse names that are not one domain of the lineage.

    Args:
        known: the lineage's domains.
        asked: name to the setting of ``replay`` that names it.

    Raises:
        UserError: if a name is unknown or stands for several contents.
    """
    names = [domain.name for domain in known]
    for name, setting in asked.items():
        if names.count(name) > 1:
            raise UserError(f"the lineage has {names.count(name)} domains of different content called {name!r}")
        if name not in names:
            guess = nearest(name, names)
            raise UserError(
                f"replay.{setting} names {name!r}, which is not a domain of the lineage: {', '.join(names) or 'none'}",
                fix=f"did you mean {guess!r}?" if guess else "use one of these names",
            )


def _refuse_named(domain: ConsumedDomain, replay: ReplayConfig, new: Mapping[str, str]) -> None:
    if replay.domains is not None:
        twin = next(name for name, fingerprint in new.items() if fingerprint == domain.fingerprint)
        raise UserError(
            f"replay.domains names {domain.name!r}, whose content is that of the new domain {twin!r}",
            fix="keep it under data or under replay, not both",
        )


def _checked_path(
    domain: ConsumedDomain, moved_to: str | None, fingerprint_of: Callable[[ConsumedDomain, str], str]
) -> str:
    path = str(Path(moved_to).resolve()) if moved_to is not None else domain.path
    try:
        found = fingerprint_of(domain, path)
    except OSError as error:
        raise UserError(
            f"domain {domain.name!r} of the lineage is not at {path}: {error.strerror or error}",
            fix=f"set replay.paths.{domain.name} to its new place, or leave it out with replay.domains",
        ) from error
    if found != domain.fingerprint:
        raise UserError(
            f"the content of domain {domain.name!r} at {path} changed since the lineage trained on it",
            fix="restore the files, or give the changed data as a new domain under data",
        )
    return path
