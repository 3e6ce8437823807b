"""Tables with a column of encoded images and a column of labels: Parquet and Arrow files.

The layout of Hugging Face's image data sets is understood: images as ``{"bytes", "path"}``, class
names in the schema. Everything is read into memory as it is encoded; images are decoded when they
are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import torch
from torch import Tensor

from gossamer.core.errors import InputError, first_line
from gossamer.core.task import Augment, Classification
from gossamer.datasets.augment import compose, flip, shift
from gossamer.datasets.encoded import CACHE_BYTES, EncodedSource, encoded
from gossamer.datasets.idx import class_names
from gossamer.datasets.splits import assemble, numbered_classes

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")
SPLIT_PREFIXES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}


@dataclass(frozen=True)
class ImageTable:
    """Encoded images with labels.

    Attributes:
        contents: encoded images.
        names: of the images, for errors.
        labels: class indices ``[n]``.
        classes: names of the classes if the files know them.
    """

    contents: list[bytes]
    names: list[str]
    labels: Tensor
    classes: tuple[str, ...] | None


def image_tables(
    parts: Mapping[str, Sequence[Path]],
    *,
    name: str,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Classification:
    """Makes the task of image tables.

    Args:
        parts: files of each split ("train" is needed; what lacks is carved from it, and a lone
            "validation" becomes the test split, as in an image folder).
        name: for reports.
        classes: names of the classes. Default: those in the schema, otherwise the numbers.
        seed: of the splits that are carved.
        image_size: height and width in pixels. Default: the images' own if all have the same and
            no side is over 224, otherwise 224 x 224.
        channels: 1 or 3. Default: 1 if all images are grey, otherwise 3.
        limit: at most about this many training images.
        mean: per channel. Default: measured on the training split.
        std: per channel. Default: measured on the training split.
        augment: of raw training batches. Default: flips, and shifts by up to an eighth.
        cache_bytes: decoded images kept in memory, at most.

    Raises:
        InputError: if a file is corrupt, has no image or label column, or an image cannot be
            read, which is named.
    """
    read = {split: joined([read_table(file) for file in files]) for split, files in parts.items()}
    return assemble_tables(
        read,
        name=name,
        classes=classes,
        seed=seed,
        image_size=image_size,
        channels=channels,
        limit=limit,
        mean=mean,
        std=std,
        augment=augment,
        cache_bytes=cache_bytes,
    )


def assemble_tables(
    parts: Mapping[str, ImageTable],
    *,
    name: str,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Classification:
    """:func:`image_tables` for tables that were read already."""
    parts = dict(parts)
    if "train" not in parts:
        raise InputError(f"{name} has no training images")
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    # Labels that are words are numbered in the order of the training split's classes.
    if classes is None:
        classes = parts["train"].classes
    if classes is None:
        classes = numbered_classes([table.labels for table in parts.values()], name)
    sources = table_sources(
        parts, image_size=image_size, channels=channels, cache_bytes=cache_bytes
    )
    height, width = sources["train"].size
    return assemble(
        sources["train"],
        classes,
        name=name,
        seed=seed,
        validation=sources.get("validation"),
        test=sources.get("test"),
        limit=limit,
        mean=mean,
        std=std,
        augment=augment or compose(flip(), shift(max(1, min(height, width) // 8))),
    )


def table_sources(
    parts: Mapping[str, ImageTable],
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> dict[str, EncodedSource]:
    """The sources of tables that were read, alike in size and channels.

    Args:
        parts: tables by split.
        image_size: as for :func:`image_tables`.
        channels: as for :func:`image_tables`.
        cache_bytes: decoded images kept in memory, at most.

    Raises:
        InputError: if the header of an image cannot be read.
    """
    every = list(parts.values())
    whole = encoded(
        [content for table in every for content in table.contents],
        [image for table in every for image in table.names],
        torch.cat([table.labels for table in every]),
        image_size=image_size,
        channels=channels,
        cache_bytes=cache_bytes,
    )
    sources: dict[str, EncodedSource] = {}
    at = 0
    for split, table in parts.items():
        sources[split] = whole.take(np.arange(at, at + len(table.labels)))
        at += len(table.labels)
    return sources


def find_tables(root: Path) -> dict[str, list[Path]]:
    """Parquet files in ``root`` or ``root/data``, by the split that their names begin with.

    A lone file of another name is training data.
    """
    for place in (root, root / "data"):
        files = sorted(place.glob("*.parquet"))
        parts = {
            split: [file for file in files if file.name.lower().startswith(prefixes)]
            for split, prefixes in SPLIT_PREFIXES.items()
        }
        parts = {split: found for split, found in parts.items() if found}
        if "train" in parts:
            return parts
        if len(files) == 1:
            return {"train": files}
    return {}


def parquet_folder(
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
    """Opens one Parquet file, or a folder of them named by split, see :func:`image_tables`.

    Class names come from ``classes.json`` beside the files if it is there.
    """
    path = Path(path)
    parts = {"train": [path]} if path.is_file() else find_tables(path)
    if not parts:
        raise InputError(f"{path} has no train*.parquet")
    beside = parts["train"][0].parent / "classes.json"
    return image_tables(
        parts,
        name=path.resolve().stem,
        classes=class_names(beside) if beside.exists() else None,
        seed=seed,
        image_size=image_size,
        channels=channels,
        limit=limit,
        mean=mean,
        std=std,
        augment=augment,
    )


def read_table(path: Path) -> ImageTable:
    """Reads a Parquet or Arrow file of images.

    Raises:
        InputError: if it is missing, corrupt, or has no image or label column.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    name = str(path)
    try:
        # A few bytes can promise any number of rows; those of images take at least one each.
        most = path.stat().st_size
        if path.suffix == ".arrow":
            with pa.memory_map(name) as mapped:
                table = pyarrow.ipc.open_stream(mapped).read_all()
        else:
            with pyarrow.parquet.ParquetFile(path) as file:
                if file.metadata.num_rows > most:
                    raise ValueError(f"{file.metadata.num_rows} rows are promised")
                columns = _find_columns(file.schema_arrow, name)
                table = file.read(columns=list(columns))
        if table.num_rows > most:
            raise ValueError(f"{table.num_rows} rows are promised")
        # Offsets in a doctored file may point anywhere; this walks all of them.
        table.validate(full=True)
        return to_images(table, name)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise InputError(
            f"{path} is not a table that can be read, or it is truncated: {first_line(error)}"
        ) from error


