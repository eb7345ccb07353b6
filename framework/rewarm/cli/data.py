"""``rewarm data``: build, inspect and gather domains."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Turn text into domains, look into them, gather a demo corpus.", no_args_is_help=True)


class TextDocument(StrEnum):
    """What one document of a .txt file is."""

    file = "file"
    line = "line"
    blank = "blank"


class SpecialTokens(StrEnum):
    """What becomes of a special token that is spelt out in a text."""

    parse = "parse"
    text = "text"


class HeldOutBy(StrEnum):
    """What the held-out share is a share of."""

    documents = "documents"
    tokens = "tokens"


class FileKind(StrEnum):
    """What a file is, whatever its name."""

    text = "text"
    jsonl = "jsonl"
    json = "json"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"
    arrow = "arrow"


InputsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help=".txt, .jsonl, .json, .csv, .tsv (plain, or compressed with gzip, zstd, bzip2 or xz), compressed "
        "files of any text, .parquet, .arrow, a folder of these, - for standard input, or what the datasets "
        "library loads: a saved dataset or a hub name.",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(help=r"Text of several fields instead: 'Question: {question}\nAnswer: {answer}'.", metavar="TEXT"),
]
DocumentOption = Annotated[
    TextDocument, typer.Option(help="One document of a .txt file: all of it, a line, or up to a blank line.")
]
FormatOption = Annotated[FileKind | None, typer.Option("--format", help="Read every file as this, whatever its name.")]
EncodingOption = Annotated[
    str | None, typer.Option(help="Encoding of text without a byte-order mark, for example cp1252; UTF-8 else.")
]
HeldOutByOption = Annotated[
    HeldOutBy,
    typer.Option(help="Share of the documents, on average, or of the tokens, to the nearest document."),
]
EndOption = Annotated[str | None, typer.Option(help="Token that ends each document; the tokenizer's EOS by default.")]
BosOption = Annotated[bool | None, typer.Option("--bos/--no-bos", help="Begin each document with the tokenizer's BOS.")]
SpecialTokensOption = Annotated[
    SpecialTokens, typer.Option(help="A special token spelt out in a text: that token, or plain text.")
]
TextKeyOption = Annotated[
    str, typer.Option(help="Key or column that holds the text; content.text is text inside content.")
]


@app.command(no_args_is_help=True)
def build(
    inputs: InputsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Domain folder to make.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder of a Hugging Face tokenizer or model.")],
    text_key: TextKeyOption = "text",
    text_template: TemplateOption = None,
    text_document: DocumentOption = TextDocument.file,
    kind: FormatOption = None,
    encoding: EncodingOption = None,
    held_out: Annotated[float, typer.Option(help="Share held out, picked by the hash of the text.")] = 0.01,
    held_out_by: HeldOutByOption = HeldOutBy.documents,
    workers: Annotated[int | None, typer.Option(help="Cores to use; all by default.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest share of malformed records before it is an error.")] = 0.001,
    dedup: Annotated[bool, typer.Option(help="Drop exact duplicates; the first one stays.")] = True,
    subset: Annotated[str | None, typer.Option(help="Subset (configuration) of a hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset; train by default.")] = None,
    end_of_document: EndOption = None,
    bos: BosOption = None,
    special_tokens: SpecialTokensOption = SpecialTokens.parse,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another domain in OUTPUT.")] = False,
) -> None:
    """Turn text into a domain: Megatron .bin/.idx files with a held-out split.

    Stopped or killed, the same command goes on where it was. Malformed records are set aside in
    OUTPUT/rejects.jsonl and named as file:line: why.

    Example: rewarm data build corpus/*.jsonl.zst --output data/mine --tokenizer models/Qwen3-0.6B
    """
    from rich.console import Console

    from rewarm.data.build import BuildSettings, build_domain
    from rewarm.data.summary import progress_on
    from rewarm.data.tokenizer import open_tokenizer, turn_end_warning

    settings = BuildSettings(
        inputs=tuple(inputs),
        output=output,
        tokenizer=tokenizer,
        text_key=text_key,
        text_template=text_template,
        text_document=text_document.value,
        kind=kind.value if kind is not None else None,
        encoding=encoding,
        subset=subset,
        split=split,
        held_out=held_out,
        held_out_by=held_out_by.value,
        tolerance=tolerance,
        deduplicate=dedup,
        end_of_document=end_of_document,
        bos=bos,
        special_tokens=special_tokens.value,
        workers=workers,
        overwrite=overwrite,
    )
    opened = open_tokenizer(tokenizer, end_of_document=end_of_document, special_tokens=special_tokens.value)
    warning = turn_end_warning(opened)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    console = Console()
    with progress_on(console, output.name) as on_progress:
        info, changed = build_domain(settings, on_progress)
    if not changed:
        print(f"{output} already holds exactly this build; nothing to do.")
    _print_build(console, output, info)


@app.command(no_args_is_help=True)
def inspect(
    path: Annotated[str, typer.Argument(metavar="FOLDER_OR_PREFIX", help="A domain folder, or a bare .bin/.idx pair.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents to show, evenly over the train split.")] = 3,
    sequence_length: Annotated[int, typer.Option(min=1, help="Length of the windows that are counted.")] = 4096,
    tokenizer: Annotated[str | None, typer.Option(help="Folder of the tokenizer of a bare pair.")] = None,
) -> None:
    """Show what a domain holds, and the beginnings of a few documents.

    Example: rewarm data inspect data/demo/python --documents 2
    """
    from rich.console import Console
    from rich.text import Text

    from rewarm.data.summary import inspect_domain

    shown = inspect_domain(path, sequence_length, documents, tokenizer)
    console = Console()
    for name, value in shown.rows:
        print(f"{name:<18} {value}")
    for sample in shown.samples:
        console.rule(f"document {sample.document:,}, {sample.num_tokens:,} tokens")
        console.print(Text(sample.text))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the tokenizer and domains.")] = Path(
        "data/demo"
    ),
    vocab_size: Annotated[int, typer.Option(help="Entries of the tokenizer.")] = 2048,
    megabytes: Annotated[float, typer.Option(help="Most text of a domain, in 10^6 bytes.")] = 3.0,
) -> None:
    """Gather three small domains of real text that is installed anyway: english, python and cpp.

    English: help topics, package descriptions and docstrings. Python: the standard library. C++: torch's headers.
    A second call finds that nothing changed.

    Example: rewarm data demo --output data/demo
    """
    from rich.console import Console

    from rewarm.data.demo import make_demo
    from rewarm.data.summary import progress_on

    console = Console()
    with progress_on(console, "demo") as on_progress:
        made = make_demo(output, vocab_size, megabytes, on_progress)
    if not made.changed:
        print(f"{output} is up to date; nothing to do.")
    for folder, info in made.domains.values():
        _print_build(console, folder, info)
    print(f"tokenizer: {made.tokenizer}")


def _print_build(console: Console, folder: Path, info: dict[str, Any]) -> None:
    """A table under the path of its domain. Paths are not left to rich, which breaks them at the terminal's width."""
    from rewarm.data.summary import build_caption, build_table

    print(folder)
    console.print(build_table(info))
    print(build_caption(folder, info))
