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

from rewarm.data import inputs, parts
from rewarm.data.assemble import REJECTS_FILE, Assembly, assemble
from rewarm.data.boundaries import chosen_bos
from rewarm.data.domain import DOMAIN_FILE, FORMAT_VERSION
from rewarm.data.encodings import check_encoding
from rewarm.data.formats import Kind
from rewarm.data.indexed import token_dtype
from rewarm.data.inputs import InputOptions, InputPlan, is_stream, plan_inputs
from rewarm.data.parts import Batch, EncodeSettings, batch_key, make_batches
from rewarm.data.pool import BatchCounts, encode_batches
from rewarm.data.publish import RESULT_FOLDER, publish, undo
from rewarm.data.readers import TextDocument, lines_before
from rewarm.data.records import TextRule, parse_template
from rewarm.data.split import HeldOutBy
from rewarm.data.streams import take_streams
from rewarm.data.tokenizer import TextTokenizer, open_tokenizer
from rewarm.errors import UserError
from rewarm.versions import __version__

WORK_FOLDER = ".build"
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
    text_template: str | None = None
    """A text with fields in braces, in place of one field."""
    text_document: TextDocument = "file"
    """What one document of a .txt file is."""
    kind: Kind | None = None
    """What every input file is; None goes by its name."""
    encoding: str | None = None
    """Of files of text without a byte-order mark; None means UTF-8."""
    subset: str | None = None
    split: str | None = None
    held_out: float = 0.01
    """Share that is held out."""
    held_out_by: HeldOutBy = "documents"
    """What it is a share of."""
    tolerance: float = 0.001
    """Largest share of malformed records."""
    deduplicate: bool = True
    end_of_document: str | None = None
    bos: bool | None = None
    """Whether the tokenizer's BOS goes in front of each document; None means no, with a notice if that is odd."""
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
    bos, notice = chosen_bos(settings.tokenizer, settings.bos)
    encode = EncodeSettings(
        tokenizer=str(settings.tokenizer.resolve()),
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_of_document=tokenizer.end_of_document_token,
        special_tokens=settings.special_tokens,
        text_key=settings.text_key,
        text_document=settings.text_document,
        part_bytes=parts.PART_BYTES,
        text_template=settings.text_template,
        beginning_of_document=bos.identity if bos else None,
    )
    with _explained_os_errors(settings.output), contextlib.ExitStack() as stack:
        job = _plan(settings, encode, stack, on_progress)
        existing = _existing(settings, job)
        if existing is not None:
            return existing, False
        if job.work is None:
            job.work = stack.enter_context(_work_folder(settings.output))
        _encode(settings, job, encode, on_progress)
        result = _finish(settings, job, tokenizer, on_progress)
        info = _describe(settings, job, tokenizer, result)
        info["beginning_of_document"] = encode.beginning_of_document
        info["bos_refused"] = settings.bos is False
        info["notices"] = [notice] if notice else []
        result.close(info)
        publish(settings.output, job.work)
    return info, True


@dataclass
class _Job:
    """What there is to do."""

    plan: InputPlan
    batches: list[Batch]
    keys: list[str]
    """Of the batches."""
    build_key: str
    was_foreign: bool
    """The folder held a pair that no build began."""
    work: Path | None = None
    """The folder of the parts; None until it is needed."""


