"""Lines of metrics.jsonl and evaluation.jsonl, and a file of lines that survives a kill.

A number that is not finite is written as ``null``: JSON has no NaN, and a reader in any language must get through
the file. So ``loss: null`` beside ``tokens: 0`` means no tokens of that domain in the interval, and ``null``
anywhere else means NaN or infinity.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from rewarm.errors import UserError
from rewarm.files import parse_json, sync_folder, write_whole

TIMING_FIELDS = frozenset({"tokens_per_second"})
"""Keys of a metrics line that differ between two identical runs."""


class DomainMetrics(TypedDict):
    """A domain's part of a metrics line."""

    loss: float | None
    """Mean training loss in nats per token since the last line; None without tokens."""
    tokens: int
    """Target tokens since the last line."""
    weight: float
    """Share of the mixture in force at this step, in [0, 1]."""
    objective: NotRequired[float]
    """Share of the loss, in [0, 1]; only where it may differ from ``weight``."""


class MetricsLine(TypedDict):
    """One line of metrics.jsonl."""

    step: int
    """Steps finished."""
    tokens: int
    """Target tokens trained in this stage."""
    loss: float | None
    """Mean training loss in nats per token since the last line."""
    learning_rate: float
    """Rate of the step."""
    grad_norm: float
    """Global gradient norm of the step before clipping."""
    tokens_per_second: float
    """Target tokens per second of wall time since the last line."""
    sample_hash: str
    """Hash of the step's ordered (domain, window) list."""
    domains: dict[str, DomainMetrics]
    """By domain, in the order of the run."""


class DomainEvaluation(TypedDict):
    """A domain's part of an evaluation line."""

    loss: float | None
    """Mean held-out loss in nats per token."""
    bits_per_byte: float | None
    """The same per byte of text; None where the bytes behind the tokens are not known."""


class EvaluationLine(TypedDict):
    """One line of evaluation.jsonl."""

    step: int
    """Steps finished; 0 is before the first."""
    tokens: int
    """Target tokens trained in this stage."""
    domains: dict[str, DomainEvaluation]
    """By domain, in the order of the run."""


def metrics_line(
    *,
    step: int,
    tokens: int,
    domain_names: Sequence[str],
    loss_sums: Sequence[float],
    token_counts: Sequence[int],
    weights: Sequence[float],
    objective: Sequence[float] | None = None,
    learning_rate: float,
    grad_norm: float,
    tokens_per_second: float,
    sample_hash: str,
) -> MetricsLine:
    """A line of metrics.jsonl.

    Args:
        step: steps finished.
        tokens: target tokens trained in this stage.
        domain_names: [D].
        loss_sums: [D], token losses in nats summed since the last line; lists or numpy arrays.
        token_counts: [D], target tokens since the last line.
        weights: [D], mixture weights in force, as shares of 1.
        objective: [D], shares of the loss; None where they are the weights.
        learning_rate: rate of the step.
        grad_norm: global norm before clipping.
        tokens_per_second: target tokens per second since the last line.
        sample_hash: hash of the step's ordered (domain, window) list.
    """
    domains: dict[str, DomainMetrics] = {
        name: {"loss": _mean(loss, count), "tokens": int(count), "weight": float(weight)}
        for name, loss, count, weight in zip(domain_names, loss_sums, token_counts, weights, strict=True)
    }
    for name, share in zip(domain_names, objective if objective is not None else (), strict=objective is not None):
        domains[name]["objective"] = float(share)
    total = math.fsum(float(loss) for loss in loss_sums) if _all_finite(loss_sums) else math.nan
    return {
        "step": int(step),
        "tokens": int(tokens),
        "loss": _mean(total, sum(int(count) for count in token_counts)),
        "learning_rate": float(learning_rate),
        "grad_norm": float(grad_norm),
        "tokens_per_second": float(tokens_per_second),
        "sample_hash": sample_hash,
        "domains": domains,
    }


