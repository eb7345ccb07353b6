"""The lock of a run folder: two live jobs never write into one run. No torch.

``<run>/lock/000007.json`` is the seventh owner. To become the owner is to create the next number, which a shared file
system grants to one process only (a hard link, as NFS has no dependable ``flock``); the highest number is the owner,
and a number is never given twice while an owner lives, so that a claim made on old knowledge fails. The owner touches
its file every few seconds. It ends itself when it finds a higher number, or when it could not touch its file for
:data:`LEASE_SECONDS`. A crashed owner is recognised by its process, by what SLURM says of its job, or, where neither
can be asked, by a file that has not been touched for :data:`STALE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rewarm.errors import UserError
from rewarm.files import parse_json, sync_folder, write_whole
from rewarm.resilience.owner import Owner

FOLDER = "lock"
BEAT_SECONDS = 5.0
"""Between two signs of life."""
STALE_SECONDS = 120.0
"""Without a sign of life for this long an owner that cannot be asked counts as dead: more than file systems cache."""
LEASE_SECONDS = 80.0
"""An owner that could not give a sign of life for this long ends itself, before others take it for dead: until then a
file system may fail as often as it likes."""
_LOST_STATUS = 4

log = logging.getLogger(__name__)


class RunLock:
    """Ownership of a run folder by this process.

    One thread gives signs of life, which a file system may refuse or hold up for as long as it likes; another one,
    which touches no file, ends the process when the last sign is older than :data:`LEASE_SECONDS`.

    Args:
        run: the run folder, which exists.

    Raises:
        UserError: if another live process owns it, or nobody can tell.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._made_folder = not self._folder.exists()
        self._folder.mkdir(exist_ok=True)
        self.owner = Owner.this_process()
        self._renewed = time.monotonic()
        try:
            before = self._newest_other(run)
            self._path = self._create(run, _number(before) + 1 if before else 1)
        except BaseException:
            self._remove_folder()
            raise
        self._withdrawn = False
        self._released = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"run lock {number}", daemon=True)
            for number, target in enumerate((self._beat, self._guard))
        ]
        for thread in self._threads:
            thread.start()
        try:
            if before is not None:
                self._outwait(before)
        except BaseException:
            self.withdraw()
            raise

    def withdraw(self) -> None:
        """Give the claim back as if it had never been made, before anything was written into the run."""
        self._stop()
        self._withdrawn = True
        self._path.unlink(missing_ok=True)
        self._remove_folder()

    def release(self) -> None:
        """Let the next one have it. The files of all owners but the last two go."""
        if self._withdrawn:
            return
        self._stop()
        try:
            if _newest(self._folder) == self._path:
                write_whole(self._path, json.dumps({**self.owner.to_dict(), "released": True}))
            for old in _files(self._folder)[:-2]:
                old.unlink(missing_ok=True)
        except OSError as error:
            # A run that is finished does not fail for this: whoever comes next finds that the process has ended.
            log.warning("cannot release %s: %s", self._path, error)

    def check(self) -> None:
        """Ask the file system whether the run still belongs to this process; called before something is written that
        another owner could write too.

        Raises:
            UserError: if another process has taken it over, or may have.
        """
        age = time.monotonic() - self._renewed
        if age > LEASE_SECONDS or _newest(self._folder) != self._path:
            raise UserError(
                f"{self._folder.parent} may belong to another process by now: this one gave no sign of life for "
                f"{age:.0f} s",
                fix=f"see who trains it: rewarm status {self._folder.parent}",
            )

    def _stop(self) -> None:
        self._released.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                # One that hangs in a call of a dead file system is left behind.
                thread.join(BEAT_SECONDS)

    def _remove_folder(self) -> None:
        if self._made_folder:
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _newest_other(self, run: Path) -> Path | None:
        """The last owner's file, if that owner is gone or is an earlier attempt of this very job."""
        newest = _newest(self._folder)
        if newest is None:
            return None
        owner = _live_owner(newest)
        if owner is not None and not is_earlier_attempt(owner, self.owner):
            raise owned(run, owner)
        return newest

    def _create(self, run: Path, number: int) -> Path:
        path = self._folder / f"{number:06d}.json"
        aside = self._folder / f".claim-{self.owner.host}-{os.getpid()}"
        try:
            write_whole(aside, json.dumps({**self.owner.to_dict(), "released": False}))
            os.link(aside, path)
        except FileExistsError:
            owner = _live_owner(path)
            raise owned(run, owner or self.owner) from None
        finally:
            aside.unlink(missing_ok=True)
        if _newest(self._folder) != path:
            path.unlink()
            raise owned(run, find_owner(run) or self.owner)
        sync_folder(self._folder)
        return path

    def _outwait(self, before: Path) -> None:
        """Wait until an owner that may still run, on a node that SLURM has lost for one, has ended: it has said so,
        its process is known to be gone, or it has not given a sign of life for so long that it has ended itself.

        What SLURM says of a job is not asked: ranks live on where its daemon has died."""
        if not self._has_ended(before):
            print(f"rewarm: waiting for the earlier owner of {self._folder.parent} to end", file=sys.stderr, flush=True)
        while not self._has_ended(before):
            time.sleep(min(0.2, BEAT_SECONDS))

    def _has_ended(self, before: Path) -> bool:
        with contextlib.suppress(OSError, ValueError, TypeError):
            values = _read(before)
            if values is None or values.get("released") or Owner.from_dict(values).is_gone_here():
                return True
        try:
            return _age(before) >= STALE_SECONDS
        except OSError as error:
            log.warning("cannot look at %s: %s", before, error)
            return False

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            began = time.monotonic()
            try:
                if began - self._renewed > LEASE_SECONDS:
                    self._claim_again()
                if _newest(self._folder) != self._path and not self._path_is_newest():
                    self._end("was taken over by another attempt of this job: ending")
                os.utime(self._path)
                self._renewed = began
            except OSError as error:
                log.warning("no sign of life in %s, trying again: %s", self._path, error)

    def _path_is_newest(self) -> bool:
        """A listing that lacks one's own file may be an old one that a file system still remembers: ask for the file
        itself.

        Raises:
            OSError: if it cannot be seen; a file that is gone may be a file system that is away.
        """
        newest = _newest(self._folder)
        if newest is not None and (_number(newest) > _number(self._path) or not self._path.exists()):
            return False
        os.stat(self._path)
        return True

    def _guard(self) -> None:
        """End the process two beats after its lease: so long a process that was stopped, and is continued, has to
        claim the run again. Time in which it did not run does not count."""
        beyond, before = 0.0, time.monotonic()
        tick = min(1.0, BEAT_SECONDS)
        while not self._released.wait(tick):
            now = time.monotonic()
            silent, ran, before = now - self._renewed, min(now - before, 2 * tick), now
            beyond = beyond + ran if silent > LEASE_SECONDS else 0.0
            if beyond > 2 * BEAT_SECONDS:
                self._end(f"could not be told for {silent:.0f} s that this process lives: ending before another starts")

    def _claim_again(self) -> None:
        """Become the next owner, after a silence for which another one may have taken this one for dead: renewing
        could come in the middle of its claim, and the next number is granted to one only.

        Raises:
            OSError: if the file system refuses; the claim is tried again.
        """
        path = self._folder / f"{_number(self._path) + 1:06d}.json"
        aside = self._folder / f".claim-{self.owner.host}-{os.getpid()}"
        try:
            write_whole(aside, json.dumps({**self.owner.to_dict(), "released": False}))
            os.link(aside, path)
        except FileExistsError:
            self._end("was taken over while this process did not run: ending")
        finally:
            aside.unlink(missing_ok=True)
        self._path = path

    def _end(self, why: str) -> None:
        """End the process at once: from here on another one may write."""
        message = f"rewarm: {self._folder.parent} {why}"
        print(message, file=sys.stderr, flush=True)
        # Not into the log, and not through Python's end: both may wait for a file system that hangs.
        threading.Thread(target=self._say_released, daemon=True).start()
        self._released.wait(min(1.0, BEAT_SECONDS))
        os._exit(_LOST_STATUS)

    def _say_released(self) -> None:
        with contextlib.suppress(OSError):
            if self._path.exists():
                write_whole(self._path, json.dumps({**self.owner.to_dict(), "released": True}))
        self._released.set()


