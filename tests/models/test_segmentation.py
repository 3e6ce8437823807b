"""Sizes and counts of known networks; what a pixel of the answer can see; export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.network import Network
from gossamer.models.segmentation import BACKBONES, DeepLab, UNet


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_a_unet_has_the_parameters_counted_by_hand() -> None:
    def pair(inputs: int, width: int) -> int:
        return 9 * inputs * width + 9 * width * width + 4 * width

    # Two levels of 4 and 8 channels, one input channel, three classes.
    assert parameters(UNet(1, 3, width=4, depth=2)) == (
        pair(1, 4) + pair(4, 8) + pair(12, 4) + 4 * 3 + 3
    )
    assert parameters(UNet(1, 3, width=4, depth=1)) == pair(1, 4) + 4 * 3 + 3
    with pytest.raises(InputError, match="depth of 1 or more"):
        UNet(depth=0)


def test_a_deeper_unet_sees_further() -> None:
    def reach(depth: int) -> int:
        torch.manual_seed(0)
        images = torch.randn(1, 1, 64, 64, requires_grad=True)
        UNet(1, 2, width=4, depth=depth).eval()(images)[0, 0, 32, 32].backward()
        assert images.grad is not None
        return int((images.grad[0, 0].abs().sum(0) > 0).sum())

    # Four 3x3 convolutions see 5 pixels with depth 1 (two convolutions), more with each level.
    assert reach(1) == 5
    assert 5 < reach(2) < reach(3)


@pytest.mark.parametrize("sides", [(32, 32), (30, 45)])
def test_every_pixel_is_answered_at_any_size(sides: tuple[int, int]) -> None:
    for network in (UNet(1, 3, width=4), DeepLab(1, 3, width=16, low=8)):
        assert network.eval()(torch.randn(2, 1, *sides)).shape == (2, 3, *sides)


def test_backbones_are_those_named() -> None:
    # ResNet-18 has 11.18 M parameters without its classifier (11.689512 M - 513 k); a deep stem
    # of width 32 replaces 9408 by 28512 weights (and 64 by 128 more of batch normalisation).
    deep = DeepLab(3, 21, backbone="resnet18").backbone
    assert parameters(deep) == 11_689_512 - 513_000 - 9408 + 9 * (3 * 32 + 32 * 32 + 32 * 64) + 128
    # Twice the channels are about four times the weights (ResNet-34: 21.28 M without classifier).
    wide = DeepLab(3, 21, backbone="wide_resnet34").backbone
    assert 3.9 < parameters(wide) / 21.28e6 < 4.1
    assert set(BACKBONES) == {"resnet18", "resnet50", "resnet101", "wide_resnet34", "mobilenetv2"}
    light = DeepLab(3, 21, backbone="mobilenetv2")
    assert light.backbone(torch.zeros(1, 3, 64, 64))[1].shape[2:] == (4, 4)  # stride 16
    with pytest.raises(InputError, match="no backbone"):
        DeepLab(backbone="vgg")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["unet", "deeplab"])
def test_the_exported_network_answers_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = UNet(1, 3, width=4) if kind == "unet" else DeepLab(1, 3, width=8, low=4)
    images = torch.randn(2, 1, 32, 32)
    write_onnx(Network(network.eval(), (images,)), tmp_path / "n.onnx")
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(OnnxRunner(tmp_path / "n.onnx")(images), expected, atol=1e-4, rtol=0)
