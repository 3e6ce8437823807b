"""A store of images as codes, in a format that others can read.

A store is a folder::

    store.json             grid, number of codes, classes; counts and bytes of the splits
    codebook.safetensors   "codebook", float32 [codes, dims]
    tokenizer.safetensors  the network that made the codes (if it was given)
    SPLIT/codes.bin        the codes of all images, one after the other (or codes.bin.gz)
    SPLIT/offsets.npy      int64 [images + 1], where each image begins in the uncompressed codes
                           (or offsets.npy.gz)
    SPLIT/labels.txt       one class index a line

A code below 255 is one byte. A larger one is a byte of 255 for each whole 255 in it, then the
rest: 254 is ``FE``, 255 is ``FF 00``, 390 is ``FF 87``, 510 is ``FF FF 00``. So the last byte of a
code is never 255, and a decoder needs no table. Images are written row by row.

Without gzip the codes are mapped into memory and images are fetched at random by their offsets;
with gzip (the default, as published) a split is unpacked into memory when it is opened.

Source: the file format of Park et al., "SeiT: Storage-efficient vision training with tokens using
1 % of pixel storage", ICCV 2023, arXiv:2303.11114, as its published code writes it. Codes above
509, which that does not admit, are an extension.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.files import read_json, whole_folder, write_json, write_tensors

FORMAT = "gossamer-tokens"
VERSION = 1
ESCAPE = 255
LARGEST_GRID = 1 << 12
MOST_CODES = 1 << 16


def encode_codes(codes: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Codes as bytes.

    Args:
        codes: ``[images, tokens]``, 0 or more.

    Returns:
        The bytes of all images, and where each begins, int64 ``[images + 1]``.

    Raises:
        InputError: if a code is negative.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2:
        raise InputError(f"codes are [images, tokens], not {list(codes.shape)}")
    if codes.size and int(codes.min()) < 0:
        raise InputError(f"codes are 0 or more, not {int(codes.min())}")
    escapes, rest = np.divmod(codes.astype(np.int64), ESCAPE)
    lengths = escapes + 1
    ends = np.cumsum(lengths.ravel())
    content = np.full(int(ends[-1]) if len(ends) else 0, ESCAPE, dtype=np.uint8)
    content[ends - 1] = rest.ravel()
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))]).astype(np.int64)
    return content.tobytes(), offsets


def decode_codes(content: bytes | np.ndarray) -> np.ndarray:
    """Bytes as codes, int64 ``[tokens]``: the inverse of :func:`encode_codes` for whole images.

    Raises:
        InputError: if the last code has no end.
    """
    values = np.frombuffer(content, dtype=np.uint8) if isinstance(content, bytes) else content
    if len(values) and values[-1] == ESCAPE:
        raise InputError("the codes end in the middle of one")
    places = np.flatnonzero(values != ESCAPE)
    escapes = np.diff(places, prepend=-1) - 1
    return values[places].astype(np.int64) + ESCAPE * escapes


@dataclass(frozen=True)
class TokenSplit:
    """The images of one split.

    Attributes:
        content: bytes of the codes, uint8 ``[n]`` (in memory or mapped).
        offsets: int64 ``[images + 1]``.
        labels: int64 ``[images]``.
        grid: rows and columns of an image.
        codes: all are below this.
        place: the folder, for errors.
        stored_bytes: of the three files on disk.
    """

    content: np.ndarray
    offsets: np.ndarray
    labels: Tensor
    grid: tuple[int, int]
    codes: int
    place: Path
    stored_bytes: int

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, rows: np.ndarray) -> Tensor:
        """Codes of some images, int64 ``[n, height, width]``.

        Raises:
            InputError: if the bytes of an image are not as many codes as the grid has places, or a
                code is not in the codebook.
        """
        rows = np.asarray(rows, dtype=np.int64)
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        before = np.cumsum(lengths) - lengths
        at = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
        content = np.asarray(self.content[at])
        ends = np.flatnonzero(content != ESCAPE)
        tokens = self.grid[0] * self.grid[1]
        # Codes that end before each image begins: the differences are codes an image.
        found = np.searchsorted(ends, before + lengths) - np.searchsorted(ends, before)
        cut = content[before + lengths - 1] == ESCAPE
        wrong = np.flatnonzero((found != tokens) | cut)
        if len(wrong):
            first = wrong[0]
            raise InputError(
                f"image {int(rows[first])} of {self.place} is damaged: its bytes hold "
                f"{int(found[first])} codes{' and part of one' if cut[first] else ''}, and "
                f"{tokens} are needed"
            )
        codes = decode_codes(content)
        if len(codes) and int(codes.max()) >= self.codes:
            image = int(rows[int(codes.argmax()) // tokens])
            raise InputError(
                f"image {image} of {self.place} is damaged: it has code {int(codes.max())}, and "
                f"there are {self.codes} codes"
            )
        return torch.from_numpy(codes.reshape(len(rows), *self.grid))

    def blocks(self, size: int = 4096) -> Iterator[Tensor]:
        """All codes in stored order, ``size`` images at a time."""
        for start in range(0, len(self), size):
            yield self.fetch(np.arange(start, min(start + size, len(self))))


class TokenStore:
    """Opens a store.

    Args:
        path: the folder.

    Attributes:
        name: of the data.
        classes: names, in label order.
        grid: rows and columns of codes an image.
        codebook: float32 ``[codes, dims]``.
        splits: by name.
        about: everything else that store.json says.

    Raises:
        InputError: if a file is missing, truncated or contradicts another.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "store.json").is_file():
            raise InputError(f"{self.path} is no store of tokens: it has no store.json")
        record = read_json(self.path / "store.json")
        try:
            if record["format"] != FORMAT or record["version"] != VERSION:
                raise ValueError(f"format {record['format']!r}, version {record['version']!r}")
            self.name = str(record["name"])
            self.classes = tuple(str(name) for name in record["classes"])
            height, width = (int(side) for side in record["grid"])
            codes = int(record["codes"])
            counts = {str(k): (int(v["images"]), int(v["bytes"])) for k, v in
                      record["splits"].items()}  # fmt: skip
            compressed = bool(record["gzip"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path / 'store.json'} does not describe a store of tokens: {error!r}"
            ) from error
        if not (1 <= height <= LARGEST_GRID and 1 <= width <= LARGEST_GRID) or not (
            2 <= codes <= MOST_CODES
        ):
            raise InputError(
                f"{self.path / 'store.json'} promises a grid of {height} x {width} and {codes} "
                f"codes; sides of 1 to {LARGEST_GRID} and 2 to {MOST_CODES} codes are read"
            )
        for split in counts:
            if split != Path(split).name or split.startswith("."):
                raise InputError(f"{self.path / 'store.json'} names a split {split!r}")
        self.grid = (height, width)
        self.about: Mapping[str, Any] = record
        self.codebook = _codebook(self.path / "codebook.safetensors", codes)
        self.splits = {
            split: self._split(split, images, size, codes, compressed)
            for split, (images, size) in counts.items()
        }

    @property
    def tokenizer(self) -> Path | None:
        """The file of the network that made the codes, if the store has it."""
        path = self.path / "tokenizer.safetensors"
        return path if path.is_file() else None

    def stored_bytes(self) -> dict[str, int]:
        """Bytes on disk: of each split, of the codebook, and of the tokenizer."""
        result = {split: self.splits[split].stored_bytes for split in self.splits}
        result["codebook"] = (self.path / "codebook.safetensors").stat().st_size
        result["tokenizer"] = self.tokenizer.stat().st_size if self.tokenizer else 0
        return result

    def verify(self) -> np.ndarray:
        """Reads every code; returns how often each is used, int64 ``[codes]``.

        Raises:
            InputError: naming the first damaged image.
        """
        used = np.zeros(len(self.codebook), dtype=np.int64)
        for split in self.splits.values():
            for codes in split.blocks():
                used += np.bincount(codes.numpy().ravel(), minlength=len(used))
        return used

    def _split(
        self, split: str, images: int, size: int, codes: int, compressed: bool
    ) -> TokenSplit:
        folder = self.path / split
        suffix = ".gz" if compressed else ""
        files = [folder / f"codes.bin{suffix}", folder / f"offsets.npy{suffix}",
                 folder / "labels.txt"]  # fmt: skip
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing")
        if not 1 <= images <= size:
            raise InputError(f"{self.path / 'store.json'} promises {images} images in {size} bytes")
        # At most what was promised is unpacked, so a small file cannot fill the memory.
        offsets = _npy(_unpacked(files[1], 8 * (images + 1) + 4096, compressed), files[1])
        if offsets.shape != (images + 1,):
            raise InputError(
                f"{files[1]} has {len(offsets)} offsets; {images} images need {images + 1}"
            )
        if offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 1).any():
            raise InputError(f"{files[1]} is damaged: its offsets do not go up from 0 to {size}")
        if compressed:
            content = np.frombuffer(_unpacked(files[0], size, compressed), dtype=np.uint8)
        elif files[0].stat().st_size == 0:
            content = np.empty(0, dtype=np.uint8)
        else:
            content = np.memmap(files[0], dtype=np.uint8, mode="r")
        if len(content) != size:
            raise InputError(
                f"{files[0]} is {'truncated' if len(content) < size else 'too long'}: {size} bytes "
                f"are promised, {len(content)} are there"
            )
        labels = _labels(files[2], images, len(self.classes))
        stored = sum(file.stat().st_size for file in files)
        return TokenSplit(content, offsets, labels, self.grid, codes, folder, stored)


