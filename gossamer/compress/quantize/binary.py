"""Networks of one bit: weights and activations in {-1, +1}, by eight published operators.

A binarized layer takes the sign of its input and of its weights, so that a dot product is an XNOR
and a popcount. Papers differ in three places only: the slope that stands in for the sign's zero
gradient, the scales that multiply the result, and what is done to values before their sign is
taken. Each operator here is one small class that says these three things; layers, training and
deployment are the same for all, which is what makes them comparable. Latent float weights are
trained; what is deployed is one bit a weight and runs in :mod:`gossamer.parts.binary_kernels`.

Source: Qin et al., "BiBench: Benchmarking and Analyzing Network Binarization", ICML 2023,
arXiv:2301.11233, and the authors' code where the paper is silent.

What differs from the code, each on purpose: linear layers of ReActNet take the sign of the shifted
input, and no layer drops its bias; the sign of 0 is +1; the spatial factors of XNOR++ are as large
as the layer's output; FDA's noise networks exist before the optimizer does, and noise is added in
training only (it is zero after the last epoch anyway); weights start from the real-valued
network's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gossamer.compress.distil import DistillationCriterion, module_of
from gossamer.core.errors import InputError
from gossamer.core.export import write_onnx
from gossamer.core.fit import Log, Supervised, fit
from gossamer.core.graph import Graph, GraphNetwork, level_of, op_name
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task, device_of, to_device
from gossamer.parts.binary_kernels import BinaryTensor
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.straight_through import straight_through

# Signs and the slopes that stand in for their gradient


def sign_of(x: Tensor) -> Tensor:
    """-1 or +1, and +1 for 0 (``torch.sign`` would let a third value through)."""
    return (x >= 0).to(x.dtype) * 2 - 1


def clipped_slope(x: Tensor) -> Tensor:
    """Slope 1 where ``|x| <= 1``, otherwise 0 (the straight-through estimator)."""
    return (x.abs() <= 1).to(x.dtype)


def polynomial_slope(x: Tensor) -> Tensor:
    """Slope of Bi-Real's ApproxSign, a parabola on each side: 2 at 0, falling to 0 at +-1.

    Source: Liu et al., "Bi-Real Net", arXiv:1808.00278, equation 9.
    """
    return (2 - 2 * x.abs()).clamp(min=0)


def fourier_slope(x: Tensor, order: int, frequency: float = 0.1) -> Tensor:
    """Slope of a square wave's Fourier series up to term ``order`` (included), 0 beyond +-1.

    ``(4 w / pi) sum_i cos((2 i + 1) w x)``, summed in closed form. At ``|x|`` = 1 the slope is
    kept; with many terms it is negative there, a known defect of the published frequency.

    Source: Xu et al., "Learning frequency domain approximation for binary neural networks",
    arXiv:2103.00841, equation 7.
    """
    angle = frequency * x
    terms = order + 1
    near = angle.abs() < 1e-4
    safe = torch.where(near, torch.ones_like(angle), angle)
    total = torch.where(near, float(terms), torch.sin(2 * terms * safe) / (2 * torch.sin(safe)))
    return 4 * frequency / math.pi * total * (x.abs() <= 1)


def signed(x: Tensor, slope: Tensor) -> Tensor:
    """The sign forward, ``slope`` times the gradient backward."""
    return straight_through(x, sign_of(x), slope)


# Schedules


def recu_tau(fraction: float) -> float:
    """ReCU's quantile tau: from 0.85 at the start of training to 0.99 at its end."""
    grow = 0.14 / (math.e - 1)
    return grow * math.exp(fraction) + 0.85 - grow


def recu_bound(weight: Tensor, tau: float) -> Tensor:
    """Where ReCU clips: the ``tau`` quantile of a Laplace distribution of the weights.

    Source: Xu et al., "ReCU: Reviving the dead weights in binary neural networks",
    arXiv:2103.12369, equation 12.
    """
    return -weight.abs().mean() * math.log(2 - 2 * tau)


def fourier_order(epoch: int, epochs: int) -> int:
    """Highest term of FDA's series in an epoch: 9 at first, 17 at last."""
    return 9 + int(9 * epoch / max(1, epochs))


def noise_share(epoch: int, epochs: int) -> float:
    """Share of FDA's noise networks in an epoch: exactly 0 in the last."""
    return 0.05 * (1 + math.cos(math.pi * (epoch + 1) / max(1, epochs)))


# Operators


