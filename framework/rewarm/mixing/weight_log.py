"""The weight log: every weight vector of a run with the sample at which it takes effect, in ``mixture.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rewarm.errors import UserError
from rewarm.mixing.weights import TOTAL


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """One line of the log."""

    sample: int
    """Global sample index from which the weights hold."""
    weights: dict[str, int]
    """Integers summing to 2^32, by domain."""
    reason: str
    """Why they changed, or why they did not."""


class WeightLog:
    """Append-only record of the weights of a run.

    Lines stand in the order they were decided, which need not be the order of their samples: a planned phase is written
    long before it begins. The log is authoritative: a resumed run reads the weights back, also those that were decided
    after the checkpoint it resumes from, and never computes them again. Only one process may write it.

    Args:
        path: the file; it need not exist. A last line that a crash left torn is removed when the log is opened.

    Raises:
        UserError: if a line other than a torn last one is no entry, naming ``file:line``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries = _read(self.path)

    def entries(self) -> list[WeightEntry]:
        """All entries, in the order they were written."""
        return list(self._entries)

    def at(self, sample: int) -> WeightEntry | None:
        """The entry that takes effect at exactly this sample index (the last one written), or None."""
        return next((entry for entry in reversed(self._entries) if entry.sample == sample), None)

    def effective(self, sample: int) -> WeightEntry | None:
        """The entry in effect for this sample index (of those at one index the last written), or None before all."""
        held = [entry for entry in reversed(self._entries) if entry.sample <= sample]
        return max(held, key=lambda entry: entry.sample) if held else None

    def append(self, sample: int, weights: Mapping[str, int], reason: str) -> WeightEntry:
        """Write an entry and wait until it is on disk, before the weights can take effect.

        Raises:
            UserError: if the file cannot be written.
        """
        assert sum(weights.values()) == TOTAL, f"weights sum to {sum(weights.values())}, not 2^32"
        entry = WeightEntry(sample, {name: int(weight) for name, weight in weights.items()}, reason)
        line = json.dumps({"sample": entry.sample, "weights": entry.weights, "reason": entry.reason}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write the weight log {self.path}: {error.strerror}") from error
        self._entries.append(entry)
        return entry


def _read(path: Path) -> list[WeightEntry]:
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, _, torn = content.rpartition(b"\n")
    if torn:
        _repair(path, len(content) - len(torn))
    lines = whole.split(b"\n") if whole else []
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _repair(path: Path, length: int) -> None:
    """Cut a line without its end: it was never acknowledged, so nothing can have been sampled by it."""
    with path.open("r+b") as file:
        file.truncate(length)
        file.flush()
        os.fsync(file.fileno())


def _parse(line: bytes, where: str) -> WeightEntry:
    try:
        value = json.loads(line)
        weights = {str(name): int(weight) for name, weight in value["weights"].items()}
        entry = WeightEntry(int(value["sample"]), weights, str(value["reason"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is no entry of a weight log: {error}", fix="restore the file; a run cannot resume without it"
        ) from error
    if sum(weights.values()) != TOTAL or min(weights.values(), default=-1) < 0:
        raise UserError(
            f"{where}: the weights sum to {sum(weights.values())}, not 2^32", fix="restore the file as it was written"
        )
    return entry
