"""``rewarm mixture targets``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewarm.cli.mixture.common import JsonOption, new_domains
from rewarm.errors import UserError

if TYPE_CHECKING:
    from rewarm.mixing.targets import Target


def targets(
    pilot: Annotated[Path, typer.Argument(help="Run of the pilot, or its evaluation.jsonl.")],
    tokens: Annotated[float, typer.Option("--tokens", help="Tokens that the stage will train on, as 2e9.")],
    output: Annotated[Path, typer.Option("--output", help="File to write; mixture.velocitune.targets can name it.")],
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="Domain to fit; repeat. The run's new ones if not given.")
    ] = None,
    skip: Annotated[float, typer.Option("--skip-tokens", help="Leave out evaluations up to here, as the warm-up.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Target losses from a pilot: a power law for each domain's evaluations, extrapolated to the whole stage.

    The pilot is an ordinary run: the same model on a sub-sample at the original weights, with a constant learning rate
    and frequent evaluations. Fitted are its new domains, whose weights a mixer decides, and not the old ones that it
    replays or only evaluates; of a file that lies in no run folder, all.

    [bold]Example[/bold]

        rewarm mixture targets runs/pilot --tokens 2e9 --skip-tokens 1e6 --output targets.json
    """
    from rewarm.mixing.loss_table import read_loss_table
    from rewarm.mixing.targets import fit_targets

    place = pilot / "evaluation.jsonl" if pilot.is_dir() else pilot
    chosen = domains or new_domains(place.parent)
    fitted = fit_targets(read_loss_table(place), int(tokens), domains=chosen, skip_tokens=int(skip))
    content = {
        "targets": {name: target.loss for name, target in fitted.items()},
        "tokens": int(tokens),
        "pilot": str(place),
        "laws": {name: _law(target) for name, target in fitted.items()},
    }
    _write(output, json.dumps(content, indent=2) + "\n")
    if as_json:
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        _print_targets(fitted, output)


def _law(target: Target) -> dict[str, Any]:
    law = target.law
    return {
        "limit": law.limit,
        "scale": law.scale,
        "exponent": law.exponent,
        "residuals": list(law.residuals),
        "initial": target.initial,
        "final": target.final,
    }


def _print_targets(fitted: Mapping[str, Target], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", "initial", "pilot's end", "target", "worst residual")
    for name, target in fitted.items():
        numbers = (target.initial, target.final, target.loss, target.law.worst_residual)
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    Console().print(table)
    sys.stdout.write(f"written to {output}\n")


def _write(place: Path, text: str) -> None:

    try:
        place.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from error