class Operator(nn.Module):
    """How one layer binarizes its input and its weights; this one is BNN.

    Args:
        weight: the real-valued weights, ``[outputs, inputs]`` or
            ``[outputs, inputs / groups, height, width]``.
        inputs: channels of the layer's input.
        output_size: height and width of a convolution's output.

    Source: Hubara et al., "Binarized neural networks", arXiv:1602.02830.
    """

    learns_shift: ClassVar[bool] = False
    """Whether the shift added to the input before its sign is trained."""
    scales_input: ClassVar[bool] = False
    """Whether the result is multiplied by the mean magnitude of the input."""

    def __init__(self, weight: Tensor, inputs: int, output_size: Sequence[int]) -> None:
        super().__init__()
        self.convolution = weight.ndim == 4

    def activations(self, x: Tensor) -> Tensor:
        """The signs of the input."""
        return signed(x, clipped_slope(x))

    def weights(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """The signs of the weights and what multiplies the result, a number an output channel."""
        return signed(w, clipped_slope(w)), None

    def spatial(self) -> tuple[Tensor, Tensor] | None:
        """What multiplies the rows and the columns of a convolution's result, or None."""
        return None

    def set_progress(self, epoch: int, epochs: int) -> None:
        """Told at the start of each epoch (from 0)."""

    def _scaled(self, w: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Signs, and the scale per channel that makes them the nearest to ``w``."""
        scale = channel_means(w)
        if self.convolution:
            # In convolutions the published scale multiplies values only, not gradients. Here it
            # multiplies after the product, so its effect on the gradient is taken back.
            slope = slope / scale.clamp(min=1e-12).view(-1, 1, 1, 1)
        return signed(w, slope), scale


def channel_means(w: Tensor) -> Tensor:
    """Mean magnitude of each output channel, ``[outputs]``, without gradient.

    It is the ``a`` that minimises ``||w - a sign(w)||`` (Rastegari et al., arXiv:1603.05279,
    equation 6).
    """
    return w.detach().abs().flatten(1).mean(1)


def magnitude(x: Tensor, convolution: bool) -> Tensor:
    """Mean magnitude of each sample (of each vector before a linear layer), without gradient."""
    return x.detach().abs().mean((1, 2, 3) if convolution else -1, keepdim=True)


class Xnor(Operator):
    """XNOR-Net: scales of weights and of the input; linear layers centre each row of weights.

    As in the benchmark's code, a sample has one scale (XNOR-Net itself has a map of them).

    Source: Rastegari et al., "XNOR-Net", arXiv:1603.05279.
    """

    scales_input = True

    def activations(self, x: Tensor) -> Tensor:
        slope = clipped_slope(x)
        if self.convolution:
            slope = slope / magnitude(x, True).clamp(min=1e-12)  # as in Operator._scaled
        return signed(x, slope)

    def weights(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.convolution:
            w = w - w.mean(1, keepdim=True)
        return self._scaled(w, clipped_slope(w))


class DoReFa(Operator):
    """DoReFa at one bit, with a scale per channel as in the benchmark's code (DoReFa has one).

    Source: Zhou et al., "DoReFa-Net", arXiv:1606.06160.
    """

    def weights(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._scaled(w, clipped_slope(w))


class BiReal(DoReFa):
    """Bi-Real: the polynomial slope for activations.

    Its other half, a real-valued shortcut around every convolution, is the network's business.

    Source: Liu et al., "Bi-Real Net", arXiv:1808.00278.
    """

    def activations(self, x: Tensor) -> Tensor:
        return signed(x, polynomial_slope(x))


class XnorPlusPlus(Operator):
    """XNOR++: the result times learned factors of channel, row and column, all 1 at first.

    Source: Bulat and Tzimiropoulos, "XNOR-Net++", arXiv:1909.13863, section 3.2, case 4.
    """

    def __init__(self, weight: Tensor, inputs: int, output_size: Sequence[int]) -> None:
        super().__init__(weight, inputs, output_size)
        self.channel = nn.Parameter(torch.ones(len(weight)))
        if self.convolution:
            self.row = nn.Parameter(torch.ones(output_size[0]))
            self.column = nn.Parameter(torch.ones(output_size[1]))

    def weights(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().weights(w)[0], self.channel

    def spatial(self) -> tuple[Tensor, Tensor] | None:
        return (self.row, self.column) if self.convolution else None


class ReAct(BiReal):
    """ReActNet: Bi-Real after a learned shift per channel (see also :class:`RPReLU`).

    Source: Liu et al., "ReActNet", arXiv:2003.03488.
    """

    learns_shift = True


class ReCU(Operator):
    """ReCU: standardised weights, clipped at a quantile so that far ones still change sign.

    Source: Xu et al., "ReCU", arXiv:2103.12369.
    """

    tau = recu_tau(0.0)

    def __init__(self, weight: Tensor, inputs: int, output_size: Sequence[int]) -> None:
        super().__init__(weight, inputs, output_size)
        self.scale = nn.Parameter(torch.rand(len(weight)))

    def activations(self, x: Tensor) -> Tensor:
        if self.training:
            axes = (1, 2, 3) if self.convolution else -1
            x = x / (x.var(axes, keepdim=True) + 1e-5).sqrt()
        return signed(x, polynomial_slope(x))

    def weights(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = w.flatten(1)
        rows = rows - rows.mean(1, keepdim=True)
        rows = rows / ((rows.var(1, keepdim=True) + 1e-5).sqrt() / (2 * math.sqrt(2)))
        bound = recu_bound(rows.detach(), self.tau)
        rows = torch.minimum(torch.maximum(rows, -bound), bound)
        return straight_through(rows, sign_of(rows)).view_as(w), self.scale

    def set_progress(self, epoch: int, epochs: int) -> None:
        self.tau = recu_tau(epoch / max(1, epochs))


class NoiseNetwork(nn.Module):
    """FDA's correction of a slope: a narrow two-layer network plus a tenth of a sine.

    Args:
        width: length of the vectors it maps to themselves.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(1, width // (4 if width < 64 else 64))
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x))) + 0.1 * torch.sin(x)