def evaluation_line(
    *,
    step: int,
    tokens: int,
    domain_names: Sequence[str],
    loss_sums: Sequence[float],
    token_counts: Sequence[int],
    bytes_per_token: Sequence[float | None],
) -> EvaluationLine:
    """A line of evaluation.jsonl.

    Args:
        step: steps finished.
        tokens: target tokens trained in this stage.
        domain_names: [D].
        loss_sums: [D], held-out token losses in nats, summed.
        token_counts: [D], held-out target tokens.
        bytes_per_token: [D], bytes of text behind a token of the held-out split; None where not known.
    """
    domains: dict[str, DomainEvaluation] = {}
    for name, total, count, width in zip(domain_names, loss_sums, token_counts, bytes_per_token, strict=True):
        loss = _mean(total, count)
        domains[name] = {"loss": loss, "bits_per_byte": bits_per_byte(loss, width)}
    return {"step": int(step), "tokens": int(tokens), "domains": domains}


def bits_per_byte(loss: float | None, bytes_per_token: float | None) -> float | None:
    """``loss / ln 2 / bytes_per_token``: comparable between tokenizers, as nats per token are not."""
    if loss is None or not bytes_per_token:
        return None
    return loss / math.log(2) / float(bytes_per_token)


def _mean(total: float, count: int) -> float | None:
    return float(total) / int(count) if int(count) else None


def _all_finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(float(value)) for value in values)


@dataclass(frozen=True, slots=True)
class Truncation:
    """What :meth:`JsonLines.truncate_after` did."""

    kept: int
    """Lines still in the file."""
    dropped: int
    """Whole lines above the step."""
    damaged: int
    """Lines that could not be read, a torn last one among them; they are dropped too."""


class JsonLines:
    """A file with one JSON object per line, in the order of their keys as given.

    A line is written with one system call and handed to the system at once, so a killed process tears at most the
    last one. Floats are written with all their digits.

    Args:
        path: the file; made with its folder if missing.
        key: the integer of each line that orders the file.

    Raises:
        UserError: if the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, key: str = "step") -> None:
        self.path = Path(path)
        self.key = key
        self._file = self._open()

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            UserError: if the file system refuses it (full, gone, read-only).
        """
        data = json.dumps(_plain(line), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._refused(error) from error

    def truncate_after(self, last: int) -> Truncation:
        """Drop every line whose key is above ``last``, and every damaged one.

        The shorter file is written aside and renamed, so a kill in between leaves the old one whole. A file that
        needs no change is not touched.
        """
        kept: list[bytes] = []
        dropped = damaged = 0
        for raw in self.path.read_bytes().splitlines(keepends=True):
            position = self._position(raw)
            if position is None:
                damaged += 1
            elif position > last:
                dropped += 1
            else:
                kept.append(raw)
        if dropped or damaged:
            self._file.close()
            try:
                write_whole(self.path, b"".join(kept))
            except OSError as error:
                raise self._refused(error) from error
            finally:
                self._file = self._open()
        return Truncation(len(kept), dropped, damaged)

    def sync(self) -> None:
        """Wait until the lines are on the disk; called before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._file.close()

    def _open(self) -> FileIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            if is_new:
                sync_folder(self.path.parent)
            return file
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.path}: {error.strerror}", fix="check space and permissions there")

    def _position(self, raw: bytes) -> int | None:
        """The key of a whole line, None for a damaged one."""
        if not raw.endswith(b"\n"):
            return None
        try:
            position = parse_json(raw)[self.key]
        except (ValueError, KeyError, TypeError):
            return None
        return position if isinstance(position, int) else None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a file of lines, in order; a torn last one and damaged ones are left out.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", fix="name a run folder that has trained") from error
    lines = []
    for raw in data.splitlines(keepends=True):
        try:
            line = parse_json(raw) if raw.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _plain(value: Any) -> Any:
    """The value with None in place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
