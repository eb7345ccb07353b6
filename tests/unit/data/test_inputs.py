"""What is read of other people's files: encodings, compressions, tables, folders, links, pipes and odd names."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewarm.data import columnar, tables
from rewarm.data import inputs as inputs_module
from rewarm.data.build import BuildSettings
from rewarm.data.inputs import InputOptions, plan_inputs
from rewarm.data.readers import ShardReader, TextDocument, lines_before
from rewarm.data.records import TextRule
from rewarm.errors import UserError

TEXTS = [f"{i}, naïve “cat”, 你好 {'rain ' * (i % 7)}" for i in range(40)]


def read(*given: Path | str, text_document: TextDocument = "file", **options: Any) -> list[str]:
    """The texts of some inputs; a malformed record stands as ``LINE: WHY``."""
    settings = InputOptions(text_document=text_document, **options)
    plan = plan_inputs(tuple(map(str, given)), settings)
    items = [item for shard in plan.shards for item in ShardReader(shard, settings.rule, text_document)]
    return [f"{item.line}: {item.why}" if item.text is None else item.text for item in items]


def json_lines(texts: list[str], key: str = "text") -> str:
    return "".join(json.dumps({key: text, "n": i}, ensure_ascii=False) + "\n" for i, text in enumerate(texts))


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_decides(
    tmp_path: Path, encoding: str, mark: bytes, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    content = {
        ".txt": "".join(text + "\r\n" for text in TEXTS),
        ".jsonl": json_lines(TEXTS),
        ".json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
        ".csv": "n,text\r\n" + "".join(f'{i},"{text}"\r\n' for i, text in enumerate(TEXTS)),
        ".tsv": "text\tn\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(TEXTS)),
    }[suffix]
    file = tmp_path / f"a{suffix}"
    file.write_bytes(pack(mark + content.encode(encoding)))
    assert read(file, text_document="line") == TEXTS
    file.write_bytes(pack(content.encode(encoding)))
    if encoding != "utf-8":
        with pytest.raises(UserError, match=rf"a\{suffix} is not UTF-8(?s:.*)--encoding {encoding}"):
            read(file, text_document="line")
        assert read(file, text_document="line", encoding=encoding) == TEXTS


def test_marks_inside_are_dropped_where_files_were_joined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo\n\n\ufeffthree\n".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "one"}\n\ufeff{"text": "\ufefftwo"}\n'.encode())
    assert read(tmp_path / "a.txt", text_document="line") == ["one", "two", "", "three"]
    assert read(tmp_path / "a.txt", text_document="blank") == ["one\ntwo", "three"]
    assert read(tmp_path / "a.txt") == ["one\n\ufefftwo\n\n\ufeffthree\n"]
    assert read(tmp_path / "b.jsonl") == ["one", "two"]


@pytest.mark.parametrize("text_document", ["file", "line", "blank"])
def test_nul_is_refused_by_line(tmp_path: Path, text_document: TextDocument) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 99 + b"\n\nb\0c\n\nd\n")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": "y\\u0000"}\n')
    (tmp_path / "c.csv").write_bytes(b"text,n\nx,1\ny\0,2\n")
    found = read(tmp_path / "a.txt", text_document=text_document)
    assert next(entry for entry in found if "holds a NUL" in entry).split(":")[0] == (
        "1" if text_document == "file" else "3"
    )
    assert read(tmp_path / "b.jsonl") == ["x", "2: holds a NUL at character 1: binary, or of another encoding"]
    assert read(tmp_path / "c.csv")[1].startswith("3: holds a NUL")


def test_carriage_returns_alone_are_no_silent_single_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r")
    with pytest.raises(UserError, match="carriage returns alone"):
        read(tmp_path / "a.txt", text_document="line")
    (tmp_path / "a.txt").write_bytes(b"10%\r20%\r\nlast\r")
    assert read(tmp_path / "a.txt", text_document="line") == ["10%\r20%", "last"]


def test_one_byte_encodings(tmp_path: Path) -> None:
    for name, content in (("a.csv", "text,n\ncafé,1\nplain,2\n"), ("a.txt", "café\nplain\n")):
        (tmp_path / name).write_bytes(content.encode("cp1252"))
        start = "2: not UTF-8: byte 0xe9" if name == "a.csv" else "1: not UTF-8: byte 0xe9"
        found = read(tmp_path / name, text_document="line")
        assert found[0].startswith(start) and found[1] == "plain"
        assert read(tmp_path / name, text_document="line", encoding="cp1252") == ["café", "plain"]
    (tmp_path / "a.txt").write_bytes(b"good\n\x81bad\n")  # cp1252 has no such byte
    assert read(tmp_path / "a.txt", text_document="line", encoding="cp1252") == [
        "good",
        "2: not CP1252: byte 0x81 at 0",
    ]
    (tmp_path / "a.txt").write_bytes("日本".encode("shift_jis"))
    assert read(tmp_path / "a.txt", encoding="shift_jis") == ["日本"]


def test_tables(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, list[str]]] = {
        "one.tsv": ("text\na, b, end\nc, d\n", ["a, b, end", "c, d"]),
        "two.tsv": ("id\ttext\n0\ta, b\n1\tc\n", ["a, b", "c"]),
        "one.csv": ('text\na, b, end\n"c, ""d"" e\nf"\n', ["a, b, end", 'c, "d" e\nf']),
        "na.csv": ("text,id\nNA,0\nnull,1\n123,2\nNone,3\n", ["NA", "null", "123", "None"]),
        "ragged.csv": ("text,id\na,0\nb, c,1\n\nd,2\ne\n", ["a", "3: 3 fields under 2", "d", "6: 1 fields under 2"]),
        "quote.csv": ('text,id\na,0\n"b" c,1\nd,2\n', ["a", "3: no row: ',' expected", "d"]),
        "lines.csv": ('text,id\n"a\nb",0\n\xff,1\n', ["a\nb", "\xff"]),
        "mark.csv": ("\ufefftext,id\nx,0\n", ["x"]),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        found = read(tmp_path / name)
        assert len(found) == len(expected), (name, found)
        assert all(one.startswith(start) for one, start in zip(found, expected, strict=True)), (name, found)
    for name, content, words in (
        ("open.csv", 'text,id\na,0\n"b,1\nc,2\n', "open.csv:3: a quote is opened and never closed"),
        ("semicolon.csv", "text;id\na;0\n", r"no column 'text'; its first line names \['text;id'\], separated by ','"),
        ("twice.csv", "text,text\na,b\n", "two columns 'text'"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)


def test_json_that_is_no_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": text, "more": [{"x": 1.5e3}, "]"]} for text in TEXTS]
    for buffer in (1 << 20, 7):
        monkeypatch.setattr(tables, "_FIRST_READ", buffer)
        for layout in (
            json.dumps(records, ensure_ascii=False),
            json.dumps(records, indent=2),
            "\n".join(json.dumps(record, indent=1, ensure_ascii=False) for record in records),
            "".join(json.dumps(record) + "\n" for record in records),
        ):
            (tmp_path / "a.json").write_text(layout)
            assert read(tmp_path / "a.json") == TEXTS
    (tmp_path / "a.json").write_text("[]")
    assert read(tmp_path / "a.json") == []
    (tmp_path / "a.json").write_text('[\n{"text": "x"},\n"y",\n{"body": 1}]')
    assert read(tmp_path / "a.json") == [
        "x",
        "3: not an object but str",
        "4: no key 'text'; it has ['body']",
    ]
    for content, words in (
        ('[{"text": "x"},\n{"text": }]', "a.json:2: not JSON"),
        ('[{"text": "x"}', "neither a comma nor the end"),
        ('[{"text": "x"}] 1', "more behind the end"),
        ('[{"text": "x"},', "a.json:1: not JSON"),
    ):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=words):
            read(tmp_path / "a.json")


def _zstandard(content: bytes) -> bytes:
    import zstandard

    level = zstandard.ZstdCompressionParameters.from_level(3, window_log=30)
    packed = zstandard.ZstdCompressor(compression_params=level).compressobj()
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00note"
    return skipped + packed.compress(content) + packed.flush() + skipped


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, _zstandard])
def test_first_bytes_tell_the_compression(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(json_lines(TEXTS).encode())
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.zst", "a.ndjson.xz", "A.JSONL.BZ2", "a.json.gz"):
        file = tmp_path / name
        file.write_bytes(packed)
        assert read(file) == TEXTS
        file.write_bytes(packed[:-9])
        with pytest.raises(UserError, match=f"{name} is damaged or cut short"):
            read(file)
        file.write_text(json_lines(TEXTS))
        assert read(file) == TEXTS
        file.unlink()
    (tmp_path / "ls.1.gz").write_bytes(pack(b"a manual page"))
    (tmp_path / "a.tar.gz").write_bytes(pack(b"binary\0" * 9))
    assert read(tmp_path) == ["a manual page"]
    assert plan_inputs((str(tmp_path),)).num_ignored == 1
    with pytest.raises(UserError, match="is not text"):
        read(tmp_path / "a.tar.gz")


def test_archives_are_named(tmp_path: Path) -> None:
    for magic, words in ((b"PK\x03\x04", "zip"), (b"\x04\x22\x4d\x18", "lz4"), (b"7z\xbc\xaf\x27\x1c", "7z")):
        (tmp_path / "a.jsonl").write_bytes(magic + b"x" * 100)
        with pytest.raises(UserError, match=words):
            read(tmp_path / "a.jsonl")


def test_fields_inside_fields_and_templates(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"content": {"text": f"t{i}", "tags": ["a", f"b{i}"]}, "q": f"q{i}", "n": i} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    nested = TextRule("content.text")
    template = TextRule(template=r"Q: {q} {{{n}}}\n{content.tags.1}")
    for name in ("a.jsonl", "a.json", "a.parquet", "a.arrow"):
        assert read(tmp_path / name, rule=nested) == [f"t{i}" for i in range(9)], name
        assert read(tmp_path / name, rule=template) == [f"Q: q{i} {{{i}}}\nb{i}" for i in range(9)], name
        with (
            pytest.raises(UserError, match="no column 'body.x'") if "a.j" not in name else pytest.raises(AssertionError)
        ):
            assert not read(tmp_path / name, rule=TextRule("body.x"))[0].startswith("1: no key 'body.x'; it has")
    (tmp_path / "literal.jsonl").write_text('{"content.text": "x", "content": {"text": "y"}}\n')
    assert read(tmp_path / "literal.jsonl", rule=nested) == ["x"]
    (tmp_path / "gaps.jsonl").write_text('{"q": null, "n": 1}\n{"n": 1}\n{"q": true}\n')
    assert [one[:20] for one in read(tmp_path / "gaps.jsonl", rule=TextRule(template="{q}"))] == [
        "1: 'q' is neither a ",
        "2: no key 'q'; it ha",
        "3: 'q' is neither a ",
    ]


def test_broken_columns_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [os.urandom(300).hex() for _ in range(200)]}), file, row_group_size=50
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = os.urandom(3000)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet (cannot be read|is damaged)"):
        read(file)
    raw = pyarrow.array([b"good", b"\xff\xfe", b"fine"], pyarrow.binary())
    wrong = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), file)
    assert read(file) == ["good", "2: not UTF-8 at byte 0: invalid start byte", "fine"]
    assert columnar.rows_before("parquet", str(file), "a", 1) == 3


def test_every_file_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("once")
    (folder / "inner" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "again.txt").symlink_to(folder / "inner" / "a.txt")
    (folder / "side").symlink_to(folder / "inner", target_is_directory=True)
    os.mkfifo(folder / "pipe.txt")
    assert read(folder) == ["once"]
    plan = plan_inputs((str(folder), str(folder / "inner"), str(folder / "inner" / "a.txt")))
    assert (len(plan.shards), plan.num_files, plan.num_repeated) == (1, 1, 4)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        read(folder)


def test_every_file_of_a_folder_is_read_and_counted(tmp_path: Path) -> None:
    names = ["books.json", "part-train-0.json", "test.json", "wiki.csv", "x.tsv", "y.jsonl", "z.ndjson"]
    for name in names:
        content = json_lines([name]) if "json" in name else f"text\n{name}\n"
        (tmp_path / name).write_text(content)
    (tmp_path / "empty.json").touch()
    (tmp_path / "README.md").write_text("no data")
    plan = plan_inputs((str(tmp_path),))
    assert sorted(read(tmp_path)) == sorted(names)
    assert (plan.num_files, plan.num_ignored) == (len(names), 1)


def test_what_is_not_read_is_said_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text")
    for given, words, options in (
        (tmp_path, "1 files of other kinds were left out", {}),
        (tmp_path / "README.md", "files of this kind", {}),
        ("/dev/null", "neither a file nor a folder", {}),
        (tmp_path / "README.md", "--text-key body has no effect", {"kind": "text", "rule": TextRule("body")}),
        (tmp_path / "README.md", "--split dev has no effect", {"kind": "text", "split": "dev"}),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read(given, **options)  # type: ignore[arg-type]
        assert caught.value.fix
    assert read(tmp_path, kind="text") == read(tmp_path / "README.md", kind="text") == ["text"]


def test_a_file_that_changes_during_the_build_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json_lines(TEXTS))
    (shard,) = plan_inputs((str(file),)).shards
    with open(file, "a") as stream:
        stream.write(json_lines(TEXTS))
    with pytest.raises(UserError, match=r"a\.jsonl changed since"):
        list(ShardReader(shard, TextRule(), "file"))


def test_a_name_that_is_nothing_here_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError, match=r"^some/name is no file or folder here, and datasets cannot load it: no network\n"
    ):
        read("some/name")
    with pytest.raises(UserError, match="is a folder, but datasets cannot load it"):
        read(tmp_path, subset="en")


def test_lines_before_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json_lines(TEXTS))
    monkeypatch.setattr(inputs_module, "SHARD_BYTES", 100)
    shards = plan_inputs((str(file),)).shards
    lines = 0
    for shard in shards:
        assert lines_before(shard) == lines
        reader = ShardReader(shard, TextRule(), "file")
        lines += len(list(reader))
    assert lines == len(TEXTS) and len(shards) > 10


@pytest.fixture
def settings(tmp_path: Path, tokenizer_folder: Path) -> BuildSettings:
    return BuildSettings(inputs=(), output=tmp_path / "out", tokenizer=tokenizer_folder, held_out=0, workers=1)


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": "rot13"},
        {"encoding": "klingon"},
        {"text_template": "no field"},
        {"text_template": "{"},
        {"text_template": "{x!r}"},
        {"text_template": "{}"},
        {"text_template": "{x}", "text_key": "body"},
        {"bos": True},
    ],
)
def test_options_are_checked_before_anything_is_read(settings: BuildSettings, change: dict[str, Any]) -> None:
    from rewarm.data.build import build_domain

    with pytest.raises(UserError, match="--encoding|--text-template|--bos") as caught:
        build_domain(replace(settings, inputs=("missing.jsonl",), **change))
    assert caught.value.fix and not settings.output.exists()
