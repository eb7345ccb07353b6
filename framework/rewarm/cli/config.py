"""``rewarm config``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewarm.errors import UserError

if TYPE_CHECKING:
    from rewarm.config.run import RunConfig

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

    The output is a configuration itself; what follows from it stands in comments at its end. Files are not opened: a
    path that is not there is a warning, and [bold]rewarm train --dry-run[/bold] looks at what they hold.

    [bold]Examples[/bold]

        rewarm config show configs/quickstart/continue.yaml

        rewarm config show configs/quickstart/continue.yaml schedule.kind=wsd duration='1e9 tokens'

        rewarm config show my.yaml --deepspeed parallel.data=8
    """
    from rewarm.config.load import dump, load
    from rewarm.config.missing import missing_paths

    settings = load(config, overrides or [])
    if deepspeed:
        from rewarm.engine.deepspeed.json import show_json

        sys.stdout.write(show_json(settings))
        if settings.parallel.data == "auto":
            typer.echo("parallel.data=auto is counted as 1 here; more ranks accumulate fewer steps each", err=True)
        return
    rate = _learning_rate(settings)
    sys.stdout.write(dump(settings))
    sys.stdout.write(f"# length: {settings.total_steps:,} steps of {settings.tokens_per_step:,} tokens, ")
    sys.stdout.write(f"{settings.total_tokens:,} tokens\n")
    sys.stdout.write(f"# learning rate: {rate}\n")
    sys.stdout.write(f"# run folder: {settings.folder}\n")
    for missing in missing_paths(settings):
        sys.stdout.write(f"# not found here: {missing}\n")
        typer.echo(f"warning  {missing}: nothing is there; training on this machine would be refused", err=True)


def _learning_rate(config: RunConfig) -> str:
    """The phases of the stage; a warm-up from the parent's rate is looked up where the parent is here."""
    from rewarm.schedule.learning_rate import LearningRate
    from rewarm.train.origin import find_origin
    from rewarm.train.parent_rate import with_parent_rate

    schedule, note = config.schedule, ""
    if schedule.start == "parent":
        try:
            schedule = with_parent_rate(config, find_origin(config).lineage).schedule
        except UserError as error:
            schedule = schedule.model_copy(update={"start": 0.0})
            note = f" (shown from 0, since schedule.start=parent is not known here: {error.message})"
    return LearningRate(schedule, config.total_tokens, config.tokens_per_step).describe() + note


@app.command("reference")
def reference() -> None:
    """Print the reference of every setting as Markdown.

    [bold]Example[/bold]

        rewarm config reference > docs/reference/config.md
    """
    from rewarm.config.reference import reference as text

    sys.stdout.write(text())
