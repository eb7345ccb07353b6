"""Reading YAML: every value is what was written, or the file and the line are named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewarm.config import yaml_text
from rewarm.config.json_text import parse_json
from rewarm.config.load import load
from rewarm.config.yaml_text import dump_yaml, parse_yaml, read_yaml
from rewarm.errors import UserError

STAGE = "name: run\nmodel: {}\n"


def stage(folder: Path, text: str | bytes) -> Path:
    path = folder / "stage.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("data: {a: x}\nduration: 20 steps\nbatch: {}\nduration: 999 steps\n", "duration", (4, 6)),
        ("data: {en: data/a, en: data/b}\n", "en", (3, 3)),
        ("data:\n  en: data/a\n  'en': data/b\n", "en", (4, 5)),
        ("data:\n  no: data/a\n  \"no\": data/b\n", "no", (4, 5)),
        ("data: {a: x}\nmixture:\n  phased:\n    phases:\n    - weights: {a: 1}\n      at: 5%\n      at: 6%\n", "at",
         (8, 9)),
        ("data: {a: &x {path: p, path: q}, b: *x}\n", "path", (3, 3)),
        ("x: &x {path: p}\ny: &y {path: q}\ndata:\n  a:\n    <<: *x\n    <<: *y\n", "<<", (7, 8)),
        ("data: {a: x}\nmodel: {}\n", "model", (2, 4)),
    ],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused_at_any_depth(
    tmp_path: Path, text: str, key: str, lines: tuple[int, int]
) -> None:
    path = stage(tmp_path, STAGE + text)
    where = f"in line {lines[0]}" if lines[0] == lines[1] else f"in lines {lines[0]} and {lines[1]}"
    assert f"{path}: the key '{key}' stands twice, {where}" in refusal(path)


def test_a_key_that_stands_twice_in_an_override_or_in_json_is_refused(tmp_path: Path) -> None:
    path = stage(tmp_path, STAGE + "data: {a: x, b: y}\n")
    assert "the key 'a' stands twice" in refusal(path, "mixture.weights={a: 1, b: 2, a: 3}")
    with pytest.raises(ValueError, match="'b' stands twice, in lines 2 and 3"):
        parse_json('{"a": {\n"b": 1,\n"b": 2}}')
    for text in ("[" * 100_000, '{"a": 1', "9" * 10_000):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_json('{"a": {"b": 1}, "c": {"b": 1}}') == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1", "seed=2"],
        ["schedule.peak=1e-3", "schedule={kind: linear}"],
        ["schedule.peak=1e-3", "seed=1", "schedule.peak=2e-3"],
    ],
)
def test_an_override_does_not_undo_another_one_without_a_word(tmp_path: Path, overrides: list[str]) -> None:
    path = stage(tmp_path, STAGE + "data: {a: x}\n")
    assert f"{overrides[-1]!r} undoes {overrides[0]!r}" in refusal(path, *overrides)
    assert load(path, ["schedule={kind: linear}", "schedule.peak=1e-3", "seed=7", "seed=7"]).schedule.peak == 1e-3


def test_merge_keys_give_way_to_what_is_written_beside_them() -> None:
    text = "base: &b {x: 1, y: {z: 2}}\none: {<<: *b, x: 3}\ntwo: {<<: [{x: 4}, *b]}\n"
    assert parse_yaml(text) == {
        "base": {"x": 1, "y": {"z": 2}}, "one": {"x": 3, "y": {"z": 2}}, "two": {"x": 4, "y": {"z": 2}}
    }  # fmt: skip


def test_what_an_alias_repeats_is_changed_in_one_place_only(tmp_path: Path) -> None:
    path = stage(tmp_path, STAGE + "data: {a: &x {path: p}, b: *x}\n")
    config = load(path, ["data.b.max_epochs=2"])
    assert (config.data["a"].max_epochs, config.data["b"].max_epochs) == (None, 2)


@pytest.mark.parametrize("name", ["no", "on", "off", "y", "null", "true", "2024", "010", "1e3", "2024-01-01", "0x1F"])
def test_a_domain_may_have_any_plain_name(tmp_path: Path, name: str) -> None:
    path = stage(tmp_path, f"{STAGE}data: {{{name}: data/{name}, b: y}}\nmixture: {{weights: {{{name}: 1, b: 2}}}}\n")
    config = load(path)
    assert config.data[name].path == f"data/{name}" and config.mixture.weights == {name: 1, "b": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("2024-01-01", "2024-01-01"), ("2024-99-99", "2024-99-99"), ("1:30", "1:30"),
        ("010", "010"), ("true", True), ("False", False), ("~", None), ("", None), ("3e-4", 3e-4), ("1.5E5", 1.5e5),
        ("1_000", 1000), ("-3", -3), ("0x1F", 31), (".5", 0.5), ("'3'", "3"), ("!!str 3", "3"), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_plain_words(text: str, value: Any) -> None:
    read = parse_yaml(f"a: {text}")["a"]
    assert read == value and type(read) is type(value)


def test_what_is_written_is_read_back_and_by_other_readers_too() -> None:
    words = ["no", "1e5", "3e-4", "010", "2024-01-01", "~", "", "<<", "0x1F", "1_000", "a: b", "é", "a\nb", "9" * 100]
    values = {"list": words, **{word: word for word in words if "\n" not in word}}
    assert parse_yaml(dump_yaml(values)) == values == yaml.safe_load(dump_yaml(values))


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"\xff\xfen\x00a\x00", "is not UTF-8: it seems to be UTF-16"),
        ("name: caf\xe9\n".encode("cp1252"), "is not UTF-8: line 1 holds the byte 0xe9"),
        (b"name: run\ndata: {a: \x80}\n", "is not UTF-8: line 2 holds the byte 0x80"),
        (b"name: run\x00\n", "not valid YAML"),
        (b"name: run\ndata:\n\ta: x\n", "not valid YAML: line 3, column 1: found character"),
        (b"name: run\n---\nname: other\n", "line 2: a second document begins"),
        (b"", "NoneType, not a mapping"),
        (b"# nothing\n", "NoneType, not a mapping"), (b"- 1\n", "list, not a mapping"),
        (b"name: !!python/object/apply:os.system [x]\n", "the tag"), (b"name: !!int 3\n", "line 1: the tag !!int"),
        (b"name: !mine 3\n", "line 1: the tag !mine"), (b"? [a]\n: b\n", "line 1: a key must be a name"),
        (b"a: &x [*x]\n", "the alias *x stands inside what it names"), (b"a: *x\n", "*x names no anchor"),
        (b"a: &x 1\nb: &x 2\n", "line 2: the anchor &x is there already"), (b"<<: 3\n", "line 1: << merges mappings"),
        (b"seed: " + b"9" * 10_000, "line 1: the number '999"), (b"a: " + b"[" * 50, "nested more than 32 levels"),
        (b"a: " + b"[" * 100_000, "nest"),
        (b"a: b: c\n", "line 1, column 5: mapping values are not allowed"),
    ],
)  # fmt: skip
def test_files_that_are_refused_with_their_place(tmp_path: Path, raw: bytes, part: str) -> None:
    path = stage(tmp_path, raw)
    text = refusal(path)
    assert part in text and str(path) in text and len(text) < 1000


def test_places_that_are_no_files_of_this_kind(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path)
    assert "null byte" in refusal(Path("a\0b"))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "symbolic links" in refusal(loop)
    assert "more than 4 MiB" in refusal(Path("/dev/zero"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert load(stage(tmp_path, b"\xef\xbb\xbf" + STAGE.encode() + b"data: {a: x}\n")).name == "run"


def test_files_without_bound_are_refused_early(tmp_path: Path) -> None:
    letters = "abcdefghij"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{now}: &{now} [{', '.join([f'*{before}'] * 10)}]\n" for before, now in itertools.pairwise(letters)
    )
    assert "more than 200,000 values" in refusal(stage(tmp_path, bomb))
    assert "more than 200,000 values" in refusal(stage(tmp_path, "a: [" + "1," * 300_000 + "1]"))
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(60 << 20)
    assert "more than 4 MiB" in refusal(path)


@pytest.mark.parametrize("parser", ["CSafeLoader", "SafeLoader"])
def test_both_parsers_of_the_library_read_alike(monkeypatch: pytest.MonkeyPatch, parser: str) -> None:
    if not hasattr(yaml, parser):
        pytest.skip(f"this build of yaml has no {parser}")
    monkeypatch.setattr(yaml_text, "_PARSER", getattr(yaml, parser))
    for path in sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml")):
        assert dump_yaml(read_yaml(path)) == dump_yaml(yaml.safe_load(dump_yaml(read_yaml(path))))
    with pytest.raises(ValueError, match="in lines 1 and 2"):
        parse_yaml("a: 1\na: 2\n")
