"""Group widths: worked numbers, criteria against brute force, and what is measured."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.core.groups import divisors, regrouped
from gossamer.core.layers import Layer, layers
from gossamer.hardware.device import Device, Figure, Memory
from gossamer.hardware.group_size import (
    EnergyTable,
    activations,
    balance,
    balanced,
    balanced_groups,
    curve,
    group_table,
    half_reuse_width,
    intensity,
    least_width,
    machine_balance,
    machine_bound,
    match_macs,
    measure_energy,
    measure_layer,
    measure_networks,
    measured,
    modelled_energy,
    reuse,
)
from gossamer.hardware.measure import EnergyMeter
from gossamer.models import mobilenet_v1, small_mobilenet
from gossamer.parts.regroup import depthwise, grouped, regroup


def layer(channels: int, side: int, *, groups: int = 1, kernel: int = 3) -> Layer:
    """Equal inputs and outputs, stride 1."""
    return Layer(
        "a", "a", "convolution", channels, channels, groups, (kernel, kernel),
        padding=(kernel // 2, kernel // 2), input_size=(side, side), output_size=(side, side),
    )  # fmt: skip


@pytest.fixture(scope="module")
def mobilenet() -> list[Layer]:
    return layers(Graph.trace(mobilenet_v1(), (torch.randn(2, 3, 224, 224),)))


INTENSITIES = {
    56: {1: 4.494, 4: 17.897, 8: 35.591, 16: 70.384, 32: 137.678},
    14: {1: 4.399, 4: 16.486, 8: 30.414, 16: 52.657, 32: 83.012},
    7: {1: 4.121, 4: 13.164, 8: 20.753, 16: 29.157, 32: 36.560},
}


def test_intensity_depends_on_width_and_positions_only() -> None:
    for side, row in INTENSITIES.items():
        for width, expected in row.items():
            for channels in (256, 512):
                one = regrouped(layer(channels, side), group_width=width)
                assert round(intensity(one), 3) == expected
                hw = side * side
                closed = width * 9 * hw / (width * 9 + 2 * hw)
                assert intensity(one) == pytest.approx(closed, rel=1e-12)


def test_a_constant_number_of_groups_reuses_unevenly() -> None:
    rows = [(64, 56, 8.974), (128, 28, 17.596), (512, 14, 52.657), (1024, 7, 36.560)]
    for channels, side, expected in rows:
        assert round(intensity(layer(channels, side, groups=32)), 3) == expected
    assert layer(64, 56, groups=32).group_width == 2


def test_the_grouped_convolutions_of_mobilenet(mobilenet: list[Layer]) -> None:
    chosen = [one for one in mobilenet if one.depthwise]
    table = group_table(chosen)
    assert len(table) == 13
    assert all(row.groups * row.group_width == row.channels for row in table)
    wished = [
        ({"group_width": 1}, 17.4, 0.045, 3.452),
        ({"group_width": 8}, 139.1, 0.357, 26.000),
        ({"groups": 32}, 133.7, 0.785, 23.137),
        ({"group_width": 16}, 278.2, 0.714, 48.745),
        ({"groups": 16}, 267.3, 1.570, 40.740),
    ]
    for wish, macs, weights, expected in wished:
        total = reuse([regrouped(one, **wish) for one in chosen])
        assert round(total.macs / 1e6, 1) == macs
        assert round(total.weights / 1e6, 3) == weights
        assert round(total.activations / 1e6, 2) == 4.99  # strided inputs count whole
        assert round(total.intensity, 3) == expected


def test_the_grouped_convolutions_of_resnext() -> None:
    shapes = [(128, 56)] * 3 + [(256, 28)] * 4 + [(512, 14)] * 6 + [(1024, 7)] * 3
    wished = [
        ({"groups": 32}, 231.2, 1.415, 33.34),
        ({"group_width": 8}, 198.7, 0.544, 32.77),
        ({"group_width": 16}, 397.4, 1.087, 60.15),
    ]
    for wish, macs, weights, expected in wished:
        total = reuse([regrouped(layer(*shape), **wish) for shape in shapes])
        assert round(total.macs / 1e6, 1) == macs
        assert round(total.weights / 1e6, 3) == weights
        assert round(total.intensity, 2) == expected


def test_means_by_hand() -> None:
    two = [layer(64, 56, groups=64), layer(512, 14, groups=32)]
    total = reuse(two)
    each = [intensity(one) for one in two]
    assert total.mean_intensity == pytest.approx(sum(each) / 2)
    macs = [one.macs for one in two]
    assert total.weighted_intensity == pytest.approx(np.average(each, weights=macs))
    assert total.intensity == pytest.approx(
        sum(macs) / (sum(one.weights for one in two) + sum(map(activations, two)))
    )


def test_weights_and_activations_may_count_differently() -> None:
    one = layer(64, 14, groups=8)
    moved = 2 * (0.8 * one.weights + 0.2 * activations(one))
    assert intensity(one, weight_importance=0.8) == pytest.approx(one.macs / moved)
    assert intensity(one, weight_importance=0.0) == one.macs / (2 * activations(one))
    with pytest.raises(InputError, match=r"in 0\.\.1"):
        intensity(one, weight_importance=1.5)


def test_intensity_grows_with_width_towards_its_limit() -> None:
    for side in (7, 14, 56):
        values = [intensity(regrouped(layer(1024, side), group_width=w)) for w in divisors(1024)]
        assert all(a < b for a, b in itertools.pairwise(values))
        assert values[-1] < side * side


def test_half_reuse() -> None:
    for side, expected in ((56, 697), (28, 174), (14, 43.6), (7, 10.9)):
        width = half_reuse_width(side * side, 9)
        assert width == pytest.approx(expected, rel=2e-3)
        hw = side * side
        assert width * 9 * hw / (width * 9 + 2 * hw) == pytest.approx(hw / 2)


@pytest.mark.parametrize("movement", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("channels, side, kernel", [(1024, 7, 3), (64, 56, 3), (96, 14, 5)])
def test_the_balance_has_one_minimum(
    channels: int, side: int, kernel: int, movement: float
) -> None:
    one = layer(channels, side, kernel=kernel)
    best = balanced_groups(one, movement=movement)
    found = minimize_scalar(
        lambda g: balance(one, g, movement=movement), bounds=(1e-3, channels), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert best == pytest.approx(found.x, rel=1e-4)
    grid = np.geomspace(0.5, channels, 200)
    values = np.array([balance(one, g, movement=movement) for g in grid])
    slopes = np.diff(values) / np.diff(grid)
    assert np.all(np.diff(slopes) > 0)  # convex


def test_balanced_widths_by_hand() -> None:
    late, early = layer(1024, 7), layer(64, 56)
    assert round(balanced_groups(late), 2) == 9.75
    assert round(balanced_groups(early), 2) == 1.04
    assert (balanced([late]), balanced([early])) == (128, 64)
    assert balanced_groups(late) == pytest.approx(math.sqrt(1 + 1024 * 9 / (2 * 49)))
    # the network's balance is the layer's where there is one layer
    for point in curve([late]):
        groups = 1024 // point.group_width
        assert point.balance == pytest.approx(balance(late, groups))
    # heavier movement wants wider groups, lighter movement narrower ones
    both = [late, layer(512, 14)]
    chosen = [balanced(both, movement=m) for m in (0.01, 0.1, 1.0, 10.0)]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]
    with pytest.raises(InputError, match="more than 0"):
        balanced_groups(late, movement=0.0)


def machine(macs: float, bandwidth: float) -> Device:
    return Device(
        "m", "accelerator", {"float32": Figure(macs, "made up"), "int8": Figure(macs, "made up")},
        (Memory("DRAM", bytes_per_second=Figure(bandwidth, "made up")),),
    )  # fmt: skip


def test_the_machine_wants_enough_reuse() -> None:
    device = machine(2e12, 4e11)
    assert machine_balance(device) == pytest.approx(20.0)  # 5 MACs a byte, four bytes a value
    assert machine_balance(device, dtype="int8") == pytest.approx(5.0)
    for side, channels in ((56, 64), (14, 512), (7, 1024)):
        one = layer(channels, side)
        least = least_width(one.positions, 9, 20.0)
        reached = machine_bound([one], 20.0)
        brute = [w for w in divisors(channels) if intensity(regrouped(one, group_width=w)) >= 20.0]
        assert reached == brute[0] == min(w for w in divisors(channels) if w >= least)
    assert least_width(49, 9, 49.0) == math.inf
    assert machine_bound([layer(1024, 7)], 49.0) is None


def test_comparable_complexity(mobilenet: list[Layer]) -> None:
    for width, groups in ((8, 32), (16, 16)):
        match = match_macs(mobilenet, width)
        assert (match.groups, match.close) == (groups, True)
        built = [
            Graph.trace(mobilenet_v1(**wish), (torch.randn(2, 3, 224, 224),)).macs
            for wish in ({"group_width": width}, {"groups": groups})
        ]
        assert built == [match.width_macs, match.groups_macs]
        assert match.difference == pytest.approx(built[1] / built[0] - 1)
    chosen = [one for one in mobilenet if one.depthwise]
    brute = min(
        range(1, 1025),
        key=lambda g: abs(
            sum(regrouped(one, groups=g).macs - regrouped(one, group_width=4).macs
                for one in chosen)
        ),
    )  # fmt: skip
    assert match_macs(mobilenet, 4, select=depthwise).groups == brute
    with pytest.raises(InputError, match="no convolution"):
        match_macs([layer(8, 8)], 4)


def test_counts_are_those_of_the_built_network(mobilenet: list[Layer]) -> None:
    module, _ = regroup(small_mobilenet(), group_width=4)
    found = [one for one in layers(Graph.trace(module, (torch.randn(2, 1, 8, 8),))) if grouped(one)]
    for row in group_table(found):
        conv = module.get_submodule(row.layer)
        assert isinstance(conv, nn.Conv2d)
        assert row.weights == conv.weight.numel() == row.group_width * row.features * 9
        assert row.macs == row.weights * row.positions
    strided = found[1]
    assert strided.stride == (2, 2) and activations(strided) == 64 * (64 + 16)


def test_modelled_energy_rises_with_width(mobilenet: list[Layer]) -> None:
    one = layer(64, 14, groups=8)
    assert modelled_energy([one]) == one.macs + 200 * (one.weights + activations(one))
    assert modelled_energy([one], EnergyTable(2.0, 0.0)) == 2 * one.macs
    values = [p.modelled_energy for p in curve([o for o in mobilenet if o.depthwise])]
    assert values == sorted(values)


def test_measured_widths(one_thread: None) -> None:
    points = measure_layer(
        layer(16, 14), batch=2, rounds=5, round_ms=2.0, runtimes=("torch", "onnxruntime")
    )
    settings = {(p.latency.runtime, p.layout) for p in points}
    assert settings == {
        ("torch", "contiguous"), ("torch", "channels_last"), ("onnxruntime", "contiguous")
    }  # fmt: skip
    assert len(points) == 3 * 5 and all(p.latency.p50 > 0 for p in points)
    assert [p.macs for p in points[:5]] == [w * 16 * 9 * 196 for w in (1, 2, 4, 8, 16)]
    one = [p for p in points if p.latency.runtime == "onnxruntime"]
    fastest = min(one, key=lambda p: p.latency.p50)
    if EnergyMeter.find() is None:
        assert all(p.joules is None for p in points)
        assert measured(one) == fastest.group_width
    with pytest.raises(InputError, match="one runtime"):
        measured(points)
    with pytest.raises(InputError, match="no measurement"):
        measured([])
    with pytest.raises(InputError, match="layout"):
        measure_layer(layer(4, 4), layouts=("upside down",), runtimes=("torch",))


def test_networks_are_rebuilt_and_timed_in_turns(one_thread: None) -> None:
    points = measure_networks(
        small_mobilenet(), (torch.randn(2, 1, 8, 8),), (1, 8), rounds=3, round_ms=2.0,
        runtime="torch",
    )  # fmt: skip
    assert [p.group_width for p in points] == [1, 8]
    assert points[1].macs - points[0].macs == 7 * 9 * (
        64 * 32 + 16 * 64 + 16 * 256 + 4 * 256 - 1536
    )
    assert points[0].timing.rounds.shape[0] == points[1].timing.rounds.shape[0] == 3


class Clockwork:
    """A machine of 10 W idle that takes 30 W while it works."""

    def __init__(self) -> None:
        self.joules = 0.0
        self.seen = time.perf_counter()
        self.working = False

    def read(self) -> float:
        now = time.perf_counter()
        self.joules += (now - self.seen) * (30.0 if self.working else 10.0)
        self.seen = now
        return self.joules


def test_energy_is_the_meters_less_the_idle_machines() -> None:
    clockwork = Clockwork()
    meter = EnergyMeter(clockwork.read, "clockwork")

    def call() -> None:
        clockwork.read()
        clockwork.working = True
        time.sleep(0.01)
        clockwork.read()
        clockwork.working = False

    energy = measure_energy(call, samples=4, seconds=0.3, idle_seconds=0.1, meter=meter)
    assert energy is not None and energy.source == "clockwork"
    assert energy.idle_watts == pytest.approx(10.0, rel=0.05)
    assert energy.watts == pytest.approx(30.0, rel=0.15)
    assert energy.joules == pytest.approx(0.2, rel=0.3)  # 20 W above idle for 10 ms
    assert energy.samples_per_joule == pytest.approx(4 / energy.joules)
    assert energy.samples_per_second == pytest.approx(400, rel=0.3)
    assert measure_energy(call, samples=1, seconds=0.05, idle_seconds=0.01,
                          meter=EnergyMeter(lambda: None, "broken")) is None  # fmt: skip
    with pytest.raises(InputError, match="more than 0"):
        measure_energy(call, samples=1, seconds=0.0, meter=meter)


def test_nothing_to_regroup() -> None:
    with pytest.raises(InputError, match="no convolution whose groups"):
        curve([])
