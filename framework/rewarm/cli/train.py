"""``rewarm train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONFIG_HELP = "YAML file of the stage."
OVERRIDES_HELP = "Settings to change, as a.b.c=value."


def train(
    config: Annotated[Path, typer.Argument(help=CONFIG_HELP)],
    overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES_HELP)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look everything up, say what would be done, and write nothing.")
    ] = False,
) -> None:
    """Train a stage; a run folder that has checkpoints is resumed.

    Alone it starts the ranks it needs on this machine; under torchrun or srun it joins the ranks it finds.

    [bold]Examples[/bold]

        rewarm train configs/quickstart/base.yaml

        rewarm train configs/quickstart/continue.yaml --dry-run

        rewarm train configs/quickstart/continue.yaml parallel.tensor=2 parallel.pipeline=2

        torchrun --nproc-per-node 8 -m rewarm train my.yaml parallel.tensor=4
    """
    from rewarm.config.load import load
    from rewarm.launch import start as launch

    settings = load(config, overrides or [])
    if dry_run:
        for line in launch.dry_run(settings):
            typer.echo(line)
        return
    launch.start(settings, ["train", str(config), *(overrides or [])])
