"""``rewarm convert``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    run: Annotated[Path, typer.Argument(help="A run, or a checkpoint of one.")],
    engine: Annotated[Literal["megatron", "deepspeed"], typer.Option(help="Engine of the new run.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to make [RUN-ENGINE].")] = None,
) -> None:
    """Make a run of the other engine that goes on where this one stands, for models that both know.

    Weights, the optimizer's state, lineage, sampler and schedule are carried over, so that the new run's steps are
    those that the old one would have made. What only one engine has (parallel.*, megatron.*, deepspeed.*) is left at
    its defaults and may be set when the run goes on.

    [bold]Examples[/bold]

        rewarm convert runs/quickstart-base --engine deepspeed

        rewarm train runs/quickstart-base-deepspeed/config.yaml deepspeed.zero_stage=3
    """
    from rewarm.train.convert import convert_run

    target = output or run.parent / f"{run.name}-{engine}"
    checkpoint = convert_run(run, engine, target)
    command = shlex.join(["rewarm", "train", str(target / "config.yaml")])
    print(f"converted to {checkpoint}, with the optimizer's state; go on with: {command}")
