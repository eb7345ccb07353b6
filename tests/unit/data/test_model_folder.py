"""What is read of a stranger's folder: regular files inside of it, or of the hub's cache that it lies in."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from rewarm.data.model_folder import find_file, list_files, read_json
from rewarm.data.tokenizer import open_backend, open_tokenizer, tokenizer_fingerprint
from rewarm.errors import UserError
from rewarm.model.description import describe
from rewarm.model.files import carry_files, carry_tokenizer


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A tokenizer beside a secret."""
    (tmp_path / "secret").write_text("PRIVATE KEY")
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "model"))


LINKS = {
    "a key": "../secret",
    "an absolute path": "/etc/passwd",
    "a device": "/dev/zero",
    "the root": "/",
    "nowhere": "missing",
    "itself": "LICENSE",
    "its own folder": ".",
    "a file of the process": "/proc/self/environ",
}


@pytest.mark.parametrize("name", ["LICENSE", "generation_config.json", "chat_template.jinja", "merges.txt"])
@pytest.mark.parametrize("kind", LINKS)
def test_links_are_not_followed_out_of_the_folder(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).symlink_to(LINKS[kind].replace("LICENSE", name))
    target = tmp_path / "run"
    target.mkdir()
    with pytest.raises(UserError, match=f"{name} is ") as caught:
        carry_files(folder, target)
    assert caught.value.fix is not None and not any(target.iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json"])
@pytest.mark.parametrize("kind", ["a key", "a device", "the root", "nowhere"])
def test_a_tokenizer_is_not_read_through_such_a_link(kind: str, name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(LINKS[kind])
    with pytest.raises(UserError, match=name):
        open_backend(folder)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "generation_config.json", "config.json"])
def test_what_is_no_file_is_named_instead_of_waited_for(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="is a named pipe and not a file"):
        find_file(folder, name)
    with pytest.raises(UserError, match="named pipe"):
        (carry_tokenizer if name in ("tokenizer.json", "config.json") else carry_files)(folder, tmp_path)
    (folder / name).unlink()
    server = socket.socket(socket.AF_UNIX)
    where = os.getcwd()
    try:
        os.chdir(folder)  # a socket's path has at most 107 bytes
        server.bind(name)
    finally:
        os.chdir(where)
        server.close()
    with pytest.raises(UserError, match="is a socket and not a file"):
        find_file(folder, name)


def test_folders_under_the_name_of_a_file(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer.json is a folder"):
        find_file(folder, "tokenizer.json")
    # Folders of licences, of other tokenizers, and of links are left where they are.
    for name in ("LICENSES", "tokenizer", "additional_chat_templates"):
        (folder / name).mkdir()
        (folder / name / "key.jinja").write_text("text")
    (folder / "additional_chat_templates" / "deeper").symlink_to("/")
    assert carry_files(folder, tmp_path) == ["additional_chat_templates", "tokenizer_config.json"]
    assert not (tmp_path / "additional_chat_templates" / "deeper").exists()


def test_a_folder_of_templates_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to("../elsewhere")
    with pytest.raises(UserError, match="lies outside"):
        list_files(folder, ("additional_chat_templates/*.jinja",))


def test_sizes_have_a_bound(folder: Path, tmp_path: Path) -> None:
    for name, size in (("LICENSE", 2**24), ("merges.txt", 2**40)):
        with open(folder / name, "wb") as stream:
            stream.truncate(size)
        with pytest.raises(UserError, match="at most"):
            carry_files(folder, tmp_path)
        (folder / name).unlink()


def test_the_hub_cache_is_read_and_copied_as_files(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--model"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    assert tokenizer_fingerprint(snapshot) == tokenizer_fingerprint(folder)
    (tmp_path / "link").symlink_to(snapshot)  # a user may well name the folder by a link
    for place in (snapshot, tmp_path / "link"):
        target = tmp_path / f"copy of {place.name}"
        target.mkdir()
        assert carry_files(place, target) == ["tokenizer.json", "tokenizer_config.json"]
        assert all(path.is_file() and not path.is_symlink() for path in target.iterdir())
    # Another model's blobs, and what lies beside them, are outside.
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "key").write_text("secret")
    (cache / "token").write_text("secret")
    for goal in ("../../../models--org--other/blobs/key", "../../token", "../../blobs/../token"):
        (snapshot / "LICENSE").symlink_to(goal)
        with pytest.raises(UserError, match="lies outside"):
            carry_files(snapshot, tmp_path)
        (snapshot / "LICENSE").unlink()


def test_links_inside_the_folder_are_files_of_it(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer-v2.json")
    (folder / "tokenizer.json").symlink_to("tokenizer-v2.json")
    open_tokenizer(folder)
    assert "tokenizer.json" in carry_files(folder, tmp_path) and not (tmp_path / "tokenizer.json").is_symlink()


def test_json_of_a_folder(tmp_path: Path) -> None:
    assert read_json(tmp_path, "x.json") is None
    for text, message in (
        ("{", "is not JSON"),
        ("[1]", "holds list"),
        ("[" * 100_000, "is not JSON"),
        ("\udcff", "JSON"),
    ):
        (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=message):
            read_json(tmp_path, "x.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "modeling.py"])
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_model_is_described_by_files_of_its_own_alone(engine: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "elsewhere").write_text("{}")
    for make in (lambda path: path.symlink_to("../elsewhere"), os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(folder / name)
        with pytest.raises(UserError, match=f"{name} is a"):
            describe(folder, engine)
        (folder / name).unlink()
