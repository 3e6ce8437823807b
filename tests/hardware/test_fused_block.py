import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.core.export import onnx_model
from gossamer.hardware import fused_block
from gossamer.hardware.fused_block import (
    FoldedBlock,
    block_bytes,
    chunk_of,
    fuse_block,
    plan_blocks,
    tuned_rows,
    workspace_bytes,
)
from gossamer.models.convfirst import BlockNet, ConvFirst, ConvNeXtBlock, MBConv


def trained(block):
    """A block whose batch normalisation says something."""
    generator = torch.Generator().manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_var, 0.5), (module.weight.data, 0.5)):
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return block.eval()


def make(kind, inputs=16, outputs=16, **options):
    torch.manual_seed(1)
    return trained({"convfirst": ConvFirst, "mbconv": MBConv}[kind](inputs, outputs, **options))


KINDS = ("convfirst", "mbconv")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_fused_equals_the_block(kind, backend, kernel, stride):
    """Heights that strips do not divide, borders, batches; odd sizes; more channels out than in."""
    for outputs in (16, 24):
        block = make(kind, 16, outputs, kernel=kernel, stride=stride, group_width=8, expand=3)
        for batch, height, width, rows in ((1, 13, 11, 3), (4, 10, 21, 4), (4, 7, 5, 1)):
            x = torch.randn(batch, 16, height, width)
            fused = fuse_block(block, tile_rows=rows, backend=backend)
            with torch.no_grad():
                expected = block(x)
                assert block.residual == (stride == 1 and outputs == 16)
                torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "group_width"), [(24, 1), (24, 12), (20, 4), (12, 6), (16, 16), (13, 13)]
)
def test_any_group_width(kind, channels, group_width):
    block = make(kind, channels, channels, group_width=group_width, expand=4)
    x = torch.randn(2, channels, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fuse_block(block)(x), block(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_the_rows(kind):
    block = make(kind)
    x = torch.randn(3, 16, 11, 9)
    fused = fuse_block(block, tile_rows=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), block(x), atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_large_and_small_activations_do_not_overflow(kind):
    block = make(kind)
    x = 1e3 * torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        expected = block(x)
        got = fuse_block(block)(x)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_channels_last_input_is_understood():
    block = make("convfirst")
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fuse_block(block)(x), block(x), atol=1e-4, rtol=1e-4)


def test_folding_keeps_the_block():
    for kind in KINDS:
        block = make(kind)
        x = torch.randn(2, 16, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(FoldedBlock.of(block)(x), block(x), atol=1e-5, rtol=1e-5)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in FoldedBlock.of(block).modules())


def test_convolution_of_whole_groups_is_dense():
    """gw = C: one group, which is the ordinary convolution."""
    block = make("convfirst", group_width=16)
    folded = FoldedBlock.of(block)
    x = torch.randn(1, 16, 6, 6)
    with torch.no_grad():
        dense = F.conv2d(x, folded.conv.weight, folded.conv.bias, padding=1)
        t = F.silu(folded.expand(dense))
        torch.testing.assert_close(
            fuse_block(block)(x), folded.project(t) + x, atol=1e-4, rtol=1e-4
        )


def test_gradients_and_exports_go_layer_by_layer():
    block = make("convfirst")
    fused = fuse_block(block)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    model = onnx_model(fused, (torch.randn(2, 16, 8, 8),))
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 3


# What fusing saves


def test_modelled_traffic_of_the_paper_s_block():
    """fp16, batch 32, 64 channels of 64 x 64, r = 6, k = 3, groups of 8."""
    block = FoldedBlock.of(ConvFirst(64, 64, group_width=8, expand=6).eval())
    unfused = block_bytes(block, 64, 64, batch=32, element=2)
    assert round(unfused / 1e6, 2) == 268.54
    # A strip of all rows has no halo: the bytes of the waterline's fused bar.
    assert round(block_bytes(block, 64, 64, batch=32, tile_rows=64, element=2) / 1e6, 2) == 33.66
    mbconv = FoldedBlock.of(MBConv(64, 64, group_width=8, expand=6).eval())
    assert round(block_bytes(mbconv, 64, 64, batch=32, element=2) / 1e6, 2) == 436.36
    for rows in (1, 3, 64):  # a rolling buffer reads nothing twice
        fused = block_bytes(mbconv, 64, 64, batch=32, tile_rows=rows, element=2)
        assert round(fused / 1e6, 2) == 33.71


def test_halo_factor_of_row_strips():
    """(t + k - 1) / t: 1.125 for strips of 16 rows and k = 3, 1.375 for k = 7."""
    for kernel, factor in ((3, 1.125), (7, 1.375)):
        block = FoldedBlock.of(ConvFirst(64, 64, kernel=kernel).eval())
        high = 16 * 1000
        whole = block_bytes(block, high, 8, tile_rows=high)
        strips = block_bytes(block, high, 8, tile_rows=16)
        image = 4 * 64 * high * 8
        assert (strips - whole) / image + 1 == pytest.approx(factor, abs=1e-3)


def test_square_tiles_would_read_more():
    """((t + k - 1) / t)^2 for t = 16: 1.266 and 1.891."""
    assert [round(((16 + k - 1) / 16) ** 2, 3) for k in (3, 7)] == [1.266, 1.891]


def test_strips_fit_into_half_of_the_second_cache(monkeypatch):
    monkeypatch.setattr(fused_block, "_half_of_second_cache", lambda: 512 << 10)
    for kind, least in (("convfirst", 3), ("mbconv", 1)):
        fused = fuse_block(make(kind, 64, 64, group_width=8))
        rows = fused.rows(64, 64)
        assert least <= rows < 16
        assert workspace_bytes(fused.folded, 64, rows) <= 512 << 10
        strips = math.ceil(64 / rows)
        assert rows * strips - 64 < strips  # of equal height
    monkeypatch.setattr(fused_block, "_half_of_second_cache", lambda: 1)
    assert fuse_block(make("convfirst")).rows(64, 64) == 1
    monkeypatch.setattr(fused_block, "_half_of_second_cache", lambda: 1 << 30)
    assert fuse_block(make("convfirst")).rows(64, 50) == 50


def test_chunks_are_whole_groups():
    for width in (1, 8, 12, 24):
        folded = FoldedBlock.of(MBConv(24, 24, group_width=width, expand=4).eval())
        assert chunk_of(folded) % width == 0


# The planner


class Slow(nn.Module):
    """Waits, so that a decision is certain."""

    def __init__(self, block, times):
        super().__init__()
        self.block, self.times = block, times
        self.folded = getattr(block, "folded", block)

    def forward(self, x):
        for _ in range(self.times):
            self.block(x)
        return self.block(x)

    def rows(self, height, width):
        return self.block.rows(height, width)


def network():
    torch.manual_seed(0)

    def block(inputs, outputs, stride):
        return ConvFirst(inputs, outputs, stride=stride, group_width=8, expand=3)

    return trained(BlockNet(block, (16, 32), (2, 3), stem_stride=1, in_channels=1, classes=5))


def test_a_plan_keeps_what_the_network_computes():
    net = network()
    x = torch.randn(4, 1, 12, 12)
    chosen, plans = plan_blocks(net, (x,), rounds=5, round_ms=1.0)
    assert [p.name for p in plans] == [
        f"stages.{a}.{b}" for a, b in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    ]
    with torch.no_grad():
        torch.testing.assert_close(chosen(x), net.eval()(x), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, ConvFirst) for m in chosen.modules())
    # Blocks of one shape are measured once.
    assert plans[3].unfused_ms == plans[4].unfused_ms
    assert plans[2].input_shape == (4, 16, 12, 12)
    assert plans[3].input_shape == (4, 32, 6, 6)


