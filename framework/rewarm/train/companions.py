"""What a run keeps beside its weights for the export: tokenizer, generation config and licence, with their digests."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewarm.checkpoint import store
from rewarm.data.domain import Domain
from rewarm.data.model_folder import read_json
from rewarm.errors import UserError
from rewarm.model.files import carry_files, carry_tokenizer, list_carried
from rewarm.model.generation import write_generation_config
from rewarm.train.parent import TOKENIZER, Parent, tokenizer_of

DIGESTS = "digests.json"


def keep_companions(run: Path, tokenizer: Path | None, parent: Parent | None, domains: list[Domain]) -> None:
    """Give a run folder its copy of the tokenizer, and of the generation config and licence of the model it continues.

    Args:
        run: the run folder; what it kept before is replaced.
        tokenizer: folder of the tokenizer, or None.
        parent: the model that is continued; None for random weights, which get a generation config of their own.
        domains: those that are trained on.

    Raises:
        UserError: if a file is a link out of its folder, a pipe, a device or too large.
    """
    source = None if parent is None else parent.companions
    if tokenizer is None and source is None:
        shutil.rmtree(run / TOKENIZER, ignore_errors=True)
        return
    with _replaced(run / TOKENIZER) as aside:
        if tokenizer is not None:
            carry_tokenizer(tokenizer, aside)
        if source is not None:
            carry_files(source, aside, kind="model")
        elif tokenizer is not None and parent is None:
            ends = [domain.info.get("end_of_document") for domain in domains]
            write_generation_config(aside, [end for end in ends if end is not None])


def copy_companions(source: Path, run: Path) -> None:
    """Give a run folder what another run keeps.

    Raises:
        UserError: if it was damaged since, or holds links out of it.
    """
    check_digests(source)
    with _replaced(run / TOKENIZER) as aside:
        if tokenizer_of(source) is not None:
            carry_tokenizer(source, aside)
        carry_files(source, aside, kind="model")


def check_digests(folder: Path) -> None:
    """Refuse a run's copy of a tokenizer that is not what was copied. Folders without digests pass.

    Raises:
        UserError: naming the file.
    """
    known = read_json(folder, DIGESTS)
    if known is None:
        return
    names = sorted(known.keys() | list_carried(folder).keys())
    now = store.digest_files(folder, [name for name in names if (folder / name).is_file()])
    for name in names:
        if now.get(name) != known.get(name):
            what = "is missing" if not (folder / name).exists() else "is not what the run was given"
            raise UserError(
                f"{folder / name} {what}",
                fix="put the file back from the model that the run started from; or, if the change is meant, remove "
                f"{folder / DIGESTS}",
            )


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of another one, with the digests of what is in it."""
    aside = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        yield aside
        names = [str(path.relative_to(aside)) for path in sorted(aside.rglob("*")) if path.is_file()]
        entries = store.digest_files(aside, names, sync=True)
        (aside / DIGESTS).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
