"""The hooks of a stage, and their part in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarm.config.registry import HOOKS
from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.train.hooks.base import Hook

if TYPE_CHECKING:
    from rewarm.train.run import Run

log = logging.getLogger(__name__)

FOLDER = "hooks"
"""Where a checkpoint keeps the files of hooks, each in a folder of its name."""


def build_hooks(config: RunConfig) -> list[Hook]:
    """The hooks that every stage has and those that this one switches on, in the order in which they are called.

    Raises:
        UserError: if a hook refuses its settings, or stands where its changes would not be saved.
    """
    hooks: list[Hook] = []
    for method in HOOKS.methods():
        settings = None if method.settings is None else getattr(config.hooks, method.name, None)
        if method.settings is None or settings is not None:
            hooks.append(method.target.build(settings))
    hooks.sort(key=lambda hook: (hook.order, hook.name))
    first, last = HOOKS["signals"].target.order, HOOKS["checkpoint"].target.order
    for hook in hooks:
        if HOOKS[hook.name].settings is not None and not first < hook.order < last:
            raise UserError(
                f"hooks.{hook.name} has order={hook.order}, and a hook stands after signals ({first}) and before "
                f"checkpoint ({last})",
                fix=f"set {type(hook).__name__}.order to a number between them",
            )
    return hooks


def check_saved_hooks(hooks: Iterable[Hook], saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint with the state of a hook that is not there: what it changed would be forgotten.

    Args:
        hooks: of the run.
        saved: state by name.
        checkpoint: where it stands.

    Raises:
        UserError: naming the hook.
    """
    there = {hook.name: hook for hook in hooks}
    unknown = sorted(set(saved) - set(there))
    if unknown:
        raise UserError(
            f"{checkpoint} holds the state of the hook {unknown[0]!r}, which this run does not have",
            fix=f"switch it on with hooks.{unknown[0]}, and name the module that defines it under extensions",
        )
    for name in saved:
        if there[name].is_sharded() and not (checkpoint / FOLDER / name).is_dir():
            raise UserError(
                f"{checkpoint} has no folder {FOLDER}/{name}, in which the hook {name!r} keeps its state",
                fix="restore the checkpoint from a copy",
            )


def set_up_hooks(run: Run, saved: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Let every hook of a run make its state, and continue from the saved one. Collective.

    Args:
        run: with its hooks.
        saved: state by name; a hook that is not in it begins anew.
        checkpoint: where files of hooks stand; None where the run begins.
    """
    for hook in run.hooks:
        hook.setup(run)
        if hook.name in saved:
            hook.load_state_dict(saved[hook.name])
            if checkpoint is not None and hook.is_sharded():
                hook.load_sharded(run, checkpoint / FOLDER / hook.name)


def hooks_state(hooks: Iterable[Hook]) -> dict[str, Any]:
    """State by name, as plain JSON values, of the hooks that have some."""
    states = {hook.name: (hook.state_dict(), hook.is_sharded()) for hook in hooks}
    return {name: state for name, (state, is_sharded) in states.items() if state or is_sharded}


def make_sharded_folders(hooks: Iterable[Hook], checkpoint: Path) -> None:
    """Make the folders that :func:`write_sharded_hooks` fills. On the main rank alone."""
    for hook in hooks:
        if hook.is_sharded():
            (checkpoint / FOLDER / hook.name).mkdir(parents=True)


def write_sharded_hooks(run: Run, checkpoint: Path) -> None:
    """Write the files of hooks. Collective."""
    for hook in run.hooks:
        if hook.is_sharded():
            hook.save_sharded(run, checkpoint / FOLDER / hook.name)


def call_all(hooks: Sequence[Hook], call: Callable[[Hook], None]) -> None:
    """Call every hook, whatever becomes of the others: an exception is logged, and goes no further."""
    for hook in hooks:
        try:
            call(hook)
        except Exception:
            log.exception("hook %s failed while the run ended", hook.name)
