"""The layers of a graph that multiply: convolutions, linear layers and products, by their shapes.

What a model of hardware needs to know of an operator is how many channels, positions, taps and
groups it has. A linear layer is a convolution of one tap over its tokens; a product of two
activations (attention) is one whose weights are an activation, with a group for each matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from gossamer.core.graph import Graph, Operator, argument, module_of, op_name

Kind = Literal["convolution", "linear", "product"]


@dataclass(frozen=True)
class Layer:
    """One operator that multiplies, for one sample.

    Attributes:
        name: of its node in the graph.
        module: dotted path of the innermost module that ran it.
        kind: "convolution", "linear", or "product" of two activations.
        channels: input channels of all groups.
        features: output channels of all groups.
        groups: how many groups the channels are cut into.
        kernel: taps, height and width.
        stride: height and width.
        padding: zeros on each side, height and width.
        dilation: height and width.
        input_size: height and width of the input; a linear layer has its tokens and 1.
        output_size: height and width of the output.
        bias: whether it adds one.
        weight: state-dict name of its weight; None for a product of activations.
    """

    name: str
    module: str
    kind: Kind
    channels: int
    features: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    input_size: tuple[int, int] = (1, 1)
    output_size: tuple[int, int] = (1, 1)
    bias: bool = False
    weight: str | None = None

    @property
    def group_width(self) -> int:
        """Input channels of one group."""
        return self.channels // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether each group has one input channel, and there are several groups."""
        return self.kind == "convolution" and self.groups > 1 and self.group_width == 1

    @property
    def taps(self) -> int:
        """Height times width of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def positions(self) -> int:
        """Output positions."""
        return self.output_size[0] * self.output_size[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.positions * self.weights

    @property
    def weights(self) -> int:
        """Elements of the weight, without the bias; of a product, those of its second factor."""
        return self.taps * self.group_width * self.features

    @property
    def input_elements(self) -> int:
        """Elements of the input of one sample."""
        return self.channels * self.input_size[0] * self.input_size[1]

    @property
    def output_elements(self) -> int:
        """Elements of the output of one sample."""
        return self.features * self.positions

    def elements(self, batch: int = 1) -> int:
        """Elements that have to move: input, weights and output, each once.

        Args:
            batch: samples; weights are read once for all of them, a product's second factor is
                another one for each.
        """
        weights = self.weights + (self.features if self.bias else 0)
        return (
            batch * (self.input_elements + self.output_elements)
            + (batch if self.kind == "product" else 1) * weights
        )


def layers(graph: Graph) -> list[Layer]:
    """The layers that multiply, in execution order.

    Attention that is one operator becomes its two products. An operator that multiplies and has
    no such form is left out: see :func:`unmodelled`.
    """
    return [layer for node in graph.fx.nodes for layer in _layers_of(graph, node)]


def unmodelled(graph: Graph) -> list[Operator]:
    """Operators that multiply and are not among :func:`layers`, as 3-D convolutions."""
    known = {node.name for node in graph.fx.nodes if _layers_of(graph, node)}
    return [op for op in graph.operators if op.macs and op.name not in known]


def _layers_of(graph: Graph, node: fx.Node) -> list[Layer]:
    if node.op != "call_function":
        return []
    name = op_name(node.target)
    if name in ("conv1d", "conv2d", "convolution"):
        return _convolution(graph, node)
    if name == "linear":
        return [_linear(graph, node)]
    if name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "mv"):
        return [_product(graph, node, 1 if name in ("addmm", "baddbmm") else 0)]
    if name == "scaled_dot_product_attention":
        return _attention(graph, node)
    return []


def _convolution(graph: Graph, node: fx.Node) -> list[Layer]:
    name = op_name(node.target)
    shift = 0
    if name == "convolution":  # its own arguments have "transposed" and "output_padding" between
        if argument(node, 6, "transposed", False):
            return []
        shift = 2
    source, weight = (graph.shape(n) for n in node.args[:2])  # type: ignore[arg-type]
    (out,) = graph.shapes(node)
    assert source is not None and weight is not None
    if len(weight) not in (3, 4):
        return []
    kernel = _pair(weight[2:])
    dilation = _pair(argument(node, 5, "dilation", 1), len(weight) == 3)
    padding = argument(node, 4, "padding", 0)
    if padding == "same":
        zeros = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    else:
        zeros = (0, 0) if padding == "valid" else _pair(padding, len(weight) == 3, fill=0)
    return [
        Layer(
            node.name,
            module_of(node),
            "convolution",
            channels=source[1],
            features=weight[0],
            groups=int(argument(node, 6 + shift, "groups", 1)),
            kernel=kernel,
            stride=_pair(argument(node, 3, "stride", 1), len(weight) == 3),
            padding=zeros,
            dilation=dilation,
            input_size=_pair(source[2:]),
            output_size=_pair(out[2:]),
            bias=argument(node, 2, "bias") is not None,
            weight=_weight(node.args[1]),
        )
    ]


def _linear(graph: Graph, node: fx.Node) -> Layer:
    source, weight = (graph.shape(n) for n in node.args[:2])  # type: ignore[arg-type]
    assert source is not None and weight is not None
    size = (math.prod(source[:-1]), 1)
    return Layer(
        node.name,
        module_of(node),
        "linear",
        channels=weight[1],
        features=weight[0],
        input_size=size,
        output_size=size,
        bias=argument(node, 2, "bias") is not None,
        weight=_weight(node.args[1]),
    )


def _product(graph: Graph, node: fx.Node, first: int) -> Layer:
    left, right = (graph.shape(n) for n in node.args[first : first + 2])  # type: ignore[arg-type]
    assert left is not None and right is not None
    weight = _weight(node.args[first + 1])
    columns = right[-1] if len(right) > 1 else 1
    if weight is not None and len(right) <= 2:
        # A weight that is shared by all matrices on the left: a linear layer.
        size = (math.prod(left[:-1]), 1)
        return Layer(
            node.name, module_of(node), "linear", left[-1], columns,
            input_size=size, output_size=size, bias=first == 1, weight=weight,
        )  # fmt: skip
    return _matrices(node, left, columns)


def _attention(graph: Graph, node: fx.Node) -> list[Layer]:
    q, k, v = (graph.shape(n) for n in node.args[:3])  # type: ignore[arg-type]
    assert q is not None and k is not None and v is not None
    return [_matrices(node, q, k[-2]), _matrices(node, (*q[:-1], k[-2]), v[-1])]


def _matrices(node: fx.Node, left: Sequence[int], columns: int) -> Layer:
    """Products of matrices ``[..., rows, inner]`` with as many ``[inner, columns]``."""
    groups = math.prod(left[:-2])
    size = (left[-2] if len(left) > 1 else 1, 1)
    return Layer(
        node.name, module_of(node), "product", groups * left[-1], groups * columns, groups,
        input_size=size, output_size=size,
    )  # fmt: skip


def _weight(node: object) -> str | None:
    """The name of the tensor an operand is, also when it is transposed first."""
    while isinstance(node, fx.Node) and op_name(node.target) in ("t", "transpose", "permute"):
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _pair(value: int | Sequence[int], one_axis: bool = False, *, fill: int = 1) -> tuple[int, int]:
    """One or two numbers as height and width; a signal of one axis has height 1."""
    values = [value] if isinstance(value, int) else list(value)
    if len(values) == 1:
        one = values[0]
        return (fill, one) if one_axis or not isinstance(value, int) else (one, one)
    return values[0], values[1]
