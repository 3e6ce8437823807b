"""MNIST's files: known bytes, and one sentence for each way they can be broken."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.datasets import open_task
from gossamer.datasets.idx import FASHION, idx_folder, read_idx

LABELS = b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes([7, 0, 9])
IMAGES = b"\0\0\x08\x03" + struct.pack(">III", 2, 1, 3) + bytes(range(6))


def write(path: Path, content: bytes, *, zipped: bool = False) -> Path:
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_known_bytes(tmp_path: Path, zipped: bool) -> None:
    labels = read_idx(write(tmp_path / "l", LABELS, zipped=zipped), axes=1)
    assert labels.tolist() == [7, 0, 9] and labels.dtype == np.uint8
    images = read_idx(write(tmp_path / "i", IMAGES, zipped=zipped), axes=3)
    assert images.tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize(
    ("content", "axes", "sentence"),
    [
        (b"", 1, "is not an idx file"),
        (b"\0\0\x08", 1, "is not an idx file"),
        (b"\0\0\x0d\x01" + LABELS[4:], 1, "is not an idx file of unsigned bytes"),
        (LABELS, 3, "has 1 axes where 3 are needed"),
        (IMAGES[:10], 3, "ends inside its header"),
        (IMAGES[:-1], 3, r"is truncated: 6 values of shape \[2, 1, 3\] are promised, 5 are there"),
        (IMAGES + b"x", 3, "is longer than its header says"),
        (b"\0\0\x08\x01" + b"\xff" * 4 + b"abc", 1, "is truncated: 4294967295 values"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + b"abc", 3, "is truncated"),
        (b"\0\0\x08\x01" + b"\0" * 4, 1, "is empty"),
        (gzip.compress(IMAGES)[:-9], 3, "is corrupt or truncated"),
        (gzip.compress(IMAGES)[:25] + b"zzzz" + gzip.compress(IMAGES)[29:], 3, "is corrupt"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, axes: int, sentence: str) -> None:
    path = write(tmp_path / "broken", content)
    with pytest.raises(InputError, match=sentence) as caught:
        read_idx(path, axes=axes)
    assert str(path) in str(caught.value)


def folder(path: Path, *, suffix: str = "", dot: str = "-") -> Path:
    path.mkdir(parents=True)
    drawn = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 12)):
        images = drawn.integers(0, 256, (count, 4, 5), dtype=np.uint8)
        labels = (np.arange(count) % 4).astype(np.uint8)
        header = b"\0\0\x08\x03" + struct.pack(">III", count, 4, 5)
        zipped = suffix == ".gz"
        write(
            path / f"{prefix}-images{dot}idx3-ubyte{suffix}",
            header + images.tobytes(),
            zipped=zipped,
        )
        header = b"\0\0\x08\x01" + struct.pack(">I", count)
        write(
            path / f"{prefix}-labels{dot}idx1-ubyte{suffix}",
            header + labels.tobytes(),
            zipped=zipped,
        )
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
def test_folders_are_found(tmp_path: Path, suffix: str, dot: str, place: str) -> None:
    folder(tmp_path / "data" / place, suffix=suffix, dot=dot)
    task = open_task(str(tmp_path / "data"))
    assert {s: task.size(s) for s in task.splits} == {"train": 36, "validation": 4, "test": 12}
    assert task.classes == ("0", "1", "2", "3")
    assert task.example_inputs[0].shape == (2, 1, 4, 5)


def test_names_of_classes(tmp_path: Path) -> None:
    assert idx_folder(folder(tmp_path / "fashion-mnist")).classes == FASHION
    named = folder(tmp_path / "named")
    (named / "classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
    assert idx_folder(named).classes == ("a", "b", "c", "d")
    (named / "classes.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="is not a list of class names"):
        idx_folder(named)
    (named / "classes.json").write_text('["a", "b"]')
    with pytest.raises(InputError, match="has label 3, but there are 2 classes"):
        idx_folder(named)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    place = folder(tmp_path / "data")
    (place / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="has no t10k-labels-idx1-ubyte"):
        idx_folder(place)
    with pytest.raises(InputError, match="has no train-images-idx3-ubyte"):
        idx_folder(tmp_path)


def test_images_and_labels_that_do_not_belong_together(tmp_path: Path) -> None:
    place = folder(tmp_path / "data")
    (place / "t10k-labels-idx1-ubyte").write_bytes(LABELS)
    with pytest.raises(InputError, match="do not belong together"):
        idx_folder(place)


@pytest.mark.data
@pytest.mark.parametrize(("name", "first"), [("mnist", 7), ("fashion_mnist", 9)])
def test_real_files(real_data: Callable[[str], Path], name: str, first: int) -> None:
    task = open_task(real_data(name))
    assert {s: task.size(s) for s in task.splits} == {
        "train": 54000,
        "validation": 6000,
        "test": 10000,
    }
    # The first test image of MNIST is a 7, of Fashion-MNIST an ankle boot.
    assert int(task.splits["test"].labels[0]) == first
    pixels = task.splits["test"].fetch(np.arange(1))
    assert pixels.dtype == torch.uint8 and pixels.shape == (1, 1, 28, 28)
