"""CIFAR-10 in its three forms; a pickle is read without ever being run."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.datasets import open_task
from gossamer.datasets.cifar import CLASSES, TRAIN_BATCHES, read_plain_pickle, read_python

PIXELS = 3072


def pickled(value: Any, protocol: int) -> bytes:
    """What Python's own pickler writes."""
    buffer = io.BytesIO()
    ForkingPickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def batch(seed: int, count: int = 20) -> tuple[np.ndarray, list[int]]:
    drawn = np.random.default_rng(seed)
    return drawn.integers(0, 256, (count, PIXELS), dtype=np.uint8), [k % 10 for k in range(count)]


def legacy(data: np.ndarray, labels: list[int]) -> bytes:
    """The bytes of the published files, which Python 2 wrote with protocol 2."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    content = data.tobytes()
    dtype = (
        b"cnumpy\ndtype\nq\x0a"
        + text(b"u1")
        + b"K\x00K\x01\x87Rq\x0b(K\x03"
        + text(b"|")
        + b"NNN"
        + integer(-1)
        + integer(-1)
        + b"K\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85"
        + text(b"b")
        + b"\x87Rq\x09(K\x01"
        + integer(len(data))
        + integer(PIXELS)
        + b"\x86"
        + dtype
        + b"\x89T"
        + len(content).to_bytes(4, "little")
        + content
        + b"tb"
    )
    return (
        b"\x80\x02}q\x01("
        + text(b"batch_label")
        + text(b"training batch 1 of 5")
        + text(b"labels")
        + b"q\x04]q\x05("
        + b"".join(b"K" + bytes([k]) for k in labels)
        + b"e"
        + text(b"data")
        + array
        + text(b"filenames")
        + b"]("
        + text(b"a.png")
        + b"eu."
    )


def test_the_published_layout(tmp_path: Path) -> None:
    data, labels = batch(0)
    (tmp_path / "b").write_bytes(legacy(data, labels))
    images, found = read_python(tmp_path / "b")
    assert np.array_equal(images.reshape(-1, PIXELS), data)
    assert found.tolist() == labels


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_python_writes(tmp_path: Path, protocol: int, order: Any) -> None:
    data, labels = batch(1)
    value = {
        b"data": np.asarray(data, order=order),
        "labels": labels,
        "batch_label": b"testing",
        "none": None,
        "flags": [True, False, (), (1,), (1, 2, 3, 4), -5, 1 << 70],
    }
    content = pickled(value, protocol)
    read = read_plain_pickle(content, "b")
    assert np.array_equal(read["data"], data)
    assert read["labels"] == labels
    assert read["flags"] == value["flags"]
    assert read["none"] is None
    (tmp_path / "b").write_bytes(content)
    assert np.array_equal(read_python(tmp_path / "b")[0].reshape(-1, PIXELS), data)


class Evil:
    """What a malicious file would hold: unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    data, labels = batch(0)
    for value in (Evil(mark), {"data": data, "labels": labels, "x": Evil(mark)}, [Evil(mark)]):
        content = pickled(value, protocol)
        assert any("system" in str(argument) for _, argument, _ in pickletools.genops(content))
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(InputError, match=r"is refused|is not a batch of CIFAR-10"):
            read_python(tmp_path / "b")
        assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n.",
        b"cos\nsystem\n(S'touch mark'\ntR.",
        b"(ios\nsystem\n.",
        b"\x80\x02cnumpy\nndarray\n(K\x01tR.",
        b"\x80\x02cnumpy\ndtype\nU\x01O\x85R.",  # an array of objects would hold anything
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02ccopy_reg\n_reconstructor\n.",
        b"P1\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_refused_by_name(content: bytes) -> None:
    with pytest.raises(InputError, match="b is refused: it"):
        read_plain_pickle(content, "b")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": None}, "is not a batch"),
        ({"labels": [0] * 19}, "is not a batch"),
        ({"labels": [10] * 20}, "is not a batch"),
        ({"labels": ["a"] * 20}, "is not a batch"),
        ({"data": b"abc"}, "is not a batch"),
        ({"data": np.zeros((20, 7), np.uint8)}, "is not a batch"),
        ({"data": np.zeros((20, PIXELS), np.float32)}, "is refused"),
        ({"extra": {1, 2}}, "is refused"),
        ({"extra": 1.5}, "is refused"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    data, labels = batch(0)
    (tmp_path / "b").write_bytes(pickled({"data": data, "labels": labels} | change, 4))
    with pytest.raises(InputError, match=sentence):
        read_python(tmp_path / "b")


def test_truncated_anywhere(tmp_path: Path) -> None:
    content = legacy(*batch(0))
    for kept in [*range(0, 150), *range(len(content) - 40, len(content))]:
        (tmp_path / "b").write_bytes(content[:kept])
        with pytest.raises(InputError):
            read_python(tmp_path / "b")


def write_folder(path: Path, kind: str) -> Path:
    path.mkdir()
    (path / "classes.json").write_text('["' + '", "'.join(CLASSES) + '"]')
    batches = {name: batch(seed) for seed, name in enumerate((*TRAIN_BATCHES, "test_batch"))}
    if kind == "parquet":
        for split, names in (("train", TRAIN_BATCHES), ("test", ("test_batch",))):
            data = np.concatenate([batches[name][0] for name in names])
            images = []
            for row in data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1):
                buffer = io.BytesIO()
                Image.fromarray(row).save(buffer, "PNG")
                images.append(buffer.getvalue())
            labels = [label for name in names for label in batches[name][1]]
            table = pa.table({"index": range(len(images)), "label": labels, "image": images})
            pq.write_table(table, path / f"{split}_png.parquet")
        return path
    for name, (data, labels) in batches.items():
        if kind == "binary":
            column = np.array(labels, np.uint8)[:, None]
            (path / f"{name}.bin").write_bytes(np.concatenate([column, data], 1).tobytes())
        else:
            (path / name).write_bytes(legacy(data, labels))
    return path


