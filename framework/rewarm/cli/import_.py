"""``rewarm import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def import_(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder with config.json and safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder to make, used as parent later.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Layout to import on, parallel.x=value.")] = None,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type of the parameters.")] = "float32",
) -> None:
    """Turn a Hugging Face folder into a sharded checkpoint that a stage can name as parent.

    A stage can also name the Hugging Face folder itself; importing once saves reading it again at every start of a
    large model.

    [bold]Example[/bold]

        rewarm import models/llama --output runs/llama
    """
    from rewarm.engine.environment import find_ranks
    from rewarm.train.import_model import import_model

    checkpoint, compared = import_model(model, output, precision, overrides or [])
    if find_ranks().rank == 0:
        print(f"imported {model} to {checkpoint}: {compared}\nuse it with parent: {output}")
