import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.cli import main
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.hardware.device import Device, Figure, Memory
from gossamer.hardware.roofline import (
    EfficiencyReport,
    efficiency_gap_plot,
    efficiency_report,
    layer_operations,
    model_layers,
    operator_seconds,
    roofline_record,
    waterline,
    waterline_figure,
    write_report,
)
from gossamer.models.convfirst import ConvFirst, ConvNeXtBlock, MBConv, convfirst_net
from gossamer.models.plain import ConvNet


def device(ridge=152.6, peak=1e12):
    """One memory; a ridge in operations (two a multiply-accumulate) a byte."""
    return Device(
        "worked", "gpu",
        {d: Figure(peak, "chosen") for d in ("float32", "float16")},
        (Memory("memory", None, Figure(2 * peak / ridge, "chosen")),),
    )  # fmt: skip


def caches():
    return Device(
        "caches", "cpu", {"float32": Figure(50e9, "chosen")},
        (
            Memory("L1", Figure(32e3, "chosen"), Figure(250e9, "chosen")),
            Memory("L2", Figure(1e6, "chosen"), Figure(100e9, "chosen")),
            Memory("memory", Figure(1e10, "chosen"), Figure(25e9, "chosen")),
        ),
    )  # fmt: skip


def arithmetic(block, side=64, batch=32):
    graph = Graph.trace(block, (torch.randn(2, 64, side, side),))
    rows = model_layers(graph, device(), batch=batch, dtype="float16")
    return [row for row in rows if row.kind == "arithmetic"]


# What the paper's blocks cost: fp16, batch 32, 64 channels of 64 x 64, ridge 152.6


@pytest.mark.parametrize(
    ("block", "macs", "intensities", "megabytes", "best"),
    [
        (ConvFirst(64, 64, group_width=8, expand=6), 7046.4, (36.0, 54.8, 54.8), 268.54, 0.344),
        (MBConv(64, 64, group_width=8, expand=6), 10066.3, (54.8, 36.0, 54.8), 436.36, 0.302),
        (MBConv(64, 64, group_width=1, expand=6), 6895.4, (54.8, 4.5, 54.8), None, 0.207),
    ],
)  # fmt: skip
def test_blocks_layer_by_layer(block, macs, intensities, megabytes, best):
    rows = arithmetic(block)
    operations = [row.operations for row in rows]
    moved = [row.bytes for row in rows]
    assert round(sum(operations) / 2e6, 1) == macs
    assert tuple(round(row.intensity, 1) for row in rows) == intensities
    if megabytes is not None:
        assert round(sum(moved) / 1e6, 2) == megabytes
    assert round(waterline(operations, moved, 152.6), 3) == best
    # The report's own best times say the same.
    seconds = sum(row.best_seconds for row in rows)
    assert round(sum(operations) / 2e12 / seconds, 3) == best


def test_convnext_layer_by_layer():
    """Published without the bias of any layer: 24.5, 51.2, 51.2 and 201.4 MB."""
    block = ConvNeXtBlock(64, 64)
    block.conv = nn.Conv2d(64, 64, 7, padding=3, groups=64, bias=False)
    block.expand = nn.Linear(64, 256, bias=False)
    block.project = nn.Linear(256, 64, bias=False)
    block.norm = nn.LayerNorm(64)
    rows = arithmetic(block)
    operations = [row.operations for row in rows]
    moved = [row.bytes for row in rows]
    assert round(sum(operations) / 2e6, 1) == 4706.0
    assert tuple(round(row.intensity, 1) for row in rows) == (24.5, 51.2, 51.2)
    assert round(sum(moved) / 1e6, 1) == 201.4
    assert round(waterline(operations, moved, 152.6), 3) == 0.306