@pytest.mark.parametrize("kind", ["binary", "python", "parquet"])
def test_all_forms_say_the_same(tmp_path: Path, kind: str) -> None:
    task = open_task(write_folder(tmp_path / "cifar", kind), seed=2)
    assert {s: task.size(s) for s in task.splits} == {"train": 90, "validation": 10, "test": 20}
    assert task.classes == CLASSES
    expected = batch(5)[0].reshape(-1, 3, 32, 32)
    assert np.array_equal(task.splits["test"].fetch(np.arange(20)).numpy(), expected)
    everything = np.concatenate([batch(seed)[0] for seed in range(5)])
    train = task.splits["train"].fetch(np.arange(90)).numpy().reshape(90, -1)
    assert {row.tobytes() for row in train} < {row.tobytes() for row in everything}


def test_torchvision_s_folder_around_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "cifar-10-batches-py", "python")
    assert open_task(tmp_path).size("test") == 20


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_a_missing_batch_is_named(tmp_path: Path, kind: str) -> None:
    place = write_folder(tmp_path / "cifar", kind)
    name = "data_batch_3" + (".bin" if kind == "binary" else "")
    (place / name).unlink()
    with pytest.raises(InputError, match=name):
        open_task(place)


def test_truncated_binary(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "cifar", "binary")
    content = (place / "test_batch.bin").read_bytes()
    (place / "test_batch.bin").write_bytes(content[:-1])
    with pytest.raises(InputError, match="61459 bytes are not a whole number of records of 3073"):
        open_task(place)


@pytest.mark.data
def test_real_parquet(real_data: Callable[[str], Path]) -> None:
    task = open_task(real_data("cifar10"), limit=500)
    assert {s: task.size(s) for s in task.splits} == {
        "train": 500,
        "validation": 500,
        "test": 10000,
    }
    assert task.name == "cifar10 (JPEG)" and task.classes == CLASSES
    # The first test images of CIFAR-10: cat, ship, ship, airplane, frog.
    assert task.splits["test"].labels[:5].tolist() == [3, 8, 8, 0, 6]
