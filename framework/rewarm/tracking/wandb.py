"""Weights & Biases, beside the training and never in its way.

Importing wandb and starting its service takes seconds, so both happen in a thread that begins with the first
trained step, and lines wait in a queue. Any failure ends the recording with one warning; the run's own files have
everything. A resumed run continues the same wandb run: its id is kept in ``<run>/wandb.json`` together with the
last step that wandb has for sure. Later ones are sent from the run's files first, so that a kill leaves no gap, and
steps up to that one, trained again after an older checkpoint, are not sent twice.
"""

from __future__ import annotations

import configparser
import json
import netrc
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlsplit

from rewarm.config.training import WandbConfig
from rewarm.files import parse_json, write_whole

REMEMBER_EVERY = 10.0
"""Seconds between notes of the last step that wandb has; what came after the note is sent again after a kill.

A note names what was handed over before the one before it: offline, wandb's service writes every five seconds or so,
and what it holds then dies with it.
"""
INIT_TIMEOUT = 45.0
"""Seconds that the server has to answer before the run is recorded offline."""
CLOSE_TIMEOUT = 60.0
"""Seconds that a finished run waits for wandb."""
HURRIED_CLOSE_TIMEOUT = 10.0
"""Seconds that one waits that failed, whose message the user is waiting for, or that was told to stop, whose time is
short."""

_END = None


def find_key() -> str | None:
    """Where a wandb key is configured (``WANDB_API_KEY``, an identity token or a netrc file), or None.

    Looks without importing wandb, and never returns the key.
    """
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return name
    host = urlsplit(_base_url()).hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if not path:
            continue
        try:
            found = netrc.netrc(os.path.expanduser(path)).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return path
    return None


def _base_url() -> str:
    """The server that wandb talks to, from the environment or its settings file."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"]
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    settings = configparser.ConfigParser()
    try:
        settings.read(os.path.join(folder, "settings"))
    except configparser.Error:
        return "https://api.wandb.ai"
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")


def resolve_mode(config: WandbConfig) -> str:
    """``online``, ``offline`` or ``disabled``: the configured mode, else ``WANDB_MODE``, else by the key."""
    match config.mode:
        case "online" | "offline" | "disabled":
            return config.mode
        case "auto":
            wanted = os.environ.get("WANDB_MODE", "")
            if wanted in ("online", "offline", "disabled"):
                return wanted
            return "online" if find_key() else "offline"
    assert_never(config.mode)


class WandbWriter:
    """Hands lines to a wandb run from a thread of its own.

    Args:
        run_folder: the run; wandb's files go to ``<run_folder>/wandb``.
        config: project, entity, group and mode; not disabled.
        config_dump: the resolved configuration, shown with the run.
        resumed: True continues the wandb run of ``wandb.json``; False begins another.
        backlog: gives step and curves of the lines that the run's files had at the start, in order; what wandb does
            not have of them is sent first. Called from the thread.
        say: prints one line for the user; called from the thread.
    """

    def __init__(
        self,
        run_folder: Path,
        config: WandbConfig,
        config_dump: Mapping[str, Any],
        resumed: bool,
        say: Callable[[str], None],
        backlog: Callable[[], Iterable[tuple[int, Mapping[str, float]]]] = tuple,
    ) -> None:
        self._folder = run_folder
        self._config = config
        self._config_dump = config_dump
        self._say = say
        self._note = run_folder / "wandb.json"
        self._id, self._floor = self._recall() if resumed else (secrets.token_hex(4), -1)
        self._queue: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._backlog = backlog
        self._exit_code = 0
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Queue the curves of a step; returns at once."""
        if self._failed:
            return
        self._queue.put((step, scalars))
        if step > 0 and self._thread.ident is None:
            self._thread.start()

    def close(self, exit_code: int, *, hurried: bool = False) -> None:
        """Hand over what waits and mark the run finished (0) or failed; waits a minute at most, or ten seconds if
        hurried or failed. What is left then is sent by the resumed run."""
        if self._thread.ident is None:
            return  # nothing was trained, so there is nothing to show
        self._exit_code = exit_code
        self._queue.put(_END)
        timeout = HURRIED_CLOSE_TIMEOUT if hurried or exit_code else CLOSE_TIMEOUT
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._say(f"warning: wandb did not finish within {timeout:.0f} s; the run's own files are complete")

    def _work(self) -> None:
        try:
            run = self._start()
            last = self._pump(run)
            run.finish(exit_code=self._exit_code)
            self._remember(last)
        except Exception as error:  # wandb must never end a training run, whatever it raises
            self._failed = True
            first = (str(error).strip().splitlines() or [""])[0]
            self._say(f"warning: wandb stopped recording ({type(error).__name__}: {first}); the run goes on without it")

    def _pump(self, run: Any) -> int:
        """Hand over lines until the end; returns the last step. A step counts as handed over only once a later one
        begins, because its evaluation may still come."""
        last = whole = waiting = self._floor
        noted = time.monotonic()
        for step, scalars in self._lines():
            if time.monotonic() - noted >= REMEMBER_EVERY:
                self._remember(waiting)
                waiting, noted = whole, time.monotonic()
            if step > last:
                whole, last = last, step
            if step > self._floor:
                run.log(dict(scalars), step=step)
        return last

    def _lines(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """What the files had, then the queue; an empty line of an old step whenever nothing comes for a while."""
        yield from self._backlog()
        while True:
            try:
                item = self._queue.get(timeout=REMEMBER_EVERY)
            except queue.Empty:
                item = (-1, {})
            if item is _END:
                return
            yield item

    def _start(self) -> Any:
        """The wandb run; offline when the server cannot be reached, as on most compute nodes."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._remember(self._floor)
        mode = resolve_mode(self._config)
        try:
            run = self._init(wandb, mode)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError) as error:
            if self._config.mode == "online" or mode == "offline":
                raise
            self._say(f"warning: wandb cannot be reached ({type(error).__name__}); recording offline")
            wandb.teardown()  # its service still holds the id of the failed run
            mode, run = "offline", self._init(wandb, "offline")
        if mode == "online":
            self._floor = run.starting_step - 1  # the server knows better than the note
            self._say(f"wandb: {run.url}")
        else:
            self._say(f"wandb: offline; to upload: wandb sync {self._folder}/wandb/offline-run-*-{self._id}")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            name=self._folder.name,
            id=self._id,
            resume="allow" if mode == "online" else None,
            dir=str(self._folder),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, save_code=False, init_timeout=INIT_TIMEOUT),
        )
        run.config.update(dict(self._config_dump), allow_val_change=True)
        return run

    def _recall(self) -> tuple[str, int]:
        try:
            note = parse_json(self._note.read_bytes())
            return str(note["id"]), int(note["last_step"])
        except (OSError, ValueError, KeyError, TypeError):
            return secrets.token_hex(4), -1

    def _remember(self, last_step: int) -> None:
        write_whole(self._note, json.dumps({"id": self._id, "last_step": last_step}) + "\n")
