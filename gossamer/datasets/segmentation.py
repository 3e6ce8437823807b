"""Images with masks: Parquet tables, npz arrays, folders ``images/`` + ``masks/``, and lists.

Everything is brought to one size when it is read: images bilinearly with antialiasing, masks by
the nearest pixel, both stretched alike, so that pixel and label stay together.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from gossamer.core.errors import InputError, first_line
from gossamer.core.segmentation import IGNORED, JointAugment, Segmentation, joint_flip
from gossamer.core.task import Preprocess, seed_of
from gossamer.datasets.decode import FORMATS, SUFFIXES, decode, probe
from gossamer.datasets.tables import find_tables

Pair = tuple[Path | bytes, Path | bytes, str]
"""An encoded image, its encoded mask, and what they are called in errors."""


def segmentation_tables(
    path: str | Path,
    classes: Sequence[str],
    *,
    size: tuple[int, int],
    channels: int = 3,
    ignored: Sequence[int] = (IGNORED,),
    seed: int = 0,
    augment: JointAugment | None = None,
) -> Segmentation:
    """Opens Parquet files whose columns ``image`` and ``label`` hold encoded images.

    Args:
        path: a folder with ``train*.parquet`` and, perhaps, ``val*`` and ``test*``.
        classes: their names, in label order.
        size: height and width in pixels.
        channels: 1 or 3.
        ignored: labels of pixels that belong to no class.
        seed: of the splits that are carved where they are not given.
        augment: of raw training batches. Default: flips.

    Raises:
        InputError: if a file is missing or corrupt, a column is missing, an image cannot be read
            or does not fit its mask, or a label is out of range.
    """
    tables = find_tables(Path(path))
    if "train" not in tables:
        raise InputError(f"{path} has no train*.parquet")
    read = {
        split: _read([pair for file in files for pair in _rows(file)], size, channels)
        for split, files in tables.items()
    }
    return assemble_masks(
        read, classes, name=Path(path).resolve().name, ignored=ignored, seed=seed, augment=augment
    )


def segmentation_arrays(
    path: str | Path,
    classes: Sequence[str],
    *,
    test: int,
    validation: int,
    size: tuple[int, int] | None = None,
    tiles: int = 1,
    ignored: Sequence[int] = (IGNORED,),
    augment: JointAugment | None = None,
) -> Segmentation:
    """Opens an npz file with ``images`` and ``labels``.

    The last ``test`` rows are the test split and the ``validation`` rows before them validate:
    rows of a stack are neighbours in space or time, so a random draw would leak.

    Args:
        path: the file; ``images`` is ``[n, height, width]`` or ``[n, height, width, 1 or 3]``,
            uint8, ``labels`` ``[n, height, width]``.
        classes: their names, in label order.
        test: rows for testing.
        validation: rows for validation.
        size: height and width in pixels of a whole row. Default: as stored.
        tiles: each row is cut into ``tiles x tiles`` images, after it was resized.
        ignored: labels of pixels that belong to no class.
        augment: of raw training batches. Default: flips.

    Raises:
        InputError: if the file is missing, corrupt, lacks an array, or has too few rows.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except KeyError as error:
        raise InputError(f"{path} has no arrays named images and labels") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise InputError(f"{path} is not an npz file that can be read: {first_line(error)}") from (
            error
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or labels.shape != images.shape[:3] or images.dtype != np.uint8:
        raise InputError(
            f"{path} has images {list(images.shape)} of {images.dtype} and labels "
            f"{list(labels.shape)}; uint8 images and one label a pixel are needed"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"the labels of {path} are {labels.dtype}; whole numbers are needed")
    if test < 1 or validation < 1 or test + validation >= len(images):
        raise InputError(
            f"{path} has {len(images)} rows, too few for {test} to test, {validation} to validate "
            "and some to train (each at least 1)"
        )
    pictures = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    masks = torch.from_numpy(labels.astype(np.int64))
    if size is not None:
        pictures, masks = resized(pictures, masks, size)
    height, width = masks.shape[1:]
    if tiles < 1 or height % tiles or width % tiles:
        raise InputError(f"rows of {height} x {width} pixels cannot be cut {tiles} by {tiles}")
    first = len(images) - test - validation
    bounds = {
        "train": slice(0, first),
        "validation": slice(first, first + validation),
        "test": slice(first + validation, None),
    }
    read = {
        split: (_cut(pictures[rows], tiles), _cut(masks[rows].unsqueeze(1), tiles).squeeze(1))
        for split, rows in bounds.items()
    }
    return assemble_masks(read, classes, name=path.stem, ignored=ignored, augment=augment)


def segmentation_folder(
    path: str | Path,
    classes: Sequence[str],
    *,
    size: tuple[int, int],
    channels: int = 3,
    ignored: Sequence[int] = (IGNORED,),
    seed: int = 0,
    augment: JointAugment | None = None,
) -> Segmentation:
    """Opens ``images/`` and ``masks/`` with files of the same stems, or such a pair in each of
    ``train/``, ``validation/`` and ``test/``.

    Args:
        path: the folder.
        classes: their names, in label order.
        size: height and width in pixels.
        channels: 1 or 3.
        ignored: labels of pixels that belong to no class.
        seed: of the splits that are carved where they are not given.
        augment: of raw training batches. Default: flips.

    Raises:
        InputError: if a folder or a mask is missing, or an image cannot be read or does not fit.
    """
    root = Path(path)
    parts = {s: root / s for s in ("train", "validation", "test") if (root / s).is_dir()}
    read = {
        split: _read(_beside(folder), size, channels)
        for split, folder in (parts or {"train": root}).items()
    }
    return assemble_masks(
        read, classes, name=root.resolve().name, ignored=ignored, seed=seed, augment=augment
    )


def segmentation_lists(
    root: str | Path,
    lists: Mapping[str, Path],
    classes: Sequence[str],
    *,
    size: tuple[int, int],
    channels: int = 3,
    ignored: Sequence[int] = (IGNORED,),
    seed: int = 0,
    augment: JointAugment | None = None,
) -> Segmentation:
    """Opens files named in lists, as Pascal VOC and Cityscapes are handed out.

    Args:
        root: what the names are relative to.
        lists: by split, a text file with "image mask" on each line.
        classes: their names, in label order.
        size: height and width in pixels.
        channels: 1 or 3.
        ignored: labels of pixels that belong to no class.
        seed: of the splits that are carved where they are not given.
        augment: of raw training batches. Default: flips.

    Raises:
        InputError: if a list cannot be read, or an image cannot be read or does not fit.
    """
    read = {}
    for split, file in lists.items():
        try:
            lines = Path(file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the list {file}: {first_line(error)}") from error
        pairs: list[Pair] = []
        for number, line in enumerate(lines, 1):
            words = line.split()
            if words and len(words) != 2:
                raise InputError(f"line {number} of {file} is not an image and a mask")
            if words:
                image, mask = (Path(root) / word.lstrip("/") for word in words)
                pairs.append((image, mask, str(image)))
        read[split] = _read(pairs, size, channels)
    name = Path(root).resolve().name
    return assemble_masks(read, classes, name=name, ignored=ignored, seed=seed, augment=augment)


def assemble_masks(
    parts: Mapping[str, tuple[Tensor, Tensor]],
    classes: Sequence[str],
    *,
    name: str,
    ignored: Sequence[int] = (IGNORED,),
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    augment: JointAugment | None = None,
) -> Segmentation:
    """Makes the task of 8-bit images and masks; splits that are not given are carved.

    Args:
        parts: images ``[n, channels, height, width]`` and masks ``[n, height, width]`` by split;
            "train" is needed.
        classes: their names, in label order.
        name: for reports.
        ignored: labels of pixels that belong to no class.
        validation_fraction: share of the training images carved for validation.
        test_fraction: share carved for testing where neither it nor validation is given.
        seed: of the splits that are carved.
        augment: of raw training batches. Default: flips.

    Raises:
        InputError: if there are too few images, or a label is out of range.
    """
    splits = dict(parts)
    if "train" not in splits or len(splits["train"][0]) == 0:
        raise InputError(f"{name} holds no training images")
    wanted = {"test": test_fraction, "validation": validation_fraction}
    if "validation" in splits:
        wanted.pop("test")
    for split, fraction in wanted.items():
        if split in splits:
            continue
        images, masks = splits["train"]
        count = max(1, round(fraction * len(images)))
        if count >= len(images):
            raise InputError(f"{name} has too few images to carve a {split} split")
        order = np.random.default_rng(seed_of("split", split, seed)).permutation(len(images))
        carved, rest = np.sort(order[:count]), np.sort(order[count:])
        splits[split] = (images[carved], masks[carved])
        splits["train"] = (images[rest], masks[rest])
    none = torch.tensor(list(ignored), dtype=torch.int64)
    splits = {
        split: (images, masks.masked_fill(torch.isin(masks, none), IGNORED))
        for split, (images, masks) in splits.items()
    }
    train = splits["train"][0].double() / 255.0
    std = train.var((0, 2, 3), correction=0).sqrt()
    std = torch.where(std < 1e-4, torch.ones_like(std), std)
    preprocess = Preprocess(
        channels=train.shape[1],
        height=train.shape[2],
        width=train.shape[3],
        mean=tuple(round(float(v), 4) for v in train.mean((0, 2, 3))),
        std=tuple(round(float(v), 4) for v in std),
    )
    return Segmentation(splits, preprocess, classes, name=name, augment=augment or joint_flip())


def labelled_rows(count: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``count`` training images have labels, and which have not, in ascending order.

    The partition is a function of the arguments alone: results depend on it by points, so a
    comparison keeps to one list a seed.

    Raises:
        InputError: if either part would be empty.
    """
    labelled = round(count * share)
    if not 0 < labelled < count:
        raise InputError(
            f"{share:g} of {count} images leaves {labelled} with labels; both parts need some"
        )
    order = np.random.default_rng(seed_of("labelled", seed)).permutation(count)
    return np.sort(order[:labelled]), np.sort(order[labelled:])


def resized(images: Tensor, masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images ``[n, channels, *size]`` (uint8) and masks ``[n, *size]`` stretched to a size."""
    if tuple(masks.shape[1:]) == tuple(size):
        return images, masks
    smooth = interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    labels = interpolate(masks.unsqueeze(1).float(), size=size, mode="nearest-exact")
    return smooth.round().clamp(0, 255).to(torch.uint8), labels.squeeze(1).long()


def _cut(maps: Tensor, tiles: int) -> Tensor:
    """``[n, channels, height, width]`` into ``[n * tiles^2, channels, ...]``, rows in order."""
    n, channels, height, width = maps.shape
    parts = maps.view(n, channels, tiles, height // tiles, tiles, width // tiles)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(
        n * tiles**2, channels, height // tiles, width // tiles
    )


def _read(pairs: Iterable[Pair], size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    if channels not in (1, 3) or min(size) < 1:
        raise InputError(
            f"images are read with 1 or 3 channels and sides of 1 pixel or more, not {channels} "
            f"and {tuple(size)}"
        )
    images, masks = [], []
    for image, mask, name in pairs:
        header = probe(image, name)
        own = (header.height, header.width)
        picture = torch.from_numpy(decode(image, name, channels=channels, size=own))
        labels = decode_mask(mask, f"the mask of {name}")
        if labels.shape != own:
            raise InputError(
                f"{name} has {own[1]} x {own[0]} pixels and its mask "
                f"{labels.shape[1]} x {labels.shape[0]}"
            )
        one, its = resized(picture[None], torch.from_numpy(labels)[None], size)
        images.append(one)
        masks.append(its)
    if not images:
        return torch.zeros(0, channels, *size, dtype=torch.uint8), torch.zeros(
            0, *size, dtype=torch.int64
        )
    return torch.cat(images), torch.cat(masks)


def decode_mask(content: Path | bytes, name: str) -> np.ndarray:
    """Class indices ``[height, width]`` of a mask: grey levels, or places in its palette.

    Raises:
        InputError: if it cannot be read, or has colours instead of indices.
    """
    probe(content, name)
    try:
        source = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(source, formats=FORMATS) as image:
            mode, pixels = image.mode, np.array(image)
    # Decoders meet arbitrary bytes and raise nearly anything.
    except Exception as error:
        raise InputError(f"{name} cannot be read, it is corrupt or truncated") from error
    if pixels.ndim != 2:
        raise InputError(f"{name} has colours (mode {mode}); one class index a pixel is needed")
    return pixels.astype(np.int64)


def _rows(path: Path) -> list[Pair]:
    try:
        table = pyarrow.parquet.read_table(path)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise InputError(
            f"{path} is not a table that can be read, or it is truncated: {first_line(error)}"
        ) from error
    columns = []
    for column in ("image", "label"):
        values = table[column].to_pylist() if column in table.column_names else [None]
        contents = [value["bytes"] if isinstance(value, dict) else value for value in values]
        if not all(isinstance(content, bytes) for content in contents):
            raise InputError(f"{path} needs a column {column!r} of encoded images, without gaps")
        columns.append(contents)
    return [
        (image, mask, f"row {row} of {path}")
        for row, (image, mask) in enumerate(zip(*columns, strict=True))
    ]


def _beside(folder: Path) -> list[Pair]:
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() or not masks.is_dir():
        raise InputError(f"{folder} has no folders images and masks")
    found = {p.stem: p for p in sorted(masks.iterdir()) if p.suffix.lower() in SUFFIXES}
    pairs: list[Pair] = []
    for image in sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES):
        if image.stem not in found:
            raise InputError(f"{image} has no mask in {masks}")
        pairs.append((image, found[image.stem], str(image)))
    return pairs
