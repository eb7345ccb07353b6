"""``rewarm data build``: files of text to a domain folder.

Shards are tokenized in parallel into parts under ``OUTPUT/.build``; then one pass over the parts, in input order,
drops duplicates, splits, and writes the two pairs. The result depends on the inputs and settings alone: not on the
number of workers, nor on how often the build was killed on its way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewarm.data import parts
from rewarm.data.assemble import Assembly, assemble
from rewarm.data.domain import DOMAIN_FILE, FORMAT_VERSION
from rewarm.data.indexed import token_dtype
from rewarm.data.inputs import InputPlan, plan_inputs
from rewarm.data.parts import EncodeSettings, shard_key
from rewarm.data.pool import ShardCounts, encode_shards
from rewarm.data.readers import Shard
from rewarm.data.tokenizer import TextTokenizer, open_tokenizer
from rewarm.errors import UserError
from rewarm.versions import __version__

WORK_FOLDER = ".build"
REJECTS_FILE = "rejects.jsonl"
_HOPELESS_REJECTS = 100

OnProgress = Callable[[str, int, int], None]
"""Called with (what is done now, units done, units in all)."""


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Everything that ``rewarm data build`` is told."""

    inputs: tuple[str, ...]
    output: Path
    tokenizer: Path
    text_key: str = "text"
    text_document: Literal["file", "line", "blank"] = "file"
    """What one document of a .txt file is."""
    subset: str | None = None
    split: str = "train"
    held_out: float = 0.01
    """Expected share of the documents that is held out."""
    tolerance: float = 0.001
    """Largest share of malformed records."""
    deduplicate: bool = True
    end_of_document: str | None = None
    special_tokens: Literal["parse", "text"] = "parse"
    workers: int | None = None
    """Cores to use; None means all that this process may use."""
    overwrite: bool = False


def build_domain(settings: BuildSettings, on_progress: OnProgress = lambda *_: None) -> tuple[dict[str, Any], bool]:
    """Build a domain folder, or go on with a build that was stopped.

    Args:
        settings: what to build and how.
        on_progress: told how far it is.

    Returns:
        The content of ``domain.json``, and False if the folder already held exactly this build.

    Raises:
        UserError: whatever of the input cannot be used, too many malformed records, a full disk.
    """
    _check_settings(settings)
    tokenizer = open_tokenizer(
        settings.tokenizer, end_of_document=settings.end_of_document, special_tokens=settings.special_tokens
    )
    plan = plan_inputs(
        settings.inputs,
        text_key=settings.text_key,
        text_document=settings.text_document,
        subset=settings.subset,
        split=settings.split,
    )
    encode = EncodeSettings(
        tokenizer=str(settings.tokenizer.resolve()),
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_of_document=tokenizer.end_of_document_token,
        special_tokens=settings.special_tokens,
        text_key=settings.text_key,
        text_document=settings.text_document,
        part_bytes=parts.PART_BYTES,
    )
    keys = [shard_key(shard, encode) for shard in plan.shards]
    build_key = _build_key(settings, keys)
    existing = _existing(settings, build_key)
    if existing is not None:
        return existing, False
    with _explained_os_errors(settings.output), _work_folder(settings.output) as work:
        _encode(settings, plan, keys, encode, work, on_progress)
        result = _finish(settings, plan, keys, work, tokenizer, on_progress)
        info = _describe(settings, plan, tokenizer, result, build_key)
        result.publish(settings.output, info)
    return info, True


def _check_settings(settings: BuildSettings) -> None:
    if not 0 <= settings.held_out < 1:
        raise UserError(f"--held-out {settings.held_out} is not a share", fix="give a number from 0 to below 1")
    if not 0 <= settings.tolerance <= 1:
        raise UserError(f"--tolerance {settings.tolerance} is not a share", fix="give a number from 0 to 1")
    if settings.workers is not None and settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: at least one is needed", fix="give a positive number")
    if settings.output.exists() and not settings.output.is_dir():
        raise UserError(f"--output {settings.output} is a file", fix="name a folder")


def _build_key(settings: BuildSettings, keys: list[str]) -> str:
    identity = ["rewarm-build-1", FORMAT_VERSION, settings.held_out, settings.deduplicate, keys]
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def _existing(settings: BuildSettings, build_key: str) -> dict[str, Any] | None:
    """The finished build of these settings, if the folder holds it; refuses to replace another one unasked."""
    file = settings.output / DOMAIN_FILE
    info: dict[str, Any] = {}
    if file.is_file():
        with contextlib.suppress(ValueError):
            info = json.loads(file.read_text())
    if info.get("build_key") == build_key and _sizes_match(settings.output, info):
        return info
    foreign = (settings.output / "train.bin").exists() and not (settings.output / WORK_FOLDER).exists()
    if (file.exists() or foreign) and not settings.overwrite:
        raise UserError(
            f"{settings.output} already holds data that was built from other inputs or with other settings",
            fix="name another --output, or replace it: --overwrite",
        )
    return None


