"""The build: what comes out of which input, and that nothing else has a say in it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patience import PATIENCE
from rewarm.config.data import DomainConfig
from rewarm.data import inputs as inputs_module
from rewarm.data import parts as parts_module
from rewarm.data.build import BuildSettings, _explained_os_errors, build_domain
from rewarm.data.domain import open_domain
from rewarm.data.indexed import IndexedTokens
from rewarm.data.tokenizer import open_backend
from rewarm.errors import UserError
from unit.data.helpers import start_python

pytestmark = pytest.mark.filterwarnings("ignore:Transformer Engine and Apex")


@pytest.fixture
def settings(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> BuildSettings:
    return BuildSettings(
        inputs=(str(corpus),), output=tmp_path / "out", tokenizer=tokenizer_folder, held_out=0.2, workers=1
    )


def decoded(folder: Path, split: str, tokenizer: Path) -> list[str]:
    """The documents of a split, each checked to end with EOS."""
    source, backend = IndexedTokens(folder / split), open_backend(tokenizer)
    documents = [source.document(i) for i in range(source.num_documents)]
    eos = backend.token_to_id("<eos>")
    assert all(document[-1] == eos and eos not in document[:-1] for document in documents)
    return [backend.decode(document[:-1].tolist(), skip_special_tokens=False) for document in documents]


def content(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_document_once_in_order_on_one_side(settings: BuildSettings, texts: list[str]) -> None:
    info, changed = build_domain(settings)
    train = decoded(settings.output, "train", settings.tokenizer)
    held_out = decoded(settings.output, "held_out", settings.tokenizer)
    unique = list(dict.fromkeys(texts))
    assert changed and not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(unique)
    assert train == [text for text in unique if text in set(train)]
    assert held_out == [text for text in unique if text in set(held_out)]
    assert 0.1 < len(held_out) / len(unique) < 0.3
    assert info["duplicates"] == len(texts) - len(unique) and info["records"] == len(texts)
    assert info["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert info["train"]["tokens"] == IndexedTokens(settings.output / "train").num_tokens
    assert (
        info["train"]["content_hash"]
        == hashlib.blake2b((settings.output / "train.bin").read_bytes(), digest_size=16).hexdigest()
    )
    assert set(content(settings.output)) == {"domain.json"} | {
        f"{s}.{e}" for s in ("train", "held_out") for e in ("bin", "idx")
    }


def test_megatron_reads_the_result(settings: BuildSettings) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    build_domain(settings)
    ours, theirs = IndexedTokens(settings.output / "train"), IndexedDataset(str(settings.output / "train"))
    assert len(theirs) == ours.num_documents
    assert np.array_equal(np.concatenate([theirs[i] for i in range(len(theirs))]), ours.tokens)


def test_the_folder_opens_as_a_domain(settings: BuildSettings) -> None:
    info, _ = build_domain(settings)
    domain = open_domain("mine", DomainConfig(path=str(settings.output)), 16)
    assert domain.train.num_tokens == info["train"]["tokens"]
    assert domain.held_out_bytes_per_token == info["held_out"]["bytes"] / info["held_out"]["tokens"]
    assert (
        domain.tokenizer == str(settings.tokenizer)
        and domain.vocab_size == open_backend(settings.tokenizer).get_vocab_size()
    )
    assert domain.max_token_id == max(
        IndexedTokens(settings.output / split).tokens.max() for split in ("train", "held_out")
    )
    with pytest.raises(UserError, match="would be ignored"):
        open_domain("mine", DomainConfig(path=str(settings.output), held_out_fraction=0.5), 16)
    with open(settings.output / "train.bin", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(UserError, match="cut short"):
        open_domain("mine", DomainConfig(path=str(settings.output)), 16)


def test_side_of_a_document_does_not_depend_on_the_others(
    settings: BuildSettings, texts: list[str], tmp_path: Path
) -> None:
    build_domain(settings)
    before = set(decoded(settings.output, "held_out", settings.tokenizer))
    more = tmp_path / "a.jsonl"
    more.write_text("".join(json.dumps({"text": f"new {i}"}) + "\n" for i in range(100)))
    grown = replace(settings, inputs=(str(more), *settings.inputs), output=tmp_path / "grown")
    build_domain(grown)
    after = set(decoded(grown.output, "held_out", settings.tokenizer))
    assert before == after & set(texts)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inputs_module, "SHARD_BYTES", 3000)
    monkeypatch.setattr(parts_module, "PART_BYTES", 2000)
    yield


def test_pieces_change_nothing(settings: BuildSettings, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    build_domain(settings)
    request.getfixturevalue("small_pieces")
    cut = replace(settings, output=tmp_path / "cut")
    assert len(inputs_module.plan_inputs(cut.inputs).shards) > 10
    build_domain(cut)
    for name in ("train.bin", "train.idx", "held_out.bin", "held_out.idx"):
        assert (cut.output / name).read_bytes() == (settings.output / name).read_bytes()


def test_worker_count_changes_nothing(settings: BuildSettings, tmp_path: Path) -> None:
    copies = []
    for number in range(3):
        copy = tmp_path / f"copy-{number}.jsonl"
        copy.write_text(Path(settings.inputs[0]).read_text().replace("cat", f"cat{number}"))
        copies.append(str(copy))
    one = replace(settings, inputs=tuple(copies), output=tmp_path / "one")
    three = replace(one, output=tmp_path / "three", workers=3)
    build_domain(one)
    seen: list[tuple[str, int, int]] = []
    build_domain(three, lambda *call: seen.append(call))
    assert content(one.output) == content(three.output)
    assert max(done for what, done, _ in seen if what == "tokenizing") == sum(map(os.path.getsize, copies))


def _as_parquet(texts: list[str], file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), file, row_group_size=50)


def _as_dataset(texts: list[str], folder: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder))


def _as_json_array(texts: list[str], file: Path) -> None:
    file.write_text(json.dumps([{"text": text} for text in texts]))


def _as_zstandard_frames(texts: list[str], file: Path) -> None:
    import zstandard

    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    frames = [zstandard.ZstdCompressor().compress(b"".join(lines[i : i + 37])) for i in range(0, len(lines), 37)]
    file.write_bytes(b"".join(frames))


def _as_gzip(texts: list[str], file: Path) -> None:
    with gzip.open(file, "wt", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", _as_parquet),
        ("saved", _as_dataset),
        ("a.json", _as_json_array),
        ("a.jsonl.zst", _as_zstandard_frames),
        ("a.jsonl.gz", _as_gzip),
    ],
)
def test_every_format_gives_the_same_tokens(
    settings: BuildSettings, texts: list[str], tmp_path: Path, name: str, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    build_domain(settings)
    write(texts, tmp_path / name)
    monkeypatch.setattr(inputs_module, "SHARD_BYTES", 3000)
    monkeypatch.setattr(parts_module, "PART_BYTES", 2000)
    other = replace(settings, inputs=(str(tmp_path / name),), output=tmp_path / "other")
    build_domain(other)
    for split in ("train", "held_out"):
        for suffix in (".bin", ".idx"):
            assert (other.output / (split + suffix)).read_bytes() == (settings.output / (split + suffix)).read_bytes()


def test_documents_of_text_files(settings: BuildSettings, tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "b.txt").write_text("one\ntwo\n\n\nthree\r\n\n")
    (folder / "a.txt").write_text("zero")
    (folder / "cover.png").write_bytes(b"\x89PNG")
    for mode, expected in (
        ("file", ["zero", "one\ntwo\n\n\nthree\r\n\n"]),
        ("line", ["zero", "one", "two", "three"]),
        ("blank", ["zero", "one\ntwo", "three"]),
    ):
        built = replace(settings, inputs=(str(folder),), output=tmp_path / mode, text_document=mode, held_out=0)  # type: ignore[arg-type]
        info, _ = build_domain(built)
        assert decoded(built.output, "train", settings.tokenizer) == expected
        assert info["files_ignored"] == 1 and not (built.output / "held_out.bin").exists()
        with pytest.raises(UserError, match="built without a held-out split"):
            open_domain("books", DomainConfig(path=str(built.output)), 4)


MALFORMED = {
    b'{"text": "half': "not JSON",
    b"[1, 2]": "not an object but list",
    b'{"txet": "x"}': "no key 'text'; it has ['txet']",
    b'{"text": 7}': "is not a text but int",
    b'{"text": null}': "is not a text but NoneType",
    b'{"text": "\xff"}': "not JSON",
    b'{"text": "\\ud800"}': "half a surrogate",
}


def test_malformed_lines_are_named_counted_and_set_aside(
    settings: BuildSettings, texts: list[str], small_pieces: None
) -> None:
    corpus = Path(settings.inputs[0])
    lines = corpus.read_bytes().splitlines()
    places = dict(zip(range(20, 300, 40), MALFORMED, strict=True))
    for place, bad in sorted(places.items()):
        lines.insert(place, bad)
    corpus.write_bytes(b"\n".join([*lines, b"", b'{"text": "  "}', b'{"text": "last"}']))
    with pytest.raises(UserError) as caught:
        build_domain(settings)
    message = str(caught.value)
    assert (
        f"7 of {len(texts) + 9} records" in message
        and "rejects.jsonl" in message
        and f"{corpus}:21: not JSON" in message
    )
    assert not (settings.output / "train.bin").exists()
    rejects = [json.loads(line) for line in (settings.output / "rejects.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [place + 1 for place in places]
    for reject, bad in zip(rejects, places.values(), strict=True):
        assert MALFORMED[bad] in reject["why"] and reject["file"] == str(corpus)
        assert reject["raw"] == bad.decode("utf-8", errors="backslashreplace")
    info, _ = build_domain(replace(settings, tolerance=0.05))
    assert (info["rejects"], info["empty"]) == (7, 1)
    built = decoded(settings.output, "train", settings.tokenizer) + decoded(
        settings.output, "held_out", settings.tokenizer
    )
    assert sorted(built) == sorted({*texts, "last"})


def test_wrong_key_stops_early(settings: BuildSettings, small_pieces: None) -> None:
    with pytest.raises(UserError, match=r"stopped early: (?!300)\d+ of"):
        build_domain(replace(settings, text_key="content"))


def test_cut_off_archives_are_errors_not_short_corpora(
    settings: BuildSettings, texts: list[str], tmp_path: Path
) -> None:
    for name, write in (("a.jsonl.gz", _as_gzip), ("a.jsonl.zst", _as_zstandard_frames)):
        write(texts, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(UserError, match="damaged or cut short"):
            build_domain(replace(settings, inputs=(str(tmp_path / name),)))


def test_duplicates_stay_if_asked(settings: BuildSettings, texts: list[str]) -> None:
    info, _ = build_domain(replace(settings, deduplicate=False))
    train = decoded(settings.output, "train", settings.tokenizer)
    held_out = decoded(settings.output, "held_out", settings.tokenizer)
    assert sorted(train + held_out) == sorted(texts) and not set(train) & set(held_out)
    assert info["duplicates"] == 0


def test_special_tokens_in_a_text(settings: BuildSettings, tmp_path: Path) -> None:
    file = tmp_path / "special.txt"
    file.write_text("a<eos>b")
    eos = open_backend(settings.tokenizer).token_to_id("<eos>")
    for mode, count in (("parse", 2), ("text", 1)):
        built = replace(settings, inputs=(str(file),), output=tmp_path / mode, special_tokens=mode, held_out=0)  # type: ignore[arg-type]
        build_domain(built)
        assert int((IndexedTokens(built.output / "train").tokens == eos).sum()) == count


def test_second_build_does_nothing_and_another_is_not_overwritten(settings: BuildSettings) -> None:
    build_domain(settings)
    before = {path: path.stat().st_mtime_ns for path in settings.output.iterdir()}
    assert build_domain(settings)[1] is False
    assert {path: path.stat().st_mtime_ns for path in settings.output.iterdir()} == before
    other = replace(settings, held_out=0.3)
    with pytest.raises(UserError, match="--overwrite"):
        build_domain(other)
    info, changed = build_domain(replace(other, overwrite=True))
    assert changed and info["held_out_fraction"] == 0.3


def test_only_missing_parts_are_made_again(
    settings: BuildSettings, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="held-out share"):
        build_domain(replace(settings, held_out=1e-9))
    work = settings.output / ".build"
    parts = sorted(work.glob("*.npz"))
    times = {part: part.stat().st_mtime_ns for part in parts[1:]}
    parts[0].unlink()
    kept = {}
    monkeypatch.setattr(
        "shutil.rmtree", lambda folder: kept.update({p: p.stat().st_mtime_ns for p in Path(folder).glob("*.npz")})
    )
    build_domain(settings)
    assert set(kept) == set(parts) and {part: kept[part] for part in times} == times


_BUILD = """
import sys
from pathlib import Path
from rewarm.data import inputs, parts
from rewarm.data.build import BuildSettings, build_domain
def main():
    inputs.SHARD_BYTES, parts.PART_BYTES = 400_000, 100_000
    places = (sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3])
    build_domain(BuildSettings(*places, held_out=0.1, workers=int(sys.argv[4])))
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_build_goes_on_to_the_same_bytes(
    settings: BuildSettings, tmp_path: Path, texts: list[str], workers: str
) -> None:
    corpus, script, unbroken = tmp_path / "long.jsonl", tmp_path / "script.py", tmp_path / "unbroken"
    script.write_text(_BUILD)
    corpus.write_text("".join(json.dumps({"text": f"{i} {texts[i % 300] * 3}"}) + "\n" for i in range(4000)))
    arguments = [str(script), str(corpus), str(settings.output), str(settings.tokenizer), workers]
    process = start_python(*arguments)
    work = settings.output / ".build"
    limit = time.monotonic() + PATIENCE
    while len(list(work.glob("*.npz"))) < 5:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    survivors = {part: part.stat().st_mtime_ns for part in work.glob("*.npz")}
    assert len(survivors) >= 5 and not (settings.output / "train.bin").exists()
    for output in (settings.output, unbroken):
        arguments[2] = str(output)
        process = start_python(*arguments)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    assert content(settings.output) == content(unbroken)


