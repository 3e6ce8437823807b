"""Which layer feeds which, read off the traced graph.

Some methods need the layers around a weight (lookahead pruning) or around a neuron (is it cut
off?). Here every multiplied weight is told which weights make its input channels and which read its
output channels, through normalisation, activation, pooling, flattening and sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from gossamer.core.graph import Graph, argument, module_of, op_name

_SAME_CHANNELS = frozenset({
    "batch_norm", "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "gelu", "silu",
    "silu_", "sigmoid", "tanh", "dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "clone", "contiguous", "alias",
})  # fmt: skip
_RECTIFIERS = frozenset(("relu", "relu_"))


@dataclass
class Wire:
    """Channels that flow from one place into a weight.

    Attributes:
        weight: name of the weight that reads them.
        positions: how many of its inputs belong to one channel (more than 1 after flattening).
    """

    weight: str
    positions: int


@dataclass
class Rectifier:
    """A ReLU and what is around it.

    Attributes:
        node: its name in the graph.
        layer: dotted path of the module that ran it.
        producers: weights whose outputs it rectifies (their sum); empty where that is not known.
        consumers: weights that read it; None where something else reads it too.
    """

    node: str
    layer: str
    producers: list[str] = field(default_factory=list)
    consumers: list[Wire] | None = None


@dataclass
class Wiring:
    """The layers of a network and how they are connected.

    Attributes:
        graph: the trace.
        before: of each weight, the weights that make its input channels (None if unknown).
        after: of each weight, what reads its output channels (None if something else does too).
        rectifiers: every ReLU, in order of execution.
    """

    graph: Graph
    before: dict[str, list[str] | None]
    after: dict[str, list[Wire] | None]
    rectifiers: list[Rectifier]

    @classmethod
    def of(cls, module: nn.Module, example_inputs: Sequence[Any]) -> Wiring:
        """Traces a network.

        Raises:
            UnsupportedError: if it cannot be traced.
        """
        graph = Graph.trace(module, example_inputs)
        places = {node: weight for node, weight in _products(graph)}
        before = {weight: _makers(graph, node.args[0], places) for node, weight in places.items()}
        after = {weight: _readers(graph, node, places) for node, weight in places.items()}
        rectifiers = [
            Rectifier(
                node.name,
                path,
                _makers(graph, node.args[0], places) or [],
                _readers(graph, node, places),
            )
            for node, path in _rectified(graph)
        ]
        return cls(graph, before, after, rectifiers)


def _products(graph: Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.fx.nodes:
        if node.op != "call_function" or op_name(node.target) not in ("conv2d", "linear"):
            continue
        weight = node.args[1]
        # A grouped convolution's input channels are not the columns of its weight.
        plain = argument(node, 6, "groups", 1) == 1
        if plain and isinstance(weight, fx.Node) and weight.op == "get_attr":
            yield node, str(weight.target)


def _rectified(graph: Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.fx.nodes:
        if node.op == "call_function" and op_name(node.target) in _RECTIFIERS:
            yield node, module_of(node)


def _makers(graph: Graph, node: Any, places: dict[fx.Node, str]) -> list[str] | None:
    """Weights whose output channels are the channels of ``node``."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node in places:
        return [places[node]]
    name = op_name(node.target)
    if name in ("add", "add_"):
        parts = [_makers(graph, arg, places) for arg in node.args[:2]]
        if any(part is None for part in parts):
            return None
        return [weight for part in parts if part for weight in part]
    if name in _SAME_CHANNELS or name in ("flatten", "view", "reshape"):
        return _makers(graph, node.args[0], places)
    return None


def _readers(graph: Graph, node: fx.Node, places: dict[fx.Node, str]) -> list[Wire] | None:
    """Weights that read the channels of ``node``; None if something else does."""
    channels = (graph.shape(node) or (0, 0))[1:2]
    return _spread(graph, node, channels[0] if channels else 0, places)


def _spread(
    graph: Graph, node: fx.Node, channels: int, places: dict[fx.Node, str]
) -> list[Wire] | None:
    found: list[Wire] = []
    for user in node.users:
        if user.op != "call_function":
            return None
        name = op_name(user.target)
        if user in places and user.args[0] is node:
            columns = graph.tensors[places[user]].shape[1]
            if not channels or columns % channels:
                return None
            found.append(Wire(places[user], columns // channels))
        elif name in _SAME_CHANNELS or name in ("flatten", "view", "reshape"):
            shape = graph.shape(user)
            # Flattened channels stay in order; a view that does anything else is not followed.
            if shape is None or len(shape) < 2 or shape[1] % max(1, channels):
                return None
            further = _spread(graph, user, channels, places)
            if further is None:
                return None
            found += further
        else:
            return None
    return found


def row_norms(weight: Tensor) -> Tensor:
    """Frobenius norm of the weights of each output channel, ``[outputs]``."""
    return weight.detach().flatten(1).norm(dim=1)


def column_norms(weight: Tensor, positions: int) -> Tensor:
    """Frobenius norm of the weights that read each channel, ``[columns / positions]``."""
    columns = weight.detach().transpose(0, 1).flatten(1)
    return columns.reshape(columns.shape[0] // positions, -1).norm(dim=1)