def find_owner(run: Path) -> Owner | None:
    """The live owner of a run folder, or None.

    Raises:
        UserError: if nobody can tell, because the lock cannot be read.
    """
    newest = _newest(run / FOLDER)
    return None if newest is None else _live_owner(newest)


def owned(run: Path, owner: Owner) -> UserError:
    """The error for a run that somebody else is training."""
    return UserError(
        f"{run} is being trained by {owner}",
        fix=f"wait for it, or stop it: rewarm cancel {run}; or give this run another name",
    )


def _live_owner(path: Path) -> Owner | None:
    """Whose file it is, if that process lives.

    Raises:
        UserError: if the file cannot be read and is too new to be of a dead owner.
    """
    problem: Exception
    for turn in range(_READ_TURNS):
        try:
            values = _read(path)
            if values is None or values.get("released"):
                return None
            owner = Owner.from_dict(values)
            alive = owner.is_alive()
            return owner if (alive is None and _age(path) < STALE_SECONDS) or alive else None
        except (OSError, ValueError, TypeError) as error:
            problem = error
            if turn + 1 < _READ_TURNS:
                time.sleep(_READ_PAUSE)
    with contextlib.suppress(OSError):
        if _age(path) >= STALE_SECONDS:
            return None
    raise UserError(
        f"{path} cannot be read, so nobody can tell whether the run is being trained: {problem}",
        fix=f"try again; if no job trains it for certain, remove {path}",
    )


_READ_TURNS, _READ_PAUSE = 3, 0.2
"""A network file system may fail once and answer the next time."""


def _read(path: Path) -> dict[str, Any] | None:
    """What an owner wrote; None if the file has been removed.

    Raises:
        OSError, ValueError: if it cannot be read: an owner must not count as dead for that.
    """
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(values, dict):
        raise ValueError("it holds no owner")
    return values


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the file system's own clock: hosts need not agree on the time.

    Raises:
        OSError: if the file cannot be looked at.
    """
    probe = path.parent / f".clock-{os.getpid()}"
    try:
        try:
            probe.touch()
            now = probe.stat().st_mtime
        except OSError:
            now = time.time()  # a folder that this user may only read
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
        with open(path, "rb") as file:  # opening it makes NFS look again
            return now - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return STALE_SECONDS


def is_earlier_attempt(owner: Owner, mine: Owner) -> bool:
    """True for an owner that is an earlier attempt of the same SLURM job, which a later one takes over from."""
    return (
        mine.job is not None and (owner.cluster, owner.job) == (mine.cluster, mine.job) and owner.attempt < mine.attempt
    )


def _files(folder: Path) -> list[Path]:
    """The owners' files, the newest last.

    Raises:
        OSError: if the folder is there and cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbered = [name for name in names if name.endswith(".json") and name[: -len(".json")].isdigit()]
    return sorted((folder / name for name in numbered), key=_number)


def _newest(folder: Path) -> Path | None:
    files = _files(folder)
    return files[-1] if files else None


def _number(path: Path) -> int:
    return int(path.stem)