def test_fused_blocks_are_one_bar():
    for block, megabytes, intensity in (
        (ConvFirst(64, 64, group_width=8), 33.66, 418.7),
        (MBConv(64, 64, group_width=8), 33.71, 597.3),
    ):
        rows = arithmetic(block)
        operations = sum(row.operations for row in rows)
        weights = sum(p.numel() for p in block.parameters() if p.ndim == 4)
        moved = 2 * (2 * 32 * 64 * 64 * 64 + weights)  # input, output, weights
        assert round(moved / 1e6, 2) == megabytes
        assert round(operations / moved, 1) == intensity
        assert waterline([operations], [moved], 152.6) == 1.0


def test_a_waterline_is_not_the_roofline_of_the_sums():
    assert round(waterline([100, 100], [1, 10], 20), 3) == 0.667
    intensity = 200 / 11
    assert round(intensity, 1) == 18.2
    assert round(min(1.0, intensity / 20), 3) == 0.909


def test_one_ridge_a_layer():
    # 100 / max(100, 1 * 200) and 100 / max(100, 10 * 5)
    assert waterline([100, 100], [1, 10], [200, 5]) == pytest.approx(200 / 300)
    assert waterline([0, 100], [30, 1], 10) == pytest.approx(100 / 400)


# Counting


