"""Image data sets of Hugging Face: from a folder on disk, or by name when that is asked for.

A folder written by ``save_to_disk`` is read here directly (Arrow files and their schema).
``hub:OWNER/NAME`` goes through the ``datasets`` library, which downloads what it does not have:
writing the name is asking for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.core.errors import GossamerError, InputError, MissingExtra, first_line
from gossamer.core.files import read_json
from gossamer.core.task import Augment, Classification
from gossamer.datasets.tables import (
    SPLIT_PREFIXES,
    ImageTable,
    assemble_tables,
    image_tables,
    to_images,
)


def saved_dataset(
    path: str | Path,
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Classification:
    """Opens a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    Args:
        path: the folder.
        seed: of the splits that are carved.
        image_size: height and width in pixels. Default: the images' own if all have the same and
            no side is over 224, otherwise 224 x 224.
        channels: 1 or 3. Default: 1 if all images are grey, otherwise 3.
        limit: at most about this many training images.
        mean: per channel. Default: measured on the training split.
        std: per channel. Default: measured on the training split.
        augment: of raw training batches. Default: flips, and shifts by up to an eighth.

    Raises:
        InputError: if a file is missing or corrupt.
    """
    root = Path(path)
    if (root / "dataset_dict.json").is_file():
        listing = read_json(root / "dataset_dict.json")
        splits = listing.get("splits") if isinstance(listing, dict) else None
        if not isinstance(splits, list) or not all(isinstance(s, str) for s in splits):
            raise InputError(f"{root / 'dataset_dict.json'} names no splits")
        folders = {_split(split): root / Path(split).name for split in splits}
    else:
        folders = {"train": root}
    return image_tables(
        {split: _arrow_files(folder) for split, folder in folders.items() if split},
        name=root.resolve().name,
        seed=seed,
        image_size=image_size,
        channels=channels,
        limit=limit,
        mean=mean,
        std=std,
        augment=augment,
    )


def hub_dataset(
    name: str,
    *,
    config: str | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Classification:
    """Opens an image data set of the Hugging Face hub by name; downloads what is not cached.

    Args:
        name: "owner/name".
        config: one of its configurations, where it has several.
        seed: of the splits that are carved.
        image_size: height and width in pixels, see :func:`saved_dataset`.
        channels: 1 or 3.
        limit: at most about this many training images.
        mean: per channel. Default: measured on the training split.
        std: per channel. Default: measured on the training split.
        augment: of raw training batches. Default: flips, and shifts by up to an eighth.

    Raises:
        MissingExtra: if ``datasets`` is not installed.
        InputError: if it cannot be loaded or holds no labelled images.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hub") from error
    try:
        loaded: Any = datasets.load_dataset(name, config)
        parts = {
            split: _table(dataset, f"the split {original} of {name}")
            for original, dataset in loaded.items()
            if (split := _split(original))
        }
    except GossamerError:
        raise
    # The library raises whatever its file systems and network raise.
    except Exception as error:
        raise InputError(
            f"the data set {name} cannot be loaded from the hub: {first_line(error)}"
        ) from error
    return assemble_tables(
        parts,
        name=name,
        seed=seed,
        image_size=image_size,
        channels=channels,
        limit=limit,
        mean=mean,
        std=std,
        augment=augment,
    )


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _split(name: str) -> str | None:
    lowered = name.lower()
    for split, prefixes in SPLIT_PREFIXES.items():
        if lowered.startswith(prefixes):
            return split
    return None


def _arrow_files(folder: Path) -> list[Path]:
    """The shards, in the order of ``state.json`` (never a path outside of the folder)."""
    state = read_json(folder / "state.json")
    try:
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'state.json'} lists no data files") from error
    if not files:
        raise InputError(f"{folder / 'state.json'} lists no data files")
    return files


def _table(dataset: Any, name: str) -> ImageTable:
    # Selections and shuffles of the library live beside the table, not in it.
    return to_images(dataset.flatten_indices().data.table, name)
