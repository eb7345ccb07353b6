"""``rewarm export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest difference in nats per token between the engine and transformers on the same held-out windows, by the
coarser of the run's precision and the export's type."""


def export(
    run: Annotated[Path, typer.Argument(help="A run, or a checkpoint of one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change, a.b.c=value.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [RUN/huggingface].")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Type of the tensors [the run's precision].")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare its held-out losses with the engine's; fail if they differ."),
    ] = False,
    sample: Annotated[str | None, typer.Option(help="Text to let the exported model continue.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite what is there, whatever it is.")] = False,
) -> None:
    """Write a run's model as a Hugging Face folder that AutoModelForCausalLM loads.

    [bold]Examples[/bold]

        rewarm export runs/quickstart-continue --check --sample "The module"

        torchrun --nproc-per-node 8 -m rewarm export runs/large parallel.tensor=8 --dtype bfloat16
    """
    from rewarm.engine.environment import find_ranks
    from rewarm.errors import UserError
    from rewarm.train.export import check_export, write_export
    from rewarm.train.open import open_model

    model = open_model(run, overrides or [])
    if output is None and model.folder == model.checkpoint:
        raise UserError(f"{run} is a checkpoint outside of its run", fix="say where to write: --output FOLDER")
    target = output or model.folder / "huggingface"
    dtype = dtype or model.config.precision
    tolerance = TOLERANCE["bfloat16" if "bfloat16" in (dtype, model.config.precision) else "float32"]
    losses = write_export(model, target, dtype, replace=replace, evaluate=check)
    if find_ranks().rank > 0:
        return
    print(f"exported {model.checkpoint} to {target}")
    if check:
        for name, ours, theirs in check_export(model, target, losses, tolerance):
            print(f"  {name}: engine {ours:.6f}, transformers {theirs:.6f} nats/token, equal to {tolerance:g}")
    if sample is not None:
        from rewarm.model.reference import generate_text

        print(f"  it writes: {generate_text(target, sample, 40, model.config.seed)!r}")
