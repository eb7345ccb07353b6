"""``rewarm logs``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def logs(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Show this rank's own logs instead of the job's.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on showing what is added, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines to begin with.")] = 40,
) -> None:
    """Show what a run prints: its job's output, or the log of one rank.

    [bold]Examples[/bold]

        rewarm logs runs/continue --follow

        rewarm logs runs/continue --rank 3
    """
    files = log_files(run, rank)
    positions = {}
    for path in files:
        if len(files) > 1:
            typer.echo(f"==> {path} <==")
        positions[path] = _print_tail(path, lines)
    while follow:
        time.sleep(0.5)
        for path in files:
            positions[path] = _print_from(path, positions[path])


def log_files(run: Path, rank: int | None) -> list[Path]:
    """The files that hold what was asked for.

    Raises:
        UserError: if there are none, naming the ranks that have some.
    """
    from rewarm.errors import UserError

    folder = run / "logs"
    names = ["slurm.out", "rank-0.log"] if rank is None else [f"rank-{rank}.out", f"rank-{rank}.log"]
    found = [folder / name for name in names if (folder / name).is_file()]
    if rank is None:
        found = found[:1]
    if found:
        return found
    ranks = sorted({int(path.stem.split("-")[1]) for path in folder.glob("rank-[0-9]*.*")})
    known = f"its ranks are 0 to {ranks[-1]}" if ranks else "it has not begun; see rewarm status"
    raise UserError(f"{run} has no logs" + ("" if rank is None else f" of rank {rank}"), fix=known)


def _print_tail(path: Path, count: int) -> int:
    """Print the last lines; returns the position after them."""
    block = 1 << 16
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        start, data = end, b""
        while start > 0 and data.count(b"\n") <= count:
            start = max(0, start - block)
            file.seek(start)
            data = file.read(end - start)
    typer.echo(b"\n".join(data.split(b"\n")[-count - 1 :]).decode(errors="replace"), nl=False)
    return end


def _print_from(path: Path, position: int) -> int:
    with open(path, "rb") as file:
        if file.seek(0, 2) < position:
            position = 0  # the file was replaced by a shorter one
        file.seek(position)
        data = file.read()
    typer.echo(data.decode(errors="replace"), nl=False)
    return position + len(data)
