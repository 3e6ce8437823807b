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
import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gossamer.core.errors import InputError, UnsupportedError, first_line
from gossamer.models.mobilenet import MobileNet, SeparableBlock, mobilenet_v1
from gossamer.parts.regroup import depthwise, regroup

log = logging.getLogger(__name__)


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
    inplace: dict[nn.Module, bool] = {}
    for owner in list(module.modules()):
        nodes = _calls(owner)
        times = Counter(node.target for node in nodes if node.op == "call_module")
        called = {n: owner.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"}
        for node, layer in called.items():
            before = node.args[0] if node.args else None
            if not isinstance(before, fx.Node) or len(before.users) > 1:
                continue  # somebody else reads it
            first = called.get(before)
            if (
                isinstance(first, nn.Conv2d)
                and isinstance(layer, nn.BatchNorm2d)
                and layer.running_mean is not None
                and times[before.target] == times[node.target] == 1
            ):
                owner.set_submodule(str(before.target), fuse_conv_bn_eval(first, layer))
                owner.set_submodule(str(node.target), nn.Identity())
                count += 1
        for node, layer in called.items():
            if isinstance(layer, nn.ReLU | nn.ReLU6):
                safe = _is_fresh(node.args[0] if node.args else None, called)
                inplace[layer] = inplace.get(layer, True) and safe
    if not count:
        raise UnsupportedError("the network has no convolution that a normalisation follows")
    for rectifier, safe in inplace.items():
        if safe:
            rectifier.inplace = True  # type: ignore[assignment]
    return module


class _Children(fx.Tracer):
    """Traces one module; what it calls is one node each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _calls(owner: nn.Module) -> list[fx.Node]:
    """What a module calls, in order; nothing where that depends on its input."""
    if not any(True for _ in owner.children()) or isinstance(owner, nn.ModuleList | nn.ModuleDict):
        return []
    try:
        return list(_Children().trace(owner).nodes)
    except Exception as error:  # any code may run here
        log.info("%s is left as it is: %s", type(owner).__name__, first_line(error))
        return []


def _is_fresh(value: Any, called: dict[fx.Node, nn.Module]) -> bool:
    """Whether a value was made just now and has one reader, so that it may be overwritten."""
    if not isinstance(value, fx.Node) or len(value.users) > 1:
        return False
    if value.op == "call_function":
        return value.target in (operator.add, torch.add, torch.cat)
    return isinstance(called.get(value), nn.Conv2d | nn.BatchNorm2d)


# Preallocated outputs


class Preallocated(nn.Module):
    """A layer whose output goes into a buffer that is kept between calls.

    Outputs of one pass are overwritten by the next (:func:`harden` marks where a pass begins); a
    layer that is called several times in a pass has a buffer for each. Without gradients only.

    Args:
        layer: a convolution, a normalisation in evaluation mode or a rectifier.
    """

    def __init__(self, layer: nn.Conv2d | nn.BatchNorm2d | nn.ReLU) -> None:
        super().__init__()
        self.layer = layer
        self._kept: dict[tuple[int, torch.Size, torch.dtype, torch.device], Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        layer, key = self.layer, (self.calls, x.shape, x.dtype, x.device)
        self.calls += 1
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
    module.register_forward_pre_hook(_begin_pass)
    return module


def _begin_pass(module: nn.Module, _: Any) -> None:
    for layer in module.modules():
        if isinstance(layer, Preallocated):
            layer.calls = 0


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
