"""Drawn scenes: what is where, and that each seed draws its own."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.datasets.scenes import SHAPES, _inside, drawn_scenes, scenes


def test_shapes_have_their_areas() -> None:
    axis = (torch.arange(400) + 0.5) / 200 - 1.0
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    areas = _inside(u[None], v[None])[0].float().mean((1, 2)) * 4.0
    triangle = 3.0 * 3.0**0.5 / 4.0  # equilateral, in the unit circle
    expected = torch.tensor([torch.pi * 0.8, 2.0, triangle, torch.pi * 0.7])
    torch.testing.assert_close(areas, expected, rtol=0.01, atol=0.0)


def test_the_class_is_what_was_drawn_last() -> None:
    images, classes = drawn_scenes(200, 24, noise=0.0, lean=1.0, seed=3)
    # Colours are wholly those of the class (stripes vanish) and light is at most 1.4 times.
    for label in range(len(SHAPES)):
        pixels = images.permute(0, 2, 3, 1)[classes == label].double()
        hue = pixels / pixels.sum(1, keepdim=True)
        assert hue.std(0).max() < 0.02
    assert set(classes.unique().tolist()) == set(range(len(SHAPES)))


def test_seeds_and_splits() -> None:
    task = scenes(train=12, validation=5, test=7, size=16, seed=1)
    assert [task.size(s) for s in ("train", "validation", "test")] == [12, 5, 7]
    again, other = (scenes(train=12, validation=5, test=7, size=16, seed=s) for s in (1, 2))
    assert task.fingerprint() == again.fingerprint() != other.fingerprint()
    rows = torch.cat([task.splits[s][0] for s in ("train", "validation", "test")])
    assert len(rows.flatten(1).unique(dim=0)) == 24


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 4}, {"shapes": 0}, {"lean": 1.5}])
def test_nothing_to_draw_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match="scenes need"):
        drawn_scenes(**{"count": 3, "size": 16, **wrong})
