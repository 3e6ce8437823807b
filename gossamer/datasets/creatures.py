"""Drawn creatures with known parts: nothing to download, and as many as wanted.

Each creature is a grey body with head, beak, wing, tail and leg, at a random place, size and turn,
mirrored or not, before a textured background with patches in the parts' own colours; a textured
plate hides some of it. Each part comes in two kinds, and a class is a combination of kinds: five
bits that keep two parity rules, so every kind of every part belongs to half of the classes, no
part alone names the class, and neither background nor body says anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.task import seed_of
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.augment import shift
from gossamer.datasets.keypoints import KeypointSource, KeypointTask, keypoint_task

PARTS = ("head", "beak", "wing", "tail", "leg")
"""The parts, in the order of the key-points."""

KINDS = torch.tensor(
    [[a, b, c, a ^ b, b ^ c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
)  # fmt: skip
"""Which kind of each part each class has, ``[8, 5]``; two classes differ in two parts or more."""

CLASSES = tuple("".join(map(str, kinds.tolist())) for kinds in KINDS)

_COLOURS = torch.tensor(
    [
        [[0.85, 0.15, 0.15], [0.15, 0.25, 0.85]],  # head: red, blue
        [[0.95, 0.60, 0.10], [0.97, 0.97, 0.97]],  # beak: orange, white
        [[0.10, 0.60, 0.20], [0.60, 0.15, 0.65]],  # wing: green, purple
        [[0.95, 0.90, 0.20], [0.20, 0.80, 0.85]],  # tail: yellow, cyan
        [[0.10, 0.08, 0.08], [0.95, 0.45, 0.65]],  # leg: black, pink
    ]
)
# Centres of the parts and half their sides, where the body is an ellipse of half axes .50 and .32.
_CENTRES = torch.tensor([[0.52, -0.36], [0.86, -0.34], [-0.10, 0.0], [-0.72, -0.16], [0.02, 0.50]])
_HALVES = torch.tensor([[0.24, 0.24], [0.17, 0.14], [0.27, 0.17], [0.30, 0.17], [0.10, 0.26]])
_ORDER = (3, 4, 0, 1, 2)
"""Drawn in this order; the body comes after tail and leg."""
_BODY, _PLATE = 6, 7


def drawn_creatures(
    count: int, size: int = 64, *, noise: float = 0.04, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws creatures of all classes in turn.

    Args:
        count: creatures.
        size: side in pixels.
        noise: standard deviation of the noise of a pixel; colours are in 0..1.
        seed: of everything that is drawn.

    Returns:
        Images ``[count, 3, size, size]`` (uint8), labels ``[count]``, key-points (x, y of the
        parts' centres, whole pixels) ``[count, 5, 2]``, and whether each can be seen there
        ``[count, 5]``.

    Raises:
        InputError: if there is nothing to draw.
    """
    if count < 1 or size < 16 or noise < 0.0:
        raise InputError(
            "creatures need a count of 1 or more, sides of 16 pixels or more and noise of 0 or "
            f"more, not {count}, {size} and {noise:g}"
        )
    generator = torch.Generator().manual_seed(seed_of("creatures", seed))

    def drawn(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    labels = torch.arange(count) % len(KINDS)
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    # The pose: from pixels (0..1) to the body's own axes, u forward and v down.
    turn = drawn(count, 1, 1, low=-0.45, high=0.45)
    side = torch.where(drawn(count, 1, 1) < 0.5, -1.0, 1.0)
    scale = drawn(count, 1, 1, low=0.27, high=0.37)
    middle = drawn(count, 2, 1, 1, low=0.42, high=0.58)
    across, down = x - middle[:, 0], y - middle[:, 1]
    u = side * (turn.cos() * across + turn.sin() * down) / scale
    v = (turn.cos() * down - turn.sin() * across) / scale
    centres = _CENTRES + drawn(count, 5, 2, low=-0.05, high=0.05)

    images = _texture(x, y, drawn(count, 8))
    owner = torch.full((count, size, size), -1)
    # Patches in the parts' colours, so that a colour alone does not give a part away.
    kinds = torch.randint(0, 10, (count, 4), generator=generator)
    for number in range(4):
        place, radius = drawn(count, 2, 1, 1), drawn(count, 1, 1, low=0.04, high=0.08)
        inside = (x - place[:, 0]).square() + (y - place[:, 1]).square() < radius.square()
        colour = _COLOURS.view(10, 3)[kinds[:, number]] + drawn(count, 3, low=-0.08, high=0.08)
        images = torch.where(inside[:, None], colour[:, :, None, None], images)

    colours = _COLOURS[torch.arange(5), KINDS[labels]] + drawn(count, 5, 3, low=-0.08, high=0.08)
    body = drawn(count, 1, low=0.35, high=0.65) + drawn(count, 3, low=-0.04, high=0.04)
    for part in (*_ORDER[:2], None, *_ORDER[2:]):
        if part is None:
            inside = (u / 0.50).square() + (v / 0.32).square() < 1.0
            colour, mark = body, _BODY
        else:
            own = centres[:, part]
            along = (u - own[:, 0, None, None]) / _HALVES[part, 0]
            over = (v - own[:, 1, None, None]) / _HALVES[part, 1]
            inside, colour, mark = _inside(part, along, over), colours[:, part], part
        images = torch.where(inside[:, None], colour[:, :, None, None], images)
        owner = torch.where(inside, mark, owner)

    # A plate that hides whatever lies behind it, in two of three images.
    corner = drawn(count, 2, 1, 1, low=0.05, high=0.75)
    sides = drawn(count, 2, 1, 1, low=0.12, high=0.24) * (drawn(count, 1, 1, 1) < 0.67)
    hidden = (x >= corner[:, 0]) & (x < corner[:, 0] + sides[:, 0])
    hidden &= (y >= corner[:, 1]) & (y < corner[:, 1] + sides[:, 1])
    images = torch.where(hidden[:, None], _texture(x, y, drawn(count, 8)), images)
    owner = torch.where(hidden, _PLATE, owner)

    light = 1.0 + drawn(count, 1, 1, 1, low=-0.3, high=0.3) * (x - 0.5)
    images = images * light + noise * torch.randn(images.shape, generator=generator)
    points = _to_pixels(centres, turn, side, scale, middle, size)
    within = ((points >= 0) & (points < size)).all(2)
    at = points.clamp(0, size - 1)
    seen = owner[torch.arange(count)[:, None], at[..., 1], at[..., 0]] == torch.arange(5)
    return (255.0 * images.clamp(0.0, 1.0)).round().to(torch.uint8), labels, points, within & seen


def creatures(
    *,
    train: int = 800,
    validation: int = 200,
    test: int = 400,
    size: int = 64,
    noise: float = 0.04,
    seed: int = 0,
) -> KeypointTask:
    """A classification of drawn creatures with key-points.

    Args:
        train: creatures to train on.
        validation: creatures to validate on.
        test: creatures to test on.
        size: side in pixels.
        noise: of the pixels.
        seed: of everything that is drawn.
    """
    images, labels, points, visible = drawn_creatures(
        train + validation + test, size, noise=noise, seed=seed
    )
    sources = []
    at = 0
    for count in (train, validation, test):
        rows = slice(at, at + count)
        source = ArraySource(images[rows], labels[rows])
        sources.append(KeypointSource(source, points[rows], visible[rows]))
        at += count
    return keypoint_task(
        sources[0], CLASSES, PARTS, name="drawn creatures", validation=sources[1],
        test=sources[2], seed=seed, augment=shift(max(1, size // 16)),
    )  # fmt: skip


def _inside(part: int, along: Tensor, over: Tensor) -> Tensor:
    """Where a part lies; its own axes run from -1 to 1."""
    if PARTS[part] == "beak":  # a triangle that points forward
        return (along > -1.0) & (along < 1.0) & (over.abs() < 0.5 * (1.0 - along))
    if PARTS[part] == "tail":  # a fan that widens backward
        return (along > -1.0) & (along < 1.0) & (over.abs() < 0.3 + 0.35 * (1.0 - along))
    if PARTS[part] == "leg":
        return (along.abs() < 1.0) & (over.abs() < 1.0)
    return along.square() + over.square() < 1.0  # head and wing


def _to_pixels(
    centres: Tensor, turn: Tensor, side: Tensor, scale: Tensor, middle: Tensor, size: int
) -> Tensor:
    """The inverse of the pose, in whole pixels (x, y)."""
    u, v = (side[..., 0] * centres[..., 0] * scale[..., 0], centres[..., 1] * scale[..., 0])
    cos, sin = turn[..., 0].cos(), turn[..., 0].sin()
    x = cos * u - sin * v + middle[:, 0, 0]
    y = sin * u + cos * v + middle[:, 1, 0]
    return (torch.stack((x, y), 2) * size).floor().long()


def _texture(x: Tensor, y: Tensor, drawn: Tensor) -> Tensor:
    """Two muted colours in waves, ``[count, 3, size, size]``, of eight numbers in 0..1 each."""
    first, second = (0.25 + 0.5 * half[:, :, None, None] for half in drawn[:, :6].split(3, 1))
    angle = (math.pi * drawn[:, 6]).view(-1, 1, 1)
    waves = (2.0 + 8.0 * drawn[:, 7]).view(-1, 1, 1)
    share = 0.5 + 0.5 * torch.sin(2 * math.pi * waves * (angle.cos() * x + angle.sin() * y))
    return first + share.unsqueeze(1) * (second - first)
