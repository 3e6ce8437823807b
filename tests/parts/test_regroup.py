"""Changing groups: exact warm starts, the right divisors, and what is left alone."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph
from gossamer.models import small_mobilenet
from gossamer.parts.regroup import depthwise, grouped, regroup, regrouped_kernel, spatial


def images(side: int = 8) -> torch.Tensor:
    return torch.randn(3, 1, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("before, groups", [(12, 4), (12, 1), (6, 6), (4, 2), (3, 12), (4, 6)])
def test_a_group_convolution_is_a_dense_one_with_a_block_diagonal_kernel(
    before: int, groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(24, 12 // before, 3, 3, generator=generator)
    x = torch.randn(2, 12, 7, 7, generator=generator)
    dense, _ = regrouped_kernel(kernel, before, 1)
    torch.testing.assert_close(
        F.conv2d(x, dense), F.conv2d(x, kernel, groups=before), atol=1e-5, rtol=1e-5
    )
    new, lost = regrouped_kernel(kernel, before, groups)
    assert lost == (before % groups != 0)
    # what remains is the old dense kernel where it lies inside the new groups
    inside = torch.arange(24)[:, None] // (24 // groups) == torch.arange(12) // (12 // groups)
    expected = F.conv2d(x, dense * inside[..., None, None])
    torch.testing.assert_close(F.conv2d(x, new, groups=groups), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_a_warm_start_is_the_old_network(traced: bool) -> None:
    module: nn.Module = small_mobilenet().eval()
    if traced:
        module = Graph.trace(module, (images(),)).network().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wide, converted = regroup(module, group_width=8, warm_start=True)
    assert [(c.before, c.groups, c.group_width, c.kept) for c in converted] == [
        (32, 4, 8, True), (64, 8, 8, True), (128, 16, 8, True), (128, 16, 8, True),
        (256, 32, 8, True),
    ]  # fmt: skip
    assert converted[0].name == "blocks.0.0.conv_dw"
    with torch.no_grad():
        torch.testing.assert_close(wide.eval()(images()), module(images()), atol=1e-6, rtol=1e-6)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    macs = Graph.trace(module, (images(),)).macs, Graph.trace(wide, (images(),)).macs
    depthwise_macs = 9 * (64 * 32 + 16 * 64 + 16 * 128 + 4 * 128 + 4 * 256)
    assert macs[1] - macs[0] == 7 * depthwise_macs
    # the new connections are trained: their gradient is not zero
    wide.train()(images()).square().sum().backward()
    name = next(n for n, _ in wide.named_parameters() if n.endswith("blocks.1.0.conv_dw.weight"))
    weight = dict(wide.named_parameters())[name]
    assert weight.grad is not None and bool((weight.grad[weight == 0] != 0).any())


def test_drawn_kernels_are_a_function_of_the_seed() -> None:
    module = small_mobilenet()
    one, _ = regroup(module, groups=4, seed=1)
    two, _ = regroup(module, groups=4, seed=1)
    other, _ = regroup(module, groups=4, seed=2)
    kernels = [m.get_submodule("blocks.2.1.conv_dw").weight for m in (one, two, other)]
    assert torch.equal(kernels[0], kernels[1]) and not torch.equal(kernels[0], kernels[2])
    fan_in = kernels[0][0].numel()
    assert float(kernels[0].detach().std() * (fan_in / 2) ** 0.5) == pytest.approx(1.0, abs=0.02)


def test_what_is_selected() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3),
    )  # fmt: skip
    for select, names in ((grouped, "12"), (depthwise, "1"), (spatial, "124")):
        assert [c.name for c in regroup(net, group_width=8, select=select)[1]] == list(names)
    with pytest.raises(UnsupportedError, match="no convolution"):
        regroup(nn.Sequential(nn.Conv2d(3, 8, 3)), group_width=8)
    with pytest.raises(InputError, match="at least 1"):
        regroup(net, group_width=0)


def test_narrower_groups_lose_connections_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(24, 24, 3, groups=2))
    with caplog.at_level(logging.WARNING):
        _, converted = regroup(net, group_width=16, warm_start=True)
        assert "0 has groups of 12 channels, since 16 does not divide its 24" in caplog.text
        assert converted[0].kept
        _, converted = regroup(net, group_width=4, warm_start=True)
    assert "0 loses connections" in caplog.text and not converted[0].kept
