"""MobileNet-V1 and ResNeXt-50: exact counts, and the originals' weights and answers."""

import logging

import pytest
import timm
import torch
from torch import nn

import gossamer.models  # noqa: F401 (registers our own)
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.core.layers import layers
from gossamer.models import mobilenet_v1, resnext50, small_mobilenet
from gossamer.models.mobilenet import MobileNet


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def stirred(module: nn.Module) -> nn.Module:
    """With statistics of normalisation that are not their defaults."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def test_mobilenet_is_the_published_one(images: torch.Tensor) -> None:
    ours = stirred(mobilenet_v1(activation=nn.ReLU6))
    graph = Graph.trace(ours, (images,))
    weights = sum(
        t.numel() for n, t in graph.tensors.items() if t.ndim > 1 and graph.kinds[n] == "parameter"
    )
    assert (graph.macs, weights, graph.parameters) == (568_740_352, 4_209_088, 4_231_976)
    depthwise = [layer for layer in layers(graph) if layer.depthwise]
    assert len(depthwise) == 13
    assert round(sum(layer.macs for layer in depthwise) / 1e6, 1) == 17.4
    theirs = timm.create_model("mobilenetv1_100")
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images), atol=1e-5, rtol=1e-4)


def test_resnext_is_the_published_one(images: torch.Tensor) -> None:
    ours = stirred(resnext50())
    assert sum(p.numel() for p in ours.parameters()) == 25_028_904
    theirs = timm.create_model("resnext50_32x4d")
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images), atol=1e-4, rtol=1e-4)


def test_constant_width_is_not_a_constant_number() -> None:
    def grouped(module: nn.Module) -> list[tuple[int, int]]:
        return [
            (part.in_channels, part.groups)
            for part in module.modules()
            if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3) and part.in_channels > 3
        ]

    assert all(channels == 8 * groups for channels, groups in grouped(mobilenet_v1(group_width=8)))
    assert {groups for _, groups in grouped(mobilenet_v1(groups=32))} == {32}
    assert {groups for _, groups in grouped(resnext50())} == {32}
    assert {c // g for c, g in grouped(resnext50(group_width=16))} == {16}
    # the early layers of a narrow network have fewer channels than groups are wished
    narrow = grouped(mobilenet_v1(groups=32, width=0.5))
    assert narrow[0] == (16, 16) and narrow[-1] == (512, 32)


def test_widths_that_do_not_divide_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        MobileNet(((24, 1, 1), (48, 1, 2)), stem=24, group_width=16, in_channels=1, classes=2)
    assert "blocks.0.0.conv_dw has groups of 12 channels" in caplog.text


def test_sizes() -> None:
    assert mobilenet_v1(width=0.25).num_features == 256
    small = small_mobilenet(group_width=4, classes=7)
    x = torch.randn(2, 1, 8, 8)
    assert small.forward_features(x).shape == (2, 256, 2, 2)
    assert small(x).shape == (2, 7)
    assert mobilenet_v1(small_images=True, classes=10).forward_features(
        torch.randn(2, 3, 32, 32)
    ).shape == (2, 1024, 2, 2)


def test_timm_knows_them() -> None:
    model = timm.create_model("gossamer_mobilenetv1", group_width=8, num_classes=5)
    other = timm.create_model("gossamer_mobilenetv1_g8", num_classes=5)
    model.load_state_dict(other.state_dict())
    assert timm.create_model("gossamer_resnext50", group_width=16).layer1[0].conv2.groups == 8
    assert timm.create_model("gossamer_small_mobilenet", groups=4).num_classes == 10
    with pytest.raises(InputError, match="no weights to download"):
        timm.create_model("gossamer_resnext50", pretrained=True)
    with pytest.raises(InputError, match="width multiplier"):
        mobilenet_v1(width=0.0)
    with pytest.raises(InputError, match="either a group width or a number"):
        mobilenet_v1(width=0.5, group_width=2, groups=2)
