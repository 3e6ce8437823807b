"""Random numbers that are a function of (seed, image, purpose) alone.

An attack that starts at random must find the same start for an image whatever batch, shard or
machine the image is in, or a run that was killed, resumed or spread would be another experiment.
A generator that is drawn from in turn cannot do that, so each number is a hash of its place: the
finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), applied to a counter. Nothing here is for cryptography.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.task import seed_of

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def uniform(ids: Tensor, *purpose: int | str, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers for each image, ``[n, *shape]`` in [0, 1) in steps of 2^-24.

    Args:
        ids: the numbers of the images, int64 ``[n]``.
        purpose: what the numbers are for, starting with a seed; other purposes, other numbers.
        shape: of the numbers of one image.
    """
    stream = torch.tensor(seed_of(*purpose), device=ids.device)
    keys = _mixed(_mixed(ids * _GOLDEN + stream) + stream)
    places = torch.arange(math.prod(shape), device=ids.device) * _GOLDEN
    bits = _mixed(keys.unsqueeze(1) + places)
    return (_shifted(bits, 40).float() * 2.0**-24).view(len(ids), *shape)


def signs(ids: Tensor, *purpose: int | str, shape: tuple[int, ...] = ()) -> Tensor:
    """Minus and plus one with equal probability for each image, ``[n, *shape]``."""
    return uniform(ids, *purpose, shape=shape).ge(0.5).float() * 2 - 1


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    # The shift of signed integers repeats the sign; these must come in as zeros.
    return (bits >> by) & ((1 << (64 - by)) - 1)
