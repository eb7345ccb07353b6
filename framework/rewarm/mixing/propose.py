"""From a file of finished runs on different mixtures to a proposed mixture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.errors import UserError
from rewarm.mixing.mixers.base import by_domain
from rewarm.mixing.mixture_law import fit_mixture_law, propose_mixture
from rewarm.mixing.weights import check_weights

_SAME = 1e-6
"""Shares that differ by less are the same; those of a weight log are rounded."""


def propose(
    path: str | Path,
    prior: Mapping[str, float],
    *,
    importance: Mapping[str, float] | None = None,
    caps: Mapping[str, float] | None = None,
    divergence: float = 0.05,
) -> dict[str, Any]:
    """Fit the mixing law to the runs of a file and propose the best mixture near a prior.

    A domain whose share is the same in all runs, as a replayed one's, keeps it: nothing can be said of other shares.

    Args:
        path: JSON lines ``{"weights": {domain: share}, "loss": {evaluated domain: nats}}``, one run each.
        prior: mixture to stay near, any scale; names the domains. Runs may also have had others at a fixed share.
        importance: weight of each evaluated domain; None means equal.
        caps: largest share of some domains.
        divergence: nats of loss per nat of divergence from the prior.

    Returns:
        ``weights`` of the prior's domains, summing to 1, and predicted ``loss`` by domain, and the ``worst_residual``
        of the fit in nats.

    Raises:
        UserError: if the file cannot be used or the caps cannot be met.
    """
    names = list(prior)
    check_weights(list(prior.values()), names)
    mixtures, losses, evaluated = _read(Path(path), names)
    limits = by_domain({**dict.fromkeys(names, 1.0), **(caps or {})}, names, "--caps")
    fixed = np.ptp(mixtures, axis=0) < _SAME
    if fixed.all():
        fixed[:] = False  # for the law to refuse
    shares = np.where(fixed, mixtures[0], 0.0)
    for name, share, limit in zip(names, shares.tolist(), limits.tolist(), strict=True):
        if share > limit + _SAME:
            raise UserError(
                f"every run has {share:.4g} of domain {name!r}, and its cap is {limit:.4g}",
                fix="raise its cap, or give runs in which its share differs",
            )
    rest = 1 - float(shares.sum())
    law = fit_mixture_law(mixtures[:, ~fixed] / rest, losses)
    best = propose_mixture(
        law, np.array(list(prior.values()))[~fixed],
        importance=_importance(importance, evaluated), divergence=divergence, caps=limits[~fixed] / rest,
    )  # fmt: skip
    shares[~fixed] = best * rest
    return {
        "weights": dict(zip(names, shares.tolist(), strict=True)),
        "loss": dict(zip(evaluated, law(best).tolist(), strict=True)),
        "worst_residual": float(np.abs(law.residuals).max()),
    }


def _read(path: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read the runs {path}: {error.strerror}", fix="check the path") from error
    mixtures, losses, others = [], [], []
    evaluated: list[str] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
            shares, measured = dict(value["weights"]), dict(value["loss"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{where} is not {{"weights": {{...}}, "loss": {{...}}}}: {error}') from error
        evaluated = evaluated or list(measured)
        check_weights(list(shares.values()), list(shares))
        total = sum(shares.values())
        others.append({name: share / total for name, share in shares.items() if name not in names})
        own = {name: share for name, share in shares.items() if name in names}
        mixture = by_domain({**dict.fromkeys(names, 0.0), **own}, names, f"weights of {where}")
        check_weights(mixture, names)  # of the prior's domains one at least is mixed
        mixtures.append(mixture / mixture.sum())
        losses.append(by_domain(measured, evaluated, f"loss of {where}"))
    if not mixtures:
        raise UserError(f"{path} holds no runs")
    for name in {name: None for row in others for name in row}:
        if np.ptp([row.get(name, 0.0) for row in others]) >= _SAME:
            raise UserError(
                f"the runs of {path} have different shares of domain {name!r}, which --prior does not name",
                fix=f"give {name!r} a share in --prior, or leave it out of the runs' weights",
            )
    return np.stack(mixtures), np.stack(losses), evaluated


def propose_blend(
    shares: Sequence[float],
    losses: Sequence[Mapping[str, float]],
    prior: float,
    *,
    importance: Mapping[str, float] | None = None,
    divergence: float = 0.05,
) -> dict[str, Any]:
    """Propose a share of the second of two blends from the losses of models between them.

    Args:
        shares: of the second blend, in [0, 1], one for each model.
        losses: held-out losses of each model, nats per token.
        prior: share to stay near, between 0 and 1.
        importance: weight of each evaluated domain; None means equal.
        divergence: nats of loss per nat of divergence from the prior.

    Returns:
        ``share``, predicted ``loss`` by domain, and the ``worst_residual`` of the fit in nats.

    Raises:
        UserError: if the models do not determine the law.
    """
    evaluated = list(losses[0])
    law = fit_mixture_law(
        np.array([[1 - share, share] for share in shares]),
        np.array([[row[name] for name in evaluated] for row in losses]),
    )
    best = propose_mixture(
        law, [1 - prior, prior], importance=_importance(importance, evaluated), divergence=divergence
    )
    return {
        "share": float(best[1]),
        "loss": dict(zip(evaluated, law(best).tolist(), strict=True)),
        "worst_residual": float(np.abs(law.residuals).max()),
    }


def _importance(given: Mapping[str, float] | None, evaluated: list[str]) -> np.ndarray | None:
    if given is None:
        return None
    values = by_domain(given, evaluated, "--importance")
    check_weights(values, evaluated)
    return np.asarray(values / values.sum())
