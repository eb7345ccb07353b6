"""A domain: a named token source with a train and a held-out split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rewarm.config.data import DomainConfig
from rewarm.data.fingerprint import range_fingerprint
from rewarm.data.indexed import CHECKED_BYTES, IndexedTokens
from rewarm.data.windows import WindowReader
from rewarm.errors import UserError
from rewarm.files import read_json

DOMAIN_FILE = "domain.json"
FORMAT_VERSION = 1


class Decoder(Protocol):
    """What turns token ids into text: a tokenizer of ``transformers`` or of ``tokenizers``."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        """The text of some ids, special tokens left out."""
        ...


@dataclass
class Domain:
    """An opened domain."""

    name: str
    path: str
    """The path of the configuration: a folder or a prefix."""
    train: WindowReader
    held_out: WindowReader
    fingerprint: str
    """Of the content of the train split, wherever it lies; 32 hexadecimal digits."""
    settings: DomainConfig
    """What it was opened with."""
    tokenizer: str | None = None
    """Folder of the tokenizer it was built with, if known."""
    tokenizer_fingerprint: str | None = None
    vocab_size: int | None = None
    """Length of that tokenizer."""
    max_token_id: int | None = None
    """Largest id in either split, if known without reading it all."""
    held_out_bytes_per_token: float | None = None
    """UTF-8 bytes of the held-out text over its tokens (end-of-document tokens counted), which turns nats per token
    into bits per byte; None for a bare pair until :meth:`measure_bytes_per_token`."""
    info: dict[str, Any] = field(default_factory=dict)
    """All of ``domain.json``; empty for a bare pair."""

    @cached_property
    def held_out_fingerprint(self) -> str:
        """Of the content of the held-out split, wherever it lies; 32 hexadecimal digits."""
        known = self.info.get("held_out", {}).get("content_hash") if self.settings.held_out is None else None
        return range_fingerprint(self.held_out.source, self.held_out.start, self.held_out.stop, known)

    def check_token_ids(self, windows: np.ndarray, vocab_size: int, split: str) -> None:
        """Refuse windows with ids that a model has no row for: an embedding that is split over ranks takes such an id
        for another rank's, and the loss is finite and wrong.

        Args:
            windows: int64 [B, S + 1], read from this domain.
            vocab_size: rows of the model.
            split: what they were read from, for the message.

        Raises:
            UserError: naming the domain and the id.
        """
        for token in (int(windows.max()), int(windows.min())):
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"the {split} split of domain {self.name!r} ({self.path}) holds token id {token}, but the model "
                    f"has {vocab_size} rows",
                    fix="build the domain with the model's tokenizer: rewarm data build ... --tokenizer FOLDER",
                )

    def measure_bytes_per_token(self, decoder: Decoder, max_windows: int = 256) -> float:
        """UTF-8 bytes per token of the held-out split, decoded once if the build did not record it.

        Args:
            decoder: the tokenizer that the pair was made with.
            max_windows: windows to decode, evenly over the split.

        Returns:
            :attr:`held_out_bytes_per_token`, which is set.

        Raises:
            UserError: if the decoder does not know a token or every text is empty.
        """
        if self.held_out_bytes_per_token is None:
            chosen = np.unique(np.linspace(0, len(self.held_out) - 1, max_windows).astype(np.int64))
            windows = self.held_out.read(chosen)[:, :-1]
            try:
                num_bytes = sum(len(decoder.decode(row, skip_special_tokens=True).encode()) for row in windows.tolist())
            except (OverflowError, TypeError, IndexError) as error:
                raise UserError(f"the tokenizer cannot decode domain {self.name!r}: {error}", fix=_WRONG) from error
            if num_bytes == 0:
                raise UserError(f"domain {self.name!r} ({self.path}) decodes to an empty text", fix=_WRONG)
            self.held_out_bytes_per_token = num_bytes / windows.size
        return self.held_out_bytes_per_token


_WRONG = "set tokenizer to the folder of the tokenizer that the domain was made with"


def open_domain(name: str, config: DomainConfig, sequence_length: int, section: str | None = "data") -> Domain:
    """Open a folder made by ``rewarm data build`` or a bare Megatron pair; reads a few blocks, whatever the size.

    Args:
        name: the domain's name in the configuration.
        config: where it lies and what is held out.
        sequence_length: targets of a window.
        section: of the configuration that names the domain, for messages; None if it comes from elsewhere, such as
            the lineage or a command line.

    Raises:
        UserError: if it is missing, damaged, empty, no domain, or shorter than a window.
    """
    path = Path(config.path)
    info: dict[str, Any] = {}
    if path.is_dir():
        info = read_domain_file(path)
        train = WindowReader(path / "train", sequence_length)
        if train.num_tokens != info["train"]["tokens"]:
            raise UserError(
                f"{path / 'train.bin'} has {train.num_tokens} tokens and {path / DOMAIN_FILE} says "
                f"{info['train']['tokens']}: they are not of one build",
                fix="run rewarm data build again",
            )
        held_out = _held_out_of_folder(name, config, info, sequence_length, section)
        check_content(path, info)
    else:
        train, held_out = _open_bare(name, config, sequence_length, section)
    for split, reader in (("train", train), ("held-out", held_out)):
        _check_long_enough(name, config.path, split, reader)
    own_held_out = config.held_out is None and bool(info)
    return Domain(
        name=name,
        path=config.path,
        train=train,
        held_out=held_out,
        fingerprint=range_fingerprint(
            train.source, train.start, train.stop, info["train"]["content_hash"] if info else None
        ),
        tokenizer=str((path / info["tokenizer"]).resolve()) if info else None,
        tokenizer_fingerprint=info.get("tokenizer_fingerprint"),
        vocab_size=info.get("vocab_size"),
        max_token_id=info.get("max_token_id"),
        held_out_bytes_per_token=info["held_out"]["bytes"] / info["held_out"]["tokens"] if own_held_out else None,
        settings=config,
        info=info,
    )


def read_domain_file(folder: Path) -> dict[str, Any]:
    """What ``rewarm data build`` recorded about a folder.

    Raises:
        UserError: if the folder is no domain, or of a newer format.
    """
    file = folder / DOMAIN_FILE
    if not file.is_file():
        if (folder / "train.bin").is_file():
            fix = f"finish it with rewarm data build, or use the bare pair: path: {folder / 'train'}"
        else:
            fix = f"make one: rewarm data build INPUT... --output {folder} --tokenizer FOLDER"
        raise UserError(f"{folder} is a folder but not a domain: it has no {DOMAIN_FILE}", fix=fix)
    info = read_json(file, fix="run rewarm data build again")
    if "format" not in info:
        raise UserError(f"{file} is damaged: it has no format", fix="run rewarm data build again")
    version = info["format"]
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format {version}; this version of rewarm reads format {FORMAT_VERSION}",
            fix="build the domain again, or use the rewarm that built it",
        )
    problem = _problem_of(info)
    if problem is not None:
        raise UserError(f"{file} is damaged: {problem}", fix="copy it again from its source, or build the domain again")
    return info


def _problem_of(info: dict[str, Any]) -> str | None:
    """What is wrong with the content of ``domain.json``; None if it is what a build wrote."""
    is_of_first_version = DIGEST not in info and "index_hash" not in str(info)
    if not is_of_first_version and info.get(DIGEST) != info_digest(info):
        return f"it is not what the build wrote, by its {DIGEST}"
    expected = {"tokens": int, "bytes": int, "content_hash": str}
    for split in ("train", "held_out"):
        found = info.get(split)
        for key, kind in expected.items():
            if not isinstance(found, dict) or not isinstance(found.get(key), kind):
                return f"its {split} has no {key}"
    return None if isinstance(info.get("tokenizer"), str) else "it has no tokenizer"


DIGEST = "digest"
"""Key of ``domain.json`` that stands for all others; those of the first versions have none."""


def info_digest(info: dict[str, Any]) -> str:
    """BLAKE2b of everything that ``domain.json`` says, but this digest itself."""
    rest = {key: value for key, value in info.items() if key != DIGEST}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE2b of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_content(folder: Path, info: dict[str, Any]) -> None:
    """Compare the small files of a domain with what was recorded when it was built; large ones would take too long
    at every start, and have a fingerprint of spread blocks.

    Raises:
        UserError: naming the file that changed.
    """
    for split in ("train", "held_out"):
        for suffix, key in ((".bin", "content_hash"), (".idx", "index_hash")):
            path, recorded = folder / f"{split}{suffix}", info[split].get(key)
            if not info[split]["tokens"] or recorded is None or path.stat().st_size > CHECKED_BYTES:
                continue
            if file_digest(path) != recorded:
                raise UserError(
                    f"{path} holds other data than its {DOMAIN_FILE} recorded: it changed since it was built",
                    fix="copy it again from its source, or build the domain again: rewarm data build --overwrite",
                )


def _setting(section: str | None, name: str, field: str, value: object) -> str:
    """How a message calls what was given: by its key, or, where there is none, by its value alone."""
    return f"{value}" if section is None else f"{section}.{name}.{field}={value}"


def _held_out_fix(section: str | None, name: str, otherwise: str) -> str:
    return otherwise if section is None else f"set {section}.{name}.held_out to the prefix of a .bin/.idx pair"


def _held_out_of_folder(
    name: str, config: DomainConfig, info: dict[str, Any], sequence_length: int, section: str | None
) -> WindowReader:
    _refuse_fraction(name, config, "the folder has a held-out split of its own", section)
    if config.held_out is not None:
        return _open_held_out(name, config, sequence_length, section)
    if info["held_out"]["tokens"] == 0:
        raise UserError(
            f"domain {name!r} ({config.path}) was built without a held-out split",
            fix=_held_out_fix(section, name, "give one that has") + ", or build it with --held-out 0.01",
        )
    return WindowReader(Path(config.path) / "held_out", sequence_length)


def _open_bare(
    name: str, config: DomainConfig, sequence_length: int, section: str | None
) -> tuple[WindowReader, WindowReader]:
    path = _setting(section, name, "path", config.path)
    for suffix in (".bin", ".idx"):
        if config.path.endswith(suffix):
            raise UserError(f"{path} names one file of a pair", fix=f"write {config.path[: -len(suffix)]}")
    if not Path(config.path + ".bin").exists() and not Path(config.path + ".idx").exists():
        raise UserError(
            f"{path}: there is neither such a folder nor {config.path}.bin",
            fix="check the path (it is taken from the working directory), or make the domain with rewarm data build",
        )
    source = IndexedTokens(config.path)
    if config.held_out is not None:
        held_out = _setting(section, name, "held_out", config.held_out)
        _refuse_fraction(name, config, f"{held_out} is held out", section)
        return WindowReader(source, sequence_length), _open_held_out(name, config, sequence_length, section)
    wanted = max(1, round(config.held_out_fraction * source.num_tokens))
    boundary = source.document_start(source.last_document_at_or_before(source.num_tokens - wanted))
    if source.num_tokens and boundary == 0:
        raise UserError(
            f"domain {name!r} ({config.path}): its last {config.held_out_fraction:.3g} cannot be held out as whole "
            f"documents, because nothing would be left to train on ({source.num_documents} documents)",
            fix=_held_out_fix(section, name, "give a pair of more documents"),
        )
    return WindowReader(source, sequence_length, 0, boundary), WindowReader(source, sequence_length, boundary)


def _open_held_out(name: str, config: DomainConfig, sequence_length: int, section: str | None) -> WindowReader:
    prefix = str(config.held_out)
    if not Path(prefix + ".bin").is_file():
        inside = next(
            (f"{prefix}/{split}" for split in ("held_out", "train") if Path(f"{prefix}/{split}.bin").is_file()), None
        )
        raise UserError(
            f"{_setting(section, name, 'held_out', prefix)}: {prefix}.bin does not exist",
            fix=f"write {inside}" if inside else "give the prefix of a .bin/.idx pair, without the suffix",
        )
    return WindowReader(prefix, sequence_length)


def _refuse_fraction(name: str, config: DomainConfig, because: str, section: str | None) -> None:
    if config.held_out_fraction == DomainConfig.model_fields["held_out_fraction"].default:
        return
    if section is None:
        raise UserError(
            f"the last {config.held_out_fraction:.3g} of domain {name!r} were held out of a bare pair, and "
            f"{config.path} has another held-out split: {because}",
            fix="name the pair itself, without a suffix",
        )
    raise UserError(
        f"{section}.{name}.held_out_fraction={config.held_out_fraction} would be ignored: {because}",
        fix=f"remove {section}.{name}.held_out_fraction",
    )


def _check_long_enough(name: str, path: str, split: str, reader: WindowReader) -> None:
    if reader.num_tokens == 0:
        raise UserError(
            f"domain {name!r} ({path}): its {split} split is empty", fix="build it from an input that has documents"
        )
    if len(reader) == 0:
        raise UserError(
            f"domain {name!r} ({path}): its {split} split has {reader.num_tokens} tokens, less than one window of "
            f"{reader.sequence_length} + 1",
            fix=f"give it more text, or lower batch.sequence_length to at most {reader.num_tokens - 1}"
            + ("; a larger share can be held out" if split == "held-out" else ""),
        )
