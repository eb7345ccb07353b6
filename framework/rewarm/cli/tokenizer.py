"""``rewarm tokenizer``: make a tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rewarm.cli.data import TextDocument

app = typer.Typer(help="Make a tokenizer for a model that starts from random weights.", no_args_is_help=True)


@app.callback()
def _verbs() -> None:
    """Make a tokenizer for a model that starts from random weights."""


@app.command(no_args_is_help=True)
def train(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files and folders of text, as rewarm data build reads them."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    vocab_size: Annotated[int, typer.Option(help="Entries, special tokens included.")] = 32_000,
    special_token: Annotated[
        list[str] | None, typer.Option("--special-token", help="A token that no text is split at or merged into.")
    ] = None,
    end_of_document: Annotated[str, typer.Option(help="Special token that ends each document.")] = "<|endoftext|>",
    text_key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    text_document: Annotated[
        TextDocument, typer.Option(help="One document of a .txt file: all of it, a line, or up to a blank line.")
    ] = TextDocument.file,
    megabytes: Annotated[float, typer.Option(help="About as much of the input is learned from, in 10^6 bytes.")] = 500,
) -> None:
    """Train a byte-level BPE tokenizer on text of your domains, and write a folder that AutoTokenizer opens.

    Only for a model that starts from random weights: a model that exists keeps the tokenizer it was trained with. The
    same input and settings give the same tokenizer.

    Example: rewarm tokenizer train corpus/ notes.txt --output tokenizer --vocab-size 16000
    """
    from rewarm.data.tokenizer_training import TrainingSettings, train_from_files

    settings = TrainingSettings(
        inputs=tuple(inputs),
        output=output,
        vocab_size=vocab_size,
        special_tokens=tuple(special_token or ()),
        end_of_document=end_of_document,
        text_key=text_key,
        text_document=text_document.value,
        megabytes=megabytes,
    )
    read = train_from_files(settings)
    for reject in read.rejects:
        print(f"left out {reject}", file=sys.stderr)
    print(f"trained on {read.documents:,} documents, {read.num_bytes / 1e6:.1f} MB\ntokenizer: {output}")
