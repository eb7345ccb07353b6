"""What a run keeps for its exports: whose it is, and how damage is noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rewarm.config.model import ModelConfig
from rewarm.data.tokenizer import open_tokenizer, tokenizer_fingerprint
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.description import HuggingFaceModel, from_scratch
from rewarm.model.generation import lacks_token_ids, with_token_ids, write_generation_config
from rewarm.model.huggingface import config_for_huggingface
from rewarm.train.companions import DIGESTS, check_digests, copy_companions, keep_companions
from rewarm.train.folder import write_run_files
from rewarm.train.parent import Parent
from rewarm.train.summary import export_command, print_summary

TOKENS = ["<eos>", "<pad>", "<s>", "<|endoftext|>"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer, and a licence and generation config that are not the model's."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "tokenizer source"
    folder.mkdir()
    backend = Tokenizer(models.WordLevel({**{f"w{n}": n for n in range(10)}}, unk_token="w0"))
    backend.add_special_tokens(TOKENS)
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "LICENSE").write_text("of the tokenizer")
    (folder / "generation_config.json").write_text('{"temperature": 9}')
    return folder


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    """A Hugging Face folder that is continued."""
    folder = tmp_path / "parent"
    folder.mkdir()
    (folder / "LICENSE").write_text("of the parent")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    return Parent(folder, Architecture.from_config(ModelConfig(), 14), cast(Any, None))


def domain(end: int | None) -> Any:
    """As much of a domain as is looked at."""
    return SimpleNamespace(info={} if end is None else {"end_of_document": end})


def kept(run: Path) -> dict[str, Any]:
    """The generation config that a run keeps."""
    return dict(json.loads((run / "tokenizer" / "generation_config.json").read_text()))


def test_generation_config_and_licence_are_the_parents(tokenizer: Path, parent: Parent, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep_companions(run, tokenizer, parent, [])
    assert kept(run) == {"eos_token_id": 3} and (run / "tokenizer" / "LICENSE").read_text() == "of the parent"
    assert tokenizer_fingerprint(run / "tokenizer") == tokenizer_fingerprint(tokenizer)
    copy_companions(run / "tokenizer", tmp_path / "converted")
    check_digests(tmp_path / "converted" / "tokenizer")
    assert kept(tmp_path / "converted") == {"eos_token_id": 3}
    # Of a parent that has neither, there is neither, whatever the tokenizer's folder holds.
    for name in ("LICENSE", "generation_config.json"):
        (parent.folder / name).unlink()
    keep_companions(run, tokenizer, parent, [])
    assert not (run / "tokenizer" / "LICENSE").exists() and not (run / "tokenizer" / "generation_config.json").exists()


def test_a_licence_goes_along_without_a_tokenizer(parent: Parent, tmp_path: Path) -> None:
    keep_companions(tmp_path / "run", None, parent, [])
    assert (tmp_path / "run" / "tokenizer" / "LICENSE").read_text() == "of the parent"


@pytest.mark.parametrize(
    ("ends", "eos"), [([], 10), ([None], 10), ([10, 10], 10), ([13], [13, 10]), ([13, 10, 13], [13, 10])]
)
def test_a_model_from_scratch_gets_a_generation_config_that_ends(
    ends: list[int | None], eos: Any, tokenizer: Path, tmp_path: Path
) -> None:
    keep_companions(tmp_path / "run", tokenizer, None, [domain(end) for end in ends])
    first = eos[0] if isinstance(eos, list) else eos
    assert kept(tmp_path / "run") == {"eos_token_id": eos, "bos_token_id": 12, "pad_token_id": first}
    assert not (tmp_path / "run" / "tokenizer" / "LICENSE").exists()


@pytest.mark.parametrize("pad", [None, "<pad>", "<eos>"])
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_config_json_names_the_tokens_of_a_model_from_scratch(engine: str, pad: str | None, tokenizer: Path) -> None:
    named = json.loads((tokenizer / "tokenizer_config.json").read_text()) | ({"pad_token": pad} if pad else {})
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(named))
    write_generation_config(tokenizer, [13])
    model = from_scratch(Architecture.from_config(ModelConfig(), 14), engine, "float32")
    assert lacks_token_ids(model)
    complete = with_token_ids(model, tokenizer)
    assert not lacks_token_ids(complete)
    config = complete.config if isinstance(complete, HuggingFaceModel) else config_for_huggingface(complete, "float32")
    assert config["eos_token_id"] == [13, 10] and config["bos_token_id"] == 12
    assert config["pad_token_id"] == {None: None, "<pad>": 11, "<eos>": 10}[pad]
    assert open_tokenizer(tokenizer).end_of_document == 10


def test_a_model_from_elsewhere_keeps_its_ids() -> None:
    foreign = dataclasses.replace(
        Architecture.from_config(ModelConfig(), 14), huggingface_config={"eos_token_id": None}
    )
    assert not lacks_token_ids(foreign)
    assert not lacks_token_ids(HuggingFaceModel({"model_type": "llama"}))
    assert not lacks_token_ids(HuggingFaceModel({"eos_token_id": 7}))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json"])
def test_a_flipped_bit_is_noticed(name: str, tokenizer: Path, parent: Parent, tmp_path: Path) -> None:
    keep_companions(tmp_path / "run", tokenizer, parent, [])
    file = tmp_path / "run" / "tokenizer" / name
    check_digests(file.parent)
    content = bytearray(file.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=f"{name} is not what the run was given"):
            check_digests(file.parent)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        check_digests(file.parent)


def test_a_file_that_came_later_and_damaged_digests_are_noticed(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "tokenizer"
    keep_companions(tmp_path / "run", tokenizer, None, [])
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=r"added_tokens.json is not what the run was given") as caught:
        check_digests(folder)
    assert DIGESTS in str(caught.value.fix)
    (folder / "added_tokens.json").unlink()
    (folder / DIGESTS).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        check_digests(folder)
    (folder / DIGESTS).unlink()
    check_digests(folder)  # of a run that was started by an older version


@pytest.mark.parametrize("run", ["runs/a b", "runs/$HOME", "runs/" + "x" * 300, "runs/[red]"])
def test_the_printed_command_is_one_line_that_a_shell_takes(run: str) -> None:
    import shlex

    command = export_command(Path(run))
    assert "\n" not in command
    assert shlex.split(command) == ["rewarm", "export", run, "--output", f"{run}/huggingface", "--check"]


def test_a_narrow_terminal_breaks_no_path_or_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    run = tmp_path / "runs" / ("a long name [of a run] " * 5)
    run.mkdir(parents=True)
    (run / "evaluation.jsonl").write_text("")
    config = SimpleNamespace(total_steps=3, data={}, stop_at=None)
    tracker = SimpleNamespace(last_evaluated_step=3)
    print_summary(cast(Any, SimpleNamespace(folder=run, config=config, tracker=tracker)))
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"run      {run}", f"export   {export_command(run)}"]


def test_a_tokenizer_that_is_refused_leaves_the_run_folder_as_it_was(parent: Parent, tmp_path: Path) -> None:
    (parent.folder / "COPYING").symlink_to("/etc/passwd")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}")
    stage = SimpleNamespace(folder=run, tokenizer=None, trained=[], origin=SimpleNamespace(parent=parent))
    with pytest.raises(UserError, match="COPYING is a link"):
        write_run_files(cast(Any, None), cast(Any, stage), started=False)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
