"""The ``rewarm`` command: registers the verbs and turns errors into one message."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

import typer

from rewarm.cli import config, data, mixture, offload, tokenizer
from rewarm.cli.cancel import cancel
from rewarm.cli.convert import convert
from rewarm.cli.doctor import doctor
from rewarm.cli.evaluate import evaluate
from rewarm.cli.export import export
from rewarm.cli.import_ import import_
from rewarm.cli.logs import logs
from rewarm.cli.status import status
from rewarm.cli.submit import submit
from rewarm.cli.train import train
from rewarm.engine.environment import this_node
from rewarm.errors import NodeFault, UserError
from rewarm.launch.local import ERROR_FOLDER

app = typer.Typer(
    help="Continue the pre-training of large language models: new domains in, old knowledge kept.",
    epilog="First: [bold]rewarm data demo[/bold], then [bold]rewarm train configs/quickstart/base.yaml[/bold]",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train)
app.command("submit")(submit)
app.command("status")(status)
app.command("logs")(logs)
app.command("cancel")(cancel)
app.command("evaluate")(evaluate)
app.command("import")(import_)
app.command("export")(export)
app.command("convert")(convert)
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(config.app, name="config")
app.add_typer(mixture.app, name="mixture")
app.add_typer(offload.app, name="offload")
app.command("doctor")(doctor)


def main() -> None:
    """Entry point.

    Exit status: 0 done, 1 an error of ours, 2 something the user can mend, 3 an unfit machine, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file name need not be text in any encoding; to print it must not be what fails.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        # Accepted anywhere on the line, so that a failed command is repeated with one word added.
        arguments = [argument for argument in arguments if argument != "--debug"]
        os.environ["REWARM_DEBUG"] = "1"
    try:
        app(args=arguments, prog_name="rewarm")
    except UserError as error:
        _fail(f"rewarm: {error}", status=2, kind="user", debug=debug)
    except NodeFault as error:
        _fail(f"rewarm: {error}", status=3, kind="node", debug=debug, host=error.node)
    except SystemExit as end:
        # Typer turns the keyboard's interrupt into a silent exit of its own.
        if not isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            raise
        _fail("rewarm: interrupted", status=130, kind="interrupted", debug=False)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            _fail(_crash(error, debug), status=1, kind="crash", debug=debug)
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"rewarm: {error.strerror}{where}\n  fix: free space or make the place writable, then run the same "
              "command: it goes on from the last whole checkpoint", status=2, kind="user", debug=debug)  # fmt: skip
    except Exception as error:
        _fail(_crash(error, debug), status=1, kind="crash", debug=debug)


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Whatever was being written: the user mends these, and nothing that was saved before is lost."""


def _crash(error: Exception, debug: bool) -> str:
    """What is printed of an error that is not the user's."""
    text = "".join(traceback.format_exception(error)) if debug else f"rewarm: {type(error).__name__}: {error}"
    return f"{text.rstrip()}\n  this is not a usage error; run again with --debug for the stack trace"


def _fail(text: str, *, status: int, kind: str, debug: bool, host: str | None = None) -> None:
    """Print a message, or leave it for the launcher of these ranks, and end the process.

    ``os._exit`` because other ranks may be inside a collective with this one: an orderly shutdown of the process group
    would wait for them.
    """
    if debug:
        traceback.print_exc()
    folder = os.environ.get(ERROR_FOLDER)
    rank = int(os.environ.get("RANK", "0"))
    if folder:
        host = host or this_node()
        report = {"rank": rank, "time": time.time(), "text": text, "clear": kind != "crash", "kind": kind, "host": host}
        partial = Path(folder) / f".rank-{rank}"
        partial.write_text(json.dumps(report))
        partial.rename(Path(folder) / f"rank-{rank}.json")
    else:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
