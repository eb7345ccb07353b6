"""What lies beside tokenizer.json: the ids are those of AutoTokenizer, or the folder is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewarm.config.model import ModelConfig
from rewarm.data import backend
from rewarm.data.backend import PROBE
from rewarm.data.tokenizer import (
    open_backend,
    open_tokenizer,
    special_token_ids,
    tokenizer_fingerprint,
    turn_end_warning,
)
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.tokenizer_check import check_tokenizer_fits, required_rows

TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
TEXTS = [
    PROBE,
    "the cat<tool>ran <tool> through<eos>",
    "  <pad><new>\n<eos> the<mask>  <obs>rain",
    " leading and trailing ",
    "half<too l>",
    "",
]


def write(folder: Path, name: str, values: Any) -> None:
    """A JSON file."""
    (folder / name).write_text(json.dumps(values))


def change(folder: Path, **values: Any) -> None:
    """Set keys of tokenizer_config.json; None removes one."""
    config = json.loads((folder / "tokenizer_config.json").read_text()) | values
    write(folder, "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})


BESIDE: dict[str, Callable[[Path], None]] = {
    "nothing": lambda f: None,
    "no tokenizer_config": lambda f: (f / "tokenizer_config.json").unlink(),
    "added_tokens.json": lambda f: write(f, "added_tokens.json", {"<tool>": 300, "<obs>": 301}),
    "added_tokens.json far away": lambda f: write(f, "added_tokens.json", {"<tool>": 900}),
    "added_tokens_decoder": lambda f: change(f, added_tokens_decoder={"300": {"content": "<tool>", **TOKEN}}),
    "a token with lstrip": lambda f: change(
        f, added_tokens_decoder={"300": {**TOKEN, "content": "<tool>", "lstrip": True, "rstrip": True}}
    ),
    "additional_special_tokens": lambda f: change(f, additional_special_tokens=["<tool>", "<obs>"]),
    "extra_special_tokens": lambda f: change(f, extra_special_tokens=["<tool>"]),
    "extra_special_tokens by name": lambda f: change(f, extra_special_tokens={"tool_token": "<tool>"}),
    "a new pad token": lambda f: change(f, pad_token="<pad>"),
    "a new mask token": lambda f: change(f, mask_token="<mask>"),
    "a word as pad token": lambda f: change(f, pad_token="the"),
    "special_tokens_map.json": lambda f: write(
        f, "special_tokens_map.json", {"pad_token": "<pad>", "eos_token": "<eos>"}
    ),
    "another eos there": lambda f: write(f, "special_tokens_map.json", {"eos_token": {**TOKEN, "content": "<new>"}}),
    "add_prefix_space": lambda f: change(f, add_prefix_space=True),
    "add_prefix_space of GPT-2": lambda f: change(f, add_prefix_space=True, tokenizer_class="GPT2Tokenizer"),
    "a class of another version": lambda f: change(f, tokenizer_class="TokenizerOf2031"),
    "no class": lambda f: change(f, tokenizer_class=None),
    "class by the model": lambda f: (change(f, tokenizer_class=None), write(f, "config.json", {"model_type": "qwen2"})),
    "another class than the model's": lambda f: (
        change(f, tokenizer_class="GPT2TokenizerFast"),
        write(f, "config.json", {"model_type": "llama"}),
    ),
    "vocabulary and merges alone": lambda f: split_files(f),
}


def split_files(folder: Path) -> None:
    """The older format: vocab.json and merges.txt."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    write(folder, "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    change(folder, tokenizer_class="GPT2Tokenizer", unk_token="<eos>", bos_token="<eos>")


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small tokenizer."""
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))


@pytest.mark.parametrize("name", BESIDE)
def test_ids_are_those_of_autotokenizer(name: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    BESIDE[name](folder)
    ours, theirs = open_backend(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert required_rows(folder) == max(theirs.get_vocab().values()) + 1
    if name != "no tokenizer_config":
        assert open_tokenizer(folder).end_of_document == theirs.eos_token_id
        ids = special_token_ids(folder)
        assert ids.get("pad_token_id") == theirs.pad_token_id and ids["eos_token_id"] == theirs.eos_token_id


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "added_tokens_decoder", "a new pad token", "extra_special_tokens"]
)
def test_a_token_beside_has_a_row_or_is_refused(name: str, folder: Path) -> None:
    plain, rows = tokenizer_fingerprint(folder), required_rows(folder)
    BESIDE[name](folder)
    assert tokenizer_fingerprint(folder) != plain
    with pytest.raises(UserError, match=f"but m has {rows} embedding rows"):
        check_tokenizer_fits(folder, Architecture.from_config(ModelConfig(), vocab_size=rows), "m")


def test_a_folder_of_ours_is_opened_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "load_with_transformers", None)
    open_backend(folder)
    change(folder, model_max_length=8, pad_token="<eos>", chat_template="{{ messages }}")
    open_backend(folder)


def test_a_tokenizer_is_read_once_and_again_when_a_file_of_it_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    monkeypatch.setattr("rewarm.data.tokenizer.read_backend", lambda f: reads.append(f) or backend.read_backend(f))
    first, second = open_backend(folder), open_backend(folder)
    first.add_tokens(["<mine>"])
    assert second.token_to_id("<mine>") is None and len(reads) == 1
    write(folder, "added_tokens.json", {"<tool>": 300})
    assert open_backend(folder).token_to_id("<tool>") is not None and len(reads) == 2


def test_what_a_class_does_in_python_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    class Lowering:
        backend_tokenizer = open_backend(folder)

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": self.backend_tokenizer.encode(text.lower(), add_special_tokens=False).ids}

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: Lowering())
    change(folder, add_prefix_space=False)
    with pytest.raises(UserError, match="Lowering changes texts in Python"):
        open_backend(folder)


@pytest.mark.parametrize("own", ["homegrown.HomegrownTokenizer", ["homegrown.HomegrownTokenizer", None]])
def test_code_of_a_tokenizer_with_a_fast_form_is_not_needed(own: object, folder: Path, tmp_path: Path) -> None:
    added = {"300": {"content": "<tool>", **TOKEN}}
    change(folder, tokenizer_class="HomegrownTokenizer", auto_map={"AutoTokenizer": own}, added_tokens_decoder=added)
    (folder / "homegrown.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    change(plain, tokenizer_class="PreTrainedTokenizerFast", auto_map=None)
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(plain)
    assert open_backend(folder).token_to_id("<tool>") is not None and not (tmp_path / "was-run").exists()


def test_split_special_tokens_are_asked_for(folder: Path) -> None:
    change(folder, split_special_tokens=True)
    with pytest.raises(UserError, match="split_special_tokens") as caught:
        open_tokenizer(folder)
    assert "--special-tokens text" in str(caught.value.fix)
    assert len(open_tokenizer(folder, special_tokens="text").encode(["<eos>"])[0]) > 2


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"a": '], ids=["torn", "list", "half"])
def test_a_damaged_file_beside_is_an_error(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        open_tokenizer(folder)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("missing", "named"), [({"sentencepiece"}, "sentencepiece"), ({"google.protobuf"}, "protobuf")]
)
def test_a_sentencepiece_model_names_the_package_that_is_missing(
    missing: set[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 40)
    monkeypatch.setattr(backend, "_is_installed", lambda module: module not in missing)
    with pytest.raises(UserError, match=f"the package {named} that reads it is not installed") as caught:
        required_rows(tmp_path)
    assert f"pip install {named}" in str(caught.value.fix) and "tiktoken" not in str(caught.value)


TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("eos", "others", "template", "warned"),
    [
        ("<|im_end|>", ["<|endoftext|>"], TEMPLATE, "<|endoftext|>"),
        ("<|im_end|>", [], TEMPLATE, "<eos>"),
        ("<|eot_id|>", ["<|end_of_text|>"], None, "<|end_of_text|>"),
        ("<stop>", ["<|endoftext|>"], "{{ m }}<stop>", "<|endoftext|>"),
        ("<|endoftext|>", ["<|im_end|>"], TEMPLATE, None),
        ("<eos>", ["<end_of_turn>"], "<end_of_turn>", None),
    ],
)
def test_the_end_of_a_turn_is_no_end_of_a_document(
    eos: str, others: list[str], template: str | None, warned: str | None, folder: Path
) -> None:
    added = {str(400 + number): {**TOKEN, "content": token} for number, token in enumerate([eos, *others])}
    change(folder, eos_token=eos, added_tokens_decoder=added)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    warning = turn_end_warning(open_tokenizer(folder))
    assert (warning is None) if warned is None else (warning is not None and warned in warning and eos in warning)
    if warned in others:
        assert turn_end_warning(open_tokenizer(folder, end_of_document=warned)) is None