@pytest.mark.parametrize("slower", ["fused", "layer by layer"])
def test_the_planner_takes_what_is_faster(slower, monkeypatch):
    """A kernel that loses is not used, and the plan says so."""
    real = fused_block._timed

    def timed(name, folded, fused, *rest):
        if slower == "fused":
            return real(name, folded, Slow(fused, 40), *rest)
        return real(name, Slow(folded, 400), fused, *rest)

    monkeypatch.setattr(fused_block, "_timed", timed)
    monkeypatch.setattr(Slow, "kind", "convfirst", raising=False)
    net = network()
    _, plans = plan_blocks(net, (torch.randn(4, 1, 12, 12),), rounds=8, round_ms=1.0)
    for plan in plans:
        assert plan.fused == (slower == "layer by layer")
        assert plan.said.startswith("fused" if plan.fused else "layer by layer")
        assert (plan.ratio > 1) == plan.fused


def test_strips_are_tuned_by_a_clock():
    """Whatever is tried is a height between one and all; a clock that never ticks takes any."""
    folded = FoldedBlock.of(make("convfirst"))
    x = torch.randn(1, 16, 12, 9)
    assert 1 <= tuned_rows(folded, x, rounds=2) <= 12
    ticks = itertools.count()
    assert 1 <= tuned_rows(folded, x, rounds=1, clock=lambda: float(next(ticks))) <= 12
    assert tuned_rows(folded, torch.randn(1, 16, 1, 9)) == 1


# Bad input


def test_bad_input():
    block = make("convfirst")
    with pytest.raises(InputError, match="ConvNeXtBlock cannot be fused"):
        fuse_block(ConvNeXtBlock(16, 16))
    with pytest.raises(InputError, match="at least one row"):
        fuse_block(block, tile_rows=0)
    with pytest.raises(InputError, match="no backend"):
        fuse_block(block, backend="cpp")
    with pytest.raises(InputError, match=r"takes \[batch, 16, height, width\]"):
        fuse_block(block)(torch.randn(1, 8, 4, 4))
    with pytest.raises(InputError, match="computes in float32"):
        fuse_block(block)(torch.randn(1, 16, 4, 4, dtype=torch.float64))
    with pytest.raises(InputError, match="Triton kernel is for ConvFirst"):
        fuse_block(make("mbconv"), backend="triton")
    with pytest.raises(InputError, match="has no ConvFirst or MBConv"):
        plan_blocks(nn.Linear(2, 2), (torch.randn(1, 2),))


# GPUs

TRITON = """
import sys, torch
from gossamer.models.convfirst import ConvFirst
from gossamer.hardware.fused_block import FoldedBlock, fuse_block
torch.manual_seed(0)
device = sys.argv[1]
worst = 0.0
for inputs, outputs, kernel, stride, width in ((16, 16, 3, 1, 8), (24, 40, 5, 2, 8), (12, 12, 3, 1, 1)):
    block = ConvFirst(inputs, outputs, kernel=kernel, stride=stride, group_width=width, expand=3)
    block = block.eval().to(device)
    x = torch.randn(2, inputs, 7, 9, device=device)
    with torch.no_grad():
        worst = max(worst, float((fuse_block(block, backend="triton")(x) - block(x)).abs().max()))
print(worst)
"""  # noqa: E501


def triton_error(device, **environment):
    result = subprocess.run(
        [sys.executable, "-c", TRITON, device], capture_output=True, text=True, timeout=300,
        env=os.environ | environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return float(result.stdout)


def test_the_triton_kernel_in_its_interpreter():
    assert triton_error("cpu", TRITON_INTERPRET="1") < 1e-4


@pytest.mark.gpu
def test_the_triton_kernel_on_a_gpu():
    assert triton_error("cuda") < 1e-4
