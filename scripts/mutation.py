#!/usr/bin/env python
"""A mutation test: small faults are put into the code one at a time, and the tests must notice each.

    python scripts/mutation.py --seed 10 --number 200            of mixing/, schedule/, data/ and train/run.py
    python scripts/mutation.py --seed 1 --number 50 schedule     of some of them
    python scripts/mutation.py --seed 10 --number 200 --report   what was found, without running anything

The faults are cosmic-ray's, made by an environment of its own in ``build/mutation`` (installed at the first run). One
place of the code is drawn after another with the seed, and one fault for each. Tests run in a copy of the tree, those
that concern the module, in a process forked from an interpreter that has the libraries loaded but not the package, so
that most faults cost less than a second. Results are kept there, and the same command goes on. A survivor that
changes no result belongs into ``scripts/mutation_equivalent.json``, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import filterfalse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("framework/rewarm")
PLACES = ("mixing", "schedule", "data", "train/run.py")
WORK = ROOT / "build" / "mutation"
EQUIVALENT = Path(__file__).with_name("mutation_equivalent.json")
MOST_MEMORY = 16 << 30
"""Bytes that the tests of a fault may take: it may ask for any size."""
SLOW = ("data", "train")
"""Folders whose tests take long because they build corpora or bring up engines."""
LEAST_SECONDS, FACTOR = 60.0, 8.0
"""Limit of a fault's tests: this much, or this many times as long as without a fault. What takes longer has noticed."""


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    module: str
    """Path below the package."""
    operator: str
    occurrence: int
    place: tuple[int, int]
    """Line and column."""


@dataclass(frozen=True)
class Result:
    """What became of a fault."""

    module: str
    diff: str
    """The lines that differ, with + and -."""
    outcome: str
    """killed, survived or slow."""
    line: int
    operator: str


def list_mutants(modules: list[str]) -> None:
    """In cosmic-ray's environment: print every fault that can be made, one JSON line each."""
    from cosmic_ray.ast import Visitor, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    class Places(Visitor):  # type: ignore[misc]
        def __init__(self, operator: Any) -> None:
            self.operator, self.found = operator, []

        def visit(self, node: Any) -> Any:
            self.found += [start for start, _ in self.operator.mutation_positions(node)]
            return node

    for module in modules:
        tree = get_ast((ROOT / PACKAGE / module).read_text())
        for name in sorted(filterfalse(_is_left_out, operator_names())):
            places = Places(get_operator(name)())
            places.walk(tree)
            for occurrence, place in enumerate(places.found):
                print(json.dumps(asdict(Mutant(module, name, occurrence, place))))


def _is_left_out(operator: str) -> bool:
    """Whether an operator makes no fault of its own: those that put in variables of one's choice, and identity in place
    of a comparison, which differs by how the interpreter shares constants."""
    return bool(re.search(r"/Variable|ComparisonOperator_(?!Is)[A-Za-z]+_Is(Not)?$", operator))


def make_mutants() -> None:
    """In cosmic-ray's environment: a faulty source for every fault on standard input."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    for line in sys.stdin:
        given = json.loads(line)
        source = (ROOT / PACKAGE / given["module"]).read_text()
        print(json.dumps(mutate_code(source, get_operator(given["operator"])(), given["occurrence"])))


def ask(arguments: list[str], given: str = "") -> list[Any]:
    """Run this script in cosmic-ray's environment, which is made if it is missing."""
    python = WORK / "environment" / "bin" / "python"
    if not python.exists():
        venv.create(WORK / "environment", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "cosmic-ray>=8.3,<9"], check=True)
    command = [str(python), __file__, *arguments]
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@cache
def original(module: str) -> str:
    """A module as it was at the start: somebody may edit while this runs."""
    return (ROOT / PACKAGE / module).read_text()


def draw(modules: list[str], seed: int, number: int) -> list[tuple[Mutant, str]]:
    """Faults with their sources: places in random order, one fault of each kind of operator a place, without those that
    change only annotations and docstrings."""
    found = [Mutant(**{**values, "place": tuple(values["place"])}) for values in ask(["--list", *modules])]
    places: dict[tuple[str, tuple[int, int], str], list[Mutant]] = {}
    for mutant in found:
        places.setdefault((mutant.module, mutant.place, mutant.operator.split("_")[0]), []).append(mutant)
    generator = random.Random(seed)
    chosen = [generator.choice(places[key]) for key in sorted(places)]
    generator.shuffle(chosen)
    pairs: list[tuple[Mutant, str]] = []
    for begin in range(0, len(chosen), number):
        if len(pairs) < number:
            part = chosen[begin : begin + number]
            sources = ask(["--make"], "\n".join(json.dumps(asdict(mutant)) for mutant in part))
            pairs += [pair for pair in zip(part, sources, strict=True) if _computes_other(*pair)]
    pairs = pairs[:number]
    print(f"{len(found)} faults at {len(places)} places; {len(pairs)} drawn, seed {seed}", flush=True)
    return pairs


