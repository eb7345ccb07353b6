"""What the subcommands of ``rewarm mixture`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rewarm.config.json_text import parse_json
from rewarm.errors import UserError

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
"""How every subcommand is asked for JSON."""


def run_facts(run: Path) -> tuple[dict[str, Any], int]:
    """State of a run's newest checkpoint, and its samples per step.

    Raises:
        UserError: if the folder is no run, or has no checkpoint.
    """
    from rewarm.checkpoint.store import list_checkpoints
    from rewarm.config.saved import saved_setting
    from rewarm.train.state import read_run_state

    checkpoints = list_checkpoints(run / "checkpoints")
    if not (run / "config.yaml").is_file() or not checkpoints:
        raise UserError(f"{run} is not a run with a checkpoint", fix="give the folder of a run that has saved once")
    return read_run_state(checkpoints[0]), int(saved_setting(run, "batch.global_batch_size"))


def new_domains(run: Path) -> list[str] | None:
    """The domains under ``data`` of a run, or None where the folder is no run."""
    from rewarm.config.saved import saved_setting

    return list(saved_setting(run, "data")) if (run / "config.yaml").is_file() else None


def by_domain(option: str, text: str | None) -> dict[str, float] | None:
    """Numbers by domain, given as JSON or as the name of a JSON file (also one with ``targets`` inside).

    Args:
        option: whose value it is, for the message.
        text: the value; None gives None.

    Raises:
        UserError: if it is neither.
    """
    if text is None:
        return None
    fix = f"write {option} '{{\"domain\": number, ...}}', or name a JSON file that holds that"
    try:
        value = parse_json(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8-sig"))
        value = value.get("targets", value) if option == "--targets" else value
        return {str(name): float(number) for name, number in value.items()}
    except OSError as error:
        raise UserError(f"{option}: cannot read {text}: {error.strerror}", fix=fix) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{option} {text!r} is not numbers by domain: {error}", fix=fix) from error
