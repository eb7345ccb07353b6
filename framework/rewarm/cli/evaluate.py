"""``rewarm evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rewarm.data.domain import Domain
    from rewarm.evaluation.held_out import HeldOutLoss


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint of one, or a Hugging Face folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of a run to change, a.b.c=value.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Domain to evaluate on, NAME=PATH; repeat for more. A run brings its own."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Held-out windows per domain.")] = None,
    sequence_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a window, for a Hugging Face folder; a run brings its own.")
    ] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Held-out loss of a model on each domain, in nats per token and bits per byte.

    [bold]Examples[/bold]

        rewarm evaluate runs/quickstart-continue

        rewarm evaluate runs/quickstart-continue/huggingface --data python=data/demo/python

        rewarm evaluate runs/large parallel.tensor=4 --windows 512
    """
    from rewarm.engine.environment import find_ranks
    from rewarm.train.evaluate import evaluate_huggingface, evaluate_run

    if (model / "config.json").is_file():
        results = evaluate_huggingface(model, _named(data or []), sequence_length, windows or 64, overrides or [])
    else:
        results = evaluate_run(model, overrides or [], _named(data or []), windows)
    if find_ranks().rank == 0:
        _print(str(model), results, as_json)


def _named(pairs: list[str]) -> dict[str, str]:
    from rewarm.errors import UserError

    named = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not name or not path:
            raise UserError(f"--data {pair!r} is not of the form NAME=PATH")
        named[name] = path
    return named


def _print(model: str, results: list[tuple[Domain, HeldOutLoss]], as_json: bool) -> None:
    from rewarm.tracking.metrics import bits_per_byte

    rows = {
        domain.name: {
            "loss": result.loss,
            "bits_per_byte": bits_per_byte(result.loss, result.bytes_per_token),
            "tokens": result.num_tokens,
        }
        for domain, result in results
    }
    if as_json:
        print(json.dumps({"model": model, "domains": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", "nats/token", "bits/byte", "tokens")
    for name, row in rows.items():
        bits = row["bits_per_byte"]
        table.add_row(name, f"{row['loss']:.4f}", "unknown" if bits is None else f"{bits:.4f}", f"{row['tokens']:,}")
    print(f"held-out loss of {model}")
    Console().print(table)
