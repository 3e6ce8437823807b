"""The embedded digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gossamer.core.fit import Supervised, fit, sgd, warm_cosine
from gossamer.datasets.digits import digits
from gossamer.models.resnet import digits_resnet


def test_every_digit_is_in_one_split() -> None:
    task = digits(seed=4)
    assert {s: task.size(s) for s in task.splits} == {"train": 862, "validation": 216, "test": 719}
    images = torch.cat(
        [part.fetch(np.arange(len(part))).flatten(1) for part in task.splits.values()]
    )
    labels = torch.cat([part.labels for part in task.splits.values()])
    rows = np.column_stack([images.numpy(), labels.numpy()])
    pixels, truth = load_digits(return_X_y=True)
    expected = np.column_stack([np.asarray(pixels), np.asarray(truth)])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_splits_are_stratified_functions_of_the_seed() -> None:
    for split in ("train", "validation", "test"):
        counts = torch.bincount(digits().splits[split].labels, minlength=10)
        assert int(counts.max() - counts.min()) <= 5
    assert digits(seed=1).fingerprint() == digits(seed=1).fingerprint()
    assert digits(seed=1).fingerprint() != digits(seed=2).fingerprint()


def test_inputs_are_normalised() -> None:
    images = torch.cat([x for x, _ in digits().batches("train", shuffle=False)])
    assert images.mean().abs() < 1e-3
    assert abs(images.std().item() - 1) < 1e-3
    assert digits().preprocess.scale == 16.0


def test_other_sizes_and_channels() -> None:
    task = digits(image_size=(16, 12), channels=3, limit=40)
    assert task.example_inputs[0].shape == (2, 3, 16, 12)
    assert task.size("train") == 40
    grey = task.splits["test"].fetch(np.array([3]))
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert grey.min() >= 0 and grey.max() <= 16


@pytest.mark.slow
def test_a_small_residual_network_reaches_97_percent() -> None:
    task = digits(seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = digits_resnet()
    rule = Supervised(network, task, optimizer=sgd(network), schedule=warm_cosine())
    fit(rule, task, epochs=20, batch_size=64, seed=0)
    assert task.score(network, "test") >= 97.0
