"""The graph after a removal: tensors cut, and every size that the trace froze put right.

An exported graph holds sizes as constants: the shape of a view, the pieces of a split, the groups
of a convolution. Each of them is recomputed from the labels of the axis it describes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from gossamer.core.dependency import Dependency
from gossamer.core.graph import Graph, argument, op_name
from gossamer.core.label_rules import BATCH, slice_of

aten = torch.ops.aten


def cut(tensor: Tensor, keeps: Mapping[int, np.ndarray]) -> Tensor:
    """Keeps the chosen indices of several axes; a parameter stays a parameter."""
    result = tensor.detach()
    for axis, keep in keeps.items():
        result = result.index_select(axis, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
    result = result.clone() if result.data_ptr() == tensor.data_ptr() else result
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


@dataclass
class Rewrite:
    """Builds the graph that is left when some atoms are gone.

    Attributes:
        dependency: labels of the original graph.
        gone: which atoms are removed, bool ``[atoms]``.
        bias: what to add to the bias of an operator (by node name): constants that removed units
            leave behind.
    """

    dependency: Dependency
    gone: np.ndarray
    bias: Mapping[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Tensor] = field(default_factory=dict)
    """Folded biases in float64, before they are rounded to the network's precision."""

    def keep(self, node: Any, axis: int) -> np.ndarray | None:
        """Which indices of a tensor's axis stay; None if all do."""
        labels = self.dependency.propagation.labels[node]
        return self.dependency.kept(labels[axis], self.gone)

    def tensor_keeps(self, name: str) -> dict[int, np.ndarray]:
        """The cut axes of a parameter, buffer or constant."""
        labels = self.dependency.propagation.tensor_labels[name]
        keeps = {axis: self.dependency.kept(v, self.gone) for axis, v in enumerate(labels)}
        return {axis: keep for axis, keep in keeps.items() if keep is not None}

    def groups(self, node: Any, axis: int, groups: int) -> int:
        """How many of an axis's equal groups stay."""
        keep = self.keep(node, axis)
        return groups if keep is None else int(keep.reshape(groups, -1).any(1).sum())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the smaller graph."""
        graph = self.dependency.graph
        result = {n: cut(t, self.tensor_keeps(n)) for n, t in graph.tensors.items()}
        for node in graph.fx.nodes:
            if node.name not in self.bias:
                continue
            name, extra = self._bias_name(node), self.bias[node.name]
            keep = self.keep(node.args[1], 0)
            if keep is not None:
                extra = extra[torch.from_numpy(keep)]
            weight = result[str(node.args[1].target)]
            if name in result:
                extra = extra + result[name].detach().double()
            self.exact[name] = extra
            result[name] = nn.Parameter(extra.to(weight.dtype))
        return result

    def _bias_name(self, node: fx.Node) -> str:
        bias = argument(node, 2, "bias")
        if bias is not None:
            return str(bias.target)
        weight = str(node.args[1].target)  # type: ignore[union-attr]
        return (
            f"{weight.rpartition('.')[0]}.bias" if weight.endswith(".weight") else f"{weight}_bias"
        )

    def graph(self) -> Graph:
        """The smaller graph."""
        source = self.dependency.graph
        tensors = self.tensors()
        new = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        made: dict[str, fx.Node] = {}
        for node in source.fx.nodes:
            if node.name in self.bias and argument(node, 2, "bias") is None:
                name = self._bias_name(node)
                made[name] = new.get_attr(name)
            target, args, kwargs = node.target, node.args, node.kwargs
            args = fx.map_arg(args, lambda n: env[n])
            kwargs = dict(fx.map_arg(kwargs, lambda n: env[n]))
            if node.op == "call_function":
                change = REWRITES.get(op_name(target))
                if change is not None:
                    target, args, kwargs = change(self, node, new, tensors, list(args), kwargs)
                if node.name in self.bias and argument(node, 2, "bias") is None:
                    args = (*args[:2], made[self._bias_name(node)], *args[3:])
            copy = new.create_node(node.op, target, tuple(args), kwargs, node.name)
            for key in ("nn_module_stack", "stack_trace"):
                if key in node.meta:
                    copy.meta[key] = node.meta[key]
            env[node] = copy
        kinds = dict(source.kinds)
        for name in tensors:
            kinds.setdefault(
                name, "parameter" if isinstance(tensors[name], nn.Parameter) else "constant"
            )
        return Graph(
            new,
            tensors,
            kinds,
            source.outputs,
            dynamic=source.dynamic,
            parameters=sum(t.numel() for n, t in tensors.items() if kinds[n] == "parameter"),
            example_inputs=source.example_inputs,
        )

    def sizes(self, node: fx.Node, new: fx.Graph, given: list[Any], first: int = 0) -> list[Any]:
        """Puts right the sizes ``given`` for the output axes of ``node`` from ``first`` on."""
        result = list(given)
        for position, size in enumerate(given):
            keep = self.keep(node, first + position)
            if keep is None or (isinstance(size, int) and size == -1):
                continue
            kept = int(keep.sum())
            if isinstance(size, int):
                result[position] = size * kept // len(keep)
            else:
                # The axis joins the free batch with removable units.
                product = new.call_function(operator.mul, (size, kept))
                result[position] = new.call_function(operator.floordiv, (product, len(keep)))
        return result


Change = Callable[
    [Rewrite, fx.Node, fx.Graph, dict[str, Tensor], list[Any], dict[str, Any]],
    tuple[Any, Any, dict[str, Any]],
]
REWRITES: dict[str, Change] = {}


def _change(*names: str) -> Callable[[Change], Change]:
    def register(function: Change) -> Change:
        for name in names:
            REWRITES[name] = function
        return function

    return register


@_change("view", "reshape", "_unsafe_view", "expand", "new_zeros", "new_ones", "new_full",
         "new_empty", "broadcast_to")  # fmt: skip
def _second_argument(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    args[1] = r.sizes(node, new, list(args[1]))
    return node.target, args, kwargs


@_change("zeros", "ones", "full", "empty", "rand", "randn")
def _first_argument(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    args[0] = r.sizes(node, new, list(args[0]))
    return node.target, args, kwargs


@_change("unflatten")
def _unflatten(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    rank = len(r.dependency.propagation.labels[node.args[0]])
    args[2] = r.sizes(node, new, list(args[2]), args[1] % rank)
    return node.target, args, kwargs


@_change("repeat", "tile")
def _repeat(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    old = r.dependency.propagation.shape(node.args[0])
    times = list(args[1])
    for axis in range(len(times)):
        at = axis - (len(times) - len(old))
        if at < 0 or old[at] == 1:
            keep = r.keep(node, axis)
            if keep is not None:
                times[axis] = int(keep.sum())
    args[1] = times
    return node.target, args, kwargs


@_change("repeat_interleave")
def _repeat_interleave(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    axis = argument(node, 2, "dim")
    if axis is not None and r.dependency.propagation.shape(node.args[0])[axis] == 1:
        keep = r.keep(node, axis)
        if keep is not None:
            args[1] = int(keep.sum())
    return node.target, args, kwargs


@_change("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    axis = argument(node, 2, "dim", 0) % len(r.dependency.propagation.labels[node.args[0]])
    keep = r.keep(node.args[0], axis)
    if keep is None:
        return node.target, args, kwargs
    sizes, start = [], 0
    for shape in r.dependency.graph.shapes(node, BATCH):
        sizes.append(int(keep[start : start + shape[axis]].sum()))
        start += shape[axis]
    return aten.split_with_sizes.default, (args[0], sizes, axis), {}


@_change("slice", "narrow")
def _slice(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    axis = argument(node, 1, "dim", 0) % len(r.dependency.propagation.labels[node.args[0]])
    keep = r.keep(node.args[0], axis)
    if keep is None:
        return node.target, args, kwargs
    chosen = slice_of(node, len(keep))
    if chosen is None:
        return node.target, args, kwargs
    position = np.cumsum(keep) - 1
    picked = np.arange(len(keep))[chosen]
    picked = position[picked[keep[picked]]]
    steps = np.unique(np.diff(picked))
    if not len(picked):  # it was empty before, too
        return aten.slice.Tensor, (args[0], axis, 0, 0), {}
    if len(steps) <= 1:
        step = int(steps[0]) if len(steps) else 1
        start, end = int(picked[0]), int(picked[-1]) + 1
        return aten.slice.Tensor, (args[0], axis, start, end, step), {}
    name = f"{node.name}_kept"
    tensors[name] = torch.from_numpy(picked)
    return aten.index_select.default, (args[0], axis, new.get_attr(name)), {}


@_change("pad", "constant_pad_nd")
def _pad(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    rank = len(r.dependency.propagation.labels[node.args[0]])
    amounts = list(args[1])
    for pair in range(len(amounts) // 2):
        axis = rank - 1 - pair
        before, after = amounts[2 * pair : 2 * pair + 2]
        keep = r.keep(node, axis)
        if keep is not None:
            amounts[2 * pair] = int(keep[:before].sum())
            amounts[2 * pair + 1] = int(keep[len(keep) - after :].sum()) if after else 0
    args[1] = amounts
    return node.target, args, kwargs


@_change("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    groups = argument(node, 6, "groups", 1)
    if groups > 1:
        left = r.groups(node.args[0], 1, groups)
        if len(args) > 6:
            args[6] = left
        else:
            kwargs["groups"] = left
    return node.target, args, kwargs


@_change("group_norm")
def _group_norm(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    args[1] = r.groups(node.args[0], 1, args[1])
    return node.target, args, kwargs


@_change("layer_norm", "rms_norm")
def _layer_norm(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    rank = len(r.dependency.propagation.labels[node.args[0]])
    args[1] = r.sizes(node, new, list(args[1]), rank - len(args[1]))
    return node.target, args, kwargs


@_change("scaled_dot_product_attention")
def _attention(r, node, new, tensors, args, kwargs):  # type: ignore[no-untyped-def]
    # The default scale is a function of the width of a head: keep the trained one.
    if kwargs.get("scale") is None and r.keep(node.args[0], -1) is not None:
        kwargs["scale"] = 1.0 / math.sqrt(r.dependency.propagation.shape(node.args[0])[-1])
    return node.target, args, kwargs
