"""Tables and samples for the screen: what a build made, and what a domain holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarm.config.data import DomainConfig
from rewarm.data.assemble import REJECTS_FILE
from rewarm.data.build import OnProgress
from rewarm.data.domain import Domain, open_domain
from rewarm.data.indexed import IndexedTokens
from rewarm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from tokenizers import Tokenizer

_SAMPLE_LETTERS = 400


@contextmanager
def progress_on(console: Console, title: str) -> Iterator[OnProgress]:
    """A progress bar that follows the calls of what is yielded: bytes while tokenizing, else pieces."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<32}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None, amount="")

        def follow(what: str, done: int, total: int) -> None:
            amount = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB" if what.startswith("tokenizing") else f"{done}/{total}"
            progress.update(task, description=f"{title}: {what}", completed=done, total=total, amount=amount)

        yield follow


def build_table(info: dict[str, Any]) -> Table:
    """What a build made of its input."""
    from rich.table import Table

    table = Table(show_header=True)
    for heading in ("split", "documents", "tokens", "bytes", "bytes per token"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split in ("train", "held_out"):
        counts = info[split]
        table.add_row(split, *_counted(counts["documents"], counts["tokens"], counts["bytes"]))
    return table


def build_caption(folder: Path, info: dict[str, Any]) -> str:
    """What became of the files and records, and what should be known of the result."""
    caption = (
        f"{info['records']:,} records of {info['files']:,} files: {info['duplicates']:,} duplicates dropped, "
        f"{info['empty']:,} empty, {info['rejects']:,} malformed"
        + (f" (see {folder / REJECTS_FILE})" if info["rejects"] else "")
    )
    if info["files_ignored"]:
        caption += f"; {info['files_ignored']:,} files of other kinds left out"
    if info.get("files_repeated"):
        caption += f"; {info['files_repeated']:,} files reached twice and read once"
    return "\n".join([caption, *_share_notice(info), *(f"note: {notice}" for notice in info.get("notices", []))])


def _share_notice(info: dict[str, Any]) -> list[str]:
    """A share of the documents can be far from that of the tokens where documents are few, or differ in length."""
    wanted, held_out = info["held_out_fraction"], info["held_out"]["tokens"]
    share = held_out / (held_out + info["train"]["tokens"])
    if wanted == 0 or info.get("held_out_by") == "tokens" or 0.5 * wanted <= share <= 2 * wanted:
        return []
    return [f"note: {share:.2%} of the tokens are held out; --held-out-by tokens gets nearer to {wanted:.2%}"]


def _counted(documents: int, tokens: int, num_bytes: int) -> list[str]:
    ratio = f"{num_bytes / tokens:.3f}" if tokens else "-"
    return [f"{documents:,}", f"{tokens:,}", f"{num_bytes:,}", ratio]


@dataclass(frozen=True, slots=True)
class Sample:
    """The beginning of one document."""

    document: int
    num_tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What ``rewarm data inspect`` shows."""

    rows: list[tuple[str, str]]
    samples: list[Sample]


def inspect_domain(path: str, sequence_length: int, num_samples: int, tokenizer: str | None) -> Inspection:
    """Look at a domain folder or a bare pair.

    Args:
        path: folder or prefix.
        sequence_length: S of the windows that are counted.
        num_samples: documents of the train split to decode, evenly over it.
        tokenizer: folder that decodes a bare pair; None means the one in ``domain.json``.

    Raises:
        UserError: if it cannot be opened.
    """
    from rewarm.data.tokenizer import open_backend

    domain, whole = _open_for_a_look(path)
    folder = tokenizer or domain.tokenizer
    decoder = open_backend(Path(folder)) if folder and (tokenizer or Path(folder).is_dir()) else None
    if decoder is not None:
        domain.measure_bytes_per_token(decoder)
    source = domain.train.source
    documents = source.last_document_at_or_before(domain.train.stop - 1) + 1
    held_out = domain.held_out.source.num_documents - (0 if domain.held_out.start == 0 else documents)
    ratio = domain.held_out_bytes_per_token
    rows = [
        ("path", path),
        ("kind", "folder of rewarm data build" if domain.info else "bare Megatron pair"),
        ("token type", str(source.dtype)),
        ("train", _split_row(documents, domain.train.num_tokens, sequence_length)),
        ("held out", whole or _split_row(held_out, domain.held_out.num_tokens, sequence_length)),
        ("bytes per token", "unknown without --tokenizer" if ratio is None else f"{ratio:.3f} (held out)"),
        ("tokenizer", _tokenizer_row(domain, folder)),
        ("vocabulary", f"{domain.vocab_size:,}, largest id {domain.max_token_id:,}" if domain.info else "unknown"),
        ("fingerprint", domain.fingerprint),
    ]
    return Inspection(rows, _samples(source, documents, num_samples, decoder))


def _open_for_a_look(path: str) -> tuple[Domain, str]:
    """The domain; and, where nothing can be held out of a bare pair, why not, with all of it as its train split."""
    try:
        return open_domain(Path(path).name, DomainConfig.model_construct(path=path), 1, None), ""
    except UserError as error:
        if Path(path).is_dir() or not Path(f"{path}.bin").is_file() or IndexedTokens(path).num_tokens < 2:
            raise
        return open_domain(
            Path(path).name, DomainConfig.model_construct(path=path, held_out=path), 1, None
        ), f"none: {error.message}"


def _split_row(documents: int, tokens: int, sequence_length: int) -> str:
    windows = max(0, tokens - 1) // sequence_length
    return f"{tokens:,} tokens, {documents:,} documents, {windows:,} windows of {sequence_length:,}"


def _tokenizer_row(domain: Domain, folder: str | None) -> str:
    from rewarm.data.tokenizer import tokenizer_fingerprint

    if folder is None:
        return "unknown: give --tokenizer to decode"
    if not Path(folder).is_dir():
        return f"{folder} (missing: give --tokenizer to decode)"
    if domain.tokenizer_fingerprint is None:
        return folder
    same = tokenizer_fingerprint(folder) == domain.tokenizer_fingerprint
    return folder if same else f"{folder} (NOT the one the domain was built with)"


def _samples(source: IndexedTokens, documents: int, count: int, decoder: Tokenizer | None) -> list[Sample]:
    samples = []
    for place in range(min(count, documents)):
        document = documents * place // min(count, documents)
        tokens = source.document(document)
        head = tokens[:_SAMPLE_LETTERS].tolist()
        text = str(head[:40]) if decoder is None else decoder.decode(head, skip_special_tokens=False)
        samples.append(Sample(document, len(tokens), text[:_SAMPLE_LETTERS]))
    return samples
