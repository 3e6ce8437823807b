"""A folder of images, one subfolder a class.

Two layouts are read. ``ROOT/CLASS/IMAGE``: validation and test splits are carved. Or
``ROOT/train/CLASS/IMAGE`` with ``ROOT/test/CLASS/IMAGE`` beside it, and perhaps
``ROOT/validation/CLASS/IMAGE``. With ``train`` and ``validation`` alone, as ImageNet has it, the
latter is the final measurement, so it becomes the test split and validation is carved from
``train``. "val" and "valid" are other names for "validation".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from gossamer.core.errors import InputError
from gossamer.core.task import Augment, Classification
from gossamer.datasets.augment import compose, flip, shift
from gossamer.datasets.decode import SUFFIXES
from gossamer.datasets.encoded import CACHE_BYTES, EncodedSource, encoded
from gossamer.datasets.splits import assemble

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}


def image_folder(
    path: str | Path,
    *,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Classification:
    """Opens a folder of images.

    Args:
        path: the folder, see the module.
        seed: of the splits that are carved (20 % test, then 10 % of the rest validation).
        image_size: height and width in pixels. Default: the images' own if all have the same and
            no side is over 224, otherwise 224 x 224.
        channels: 1 or 3. Default: 1 if all images are grey, otherwise 3.
        limit: at most about this many training images.
        mean: per channel. Default: measured on the training split.
        std: per channel. Default: measured on the training split.
        augment: of raw training batches. Default: flips, and shifts by up to an eighth.
        cache_bytes: decoded images kept in memory, at most.

    Raises:
        InputError: if there are no classes, only one, an empty one, or an image that cannot be
            read, which is named.
    """
    root = Path(path)
    parts = _parts(root)
    classes = _classes(parts["train"])
    listed = {split: _list(folder, classes) for split, folder in parts.items()}
    files = [file for found, _ in listed.values() for file in found]
    names = [str(file) for file in files]
    labels = torch.tensor([label for _, labels in listed.values() for label in labels])
    whole = encoded(
        files,
        names,
        labels,
        image_size=image_size,
        channels=channels,
        cache_bytes=cache_bytes,
    )
    sources: dict[str, EncodedSource] = {}
    at = 0
    for split, (found, _) in listed.items():
        sources[split] = whole.take(torch.arange(at, at + len(found)).numpy())
        at += len(found)
    height, width = whole.size
    return assemble(
        sources["train"],
        classes,
        name=root.resolve().name,
        seed=seed,
        validation=sources.get("validation"),
        test=sources.get("test"),
        limit=limit,
        mean=mean,
        std=std,
        augment=augment or compose(flip(), shift(max(1, min(height, width) // 8))),
    )


def holds_images(path: Path) -> bool:
    """Whether a folder looks like classes of images (or should be refused as such)."""
    return any(_subfolders(path)) or any(map(_is_image, path.iterdir()))


def _parts(root: Path) -> dict[str, Path]:
    present = {folder.name.lower(): folder for folder in _subfolders(root)}
    parts: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        found = [present[name] for name in names if name in present]
        if found and any(_subfolders(found[0])):
            parts[split] = found[0]
    if "train" not in parts:
        return {"train": root}
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return parts


def _classes(folder: Path) -> list[str]:
    classes = [subfolder.name for subfolder in _subfolders(folder)]
    if not classes:
        loose = sum(map(_is_image, folder.iterdir()))
        raise InputError(
            f"{folder} has no classes: put the images of each class into a subfolder of its name"
            + (f" (there are {loose} images beside no subfolder)" if loose else "")
        )
    for name in classes:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{folder} has a subfolder whose name is not UTF-8: {name!r}"
            ) from error
    if len(classes) == 1:
        raise InputError(
            f"{folder} has only one class, {classes[0]!r}; a classifier needs at least two"
        )
    return classes


def _list(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    known = {name: label for label, name in enumerate(classes)}
    files: list[Path] = []
    labels: list[int] = []
    for subfolder in _subfolders(folder):
        if subfolder.name not in known:
            raise InputError(
                f"{subfolder} is a class that has no training images; known are "
                f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
            )
        found = sorted(
            Path(where) / name
            for where, _, names in os.walk(subfolder, followlinks=False)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        )
        if not found:
            raise InputError(f"the class {subfolder} holds no images ({' '.join(SUFFIXES)})")
        files += found
        labels += [known[subfolder.name]] * len(found)
    return files, labels


def _subfolders(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    return [entry for entry in entries if entry.is_dir() and not entry.name.startswith((".", "_"))]


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES
