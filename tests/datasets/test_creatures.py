"""Drawn creatures: parts are where the key-points say, and only parts tell classes apart."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.datasets.creatures import _COLOURS, KINDS, PARTS, creatures, drawn_creatures


def test_classes_are_combinations_of_shared_kinds() -> None:
    assert KINDS.shape == (8, 5) and len({tuple(k.tolist()) for k in KINDS}) == 8
    assert (KINDS.sum(0) == 4).all()  # every kind of every part: half of the classes
    differing = (KINDS[:, None] != KINDS).sum(2)
    assert int(differing[~torch.eye(8, dtype=torch.bool)].min()) == 2


def test_visible_key_points_lie_on_their_part() -> None:
    images, labels, points, visible = drawn_creatures(256, 96, noise=0.0, seed=4)
    rows = torch.arange(256)[:, None]
    pixels = images[rows, :, points[..., 1].clamp(0, 95), points[..., 0].clamp(0, 95)] / 255.0
    expected = _COLOURS[torch.arange(5), KINDS[labels]]
    # Colours vary by up to .08 and light by up to .15 of them.
    far = (pixels - expected).abs().amax(2)
    assert float(far[visible].max()) < 0.25
    assert float((far[~visible] > 0.1).float().mean()) > 0.8
    share = visible.float().mean(0)
    assert bool(((share > 0.7) & (share < 1.0)).all())


def test_background_and_body_do_not_tell_the_class() -> None:
    images, labels, points, _ = drawn_creatures(800, 32, seed=2)
    distance = (
        torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="xy"), -1)[
            None, None
        ]
        - points[:, :, None, None]
    )
    near = (distance.square().sum(-1) < 8**2).any(1)
    outside = (images.float() * ~near[:, None]).sum((2, 3)) / (~near).sum((1, 2))[:, None]
    means = torch.stack([outside[labels == k].mean(0) for k in range(8)])
    spread = outside.std(0) / 10.0  # standard error of a mean over 100 images
    assert float(((means - outside.mean(0)) / spread).abs().max()) < 4.5


def test_creatures_are_a_task_with_parts() -> None:
    task = creatures(train=40, validation=16, test=24, size=32, seed=3)
    assert task.parts == PARTS and len(task.classes) == 8
    batches = list(task.keypoint_batches("test", batch_size=10))
    assert [len(batch[1]) for batch in batches] == [10, 10, 4]
    images, labels, points, visible = drawn_creatures(80, 32, seed=3)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), labels[56:])
    assert torch.equal(torch.cat([batch[2] for batch in batches]), points[56:])
    assert torch.equal(torch.cat([batch[3] for batch in batches]), visible[56:])
    torch.testing.assert_close(batches[1][0], task.preprocess(images[66:76]))
    with pytest.raises(InputError, match="no sunday split"):
        next(task.keypoint_batches("sunday"))
    with pytest.raises(InputError, match="creatures need"):
        drawn_creatures(0)
