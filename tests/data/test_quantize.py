"""Dataset quantization: bins, their sample, and patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.data.methods import Candidates, choose
from gossamer.data.patches import (
    PatchStore,
    grad_cam,
    kept_patches,
    most_important,
    train_decoder,
)
from gossamer.data.quantize import bins_of, gradient_features, one_shot, sample
from gossamer.data.selection import subset
from gossamer.datasets import open_task
from gossamer.models.masked_autoencoder import MaskedAutoencoder, image_of, patches_of

LABELS = np.repeat([0, 1, 2], [20, 15, 12])
FEATURES = np.random.default_rng(0).normal(size=(47, 4))


def test_sizes_of_bins() -> None:
    assert [len(part) for part in bins_of(FEATURES, bins=5)] == [9, 9, 9, 9, 11]
    made = bins_of(FEATURES, LABELS, bins=5)
    counts = np.stack([np.bincount(LABELS[part], minlength=3) for part in made])
    assert counts.T.tolist() == [[4] * 5, [3] * 5, [2, 2, 2, 3, 3]]
    assert sorted(np.concatenate(made).tolist()) == list(range(47))


def test_bins_are_greedy_on_what_is_left() -> None:
    made = bins_of(FEATURES, bins=3)
    left = np.arange(47)
    for part in made[:2]:
        expected = left[one_shot(FEATURES[left], 15 / len(left))]
        np.testing.assert_array_equal(part, expected)
        left = np.setdiff1d(left, part)


def test_later_bins_are_more_diverse() -> None:
    random = np.random.default_rng(1)
    blobs = np.concatenate([c + 0.1 * random.normal(size=(80, 3)) for c in np.eye(3)])
    far = random.normal(size=(60, 3)) * [1, 1, 1] - 1.0
    data = np.concatenate([blobs, far])
    unit = data / np.linalg.norm(data, axis=1, keepdims=True)
    spread = [1 - (unit[part] @ unit[part].T).mean() for part in bins_of(data, bins=5)]
    assert spread[-1] > spread[0]
    outlying = [(part >= 240).mean() for part in bins_of(data, bins=5)]
    assert outlying[0] < 0.1 < outlying[-1]


def test_sampling_bins() -> None:
    made = bins_of(FEATURES, LABELS, bins=4)
    for fraction, wanted in ((1.0, 47), (0.5, 24), (0.1, 5)):
        rows = sample(made, fraction, labels=LABELS, seed=1)
        assert len(rows) == len(set(rows.tolist())) == wanted
    half = sample(made, 0.5, seed=3)
    for part in made:
        assert abs(np.isin(half, part).sum() - len(part) / 2) <= 1
    np.testing.assert_array_equal(half, sample(made, 0.5, seed=3))


def test_one_bin_is_uniform() -> None:
    made = bins_of(FEATURES, bins=1)
    counts = np.zeros(47)
    for seed in range(400):
        counts[sample(made, 10 / 47, seed=seed)] += 1
    expected = 400 * 10 / 47
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_more_bins_than_samples() -> None:
    with pytest.raises(InputError, match="13 bins cannot be made: the smallest class has 12"):
        bins_of(FEATURES, LABELS, bins=13)


def test_as_a_method() -> None:
    for labels in (LABELS, None):
        candidates = Candidates(labels, size=47, features=lambda: FEATURES)
        for name in ("quantize", "graphcut", "facility", "logdet", "k-center", "herding"):
            rows = choose(name, candidates, 0.4).rows
            assert len(rows) == len(set(rows.tolist())) == 19, name


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip


def test_gradient_features_by_autograd() -> None:
    task = subset(open_task("digits"), np.arange(6))
    found = gradient_features(task, network(), width=None)
    model = network()
    images, labels = next(iter(task.batches("train", batch_size=6, shuffle=False)))
    head = model[4]
    for row in range(6):
        logits = model(images[row : row + 1])
        loss = nn.functional.cross_entropy(logits.softmax(1), labels[row : row + 1])
        weight, bias = torch.autograd.grad(loss, [head.weight, head.bias])
        np.testing.assert_allclose(
            found[row], torch.cat([bias, weight.flatten()]), rtol=1e-4, atol=1e-7
        )


def test_patches_there_and_back() -> None:
    images = torch.randn(3, 2, 8, 12)
    assert image_of(patches_of(images, 4), 2, (8, 12), 4).equal(images)
    assert patches_of(images, 4)[1, 5].equal(images[1, :, 4:8, 8:12].flatten())
    with pytest.raises(InputError, match="do not divide"):
        patches_of(images, 5)


def test_how_many_patches_stay() -> None:
    assert kept_patches(196, 0.2) == 156 and kept_patches(196, 0.0) == 196
    with pytest.raises(InputError, match="not 1"):
        kept_patches(196, 1.0)


def test_stored_pixels_stay_to_the_bit(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    importance = torch.rand(5, 8, 8)
    places = most_important(importance, 2, kept_patches(16, 0.4))
    store = PatchStore.of(images, torch.arange(5), places, 2)
    store.write(tmp_path / "s")
    again = PatchStore.read(tmp_path / "s")
    torch.manual_seed(0)
    decoder = MaskedAutoencoder((8, 8), 1, 2, width=16, heads=2, decoder_width=16)
    kept = torch.zeros(5, 16, dtype=torch.bool).scatter(1, places, True)
    mask = image_of(kept[..., None].expand(-1, -1, 4).to(torch.uint8), 1, (8, 8), 2).bool()
    for drawn in (again.whole(decoder), again.whole(None)):
        assert drawn[mask].equal(images[mask]) and not drawn.equal(images)
    assert again.labels.tolist() == [0, 1, 2, 3, 4]
    whole = PatchStore.of(images, torch.arange(5), most_important(importance, 2, 16), 2)
    assert whole.whole(decoder).equal(images)
    content = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(content[:-9])
    with pytest.raises(InputError, match="no store of patches"):
        PatchStore.read(tmp_path / "s")


def test_the_most_important() -> None:
    importance = torch.zeros(1, 4, 4)
    importance[0, 2:, :2] = 1.0
    importance[0, 0, 3] = 2.0
    assert most_important(importance, 2, 2).tolist() == [[1, 2]]


def test_grad_cam_by_its_formula() -> None:
    model = network().eval()
    images = torch.randn(2, 1, 8, 8)
    found = grad_cam(model, images, "0")
    maps = model[0](images).detach().requires_grad_()
    score = model[1:](maps).amax(1).sum()
    (g,) = torch.autograd.grad(score, maps)
    below = 2 * g**2 + maps.detach().sum((2, 3), keepdim=True) * g**3
    alpha = torch.where(below != 0, g**2 / below, 0.0)
    expected = ((alpha * g.relu()).sum((2, 3), keepdim=True) * maps.detach()).sum(1).relu()
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match="gives no maps"):
        grad_cam(model, images, "4")


def test_a_decoder_learns_to_draw() -> None:
    task = open_task("digits", limit=400)
    task.augment = None
    decoder = train_decoder(task, 2, drop=0.4, epochs=12, batch_size=64)
    raw = task.splits["validation"].fetch(np.arange(task.size("validation")))
    images = (raw.float() * 255 / 16).to(torch.uint8)
    places = most_important(torch.rand(len(images), 8, 8), 2, kept_patches(16, 0.4))
    store = PatchStore.of(images, torch.zeros(len(images), dtype=torch.long), places, 2)
    drawn = (store.whole(decoder).float() - images).square().mean()
    plain = (store.whole(None).float() - images).square().mean()
    assert drawn < 0.8 * plain
