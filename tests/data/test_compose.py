"""Prune, combine, augment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.data.compose import (
    Composed,
    benchmark,
    boundaries,
    combine,
    compose,
    cutmix,
    pick,
    rded,
    resized,
    separate,
    soft_loss,
    stored_images,
    tile_crop,
)
from gossamer.data.selection import keep
from gossamer.datasets import open_task
from gossamer.datasets.arrays import ArraySource


def constant(*values: int, side: int = 8) -> torch.Tensor:
    return torch.stack([torch.full((1, side, side), v, dtype=torch.uint8) for v in values])


def test_four_constant_images() -> None:
    stored = combine(constant(1, 2, 3, 4), 2)
    assert stored.shape == (1, 1, 8, 8)
    quadrants = [stored[0, 0, :4, :4], stored[0, 0, :4, 4:], stored[0, 0, 4:, :4]]
    assert [q.unique().tolist() for q in quadrants] == [[1], [2], [3]]
    assert stored[0, 0, 4:, 4:].unique().tolist() == [4]


def test_separating_returns_box_means() -> None:
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    tiles = separate(combine(images, 2), 2)
    means = images.float().reshape(8, 3, 4, 2, 4, 2).mean((3, 5)).round().to(torch.uint8)
    assert tiles.equal(means)
    with pytest.raises(InputError, match="do not fill tiles of 4"):
        combine(images[:7], 2)


def test_uneven_sides() -> None:
    assert boundaries(8, 3) == [0, 3, 6, 8]
    stored = combine(constant(*range(1, 10)), 3)
    assert stored[0, 0, 2, 2] == 1 and stored[0, 0, 3, 2] == 4 and stored[0, 0, 7, 7] == 9
    with pytest.raises(InputError, match="cannot hold 9 tiles"):
        boundaries(8, 9)


def test_which_image_lies_in_which_tile() -> None:
    stored = combine(constant(*range(1, 9)), 2)  # two stored images
    assert [int(stored[0, 0, y, x]) for y in (0, 4) for x in (0, 4)] == [1, 3, 5, 7]
    assert [int(stored[1, 0, y, x]) for y in (0, 4) for x in (0, 4)] == [2, 4, 6, 8]


def test_crops_never_mix_tiles() -> None:
    stored = combine(constant(*range(1, 5), side=9), 2).repeat(200, 1, 1, 1)
    crop = tile_crop(2, scale=(0.08, 1.0))
    views = crop(stored, torch.Generator().manual_seed(0))
    assert (views.amax((1, 2, 3)) - views.amin((1, 2, 3))).max() < 1e-5


def test_each_tile_is_drawn_evenly() -> None:
    stored = combine(constant(1, 2, 3, 4), 2)
    generator = torch.Generator().manual_seed(0)
    crop = tile_crop(2)
    seen = torch.tensor([float(crop(stored, generator)[0, 0, 0, 0]) for _ in range(1000)])
    for tile in (1, 2, 3, 4):
        assert abs(int((seen == tile).sum()) - 250) <= 45


def test_crops_lie_inside_and_cover_what_they_say() -> None:
    """On a ramp a crop is a ramp; its ends tell how wide it is."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64).repeat(2000, 1, 1, 1)
    views = tile_crop(1, scale=(0.25, 0.25), flip=True)(ramp, torch.Generator().manual_seed(1))
    ends = views[:, 0, 0, [0, -1]]
    width = (ends[:, 1] - ends[:, 0]).abs() * 64 / 63
    assert width.min() > 32 * math.sqrt(3 / 4) - 1 and width.max() < 32 * math.sqrt(4 / 3) + 1
    assert ends.min() >= 0.0 and ends.max() <= 63.0
    assert 0.4 < (ends[:, 1] < ends[:, 0]).float().mean() < 0.6  # mirrored
    assert tile_crop(1, scale=(1.0, 1.0), flip=False)(
        torch.rand(3, 1, 4, 4), torch.Generator()
    ).shape == (3, 1, 4, 4)


def test_a_whole_crop_is_the_image() -> None:
    images = torch.rand(4, 3, 8, 8)
    from gossamer.data.compose import _cropped

    whole = _cropped(images, (1.0, 1.0), torch.Generator().manual_seed(0), ratio=(1.0, 1.0))
    torch.testing.assert_close(whole, images, atol=1e-5, rtol=0)


LABELS = np.array([0, 1, 0, 1, 0, 1, 1])
SCORES = np.array([0.3, 0.1, 0.1, 0.9, 0.2, 0.4, 0.0])


