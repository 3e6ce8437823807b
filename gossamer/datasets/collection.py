"""Images as they lie there, before anything is split: what one prunes, embeds and looks at.

A task needs classes and three splits; a collection needs images only. Each has a name that stays
the same from run to run (the path inside of the folder, or file and row), perhaps a label, and is
fetched when it is needed. What cannot be read is left out and listed.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.progress import progress
from gossamer.core.task import Augment, Classification, Preprocess, Source
from gossamer.datasets import cifar, digits, idx, tables
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.decode import SUFFIXES, decode, probe
from gossamer.datasets.encoded import CACHE_BYTES, DEFAULT_SIDE, EncodedSource, in_threads
from gossamer.datasets.splits import assemble, statistics

NO_LABEL = -1


@dataclass(frozen=True)
class Skipped:
    """An image that was left out.

    Attributes:
        name: of the image.
        reason: why, in a sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """Images with names, perhaps with labels.

    Attributes:
        name: of the whole, for reports.
        names: of the images; no two are alike.
        source: the raw images; ``source.labels`` is -1 where there is no label.
        classes: names of the classes in label order; empty if there are no labels.
        scale: raw values are divided by this.
        skipped: what was left out.
        root: the folder in which ``names`` are paths of files; None for other collections.
    """

    name: str
    names: tuple[str, ...]
    source: ArraySource | EncodedSource
    classes: tuple[str, ...]
    scale: float = 255.0
    skipped: tuple[Skipped, ...] = ()
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> np.ndarray | None:
        """Class indices ``[n]``, int64; None if there are no labels."""
        return self.source.labels.numpy() if self.classes else None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.source.size

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.source.channels

    def fetch(self, rows: np.ndarray) -> Tensor:
        """Raw images ``[len(rows), channels, height, width]`` of these rows.

        Raises:
            InputError: naming an image that cannot be decoded.
        """
        return self.source.fetch(np.asarray(rows, dtype=np.int64))

    def take(self, rows: np.ndarray) -> Collection:
        """The collection of these rows alone, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        return Collection(
            self.name,
            tuple(self.names[row] for row in rows),
            self.source.take(rows),
            self.classes,
            self.scale,
            self.skipped,
            self.root,
        )

    def preprocess(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Preprocess:
        """How raw images become inputs of a network.

        Args:
            mean: per channel on the scale 0..1. Default: measured.
            std: per channel on the scale 0..1. Default: measured.
        """
        if mean is None or std is None:
            measured = statistics(self.source, self.scale)
            mean, std = mean or measured[0], std or measured[1]
        height, width = self.size
        return Preprocess(self.channels, height, width, tuple(mean), tuple(std), scale=self.scale)

    def task(
        self,
        *,
        test: Collection | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Classification:
        """The task of telling the classes apart.

        Args:
            test: images for the final measurement. Default: carved from the collection (20 %).
            seed: of the splits that are carved (validation: 10 % of the training images).
            augment: of raw training batches.
            mean: per channel on the scale 0..1. Default: measured on the training split.
            std: per channel on the scale 0..1. Default: measured on the training split.

        Raises:
            InputError: if the images have no labels, or too few of a class.
        """
        if not self.classes:
            raise InputError(f"the images of {self.name} have no labels, so no network learns them")
        return assemble(
            self.source,
            self.classes,
            name=self.name,
            seed=seed,
            test=None if test is None else test.source,
            scale=self.scale,
            augment=augment,
            mean=mean,
            std=std,
        )

    def fingerprint(self) -> str:
        """Changes when images come, go, or change their label, size in bytes or date."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.name, self.size, self.channels, self.classes)).encode())
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.source.labels.numpy().tobytes())
        if isinstance(self.source, ArraySource):
            digest.update(self.source.images.numpy().tobytes())
        else:
            for content in self.source.contents:
                if isinstance(content, bytes):
                    digest.update(content)
                else:
                    state = content.stat()
                    digest.update(repr((state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()


def open_collection(
    data: str | Path,
    *,
    split: str = "train",
    labels: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    thorough: bool = False,
    cache_bytes: int = CACHE_BYTES // 4,
) -> Collection:
    """Opens images without splitting them.

    Args:
        data: a folder of images, with a subfolder a class or without; a Parquet file or folder; a
            folder of idx files or of CIFAR-10; or "digits" (embedded, all of them).
        split: "train" or "test", where the data has stored splits.
        labels: a CSV file with the columns ``name`` and ``label`` for images in a folder without
            classes (names are paths inside of it).
        image_size: height and width in pixels. Default: the images' own if all have the same and
            no side is over 224, otherwise 224 x 224.
        channels: 1 or 3. Default: 1 if all images are grey, otherwise 3.
        thorough: decode every image now, so that damage in the middle of a file is listed too,
            and not met as an error later.
        cache_bytes: decoded images kept in memory, at most.

    Raises:
        InputError: if there are no images that can be read, or labels disagree.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if split not in ("train", "test"):
        raise InputError(f"images are stored as train or test, not {split!r:.40}")
    if data == "digits":
        source = digits.digits_source(image_size=size, channels=channels)
        return _stored("digits", "digits", source, digits.CLASSES, scale=digits.SCALE)
    path = Path(data).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return _table([path], path.stem, size, channels, cache_bytes)
    if not path.is_dir():
        raise InputError(f"{data} is no folder of images, no Parquet file and not digits")
    name = path.resolve().name
    if idx.find_idx(path):
        sources, classes = idx.idx_sources(path, image_size=size, channels=channels)
        return _stored(name, split, sources[split], classes)
    if cifar.find_cifar(path):
        found, classes, name = cifar.cifar_sources(path, image_size=size, channels=channels)
        return _stored(name, split, found[split], classes)
    parts = tables.find_tables(path)
    if parts:
        if split not in parts:
            raise InputError(f"{path} has no {split} table")
        return _table(parts[split], name, size, channels, cache_bytes)
    return _folder(_split_folder(path, split), name, labels, size, channels, thorough, cache_bytes)


def collection_of(task: Classification, split: str = "train") -> Collection:
    """The images of a task's split as a collection (their names are their rows)."""
    source: Source = task.splits[split]
    if not isinstance(source, ArraySource | EncodedSource):
        rows = np.arange(len(source))
        source = ArraySource(source.fetch(rows), source.labels)
    return _stored(task.name, split, source, task.classes, scale=task.preprocess.scale)


def _stored(
    name: str,
    split: str,
    source: ArraySource | EncodedSource,
    classes: Sequence[str],
    scale: float = 255.0,
) -> Collection:
    names = tuple(f"{split}#{row}" for row in range(len(source)))
    return Collection(name, names, source, tuple(classes), scale)


def _table(
    files: Sequence[Path],
    name: str,
    size: tuple[int, int] | None,
    channels: int | None,
    cache_bytes: int,
) -> Collection:
    read = [tables.read_table(file) for file in files]
    names = [
        f"{file.name}#{row}"
        for file, part in zip(files, read, strict=True)
        for row in range(len(part.names))
    ]
    table = tables.joined(read)
    beside = files[0].parent / "classes.json"
    classes = table.classes or (idx.class_names(beside) if beside.exists() else None)
    if classes is None:
        classes = [str(label) for label in range(int(table.labels.max()) + 1)]
    source, rows, skipped = _readable(
        table.contents, names, table.labels, size, channels, False, cache_bytes
    )
    kept = tuple(names[int(row)] for row in rows)
    return Collection(name, kept, source, tuple(classes), skipped=skipped)


def _folder(
    root: Path,
    name: str,
    labels: Path | None,
    size: tuple[int, int] | None,
    channels: int | None,
    thorough: bool,
    cache_bytes: int,
) -> Collection:
    files = sorted(
        Path(where) / file
        for where, folders, found in os.walk(root, followlinks=False)
        if not _hidden(folders)
        for file in found
        if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")
    )
    if not files:
        raise InputError(f"{root} holds no images ({' '.join(SUFFIXES)})")
    names = [file.relative_to(root).as_posix() for file in files]
    folders = [name.partition("/")[0] if "/" in name else None for name in names]
    if labels is not None:
        words = _labels_of(labels, names, folders)
    elif None in folders:
        # Loose images tell that the subfolders, if there are any, are not classes.
        words = None
    else:
        words = [str(folder) for folder in folders]
    classes = tuple(sorted(set(words))) if words else ()
    number = {word: label for label, word in enumerate(classes)}
    known = torch.tensor([number[word] for word in words] if words else [NO_LABEL] * len(files))
    source, rows, skipped = _readable(files, names, known, size, channels, thorough, cache_bytes)
    kept = tuple(names[int(row)] for row in rows)
    return Collection(name, kept, source, classes, skipped=skipped, root=root)


def _hidden(folders: list[str]) -> bool:
    """Keeps ``os.walk`` out of hidden folders; always False, so that it can stand in a filter."""
    folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "_")))
    return False


