"""Lower folders never import higher ones, not even inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import rewarm

LAYERS = [
    {"config"},
    {"data", "schedule"},
    {"mixing", "replay"},
    {"model", "offload", "checkpoint"},
    {"engine", "planner"},
    {"evaluation", "retention", "resilience", "tracking"},
    {"train"},
    {"launch"},
    {"cli"},
]
"""The lowest first. A folder may use its own layer and those before it; planner and engine do not know each other."""


def imports() -> Iterator[tuple[str, str, str]]:
    """Folder that imports, folder that is imported, and where."""
    root = Path(rewarm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                parts = module.split(".")
                if parts[0] == "rewarm" and len(parts) > 1:
                    yield own, parts[1], f"{path.relative_to(root)}:{node.lineno}"


def test_lower_folders_do_not_import_higher_ones() -> None:
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    found = list(imports())
    assert len(found) > 500
    wrong = [
        f"{where} imports {other}"
        for own, other, where in found
        if (own in height and other in height and height[own] < height[other]) or {own, other} == {"planner", "engine"}
    ]
    assert not wrong, "\n".join(wrong)


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
