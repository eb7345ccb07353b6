"""What a build leaves behind: the old domain until the new is whole, few parts, messages that name the input."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patience import PATIENCE
from rewarm.config.data import DomainConfig
from rewarm.data import inputs as inputs_module
from rewarm.data import parts as parts_module
from rewarm.data import publish as publish_module
from rewarm.data.boundaries import boundary_notices, document_marks
from rewarm.data.build import BuildSettings, build_domain
from rewarm.data.domain import open_domain
from rewarm.data.indexed import IndexedTokens
from rewarm.data.parts import make_batches
from rewarm.data.split import held_out_mask, text_hash
from rewarm.data.summary import build_caption
from rewarm.errors import UserError
from unit.data.helpers import start_python, write_pair


@pytest.fixture
def settings(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> BuildSettings:
    return BuildSettings(
        inputs=(str(corpus),), output=tmp_path / "out", tokenizer=tokenizer_folder, held_out=0.2, workers=1
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_names_that_are_not_utf_8(settings: BuildSettings, tmp_path: Path, texts: list[str]) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    corpus = odd / os.fsdecode(b"na\xefve.jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{}\n")
    (odd / "b.csv").write_text("text\none\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "c")
    os.rename(tmp_path / "c", odd / "c.parquet")
    build_domain(settings)
    for output in (settings.output, odd / "out"):
        built = replace(settings, inputs=(str(odd),), output=output, overwrite=True, tolerance=0.1)
        info, changed = build_domain(built)
        assert changed and info["rejects"] == 1 and build_domain(built) == (info, False)
        reject = json.loads((output / "rejects.jsonl").read_text())
        assert reject["file"] == str(corpus)
        assert json.loads((output / "domain.json").read_text())["inputs"] == [str(odd)]


def test_the_command_prints_names_that_are_not_utf_8(settings: BuildSettings, tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    Path(odd).mkdir()
    (Path(odd) / "a.txt").write_text("text")
    command = ["-m", "rewarm", "data", "build", odd, "-o", f"{odd}/out", "--tokenizer", str(settings.tokenizer)]
    process = start_python(*command, "--held-out", "0")
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "caf\\udce9/out" in printed, errors


@pytest.mark.parametrize("failing", ["assemble", "close", 0, 3, 7, 11, "tolerance", "held_out"])
def test_the_old_domain_stays_until_the_new_one_is_whole(
    settings: BuildSettings, failing: str | int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    build_domain(replace(settings, inputs=(*settings.inputs, str(bad)), tolerance=0.1))
    before = files(settings.output)
    assert "rejects.jsonl" in before
    other = replace(settings, held_out=0.3, overwrite=True)
    moves: list[Any] = []

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    def fail_at_one(source: Path, target: Path, move: Any = publish_module._move) -> None:
        moves.append(target)
        if len(moves) == failing + 1:  # type: ignore[operator]
            fail()
        move(source, target)

    with monkeypatch.context() as patch:
        if failing == "assemble":
            patch.setattr("rewarm.data.assemble.read_part", fail)
        elif failing == "close":
            patch.setattr("rewarm.data.indexed._finish", fail)
        elif isinstance(failing, int):
            patch.setattr(publish_module, "_move", fail_at_one)
        elif failing == "tolerance":
            bad.write_text("{}\n" * 9)
            other = replace(other, inputs=(*settings.inputs, str(bad)))
        else:
            other = replace(other, held_out=1e-9)
        with pytest.raises(UserError):
            build_domain(other)
    assert files(settings.output) == before
    other = replace(other, held_out=0.3, tolerance=0.1)
    assert build_domain(other)[0]["held_out_fraction"] == 0.3
    assert not (settings.output / ".build").exists()


def test_a_build_killed_in_the_exchange_is_undone(settings: BuildSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    build_domain(settings)
    before = files(settings.output)
    moves: list[Any] = []

    class Killed(BaseException):
        pass

    def stop(source: Path, target: Path, move: Any = publish_module._move) -> None:
        moves.append(target)
        if len(moves) >= 8:  # nothing that would mend it runs either
            raise Killed
        move(source, target)

    other = replace(settings, held_out=0.3, overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(publish_module, "_move", stop)
        build_domain(other)
    assert not (settings.output / "domain.json").exists()
    publish_module.undo(settings.output, settings.output / ".build")
    assert files(settings.output) == before
    assert build_domain(other)[1]


def test_small_files_share_parts(settings: BuildSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(150):
        (folder / f"{number:03}.txt").write_text(f"{number} text")
    (folder / "077.jsonl").write_text('{"text": "line"}\n{}\n')
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor))[1])
    info, _ = build_domain(replace(settings, inputs=(str(folder),), held_out=0, tolerance=0.1))
    assert info["train"]["documents"] == 151 and info["files"] == 151 and len(synced) < 10
    reject = json.loads((settings.output / "rejects.jsonl").read_text())
    assert (reject["file"], reject["line"]) == (str(folder / "077.jsonl"), 2)
    monkeypatch.setattr(parts_module, "PART_BYTES", 100)
    again = replace(settings, inputs=(str(folder),), held_out=0, tolerance=0.1, output=tmp_path / "again")
    build_domain(again)
    assert (again.output / "train.bin").read_bytes() == (settings.output / "train.bin").read_bytes()


def test_batches_depend_on_the_files_alone(tmp_path: Path) -> None:
    for number, size in enumerate((3, 4, 50, 2, 2, 9, 1)):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    shards = inputs_module.plan_inputs((str(tmp_path),)).shards
    sizes = [[shard.size for shard in batch] for batch in make_batches(shards, 10, 12)]
    assert sizes == [[3, 4], [50], [2, 2], [9, 1]]


def test_early_stops_name_the_line(settings: BuildSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inputs_module, "SHARD_BYTES", 3000)
    with pytest.raises(UserError, match=rf"stopped early(?s:.*){settings.inputs[0]}:1: no key"):
        build_domain(replace(settings, text_key="content"))
    corpus = tmp_path / "late.jsonl"
    good, bad = json.dumps({"text": "x" * 40}) + "\n", json.dumps({"txet": "x" * 40}) + "\n"
    corpus.write_text(good * 90 + bad * 900)
    with pytest.raises(UserError) as caught:
        build_domain(replace(settings, inputs=(str(corpus),)))
    line = int(str(caught.value).split(f"{corpus}:")[1].split(":")[0])
    assert corpus.read_text().splitlines(keepends=True)[line - 1] == bad and line > 90
    cp1252 = tmp_path / "old.csv"
    cp1252.write_bytes(b"text\n" + "caf\u00e9 x\n".encode("cp1252") * 200)
    with pytest.raises(UserError, match=rf"{cp1252}:2: not UTF-8(?s:.*)--encoding cp1252"):
        build_domain(replace(settings, inputs=(str(cp1252),)))


def test_standard_input_and_pipes(settings: BuildSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = Path(settings.inputs[0]).read_bytes()
    build_domain(settings)
    piped = replace(settings, inputs=("-",), output=tmp_path / "piped")
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        _, changed = build_domain(piped)
    assert not changed and not (piped.output / ".build").exists()
    assert (piped.output / "train.bin").read_bytes() == (settings.output / "train.bin").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"other")))
    before = files(piped.output)
    with pytest.raises(UserError, match="--overwrite"):
        build_domain(piped)
    assert files(piped.output) == before and not (piped.output / ".build").exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some {plain} text")))
    info, _ = build_domain(replace(piped, output=tmp_path / "text", held_out=0))
    assert info["train"]["documents"] == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "x"}\nbad\n')))
    with pytest.raises(UserError, match="standard input:2: not JSON"):
        build_domain(replace(piped, output=tmp_path / "bad", held_out=0))
    read_end, write_end = os.pipe()
    os.write(write_end, b'{"text": "through a pipe"}\n')
    os.close(write_end)
    info, _ = build_domain(replace(piped, inputs=(f"/dev/fd/{read_end}",), output=tmp_path / "pipe", held_out=0))
    assert info["train"]["documents"] == 1


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_held_out_by_tokens_is_near_the_share(share: float) -> None:
    generator = np.random.default_rng(3)
    for count in (30, 300):
        lengths = generator.integers(1, 100, count)
        raw = b"".join(text_hash(f"{count} {i}".encode()) for i in range(count))
        hashes = np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, 2)
        mask = held_out_mask(hashes, lengths, share, "tokens")
        assert abs(lengths[mask].sum() - share * lengths.sum()) <= 50
        lengths[5] = 10**6  # longer than the share: it is passed over
        assert not held_out_mask(hashes, lengths, share, "tokens")[5]
        assert np.array_equal(held_out_mask(hashes, lengths, share, "documents"), hashes[:, 0] < share * 2**64)


def test_few_pages_hold_out_the_share_of_their_tokens(settings: BuildSettings, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"page {number} " * (20 + number))
    info, _ = build_domain(replace(settings, inputs=(str(folder),), held_out=0.1, held_out_by="tokens"))
    share = info["held_out"]["tokens"] / (info["held_out"]["tokens"] + info["train"]["tokens"])
    assert 0.08 < share < 0.12 and "note" not in build_caption(settings.output, info)
    other = replace(settings, inputs=(str(folder),), held_out=0.05, output=tmp_path / "documents", overwrite=True)
    info, _ = build_domain(other)
    info["held_out_fraction"] = 0.4
    assert "--held-out-by tokens gets nearer to 40.00%" in build_caption(settings.output, info)


@pytest.fixture
def with_bos(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """The tokenizer with a BOS that it puts in front of every text, as Llama's does."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    folder = tmp_path / "with_bos"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_bos_is_offered_where_the_tokenizer_has_it(settings: BuildSettings, with_bos: Path, tmp_path: Path) -> None:
    mark = document_marks(with_bos).leading
    assert mark is not None and mark.token == "<bos>" and document_marks(settings.tokenizer).leading is None
    for wanted, notices in ((None, 1), (False, 0), (True, 0)):
        built = replace(settings, tokenizer=with_bos, bos=wanted, output=tmp_path / str(wanted))
        info, _ = build_domain(built)
        source = IndexedTokens(built.output / "train")
        firsts = {int(source.document(i)[0]) for i in range(source.num_documents)}
        assert (firsts == {mark.identity}) is bool(wanted) and len(info["notices"]) == notices
        assert ("--bos" in build_caption(built.output, info)) is (wanted is None)
        domain = open_domain("mine", DomainConfig(path=str(built.output)), 8)
        assert len(boundary_notices([domain], with_bos, has_parent=True)) == notices
        assert boundary_notices([domain], with_bos, has_parent=False) == []
        assert boundary_notices([domain], settings.tokenizer, has_parent=True) == []
    (with_bos / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "add_bos_token": False}))
    assert document_marks(with_bos).leading is None


def test_bare_pairs_without_document_ends_are_named(settings: BuildSettings, with_bos: Path, tmp_path: Path) -> None:
    marks = document_marks(with_bos)
    assert marks.eos is not None and marks.leading is not None
    document = [marks.leading.identity, *range(10, 20), marks.eos.identity]
    for name, tokens, words in (
        ("whole", document, []),
        ("no_eos", document[:-1], ["--append-eod"]),
        ("no_bos", document[1:], ["--bos"]),
        ("other_eos", [*document[:-1], 25], []),
    ):
        stream = np.array([tokens] * 50, np.uint16)
        if name == "no_eos":
            stream[:, -1] = np.arange(50) + 30
        write_pair(tmp_path / name, stream.reshape(-1), [len(tokens)] * 50)
        domain = open_domain(name, DomainConfig(path=str(tmp_path / name), held_out_fraction=0.1), 8)
        notices = boundary_notices([domain], with_bos, has_parent=True)
        assert len(notices) == len(words) and all(word in one for word, one in zip(words, notices, strict=True))
