"""The weight log: every weight vector of a run with the sample at which it takes effect, in ``mixture.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.errors import UserError, ensure
from rewarm.files import parse_json, sync_folder
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
    objective: dict[str, int] | None = None
    """Shares of the domains in the loss, integers summing to 2^32; None where the loss is of what is sampled."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; without ``objective`` where there is none, which is how older logs are written."""
        value: dict[str, Any] = {"sample": self.sample, "weights": self.weights, "reason": self.reason}
        return value if self.objective is None else value | {"objective": self.objective}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> WeightEntry:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: if it is not that.
        """
        weights = {str(name): int(weight) for name, weight in value["weights"].items()}
        objective = value.get("objective")
        if objective is not None:
            objective = {str(name): int(weight) for name, weight in objective.items()}
            if objective.keys() != weights.keys():
                raise ValueError("objective and weights are of different domains")
        return cls(int(value["sample"]), weights, str(value["reason"]), objective)


def decided_at(step: int) -> str:
    """How the reason of an entry begins that an evaluation decided. What was planned has other reasons."""
    return f"step {step}: "


class WeightLog:
    """Append-only record of the weights of a run.

    Lines stand in the order they were decided, which need not be the order of their samples: a planned phase is written
    long before it begins. The log is authoritative: a resumed run reads the weights back, also those that were decided
    after the checkpoint it resumes from, and never computes them again. Only one process may write it.

    Args:
        path: the file; it need not exist. A last line that a crash left torn, or that another process is writing at
            this moment, is no entry; it is cut off when this process appends, and never by one that only reads.

    Raises:
        UserError: if a line other than a torn last one is no entry, naming ``file:line``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries, self._torn_at = _read(self.path)

    def entries(self) -> list[WeightEntry]:
        """All entries, in the order they were written."""
        return list(self._entries)

    def at(self, sample: int, step: int | None = None) -> WeightEntry | None:
        """The entry that takes effect at exactly this sample index (the last one written), or None.

        Args:
            sample: global sample index.
            step: only what the evaluation after this many steps decided, see :func:`decided_at`; a planned change may
                take effect at the same sample.
        """
        begins = "" if step is None else decided_at(step)
        held = (entry for entry in reversed(self._entries) if entry.sample == sample)
        return next((entry for entry in held if entry.reason.startswith(begins)), None)

    def effective(self, sample: int) -> WeightEntry | None:
        """The entry in effect for this sample index (of those at one index the last written), or None before all."""
        held = [entry for entry in reversed(self._entries) if entry.sample <= sample]
        return max(held, key=lambda entry: entry.sample) if held else None

    def append(
        self, sample: int, weights: Mapping[str, int], reason: str, objective: Mapping[str, int] | None = None
    ) -> WeightEntry:
        """Write an entry and wait until it is on disk, before the weights can take effect.

        Raises:
            UserError: if the file cannot be written.
        """
        entry = WeightEntry.from_dict({"sample": sample, "weights": weights, "reason": reason, "objective": objective})
        for shares in (entry.weights, entry.objective):
            ensure(shares is None or sum(shares.values()) == TOTAL, "the shares of the objective do not sum to 2^32")
        line = json.dumps(entry.to_dict()) + "\n"
        try:
            if self._torn_at is not None:
                _cut(self.path, self._torn_at)
                self._torn_at = None
            is_new = not self.path.exists()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise UserError(f"cannot write the weight log {self.path}: {error.strerror}") from error
        self._entries.append(entry)
        return entry


def _read(path: Path) -> tuple[list[WeightEntry], int | None]:
    """The entries, and where a torn line begins, if there is one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], None
    except OSError as error:
        raise UserError(f"cannot read the weight log {path}: {error.strerror}") from error
    whole, _, torn = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    entries = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    return entries, len(content) - len(torn) if torn else None


def _cut(path: Path, length: int) -> None:
    """Cut a line without its end: it was never acknowledged, so nothing can have been sampled by it."""
    with path.open("r+b") as file:
        file.truncate(length)
        file.flush()
        os.fsync(file.fileno())


def _parse(line: bytes, where: str) -> WeightEntry:
    try:
        entry = WeightEntry.from_dict(parse_json(line))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{where} is no entry of a weight log: {error}", fix="restore the file; a run cannot resume without it"
        ) from error
    for shares in (entry.weights, entry.objective):
        if shares is not None and (sum(shares.values()) != TOTAL or min(shares.values(), default=-1) < 0):
            raise UserError(
                f"{where}: the weights sum to {sum(shares.values())}, not 2^32",
                fix="restore the file as it was written",
            )
    return entry
