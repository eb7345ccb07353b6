"""The lineage of a run: its chain of parents and the domains that each of them consumed, in ``lineage.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from rewarm.errors import UserError
from rewarm.files import parse_json, write_whole

FILE_NAME = "lineage.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ConsumedDomain:
    """A domain and how much of it a stage trained on."""

    name: str
    path: str
    """Absolute path, as in the data section of the stage."""
    held_out: str | None
    """Absolute prefix of a separate held-out pair, or None for the folder's own split."""
    fingerprint: str
    """Hash of its content."""
    tokens: int
    """Target tokens trained on."""
    windows: int
    """Windows trained on, repetitions included."""
    tokenizer_fingerprint: str
    """Hash of the tokenizer it was built with; empty where a bare token file says nothing of it."""
    held_out_fraction: float = 0.01
    """Share of a bare token file that was held out, which decides what its training split is."""
    order: str = ""
    """Identity of the order its windows came in, see :func:`order_identity`; empty in lineages that do not say."""
    replayed: bool = False
    """True if these windows were among those that earlier stages had trained on, fed back; they came in the order in
    which the earlier stages had drawn them, and no order goes on after them."""
    held_out_loss: float | None = None
    """Nats per token at the stage's last evaluation; None where nobody wrote it down."""
    measured_on: str = ""
    """Identity of the windows of that loss, see :func:`measure_identity`."""


def order_identity(fingerprint: str, num_windows: int, seed: int) -> str:
    """Two stages draw a domain's windows in the same order exactly if its content, its window length and their seeds
    are equal."""
    return f"{fingerprint}/{num_windows}/{seed}"


def measure_identity(held_out_fingerprint: str, sequence_length: int, num_windows: int) -> str:
    """Two held-out losses are of the same windows exactly if the content, the length and the number of those are
    equal."""
    return f"{held_out_fingerprint}/{sequence_length}/{num_windows}"


def split_order(order: str) -> tuple[int, int]:
    """Number of windows and seed of what :func:`order_identity` gave."""
    _, num_windows, seed = order.rsplit("/", 2)
    return int(num_windows), int(seed)


