"""Errors that a user can mend.

:class:`UserError` is what every check of the user's input raises; the command line prints it as one message and
exits with status 2, without a stack trace unless ``--debug`` is given. Broken invariants are plain ``assert``, or
:func:`ensure` where what follows would be wrong without a word.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used.

    Args:
        message: what is wrong, naming the value.
        fix: what to do about it; printed on a line of its own.
    """

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(message if fix is None else f"{message}\n  fix: {fix}")


class NodeFault(RuntimeError):
    """A machine is not fit to train on; another one may well be.

    Args:
        node: its name.
        message: what is wrong with it.
    """

    def __init__(self, node: str, message: str) -> None:
        self.node, self.message = node, message
        super().__init__(f"node {node}: {message}")


def ensure(holds: object, what: str) -> None:
    """``assert``, but not left out by ``python -O``: for what guards against wrong numbers or foreign memory.

    Args:
        holds: what must be true.
        what: what is wrong if it is not.

    Raises:
        AssertionError: if it is not.
    """
    if not holds:
        raise AssertionError(what)


def nearest(name: str, known: list[str]) -> str | None:
    """The known name closest to a misspelt one, or None when nothing is close."""
    import difflib

    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None
