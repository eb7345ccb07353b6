"""``rewarm config``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Show what a configuration resolves to, and every setting there is.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command("show")
def show(
    config: Annotated[Path, typer.Argument(help="YAML file of the stage.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change, as a.b.c=value.")] = None,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Print the DeepSpeed configuration that it stands for instead.")
    ] = False,
) -> None:
    """Check a configuration and print it with every default filled in.

    The output is a configuration itself; what follows from it stands in comments at its end.

    [bold]Examples[/bold]

        rewarm config show configs/quickstart/continue.yaml

        rewarm config show configs/quickstart/continue.yaml schedule.kind=wsd duration='1e9 tokens'

        rewarm config show my.yaml --deepspeed parallel.data=8
    """
    from rewarm.config.load import dump, load
    from rewarm.schedule.learning_rate import LearningRate

    settings = load(config, overrides or [])
    if deepspeed:
        from rewarm.engine.deepspeed.json import show_json

        sys.stdout.write(show_json(settings))
        if settings.parallel.data == "auto":
            typer.echo("parallel.data=auto is counted as 1 here; more ranks accumulate fewer steps each", err=True)
        return
    schedule = LearningRate(settings.schedule, settings.total_tokens, settings.tokens_per_step)
    sys.stdout.write(dump(settings))
    sys.stdout.write(f"# length: {settings.total_steps:,} steps of {settings.tokens_per_step:,} tokens, ")
    sys.stdout.write(f"{settings.total_tokens:,} tokens\n")
    sys.stdout.write(f"# learning rate: {schedule.describe()}\n")
    sys.stdout.write(f"# run folder: {settings.folder}\n")


@app.command("reference")
def reference() -> None:
    """Print the reference of every setting as Markdown.

    [bold]Example[/bold]

        rewarm config reference > docs/reference/config.md
    """
    from rewarm.config.reference import reference as text

    sys.stdout.write(text())