@dataclass(frozen=True, slots=True)
class Stage:
    """One ancestor: a run of rewarm, or a Hugging Face model that came from elsewhere."""

    name: str
    kind: Literal["run", "huggingface"]
    path: str
    """Absolute path of the folder."""
    final_learning_rate: float | None = None
    """Learning rate of its last step; None where nobody wrote it down."""
    tokens: int = 0
    """Target tokens it trained on."""
    domains: tuple[ConsumedDomain, ...] = ()
    id: str = ""
    """Given to a run when it starts; empty for a model from elsewhere, and in what the first versions wrote."""

    @property
    def identity(self) -> str:
        """Tells stages apart: a path does not, since another run may lie where an ancestor lay. Derived from kind and
        path where no identity was given."""
        if self.id:
            return self.id
        return hashlib.blake2b(f"{self.kind}:{self.path}".encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Lineage:
    """Stages from the oldest ancestor to the newest."""

    stages: tuple[Stage, ...] = ()

    @property
    def parent(self) -> Stage | None:
        """The newest stage."""
        return self.stages[-1] if self.stages else None

    def extended(self, stage: Stage) -> Lineage:
        """This lineage with a stage at its end; a stage that is there already is brought up to date.

        A run calls it at every checkpoint with what it consumed so far, so that a child of an unfinished run knows
        its parent rightly.
        """
        if self.stages and self.stages[-1].identity == stage.identity:
            return Lineage((*self.stages[:-1], stage))
        return Lineage((*self.stages, stage))

    def domains(self) -> list[ConsumedDomain]:
        """Every domain of every stage, each content once: newest name and path, tokens and windows summed."""
        merged: dict[str, ConsumedDomain] = {}
        for stage in self.stages:
            for domain in stage.domains:
                before = merged.pop(domain.fingerprint, None)
                if before is not None:
                    tokens, windows = before.tokens + domain.tokens, before.windows + domain.windows
                    domain = replace(domain, tokens=tokens, windows=windows)
                merged[domain.fingerprint] = domain
        return [domain for domain in merged.values() if domain.windows > 0]

    def drawn(self, order: str) -> int:
        """Windows that the stages drew of one order: where a stage that draws of it goes on, so that none is trained
        on a second time before all have been once. What was fed back is not counted again."""
        domains = [domain for stage in self.stages for domain in stage.domains]
        return sum(domain.windows for domain in domains if domain.order == order and not domain.replayed)

    def loss_when_learned(self, fingerprint: str, measured_on: str, at_the_end: float) -> float | None:
        """The lowest held-out loss that a domain had at the end of a stage that trained on it: what forgetting is
        counted from (Chaudhry et al. 2018, arXiv:1801.10112).

        Args:
            fingerprint: of the domain's content.
            measured_on: identity of the windows; a loss of other windows is no loss to compare with.
            at_the_end: loss on these windows at the end of the newest stage.

        Returns:
            Nats per token; None if no stage trained on it, or an earlier one did and its loss is not known.
        """
        found = []
        for stage in self.stages:
            for domain in stage.domains:
                if domain.fingerprint != fingerprint or domain.windows == 0:
                    continue
                if stage is self.stages[-1]:
                    found.append(at_the_end)
                if domain.held_out_loss is not None and domain.measured_on == measured_on:
                    found.append(domain.held_out_loss)
                elif stage is not self.stages[-1]:
                    return None
        return min(found, default=None)

    def save(self, folder: str | Path) -> None:
        """Write ``lineage.json`` into a run folder; a reader sees the old file or the new one, never a torn one."""
        place = Path(folder) / FILE_NAME
        text = json.dumps({"format": _FORMAT, "stages": [asdict(stage) for stage in self.stages]}, indent=2)
        try:
            write_whole(place, text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {place}: {error.strerror}") from error

    @staticmethod
    def load(folder: str | Path) -> Lineage:
        """The lineage that continuing from a folder has: the folder's own ``lineage.json``, which ends with the run
        itself, or, for a Hugging Face folder without one, that model as the only ancestor, with no known domain.

        Raises:
            UserError: if the folder is neither, or its ``lineage.json`` is damaged.
        """
        folder = Path(folder)
        place = folder / FILE_NAME
        if place.exists():
            return _parse(place)
        if (folder / "config.json").exists():
            return Lineage((Stage(folder.resolve().name, "huggingface", str(folder.resolve())),))
        raise UserError(
            f"{folder} is neither a run (no {FILE_NAME}) nor a Hugging Face folder (no config.json)",
            fix="set parent to a run folder or to a folder that from_pretrained can load",
        )


def _parse(place: Path) -> Lineage:
    try:
        value = parse_json(place.read_bytes())
        stages = tuple(_stage(entry) for entry in value["stages"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place} cannot be read: {error}", fix="restore it from a copy of the run") from error
    if value.get("format") != _FORMAT:
        raise UserError(f"{place} has format {value.get('format')}; this version reads format {_FORMAT}")
    return Lineage(stages)


def _stage(entry: Mapping[str, Any]) -> Stage:
    domains = tuple(ConsumedDomain(**domain) for domain in entry["domains"])
    stage = Stage(**{**entry, "domains": domains})
    _check_types(stage)
    for domain in domains:
        _check_types(domain)
    return stage


_KINDS: dict[Any, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
}
"""What JSON may hold for a field, by the field's annotation."""


def _check_types(part: Stage | ConsumedDomain) -> None:
    """Refuse values that would fail, or pass for others, only when they are used.

    Raises:
        ValueError: naming the field.
    """
    for field in fields(part):
        value: Any = getattr(part, field.name)
        kinds = _KINDS.get(field.type)
        if kinds is None:
            continue
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        if not fits or (isinstance(value, int) and value < 0):
            raise ValueError(f"{field.name}={value!r} of {part.name!r}")
