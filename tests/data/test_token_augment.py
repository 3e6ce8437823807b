"""Augmentation in the space of tokens: worked numbers, invariants, brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from gossamer.core.errors import InputError
from gossamer.data.token_augment import (
    ColorAdapt,
    EmbNoise,
    Geometry,
    NaiveAdapt,
    TokenAdapt,
    color_adapt,
    random_boxes,
    random_resized_crop,
    replace_synonyms,
    swap_patches,
    synonyms,
    warp,
)
from gossamer.models.token_adapt import TokenAdaptNetwork
from gossamer.models.vqvae import VqVae, nearest_codes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Looking codes up


def test_the_angle_decides() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    vectors = torch.tensor([[0.6, 0.7], [10.0, 1.0], [-0.1, 0.05]])
    assert nearest_codes(vectors, codebook).tolist() == [1, 0, 2]
    # Distance would decide otherwise for the first.
    assert torch.cdist(vectors, codebook)[0].argmin() == 0


def test_embeddings_of_codes_are_those_codes() -> None:
    codebook = torch.randn(391, 32, generator=seeded())
    codes = torch.arange(391)
    hot = torch.nn.functional.one_hot(codes, 391).float()
    assert torch.equal(nearest_codes(hot @ codebook, codebook), codes)


def test_a_codebook_follows_what_is_assigned_to_it() -> None:
    network = VqVae(1, patch=2, codes=3, dims=2, width=8, decay=0.5)
    network.place(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    found = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    network.follow(found, torch.tensor([0, 0]), 0.6, torch.tensor([0, 0, 1]))
    # Code 0: sums (1, 0) and (1.4, 1.4) average to (1.2, .7). Codes 1 and 2 fell below the bound
    # (count .5), and are placed on rows 0 and 1.
    expected = torch.tensor([[1.2, 0.7], [0.6, 0.8], [0.8, 0.6]])
    expected = expected / expected.norm(dim=1, keepdim=True) * math.sqrt(2)
    torch.testing.assert_close(network.codebook, expected)


# ColorAdapt and noise


def test_statistics_of_the_partner() -> None:
    z = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    partner = torch.tensor([[[[0.0, 0.0], [2.0, 2.0]]]])
    std, mean = torch.std_mean(partner)
    assert mean == 1.0 and std == pytest.approx(1.1547, abs=1e-4)
    expected = torch.tensor([[[[-0.3416, 0.5528], [1.4472, 2.3416]]]])
    torch.testing.assert_close(color_adapt(z, partner), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(color_adapt(z, z), z)
    # A constant channel has no deviation to divide by.
    torch.testing.assert_close(color_adapt(torch.full_like(z, 4.0), partner), torch.ones_like(z))
    half = color_adapt(torch.full_like(z, 4.0).half(), partner.half())
    assert half.isfinite().all() and half.dtype == torch.half


def test_color_adapt_changes_no_partner() -> None:
    """Every image gets the statistics its partner had before, not after."""
    z = torch.randn(6, 5, 4, 4, generator=seeded()) * torch.arange(1, 7).view(6, 1, 1, 1)
    before = z.clone()
    out = ColorAdapt(1.0)(z, seeded())
    assert torch.equal(z, before)
    torch.testing.assert_close(out.mean((2, 3)), before.flip(0).mean((2, 3)))
    torch.testing.assert_close(out.std((2, 3)), before.flip(0).std((2, 3)))
    assert torch.equal(ColorAdapt(0.0)(z, seeded()), z)
    some = (ColorAdapt(0.5)(z.repeat(200, 1, 1, 1), seeded()) != z.repeat(200, 1, 1, 1)).any(1)
    assert some.flatten(1).any(1).float().mean() == pytest.approx(0.5, abs=0.05)


def test_noise_has_two_scales() -> None:
    z = torch.zeros(2000, 4, 4, 4)
    noise = EmbNoise(p=1.0)(z, seeded())
    assert noise.var() == pytest.approx(2.0, abs=0.05)
    # What a channel shares has variance 1 (and 1/16 of the elements' rest).
    assert noise.mean((2, 3)).var() == pytest.approx(1 + 1 / 16, abs=0.05)
    half = EmbNoise(p=0.5)(z, seeded())
    assert (half.flatten(1).abs().sum(1) == 0).float().mean() == pytest.approx(0.5, abs=0.03)


# Token-EDA


def test_synonyms_are_the_nearest_others() -> None:
    codebook = torch.randn(40, 6, generator=seeded())
    nearest = synonyms(codebook, 5)
    unit = torch.nn.functional.normalize(codebook, dim=1).numpy()
    for code in range(40):
        order = [int(i) for i in np.argsort(-(unit @ unit[code])) if i != code]
        assert nearest[code].tolist() == order[:5]
    with pytest.raises(InputError, match="do not have 5 synonyms"):
        synonyms(codebook[:5])


def test_synonyms_replace_the_share_that_was_asked_for() -> None:
    nearest = synonyms(torch.randn(40, 6, generator=seeded()))
    codes = torch.randint(40, (2000, 8, 8), generator=seeded(1))
    out = replace_synonyms(codes, nearest, seeded(2))
    changed = out != codes
    images = changed.flatten(1).any(1)
    assert images.float().mean() == pytest.approx(0.25, abs=0.04)
    assert changed[images].float().mean() == pytest.approx(0.25, abs=0.01)
    assert (nearest[codes[changed]] == out[changed][:, None]).any(1).all()


def test_swapped_patches() -> None:
    """Codes are permuted; what moved are two squares that do not overlap."""
    codes = torch.arange(400).view(1, 20, 20).expand(300, -1, -1)
    out = swap_patches(codes, seeded(), images=1.0)
    swapped = 0
    for one in out:
        moved = (one != codes[0]).nonzero()
        assert sorted(one.flatten().tolist()) == list(range(400))
        if not len(moved):
            continue
        swapped += 1
        side = math.isqrt(len(moved) // 2)
        assert 2 * side * side == len(moved) and 1 <= side < 5
        here = {tuple(place) for place in moved.tolist()}
        there = {(int(v) // 20, int(v) % 20) for v in one[one != codes[0]]}
        assert here == there
        # Swapping is its own inverse.
        for row, column in moved.tolist():
            value = int(one[row, column])
            assert int(one[value // 20, value % 20]) == row * 20 + column
    assert swapped > 290
    assert torch.equal(swap_patches(codes[:, :4, :4], seeded(), images=1.0), codes[:, :4, :4])
    for side in (1, 2, 3, 5):
        tiny = torch.zeros(3, side, side, dtype=torch.long)
        assert swap_patches(tiny, seeded(), images=1.0).shape == tiny.shape
    some = swap_patches(codes.repeat(10, 1, 1), seeded())
    share = (some != codes[0]).flatten(1).any(1).float().mean()
    assert share == pytest.approx(0.25, abs=0.03)


# Geometry


def test_nothing_asked_for_is_the_identity() -> None:
    still = Geometry(flip=0, group=0, scale=(1, 1), ratio=(1, 1)).draw(5, seeded())
    torch.testing.assert_close(still, torch.eye(2, 3).expand(5, 2, 3))
    x = torch.randn(5, 3, 8, 8, generator=seeded())
    for mode in ("bilinear", "nearest", "bicubic"):
        torch.testing.assert_close(warp(x, still, 8, mode), x, atol=1e-5, rtol=1e-5)


def test_a_mirror_is_a_mirror() -> None:
    mirror = Geometry(flip=1, group=0, scale=(1, 1), ratio=(1, 1)).draw(2, seeded())
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(warp(x, mirror, 8), x.flip(3), atol=1e-5, rtol=1e-5)


def test_turning_agrees_with_scipy() -> None:
    """Rotation, shift and shear against an independent affine transformation."""
    geometry = Geometry(flip=0, group=1, member=1, scale=(1, 1), ratio=(1, 1))
    theta = geometry.draw(6, seeded(3))
    x = torch.rand(6, 1, 24, 24, generator=seeded())
    ours = warp(x, theta, 24)
    for image, matrix, out in zip(x, theta.double().numpy(), ours, strict=True):
        # From x, y in -1..1 to rows and columns of pixels.
        linear = matrix[::-1, :2][:, ::-1]
        middle = np.array([11.5, 11.5])
        offset = middle + 12 * matrix[::-1, 2] - linear @ middle
        theirs = ndimage.affine_transform(
            np.pad(image[0].numpy(), 30), linear, offset + 30 - linear @ np.array([30, 30]),
            order=1, mode="constant", output_shape=(84, 84),
        )[30:54, 30:54]  # fmt: skip
        np.testing.assert_allclose(out[0].numpy(), theirs, atol=1e-4)


def test_strengths_of_the_geometry() -> None:
    drawn = Geometry(flip=0, member=1, scale=(1, 1), ratio=(1, 1), shear=0).draw(4000, seeded())
    angle = torch.rad2deg(torch.atan2(drawn[:, 0, 1], drawn[:, 0, 0]))
    turned = angle.abs() > 1e-3
    assert turned.float().mean() == pytest.approx(0.5, abs=0.03)
    assert 29 < angle.abs().max() <= 30.001
    assert drawn[turned][:, :, 2].norm(dim=1).max() <= 0.4 * math.sqrt(2) + 1e-5


def test_boxes_have_the_area_and_stay_inside() -> None:
    box = random_boxes(5000, seeded(), scale=(0.2, 0.5))
    width, height = box[:, 0, 0], box[:, 1, 1]
    assert (width * height).min() >= 0.199 and (width * height).max() <= 0.501
    assert ((width / height) >= 0.749).all() and ((width / height) <= 1.334).all()
    assert ((box[:, :2, 2].abs() + torch.stack([width, height], 1)) <= 1.0 + 1e-6).all()
    with pytest.raises(InputError, match="0 < low <= high"):
        random_boxes(1, seeded(), scale=(0.5, 0.2))


def test_a_crop_of_a_plane_is_a_plane() -> None:
    """Bicubic interpolation keeps linear functions; a crop rescales their slope."""
    plane = torch.linspace(-1 + 1 / 32, 1 - 1 / 32, 32).expand(1, 1, 32, 32)
    crop = random_resized_crop(plane, 16, seeded(5), scale=(0.25, 0.25), ratio=(1, 1))
    inner = crop[0, 0, 4:-4, 4:-4]
    steps = inner.diff(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 0.5 * 2 / 16), atol=1e-4, rtol=0)


# TokenAdapt and its naive counterpart


def test_naive_geometry_moves_codes() -> None:
    codes = torch.randint(50, (7, 6, 6), generator=seeded())
    codebook = torch.randn(50, 8, generator=seeded())
    mirror = Geometry(flip=1, group=0, scale=(1, 1), ratio=(1, 1))
    naive = NaiveAdapt(codebook, 6, mirror)
    assert torch.equal(naive(codes, seeded()), codes.flip(2))
    assert torch.equal(naive(codes, seeded(), lambda x: x), codes.flip(2))
    assert torch.equal(naive(codes, seeded(), lambda x: x.flip(0)), codes.flip(2).flip(0))


def test_untrained_networks_agree_by_chance() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(391, 32)
    codes = torch.randint(391, (64, 8, 8))
    network = TokenAdaptNetwork(codebook, grid=8, crop=8, width=48, heads=4)
    still = torch.eye(2, 3).expand(64, 2, 3)
    found = TokenAdapt(network).turned(codes, still)
    assert (found == codes).float().mean() < 10 / 391
    assert torch.equal(network(codes).argmax(-1), found)


def test_sizes_of_the_paper() -> None:
    codebook = torch.randn(391, 32)
    network = TokenAdaptNetwork(codebook)
    assert network.unfold(torch.zeros(1, 32, 32, dtype=torch.long)).shape == (1, 32, 64, 64)
    adapt = TokenAdapt(network)
    assert adapt(torch.zeros(1, 32, 32, dtype=torch.long), seeded()).shape == (1, 28, 28)
    layer = 4 * 384 * 384 + 4 * 384 + 2 * 384 * 1536 + 1536 + 384 + 3 * 2 * 384
    ends = (32 * 384 + 384) + (384 * 32 * 4 + 32) + (32 * 384 * 4 + 384) + (384 * 391 + 391)
    assert sum(p.numel() for p in network.parameters()) == 2 * layer + ends