def _plan(
    settings: BuildSettings, encode: EncodeSettings, stack: contextlib.ExitStack, on_progress: OnProgress
) -> _Job:
    output = settings.output
    was_foreign = (output / "train.bin").exists() and not (output / WORK_FOLDER).exists()
    given, work = [name for name in dict.fromkeys(settings.inputs) if is_stream(name)], None
    if given:
        # What comes only once has to be put down before it is known whether it was built already.
        work = stack.enter_context(_work_folder(output))
        on_progress("reading standard input", 0, 1)
    options = InputOptions(
        rule=TextRule(settings.text_key, settings.text_template),
        text_document=settings.text_document,
        kind=settings.kind,
        encoding=check_encoding(settings.encoding) if settings.encoding is not None else None,
        subset=settings.subset,
        split=settings.split,
        streams=take_streams(given, work) if work is not None else {},
    )
    plan = plan_inputs(settings.inputs, options)
    batches = make_batches(plan.shards, inputs.SHARD_BYTES // 8, inputs.SHARD_BYTES)
    keys = [batch_key(batch, encode) for batch in batches]
    return _Job(plan, batches, keys, _build_key(settings, keys), was_foreign, work)


def _check_settings(settings: BuildSettings) -> None:
    if not 0 <= settings.held_out < 1:
        raise UserError(f"--held-out {settings.held_out} is not a share", fix="give a number from 0 to below 1")
    if not 0 <= settings.tolerance <= 1:
        raise UserError(f"--tolerance {settings.tolerance} is not a share", fix="give a number from 0 to 1")
    if settings.workers is not None and settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: at least one is needed", fix="give a positive number")
    if settings.output.exists() and not settings.output.is_dir():
        raise UserError(f"--output {settings.output} is a file", fix="name a folder")
    if settings.encoding is not None:
        check_encoding(settings.encoding)
    if settings.text_template is not None:
        parse_template(settings.text_template)
        if settings.text_key != TextRule().key:
            raise UserError(
                f"--text-key {settings.text_key} has no effect beside --text-template", fix="remove one of them"
            )


def _build_key(settings: BuildSettings, keys: list[str]) -> str:
    held_out = [settings.held_out, settings.held_out_by]
    identity = ["rewarm-build-2", FORMAT_VERSION, held_out, settings.deduplicate, keys]
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()


def _existing(settings: BuildSettings, job: _Job) -> dict[str, Any] | None:
    """The finished build of these settings, if the folder holds it; refuses to replace another one unasked."""
    file = settings.output / DOMAIN_FILE
    info: dict[str, Any] = {}
    if file.is_file():
        with contextlib.suppress(ValueError):
            info = json.loads(file.read_text(encoding="utf-8"))
    if info.get("build_key") == job.build_key and _sizes_match(settings.output, info):
        return info
    if (file.exists() or job.was_foreign) and not settings.overwrite:
        if job.work is not None:
            shutil.rmtree(job.work)
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
        undo(output, work)
        for aside in work.glob("*.partial"):
            aside.unlink()
        result = work / RESULT_FOLDER
        if result.exists():
            shutil.rmtree(result)
        try:
            yield work
        except BaseException:
            shutil.rmtree(result, ignore_errors=True)
            raise
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


def _encode(settings: BuildSettings, job: _Job, encode: EncodeSettings, on_progress: OnProgress) -> None:
    unique = list(dict(zip(job.keys, job.batches, strict=True)).values())
    total, done = job.plan.num_bytes, 0
    assert job.work is not None

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("tokenizing", done, total)

    records = rejects = 0
    first: BatchCounts | None = None
    workers = settings.workers or len(os.sched_getaffinity(0))
    for counts in encode_batches(unique, encode, job.work, workers, on_bytes):
        records, rejects = records + counts.records, rejects + counts.rejects
        first = first if first is not None or not counts.rejects else counts
        # No use in reading a terabyte to its end with the wrong --text-key.
        if rejects >= _HOPELESS_REJECTS and rejects > max(0.5, settings.tolerance) * records:
            assert first is not None
            raise _hopeless(unique[first.batch], first, rejects, records)


def _hopeless(batch: Batch, counts: BatchCounts, rejects: int, records: int) -> UserError:
    shown = []
    for reject in counts.first_rejects:
        shard = batch[reject.shard]
        shown.append(f"  {shard.name}:{lines_before(shard) + reject.line}: {reject.why}")
    return UserError(
        f"stopped early: {rejects} of the first {records} records are malformed\n" + "\n".join(shown),
        fix=_encoding_fix(shown) or "check --text-key and the format of the input",
    )


def _encoding_fix(rejects: list[str]) -> str | None:
    if any("not UTF-8" in reject for reject in rejects):
        return "name the encoding of the input, for example --encoding cp1252; or mend it"
    return None


def _finish(settings: BuildSettings, job: _Job, tokenizer: TextTokenizer, on_progress: OnProgress) -> Assembly:
    assert job.work is not None
    folder = job.work / RESULT_FOLDER
    folder.mkdir()
    result = Assembly(folder, token_dtype(tokenizer.vocab_size))
    result.scan(job.work, job.batches, job.keys)
    if result.rejects > settings.tolerance * result.records:
        # The list of a domain that stands there is its own.
        place = (job.work if (settings.output / DOMAIN_FILE).exists() else settings.output) / REJECTS_FILE
        os.replace(folder / REJECTS_FILE, place)
        shown = "\n".join(f"  {reject}" for reject in result.first_rejects)
        mend = _encoding_fix(result.first_rejects) or "mend them"
        raise UserError(
            f"{result.rejects} of {result.records} records ({result.rejects / result.records:.2%}) are malformed, more "
            f"than --tolerance {settings.tolerance:g} allows; nothing was written\n{shown}",
            fix=f"{mend} (all are in {place}), or accept the loss: a higher --tolerance",
        )
    assemble(result, settings.held_out, settings.held_out_by, settings.deduplicate, on_progress)
    train, held_out = result.splits["train"], result.splits["held_out"]
    if train.documents == 0:
        result.abort()
        raise UserError(f"there is no document to train on among {result.records} records", fix="check the input")
    if held_out.documents == 0 and settings.held_out > 0:
        result.abort()
        raise UserError(
            f"none of {train.documents} documents falls into the held-out share of {settings.held_out:g} "
            f"({settings.held_out_by})",
            fix=f"raise it, for example --held-out {min(0.5, 5 / (train.documents + 5)):.2g}; or take that share of "
            "the tokens: --held-out-by tokens; or cut .txt files into more documents with --text-document blank; or "
            "--held-out 0 and name another held-out pair when training",
        )
    return result


def _describe(settings: BuildSettings, job: _Job, tokenizer: TextTokenizer, result: Assembly) -> dict[str, Any]:
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
        "held_out_by": settings.held_out_by,
        "deduplicated": settings.deduplicate,
        "records": result.records,
        "duplicates": result.duplicates,
        "rejects": result.rejects,
        "empty": result.empty,
        "files": job.plan.num_files,
        "files_ignored": job.plan.num_ignored,
        "files_repeated": job.plan.num_repeated,
        "inputs": list(settings.inputs),
        "text_key": settings.text_key,
        "text_template": settings.text_template,
        "build_key": job.build_key,
    }
