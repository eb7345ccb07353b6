"""Files that go along with an export, and folders that appear only when whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewarm.errors import UserError
from rewarm.model.files import carry_files, written_aside


def test_tokenizer_generation_and_licence_files_go_along_and_weights_do_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    along = [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt",
    ]  # fmt: skip
    left = ["config.json", "model.safetensors", "model.safetensors.index.json", "README.md", "training_args.bin"]
    source.mkdir()
    target.mkdir()
    for name in along + left:
        (source / name).write_text(f"text of {name}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    assert carry_files(source, target) == sorted([*along, "additional_chat_templates"])
    assert sorted(path.name for path in target.iterdir()) == sorted([*along, "additional_chat_templates"])
    assert (target / "merges.txt").read_text() == "text of merges.txt"
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == "tools"


def test_a_folder_appears_only_when_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "export"
    with pytest.raises(KeyError), written_aside(folder) as aside:
        (aside / "half").write_text("half")
        assert not folder.exists()
        raise KeyError
    assert list((tmp_path / "deep").iterdir()) == []
    with written_aside(folder) as aside:
        (aside / "whole").write_text("whole")
    assert (folder / "whole").read_text() == "whole"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["export"]


def test_what_is_there_stays_unless_it_may_be_replaced_by_something_whole(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    with written_aside(folder):
        pass
    (folder / "old").write_text("old")
    with pytest.raises(UserError, match="exists already"), written_aside(folder):
        pass
    with pytest.raises(KeyError), written_aside(folder, replace=True):
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["old"]
    with written_aside(folder, replace=True) as aside:
        (aside / "new").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_full_disk_and_an_unwritable_place_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"), written_aside(tmp_path / "export"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Not a directory"), written_aside(tmp_path / "file" / "export"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
