"""``rewarm mixture average``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rewarm.cli.mixture.common import run_facts


def average(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
) -> None:
    """Mean weights of a run's new domains, as JSON that another stage takes as its mixture.weights.

    Of the loss under mixer doremi, else of the samples; each update counts as long as it was in force.

    [bold]Example[/bold]

        rewarm train large.yaml mixture.weights="$(rewarm mixture average runs/proxy)"
    """
    from rewarm.config.registry import MIXERS
    from rewarm.config.saved import saved_setting
    from rewarm.mixing.average import average_shares
    from rewarm.mixing.weight_log import WeightLog

    state, _ = run_facts(run)
    mixer = MIXERS[saved_setting(run, "mixture.mixer")].target
    shares = average_shares(
        WeightLog(run / "mixture.jsonl").entries(),
        int(state["sampler"]["sample_index"]),
        list(saved_setting(run, "data")),
        objective=mixer.steers_objective,
    )
    sys.stdout.write(json.dumps({name: round(share, 9) for name, share in shares.items()}) + "\n")