def _split_folder(root: Path, split: str) -> Path:
    from gossamer.datasets.folder import SPLIT_FOLDERS

    present = {folder.name.lower(): folder for folder in root.iterdir() if folder.is_dir()}
    found = {
        name: present[alias]
        for name, aliases in SPLIT_FOLDERS.items()
        for alias in aliases
        if alias in present
    }
    if "train" not in found:
        return root
    if split == "test" and "test" not in found and "validation" in found:
        return found["validation"]
    if split not in found:
        raise InputError(f"{root} has a train folder, but none for {split}")
    return found[split]


def _labels_of(path: Path, names: Sequence[str], folders: Sequence[str | None]) -> list[str]:
    """The label of each image from a CSV file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not reader.fieldnames or not {"name", "label"} <= set(reader.fieldnames):
                raise InputError(f"{path} needs the columns name and label in its first line")
            pairs = [(str(row["name"]), str(row["label"])) for row in reader]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error
    given = dict(pairs)
    twice = [(name, label) for name, label in pairs if given[name] != label]
    if twice:
        raise InputError(
            f"{path} gives {len(twice)} images two labels, {twice[0][0]} first "
            f"({twice[0][1]!r} and {given[twice[0][0]]!r})"
        )
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"{path} has no label for {len(missing)} of {len(names)} images, {missing[0]} first"
        )
    words = [given[name] for name in names]
    known = set(words)
    # Where the folders are named after the same classes, they are a second opinion.
    if all(folder in known for folder in folders):
        other = [
            at
            for at, (word, folder) in enumerate(zip(words, folders, strict=True))
            if word != folder
        ]
        if other:
            at = other[0]
            raise InputError(
                f"{path} and the folders disagree about {len(other)} of {len(names)} images: "
                f"{names[at]} lies in {folders[at]} and is labelled {words[at]}"
            )
    return words


def _readable(
    contents: Sequence[Path | bytes],
    names: Sequence[str],
    labels: Tensor,
    size: tuple[int, int] | None,
    channels: int | None,
    thorough: bool,
    cache_bytes: int,
) -> tuple[EncodedSource, np.ndarray, tuple[Skipped, ...]]:
    """The source of the images that can be read, their rows, and the others."""

    def look(row: int) -> tuple[int, int, int] | str:
        try:
            header = probe(contents[row], names[row])
            if thorough or not header.ends:
                decode(
                    contents[row],
                    names[row],
                    channels=header.channels,
                    size=(min(header.height, DEFAULT_SIDE), min(header.width, DEFAULT_SIDE)),
                )
        except InputError as error:
            return str(error)
        return header.height, header.width, header.channels

    with progress() as bar:
        seen = in_threads(look, np.arange(len(contents)))
        found = list(bar.track(seen, total=len(contents), description="looking at images"))
    skipped = tuple(
        Skipped(name, answer)
        for name, answer in zip(names, found, strict=True)
        if isinstance(answer, str)
    )
    rows = np.array(
        [row for row, answer in enumerate(found) if not isinstance(answer, str)], dtype=np.int64
    )
    headers = [answer for answer in found if not isinstance(answer, str)]
    if not headers:
        raise InputError(f"none of {len(contents)} images can be read; {skipped[0].reason}")
    sizes = {header[:2] for header in headers}
    alike = len(sizes) == 1 and max(next(iter(sizes))) <= DEFAULT_SIDE
    source = EncodedSource(
        [contents[int(row)] for row in rows],
        [names[int(row)] for row in rows],
        labels[torch.from_numpy(rows)],
        channels=channels or max(header[2] for header in headers),
        size=size or (next(iter(sizes)) if alike else (DEFAULT_SIDE, DEFAULT_SIDE)),
        cache_bytes=cache_bytes,
    )
    return source, rows, skipped
