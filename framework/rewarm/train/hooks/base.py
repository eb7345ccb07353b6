"""The interface of a hook: what happens beside the steps, and what of it a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from rewarm.train.run import Run, StepRecord


class Hook:
    """Something that happens beside the steps.

    An invocation calls, each for all hooks in turn: :meth:`setup`, then :meth:`load_state_dict` and
    :meth:`load_sharded` where it resumes, :meth:`start`, :meth:`after_step` for each step, :meth:`finish` and
    :meth:`close`; after an error :meth:`on_error` and :meth:`close`. Hooks are called by ``(order, name)`` on every
    rank, so that their collectives match. All methods are called on all ranks and may use collectives, but for those
    that say otherwise.

    Whatever an attribute holds that a later step changes must come back at a resume: by :meth:`state_dict`, by
    :meth:`save_sharded`, or by :meth:`setup` and :meth:`start` from what the run folder holds. A test resumes every
    registered hook and compares all attributes but those in :attr:`transient`.
    """

    name: ClassVar[str]
    """Under which it is registered and its state is saved."""
    order: ClassVar[int] = 400
    """Where it stands: 0 signals, 100 tracking, 200 evaluation, 300 mixture, 900 checkpoint. A hook that a stage
    switches on stands between the first and the last of them: it knows of a stop, and what it changed is saved."""
    transient: ClassVar[tuple[str, ...]] = ()
    """Attributes that a resume need not bring back, because nothing that is reproducible depends on them."""

    @classmethod
    def build(cls, settings: Any) -> Self:
        """The hook of a stage. As it stands, each setting becomes the constructor's argument of the same name.

        Args:
            settings: the hook's own section; None if it has none.
        """
        values = {} if settings is None else {name: getattr(settings, name) for name in type(settings).model_fields}
        return cls(**values)

    def setup(self, run: Run) -> None:
        """Make what the state is loaded into. ``run.step`` is already that of the checkpoint. Nothing is written, and
        nothing happens yet."""

    def start(self, run: Run) -> None:
        """Before the first step of this invocation, with the state restored."""

    def after_step(self, run: Run, record: StepRecord) -> None:
        """After each step; ``run.step`` already counts it."""

    def finish(self, run: Run) -> None:
        """After the last step of this invocation, whatever ended it but an error."""

    def on_error(self, run: Run, error: BaseException) -> None:
        """After an exception, of the engine or of any hook. No collectives: other ranks may be anywhere. Nothing that
        a resume reads may be written, and an exception here is logged and goes no further."""

    def close(self, run: Run) -> None:
        """Give back what this hook holds of the process, once, after :meth:`finish` or :meth:`on_error`; also if
        :meth:`start` was never reached. No collectives. An exception here is logged and goes no further."""

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on, as plain JSON values, equal on every rank: rank 0's is saved. Empty: nothing is.
        No collectives."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave. Not called for a checkpoint that has no state of this hook.

        Raises:
            UserError: if it does not fit the stage.
        """

    def save_sharded(self, run: Run, folder: Path) -> None:
        """Write state that is cut over the ranks, or too large for JSON, into an existing empty folder: the
        checkpoint's ``hooks/<name>``. A hook that defines this defines :meth:`load_sharded`, too.

        File names must tell the ranks apart. Every file is hashed and verified like the model's.
        """

    def load_sharded(self, run: Run, folder: Path) -> None:
        """Read what :meth:`save_sharded` wrote, on this or another layout.

        Raises:
            UserError: if it cannot be read on this layout.
        """

    @classmethod
    def is_sharded(cls) -> bool:
        """True if it keeps files in a checkpoint."""
        return cls.save_sharded is not Hook.save_sharded
