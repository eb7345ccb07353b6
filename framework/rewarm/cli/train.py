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
) -> None:
    """Train a stage; a run folder that has checkpoints is resumed.

    Alone it starts the ranks it needs on this machine; under torchrun or srun it joins the ranks it finds.

    [bold]Examples[/bold]

        rewarm train configs/quickstart/base.yaml

        rewarm train configs/quickstart/continue.yaml parallel.tensor=2 parallel.pipeline=2

        torchrun --nproc-per-node 8 -m rewarm train my.yaml parallel.tensor=4
    """
    from rewarm.config.load import load
    from rewarm.launch.start import start

    settings = load(config, overrides or [])
    start(settings, ["train", str(config), *(overrides or [])])
