"""How many groups a convolution's channels are cut into.

A grouped convolution connects each output to the channels of its own group. Networks fix either
how many groups there are (ResNeXt: 32; depthwise: one for each channel) or how wide one is. Where
the wish does not divide a layer's channels, the largest number below it that does is taken.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from gossamer.core.errors import InputError
from gossamer.core.layers import Layer

log = logging.getLogger(__name__)


def divisors(number: int) -> list[int]:
    """The divisors of a number, from 1 to itself."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def group_count(
    channels: int, features: int, *, group_width: int | None = None, groups: int | None = None
) -> int:
    """The number of groups that comes nearest to a constant width, or to a constant number.

    Args:
        channels: input channels of all groups.
        features: output channels of all groups.
        group_width: wanted channels of one group; the groups that a layer gets are as wide or,
            where that does not divide, narrower (the largest that divides).
        groups: wanted number of groups, in place of the width; a layer gets as many or fewer.

    Raises:
        InputError: if not exactly one wish is given, or it is below 1.
    """
    if (group_width is None) == (groups is None):
        raise InputError("give either a group width or a number of groups")
    wish = group_width if group_width is not None else groups
    assert wish is not None
    if wish < 1:
        raise InputError(f"a group width and a number of groups are at least 1, not {wish}")
    possible = divisors(math.gcd(channels, features))
    if groups is not None:
        return max(g for g in possible if g <= groups)
    # With a depth multiplier the groups must divide inputs and outputs; a layer whose counts share
    # no large divisor keeps as many groups as it can.
    fitting = [g for g in possible if channels // g <= wish]
    return min(fitting) if fitting else max(possible)


def regrouped(layer: Layer, *, group_width: int | None = None, groups: int | None = None) -> Layer:
    """A layer with other groups and the same channels, positions and taps.

    Raises:
        InputError: if not exactly one wish is given, or it is below 1.
    """
    count = group_count(layer.channels, layer.features, group_width=group_width, groups=groups)
    return replace(layer, groups=count)


def warn_of_remainders(
    counts: dict[str, tuple[int, int]], *, group_width: int | None, groups: int | None
) -> None:
    """Says which layers have other groups than was wished.

    Args:
        counts: input channels and groups of each layer.
        group_width: that was wished.
        groups: that was wished.
    """
    for name, (channels, count) in counts.items():
        if group_width is not None and channels // count != group_width:
            log.warning(
                "%s has groups of %d channels, since %d does not divide its %d",
                name, channels // count, group_width, channels,
            )  # fmt: skip
        elif groups is not None and count != groups:
            log.warning(
                "%s has %d groups, since its %d channels cannot be cut into %d",
                name, count, channels, groups,
            )  # fmt: skip
