"""MNIST's idx files, plain or gzipped: MNIST, Fashion-MNIST and others in their layout.

The format (LeCun, Cortes & Burges, "The MNIST database"): two zero bytes, a byte for the type of
values (8: unsigned bytes), one for the number of axes, each axis as a big-endian 32-bit number,
then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gossamer.core.errors import InputError
from gossamer.core.files import read_json
from gossamer.core.task import Augment, Classification
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.augment import compose, flip, shift
from gossamer.datasets.splits import assemble, numbered_classes

UNSIGNED_BYTES = 8
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PLACES = ("", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw")
"""Where torchvision and others put the files inside a folder."""
BLOCK = 1 << 20


def idx_folder(
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
    """Opens a folder with ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte`` and so on.

    Class names come from ``classes.json`` (a list) if it is there; a folder whose name says
    fashion has those of Fashion-MNIST; otherwise they are the numbers.

    Args:
        path: the folder, or torchvision's folder around it.
        seed: of the validation split (10 % of the training images).
        image_size: height and width in pixels. Default: as stored.
        channels: 1 or 3. Default: 1.
        limit: at most about this many training images.
        mean: per channel. Default: measured on the training split.
        std: per channel. Default: measured on the training split.
        augment: of raw training batches. Default: shifts by up to two pixels, and flips for
            Fashion-MNIST.

    Raises:
        InputError: if a file is missing, truncated or corrupt.
    """
    sources, names = idx_sources(path, image_size=image_size, channels=channels)
    fashion = "fashion" in str(Path(path).resolve()).lower()
    return assemble(
        sources["train"],
        names,
        name=Path(path).resolve().name,
        seed=seed,
        test=sources["test"],
        limit=limit,
        mean=mean,
        std=std,
        augment=augment or (compose(flip(), shift(2)) if fashion else shift(2)),
    )


def idx_sources(
    path: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> tuple[dict[str, ArraySource], Sequence[str]]:
    """The "train" and "test" images of a folder of idx files as they are stored, and the classes.

    Args:
        path: the folder, or torchvision's folder around it.
        image_size: height and width in pixels. Default: as stored.
        channels: 1 or 3. Default: 1.

    Raises:
        InputError: if a file is missing, truncated or corrupt.
    """
    root = Path(path)
    place = find_idx(root)
    if place is None:
        raise InputError(f"{root} has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz")
    sources = {
        split: ArraySource(
            torch.from_numpy(read_idx(_file(place, prefix, "images-idx3"), axes=3)).unsqueeze(1),
            torch.from_numpy(read_idx(_file(place, prefix, "labels-idx1"), axes=1)),
            channels=channels,
            size=image_size,
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    names = _names(place)
    if names is None:
        names = numbered_classes([source.labels for source in sources.values()], root.name)
        fashion = "fashion" in str(place.resolve()).lower()
        names = FASHION if fashion and len(names) <= len(FASHION) else names
    return sources, names


def find_idx(root: Path) -> Path | None:
    """The folder with idx files in or below ``root``, if there is one."""
    for place in PLACES:
        if any((root / place).glob("train-images*idx3-ubyte*")):
            return root / place
    return None


def read_idx(path: Path, *, axes: int) -> np.ndarray:
    """Reads one idx file of unsigned bytes.

    Args:
        path: the file; gzipped if its first bytes say so.
        axes: 3 for images, 1 for labels.

    Returns:
        uint8 values ``[n]`` or ``[n, height, width]``.

    Raises:
        InputError: if it is missing, corrupt, truncated or longer than it says.
    """
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            header = stream.read(4)
            if len(header) < 4 or header[:2] != b"\0\0" or header[2] != UNSIGNED_BYTES:
                raise InputError(f"{path} is not an idx file of unsigned bytes")
            if header[3] != axes:
                raise InputError(f"{path} has {header[3]} axes where {axes} are needed")
            sizes = stream.read(4 * axes)
            if len(sizes) < 4 * axes:
                raise InputError(f"{path} is truncated: it ends inside its header")
            shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
            expected = math.prod(shape)
            # In blocks, so that a header which promises too much costs no memory.
            content = bytearray()
            while len(content) <= expected:
                block = stream.read(min(BLOCK, expected + 1 - len(content)))
                if not block:
                    break
                content += block
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is corrupt or truncated: {error}") from error
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "longer than its header says"
        raise InputError(
            f"{path} is {state}: {expected} values of shape {list(shape)} are promised, "
            f"{min(len(content), expected + 1)}{'' if len(content) < expected else ' or more'} "
            "are there"
        )
    if expected == 0:
        raise InputError(f"{path} is empty: its shape is {list(shape)}")
    return np.frombuffer(bytes(content), dtype=np.uint8).reshape(shape).copy()


def _file(folder: Path, prefix: str, what: str) -> Path:
    dotted = what.replace("-idx", ".idx")
    for name in (f"{prefix}-{what}-ubyte", f"{prefix}-{dotted}-ubyte"):
        for suffix in ("", ".gz"):
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    raise InputError(f"{folder} has no {prefix}-{what}-ubyte or {prefix}-{what}-ubyte.gz")


def _names(folder: Path) -> list[str] | None:
    path = folder / "classes.json"
    if not path.exists():
        return None
    return class_names(path)


def class_names(path: Path) -> list[str]:
    """Reads a JSON list of class names.

    Raises:
        InputError: if it is anything else.
    """
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is not a list of class names")
    return names
