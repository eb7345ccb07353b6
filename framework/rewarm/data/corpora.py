"""Real text that every installation has: English prose, Python source and C++ source.

What is gathered depends on the installed files alone: they are taken in the order of a hash of their relative paths, so
that a cap cuts every library alike, and up to a fixed number of bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from rewarm.errors import UserError

MIN_LETTERS = 200
"""Texts that are shorter once trimmed are left out."""
MAX_LETTERS = 20_000
"""Longer texts are cut off there: many documents make a better split than long ones."""
_SKIPPED_PYTHON = frozenset(
    # Tests and generated tables are no source that one would like to write; pydoc_data is the English domain's.
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
)
_PROSE_PACKAGES = ("numpy", "scipy", "torch", "pyarrow", "datasets")
_MIN_DOCSTRING = 400
_OPENS_DOCSTRING = re.compile(r"(?:\A|:|,|\()\s*r?\Z")
_BADGE = re.compile(r"^\s*(?:<|\[!\[|!\[|\.\. image|\|.*\|\s*$).*\n", re.MULTILINE)
_PYTHON_HEADER = re.compile(r"\A(?:\s*#[^\n]*\n)+")
_C_HEADER = re.compile(r"\A\s*(?:/\*.*?\*/|(?:\s*//[^\n]*\n)+)", re.DOTALL)
_TORCH_GUARD = "#if !defined(TORCH_STABLE_ONLY)"
"""Opens a condition around the whole of most headers, whose other branch is one message."""
_LEGAL = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the installation that a corpus draws on."""

    path: Path
    name: str
    """Path relative to its root, which orders the files alike on every machine."""
    size: int


def english_files() -> list[SourceFile]:
    """The interpreter's help topics and news, the packages' long descriptions, and modules rich in docstrings."""
    stdlib = _standard_library()
    found = [_source(stdlib / "pydoc_data" / "topics.py", stdlib)]
    found += [_source(path, stdlib) for path in sorted((stdlib / "idlelib").glob("*.txt"))]
    for distribution in distributions():
        file = next((file for file in distribution.files or () if file.name in ("METADATA", "PKG-INFO")), None)
        path = Path(str(distribution.locate_file(file))) if file is not None else None
        if path is not None and path.is_file():
            found.append(_source(path, path.parents[1]))
    for folder in filter(None, map(_package_folder, _PROSE_PACKAGES)):
        found += [file for file in _walk(folder, (".py",), _SKIPPED_PYTHON) if file.size > 20_000]
    whole = [file for file in found if file.path.suffix != ".py" or file.path.name == "topics.py"]
    return _unique(whole) + _unique([file for file in found if file not in set(whole)])


def python_files() -> list[SourceFile]:
    """The standard library of the interpreter, in a virtual environment that of its base."""
    return _unique(list(_walk(_standard_library(), (".py",), _SKIPPED_PYTHON)))


def cpp_files() -> list[SourceFile]:
    """The C++ headers that come with torch, but for the thousands of generated stubs of its operators."""
    torch = _package_folder("torch")
    if torch is None or not (torch / "include").is_dir():
        raise UserError(f"there are no C++ headers of torch in {torch}", fix="install torch with pip")
    return _unique(list(_walk(torch / "include", (".h", ".hpp", ".cuh"), frozenset({"ops", "generated"}))))


def documents(domain: str, files: list[SourceFile], max_bytes: int) -> Iterator[str]:
    """Trimmed texts of a corpus, no two alike, up to a number of UTF-8 bytes.

    Args:
        domain: english, python or cpp.
        files: what :func:`english_files`, :func:`python_files` or :func:`cpp_files` gave.
        max_bytes: the text that goes over it is the last.
    """
    extract = {"english": _english, "python": _python, "cpp": _cpp}[domain]
    seen: set[bytes] = set()
    total = 0
    for file in files:
        for raw in extract(file):
            text = raw.strip()[:MAX_LETTERS]
            # Digits and spaces apart: generated headers repeat with another number in them.
            digest = hashlib.blake2b(re.sub(r"[\d\s]+", "", text).encode(), digest_size=16).digest()
            if len(text) < MIN_LETTERS or digest in seen:
                continue
            seen.add(digest)
            total += len(text.encode())
            yield text + "\n"
            if total >= max_bytes:
                return


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _package_folder(package: str) -> Path | None:
    """Where a package lies, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _source(path: Path, root: Path) -> SourceFile:
    return SourceFile(path, path.relative_to(root).as_posix(), path.stat().st_size)


def _walk(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> Iterator[SourceFile]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in names:
            if name.endswith(suffixes):
                yield _source(Path(folder) / name, root)


def _unique(files: list[SourceFile]) -> list[SourceFile]:
    named = {file.name: file for file in files}
    return sorted(named.values(), key=lambda file: hashlib.blake2b(file.name.encode(), digest_size=8).digest())


def _read(file: SourceFile) -> str:
    return file.path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n")


def _english(file: SourceFile) -> Iterator[str]:
    if file.path.name == "topics.py":
        from pydoc_data.topics import topics

        yield from (text for _, text in sorted(topics.items()))
    elif file.path.suffix == ".py":
        yield from _docstrings(_read(file))
    elif file.path.name in ("METADATA", "PKG-INFO"):
        yield _BADGE.sub("", _read(file).partition("\n\n")[2])
    else:
        yield _read(file)


def _docstrings(source: str) -> Iterator[str]:
    """The long docstrings of a module, by its triple quotes: parsing it would take ten times as long."""
    pieces = source.split('"""')
    for before, text in zip(pieces[::2], pieces[1::2], strict=False):
        if len(text) >= _MIN_DOCSTRING and _OPENS_DOCSTRING.search(before[-200:]):
            yield inspect.cleandoc(text)


def _python(file: SourceFile) -> Iterator[str]:
    yield _without_legal_header(_read(file), _PYTHON_HEADER)


def _cpp(file: SourceFile) -> Iterator[str]:
    text = _read(file)
    if text.startswith(_TORCH_GUARD):
        text = text.partition("\n")[2].rpartition("#else\n#error")[0] or text
    yield _without_legal_header(text, _C_HEADER)


def _without_legal_header(text: str, header: re.Pattern[str]) -> str:
    """The text without the notices that every file of a library opens with."""
    while (match := header.match(text)) is not None and _LEGAL.search(match.group()):
        text = text[match.end() :]
    return text
