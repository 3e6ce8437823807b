"""How many groups a convolution gets."""

import logging

import pytest

from gossamer.core.errors import InputError
from gossamer.core.groups import divisors, group_count, regrouped, warn_of_remainders
from gossamer.core.layers import Layer


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


def test_a_constant_width_or_the_largest_that_divides() -> None:
    assert group_count(512, 512, group_width=8) == 64
    assert group_count(24, 24, group_width=16) == 2  # 12 is the largest divisor below 16
    assert group_count(32, 32, group_width=64) == 1
    for channels in (12, 17, 40, 96):
        for wish in range(1, 100):
            count = group_count(channels, channels, group_width=wish)
            largest = max(d for d in divisors(channels) if d <= wish)
            assert channels // count == largest
    # a depth multiplier: the groups divide inputs and outputs
    assert group_count(32, 64, group_width=1) == 32
    assert group_count(32, 48, group_width=4) == 8
    assert group_count(32, 48, group_width=1) == 16  # 32 groups do not divide 48


def test_a_constant_number_or_one_for_each_channel() -> None:
    assert group_count(128, 128, groups=32) == 32
    assert group_count(16, 16, groups=32) == 16
    assert group_count(48, 48, groups=32) == 24


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(InputError, match="either a group width or a number"):
        group_count(8, 8)
    with pytest.raises(InputError, match="either a group width or a number"):
        group_count(8, 8, group_width=2, groups=2)
    with pytest.raises(InputError, match="at least 1, not 0"):
        group_count(8, 8, group_width=0)


def test_a_layer_with_other_groups_multiplies_its_macs() -> None:
    layer = Layer("a", "a", "convolution", 512, 512, 512, (3, 3), output_size=(14, 14))
    assert layer.depthwise and layer.macs == 903168
    wide = regrouped(layer, group_width=4)
    assert (wide.groups, wide.macs) == (128, 3612672)
    assert regrouped(wide, group_width=1) == layer


def test_remainders_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_remainders({"a": (24, 2), "b": (16, 1)}, group_width=16, groups=None)
        warn_of_remainders({"c": (16, 16)}, group_width=None, groups=32)
    assert [record.getMessage() for record in caplog.records] == [
        "a has groups of 12 channels, since 16 does not divide its 24",
        "c has 16 groups, since its 16 channels cannot be cut into 32",
    ]
