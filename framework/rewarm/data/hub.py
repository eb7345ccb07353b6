"""Datasets that the ``datasets`` library opens: saved ones, cloned ones, and those of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewarm.errors import UserError


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def dataset_files(given: str, subset: str | None, split: str | None) -> list[Path]:
    """The Arrow files of anything that the library can open, converted once into its cache if need be.

    Args:
        given: a folder, or a name on the hub.
        subset: configuration of a dataset.
        split: of the dataset; None means train.

    Raises:
        UserError: if it cannot be opened, or has no such split.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(given)
    try:
        if path.is_dir() and is_saved_dataset(path):
            if subset is not None:
                raise UserError(f"--subset {subset}: {given} is a saved dataset, which has none", fix="remove --subset")
            loaded = datasets.load_from_disk(given)
        else:
            loaded = datasets.load_dataset(given, subset)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds for an unknown name, no network, a bad file
        reason = str(error).strip().splitlines()
        what = "is a folder, but" if path.is_dir() else "is no file or folder here, and"
        raise UserError(
            f"{given} {what} datasets cannot load it: {reason[0] if reason else repr(error)}",
            fix="check the name; a hub name needs a network, and some need --subset",
        ) from error
    return _arrow_files(given, _pick_split(given, loaded, split))


def _pick_split(given: str, loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        if split is not None:
            raise UserError(f"--split {split}: {given} was saved as one split", fix="remove --split")
        return loaded
    split = split or "train"
    if split not in loaded:
        raise UserError(f"{given} has no split {split!r}; it has {sorted(loaded)}", fix="name one: --split NAME")
    return loaded[split]


def _arrow_files(given: str, dataset: Any) -> list[Path]:
    if dataset._indices is not None:
        raise UserError(
            f"{given} was saved with a selection of rows that lies beside its files",
            fix="save it flat: dataset.flatten_indices().save_to_disk(folder)",
        )
    return [Path(file["filename"]) for file in dataset.cache_files]
