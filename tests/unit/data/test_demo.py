"""The demo corpora, and the commands as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patience import PATIENCE
from rewarm.cli.data import app
from rewarm.config.data import DomainConfig
from rewarm.data import corpora
from rewarm.data.demo import DOMAINS, make_demo
from rewarm.data.domain import open_domain
from rewarm.data.tokenizer import open_tokenizer
from rewarm.errors import UserError
from unit.data.helpers import start_python

MEGABYTES = 0.3
VOCAB_SIZE = 1000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("data") / "demo"
    assert make_demo(output, VOCAB_SIZE, MEGABYTES).changed
    return output


def test_three_domains_of_one_tokenizer(demo: Path) -> None:
    tokenizer = open_tokenizer(demo / "tokenizer")
    assert tokenizer.vocab_size == VOCAB_SIZE
    for name in DOMAINS:
        domain = open_domain(name, DomainConfig(path=str(demo / name)), 64)
        assert domain.tokenizer == str((demo / "tokenizer").resolve())
        assert domain.tokenizer_fingerprint == tokenizer.fingerprint and domain.vocab_size == VOCAB_SIZE
        assert (
            0.9 * MEGABYTES * 1e6
            < domain.info["train"]["bytes"] + domain.info["held_out"]["bytes"]
            < 1.2 * MEGABYTES * 1e6
        )
        assert 1.5 < (domain.held_out_bytes_per_token or 0) < 8
    lines = {name: (demo / "text" / f"{name}.jsonl").read_text().rstrip("\n").split("\n") for name in DOMAINS}
    texts = {name: [json.loads(line)["text"] for line in some] for name, some in lines.items()}
    assert sum("#include" in text for text in texts["cpp"]) > len(texts["cpp"]) / 2
    assert sum("def " in text for text in texts["python"]) > len(texts["python"]) / 2
    assert sum(" the " in text for text in texts["english"]) > len(texts["english"]) / 2
    for name, some in texts.items():
        assert len(set(some)) == len(some), name


def test_it_is_deterministic_and_a_second_call_does_nothing(demo: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    make_demo(again, VOCAB_SIZE, MEGABYTES)
    names = [
        "tokenizer/tokenizer.json",
        *(f"{name}/{split}.{end}" for name in DOMAINS for split in ("train", "held_out") for end in ("bin", "idx")),
    ]
    for name in names:
        assert (demo / name).read_bytes() == (again / name).read_bytes(), name
    times = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert not make_demo(demo, VOCAB_SIZE, MEGABYTES).changed
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == times
    assert make_demo(again, VOCAB_SIZE, 2 * MEGABYTES).changed


def test_transformers_opens_the_tokenizer(demo: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(str(demo / "tokenizer"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and len(tokenizer) == VOCAB_SIZE
    assert tokenizer.eos_token_id == open_tokenizer(demo / "tokenizer").end_of_document
    text = "def f(x):\n    return x + 1  # né 你好\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_demo_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vocab-size 100"):
        make_demo(tmp_path, vocab_size=100)
    with pytest.raises(UserError, match=r"for [0-9]+ entries only"):
        make_demo(tmp_path / "small", vocab_size=100_000, megabytes=0.05)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        make_demo(tmp_path / "file" / "demo", VOCAB_SIZE, 0.05)


def test_legal_headers_are_trimmed_and_code_is_not(tmp_path: Path) -> None:
    for name, text, expected in (
        ("a.h", "/* Copyright X */\n// All rights reserved\n\n#pragma once\n", "#pragma once\n"),
        ("b.h", "// What this does\n#pragma once\n", "// What this does\n#pragma once\n"),
        (
            "c.h",
            '#if !defined(TORCH_STABLE_ONLY) && 1\n/* License */\nint x;\n#else\n#error "no"\n#endif\n',
            "int x;\n",
        ),
    ):
        (tmp_path / name).write_text(text)
        file = corpora.SourceFile(tmp_path / name, name, len(text))
        assert "".join(corpora._cpp(file)).strip() == expected.strip()


def test_docstrings_are_found_by_their_quotes() -> None:
    long, short = "A sentence of some length. " * 30, "Short."
    source = (
        f'"""{long}module"""\nx = """{long}value"""\ndef f():\n    r"""{long}function"""\ndef g():\n    """{short}"""\n'
    )
    assert [text.rsplit(" ")[-1] for text in corpora._docstrings(source)] == ["module", "function"]


def test_virtual_environment_gives_the_base_interpreters_library(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=PATIENCE
    )
    script = "import sys; sys.path[:0] = sys.argv[1:]\nfrom rewarm.data.corpora import python_files as found"
    script += "\nprint(found()[0].path)"
    python = tmp_path / "venv" / "bin" / "python"
    process = start_python("-c", script, *sys.path, executable=str(python))
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert Path(printed.strip()).is_relative_to(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))


def test_commands(demo: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(demo / "cpp"), "--documents", "2", "--sequence-length", "64"])
    assert shown.exit_code == 0, shown.output
    domain = open_domain("cpp", DomainConfig(path=str(demo / "cpp")), 64)
    assert domain.fingerprint in shown.output and f"{len(domain.train):,} windows" in shown.output
    assert f"{domain.held_out_bytes_per_token:.3f}" in shown.output and shown.output.count(" tokens ") >= 2
    bare = runner.invoke(app, ["inspect", str(demo / "cpp" / "train"), "--tokenizer", str(demo / "tokenizer")])
    assert bare.exit_code == 0 and "bare Megatron pair" in bare.output, bare.output
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(50)))
    arguments = ["build", str(source), "--output", str(tmp_path / "a"), "--tokenizer", str(demo / "tokenizer")]
    built = runner.invoke(app, [*arguments, "--text-key", "body", "--held-out", "0.3", "--workers", "1"])
    assert built.exit_code == 0 and "50 records" in built.output, built.output
    wrong = runner.invoke(app, [*arguments, "--overwrite"])
    assert isinstance(wrong.exception, UserError) and "no key 'text'; it has ['body']" in str(wrong.exception)
    for command in ("build", "inspect", "demo"):
        assert "Example:" in runner.invoke(app, [command, "--help"]).output