def test_workers_leave_with_a_killed_parent(settings: BuildSettings, tmp_path: Path, texts: list[str]) -> None:
    corpus, script = tmp_path / "long.jsonl", tmp_path / "script.py"
    script.write_text(_BUILD)
    corpus.write_text("".join(json.dumps({"text": f"{i} {texts[i % 300] * 3}"}) + "\n" for i in range(4000)))
    process = start_python(str(script), str(corpus), str(settings.output), str(settings.tokenizer), "2")
    work = settings.output / ".build"
    limit = time.monotonic() + PATIENCE
    while not list(work.glob("*.npz")):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while any(_runs(child) for child in children):
        assert time.monotonic() < limit, "a worker outlived its parent"
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_settings_are_named_with_their_fix(settings: BuildSettings, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "odd.xyz").write_text("x")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((settings.tokenizer / "tokenizer.json").read_bytes())
    _as_parquet(["x"], tmp_path / "a.parquet")
    for change, words in (
        ({"tokenizer": tmp_path / "none"}, "is not a folder"),
        ({"tokenizer": bare}, "has no EOS token"),
        ({"end_of_document": "<end>"}, "no token '<end>'"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"workers": 0}, "--workers 0"),
        ({"inputs": (str(tmp_path / "missing.jsonl"),)}, "does not exist"),
        ({"inputs": (str(tmp_path / "odd.xyz"),)}, "files of this kind"),
        ({"inputs": (str(tmp_path / "empty.jsonl"),)}, "nothing to read"),
        ({"inputs": (str(tmp_path / "a.parquet"),), "text_key": "body"}, "no column 'body'"),
        ({"output": tmp_path / "odd.xyz"}, "is a file"),
        ({"held_out": 1e-9}, "held-out share"),
    ):
        with pytest.raises(UserError) as caught:
            build_domain(replace(settings, **change))  # type: ignore[arg-type]
        assert words in str(caught.value) and caught.value.fix
    assert build_domain(replace(settings, tokenizer=bare, end_of_document="<eos>"))[1]


def test_second_build_of_the_same_folder_at_once_is_refused(settings: BuildSettings) -> None:
    import fcntl

    work = settings.output / ".build"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build"):
            build_domain(settings)


def test_no_space_left_names_the_file_and_the_fix(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no space left while writing") as caught,
        _explained_os_errors(tmp_path),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert "what is done is kept" in str(caught.value)


def test_full_disk_is_said_and_nothing_is_lost(settings: BuildSettings) -> None:
    """A file size limit stands in for a full disk: it fails in the middle of a write, as a full disk does."""
    script = (
        "import errno, resource, signal, sys\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from rewarm.data.build import BuildSettings, build_domain\n"
        "from rewarm.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try:\n"
        "    places = (sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3])\n"
        "    build_domain(BuildSettings(*places, held_out=0.2, workers=1))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    process = start_python("-c", script, settings.inputs[0], str(settings.output), str(settings.tokenizer))
    printed, errors = process.communicate(timeout=PATIENCE)
    assert "fix: run the same command again" in printed, errors
    assert [path.name for path in (settings.output / ".build").iterdir()] == ["lock"]
    assert build_domain(settings)[1]