def _computes_other(mutant: Mutant, source: str | None) -> bool:
    if source is None:
        return False
    try:
        return _computed(source) != _computed(original(mutant.module))
    except SyntaxError:
        return False


def _computed(source: str) -> str:
    """The code without what is never computed: annotations (all modules postpone them), docstrings, type checks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [child for child in body if not _is_text(child)]  # type: ignore[attr-defined]
    for flag in _guarding_flags(tree):
        flag.value = ast.Constant(True)
    return ast.dump(tree)


def _guarding_flags(tree: ast.Module) -> Iterator[ast.keyword]:
    """Settings that only forbid what nobody does: of ``dataclass``, and ``strict`` of ``zip``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("dataclass", "zip"):
            yield from (keyword for keyword in node.keywords if keyword.arg in ("frozen", "slots", "strict"))


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, or imports for annotations only."""
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def copy_tree(target: Path) -> None:
    """The tree without what tests do not need."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("framework", "tests", "scripts", "configs", "csrc", "launch", "docs"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, target / name)
    # Bytecode that is believed only when the source's digest is that of the file.
    command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "framework"]
    subprocess.run(command, cwd=target, check=True)


def tests_of(module: str, tree: Path) -> list[str]:
    """Test files that concern a module: those that bear its name, those that import it, and then those of its folder,
    unless that is a slow one and there are some of the first kinds."""
    name, short = "rewarm." + module.removesuffix(".py").replace("/", "."), Path(module).stem
    package, _, last = name.rpartition(".")
    imports = re.compile(rf"\b{re.escape(name)}\b|from {re.escape(package)} import [^\n]*\b{last}\b")
    files = sorted((tree / "tests/unit").rglob("test_*.py"))
    own = [path for path in files if path.is_relative_to(tree / "tests/unit" / Path(module).parts[0])]
    named = [path for path in own if short in path.stem]
    found = named + [path for path in files if path not in named and imports.search(path.read_text())]
    if not found or Path(module).parts[0] not in SLOW:
        found += [path for path in own if path not in found]
    return [str(path.relative_to(tree)) for path in found]


def run_tests(
    tree: Path, tests: list[str], limit: float | None, left_out: Sequence[str] = (), modules_file: Path | None = None
) -> str:
    """Run tests in a fork of this process: ``passed``, ``failed`` or ``slow``."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
        os.chdir(tree)
        output = os.open(tree.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        options = ["-q", "--hypothesis-seed=0", "-p", "no:cacheprovider", "-p", "no:xdist"]
        options += ["-x"] if limit else []
        options += [word for test in left_out for word in ("--deselect", test)]
        code = int(pytest.main([*options, *tests]))
        if modules_file is not None:
            modules_file.write_text(json.dumps(sorted(sys.modules)))
        sys.stdout.flush()
        os._exit(code)
    deadline = time.monotonic() + (limit or 1e9)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "slow"
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests left behind
    return "passed" if os.waitstatus_to_exitcode(ended[1]) in (0, 5) else "failed"


class Tests:
    """The test files, with the time that each takes without a fault."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self._limits: dict[str, float] = {}
        self._left_out: list[str] = []

    def outcome(self, module: str, source: str) -> str:
        """Run the tests of a module that has another content, file by file until one notices."""
        for test in tests_of(module, self.tree):
            self._prepare(test)
            with faulty(self.tree / PACKAGE / module, source):
                outcome = run_tests(self.tree, [test], self._limits[test], self._left_out)
            if outcome != "passed":
                return outcome
        return "passed"

    def _prepare(self, test: str) -> None:
        """Load the libraries that a test file loads, and run it without a fault. Tests that fail here, as one may that
        measures the memory of its process, are left out."""
        if test in self._limits:
            return
        loaded = self.tree.parent / "modules.json"
        for _ in range(2):
            began = time.monotonic()
            passed = run_tests(self.tree, [test], None, self._left_out, loaded) == "passed"
            _load(json.loads(loaded.read_text()), self.tree)
            if passed:
                self._limits[test] = max(LEAST_SECONDS, FACTOR * (time.monotonic() - began))
                return
            output = (self.tree.parent / "output").read_text()
            self._left_out += re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", output)
            print(f"left out, since they fail without a fault: {', '.join(self._left_out)}")
        sys.exit(f"tests fail without a fault:\n{output[-3000:]}")


