"""Folders of images: what they hold, and one sentence for what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.datasets import open_task
from gossamer.datasets.folder import image_folder


def fill(folder: Path, count: int, value: int, *, side: int = 8, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.full((side, side, 3), value, dtype=np.uint8)
        pixels[0, 0] = number  # so that every image is another
        Image.fromarray(pixels).save(folder / f"{number:03}{suffix}")


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    root = tmp_path / "animals"
    for value, name in enumerate(("cat", "dog", "eel")):
        fill(root / name, 20, 100 + value)
    return root


def test_classes_are_the_subfolders(animals: Path) -> None:
    (animals / "notes.txt").write_text("not an image")
    (animals / "cat" / "notes.txt").write_text("not an image")
    (animals / ".cache").mkdir()
    task = open_task(animals)
    assert task.classes == ("cat", "dog", "eel") and task.name == "animals"
    assert {s: task.size(s) for s in task.splits} == {"train": 43, "validation": 5, "test": 12}
    for part in task.splits.values():
        images = part.fetch(np.arange(len(part)))
        assert images.dtype == torch.uint8
        assert torch.equal(images[:, 0, 5, 5].long() - 100, part.labels)
    assert task.example_inputs[0].shape == (2, 3, 8, 8)


def test_splits_are_functions_of_the_seed(animals: Path) -> None:
    def names(seed: int) -> dict[str, list[str]]:
        parts = image_folder(animals, seed=seed).splits
        return {split: part.names for split, part in parts.items()}  # type: ignore[attr-defined]

    assert names(1) == names(1) != names(2)
    everything = [name for part in names(1).values() for name in part]
    assert len(everything) == len(set(everything)) == 60


def test_folders_that_are_split_already(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 3), ("test", 4)):
        for value, name in enumerate("ab"):
            fill(tmp_path / split / name, count, value)
    task = open_task(tmp_path)
    assert {s: task.size(s) for s in task.splits} == {"train": 20, "validation": 6, "test": 8}


def test_a_lone_validation_folder_is_the_final_measurement(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 3)):
        for value, name in enumerate("ab"):
            fill(tmp_path / split / name, count, value)
    task = open_task(tmp_path)
    assert {s: task.size(s) for s in task.splits} == {"train": 18, "validation": 2, "test": 6}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for value, name in enumerate(("train", "plane")):
        fill(tmp_path / name, 10, value)
    assert open_task(tmp_path).classes == ("plane", "train")


def test_sizes_and_channels(tmp_path: Path) -> None:
    fill(tmp_path / "a", 10, 1, side=300)
    fill(tmp_path / "b", 10, 2, side=400)
    assert open_task(tmp_path).example_inputs[0].shape == (2, 3, 224, 224)
    small = open_task(tmp_path, image_size=(16, 24), channels=1)
    assert small.example_inputs[0].shape == (2, 1, 16, 24)
    for file in tmp_path.rglob("*.png"):
        Image.open(file).convert("L").resize((9, 7)).save(file)
    assert open_task(tmp_path).example_inputs[0].shape == (2, 1, 7, 9)


def test_what_does_not_fit_in_memory_is_the_same(animals: Path) -> None:
    for cache in (0, 8 * 8 * 3 * 25, 1 << 30):
        task = image_folder(animals, cache_bytes=cache)
        expected = image_folder(animals)
        assert task.preprocess == expected.preprocess
        for split, part in task.splits.items():
            rows = np.random.default_rng(0).permutation(len(part)).repeat(2)
            for _ in range(2):
                assert torch.equal(part.fetch(rows), expected.splits[split].fetch(rows))


@pytest.mark.parametrize("cache", [0, 1 << 30])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_truncated_image_is_named_up_front(tmp_path: Path, suffix: str, cache: int) -> None:
    for value, name in enumerate("ab"):
        fill(tmp_path / name, 50, value, side=40, suffix=suffix)
    broken = tmp_path / "b" / f"017{suffix}"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(InputError, match="cannot be read as an image, it is corrupt") as caught:
        image_folder(tmp_path, cache_bytes=cache)
    assert str(broken) in str(caught.value)


def test_what_is_no_image_is_named_up_front(animals: Path) -> None:
    (animals / "dog" / "zzz.jpg").write_text("hello")
    with pytest.raises(InputError, match=r"zzz\.jpg cannot be read as an image"):
        open_task(animals)


def test_folders_that_are_no_classes(tmp_path: Path, animals: Path) -> None:
    with pytest.raises(InputError, match="is no data set"):
        open_task(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds none of the data that is looked for"):
        open_task(empty)
    with pytest.raises(InputError, match="has no classes"):
        image_folder(empty)
    with pytest.raises(InputError, match=r"has no classes: put .*\(there are 20 images beside"):
        open_task(animals / "cat")
    one = tmp_path / "one"
    fill(one / "cat", 5, 0)
    with pytest.raises(InputError, match="has only one class, 'cat'"):
        open_task(one)
    (one / "dog").mkdir()
    with pytest.raises(InputError, match=r"the class .*dog holds no images"):
        open_task(one)


def test_classes_unknown_to_training(tmp_path: Path) -> None:
    for name in "ab":
        fill(tmp_path / "train" / name, 5, 0)
    fill(tmp_path / "test" / "c", 5, 0)
    with pytest.raises(InputError, match="is a class that has no training images; known are a, b"):
        open_task(tmp_path)


def test_too_few_images(tmp_path: Path) -> None:
    for name in "ab":
        fill(tmp_path / name, 2, 0)
    with pytest.raises(InputError, match=r"validation split of .* would be empty"):
        open_task(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="no data: surrogates")
def test_names_that_are_no_text(animals: Path) -> None:
    os.mkdir(os.fsencode(animals) + b"/\xff\xfe")
    with pytest.raises(InputError, match="a subfolder whose name is not UTF-8"):
        open_task(animals)


def test_an_image_that_vanishes_is_named(animals: Path) -> None:
    task = image_folder(animals, cache_bytes=0)
    (animals / "cat" / "003.png").unlink()
    with pytest.raises(InputError, match=r"003\.png cannot be read"):
        for split in task.splits:
            for _ in task.batches(split):
                pass
