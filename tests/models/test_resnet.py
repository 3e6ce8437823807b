"""Residual networks: published counts, published weights, published accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import pad

import gossamer.models  # noqa: F401 (registers with timm)
from gossamer.core.errors import InputError
from gossamer.datasets import open_task
from gossamer.models.build import load_weights
from gossamer.models.resnet import BasicBlock, cifar_resnet, digits_resnet

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_published_sizes(depth: int, millions: float) -> None:
    """Table 6 of the paper."""
    network = cifar_resnet(depth)
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.0301 if depth == 110 else 0.005)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_parameters_by_hand() -> None:
    def block(inputs: int, width: int) -> int:
        return 9 * inputs * width + 9 * width * width + 4 * width

    by_hand = 27 * 16 + 32 + 3 * block(16, 16) + block(16, 32) + 2 * block(32, 32)
    by_hand += block(32, 64) + 2 * block(64, 64) + 650
    assert by_hand == 269_722 == sum(p.numel() for p in cifar_resnet(20).parameters())
    projections = 16 * 32 + 64 + 32 * 64 + 128
    small = 9 * 16 + 32 + block(16, 16) + block(16, 32) + block(32, 64) + projections + 650
    network = digits_resnet(blocks_per_stage=1)
    assert small == sum(p.numel() for p in network.parameters())


def test_the_parameter_free_shortcut() -> None:
    block = BasicBlock(2, 6, stride=2, projection=False).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    expected = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(block(x), expected)  # positive, so the activation changes nothing


def test_depths_that_do_not_exist() -> None:
    for depth in (2, 18, 21):
        with pytest.raises(InputError, match="has 6 n \\+ 2 layers"):
            cifar_resnet(depth)


def test_timm_knows_them() -> None:
    network = timm.create_model("gossamer_resnet20", num_classes=7, in_chans=1)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    digits = timm.create_model("gossamer_digits_resnet")
    assert digits(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    names = {"gossamer_digits_resnet"} | {f"gossamer_resnet{d}" for d in (20, 32, 44, 56)}
    assert names <= set(timm.list_models("gossamer_*"))
    with pytest.raises(InputError, match="no weights to download"):
        timm.create_model("gossamer_resnet20", pretrained=True)


def test_the_parts_that_timm_s_users_call() -> None:
    network = cifar_resnet(20).eval()
    x = torch.rand(2, 3, 32, 32)
    features = network.forward_features(x)
    assert features.shape == (2, 64, 8, 8)
    pooled = network.forward_head(features, pre_logits=True)
    assert torch.allclose(pooled, features.mean((2, 3)))
    assert torch.equal(network.get_classifier()(pooled), network(x))
    network.reset_classifier(3)
    assert network(x).shape == (2, 3) and network.num_classes == 3


@pytest.mark.data
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_load(real_data: Callable[[str], Path], depth: int) -> None:
    network = cifar_resnet(depth)
    load_weights(network, real_data("weights_cifar10_resnet") / f"resnet{depth}.safetensors")


@pytest.mark.data
def test_published_weights_score_as_published(real_data: Callable[[str], Path]) -> None:
    """91.5 % on the first 1,000 lossless test images, 81 % on the JPEG test set."""
    network = cifar_resnet(20)
    load_weights(network, real_data("weights_cifar10_resnet") / "resnet20.safetensors")
    task = open_task(
        real_data("cifar10") / "test_lossless_first1000.parquet", channels=3, **IMAGENET
    )
    right = sum(task.score(network, split) * task.size(split) for split in task.splits) / 100
    assert right == pytest.approx(915, abs=1.01)
