"""``rewarm mixture audit``."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewarm.cli.mixture.common import JsonOption, run_facts

if TYPE_CHECKING:
    from rewarm.mixing.audit import Audit


def audit(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Rebuild which windows every step used from the weight log alone, and compare with what training logged.

    Of each domain it says how many windows the run drew, how many of them were different, how many of these neither it
    nor an ancestor had drawn before, and how often the most used one was drawn. What repeats are worth is counted over
    the whole lineage (Muennighoff et al. 2023).

    Exit status 1 if a step differs.

    [bold]Example[/bold]

        rewarm mixture audit runs/quickstart-continue
    """
    from rewarm.mixing.audit import audit as rebuild
    from rewarm.mixing.audit import logged_hashes
    from rewarm.mixing.weight_log import WeightLog
    from rewarm.replay.lineage import FILE_NAME, Lineage
    from rewarm.replay.windows import drawn_before
    from rewarm.tracking.metrics import read_lines

    state, batch_size = run_facts(run)
    before = None
    if (run / FILE_NAME).is_file():
        before = partial(drawn_before, Lineage(Lineage.load(run).stages[:-1]))
    result = rebuild(
        state["sampler"],
        WeightLog(run / "mixture.jsonl").entries(),
        logged_hashes(read_lines(run / "metrics.jsonl")),
        batch_size,
        before,
    )
    _print_audit(result, as_json)
    if result.different:
        raise typer.Exit(1)


def _print_audit(result: Audit, as_json: bool) -> None:
    domains = {
        name: {
            "windows": use.windows,
            "drawn": use.drawn,
            "different": use.seen,
            "fresh": use.fresh,
            "most_repeated": use.most_repeated,
            "effective": round(use.effective, 1),
        }
        for name, use in result.domains.items()
    }
    if as_json:
        facts = {"steps": result.steps, "compared": result.compared, "different": result.different, "domains": domains}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", "windows", "drawn", "different", "never drawn before", "most repeated", "worth in fresh")
    for name, use in domains.items():
        table.add_row(name, *(f"{value:,}" for value in use.values()))
    Console().print(table)
    verdict = (
        "all equal" if not result.different else f"{len(result.different)} differ, first at step {result.different[0]}"
    )
    sys.stdout.write(
        f"{result.steps:,} steps rebuilt from the weight log, {result.compared:,} hashes compared: {verdict}\n"
    )