def to_images(table: pa.Table, name: str) -> ImageTable:
    """The images and labels of a table.

    Args:
        table: has an image column (bytes, or structs with "bytes") and a label column (numbers or
            words).
        name: of the table, for errors.

    Raises:
        InputError: if there are no such columns, or a value is missing.
    """
    image_column, label_column = _find_columns(table.schema, name)
    images = _bytes_of(table[image_column])
    if images is None or images.null_count:
        bad = 0 if images is None else images.is_null().to_pylist().index(True)
        raise InputError(
            f"row {bad} of {name} holds no image bytes in its column {image_column!r}; "
            "images that are kept outside of the table are not read"
        )
    column = table[label_column]
    if column.null_count:
        raise InputError(f"{name} has rows without a label in its column {label_column!r}")
    classes = _class_names(_features(table.schema).get(label_column))
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        labels = np.array(column.to_pylist(), dtype=np.int64)
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        words, labels = np.unique(np.array(column.to_pylist(), dtype=str), return_inverse=True)
        classes = tuple(map(str, words))
    else:
        raise InputError(
            f"the labels of {name} (column {label_column!r}) are {column.type}; "
            "whole numbers or words are needed"
        )
    names = [f"row {row} of {name}" for row in range(table.num_rows)]
    return ImageTable(images.to_pylist(), names, torch.from_numpy(labels), classes)


def _bytes_of(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The column of encoded images itself, or what is called "bytes" in it."""
    if pa.types.is_struct(column.type):
        at = column.type.get_field_index("bytes")
        if at < 0:
            return None
        column = column.flatten()[at]
    binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    return column if binary else None


def joined(tables: Sequence[ImageTable]) -> ImageTable:
    """Tables of one split as one.

    Raises:
        InputError: if they disagree about the classes.
    """
    if any(table.classes != tables[0].classes for table in tables):
        raise InputError(
            f"{tables[0].names[0] if tables[0].names else 'a table'}: the files of one split "
            "disagree about the classes"
        )
    return ImageTable(
        [content for table in tables for content in table.contents],
        [name for table in tables for name in table.names],
        torch.cat([table.labels for table in tables]),
        tables[0].classes,
    )


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's description of the columns, where the schema carries it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features if isinstance(features, dict) else {}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _find_columns(schema: pa.Schema, where: str) -> tuple[str, str]:
    features = _features(schema)
    return (
        _column(schema, features, "Image", IMAGE_COLUMNS, "images", where),
        _column(schema, features, "ClassLabel", LABEL_COLUMNS, "labels", where),
    )


def _column(
    schema: pa.Schema,
    features: Mapping[str, Any],
    kind: str,
    names: Sequence[str],
    what: str,
    where: str,
) -> str:
    for column in schema.names:
        feature = features.get(column)
        if isinstance(feature, dict) and feature.get("_type") == kind:
            return column
    for column in names:
        if column in schema.names:
            return column
    raise InputError(
        f"{where} has no column of {what} ({', '.join(names)}); "
        f"its columns are {', '.join(schema.names) or 'none'}"
    )
