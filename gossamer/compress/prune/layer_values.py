"""What flows through a network's layers, seen by running its trace.

Modules are not asked: a network that was opened from a file has none that say what they do, and
its criteria have to be those of the network it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.core.graph import Graph, argument, op_name
from gossamer.parts.padding import pair


class LayerValues:
    """Runs a trace and shows inputs and outputs of operators with weights.

    Args:
        graph: the trace; its tensors are read at each run.
        operators: names of the operators that are shown.

    Attributes:
        places: of each weight the operators that use it.
    """

    def __init__(self, graph: Graph, operators: Collection[str]) -> None:
        self.network = graph.network()
        self.places: dict[str, list[fx.Node]] = {}
        self._wanted: dict[str, tuple[str, fx.Node]] = {}
        for node in self.network.program.graph.nodes:
            if node.op != "call_function" or op_name(node.target) not in operators:
                continue
            weight = argument(node, 1, "weight", None)
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                self.places.setdefault(str(weight.target), []).append(node)
                self._wanted[node.name] = (str(weight.target), node)

    def watching(self, see: Callable[[str, fx.Node, Any, Any], Any]) -> Callable[..., Any]:
        """The network as a function, in evaluation mode.

        Args:
            see: called with the weight's name, the operator, its input and its output.
        """
        wanted = self._wanted

        class Watching(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n.name not in wanted:
                    return super().run_node(n)
                args, _ = self.fetch_args_kwargs_from_env(n)
                output = super().run_node(n)
                name, node = wanted[n.name]
                see(name, node, args[0], output)
                return output

        def run(*inputs: Any) -> Any:
            outputs = Watching(self.network.program).run(*inputs, False)
            return pytree.tree_unflatten(list(outputs), self.network.output_spec)

        return run


def as_module(node: fx.Node, weight: Tensor) -> nn.Module:
    """The convolution or linear layer that an operator is, without its bias.

    Args:
        node: a "conv2d" or "linear".
        weight: its weight.
    """
    layer: nn.Module
    if op_name(node.target) == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        stride, dilation = (
            tuple(pair(argument(node, at, name, 1)))
            for at, name in ((3, "stride"), (5, "dilation"))
        )
        padding = argument(node, 4, "padding", 0)
        groups = argument(node, 6, "groups", 1)
        layer = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]),  # type: ignore[arg-type]
            stride=stride, padding=padding if isinstance(padding, str) else tuple(pair(padding)),  # type: ignore[arg-type]
            dilation=dilation, groups=groups, bias=False, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
    layer.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=False))
    return layer
