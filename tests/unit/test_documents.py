"""The documents say what is so: commands and settings exist, methods are listed, statements about files hold."""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from rewarm.cli.main import app
from rewarm.config.load import build, load
from rewarm.config.registry import MIXERS, OPTIMIZERS, SCHEDULES, Registry
from rewarm.config.run import RunConfig
from rewarm.config.section import Section
from rewarm.mixing.mixers.base import Observation
from rewarm.mixing.mixers.build import build_mixer
from rewarm.schedule.learning_rate import LearningRate

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "framework" / "rewarm"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name not in ("changelog.md", "contributing.md")),
]
NEEDS = ("a cluster", "the package index", "a downloaded model", "files of yours")
"""What a block may say that it needs, in a comment above it: then no test runs it as it is written."""
RUN_BY = {
    "bash scripts/quickstart.sh": "system/test_quickstart.py::test_quickstart_twice_and_its_configs_on_four_ranks",
    "rewarm train configs/quickstart/continue.yaml parallel.tensor=2 parallel.pipeline=2": (
        "system/test_quickstart.py::test_quickstart_twice_and_its_configs_on_four_ranks"
    ),
    "rewarm data demo": "system/test_quickstart.py::test_quickstart_twice_and_its_configs_on_four_ranks",
}
"""Tests that run a block, by its first line."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Each bash block of a page with the line above it."""
    for match in re.finditer(r"([^\n]*)\n```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        yield match[1], match[2]


def lines_of(page: Path) -> Iterator[str]:
    """Command lines of ``rewarm``, in blocks of any kind and in running text; continued ones joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?: {4})?((?:torchrun |srun |rewarm )[^\n]*)$", text, re.MULTILINE):
        if "rewarm " in line:
            yield line[line.index("rewarm ") :]
    yield from re.findall(r"`(rewarm [^`]*)`", text)
    yield from (inner.replace("\n", " ") for inner in re.findall(r"\$\((rewarm [^)]*)\)", text))


def words_of(line: str) -> list[str]:
    """Arguments of a line up to a pipe, a redirection or the end of the command."""
    words = shlex.split(line.replace("--output ...", "--output FOLDER"), comments=True)[1:]
    ends = [place for place, word in enumerate(words) if word in ("|", ">", "&&", ";")]
    return [word for word in words[: min(ends, default=None)] if word != "..."]  # type: ignore[type-var]


def check_command(line: str) -> None:
    """Refuse an unknown verb, an unknown option and a setting that does not exist."""
    words = words_of(line.replace("\n", " "))
    if not words or words[0].isupper() or words[0] == "--help":
        return
    command = root_command()
    context = command.make_context("rewarm", [], resilient_parsing=True)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, f"No such command in {line}"
        command, context = found, found.make_context(name, [], parent=context, resilient_parsing=True)
    try:
        command.make_context(line, list(words), parent=context.parent)
    except Exception as error:
        # typer may bring its own copy of click, so that its errors are known by their names. Capitals represent values.
        kind = type(error).__name__
        value = kind == "BadParameter" and ("does not exist" in str(error) or any(word.isupper() for word in words))
        if kind not in ("MissingParameter", "NoArgsIsHelpError", "Exit") and not value:
            raise
    for before, word in zip(["", *words], words, strict=False):
        setting = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)*)=", word)
        if setting and not before.startswith("--"):
            assert is_setting(setting[1]), f"there is no setting {setting[1]}"


@functools.cache
def root_command() -> Any:
    return typer.main.get_command(app)


def is_setting(place: str) -> bool:
    """True if a stage takes it."""
    annotation: object = RunConfig
    for name in place.split("."):
        options = [each for each in (annotation, *typing.get_args(annotation)) if isinstance(each, type)]
        section = next((each for each in options if issubclass(each, Section)), None)
        if section is None:
            return dict in options or typing.get_origin(annotation) is dict
        if name not in section.model_fields:
            return False
        annotation = section.model_fields[name].annotation
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_is_one(page: Path) -> None:
    for line in lines_of(page):
        try:
            check_command(line)
        except Exception as error:
            raise AssertionError(f"{page.name}: {line}: {error}") from error


def test_a_wrong_verb_option_or_setting_is_found() -> None:
    for line in ("rewarm trian x.yaml", "rewarm export runs/x --chek", "rewarm train x.yaml schedule.peek=1"):
        with pytest.raises(Exception, match=r"No such command|No such option|there is no setting"):
            check_command(line)


def test_every_block_is_run_by_a_test_or_says_what_it_needs() -> None:
    unknown = []
    for page in PAGES:
        for above, block in blocks(page):
            first = block.splitlines()[0].partition(" #")[0].strip()
            marker = re.fullmatch(r"<!-- needs: (.*) -->", above)
            if marker is None and first not in RUN_BY:
                unknown.append(f"{page.relative_to(ROOT)}: {first}")
            assert marker is None or marker[1] in NEEDS, (page.name, above)
    assert not unknown, "neither run by a test nor marked with <!-- needs: ... -->: " + "; ".join(unknown)
    for test in RUN_BY.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize(
    ("registry", "pages"),
    [
        (MIXERS, ("README.md", "docs/guide/mixtures.md")),
        (SCHEDULES, ("README.md", "docs/guide/schedules.md")),
        (OPTIMIZERS, ("README.md",)),
    ],
    ids=["mixers", "schedules", "optimizers"],
)
def test_every_method_is_in_the_guide(registry: Registry[object], pages: tuple[str, ...]) -> None:
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert not [name for name in registry if f"`{name}`" not in text], page


def test_where_cpu_and_gpu_differ_is_listed() -> None:
    pattern = re.compile(r"torch\.cuda\.(?!Stream)|is_cuda|type [!=]= \"cuda\"|is_gpu\(\)")
    listed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        code = "\n".join(ast.unparse(node) for node in without_docstrings(path))
        if pattern.search(code.replace("'", '"')):
            assert f"`{place}`" in listed, f"{place} asks for CUDA, and CONTRIBUTING does not list it"


def without_docstrings(path: Path) -> list[ast.stmt]:
    """The statements of a module, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree.body


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_private_names_of_megatron_are_imported_in_its_folder_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                assert path.parent == PACKAGE / "engine" / "megatron" or not any(
                    name.name.startswith("_") for name in node.names
                ), path


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of CONTRIBUTING as modules in the working directory."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = []
    for name, code in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", text, re.DOTALL):
        (tmp_path / f"{name}.py").write_text(code)
        names.append(name)
    assert names == ["my_mixer", "my_schedule", "my_optimizer"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = [(registry, dict(registry._methods)) for registry in (MIXERS, SCHEDULES, OPTIMIZERS)]
    yield
    for registry, methods in before:
        registry._methods.clear()
        registry._methods.update(methods)
    for name in names:
        sys.modules.pop(name, None)


def test_the_examples_of_contributing_work_as_extensions(examples: None) -> None:
    values = {
        "name": "x", "model": {}, "data": {"a": "a", "b": "b"}, "duration": "10 steps",
        "extensions": ["my_mixer", "my_schedule", "my_optimizer"],
        "mixture": {"mixer": "my_mixer", "my_mixer": {"memory": 0.25}},
        "schedule": {"kind": "my_schedule", "peak": 1.0, "minimum": 0.0, "warmup": "0 steps"},
        "optimizer": {"name": "my_optimizer", "beta1": 0.5, "beta2": 0.75, "weight_decay": 0.1},
    }  # fmt: skip
    config = build(values)
    first, second = (build_mixer(config.mixture, ["a", "b"], np.array([0.5, 0.5]), lambda text: 3) for _ in range(2))
    assert first.update(Observation(1, losses=np.array([3.0, 1.0]))).tolist() == [0.75, 0.25]
    second.load_state_dict(first.state_dict())
    for mixer in (first, second):  # 0.25 * (3, 1) + 0.75 * (1, 1)
        assert mixer.update(Observation(2, losses=np.array([1.0, 1.0]))).tolist() == [0.6, 0.4]
    rates = LearningRate(config.schedule, 100, 10)
    assert [rates.at(tokens) for tokens in (0, 50, 75, 100)] == [1.0, 1.0, 0.5, 0.0]
    parameter, gradient = torch.tensor([1.0, 1.0]), torch.tensor([4.0, -4.0])
    state = {"exp_avg": torch.tensor([0.0, 8.0])}
    group = {"lr": 0.5, "weight_decay": 0.1, "betas": (0.5, 0.75)}
    config.optimizer.rule(config.optimizer).update(group, [parameter], [gradient], [state], 0.5)
    # Scaled gradients 2 and -2: directions sign(1) and sign(3); moments 0.75 m + 0.25 g.
    torch.testing.assert_close(parameter, torch.tensor([0.45, 0.45]))
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.5, 5.5]))


def test_stages_named_in_commands_are_whole() -> None:
    for page in PAGES:
        for line in lines_of(page):
            words = words_of(line.replace("\n", " "))
            for word in words:
                if word.startswith("configs/") and word.endswith(".yaml"):
                    with contextlib.chdir(ROOT):
                        load(word, [other for other in words if re.match(r"[a-z_.]+=", other) and "..." not in other])
