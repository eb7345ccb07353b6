"""``rewarm mixture merge``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rewarm.cli.mixture.common import JsonOption, by_domain


def merge(
    first: Annotated[Path, typer.Argument(help="Run that trained on one blend, or a checkpoint of it.")],
    second: Annotated[Path, typer.Argument(help="The same on another blend.")],
    mixes: Annotated[int, typer.Option("--mixes", min=3, help="Merged models, both ends included.")] = 9,
    prior: Annotated[
        float, typer.Option("--prior", min=0.001, max=0.999, help="Share of the second blend to stay near.")
    ] = 0.5,
    importance: Annotated[
        str | None, typer.Option("--importance", help="Weight of each evaluated domain; equal if not given.")
    ] = None,
    divergence: Annotated[
        float, typer.Option("--divergence", min=0, help="Nats of loss per nat of divergence.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Choose between two blends without training those between them: merge two short runs and evaluate the merged.

    For a new stage of a long lineage: one probe with little of the new domains, one with much. The proposal is what
    the next stage takes as its mixture and replay fraction.

    [bold]Example[/bold]

        rewarm mixture merge runs/probe-10 runs/probe-90 --prior 0.5
    """
    from rewarm.mixing.propose import propose_blend
    from rewarm.train.merge import blend_shares, merge_probes

    merged = merge_probes(first, second, mixes)
    proposal = propose_blend(
        [each.share for each in merged],
        [each.losses for each in merged],
        prior,
        importance=by_domain("--importance", importance),
        divergence=divergence,
    )
    proposal["weights"] = blend_shares(merged, proposal["share"])
    if as_json:
        rows = [{"share": each.share, "weights": each.weights, "loss": each.losses} for each in merged]
        sys.stdout.write(json.dumps({**proposal, "merged": rows}) + "\n")
        return
    for each in merged:
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in each.losses.items())
        sys.stdout.write(f"share of the second {each.share:6.3f}   {losses}\n")
    sys.stdout.write(f"proposed share of the second {proposal['share']:.4f}\n")
    sys.stdout.write("".join(f"{name:<24}{share:8.4f}\n" for name, share in proposal["weights"].items()))
    sys.stdout.write("".join(f"predicted loss {name:<24}{loss:8.4f}\n" for name, loss in proposal["loss"].items()))
    sys.stdout.write(f"worst residual of the fit {proposal['worst_residual']:.4f} nats\n")
