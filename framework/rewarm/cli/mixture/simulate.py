"""``rewarm mixture simulate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rewarm.cli.mixture.common import JsonOption, by_domain
from rewarm.errors import UserError


def simulate(
    mixer: Annotated[str, typer.Option("--mixer", help="Name of the mixer.")],
    losses: Annotated[
        Path, typer.Option("--losses", help='One {"step": s, "loss": {domain: nats}} a line, or an evaluation.jsonl.')
    ],
    weights: Annotated[
        str,
        typer.Option("--weights", help="Start weights by domain, as JSON or a JSON file; tokens, for a mixer by size."),
    ],
    initial: Annotated[
        str | None, typer.Option("--initial", help="Losses before training, by domain; the first line's if not given.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Losses to reach, or the reference model's, by domain.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the mixer, key=value; repeat for more.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a PNG of the weights.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a mixer would do on a table of losses, in seconds and without a model.

    [bold]Examples[/bold]

        rewarm mixture simulate --mixer velocitune --weights '{"en": 0.7, "code": 0.3}' --targets targets.json
        --losses runs/pilot/evaluation.jsonl --set step_size=0.2 --plot weights.png

        rewarm mixture simulate --mixer odm --weights '{"a": 1, "b": 1}' --losses losses.jsonl --json
    """
    from rewarm.mixing.loss_table import read_loss_table
    from rewarm.mixing.simulate import simulate as run

    results = run(
        mixer,
        by_domain("--weights", weights) or {},
        read_loss_table(losses),
        initial=by_domain("--initial", initial),
        targets=by_domain("--targets", targets),
        settings=_settings(settings or []),
    )
    if plot is not None:
        _plot(results, plot, mixer)
    if as_json:
        sys.stdout.writelines(json.dumps(result) + "\n" for result in results)
    else:
        _print_weights(results)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    from rewarm.config.json_text import parse_json

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise UserError(f"--set {pair!r} is not of the form key=value")
        if key in settings:
            raise UserError(f"--set {key} is given twice", fix="give each setting once")
        try:
            settings[key] = parse_json(text)
        except ValueError as error:
            raise UserError(f"--set {pair!r}: {text!r} is not a number or JSON: {error}") from error
    return settings


def _print_weights(results: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", *results[0]["weights"], "note")
    for result in results:
        shares = [f"{share:.4f}" for share in result["weights"].values()]
        table.add_row(str(result["step"]), *shares, result.get("note", ""))
    Console().print(table)


def _plot(results: Sequence[Mapping[str, Any]], place: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in results[0]["weights"]:
        axes.plot([result["step"] for result in results], [result["weights"][name] for result in results], label=name)
    axes.set(xlabel="step", ylabel="weight", ylim=(0, None), title=title)
    axes.legend()
    try:
        figure.savefig(place, dpi=150, bbox_inches="tight", format="png")
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from error
    pyplot.close(figure)