def test_operations_agree_with_hooks():
    """Two operations a multiply-accumulate, as torch's own counter has it; biases beside them."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        a, b, c = (int(torch.randint(1, 5, (1,), generator=generator)) * 4 for _ in range(3))
        k = int(torch.randint(0, 3, (1,), generator=generator)) * 2 + 1
        net = nn.Sequential(
            nn.Conv2d(3, a, k, padding=k // 2), nn.ReLU(), nn.Conv2d(a, b, 3, 2, 1, groups=4),
            nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, groups=b), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(b, c),
        ).eval()  # fmt: skip
        x = torch.randn(3, 3, 13, 11)
        biases = 0

        def count(_, __, out):
            nonlocal biases
            biases += out.numel()

        handles = [
            m.register_forward_hook(count) for m in net if isinstance(m, nn.Conv2d | nn.Linear)
        ]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        for handle in handles:
            handle.remove()
        rows = model_layers(Graph.trace(net, (x,)), caches(), batch=3)
        assert sum(row.operations for row in rows) == counter.get_total_flops() + biases


def test_a_bias_is_half_a_multiply_accumulate():
    from gossamer.core.layers import layers

    with_bias, without = (
        layers(Graph.trace(nn.Conv2d(4, 6, 1, bias=b), (torch.randn(2, 4, 5, 5),)))[0]
        for b in (True, False)
    )
    assert layer_operations(with_bias, 7) - layer_operations(without, 7) == 7 * 6 * 25


def test_groups_of_all_channels_are_dense():
    dense = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    for block in (ConvFirst(64, 64, group_width=64), dense):
        first = arithmetic(block, side=8, batch=2)[0]
        assert first.operations == 2 * 2 * 64 * 64 * 9 * 64
        assert first.bytes == 2 * (2 * 2 * 64 * 64 + 64 * 64 * 9)


def test_doubling_the_batch():
    block = ConvFirst(64, 64)
    graph = Graph.trace(block, (torch.randn(2, 64, 32, 32),))
    one, two = (
        [r for r in model_layers(graph, device(), batch=b) if r.kind == "arithmetic"]
        for b in (8, 16)
    )
    for a, b in zip(one, two, strict=True):
        assert b.operations == 2 * a.operations
        assert b.intensity == pytest.approx(a.intensity, rel=0.03)


def test_operators_without_arithmetic_are_memory_bound():
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    rows = model_layers(Graph.trace(net, (torch.randn(2, 3, 10, 10),)), caches(), batch=4)
    conv, norm, relu = rows
    assert (norm.operator, norm.kind, norm.operations, norm.bound) == ("batch_norm", "memory", 0, 0)
    # Activations in and out for each sample; mean, variance, scale and shift once.
    assert norm.bytes == 4 * (4 * 2 * 800 + 4 * 8)
    assert relu.bytes == 4 * 4 * 2 * 800
    assert norm.best_seconds == pytest.approx(norm.bytes / 250e9)
    assert conv.kind == "arithmetic"


def test_the_nearest_memory_that_holds_a_layer_bounds_it():
    graph = Graph.trace(nn.ReLU(), (torch.randn(2, 1000),))
    levels = [model_layers(graph, caches(), batch=b)[0].memory for b in (4, 5, 125, 126)]
    assert levels == ["L1", "L2", "L2", "memory"]
    forced = model_layers(graph, caches(), batch=4, memory="memory")[0]
    assert forced.memory == "memory"
    assert forced.best_seconds == pytest.approx(32_000 / 25e9)


def test_an_operator_without_a_model_is_named():
    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 4, 3)

        def forward(self, x):
            return self.conv(x).mean((2, 3, 4))

    report = efficiency_report(
        Volume(), (torch.randn(2, 1, 6, 6, 6),), device=caches(), runtimes=("torch",), rounds=2,
        seconds=0.05,
    )  # fmt: skip
    assert report.measured_only == ["conv (conv3d)"]
    (row,) = [r for r in report.layers if r.kind == "measured only"]
    assert row.operations is None and row.efficiency is None
    assert row.seconds > 0


def test_a_record_for_a_report():
    """Only what multiplies: one ReLU more changes nothing."""
    net = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))
    record = roofline_record(
        Graph.trace(net, (torch.randn(2, 8, 10, 10),)), caches(), batch=4, latency_ms=0.01
    )
    operations, moved = 2 * 4 * 100 * 64, 4 * (4 * 2 * 800 + 64)
    assert record["operations"] == 2 * operations
    assert [r["intensity"] for r in record["layers"]] == [pytest.approx(operations / moved)] * 2
    assert [r["ridge"] for r in record["layers"]] == [0.4, 0.4]  # 100 G operations, L1: 250 GB/s
    assert record["ideal_ms"] == pytest.approx(1e3 * 2 * operations / 100e9)
    assert record["efficiency"] == pytest.approx(record["ideal_ms"] / 0.01)
    assert record["bound"] == 1.0


# Measuring


def network():
    torch.manual_seed(0)
    return ConvNet(1, 16, (16, "pool", 32, "pool"), (32,)).eval()


@pytest.fixture(scope="module")
def report():
    return efficiency_report(
        network(), (torch.randn(2, 1, 16, 16),), device=caches(), batch=16, rounds=5, seconds=0.3
    )


def test_the_identity(report):
    """latency = operations / (peak x efficiency)."""
    for runtime, seconds in report.latency.items():
        predicted = report.operations / (report.peak * report.efficiency(runtime))
        assert predicted == pytest.approx(seconds)
    assert set(report.latency) == {"torch", "onnxruntime"}
    for row in report.layers:
        if row.operations:
            again = row.operations / (report.peak * row.efficiency)
            assert again == pytest.approx(row.seconds)


def test_operators_add_up_to_the_network(report):
    """The interpreter runs what the module runs; neither is far from the other."""
    total = sum(row.seconds for row in report.layers)
    assert 0.3 < total / report.latency["torch"] < 3.0


def test_every_operator_is_timed_where_it_stands():
    net = network()
    graph = Graph.trace(net, (torch.randn(2, 1, 16, 16),))
    times = operator_seconds(graph, (torch.randn(4, 1, 16, 16),), seconds=0.05)
    assert set(times) >= {op.name for op in graph.operators}
    larger = operator_seconds(graph, (torch.randn(256, 1, 16, 16),), seconds=0.05)
    first = next(op.name for op in graph.operators if op.op == "conv2d")
    assert larger[first] > 2 * times[first]


def test_the_report_s_columns_do_not_mix(report):
    value = json.loads(json.dumps(report.to_json()))
    assert set(value) >= {"counted", "modelled", "measured", "layers"}
    assert value["modelled"]["best_ms"] >= value["modelled"]["ideal_ms"]
    assert value["modelled"]["bound"] <= value["modelled"]["arithmetic_bound"] <= 1.0


def test_another_machine_is_bounded_and_not_measured():
    report = efficiency_report(
        network(), (torch.randn(2, 1, 16, 16),), device=device(), measured=False
    )
    assert not report.latency
    assert all(row.seconds is None for row in report.layers)
    with pytest.raises(InputError, match="onnxruntime was not measured; nothing was"):
        report.efficiency("onnxruntime")


# Figures


def test_files_of_a_report(report, tmp_path):
    write_report(report, tmp_path / "out")
    for name in ("roofline.png", "waterline.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "default-src 'none'" in page
    assert json.loads((tmp_path / "out" / "roofline.json").read_text())["batch"] == 16


def test_a_gap_is_log_of_one_over_efficiency(report, tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot

    def remember(self, x, y, *args, **kwargs):
        drawn.append((list(x), list(y)))
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", remember)
    efficiency_gap_plot({"net": [report]}, {"net": [90.0]}, tmp_path / "gap.png")
    (actual, _), (ideal, _), (gap, heights) = drawn
    assert heights == [90.0, 90.0]
    assert gap == [*ideal, *actual]
    assert math.log(gap[1] / gap[0]) == pytest.approx(math.log(1 / report.efficiency("torch")))
    waterline_figure([report, report], tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 1000


def test_bad_input(report, tmp_path):
    graph = Graph.trace(nn.ReLU(), (torch.randn(2, 4),))
    with pytest.raises(InputError, match="as many operations as bytes"):
        waterline([1.0], [1.0, 2.0], 3.0)
    with pytest.raises(InputError, match="none of them negative"):
        waterline([1.0], [-1.0], 3.0)
    with pytest.raises(InputError, match="no number format"):
        model_layers(graph, caches(), dtype="int3")
    with pytest.raises(InputError, match="no peak rate for float16"):
        model_layers(graph, caches(), dtype="float16")
    with pytest.raises(InputError, match="no bandwidth for L9"):
        model_layers(graph, caches(), memory="L9")
    with pytest.raises(InputError, match="at least one sample"):
        model_layers(graph, caches(), batch=0)
    with pytest.raises(InputError, match="1 reports and 2 accuracies"):
        efficiency_gap_plot({"a": [report]}, {"a": [1.0, 2.0]}, tmp_path / "x.png")


def test_beyond_the_peak_is_told(report):
    slow = Device(
        "slow", "cpu", {"float32": Figure(1e6, "wrong")},
        (Memory("memory", None, Figure(25e9, "chosen")),),
    )  # fmt: skip
    wrong = efficiency_report(
        network(), (torch.randn(2, 1, 16, 16),), device=slow, batch=16, runtimes=(), seconds=0.05
    )
    assert wrong.beyond_peak
    assert isinstance(wrong, EfficiencyReport)
    assert not report.beyond_peak


# The command


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gossamer", "hardware", "roofline", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_prints_writes_and_plans(monkeypatch, tmp_path, capsys):
    caches().write(tmp_path / "device.yaml")
    words = ("gossamer_convfirst_nano", "--image-size", 32, "--device", tmp_path / "device.yaml")
    assert command(monkeypatch, *words, "--fuse", "--out", tmp_path / "out", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value == json.loads((tmp_path / "out" / "roofline.json").read_text())
    assert value["device"] == "caches"
    assert len(value["blocks"]) == 12
    graph = Graph.trace(convfirst_net("nano"), (torch.randn(2, 3, 32, 32),))
    # Beside two operations a multiply-accumulate there is only the bias of the classifier.
    assert value["counted"]["operations"] == 2 * graph.macs + 1000
    assert command(monkeypatch, "resnet18", "--device", "a100-sxm-80gb", "--image-size", 64) == 0
    assert "measured" not in capsys.readouterr().out


def test_the_command_s_bad_input_is_one_sentence(monkeypatch, capsys):
    assert command(monkeypatch, "resnet18", "--device", "no-such-device") == 2
    said = capsys.readouterr().err
    assert "there is no device file no-such-device" in said and "Traceback" not in said
    words = ("resnet18", "--device", "a100-sxm-80gb", "--image-size", 64)
    assert command(monkeypatch, *words, "--memory", "L9") == 2
    assert "no bandwidth for L9" in capsys.readouterr().err
