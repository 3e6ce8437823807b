"""Drawn scenes with a class for each pixel: nothing to download, and as many as wanted.

Each scene holds a few shapes (disc, square, triangle, ring) of random size, place and turn before a
background; later shapes hide earlier ones, light falls unevenly, and there is noise. Everything is
striped in two random colours that lean towards a colour of its class, as grass leans towards green:
neither colour nor shape alone decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.segmentation import Segmentation
from gossamer.core.task import seed_of
from gossamer.datasets.segmentation import assemble_masks

SHAPES = ("background", "disc", "square", "triangle", "ring")
"""The classes, in label order."""

_COLOURS = torch.tensor(
    [[0.5, 0.5, 0.5], [0.7, 0.4, 0.3], [0.3, 0.6, 0.4], [0.4, 0.4, 0.7], [0.65, 0.6, 0.3]]
)  # fmt: skip


def drawn_scenes(
    count: int,
    size: int,
    *,
    shapes: int = 4,
    noise: float = 0.1,
    lean: float = 0.5,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws scenes.

    Args:
        count: scenes.
        size: side in pixels.
        shapes: in each scene; some may be hidden.
        noise: standard deviation of the noise of a pixel; colours are in 0..1.
        lean: of colours towards that of their class, 0 (not at all) to 1.
        seed: of everything that is drawn.

    Returns:
        Images ``[count, 3, size, size]`` (uint8) and classes ``[count, size, size]``.

    Raises:
        InputError: if there is nothing to draw.
    """
    if count < 1 or size < 8 or shapes < 1 or noise < 0.0 or not 0.0 <= lean <= 1.0:
        raise InputError(
            "scenes need a count and shapes of 1 or more, sides of 8 pixels or more, noise of 0 or "
            f"more and a lean in 0..1, not {count}, {shapes}, {size}, {noise:g} and {lean:g}"
        )
    generator = torch.Generator().manual_seed(seed_of("scenes", seed))

    def drawn(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    classes = torch.zeros(count, size, size, dtype=torch.int64)
    images = _stripes(x, y, drawn(count, 8), _COLOURS[torch.zeros(count, dtype=torch.int64)], lean)
    for _ in range(shapes):
        kind = torch.randint(1, len(SHAPES), (count,), generator=generator)
        radius = drawn(count, 1, 1, low=0.15, high=0.35)
        turn = drawn(count, 1, 1, high=2.0 * math.pi)
        across, down = (
            x - drawn(count, 1, 1, low=0.1, high=0.9),
            y - drawn(count, 1, 1, low=0.1, high=0.9),
        )
        u = (turn.cos() * across + turn.sin() * down) / radius
        v = (turn.cos() * down - turn.sin() * across) / radius
        inside = _inside(u, v).gather(1, (kind - 1).view(-1, 1, 1, 1).expand(-1, 1, size, size))
        surface = _stripes(x, y, drawn(count, 8), _COLOURS[kind], lean)
        images = torch.where(inside, surface, images)
        classes = torch.where(inside[:, 0], kind.view(-1, 1, 1), classes)
    # Light: a plane over the scene, between .6 and 1.4 of its brightness.
    tilt = drawn(count, 2, 1, 1, low=-0.4, high=0.4)
    light = 1.0 + tilt[:, :1] * (x - 0.5) * 2.0 + tilt[:, 1:] * (y - 0.5) * 2.0
    light = light.clamp(0.6, 1.4)
    images = images * light + noise * torch.randn(images.shape, generator=generator)
    return (255.0 * images.clamp(0.0, 1.0)).round().to(torch.uint8), classes


def scenes(
    *,
    train: int = 264,
    validation: int = 60,
    test: int = 200,
    size: int = 48,
    shapes: int = 4,
    noise: float = 0.1,
    lean: float = 0.5,
    seed: int = 0,
) -> Segmentation:
    """A segmentation task of drawn scenes.

    Args:
        train: scenes to train on.
        validation: scenes to validate on.
        test: scenes to test on.
        size: side in pixels.
        shapes: in each scene.
        noise: of the pixels.
        lean: of colours towards that of their class.
        seed: of everything that is drawn.
    """
    images, classes = drawn_scenes(
        train + validation + test, size, shapes=shapes, noise=noise, lean=lean, seed=seed
    )
    splits = {}
    for name, rows in (
        ("train", slice(0, train)),
        ("validation", slice(train, train + validation)),
        ("test", slice(train + validation, None)),
    ):
        splits[name] = (images[rows], classes[rows])
    return assemble_masks(splits, SHAPES, name="drawn scenes")


def _inside(u: Tensor, v: Tensor) -> Tensor:
    """Where each shape lies, ``[count, 4, size, size]``; its own axes run from -1 to 1."""
    distance = u.square() + v.square()
    square = torch.maximum(u.abs(), v.abs()) <= math.sqrt(0.5)
    third = math.sqrt(3.0) / 2.0
    triangle = (v <= 0.5) & (third * u - 0.5 * v <= 0.5) & (-third * u - 0.5 * v <= 0.5)
    ring = (distance <= 1.0) & (distance >= 0.3)
    return torch.stack((distance <= 0.8, square, triangle, ring), 1)


def _stripes(x: Tensor, y: Tensor, drawn: Tensor, own: Tensor, lean: float) -> Tensor:
    """Two colours in stripes, ``[count, 3, size, size]``, of eight numbers in 0..1 a scene."""
    colours, (angle, period) = drawn[:, :6], drawn[:, 6:].unbind(1)
    angle = (math.pi * angle).view(-1, 1, 1)
    waves = (2.0 + 8.0 * period).view(-1, 1, 1)
    share = 0.5 + 0.5 * torch.sin(2 * math.pi * waves * (angle.cos() * x + angle.sin() * y))
    first, second = (
        ((1.0 - lean) * half + lean * own)[:, :, None, None] for half in colours.split(3, 1)
    )
    return first + 0.5 * share.unsqueeze(1) * (second - first)
