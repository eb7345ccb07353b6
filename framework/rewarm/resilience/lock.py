"""The lock of a run folder: two live jobs never write into one run. No torch.

``<run>/lock/000007.json`` is the seventh owner. To become the owner is to create the next number, which a shared file
system grants to one process only (a hard link, as NFS has no dependable ``flock``); the highest number is the owner,
and numbers never fall, so that a claim made on old knowledge fails. The owner touches its file every few seconds and
ends itself when it finds a higher number. A crashed owner is recognised by its process, by what SLURM says of its job,
or, where neither can be asked, by a file that has not been touched for :data:`STALE_SECONDS`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

from rewarm.errors import UserError
from rewarm.resilience.owner import Owner

FOLDER = "lock"
BEAT_SECONDS = 5.0
"""Between two signs of life."""
STALE_SECONDS = 120.0
"""Without a sign of life for this long an owner that cannot be asked counts as dead: more than file systems cache."""
_LOST_STATUS = 4

log = logging.getLogger(__name__)


class RunLock:
    """Ownership of a run folder by this process.

    Args:
        run: the run folder, which exists.

    Raises:
        UserError: if another live process owns it.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._folder.mkdir(exist_ok=True)
        self.owner = Owner.this_process()
        before = self._newest_other(run)
        self._path = self._create(run, _number(before) + 1 if before else 1)
        if before is not None:
            self._outwait(before)
        for old in _files(self._folder)[:-2]:
            old.unlink(missing_ok=True)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the next one have it."""
        self._released.set()
        self._thread.join()
        _write(self._path, {**self.owner.to_dict(), "released": True})

    def _newest_other(self, run: Path) -> Path | None:
        """The last owner's file, if that owner is gone or is an earlier attempt of this very job."""
        newest = _newest(self._folder)
        if newest is None:
            return None
        owner = _live_owner(newest)
        if owner is not None and not _is_earlier_attempt(owner, self.owner):
            raise owned(run, owner)
        return newest

    def _create(self, run: Path, number: int) -> Path:
        path = self._folder / f"{number:06d}.json"
        aside = self._folder / f".claim-{self.owner.host}-{os.getpid()}"
        aside.write_text(json.dumps({**self.owner.to_dict(), "released": False}))
        try:
            os.link(aside, path)
        except FileExistsError:
            owner = _live_owner(path)
            raise owned(run, owner or self.owner) from None
        finally:
            aside.unlink()
        if _newest(self._folder) != path:
            path.unlink()
            raise owned(run, find_owner(run) or self.owner)
        return path

    def _outwait(self, before: Path) -> None:
        """Give an earlier attempt of this job, which a lost node may still be running, the time to see that it has
        lost the lock and to end."""
        deadline = time.monotonic() + 3 * BEAT_SECONDS
        while time.monotonic() < deadline and _live_owner(before) is not None:
            time.sleep(0.2)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            if _newest(self._folder) != self._path:
                message = f"rewarm: {self._folder.parent} was taken over by another attempt of this job: ending"
                log.error(message)
                print(message, file=sys.stderr, flush=True)
                _write(self._path, {**self.owner.to_dict(), "released": True})
                os._exit(_LOST_STATUS)
            try:
                os.utime(self._path)
            except OSError as error:
                log.warning("cannot touch %s: %s", self._path, error)


def find_owner(run: Path) -> Owner | None:
    """The live owner of a run folder, or None."""
    newest = _newest(run / FOLDER)
    return None if newest is None else _live_owner(newest)


def owned(run: Path, owner: Owner) -> UserError:
    """The error for a run that somebody else is training."""
    return UserError(
        f"{run} is being trained by {owner}",
        fix=f"wait for it, or stop it: rewarm cancel {run}; or give this run another name",
    )


def _live_owner(path: Path) -> Owner | None:
    try:
        values = json.loads(path.read_text())
        owner = Owner.from_dict(values)
    except (OSError, ValueError, TypeError):
        # Files appear whole, by link or rename: one that cannot be read has been removed since.
        return None
    if values.get("released"):
        return None
    alive = owner.is_alive()
    if alive is None:
        alive = _age(path) < STALE_SECONDS
    return owner if alive else None


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the file system's own clock: hosts need not agree on the time."""
    probe = path.parent / f".clock-{os.getpid()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        with open(path, "rb") as file:  # opening it makes NFS look again
            return now - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return STALE_SECONDS
    except OSError:
        return time.time() - path.stat().st_mtime


def _is_earlier_attempt(owner: Owner, mine: Owner) -> bool:
    return (
        mine.job is not None and (owner.cluster, owner.job) == (mine.cluster, mine.job) and owner.attempt < mine.attempt
    )


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.json"), key=_number) if folder.is_dir() else []


def _newest(folder: Path) -> Path | None:
    files = _files(folder)
    return files[-1] if files else None


def _number(path: Path) -> int:
    return int(path.stem)


def _write(path: Path, values: dict[str, object]) -> None:
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(json.dumps(values))
    os.replace(aside, path)
