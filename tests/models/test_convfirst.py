import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import gossamer.models  # noqa: F401 (registers)
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.models.convfirst import (
    SIZES,
    BlockNet,
    ConvFirst,
    ConvNeXtBlock,
    MBConv,
    convfirst_net,
)


def macs(block, channels=64, side=64):
    return Graph.trace(block, (torch.randn(2, channels, side, side),)).macs


def test_macs_of_the_paper_s_shape():
    """64 channels of 64 x 64, batch 32, k = 3, r = 6 (ConvNeXt: k = 7, r = 4)."""
    assert round(32 * macs(ConvFirst(64, 64, group_width=8)) / 1e6, 1) == 7046.4
    assert round(32 * macs(MBConv(64, 64, group_width=8)) / 1e6, 1) == 10066.3
    assert round(32 * macs(MBConv(64, 64)) / 1e6, 1) == 6895.4
    assert round(32 * macs(ConvNeXtBlock(64, 64)) / 1e6, 1) == 4706.0


def test_conv_first_by_its_definition():
    torch.manual_seed(0)
    block = ConvFirst(16, 16, group_width=8, expand=2).eval()
    x = torch.randn(2, 16, 5, 7)

    def norm(y, bn):
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    with torch.no_grad():
        # A grouped convolution is a dense one with a block-diagonal kernel.
        dense = torch.zeros(16, 16, 3, 3)
        for g in range(2):
            part = slice(8 * g, 8 * g + 8)
            dense[part, part] = block.conv.weight[part]
        y = norm(F.conv2d(x, dense, padding=1), block.bn1)
        y = norm(torch.einsum("oi,bihw->bohw", block.expand.weight[:, :, 0, 0], y), block.bn2)
        y = y * torch.sigmoid(y)
        y = norm(torch.einsum("oi,bihw->bohw", block.project.weight[:, :, 0, 0], y), block.bn3)
        torch.testing.assert_close(block(x), x + y)


def test_a_residual_only_where_the_shape_stays():
    x = torch.randn(1, 16, 8, 8)
    for kind in (ConvFirst, MBConv):
        assert kind(16, 16, group_width=8).residual
        assert not kind(16, 16, group_width=8, stride=2).residual
        block = kind(16, 24, group_width=8, stride=2).eval()
        assert not block.residual
        assert block(x).shape == (1, 24, 4, 4)
        # Nothing goes around a projection that is silent.
        nn.init.zeros_(block.project.weight)
        assert float(block(x).detach().abs().max()) == 0.0


def test_a_fresh_convnext_block_is_nearly_the_identity():
    """Layer scale starts at 1e-6."""
    block = ConvNeXtBlock(16, 16).eval()
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        assert float((block(x) - x).abs().max()) < 1e-5
    assert float(block.scale[0]) == pytest.approx(1e-6)


def test_convnext_agrees_with_timm():
    from timm.models.convnext import ConvNeXtBlock as Reference

    torch.manual_seed(0)
    own, theirs = ConvNeXtBlock(16, 16, layer_scale=0.5).eval(), Reference(16, 16).eval()
    with torch.no_grad():
        theirs.gamma.copy_(own.scale)
        for a, b in (
            (own.conv, theirs.conv_dw), (own.norm, theirs.norm), (own.expand, theirs.mlp.fc1),
            (own.project, theirs.mlp.fc2),
        ):  # fmt: skip
            b.load_state_dict(a.state_dict())
        x = torch.randn(2, 16, 6, 6)
        torch.testing.assert_close(own(x), theirs(x))


@pytest.mark.parametrize("size", list(SIZES))
def test_timm_makes_our_sizes(size):
    model = timm.create_model(f"gossamer_convfirst_{size}", num_classes=7, in_chans=1)
    widths, depths, expand = SIZES[size]
    blocks = [m for m in model.modules() if isinstance(m, ConvFirst)]
    assert len(blocks) == sum(depths)
    assert blocks[-1].expand.out_channels == expand * widths[-1]
    assert [m.conv.stride[0] for m in blocks].count(2) == 3
    assert model.num_features == widths[-1]
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 7)
        assert model.forward_features(torch.randn(2, 1, 64, 64)).shape == (2, widths[-1], 2, 2)


def test_bad_input():
    with pytest.raises(InputError, match="do not divide"):
        ConvFirst(20, 20, group_width=8)
    with pytest.raises(InputError, match="odd side"):
        MBConv(16, 16, kernel=4)
    with pytest.raises(InputError, match="no ConvFirst network of size"):
        convfirst_net("huge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="as many widths as depths"):
        BlockNet(lambda i, o, s: nn.Identity(), (8, 16), (1,))
    with pytest.raises(InputError, match="no weights to download"):
        timm.create_model("gossamer_convfirst_nano", pretrained=True)
