"""Changes how the convolutions of an existing network are cut into groups.

A depthwise convolution has one channel in a group; more channels a group cost more arithmetic and
reuse each value more often (E2GC, arXiv:2006.15100; DRACO, arXiv:2006.15103). The new kernels
start afresh, or from the old ones: a group convolution is a dense one whose kernel is
block-diagonal, so wider groups that contain the old ones hold the old network exactly, with zeros
where the new connections are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import GraphNetwork, argument, level_of, op_name
from gossamer.core.groups import group_count, warn_of_remainders
from gossamer.core.layers import Layer

log = logging.getLogger(__name__)

Select = Callable[[Layer], bool]
"""Which convolutions: asked with name, channels, features, groups and kernel filled."""


def grouped(layer: Layer) -> bool:
    """Whether a layer is a convolution of more than one group, depthwise ones among them."""
    return layer.kind == "convolution" and layer.groups > 1


def depthwise(layer: Layer) -> bool:
    """Whether each group of a convolution has one input channel."""
    return layer.depthwise


def spatial(layer: Layer) -> bool:
    """Whether a layer is a convolution of more than one tap and channel, of any groups."""
    return layer.kind == "convolution" and layer.taps > 1 and layer.channels > 3


@dataclass(frozen=True)
class Converted:
    """What became of one convolution.

    Attributes:
        name: of the module (of its weight, without the last part).
        channels: input channels of all groups.
        before: groups it had.
        groups: groups it has.
        kept: whether it started as exactly the old layer.
    """

    name: str
    channels: int
    before: int
    groups: int
    kept: bool

    @property
    def group_width(self) -> int:
        """Input channels of one group now."""
        return self.channels // self.groups


def regroup(
    module: nn.Module,
    *,
    group_width: int | None = None,
    groups: int | None = None,
    select: Select = grouped,
    warm_start: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, list[Converted]]:
    """A copy of a network whose 2-D convolutions have another number of groups.

    Args:
        module: unchanged.
        group_width: channels of one group in every layer (E2GC: constant width). Where it does not
            divide a layer's channels, the largest width below it that does, with a warning.
        groups: a constant number of groups in every layer instead (FgGC, as in ResNeXt); a layer of
            fewer channels has one for each.
        select: which convolutions.
        warm_start: the new kernels hold the old connections, as far as they lie inside the new
            groups, and zeros elsewhere. Where groups only become wider, the network computes
            exactly what it did; a layer whose groups become narrower loses connections, with a
            warning. Otherwise kernels are drawn (He, normal) and biases are zero.
        seed: of the drawn kernels.

    Returns:
        The network, and what became of each convolution.

    Raises:
        InputError: if not exactly one of width and number is given, or it is below 1.
        UnsupportedError: if no convolution is selected.
    """
    group_count(1, 1, group_width=group_width, groups=groups)  # refuses impossible wishes
    network = copy.deepcopy(module)
    places = [place for place in _places(network) if select(place.layer)]
    if not places:
        raise UnsupportedError("the network has no convolution whose groups could be changed")
    generator = torch.Generator().manual_seed(seed)
    converted = []
    for place in places:
        layer = place.layer
        count = group_count(layer.channels, layer.features, group_width=group_width, groups=groups)
        old = place.weight.detach()
        kept = False
        if warm_start:
            new, lost = regrouped_kernel(old, layer.groups, count)
            kept = not lost
            if lost:
                log.warning("%s loses connections: its groups become narrower", layer.name)
        else:
            shape = (old.shape[0], layer.channels // count, *old.shape[2:])
            drawn = torch.empty(shape)
            nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
            new = drawn.to(old)
        place.give(nn.Parameter(new, requires_grad=place.weight.requires_grad), count)
        if not warm_start and place.bias is not None:
            nn.init.zeros_(place.bias)
        converted.append(Converted(layer.name, layer.channels, layer.groups, count, kept))
    if isinstance(network, GraphNetwork):
        network.program.recompile()
    warn_of_remainders(
        {c.name: (c.channels, c.groups) for c in converted}, group_width=group_width, groups=groups
    )
    return network, converted


def regrouped_kernel(kernel: Tensor, before: int, groups: int) -> tuple[Tensor, bool]:
    """The kernel of another number of groups that has the same connections, where it can.

    Args:
        kernel: ``[features, channels / before, height, width]``.
        before: groups it has.
        groups: groups it shall have.

    Returns:
        The kernel ``[features, channels / groups, height, width]``, and whether connections that
        are not zero were lost (they cross the new groups).

    Raises:
        InputError: if a number of groups does not divide features and channels.
    """
    features, channels = kernel.shape[0], kernel.shape[1] * before
    if features % before or features % groups or channels % groups:
        raise InputError(
            f"{features} outputs and {channels} inputs cannot be cut into {before} and {groups} "
            "groups"
        )
    taps = kernel.shape[2:]
    row = torch.arange(features, device=kernel.device)
    dense = kernel.new_zeros(features, before, channels // before, *taps)
    dense[row, row // (features // before)] = kernel
    blocks = dense.reshape(features, groups, channels // groups, *taps)
    new = blocks[row, row // (features // groups)].clone()
    return new, bool(new.count_nonzero() < kernel.count_nonzero())


@dataclass(frozen=True)
class _Place:
    """A convolution inside a network, and how it is given another kernel."""

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    give: Callable[[nn.Parameter, int], None]


def _places(network: nn.Module) -> list[_Place]:
    level = level_of(network)
    places = [
        _of_module(name.removeprefix(level), layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d)
        and not isinstance(layer, nn.LazyConv2d)
        # A parametrised weight is computed anew for every pass and is no parameter.
        and layer._parameters.get("weight") is not None
    ]
    if isinstance(network, GraphNetwork):
        # Its tensors lie one level down, where its own graph finds them.
        program = network.program
        found = (_of_node(program, n) for n in program.graph.nodes if n.op == "get_attr")
        places += [place for place in found if place is not None]
    return places


def _of_module(name: str, layer: nn.Conv2d) -> _Place:
    def give(weight: nn.Parameter, groups: int) -> None:
        layer.weight = weight
        layer.groups = groups

    shape = _layer(name, layer.weight, layer.groups)
    return _Place(shape, layer.weight, layer.bias, give)


def _of_node(program: fx.GraphModule, node: fx.Node) -> _Place | None:
    """The convolutions of a graph that read one weight, as they share their groups."""
    readers = [n for n in node.users if op_name(n.target) == "conv2d" and n.args[1] is node]
    if not readers or len(readers) < len(node.users):
        return None
    counts = {int(argument(reader, 6, "groups", 1)) for reader in readers}
    path, _, leaf = str(node.target).rpartition(".")
    owner = program.get_submodule(path)
    weight = owner._parameters.get(leaf)
    if weight is None or weight.ndim != 4 or len(counts) > 1:
        return None
    bias = argument(readers[0], 2, "bias")
    tensor = None
    if isinstance(bias, fx.Node) and bias.op == "get_attr":
        tensor = dict(program.named_parameters()).get(str(bias.target))

    def give(new: nn.Parameter, groups: int) -> None:
        owner._parameters[leaf] = new
        node.meta.pop("val", None)
        for reader in readers:
            given = [argument(reader, place, name, default) for place, name, default in _ARGUMENTS]
            reader.args = (*reader.args[:2], *given, groups)
            reader.kwargs = {}

    return _Place(_layer(path, weight, counts.pop()), weight, tensor, give)


_ARGUMENTS = ((2, "bias", None), (3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _layer(name: str, weight: Tensor, groups: int) -> Layer:
    features, width, *kernel = weight.shape
    return Layer(
        name, name, "convolution", width * groups, features, groups, (kernel[0], kernel[1]),
        weight=f"{name}.weight",
    )  # fmt: skip