def test_as_many_of_each_class() -> None:
    assert pick(SCORES, LABELS, 2).tolist() == [[2, 4], [6, 1]]
    assert pick(SCORES, LABELS, 2, order="hard").tolist() == [[0, 4], [3, 5]]
    for count in (1, 2):
        few, more = pick(SCORES, LABELS, count), pick(SCORES, LABELS, count + 1)
        assert all(set(a) <= set(b) for a, b in zip(few, more, strict=True))
    turn = np.random.default_rng(0).permutation(7)
    moved = pick(SCORES[turn], LABELS[turn], 2)
    assert turn[moved].tolist() == pick(SCORES, LABELS, 2).tolist()
    with pytest.raises(InputError, match="4 samples of each class are wanted, and class 0 has 3"):
        pick(SCORES, LABELS, 4)


def test_a_factor_of_one_is_easy_pruning() -> None:
    task = open_task("digits")
    source = task.splits["train"]
    scores = np.random.default_rng(0).random(len(source))
    made = compose(source, scores, per_class=5, factor=1)
    easy = keep(scores, 1.0, order="easy")
    expected = [easy[(source.labels.numpy()[easy]) == label][:5] for label in range(10)]
    assert made.sources[:, 0].tolist() == np.concatenate(expected).tolist()
    assert made.images.equal(source.fetch(np.concatenate(expected)))


def test_equal_bytes() -> None:
    task = open_task("digits")
    scores = np.random.default_rng(0).random(task.size("train"))
    sizes = {
        (order, factor): compose(
            task.splits["train"], scores, per_class=4, factor=factor, order=order
        )
        for order, factor in (("easy", 2), ("random", 1), ("hard", 2))
    }
    assert {made.image_bytes for made in sizes.values()} == {40 * 64}
    assert {made.label_bytes for made in sizes.values()} == {40}
    names = [name for name, _ in stored_images(sizes["easy", 2], task.classes)]
    assert len(set(names)) == 40 and names[0] == "0/00000"


def test_soft_labels_by_hand() -> None:
    logits = torch.randn(5, 4)
    assert soft_loss(logits, logits).item() == pytest.approx(0.0, abs=1e-6)
    teacher, student = torch.randn(5, 4), torch.randn(5, 4)
    p, q = (teacher / 20).softmax(1), (student / 20).softmax(1)
    assert soft_loss(student, teacher).item() == pytest.approx(
        float((p * (p / q).log()).sum() / 5), rel=1e-4
    )


def test_cutmix() -> None:
    images = torch.rand(6, 1, 8, 8)
    assert cutmix(images, 1.0).equal(images)
    torch.manual_seed(0)
    mixed = cutmix(images, 0.5)
    changed = (mixed != images).any(0)[0]
    assert 0 < changed.sum() <= 36 and not mixed.equal(images)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def test_the_protocol_learns_and_soft_labels_need_no_labels() -> None:
    task = open_task("digits")
    source = task.splits["train"]
    scores = np.random.default_rng(0).random(len(source))
    made = compose(source, scores, per_class=20, factor=1, order="random")
    small = made.task(task, scale=(1.0, 1.0), flip=False)
    hard = benchmark(small, network(), epochs=30, batch_size=32, lr=5e-3)
    assert hard > 70.0
    teacher = network(1)
    benchmark(task, teacher, epochs=15, lr=5e-3)
    wrong = Composed(made.images, made.labels.flip(0), 1, made.sources)
    blind = wrong.task(task, scale=(1.0, 1.0), flip=False)
    soft = benchmark(blind, network(), teacher=teacher, epochs=60, batch_size=32, lr=5e-3)
    assert soft > 50.0  # the labels that were given are never read
    assert all(not p.requires_grad for p in teacher.parameters())


def test_rded_takes_the_crops_the_teacher_finds_easy() -> None:
    class Bright(nn.Module):
        """Answers class 1 where the padded crop is bright."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean((1, 2, 3))
            return torch.stack([-mean, mean], 1)

    images = torch.cat([constant(0, 40, 80), constant(120, 160, 240)])
    task = open_task("digits")
    task.splits["train"] = ArraySource(images, torch.tensor([0, 0, 0, 1, 1, 1]))
    made = rded(task, Bright(), per_class=2, factor=1, pool=3, crops=2)
    assert sorted(made.images[:2].amax((1, 2, 3)).tolist()) == [0, 40]
    assert sorted(made.images[2:].amax((1, 2, 3)).tolist()) == [160, 240]


def test_resized_keeps_the_type() -> None:
    assert resized(constant(7), (3, 3)).dtype == torch.uint8
    assert resized(constant(7).float(), (4, 4)).dtype == torch.float32
