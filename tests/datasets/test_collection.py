"""Collections: names, labels, and what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.datasets import open_task
from gossamer.datasets.collection import collection_of, open_collection


def picture(path: Path, grey: int, *, mode: str = "L", side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), grey).convert(mode).save(path)
    return path


def test_classes_are_the_folders(tmp_path: Path) -> None:
    for grey, name in enumerate(("b/2.png", "a/1.png", "a/deep/3.png")):
        picture(tmp_path / name, 10 * grey)
    found = open_collection(tmp_path)
    assert found.names == ("a/1.png", "a/deep/3.png", "b/2.png")
    assert found.classes == ("a", "b")
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1]
    assert found.fetch(np.array([2, 0]))[:, 0, 0, 0].tolist() == [0, 10]
    assert found.take(np.array([2])).names == ("b/2.png",)


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png", 1)
    picture(tmp_path / "2.png", 2)
    found = open_collection(tmp_path)
    assert found.labels is None and found.classes == ()
    with pytest.raises(InputError, match="have no labels"):
        found.task()


def test_what_cannot_be_read_is_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "good.png", 5)
    (tmp_path / "a" / "bad.png").write_bytes(b"no image")
    whole = picture(tmp_path / "a" / "cut.jpg", 7, mode="RGB", side=64).read_bytes()
    (tmp_path / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    found = open_collection(tmp_path)
    assert found.names == ("a/good.png",)
    assert [skipped.name for skipped in found.skipped] == ["a/bad.png", "a/cut.jpg"]
    assert all("cannot be read as an image" in skipped.reason for skipped in found.skipped)


def test_damage_in_the_middle_is_listed_when_looked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / name)
    content = bytearray((tmp_path / "b.png").read_bytes())
    content[200:260] = bytes(60)
    (tmp_path / "b.png").write_bytes(content)
    assert len(open_collection(tmp_path)) == 2
    thorough = open_collection(tmp_path, thorough=True)
    assert thorough.names == ("a.png",)
    assert thorough.skipped[0].name == "b.png"


def test_mixed_modes_become_one(tmp_path: Path) -> None:
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        picture(tmp_path / f"{mode}.png", 255, mode=mode)
    found = open_collection(tmp_path)
    assert found.channels == 3
    assert found.fetch(np.arange(5)).eq(255).all()


def test_labels_from_a_file(tmp_path: Path) -> None:
    images = tmp_path / "images"
    picture(images / "x.png", 1)
    picture(images / "y.png", 2)
    table = tmp_path / "labels.csv"
    table.write_text("name,label\ny.png,cat\nx.png,dog\n")
    found = open_collection(images, labels=table)
    assert found.classes == ("cat", "dog")
    assert found.labels is not None and found.labels.tolist() == [1, 0]
    table.write_text("name,label\ny.png,cat\n")
    with pytest.raises(InputError, match=r"no label for 1 of 2 images, x\.png first"):
        open_collection(images, labels=table)
    table.write_text("name,label\ny.png,cat\nx.png,dog\ny.png,dog\n")
    with pytest.raises(InputError, match=r"gives 1 images two labels, y\.png first"):
        open_collection(images, labels=table)
    table.write_text("file,label\n")
    with pytest.raises(InputError, match="columns name and label"):
        open_collection(images, labels=table)
    table.write_bytes(b"name,label\n\xff,1\n")
    with pytest.raises(InputError, match="UTF-8"):
        open_collection(images, labels=table)


def test_labels_and_folders_that_disagree(tmp_path: Path) -> None:
    images = tmp_path / "images"
    picture(images / "cat" / "x.png", 1)
    picture(images / "dog" / "y.png", 2)
    table = tmp_path / "labels.csv"
    table.write_text("name,label\ncat/x.png,cat\ndog/y.png,cat\n")
    # Folders that are not named after the classes of the file are no second opinion.
    assert open_collection(images, labels=table).classes == ("cat",)
    table.write_text("name,label\ncat/x.png,dog\ndog/y.png,cat\n")
    with pytest.raises(InputError, match=r"disagree about 2 of 2 images: cat/x\.png lies in cat"):
        open_collection(images, labels=table)


def test_empty_and_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        open_collection(tmp_path)
    with pytest.raises(InputError, match="no folder of images"):
        open_collection(tmp_path / "none")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match="none of 1 images can be read"):
        open_collection(tmp_path)


def test_hidden_folders_are_left_alone(tmp_path: Path) -> None:
    picture(tmp_path / ".thumbs" / "1.png", 1)
    picture(tmp_path / "a" / "2.png", 2)
    assert open_collection(tmp_path).names == ("a/2.png",)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", 1)
    first = open_collection(tmp_path).fingerprint()
    assert open_collection(tmp_path).fingerprint() == first
    picture(tmp_path / "1.png", 1, side=9)
    assert open_collection(tmp_path).fingerprint() != first


def test_digits_and_a_task_split() -> None:
    every = open_collection("digits")
    assert len(every) == 1797 and every.scale == 16.0
    task = open_task("digits")
    train = collection_of(task)
    assert len(train) == task.size("train") and train.classes == task.classes
    inputs = train.preprocess(task.preprocess.mean, task.preprocess.std)(train.fetch(np.arange(3)))
    expected, _ = next(iter(task.batches("train", batch_size=3, shuffle=False)))
    assert inputs.equal(expected)


@pytest.mark.data
def test_stored_splits(real_data) -> None:
    fashion = open_collection(real_data("fashion_mnist"), split="test")
    assert len(fashion) == 10_000 and fashion.names[3] == "test#3"
    cifar = open_collection(real_data("cifar10"))
    assert len(cifar) == 50_000 and cifar.classes[0] == "airplane" and cifar.size == (32, 32)