def _sizes_match(output: Path, info: dict[str, Any]) -> bool:
    itemsize = token_dtype(info["vocab_size"]).itemsize
    for split in ("train", "held_out"):
        pair = [output / f"{split}{suffix}" for suffix in (".bin", ".idx")]
        if not info[split]["tokens"]:
            continue
        if not all(file.is_file() for file in pair) or pair[0].stat().st_size != info[split]["tokens"] * itemsize:
            return False
    return True


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """The folder of the parts, for this process alone, removed once the build is whole."""
    work = output / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another build is writing to {output}", fix="wait for it, or name another --output"
            ) from None
        for aside in work.glob("*.partial"):
            aside.unlink()
        yield work
        shutil.rmtree(work)


@contextlib.contextmanager
def _explained_os_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or output
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left while writing {place}",
                fix="free some, then run the same command again: what is done is kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{place}: {error.strerror}", fix="name an --output that can be written, and inputs that can be read"
            ) from error
        raise UserError(
            f"{place}: {error.strerror or error}", fix="run the same command again once it is mended"
        ) from error


def _encode(
    settings: BuildSettings,
    plan: InputPlan,
    keys: list[str],
    encode: EncodeSettings,
    work: Path,
    on_progress: OnProgress,
) -> None:
    unique = list(dict(zip(keys, plan.shards, strict=True)).values())
    total, done = sum(shard.weight for shard in unique), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("tokenizing", done, total)

    records = rejects = 0
    workers = settings.workers or len(os.sched_getaffinity(0))
    for counts in encode_shards(unique, encode, work, workers, on_bytes):
        records, rejects = records + counts.records, rejects + counts.rejects
        # No use in reading a terabyte to its end with the wrong --text-key.
        if rejects >= _HOPELESS_REJECTS and rejects > max(0.5, settings.tolerance) * records:
            raise _hopeless(unique[counts.shard], counts, rejects, records)


def _hopeless(shard: Shard, counts: ShardCounts, rejects: int, records: int) -> UserError:
    shown = "\n".join(f"  {shard.path}: {why}" for _, why in counts.first_rejects)
    return UserError(
        f"stopped early: {rejects} of the first {records} records are malformed\n{shown}",
        fix="check --text-key and the format of the input",
    )


def _finish(
    settings: BuildSettings,
    plan: InputPlan,
    keys: list[str],
    work: Path,
    tokenizer: TextTokenizer,
    on_progress: OnProgress,
) -> Assembly:
    result = Assembly(settings.output, token_dtype(tokenizer.vocab_size))
    result.scan(work, plan.shards, keys, settings.output / REJECTS_FILE)
    if result.rejects > settings.tolerance * result.records:
        shown = "\n".join(f"  {reject}" for reject in result.first_rejects)
        raise UserError(
            f"{result.rejects} of {result.records} records ({result.rejects / result.records:.2%}) are malformed, more "
            f"than --tolerance {settings.tolerance:g} allows; nothing was written\n{shown}",
            fix=f"mend them (all are in {settings.output / REJECTS_FILE}), or accept the loss: a higher --tolerance",
        )
    assemble(result, work, settings.held_out, settings.deduplicate, on_progress)
    train, held_out = result.splits["train"], result.splits["held_out"]
    if train.documents == 0:
        result.abort()
        raise UserError(f"there is no document to train on among {result.records} records", fix="check the input")
    if held_out.documents == 0 and settings.held_out > 0:
        result.abort()
        raise UserError(
            f"none of {train.documents} documents falls into the held-out share of {settings.held_out:g}",
            fix=f"raise it, for example --held-out {min(0.5, 5 / (train.documents + 5)):.2g}; or cut .txt files into "
            "more documents with --text-document blank; or --held-out 0 and name another held-out pair when training",
        )
    return result


def _describe(
    settings: BuildSettings, plan: InputPlan, tokenizer: TextTokenizer, result: Assembly, build_key: str
) -> dict[str, Any]:
    folder, output = settings.tokenizer.resolve(), settings.output.resolve()
    beside = folder.is_relative_to(output.parent)
    return {
        "format": FORMAT_VERSION,
        "rewarm": __version__,
        # Relative where the two lie together, so that they can be moved together.
        "tokenizer": os.path.relpath(folder, output) if beside else str(folder),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "max_token_id": result.max_token_id,
        "end_of_document": tokenizer.end_of_document,
        "dtype": result.dtype.name,
        "train": result.splits["train"].describe(),
        "held_out": result.splits["held_out"].describe(),
        "held_out_fraction": settings.held_out,
        "deduplicated": settings.deduplicate,
        "records": result.records,
        "duplicates": result.duplicates,
        "rejects": result.rejects,
        "empty": result.empty,
        "files": plan.num_files,
        "files_ignored": plan.num_ignored,
        "inputs": list(settings.inputs),
        "text_key": settings.text_key,
        "build_key": build_key,
    }