def _load(names: list[str], tree: Path) -> None:
    """Import what is not part of the tree, so that forks have it."""
    own = {"rewarm", "conftest", "__main__"} | {path.stem for path in (tree / "tests").iterdir()}
    for name in names:
        if name.split(".")[0] not in own and not name.startswith(("_pytest", "pytest", "xdist")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


@contextlib.contextmanager
def faulty(path: Path, source: str) -> Iterator[None]:
    """A file with another content, for a while."""
    before = path.read_text()
    path.write_text(source)
    try:
        yield
    finally:
        path.write_text(before)


def difference(module: str, source: str) -> str:
    """The lines of a fault."""
    lines = difflib.unified_diff(original(module).split("\n"), source.split("\n"), lineterm="", n=0)
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("---", "+++"))


def known(path: Path) -> dict[tuple[str, str, int], Result]:
    """Results of earlier runs, by module, difference and line."""
    if not path.exists():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(result.module, result.diff, result.line): result for result in results}


def report(results: list[Result]) -> int:
    """Print the survivors, those that change a result first; returns how many of these there are."""
    reasons = {(entry["module"], entry["diff"]): entry["why"] for entry in json.loads(EQUIVALENT.read_text())}
    survivors = [result for result in results if result.outcome == "survived"]
    open_ones = [result for result in survivors if (result.module, result.diff) not in reasons]
    for result in open_ones:
        print(f"\nsurvived: {PACKAGE / result.module}:{result.line} ({result.operator})\n{result.diff}")
    slow = sum(result.outcome == "slow" for result in results)
    print(
        f"\n{len(results)} faults: {len(results) - len(survivors)} noticed ({slow} of them by taking too long), "
        f"{len(survivors) - len(open_ones)} equivalent with a reason, {len(open_ones)} survived"
    )
    return len(open_ones)


def main() -> None:
    """See the module's text."""
    if sys.argv[1:2] == ["--list"]:
        return list_mutants(sys.argv[2:])
    if sys.argv[1:2] == ["--make"]:
        return make_mutants()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", default=list(PLACES), help="files or folders below framework/rewarm")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--number", type=int, required=True, help="faults to try")
    parser.add_argument("--report", action="store_true", help="only print what was found before")
    options = parser.parse_args()
    modules = sorted(
        str(path.relative_to(ROOT / PACKAGE))
        for place in options.places
        for path in ([ROOT / PACKAGE / place] if place.endswith(".py") else (ROOT / PACKAGE / place).rglob("*.py"))
    )
    pairs = draw(modules, options.seed, options.number)
    sys.exit(1 if report(run(pairs, only_known=options.report)) else 0)


def run(pairs: list[tuple[Mutant, str]], *, only_known: bool) -> list[Result]:
    """Try faults that were not tried before, in the order drawn; returns the results of all of them."""
    place = WORK / "results.jsonl"
    before = known(place)
    results = []
    tests: Tests | None = None
    for mutant, source in pairs:
        diff = difference(mutant.module, source)
        result = before.get((mutant.module, diff, mutant.place[0]))
        # A survivor is tried again: the tests may have been mended.
        if not only_known and (result is None or result.outcome == "survived"):
            tests = tests or _prepared()
            found = tests.outcome(mutant.module, source)
            outcome = {"passed": "survived", "failed": "killed"}.get(found, found)
            result = Result(mutant.module, diff, outcome, mutant.place[0], mutant.operator)
            with open(place, "a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            print(f"{outcome:8} {mutant.module}:{mutant.place[0]} {mutant.operator}", flush=True)
        if result is not None:
            results.append(result)
    return results


def _prepared() -> Tests:
    """A copy of the tree, and this process made ready to run its tests."""
    tree = WORK / f"tree-{os.getpid()}" / "copy"
    copy_tree(tree)
    import atexit

    atexit.register(shutil.rmtree, tree.parent, ignore_errors=True)
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
                   "PYTHONPATH": str(tree / "framework")}  # fmt: skip
    sys.path[:0] = [str(tree / "framework"), str(tree / "tests")]
    return Tests(tree)


if __name__ == "__main__":
    main()
