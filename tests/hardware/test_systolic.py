"""The systolic array: worked numbers, a simulator that goes cycle by cycle, and the search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gossamer.core.errors import BudgetError, InputError
from gossamer.core.graph import Graph
from gossamer.core.groups import regrouped
from gossamer.core.layers import Layer, layers
from gossamer.hardware.systolic import (
    DATAFLOWS,
    Dataflow,
    SystolicArray,
    Traffic,
    co_optimise,
    read_topology,
    topology,
    width_at,
    write_topology,
)
from gossamer.models import mobilenet_v1, small_mobilenet
from gossamer.parts.regroup import depthwise, spatial

STATIONARY: tuple[Dataflow, ...] = ("os", "ws", "is")


def layer(channels: int, side: int, width: int, *, kernel: int = 3) -> Layer:
    return Layer(
        "a", "a", "convolution", channels, channels, channels // width, (kernel, kernel),
        padding=(kernel // 2, kernel // 2), input_size=(side, side), output_size=(side, side),
    )  # fmt: skip


def product(m: int, k: int, n: int) -> Layer:
    return Layer("p", "p", "linear", k, n, input_size=(m, 1), output_size=(m, 1), weight="p.weight")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph.trace(mobilenet_v1(), (torch.randn(2, 3, 224, 224),))


@pytest.fixture(scope="module")
def mobilenet(graph: Graph) -> list[Layer]:
    return layers(graph)


# A simulator that knows no formula


def simulate_fold(
    dataflow: str, left: np.ndarray, right: np.ndarray, rows: int, columns: int
) -> tuple[np.ndarray, int, dict[str, int]]:
    """One fold, one cycle after the other; operands are padded to the array as SCALE-Sim does.

    Output stationary: ``left [m, k]`` enters from the left, ``right [k, n]`` from above, both
    skewed. Otherwise ``right [k, n]`` is loaded first, a row a cycle, and the rows of ``left``
    enter skewed from the left while sums run down.
    """
    m, k, n = left.shape[0], left.shape[1], right.shape[1]
    words = {"left": 0, "right": 0, "out": 0}
    cycles = 0
    if dataflow == "os":
        a = np.full((rows, columns, 2), np.nan)  # value and index of the product it belongs to
        b = np.full((rows, columns, 2), np.nan)
        total, done = np.zeros((rows, columns)), np.zeros((rows, columns), int)
        while done.min() < k:
            a[:, 1:], b[1:] = a[:, :-1].copy(), b[:-1].copy()
            for i in range(rows):
                t = cycles - i
                a[i, 0] = (left[i, t] if i < m else 0.0, t) if 0 <= t < k else np.nan
                words["left"] += 0 <= t < k and i < m
            for j in range(columns):
                t = cycles - j
                b[0, j] = (right[t, j] if j < n else 0.0, t) if 0 <= t < k else np.nan
                words["right"] += 0 <= t < k and j < n
            meet = ~np.isnan(a[..., 0]) & ~np.isnan(b[..., 0])
            assert np.array_equal(a[meet][:, 1], b[meet][:, 1])
            total[meet] += a[meet][:, 0] * b[meet][:, 0]
            done += meet
            cycles += 1
        words["out"] = m * n
        return total[:m, :n], cycles, words
    still = np.zeros((rows, columns))
    for step in range(rows):
        still[1:] = still[:-1].copy()
        row = rows - 1 - step
        still[0] = 0.0
        if row < k:
            still[0, :n] = right[row]
            words["right"] += n
        cycles += 1
    a = np.full((rows, columns, 2), np.nan)
    sums = np.zeros((rows, columns))
    out, left_over, step = np.zeros((m, columns)), m * columns, 0
    while left_over:
        a[:, 1:] = a[:, :-1].copy()
        for i in range(rows):
            t = step - i
            a[i, 0] = (left[t, i] if i < k else 0.0, t) if 0 <= t < m else np.nan
            words["left"] += 0 <= t < m and i < k
        above = np.vstack([np.zeros((1, columns)), sums[:-1]])
        sums = above + still * np.nan_to_num(a[..., 0])
        for j in range(columns):
            if not np.isnan(a[-1, j, 1]):
                out[int(a[-1, j, 1]), j] = sums[-1, j]
                left_over -= 1
                words["out"] += j < n
        cycles += 1
        step += 1
    return out[:, :n], cycles, words


def simulate(
    dataflow: str, inputs: np.ndarray, weights: np.ndarray, rows: int, columns: int
) -> tuple[np.ndarray, int, float, dict[str, int]]:
    """``inputs [m, k] @ weights [k, n]`` fold after fold; also mapping efficiency and words."""
    m, k, n = *inputs.shape, weights.shape[1]
    cycles, used = 0, []
    words = {"left": 0, "right": 0, "out": 0}
    if dataflow == "is":  # the same array with the roles of the operands exchanged
        out, cycles, mapped, counts = simulate("ws", weights.T, inputs.T, rows, columns)
        return out.T, cycles, mapped, {
            "left": counts["right"], "right": counts["left"], "out": counts["out"]
        }  # fmt: skip
    out = np.zeros((m, n))
    first = m if dataflow == "os" else k
    for r in range(0, first, rows):
        for c in range(0, n, columns):
            if dataflow == "os":
                part = inputs[r : r + rows], weights[:, c : c + columns]
                target = out[r : r + rows, c : c + columns]
            else:
                part = inputs[:, r : r + rows], weights[r : r + rows, c : c + columns]
                target = out[:, c : c + columns]
            result, spent, counts = simulate_fold(dataflow, *part, rows, columns)
            target += result
            cycles += spent
            height = part[0].shape[0] if dataflow == "os" else part[1].shape[0]
            used.append(height * part[1].shape[1] / (rows * columns))
            words = {key: words[key] + counts[key] for key in words}
    return out, cycles, float(np.mean(used)), words


@given(
    m=st.integers(1, 11), k=st.integers(1, 11), n=st.integers(1, 11),
    rows=st.integers(2, 5), columns=st.integers(2, 5), dataflow=st.sampled_from(STATIONARY),
)  # fmt: skip
def test_closed_forms_are_what_a_simulator_counts(
    m: int, k: int, n: int, rows: int, columns: int, dataflow: Dataflow
) -> None:
    random = np.random.default_rng(m * 121 + k * 11 + n)
    inputs = random.integers(-5, 6, (m, k)).astype(float)
    weights = random.integers(-5, 6, (k, n)).astype(float)
    out, cycles, mapped, words = simulate(dataflow, inputs, weights, rows, columns)
    assert np.array_equal(out, inputs @ weights)
    run = SystolicArray(rows, columns, dataflow).run(product(m, k, n))
    assert run.cycles == cycles
    assert run.mapping_efficiency == pytest.approx(mapped)
    assert run.utilisation == pytest.approx(m * k * n / (cycles * rows * columns))
    assert run.sram == Traffic(words["left"], words["right"], words["out"])


def test_groups_run_one_after_the_other() -> None:
    random = np.random.default_rng(0)
    grouped = Layer(
        "g", "g", "convolution", 12, 18, 3, (2, 2), input_size=(4, 4), output_size=(3, 3)
    )
    for dataflow in STATIONARY:
        cycles = sum(
            simulate(dataflow, random.normal(size=(9, 16)), random.normal(size=(16, 6)), 4, 4)[1]
            for _ in range(3)
        )
        assert SystolicArray(4, 4, dataflow).run(grouped).cycles == cycles


# Row stationary


@given(
    out_rows=st.integers(1, 9), out_columns=st.integers(1, 6), kernel=st.integers(1, 4),
    groups=st.integers(1, 3), width=st.integers(1, 4), filters=st.integers(1, 4),
    rows=st.integers(4, 9), columns=st.integers(2, 9), cross=st.booleans(),
)  # fmt: skip
def test_row_stationary_by_placing_every_set(
    out_rows: int, out_columns: int, kernel: int, groups: int, width: int, filters: int,
    rows: int, columns: int, cross: bool,
) -> None:  # fmt: skip
    one = Layer(
        "r", "r", "convolution", groups * width, groups * filters, groups, (kernel, kernel),
        input_size=(out_rows + kernel - 1, out_columns + kernel - 1),
        output_size=(out_rows, out_columns),
    )  # fmt: skip
    cycles = work = 0
    for start in range(0, out_rows, columns):
        strip = min(out_rows, columns)
        todo = [(g, c, f) for g in range(groups) for c in range(width) for f in range(filters)]
        while todo:
            placed = 0
            group = todo[0][0]
            for top in range(0, rows - kernel + 1, kernel):
                for _ in range(top, columns + top - strip + 1, strip):
                    if todo and (cross or todo[0][0] == group):
                        todo.pop(0)
                        placed += 1
            # an element slides a filter row over an input row: one MAC a cycle
            cycles += out_columns * kernel
            height = min(columns, out_rows - start)
            work += placed * kernel * height * out_columns * kernel
    assert work == one.macs
    run = SystolicArray(rows, columns, "rs", cross_group=cross).run(one)
    assert run.cycles == cycles
    assert run.utilisation == pytest.approx(work / (cycles * rows * columns))


def test_a_set_of_rows_is_a_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    image, kernel = torch.randn(8, 7, generator=generator), torch.randn(3, 3, generator=generator)
    rows = torch.zeros(3, 6, 5)  # element (i, j) has filter row i and input row i + j
    macs = torch.zeros(3, 6)
    for i in range(3):
        for j in range(6):
            for x in range(5):
                rows[i, j, x] = (kernel[i] * image[i + j, x : x + 3]).sum()
                macs[i, j] += 3
    torch.testing.assert_close(rows.sum(0), F.conv2d(image[None, None], kernel[None, None])[0, 0])
    assert bool((macs == 5 * 3).all())
    one = Layer("c", "c", "convolution", 1, 1, 1, (3, 3), input_size=(8, 7), output_size=(6, 5))
    assert SystolicArray(3, 6, "rs").run(one).cycles == 15


def test_filters_taller_than_the_array() -> None:
    tall = Layer("t", "t", "convolution", 1, 1, 1, (7, 1), input_size=(10, 4), output_size=(4, 4))
    run = SystolicArray(3, 4, "rs").run(tall)  # rows 0-2, 3-5 and 6
    assert run.cycles == 3 * 4 and run.utilisation == pytest.approx(112 / (12 * 12))


# Worked numbers


def test_scale_sims_golden_figures(tmp_path: Path) -> None:
    path = tmp_path / "golden.csv"
    path.write_text(
        "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter,"
        " Strides,\nConv1, 224, 224, 11, 11, 3, 96, 4,\n"
    )
    (golden,) = read_topology(path)
    assert (golden.output_size, golden.macs) == ((55, 55), 105_415_200)
    run = SystolicArray(32, 32, "ws").run(golden)
    assert (run.folds, run.cycles) == (36, 112_284)
    assert run.mapping_efficiency == 0.9453125
    # the tool prints the number of the last cycle, one less, and its utilisation uses that
    assert round(100 * run.macs / ((run.cycles - 1) * 1024), 4) == 91.6831


def test_one_layer_of_mobilenet() -> None:
    expected = {
        "ws": ((1, 197_632), (4, 49_408), (8, 49_408)),
        "os": ((1, 276_480), (4, 82_944)),
        "is": ((1, 391_168), (4, 99_328)),
    }
    pointwise = Layer("p", "p", "convolution", 512, 512, input_size=(14, 14), output_size=(14, 14))
    for dataflow, rows in expected.items():
        array = SystolicArray(dataflow=dataflow)  # type: ignore[arg-type]
        for width, cycles in rows:
            run = array.run(layer(512, 14, width))
            assert (run.cycles, run.macs) == (cycles, 903_168 * width)
    assert SystolicArray(dataflow="ws").run(pointwise).cycles == 24_704
    rows = SystolicArray(dataflow="rs")
    assert rows.run(layer(512, 14, 1)).utilisation == 42 / 4096
    assert rows.run(layer(512, 14, 8)).utilisation == 0.65625
    assert rows.run(pointwise).utilisation == 0.875


def test_the_whole_of_mobilenet(mobilenet: list[Layer]) -> None:
    wanted = {
        "ws": {1: (3.220, 4.31), 4: (1.064, 14.25), 8: (1.064, 15.84)},
        "os": {1: (4.818, 2.88), 4: (1.654, 9.16), 8: (1.127, 14.95)},
    }
    for dataflow, rows in wanted.items():
        array = SystolicArray(dataflow=dataflow)  # type: ignore[arg-type]
        for width, (cycles, utilisation) in rows.items():
            changed = [regrouped(one, group_width=width) if one.depthwise else one
                       for one in mobilenet]  # fmt: skip
            profile = array.profile(changed)
            assert round(profile.cycles / 1e6, 3) == cycles
            assert round(100 * profile.overall_utilisation, 2) == utilisation


def test_row_stationary_over_group_widths(mobilenet: list[Layer]) -> None:
    wanted = {
        1: (0.388, 46.7), 2: (0.270, 49.4), 4: (0.211, 59.8), 8: (0.205, 75.0),
        16: (0.243, 79.8), 32: (0.313, 86.0),
    }  # fmt: skip
    convolutions = [one for one in mobilenet if one.kind == "convolution"]
    free = SystolicArray(cross_group=True)
    for width, (cycles, utilisation) in wanted.items():
        changed = [regrouped(one, group_width=width) if one.depthwise else one
                   for one in convolutions]  # fmt: skip
        profile = SystolicArray().profile(changed)
        assert round(profile.cycles / 1e6, 3) == cycles
        assert abs(100 * profile.mean_utilisation - utilisation) < 0.06
        # where several groups can be fed at once, depthwise is already the fastest
        assert free.profile(changed).cycles >= free.profile(convolutions).cycles
    assert round(free.profile(convolutions).cycles / 1e6, 3) == 0.157


def test_wider_groups_are_used_quadratically_better_until_they_fill_the_array() -> None:
    array = SystolicArray(dataflow="ws")
    runs = [array.run(layer(512, 14, width)) for width in (1, 2, 4)]  # k^2 G <= 64, G <= 64
    for width, run in zip((1, 2, 4), runs, strict=True):
        assert run.cycles * width == runs[0].cycles
        assert run.utilisation == pytest.approx(runs[0].utilisation * width**2)


# Memory


def test_what_fits_is_read_once() -> None:
    one = product(200, 100, 70)  # inputs 20000 words, weights 7000
    half = 2 / 1024
    for dataflow, small, large in (
        # outputs: (inputs x column folds, weights x row folds) on 64 x 64
        ("os", Traffic(40_000, 28_000, 14_000), Traffic(20_000, 7_000, 14_000)),
        ("ws", Traffic(40_000, 7_000, 28_000), Traffic(20_000, 7_000, 28_000)),
        ("is", Traffic(20_000, 28_000, 28_000), Traffic(20_000, 7_000, 28_000)),
    ):
        tiny = SystolicArray(dataflow=dataflow, sram_kb=(1, 1, 1))  # type: ignore[arg-type]
        assert tiny.run(one).dram == small
        roomy = SystolicArray(
            dataflow=dataflow,  # type: ignore[arg-type]
            sram_kb=(20_000 * half, 7_000 * half, 1),
        )
        assert roomy.run(one).dram == large
        endless = SystolicArray(dataflow=dataflow, sram_kb=None)  # type: ignore[arg-type]
        assert endless.run(one).dram == large
    # the filters of one column fold (100 x 64 words) are reused by all row folds
    fold = SystolicArray(dataflow="os", sram_kb=(1, 6_400 * half, 1))
    assert fold.run(one).dram.weights == 7_000
    # two bytes a word need twice the memory
    wide = SystolicArray(dataflow="os", sram_kb=(1, 6_400 * half, 1), word_bytes=2)
    assert wide.run(one).dram.weights == 28_000


def test_row_stationary_traffic_by_hand() -> None:
    # 2 channels and 5 filters of 3 x 3 on 6 x 4 elements: two sets at a time, so a pass has two
    # filters and one channel; output rows 0-3 and 4-7 are two strips
    one = Layer("r", "r", "convolution", 2, 5, 1, (3, 3), input_size=(10, 10), output_size=(8, 8))
    tiny = SystolicArray(6, 4, "rs", sram_kb=(1e-3, 1e-3, 1e-3)).run(one)
    assert tiny.cycles == 5 * 2 * 8 * 3
    assert tiny.dram == Traffic(200 * 3, 90 * 2, 320)
    assert tiny.sram == Traffic(200 * 3, 90 * 2, 320 * 3)
    assert SystolicArray(6, 4, "rs").run(one).dram == Traffic(200, 90, 320)


def test_stalls_and_energy() -> None:
    one = layer(512, 14, 4)
    free = SystolicArray(dataflow="ws").run(one)
    assert free.stall_cycles == 0
    words = free.dram.total
    slow = SystolicArray(dataflow="ws", bandwidth=0.5).run(one)
    assert slow.stall_cycles == 2 * words - free.cycles and slow.cycles == free.cycles
    assert SystolicArray(dataflow="ws", bandwidth=1e6).run(one).stall_cycles == 0
    assert free.energy() == 5 * free.macs + 6 * free.sram.total + 200 * words
    profile = SystolicArray(dataflow="ws", bandwidth=0.5).profile([one, one])
    assert profile.latency_cycles == 4 * words and profile.energy() == 2 * free.energy()


def test_overlapping_folds_pay_filling_and_draining_once() -> None:
    one = product(300, 200, 150)
    for dataflow, stream, load in (("os", 200, 0), ("ws", 300, 64), ("is", 150, 64)):
        plain = SystolicArray(dataflow=dataflow).run(one)  # type: ignore[arg-type]
        hidden = SystolicArray(dataflow=dataflow, overlap_folds=True).run(one)  # type: ignore[arg-type]
        assert hidden.cycles == plain.folds * stream + load + 126
        assert plain.cycles == plain.folds * (stream + load + 126)
    # a fold cannot start before its weights are there
    short = SystolicArray(dataflow="ws", overlap_folds=True).run(product(10, 128, 64))
    assert short.cycles == 2 * 64 + 64 + 126


# Networks


def test_means_are_not_mixed(mobilenet: list[Layer]) -> None:
    profile = SystolicArray(dataflow="ws").profile(mobilenet)
    each = [run.utilisation for run in profile.runs]
    assert profile.mean_utilisation == pytest.approx(np.mean(each))
    cycles = [run.cycles for run in profile.runs]
    assert profile.overall_utilisation == pytest.approx(np.average(each, weights=cycles))
    assert profile.mean_utilisation > 5 * profile.overall_utilisation
    # the depthwise layers are depthwise: 512 runs of one channel, not one dense layer
    run = next(r for r in profile.runs if r.layer == "blocks.3.1.conv_dw")
    assert (run.groups, run.group_width, run.folds) == (512, 1, 512)


def test_what_has_no_model_is_named_and_counted() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Conv3d(1, 2, 3)
            self.flat = nn.Conv2d(2, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.flat(self.deep(x).amax(2))

    module = Volume()
    profile = SystolicArray().profile(Graph.trace(module, (torch.randn(2, 1, 5, 6, 6),)))
    assert [run.layer for run in profile.runs] == ["flat"]
    assert dict(profile.unmodelled) == {"deep (conv3d)": 2 * 27 * 3 * 4 * 4}
    with pytest.raises(InputError, match="no convolution, linear layer or product"):
        SystolicArray().profile(Graph.trace(nn.ReLU(), (torch.randn(2, 3),)))


def test_attention_is_modelled() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    profile = SystolicArray(8, 8, "os").profile(Graph.trace(block, (torch.randn(2, 5, 16),)))
    kinds = [run.kind for run in profile.runs]
    assert kinds.count("product") == 2 and kinds.count("linear") == 4
    scores = next(run for run in profile.runs if run.kind == "product")
    assert (scores.groups, scores.macs) == (2, 2 * 5 * 8 * 5)


def test_impossible_arrays() -> None:
    for options, words in (
        ({"rows": 0}, "at least one row"),
        ({"dataflow": "xs"}, "no dataflow 'xs'"),
        ({"sram_kb": (64, 0, 64)}, "more than 0 kB"),
        ({"bandwidth": 0.0}, "bandwidth is more than 0"),
    ):
        with pytest.raises(InputError, match=words):
            SystolicArray(**options)
    assert set(DATAFLOWS) == {"rs", "os", "ws", "is"}


# Co-optimisation


def test_the_search_finds_the_fastest_width(graph: Graph) -> None:
    search = co_optimise(graph, SystolicArray())
    assert len(search.flagged) == 13 and search.flagged[0] == "blocks.0.0.conv_dw"
    assert [c.group_width for c in search.candidates] == [1, 2, 4, 8, 16, 32]
    assert search.candidates[0].cycles == search.original.cycles
    assert search.choose().group_width == 8
    assert search.choose("utilisation").group_width == 32
    assert search.choose("energy").group_width == 1
    assert search.choose(max_macs=600_000_000).group_width == 2
    assert search.choose("utilisation", max_parameters=4_600_000).group_width == 8
    # all of them are on the front: more cycles always come with more use of the array
    assert len(search.front) == 6
    with pytest.raises(BudgetError, match="the nearest is 1 with 568,740,352 MACs"):
        search.choose(max_macs=1_000_000)
    with pytest.raises(InputError, match="a least score needs"):
        search.choose(min_score=0.5)


def test_candidates_are_the_networks_that_are_built() -> None:
    module = small_mobilenet()
    inputs = (torch.randn(2, 1, 8, 8),)
    graph = Graph.trace(module, inputs)
    array = SystolicArray(16, 16, "ws", bandwidth=2.0)
    trained = {1: 0.9, 4: 0.8, 8: 0.95}
    search = co_optimise(graph, array, widths=(1, 4, 8), score=trained.__getitem__)
    for candidate in search.candidates:
        built, _ = search.convert(module, candidate.group_width)
        own = Graph.trace(built, inputs)
        profile = array.profile(own)
        assert (candidate.macs, candidate.parameters) == (own.macs, own.parameters)
        assert candidate.cycles == profile.latency_cycles
        assert candidate.mean_utilisation == pytest.approx(profile.mean_utilisation)
        assert candidate.energy == pytest.approx(profile.energy())
    assert search.choose(min_score=0.92).group_width == 8
    # the same through a traced network
    again, _ = search.convert(graph.network(), 4)
    assert Graph.trace(again, inputs).macs == search.candidates[1].macs
    # a candidate that another one beats in everything is not on the front
    worse = co_optimise(graph, array, widths=(4, 8), score={4: 0.9, 8: 0.1}.__getitem__)
    by_width = {c.group_width: c for c in worse.candidates}
    assert by_width[4].efficient
    assert by_width[8].efficient == (
        by_width[8].cycles < by_width[4].cycles
        or by_width[8].mean_utilisation > by_width[4].mean_utilisation
    )


def test_what_is_flagged(graph: Graph) -> None:
    one = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 64, 3, groups=64))
    small = Graph.trace(one, (torch.randn(2, 8, 16, 16),))
    assert co_optimise(small, SystolicArray()).flagged == ("1",)
    # the first layer uses 55 % of the array: badly enough for 60 %, and a layer of channels
    both = co_optimise(small, SystolicArray(), select=spatial, threshold=0.9)
    assert both.flagged == ("0", "1")
    with pytest.raises(InputError, match=r"less than 0\.01 % of the array"):
        co_optimise(graph, SystolicArray(), select=depthwise, threshold=1e-4)


def test_equal_macs_and_equal_latency() -> None:
    array = SystolicArray(16, 16, "ws")

    def make(width: float, group_width: int) -> list[Layer]:
        channels = 8 * max(1, round(16 * width))
        return [layer(channels, 14, group_width), layer(channels, 14, channels, kernel=1)]

    def macs(chosen: Sequence[Layer]) -> float:
        return sum(one.macs for one in chosen)

    def cycles(chosen: Sequence[Layer]) -> float:
        return array.profile(chosen).cycles

    # channels are whole eights, so the nearest of them is found by trying all
    for cost, wide, narrow in ((macs, 8, 1), (cycles, 8, 1)):
        for made, other in ((wide, narrow), (narrow, wide)):
            target = cost(make(1.0, other))
            width = width_at(lambda w, g=made: make(w, g), cost, target)
            brute = min(abs(cost(make(n / 16, made)) - target) for n in range(2, 33))
            assert abs(cost(make(width, made)) - target) == brute
    assert width_at(lambda w: make(w, 8), macs, macs(make(1.0, 1))) < 1.0


# Topologies


def test_topologies_go_out_and_in(mobilenet: list[Layer], tmp_path: Path) -> None:
    path = tmp_path / "mobilenet.csv"
    write_topology(mobilenet, path)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("Layer name, IFMAP Height") and lines[0].endswith("Strides,")
    # 113 = 2 * (112 / 2 - 1) + 3: what the windows reach, padding included
    assert lines[4] == "blocks.1.0.conv_dw (x64), 113, 113, 3, 3, 1, 1, 2,"
    again = read_topology(path)
    assert [one.module for one in again] == [one.module for one in mobilenet]
    for ours, theirs in zip(mobilenet, again, strict=True):
        assert (ours.macs, ours.weights, ours.groups, ours.output_size) == (
            theirs.macs, theirs.weights, theirs.groups, theirs.output_size
        )  # fmt: skip
    for dataflow in STATIONARY:
        array = SystolicArray(dataflow=dataflow)
        assert array.profile(again).cycles == array.profile(mobilenet).cycles


def test_scale_sims_own_notation_of_depthwise(tmp_path: Path) -> None:
    path = tmp_path / "dp.csv"
    path.write_text("header,\n\nDPconv, 16, 16, 3, 3, 64, 1, 1,\n")
    (one,) = read_topology(path)
    assert one.depthwise and (one.channels, one.features, one.groups) == (64, 64, 64)


@pytest.mark.parametrize(
    "text, words",
    [
        ("header,\n", "has no layers"),
        ("header,\nconv, 8, 8, 3, 3, 4,\n", "row 2 .* is no layer"),
        ("header,\nconv, 8, 8, 3, 3, 4, 4, x,\n", "whole numbers"),
        ("header,\na, 8, 8, 3, 3, 4, 4, 1,\nb, 2, 8, 3, 3, 4, 4, 1,\n", "row 3 .* too large"),
        ("header,\nconv, 8, 8, 3, 3, 4, 0, 1,\n", "not positive"),
    ],
)
def test_files_that_are_no_topology(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_topology(path)
    with pytest.raises(InputError, match="cannot read the topology"):
        read_topology(tmp_path / "none.csv")


def test_two_strides_have_no_column() -> None:
    odd = Layer("s", "s", "convolution", 4, 4, 1, (3, 3), (1, 2), (8, 8), output_size=(6, 3))
    with pytest.raises(InputError, match="two strides"):
        topology([odd])