class Fda(Operator):
    """FDA-BNN: slopes from a Fourier series that grows, and noise networks that fade.

    The networks map the channels of each position, and the row of weights of each output channel.

    Source: Xu et al., "Learning frequency domain approximation for binary neural networks",
    arXiv:2103.00841.
    """

    order = fourier_order(0, 1)
    share = noise_share(0, 1)

    def __init__(self, weight: Tensor, inputs: int, output_size: Sequence[int]) -> None:
        super().__init__(weight, inputs, output_size)
        self.input_noise = NoiseNetwork(inputs)
        self.weight_noise = NoiseNetwork(weight[0].numel())

    def activations(self, x: Tensor) -> Tensor:
        signs = signed(x, fourier_slope(x, self.order))
        if not self.training or self.share == 0:
            return signs
        last = x.movedim(1, -1) if self.convolution else x
        noise = self.share * self.input_noise(last)
        return signs + (noise.movedim(-1, 1) if self.convolution else noise)

    def weights(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        signs = signed(w, fourier_slope(w, self.order))
        if self.training and self.share != 0:
            signs = signs + self.share * self.weight_noise(w.flatten(1)).view_as(w)
        return signs, channel_means(w)

    def set_progress(self, epoch: int, epochs: int) -> None:
        self.order = fourier_order(epoch, epochs)
        self.share = noise_share(epoch, epochs)


Algorithm = Literal["bnn", "xnor", "dorefa", "bireal", "xnor++", "react", "recu", "fda"]

OPERATORS: dict[str, type[Operator]] = {
    "bnn": Operator,
    "xnor": Xnor,
    "dorefa": DoReFa,
    "bireal": BiReal,
    "xnor++": XnorPlusPlus,
    "react": ReAct,
    "recu": ReCU,
    "fda": Fda,
}


class RPReLU(nn.Module):
    """ReActNet's activation: a PReLU between two learned shifts, ``PReLU(x - g) + z``.

    Args:
        channels: of the second axis.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.zeros(channels))
        self.after = nn.Parameter(torch.zeros(channels))
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return self.prelu(x - self.before.view(shape)) + self.after.view(shape)


# Layers


class BinaryLayer(nn.Module):
    """A convolution or linear layer of signs, with latent float weights.

    The product of signs is computed first, as exact integers; scales and bias follow in one order,
    in training as in deployment, so that a packed kernel gives the same result to the bit.

    Args:
        weight: real-valued weights to start from, ``[outputs, inputs]`` or
            ``[outputs, inputs / groups, height, width]``.
        bias: ``[outputs]``, or None.
        algorithm: name of the operator.
        stride: of a convolution, as are the next four.
        padding: as of ``torch.nn.functional.conv2d``.
        dilation: steps between the taps.
        groups: of channels.
        pad_with: 0 (a third value, taken back by the packed kernel) or 1.
        output_size: height and width of a convolution's output; XNOR++ needs it.
        shift: added to the input's channels before anything else, ``[inputs]``, or None.

    Raises:
        InputError: if the algorithm is unknown.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        algorithm: str = "react",
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        pad_with: Literal[0, 1] = 0,
        output_size: Sequence[int] = (1, 1),
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        if algorithm not in OPERATORS:
            raise InputError(
                f"there is no binary operator {algorithm!r:.40}; there are {', '.join(OPERATORS)}"
            )
        if pad_with and isinstance(padding, str):
            raise InputError("padding with 1 needs the padding as numbers")
        inputs = weight.shape[1] * groups
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.operator = OPERATORS[algorithm](weight, inputs, output_size)
        shift = None if shift is None else shift.detach().clone()
        if self.operator.learns_shift:
            self.shift = nn.Parameter(torch.zeros(inputs) if shift is None else shift)
        else:
            self.register_buffer("shift", shift)
        self.geometry = _Geometry(
            tuple(stride), padding if isinstance(padding, str) else tuple(padding),
            tuple(dilation), groups, pad_with,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        operator = self.operator
        if self.shift is not None:
            x = x + _channels(self.shift, operator.convolution)
        weights, scale = operator.weights(self.weight)
        y = self.geometry.product(operator.activations(x), weights)
        if operator.scales_input:
            y = y * magnitude(x, operator.convolution)
        return _finish(y, scale, operator.spatial(), self.bias)

    def deployed(self) -> DeployedLayer:
        """The layer as it is after training: signs, one scale and one offset."""
        training = self.operator.training
        self.operator.eval()
        with torch.no_grad():
            signs, scale = self.operator.weights(self.weight)
        self.operator.train(training)
        return DeployedLayer(
            signs,
            shift=self.shift,
            scale=scale,
            spatial=self.operator.spatial(),
            offset=self.bias,
            scales_input=self.operator.scales_input,
            geometry=self.geometry,
        )


@dataclass(frozen=True)
class _Geometry:
    """How a product of signs is taken; of no meaning for linear layers."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    pad_with: int

    def product(self, a: Tensor, w: Tensor) -> Tensor:
        if w.ndim == 2:
            return F.linear(a, w)
        padding = self.padding
        if self.pad_with and not isinstance(padding, str):
            vertical, horizontal = padding * 2 if len(padding) == 1 else padding
            a = F.pad(a, (horizontal, horizontal, vertical, vertical), value=float(self.pad_with))
            padding = (0, 0)
        return F.conv2d(a, w, None, self.stride, padding, self.dilation, self.groups)


def _channels(values: Tensor, convolution: bool) -> Tensor:
    return values.view(-1, 1, 1) if convolution else values


def _finish(
    y: Tensor,
    scale: Tensor | None,
    spatial: tuple[Tensor, Tensor] | None,
    offset: Tensor | None,
) -> Tensor:
    convolution = y.ndim == 4
    if scale is not None:
        y = y * _channels(scale, convolution)
    if spatial is not None:
        rows, columns = spatial
        y = y * (rows.view(-1, 1) * columns)
    return y if offset is None else y + _channels(offset, convolution)


class DeployedLayer(nn.Module):
    """A trained binary layer: nothing but signs, a scale and an offset are left.

    Args:
        signs: -1 and +1, shaped as the weights.
        shift: added to the input, ``[inputs]``, or None.
        scale: multiplies the product, ``[outputs]``, or None.
        spatial: multiply its rows, ``[height]``, and columns, ``[width]``, or None.
        offset: added last, ``[outputs]``, or None.
        scales_input: also multiply by the mean magnitude of the input.
        geometry: of a convolution.
    """

    def __init__(
        self,
        signs: Tensor,
        *,
        shift: Tensor | None,
        scale: Tensor | None,
        spatial: tuple[Tensor, Tensor] | None,
        offset: Tensor | None,
        scales_input: bool,
        geometry: _Geometry,
    ) -> None:
        super().__init__()

        def held(values: Tensor | None) -> nn.Parameter | None:
            return None if values is None else nn.Parameter(values.detach().clone())

        self.weight = nn.Parameter(signs.detach().clone(), requires_grad=False)
        self.shift, self.scale, self.offset = held(shift), held(scale), held(offset)
        self.rows, self.columns = (held(v) for v in spatial or (None, None))
        self.scales_input = scales_input
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        convolution = self.weight.ndim == 4
        if self.shift is not None:
            x = x + _channels(self.shift, convolution)
        y = self.geometry.product(sign_of(x), self.weight)
        if self.scales_input:
            y = y * x.abs().mean((1, 2, 3) if convolution else -1, keepdim=True)
        spatial = None
        if self.rows is not None and self.columns is not None:
            spatial = (self.rows, self.columns)
        return _finish(y, self.scale, spatial, self.offset)

    def absorb(self, factor: Tensor, offset: Tensor) -> None:
        """Takes in an affine function per channel that follows (a batch normalisation)."""
        old = torch.zeros_like(offset) if self.offset is None else self.offset.detach()
        self.offset = nn.Parameter(old * factor + offset)
        self.scale = nn.Parameter(factor if self.scale is None else self.scale.detach() * factor)


# Networks


@dataclass(frozen=True)
class Site:
    """A layer of a traced network that can be binarized.

    Attributes:
        node: its operator.
        weight: name of its weights, as the original modules gave it.
        module: name of the layer: the weight's without its last part.
    """

    node: fx.Node
    weight: str
    module: str


_LAYERS = {"linear": 2, "conv2d": 4}
KEPT = ("first", "last", "downsample")
"""What stays float by default: the layers that are first and last in execution order, and the
1 x 1 convolutions of shortcuts that change shape."""


def sites(graph: Graph) -> list[Site]:
    """The convolutions and linear layers of a traced network, in execution order.

    Layers whose weights are computed, shared or not of shape ``[outputs, inputs, ...]`` are none.
    """
    found = []
    for node in graph.fx.nodes:
        kind = op_name(node.target) if node.op == "call_function" else ""
        weight = node.args[1] if kind in _LAYERS and len(node.args) > 1 else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) > 1:
            continue
        if graph.tensors[str(weight.target)].ndim != _LAYERS[kind]:
            continue
        name = str(weight.target)
        found.append(Site(node, name, name.rpartition(".")[0] or name))
    return found


def chosen(
    found: Sequence[Site],
    graph: Graph,
    *,
    keep: Collection[str] = KEPT,
    skip: Collection[str] = (),
) -> list[Site]:
    """Which layers are binarized.

    Args:
        found: all of them, in execution order.
        graph: the traced network.
        keep: kinds that stay float, of :data:`KEPT`.
        skip: modules that stay float, with everything below them.

    Raises:
        InputError: if a kind or a module is unknown, or no layer is left.
    """
    if unknown := [kind for kind in keep if kind not in KEPT]:
        raise InputError(f"keep cannot hold {unknown[0]!r:.40}; it takes {', '.join(KEPT)}")
    for name in skip:
        if not any(_below(site.module, name) for site in found):
            raise InputError(f"there is no layer {name!r:.80} to skip")
    out = {id(site) for site in found if any(_below(site.module, name) for name in skip)}
    if "first" in keep:
        out |= {id(site) for site in found[:1]}
    if "last" in keep:
        out |= {id(site) for site in found[-1:]}
    if "downsample" in keep:
        out |= {id(site) for site in found if _is_shortcut(site, graph)}
    left = [site for site in found if id(site) not in out]
    if not left:
        raise InputError("the network has no layer to binarize beside those that stay float")
    return left


def _below(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def _is_shortcut(site: Site, graph: Graph) -> bool:
    weight = site.node.args[1]
    assert isinstance(weight, fx.Node)
    if graph.tensors[str(weight.target)].shape[2:] != (1, 1):
        return False
    stride: Any = site.node.args[3] if len(site.node.args) > 3 else (1, 1)
    return max(stride) > 1 or bool({"shortcut", "downsample"} & set(site.module.split(".")))


def binarized(
    network: nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    algorithm: str = "react",
    keep: Collection[str] = KEPT,
    skip: Collection[str] = (),
    pad_with: Literal[0, 1] = 0,
    centre: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> GraphNetwork:
    """A copy of a network whose layers are binary ones, to be trained.

    The copy runs the traced graph, so layers are found whatever code calls them.

    Args:
        network: real-valued; unchanged.
        example_inputs: for tracing it.
        algorithm: name of the operator.
        keep: kinds of layers that stay float, see :data:`KEPT`.
        skip: modules that stay float, with everything below them.
        pad_with: value of the padding of binary convolutions.
        centre: inputs of the network; if given, every binary layer shifts its input by the means
            that its channels have on them. After a ReLU nothing is negative and without a shift
            every sign would be +1.
        seed: of learned scales and noise networks.

    Raises:
        InputError: if nothing is left to binarize, or an option is unknown.
        UnsupportedError: if the network cannot be traced.
    """
    graph = _traced(network, example_inputs)
    layers = chosen(sites(graph), graph, keep=keep, skip=skip)
    shifts = {} if centre is None else _input_means(graph, layers, centre)
    made = copy.deepcopy(graph.network())
    nodes = {node.name: node for node in made.program.graph.nodes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for site in layers:
            node = nodes[site.node.name]
            layer = _binary_layer(graph, site, algorithm, pad_with, shifts.get(site.node.name))
            _put(made.program, node, layer)
    made.program.graph.lint()
    made.program.recompile()
    return made


def _traced(network: nn.Module, example_inputs: Sequence[Tensor]) -> Graph:
    """The graph of a network, its tensors named as the original modules named them."""
    graph = Graph.trace(network, example_inputs)
    level = level_of(network)
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(level)
    graph.tensors = {name.removeprefix(level): t for name, t in graph.tensors.items()}
    graph.kinds = {name.removeprefix(level): kind for name, kind in graph.kinds.items()}
    return graph


def _input_means(
    graph: Graph, layers: Sequence[Site], inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Minus the mean of each channel of each layer's input, by node."""
    wanted = {site.node.name for site in layers}
    means: dict[str, Tensor] = {}

    class Listening(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.name in wanted:
                x = self.env[n.all_input_nodes[0]]
                axis = 1 if op_name(n.target) == "conv2d" else x.ndim - 1
                means[n.name] = -x.mean([a for a in range(x.ndim) if a != axis])
            return super().run_node(n)

    network = graph.network().eval()
    with torch.no_grad():
        Listening(network.program).run(*to_device(tuple(inputs), device_of(network)), False)
    return means


def _binary_layer(
    graph: Graph, site: Site, algorithm: str, pad_with: Literal[0, 1], shift: Tensor | None
) -> BinaryLayer:
    node = site.node
    arguments = [*node.args, *[None] * (7 - len(node.args))]
    weight, bias = (
        graph.tensors[str(a.target)] if isinstance(a, fx.Node) else None for a in arguments[1:3]
    )
    assert weight is not None
    shape = graph.shape(node)
    assert shape is not None

    def pair(value: Any, default: int) -> tuple[int, ...]:
        value = [default] if value is None else list(value)
        return tuple(value * 2 if len(value) == 1 else value)

    padding = arguments[4]
    return BinaryLayer(
        weight,
        bias,
        algorithm=algorithm,
        stride=pair(arguments[3], 1),
        padding=padding if isinstance(padding, str) else pair(padding, 0),
        dilation=pair(arguments[5], 1),
        groups=arguments[6] or 1,
        pad_with=pad_with,
        output_size=shape[2:],
        shift=shift,
    )


def _put(program: fx.GraphModule, node: fx.Node, layer: nn.Module) -> None:
    """Puts a layer in the place of an operator, under the name of the module that ran it."""
    graph = program.graph
    tensors = [a for a in node.args[1:3] if isinstance(a, fx.Node)]
    path, _, leaf = str(tensors[0].target).rpartition(".")
    owner = program.get_submodule(path)
    held = {str(a.target).removeprefix(f"{path}.") for a in tensors}
    if path and set(owner._parameters) == held and not owner._modules and not owner._buffers:
        place = path
    else:  # other tensors live there too
        place = f"{path}.{leaf}_binary".removeprefix(".")
    with graph.inserting_before(node):
        new = graph.call_module(place, (node.args[0],))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for tensor in tensors:
        if not tensor.users:
            graph.erase_node(tensor)
            program.get_submodule(path)._parameters.pop(str(tensor.target).rpartition(".")[2], None)
    program.set_submodule(place, layer)


def binary_layers(network: nn.Module) -> dict[str, BinaryLayer]:
    """The layers that are being trained, by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, BinaryLayer)}


def set_progress(network: nn.Module, epoch: int, epochs: int) -> None:
    """Tells every operator at the start of an epoch (from 0) how far training is."""
    for layer in binary_layers(network).values():
        layer.operator.set_progress(epoch, epochs)


class BinaryTraining(Supervised):
    """Plain training that also tells the operators which epoch it is."""

    def step(self, batch: Batch) -> Log:
        set_progress(self.network, self.run.epoch, self.run.epochs)
        return super().step(batch)


# Deployment


def deployed(network: GraphNetwork) -> GraphNetwork:
    """A trained network as it is deployed: signs, and one scale and offset for each layer.

    A batch normalisation that follows a binary layer directly becomes part of its scale and offset.

    Args:
        network: made by :func:`binarized`; unchanged.

    Raises:
        InputError: if it has no binary layers.
    """
    if not binary_layers(network):
        raise InputError("the network has no binary layers to deploy")
    made = copy.deepcopy(network).cpu().eval()
    program = made.program
    for name, layer in binary_layers(program).items():
        program.set_submodule(name, layer.deployed())
    for node in list(program.graph.nodes):
        layer = _layer_of(program, node)
        if layer is None or len(node.users) != 1 or not _channels_second(node, layer):
            continue
        (norm,) = node.users
        if norm.op == "call_function" and op_name(norm.target) == "batch_norm":
            affine = _affine(program, norm)
            if affine is not None:
                layer.absorb(*affine)
                norm.replace_all_uses_with(node)
                program.graph.erase_node(norm)
    for node in reversed(list(program.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    program.graph.lint()
    program.recompile()
    program.delete_all_unused_submodules()
    return made


def _layer_of(program: fx.GraphModule, node: fx.Node) -> DeployedLayer | None:
    layer = program.get_submodule(str(node.target)) if node.op == "call_module" else None
    return layer if isinstance(layer, DeployedLayer) else None


def _channels_second(node: fx.Node, layer: DeployedLayer) -> bool:
    """Whether a layer's outputs are the second axis, which is what a batch normalisation scales.

    Those of a linear layer are the last one, behind time steps or tokens.
    """
    value = node.meta.get("val")
    return layer.weight.ndim == 4 or (isinstance(value, Tensor) and value.ndim == 2)


def _affine(program: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Factor and offset of a batch normalisation in evaluation mode; None without statistics."""

    def value(node: Any) -> Tensor | None:
        if not isinstance(node, fx.Node):
            return None
        path, _, leaf = str(node.target).rpartition(".")
        return getattr(program.get_submodule(path), leaf).detach().double()

    weight, bias, mean, variance = map(value, norm.args[1:5])
    if mean is None or variance is None:
        return None
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)
    factor = (variance + epsilon).rsqrt()
    factor = factor if weight is None else factor * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    return factor.float(), offset.float()


def packed(network: GraphNetwork) -> PackedNetwork:
    """A deployed network as it is stored: one bit a binary weight.

    ``packed(network).runner(network, inputs)`` runs it, with the compiled kernel in the place of
    every binary layer.

    Args:
        network: made by :func:`deployed`.
    """
    signs = {
        f"{name}.weight": BinaryTensor.of(layer.weight)
        for name, layer in network.named_modules()
        if isinstance(layer, DeployedLayer)
    }
    return PackedNetwork.of(network, signs)


def binarize(
    network: Network,
    task: Task,
    *,
    algorithm: Algorithm = "react",
    keep: Collection[str] = KEPT,
    skip: Collection[str] = (),
    centre: bool = True,
    epochs: int = 40,
    batch_size: int = 128,
    lr: float = 1e-3,
    teacher: nn.Module | Network | None = None,
    weight: float = 0.0,
    temperature: float = 2.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a network of one bit, starting from its real-valued weights (a step of a recipe).

    It belongs at the end of a recipe: what it gives is a deployed network, of which later steps
    could only train scales and what stayed float.

    Args:
        network: trained; unchanged.
        task: its data.
        algorithm: name of the binary operator.
        keep: kinds of layers that stay float, see :data:`KEPT`.
        skip: modules that stay float, with everything below them.
        centre: shift the input of every binary layer by its channels' means on a training batch,
            without which nothing is left of an input that comes out of a ReLU. The benchmark itself
            does not; its networks have Hardtanh there.
        epochs: passes over the training split.
        batch_size: samples a batch.
        lr: learning rate of Adam at the start; falls to 0 along half a cosine.
        teacher: a trained network for the same task; looked at if ``weight`` is above 0.
        weight: share of the teacher in the loss (the benchmark has no teacher).
        temperature: of the teacher's answers.
        seed: of data order, learned scales and noise networks.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The deployed network. Its packed form holds one bit a binary weight and runs in a compiled
        kernel; its ONNX file computes the same with float32 signs.

    Raises:
        InputError: if nothing is left to binarize, or an option cannot be.
    """
    if not 0.0 <= weight <= 1.0:
        raise InputError(f"the teacher's share of the loss is 0 to 1, not {weight:g}")
    if not lr > 0.0:
        raise InputError(f"the learning rate is above 0, not {lr:g}")
    centring = None
    if centre:
        batch = next(iter(task.batches("train", batch_size=max(batch_size, 128), seed=seed)))
        centring = task.inputs(batch)
    student = binarized(
        network.module, network.example_inputs, algorithm=algorithm, keep=keep, skip=skip,
        centre=centring, seed=seed,
    )  # fmt: skip
    criterion = None
    if weight > 0.0:
        guide = module_of(teacher, "binarize")
        criterion = DistillationCriterion(task, guide, temperature=temperature, weight=weight)
    rule = BinaryTraining(
        student,
        task,
        optimizer=torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=lr),
        criterion=criterion,
    )
    history = fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title=f"binarizing ({algorithm})",
    )
    made = deployed(student.cpu())
    stored = packed(made)
    options = {
        "algorithm": algorithm, "keep": list(keep), "skip": list(skip), "centre": centre,
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight": weight,
        "temperature": temperature, "seed": seed,
    }  # fmt: skip
    report = {
        "loss": history.loss[-1] if history.loss else None,
        "binary_tensors": list(stored.tensors),
        "packed_bytes": stored.nbytes(),
        "plain_bytes": stored.plain_nbytes(),
    }
    return network.after(
        "binarize",
        options,
        report,
        module=made,
        storage=dict.fromkeys(stored.tensors, "binary"),
        runtime="packed",
        packed=stored,
        # A rounding error can flip a sign, so the file is judged by its decisions, not its numbers.
        write_onnx=partial(_write_onnx, made, network.example_inputs),
    )


def _write_onnx(module: nn.Module, example_inputs: tuple[Tensor, ...], path: Path) -> None:
    write_onnx(Network(module, example_inputs), path)


# The six tracks


def overall(items: Iterable[Sequence[float]]) -> float:
    """The quadratic mean over the items of a track of their members' arithmetic means.

    Args:
        items: the ratios of each item of the track (a data set, an architecture, a corruption).

    Source: BiBench, section 3.
    """
    means = [float(np.mean(ratios)) for ratios in items]
    if not means:
        raise InputError("a track without items has no overall metric")
    return math.sqrt(float(np.mean(np.square(means))))


def accuracy_ratio(binary: float, real: float) -> float:
    """A member of the tracks of tasks and architectures: what is left of the accuracy."""
    return binary / real


def robustness_ratio(
    real_clean: float,
    real_corrupted: float,
    binary_clean: float,
    binary_corrupted: float,
    *,
    floor: float = 0.1,
) -> float:
    """A member of the corruption track: what the float network loses over what the binary loses.

    Above 1 the binary network is the more robust one.

    Args:
        real_clean: accuracy of the float network on clean data, percent.
        real_corrupted: on corrupted data.
        binary_clean: of the binary network on clean data.
        binary_corrupted: on corrupted data.
        floor: least loss, percentage points; a network that lost nothing has no ratio.
    """
    real = max(real_clean - real_corrupted, floor)
    return real / max(binary_clean - binary_corrupted, floor)


def training_metric(
    seconds: Sequence[tuple[float, float]], real: Sequence[float], binary: Sequence[float],
    *, floor: float = 0.1,
) -> float:  # fmt: skip
    """The training track: time ratios and the spread of accuracy over training configurations.

    Args:
        seconds: of each configuration, for the float and for the binary network.
        real: accuracy of the float network under each configuration, percent.
        binary: of the binary network.
        floor: least standard deviation, percentage points.
    """
    times = [float_time / binary_time for float_time, binary_time in seconds]
    spread = max(float(np.std(real)), floor) / max(float(np.std(binary)), floor)
    return overall([times, [spread]])


def storage_ratio(elements: float, real_elements: float) -> float:
    """How many times smaller a network is whose elements take one bit, but for some of 32."""
    return elements / ((elements - real_elements) / 32 + real_elements)


def operation_ratio(operations: float, real_operations: float) -> float:
    """How many times fewer operations it takes if 64 binary ones count as one (a bound)."""
    return operations / ((operations - real_operations) / 64 + real_operations)


def complexity(network: GraphNetwork, example_inputs: Sequence[Tensor]) -> dict[str, float]:
    """The complexity track of a deployed network, counted.

    What the operators add (scales, offsets, shifts) counts as float parameters; multiplying by
    them is no multiply-accumulate and does not count, as nowhere in gossamer.

    Returns:
        ``parameters``, ``real_parameters``, ``macs``, ``real_macs``, ``storage_ratio``,
        ``operation_ratio`` and ``overall``.
    """
    graph = Graph.trace(network, example_inputs)
    names = {
        f"{name}.weight"
        for name, layer in network.named_modules()
        if isinstance(layer, DeployedLayer)
    }
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    parameters = sum(sizes.values())
    real = sum(size for name, size in sizes.items() if name not in names)
    real_macs = sum(op.macs for op in graph.operators if not names & set(op.weights))
    r_c, r_s = storage_ratio(parameters, real), operation_ratio(graph.macs, real_macs)
    return {
        "parameters": parameters,
        "real_parameters": real,
        "macs": graph.macs,
        "real_macs": real_macs,
        "storage_ratio": r_c,
        "operation_ratio": r_s,
        "overall": overall([[r_c], [r_s]]),
    }
