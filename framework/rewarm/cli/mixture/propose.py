"""``rewarm mixture propose``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rewarm.cli.mixture.common import JsonOption, by_domain


def propose(
    runs: Annotated[Path, typer.Argument(help='One {"weights": {domain: share}, "loss": {domain: nats}} a line.')],
    prior: Annotated[str, typer.Option("--prior", help="Mixture to stay near, by domain; usually tokens.")],
    importance: Annotated[
        str | None, typer.Option("--importance", help="Weight of each evaluated domain; equal if not given.")
    ] = None,
    caps: Annotated[str | None, typer.Option("--caps", help="Largest share by domain, from a limit on passes.")] = None,
    divergence: Annotated[
        float, typer.Option("--divergence", min=0, help="Nats of loss per nat of divergence.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Fit the log-linear mixing law to runs on different mixtures and propose the one with the lowest loss.

    [bold]Example[/bold]

        rewarm mixture propose runs.jsonl --prior '{"web": 900, "code": 90, "math": 10}' --caps '{"math": 0.2}'
    """
    from rewarm.mixing.propose import propose as run

    proposal = run(
        runs,
        by_domain("--prior", prior) or {},
        importance=by_domain("--importance", importance),
        caps=by_domain("--caps", caps),
        divergence=divergence,
    )
    if as_json:
        sys.stdout.write(json.dumps(proposal) + "\n")
        return
    sys.stdout.write("".join(f"{name:<24}{share:8.4f}\n" for name, share in proposal["weights"].items()))
    sys.stdout.write("".join(f"predicted loss {name:<24}{loss:8.4f}\n" for name, loss in proposal["loss"].items()))
    sys.stdout.write(f"worst residual of the fit {proposal['worst_residual']:.4f} nats\n")
