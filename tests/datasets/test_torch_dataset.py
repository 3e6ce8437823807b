"""Any map-style data set of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from gossamer.core.errors import InputError
from gossamer.datasets.torch_dataset import from_dataset


class Listed(Dataset[Any]):
    """Pairs in a list."""

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def test_floats_are_passed_on_as_they_are() -> None:
    images = torch.randn(50, 3, 4, 5)
    labels = torch.arange(50) % 5
    task = from_dataset(TensorDataset(images, labels))
    assert {s: task.size(s) for s in task.splits} == {"train": 36, "validation": 4, "test": 10}
    found = {tuple(row) for x, _ in task.batches("train") for row in x.flatten(1).tolist()}
    assert found < {tuple(row) for row in images.flatten(1).tolist()}
    normalised = from_dataset(TensorDataset(images, labels), mean=[1.0] * 3, std=[2.0] * 3)
    expected = (task.example_inputs[0] - 1) / 2
    assert torch.allclose(normalised.example_inputs[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "array", "pillow", "grey"])
def test_bytes_are_scaled_and_normalised(kind: str) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)

    def image(row: np.ndarray) -> Any:
        return {
            "tensor": lambda: torch.from_numpy(row).permute(2, 0, 1),
            "array": lambda: row,
            "pillow": lambda: Image.fromarray(row),
            "grey": lambda: row[..., 0],
        }[kind]()

    dataset = Listed([(image(row), k % 4) for k, row in enumerate(raw)])
    task = from_dataset(dataset, test=Listed(dataset.pairs[:8]))
    channels = 1 if kind == "grey" else 3
    assert task.example_inputs[0].shape == (2, channels, 6, 6)
    expected = torch.from_numpy(raw[:8, ..., :channels].transpose(0, 3, 1, 2).copy())
    assert torch.equal(task.splits["test"].fetch(np.arange(8)), expected)
    inputs = torch.cat([x for x, _ in task.batches("train", shuffle=False)])
    assert inputs.mean().abs() < 1e-3 and abs(inputs.std().item() - 1) < 2e-3


def test_labels_and_names_that_the_data_set_knows() -> None:
    class Known(Listed):
        classes = ("a", "b")

        def __init__(self) -> None:
            super().__init__([(torch.zeros(1, 2, 2), k % 2) for k in range(30)])
            self.targets = [k % 2 for k in range(30)]
            self.read = 0

        def __getitem__(self, index: int) -> Any:
            self.read += 1
            return super().__getitem__(index)

    dataset = Known()
    task = from_dataset(dataset)
    assert task.classes == ("a", "b") and task.name == "Known"
    assert dataset.read < 30  # labels were not read off every pair
    assert from_dataset(dataset, classes="xy").classes == ("x", "y")


def test_subsets_and_numpy_labels() -> None:
    pairs = [(torch.full((1, 2, 2), float(k)), np.int64(k % 3)) for k in range(60)]
    task = from_dataset(Subset(Listed(pairs), list(range(30, 60))))
    part = task.splits["train"]
    values = part.fetch(np.arange(len(part)))[:, 0, 0, 0]
    assert values.min() >= 30 and torch.equal(values.long() % 3, part.labels)


def test_images_of_different_sizes_are_brought_to_one() -> None:
    pairs = [(torch.full((1, 4 + k % 3, 5), 7.0), k % 2) for k in range(30)]
    task = from_dataset(Listed(pairs), image_size=(4, 4), channels=3)
    images, _ = next(task.batches("train"))
    assert images.shape[1:] == (3, 4, 4) and torch.allclose(images, torch.tensor(7.0))


ZERO = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (3, "sample 5 of the data set is not a pair"),
        ((ZERO,), "sample 5 of the data set is not a pair"),
        ((ZERO, "cat"), "the label of sample 5 is 'cat', not a whole number"),
        ((ZERO, 0.5), "the label of sample 5 is 0.5, not a whole number"),
        ((ZERO, None), "the label of sample 5 is None"),
        (("cat.png", 1), "the image of sample 5 is a str"),
        ((torch.zeros(2, 2, 2), 1), r"the image of sample 5 has shape \[2, 2, 2\]"),
        ((torch.zeros(1, 2, 2, dtype=torch.int32), 1), "the image of sample 5 is torch.int32"),
    ],
)
def test_samples_of_other_kinds(bad: Any, sentence: str) -> None:
    pairs: list[Any] = [(ZERO, k % 2) for k in range(20)]
    pairs[5] = bad
    with pytest.raises(InputError, match=sentence):
        task = from_dataset(Listed(pairs))
        for split in task.splits:
            list(task.batches(split))


def test_an_empty_data_set() -> None:
    with pytest.raises(InputError, match="the data set is empty"):
        from_dataset(Listed([]))
