"""Augmentations against a loop over the samples."""

from __future__ import annotations

import torch

from gossamer.datasets.augment import compose, flip, shift


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shifts_are_crops_of_the_padded_image() -> None:
    images = torch.randint(1, 256, (40, 3, 5, 6), dtype=torch.uint8)
    moved = shift(2)(images, generator())
    assert moved.dtype == images.dtype
    top, left = torch.randint(0, 5, (2, 40), generator=generator())
    for image, result, y, x in zip(images, moved, top.tolist(), left.tolist(), strict=True):
        padded = torch.zeros(3, 9, 10, dtype=torch.uint8)
        padded[:, 2:7, 2:8] = image
        assert torch.equal(result, padded[:, y : y + 5, x : x + 6])
    assert {(y, x) for y, x in zip(top.tolist(), left.tolist(), strict=True)} > {(0, 0)}


def test_flips_mirror_about_half() -> None:
    images = torch.rand(1000, 1, 2, 3)
    mirrored = flip()(images, generator())
    same = (mirrored == images).flatten(1).all(1)
    assert torch.equal(mirrored[~same], images[~same].flip(3))
    assert 450 < int(same.sum()) < 550
    assert torch.equal(flip(1.0)(images, generator()), images.flip(3))
    assert torch.equal(flip(0.0)(images, generator()), images)


def test_order_of_composition_and_reproducibility() -> None:
    images = torch.rand(16, 1, 4, 4)
    draws = generator(3)
    expected = shift(1)(flip()(images, draws), draws)
    assert torch.equal(compose(flip(), shift(1))(images, generator(3)), expected)
    assert not torch.equal(compose(flip(), shift(1))(images, generator(4)), expected)
