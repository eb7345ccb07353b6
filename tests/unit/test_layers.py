"""Lower folders never import higher ones, not even inside a function; every folder has a floor; no import circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rewarm

LAYERS = [
    {"config"},
    {"data", "schedule", "kernels"},
    {"mixing", "replay"},
    {"model", "offload", "checkpoint", "optimizers"},
    {"engine", "planner"},
    {"evaluation", "retention", "resilience", "tracking"},
    {"train"},
    {"launch"},
    {"report", "cli"},
]
"""The lowest first. A folder may use its own layer and those before it; planner and engine do not know each other."""
OUTSIDE = {"_native", "__pycache__"}
"""Folders without code of their own."""
HEIGHT = {name: number for number, layer in enumerate(LAYERS) for name in layer}
ROOT = Path(rewarm.__file__).parent


def imported(tree: ast.AST, *, everywhere: bool) -> Iterator[tuple[str, int]]:
    """Modules of the package that are imported, with their lines; ``everywhere``: inside functions, too."""
    for node in ast.walk(tree) if everywhere else _at_import(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{name.name}" for name in node.names]
        modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        yield from ((module, node.lineno) for module in modules if module.startswith("rewarm."))


def _at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: not those of functions, nor of type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)) or isinstance(
            node, ast.Try | ast.With
        ):
            yield from _at_import(node)


def crossings(root: Path) -> list[str]:
    """Imports of a higher folder, and folders without a floor."""
    unknown = {path.name for path in root.iterdir() if path.is_dir()} - set(HEIGHT) - OUTSIDE
    wrong = [f"{name}/ has no floor: name it in LAYERS" for name in sorted(unknown)]
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).parts[0]
        for module, line in imported(ast.parse(path.read_text(encoding="utf-8")), everywhere=True):
            other = module.split(".")[1]
            if own not in HEIGHT or other not in HEIGHT:
                continue
            if HEIGHT[own] < HEIGHT[other] or {own, other} == {"planner", "engine"}:
                wrong.append(f"{path.relative_to(root)}:{line} imports {other}")
    return wrong


def circle(root: Path) -> list[str]:
    """Modules that import each other in a circle; empty if none do."""
    names = {path: ".".join(("rewarm", *path.relative_to(root).with_suffix("").parts)) for path in root.rglob("*.py")}
    edges = {
        name: {m for m, _ in imported(ast.parse(path.read_text(encoding="utf-8")), everywhere=False)} - {name}
        for path, name in names.items()
    }
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> list[str]:
        state[name] = 1
        for other in sorted(edges[name] & edges.keys()):
            if state.get(other) == 1:
                return [*trail[trail.index(other) :], other]
            if other not in state and (found := visit(other, [*trail, other])):
                return found
        state[name] = 2
        return []

    for name in sorted(edges):
        if name not in state and (found := visit(name, [name])):
            return found
    return []


def test_lower_folders_do_not_import_higher_ones() -> None:
    assert not crossings(ROOT)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not circle(ROOT)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for folder in ("config", "mixing"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config" / "one.py").write_text("x = 1\n")
    (tmp_path / "mixing" / "two.py").write_text("from rewarm.config.one import x\n")
    return tmp_path


def test_planted_faults_are_found(package: Path) -> None:
    assert not crossings(package) and not circle(package)
    (package / "novel").mkdir()
    assert crossings(package) == ["novel/ has no floor: name it in LAYERS"]
    (package / "novel").rmdir()
    (package / "config" / "one.py").write_text("def f():\n    from rewarm.mixing import two\n")
    assert crossings(package) == ["config/one.py:2 imports mixing", "config/one.py:2 imports mixing"]
    assert not circle(package), "an import inside a function closes no circle"
    (package / "config" / "one.py").write_text("from rewarm.mixing.two import y\n")
    assert circle(package) == ["rewarm.config.one", "rewarm.mixing.two", "rewarm.config.one"]


def test_no_assert_does_any_work() -> None:
    """``python -O`` leaves them out, with what they call."""
    harmless = {
        "len",
        "all",
        "any",
        "isinstance",
        "tuple",
        "sorted",
        "set",
        "sum",
        "int",
        "min",
        "max",
        "getattr",
        "get",
    }
    harmless |= {
        "keys",
        "values",
        "items",
        "list",
        "range",
        "numel",
        "dim",
        "is_pinned",
        "is_contiguous",
        "group",
        "shapes",
    }
    found = []
    for path in sorted(Path(rewarm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                calls = [each.func for each in ast.walk(node.test) if isinstance(each, ast.Call)]
                names = [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "?") for call in calls]
                found += [f"{path.name}:{node.lineno} {name}" for name in names if name not in harmless]
    assert found == []
