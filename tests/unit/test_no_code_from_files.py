"""Nothing in the package reads a file in a way that can run what the file names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import rewarm

ROOT = Path(rewarm.__file__).parent
FORBIDDEN = {
    "pickle.load", "pickle.loads", "cPickle.loads", "dill.load", "joblib.load", "marshal.loads", "shelve.open",
    "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "torch.jit.load", "FileSystemReader", "pandas.read_pickle",
}  # fmt: skip


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Place and dotted name of every call."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(given.value) for given in call.keywords if given.arg == name), None)


def test_no_reader_runs_what_it_reads() -> None:
    wrong, seen = [], 0
    for where, name, call in calls():
        seen += 1
        bad = name in FORBIDDEN
        bad |= name == "torch.load" and keyword(call, "weights_only") != "True"
        bad |= name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") not in (None, "False")
        bad |= name == "yaml.load" and not (keyword(call, "Loader") or "").endswith(("SafeLoader", "_Loader"))
        bad |= name.endswith("dist_checkpointing.load") and len(call.args) < 3
        if bad:
            wrong.append(f"{where} calls {name}")
    assert seen > 1000 and not wrong, "\n".join(wrong)


def test_one_module_unpickles_and_none_but_it_may() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "Unpickler" in path.read_text() or "import pickle\n" in path.read_text()
    }
    assert users == {"checkpoint/unpickle.py", "checkpoint/random_state.py"}