def write_store(
    path: Path,
    splits: Mapping[str, Iterable[tuple[Tensor, Tensor]]],
    *,
    codebook: Tensor,
    classes: Sequence[str],
    name: str,
    compress: bool = True,
    tokenizer: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Writes a store in one rename; the codes pass through in blocks.

    Args:
        path: the folder; an existing one is replaced only when the new one is whole.
        splits: blocks of codes ``[n, height, width]`` and labels ``[n]``, by the split's name.
        codebook: ``[codes, dims]``.
        classes: names, in label order.
        name: of the data.
        compress: with gzip.
        tokenizer: file of the network that made the codes, copied into the store.
        about: JSON values to keep in store.json (what the tokenizer was trained on, for example).

    Raises:
        InputError: if a split is empty, grids differ, a code or a label is out of range, or the
            place cannot be written.
    """
    if Path(path).exists() and not (Path(path) / "store.json").is_file():
        raise InputError(f"{path} exists and is no store of tokens; choose another place")
    grid: tuple[int, ...] | None = None
    counts: dict[str, dict[str, int]] = {}
    with whole_folder(Path(path)) as partial:
        for split, blocks in splits.items():
            (partial / split).mkdir()
            labels: list[str] = []
            starts: list[np.ndarray] = []
            total = 0
            suffix = ".gz" if compress else ""
            # Time 0 in the header: the same codes make the same file.
            with open(partial / split / f"codes.bin{suffix}", "wb") as raw:
                packer = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if compress else None
                for codes, block_labels in blocks:
                    grid = grid or tuple(codes.shape[1:])
                    _check_block(codes, block_labels, grid, len(codebook), len(classes))
                    content, offsets = encode_codes(codes.flatten(1).numpy())
                    (packer or raw).write(content)
                    starts.append(offsets[:-1] + total)
                    total += len(content)
                    labels += map(str, block_labels.tolist())
                if packer is not None:
                    packer.close()
            if not labels:
                raise InputError(f"the {split} split of {name} is empty")
            offsets = np.concatenate([*starts, [total]]).astype(np.int64)
            buffer = io.BytesIO()
            np.save(buffer, offsets, allow_pickle=False)
            content = gzip.compress(buffer.getvalue(), mtime=0) if compress else buffer.getvalue()
            (partial / split / f"offsets.npy{suffix}").write_bytes(content)
            (partial / split / "labels.txt").write_text("\n".join(labels) + "\n")
            counts[split] = {"images": len(labels), "bytes": total}
        if grid is None:
            raise InputError(f"{name} has no images to store")
        write_tensors(
            partial / "codebook.safetensors", {"codebook": codebook.detach().cpu().float()}
        )
        if tokenizer is not None:
            (partial / "tokenizer.safetensors").write_bytes(Path(tokenizer).read_bytes())
        write_json(
            partial / "store.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "name": name,
                "grid": list(grid),
                "codes": len(codebook),
                "classes": list(classes),
                "gzip": compress,
                "splits": counts,
                **(about or {}),
            },
        )
    return TokenStore(path)


def _check_block(
    codes: Tensor, labels: Tensor, grid: tuple[int, ...], count: int, classes: int
) -> None:
    if codes.ndim != 3 or tuple(codes.shape[1:]) != grid or len(codes) != len(labels):
        raise InputError(
            f"codes of shape {list(codes.shape)} and {len(labels)} labels do not belong to a store "
            f"of {' x '.join(map(str, grid))}"
        )
    for what, values, most in (("code", codes, count), ("label", labels, classes)):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= most):
            raise InputError(
                f"{what}s from {int(values.min())} to {int(values.max())} do not fit a store of "
                f"{most} {'codes' if what == 'code' else 'classes'}"
            )


def _unpacked(path: Path, most: int, compressed: bool) -> bytes:
    """The content of a file, and one byte more than ``most`` if there is more."""
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            return file.read(most + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error


def _npy(content: bytes, path: Path) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    # numpy parses the header as Python and raises nearly anything for arbitrary bytes.
    except Exception as error:
        raise InputError(f"{path} is truncated or no array of offsets") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{path} is no array of offsets")
    return array.astype(np.int64)


def _labels(path: Path, images: int, classes: int) -> Tensor:
    try:
        labels = np.array([int(line) for line in path.read_text("ascii").split()], dtype=np.int64)
    except (OverflowError, ValueError) as error:
        raise InputError(f"{path} is damaged: a line is no number") from error
    if len(labels) != images:
        raise InputError(f"{path} has {len(labels)} labels for {images} images")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{path} has label {wrong}, but there are {classes} classes")
    return torch.from_numpy(labels)


def _codebook(path: Path, codes: int) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        codebook = load_file(path)["codebook"]
    except (KeyError, OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing, truncated or no codebook") from error
    if codebook.ndim != 2 or len(codebook) != codes or not codebook.is_floating_point():
        raise InputError(f"{path} is no codebook of {codes} codes: {list(codebook.shape)}")
    if not codebook.isfinite().all():
        raise InputError(f"{path} is damaged: it holds NaN or infinity")
    return codebook.float()


def entropy_bytes(tokens: int, codes: int) -> float:
    """Bytes of ``tokens`` codes that are all equally likely."""
    return tokens * float(np.log2(codes)) / 8
