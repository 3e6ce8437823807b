"""Changes a network so that its execution shows less of its design, and not what it computes.

Secure MobileNet-V1 replaces depthwise convolutions by group convolutions of a constant group size,
so that no kernel of a pair is cheap (Jha et al., "DeepPeep: exploiting design ramifications to
decipher the architecture of compact DNNs", ACM JETC 2020, arXiv:2007.15248; the paper does not
publish its exact edit). Padding, fusing, identity additions and preallocated outputs are
reconstructions of what its analysis suggests. Each maneuver is exact: with new connections at zero
("group", "pad"), to rounding ("fuse"), or to the bit.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.models.mobilenet import MobileNet, SeparableBlock, mobilenet_v1
from gossamer.parts.regroup import depthwise, regroup


def secure_mobilenet_v1(
    group_size: int = 8,
    *,
    width: float = 1.0,
    small_images: bool = False,
    in_channels: int = 3,
    classes: int = 1000,
) -> MobileNet:
    """MobileNet-V1 with groups of constant size in place of depthwise convolutions.

    Args:
        group_size: channels of a group; 1 is the vanilla network.
        width: multiplies all channels.
        small_images: the first convolution keeps the resolution.
        in_channels: of the images.
        classes: logits.
    """
    return mobilenet_v1(
        group_width=group_size, width=width, small_images=small_images, in_channels=in_channels,
        classes=classes,
    )  # fmt: skip


def harden(
    module: nn.Module, maneuvers: Sequence[str] = ("group",), *, group_size: int = 8
) -> nn.Module:
    """A copy of a network, in evaluation mode, after some maneuvers.

    Args:
        module: unchanged.
        maneuvers: of "group" (group convolutions for depthwise ones, new connections at zero),
            "pad" (both outputs of a separable block get one size), "identity-add" (blocks that keep
            their shape add their input, times zero), "fuse" (normalisations folded, rectifiers in
            place) and "arena" (layers write into buffers that live as long as the network). They
            are done in this order.
        group_size: channels of a group.

    Raises:
        InputError: if a maneuver is unknown or there is none.
        UnsupportedError: if the network has nothing that a maneuver could change.
    """
    unknown = sorted(set(maneuvers) - set(MANEUVERS))
    if unknown or not maneuvers:
        raise InputError(
            f"{unknown[0] if unknown else 'nothing'!r} is no maneuver; there are "
            f"{', '.join(MANEUVERS)}"
        )
    if group_size < 1:
        raise InputError(f"a group has at least one channel, not {group_size}")
    changed = copy.deepcopy(module).eval()
    for name, change in MANEUVERS.items():
        if name in maneuvers:
            changed = change(changed, group_size).eval()
    return changed


def _group(module: nn.Module, group_size: int) -> nn.Module:
    return regroup(module, group_width=group_size, select=depthwise, warm_start=True)[0].eval()


# Padding


def _pad(module: nn.Module, _: int) -> nn.Module:
    blocks = [m for m in module.modules() if isinstance(m, SeparableBlock)]
    if not blocks:
        raise UnsupportedError("the network has no separable block whose outputs could be padded")
    for block in blocks:
        _pad_block(block)
    return module


def _pad_block(block: SeparableBlock) -> None:
    """Widens the inner tensor to the block's output, by channels that stay zero."""
    inner, last = block.conv_dw, block.conv_pw
    times = -(-last.out_channels // inner.out_channels)
    if times == 1:
        return
    groups = inner.groups
    width = inner.out_channels // groups
    # Outputs of a group lie together, so each group gets its own zeros behind its real channels.
    kept = torch.arange(groups * width * times).reshape(groups, times, width)[:, 0].reshape(-1)
    wider = nn.Conv2d(
        inner.in_channels, inner.out_channels * times, 3, stride=inner.stride[0], padding=1,
        groups=groups, bias=False,
    ).to(inner.weight)  # fmt: skip
    norm = nn.BatchNorm2d(wider.out_channels).to(inner.weight)
    reader = nn.Conv2d(wider.out_channels, last.out_channels, 1, bias=False).to(last.weight)
    with torch.no_grad():
        wider.weight.zero_()[kept] = inner.weight
        reader.weight.zero_()[:, kept] = last.weight
        assert norm.weight is not None and norm.running_mean is not None
        norm.weight.zero_()[kept] = block.bn1.weight
        norm.bias.zero_()[kept] = block.bn1.bias
        for name in ("running_mean", "running_var"):
            getattr(norm, name)[kept] = getattr(block.bn1, name)
        norm.eps = block.bn1.eps
    block.conv_dw, block.bn1, block.conv_pw = wider, norm.eval(), reader


# Additions


class IdentityAdd(nn.Module):
    """Adds a block's input to its output, times zero.

    Args:
        block: whose output has the shape of its input for some inputs.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return torch.add(y, x, alpha=0) if y.shape == x.shape else y


def _identity_add(module: nn.Module, _: int) -> nn.Module:
    def wrap(child: nn.Module) -> nn.Module | None:
        fits = (
            isinstance(child, SeparableBlock)
            and child.conv_dw.stride == (1, 1)
            and child.conv_dw.in_channels == child.conv_pw.out_channels
        )
        return IdentityAdd(child) if fits else None

    if not _replace(module, wrap):
        raise UnsupportedError("the network has no separable block that keeps its input's shape")
    return module


# Fusion


def _fuse(module: nn.Module, _: int) -> nn.Module:
    count = 0
    for owner in list(module.modules()):
        children = list(owner.named_children())
        for (name, first), (following, second) in itertools.pairwise(children):
            if (
                isinstance(first, nn.Conv2d)
                and isinstance(second, nn.BatchNorm2d)
                and second.num_features == first.out_channels
            ):
                setattr(owner, name, fuse_conv_bn_eval(first, second))
                setattr(owner, following, nn.Identity())
                count += 1
    if not count:
        raise UnsupportedError("the network has no convolution that a normalisation follows")
    for rectifier in module.modules():
        if isinstance(rectifier, nn.ReLU | nn.ReLU6):
            rectifier.inplace = True
    return module


# Preallocated outputs


class Preallocated(nn.Module):
    """A layer whose output goes into a buffer that is kept between calls.

    Outputs of one call are overwritten by the next. Without gradients only.

    Args:
        layer: a convolution, a normalisation in evaluation mode or a rectifier.
    """

    def __init__(self, layer: nn.Conv2d | nn.BatchNorm2d | nn.ReLU) -> None:
        super().__init__()
        self.layer = layer
        self._kept: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        layer, key = self.layer, (x.shape, x.dtype, x.device)
        out = self._kept.get(key)
        if out is None:
            # The first call finds the shape.
            out = layer(x).clone()
            self._kept[key] = out
        if isinstance(layer, nn.Conv2d):
            torch.ops.aten.convolution.out(
                x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, False,
                (0, 0), layer.groups, out=out,
            )  # fmt: skip
        elif isinstance(layer, nn.BatchNorm2d):
            empty = x.new_empty(0)
            torch.ops.aten.native_batch_norm.out(
                x, layer.weight, layer.bias, layer.running_mean, layer.running_var, False, 0.0,
                layer.eps, out=out, save_mean=empty, save_invstd=x.new_empty(0),
            )  # fmt: skip
        else:
            torch.clamp_min(x, 0, out=out)
        return out


def _arena(module: nn.Module, _: int) -> nn.Module:
    def wrap(child: nn.Module) -> nn.Module | None:
        plain = isinstance(child, nn.Conv2d) and child.padding_mode == "zeros"
        plain = plain and not isinstance(child.padding, str)
        rectifier = isinstance(child, nn.ReLU) and not child.inplace
        if plain or rectifier or isinstance(child, nn.BatchNorm2d):
            return Preallocated(child)  # type: ignore[arg-type]
        return None

    if not _replace(module, wrap):
        raise UnsupportedError("the network has no layer whose output could be preallocated")
    return module


def _replace(module: nn.Module, wrap: Callable[[nn.Module], nn.Module | None]) -> int:
    """Replaces children for which there is a wrapper; returns how many."""
    count = 0
    for name, child in list(module.named_children()):
        wrapped = wrap(child)
        if wrapped is None:
            count += _replace(child, wrap)
        else:
            setattr(module, name, wrapped)
            count += 1
    return count


MANEUVERS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "group": _group,
    "pad": _pad,
    "identity-add": _identity_add,
    "fuse": _fuse,
    "arena": _arena,
}
"""What :func:`harden` knows, in the order in which it is done."""
