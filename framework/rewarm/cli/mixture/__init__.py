"""``rewarm mixture``."""

from __future__ import annotations

import typer

from rewarm.cli.mixture.audit import audit
from rewarm.cli.mixture.average import average
from rewarm.cli.mixture.merge import merge
from rewarm.cli.mixture.propose import propose
from rewarm.cli.mixture.simulate import simulate
from rewarm.cli.mixture.targets import targets

app = typer.Typer(
    help="Domain weights: try a mixer, fit targets, propose a mixture, audit a run, average its weights.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command("simulate")(simulate)
app.command("targets")(targets)
app.command("propose")(propose)
app.command("merge")(merge)
app.command("audit")(audit)
app.command("average")(average)
