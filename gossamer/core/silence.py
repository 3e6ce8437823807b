"""The original network with units silenced: what surgery must agree with.

A unit is silenced by zeroing what produces it (rows, biases, embeddings, normalisation scales).
Where that leaves something behind when the unit's value reaches a reader:

- a constant (an activation with phi(0) != 0): it belongs to the reader's bias, and surgery folds it
  there;
- anything else (a normalisation without scale, a constant in front of zero padding): the reader's
  share of it is silenced too.

Statistics over silenced units (layer norm, softmax, mean, maximum) are those of the survivors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gossamer.core.dependency import Dependency
from gossamer.core.graph import argument, op_name

_TINY = 1e-9


def silenced_tensors(
    dependency: Dependency, gone: np.ndarray, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The network's tensors with the producers and accessories of removed units at zero."""
    roles = dependency.propagation.roles
    result = {}
    for name, tensor in tensors.items():
        labels = dependency.propagation.tensor_labels.get(name, [])
        for axis, vector in enumerate(labels):
            if roles.get((name, axis), "producer") == "consumer":
                continue
            keep = dependency.kept(vector, gone)
            if keep is not None:
                shape = [-1 if i == axis else 1 for i in range(tensor.ndim)]
                mask = torch.from_numpy(keep).to(tensor.device).view(shape)
                tensor = torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))
        result[name] = tensor
    return result


class Doubled(fx.Interpreter):
    """Runs a graph in float64, also where the network asks for float32."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=True, graph=graph)
        self.tensors = {name: _double(tensor.detach()) for name, tensor in tensors.items()}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.tensors[str(target)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        single = (torch.float32, torch.float16, torch.bfloat16)
        args = tuple(torch.float64 if _is_one_of(a, single) else a for a in args)
        kwargs = {k: torch.float64 if _is_one_of(v, single) else v for k, v in kwargs.items()}
        return super().call_function(target, args, kwargs)

    def run_on(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Outputs of the graph in evaluation mode, flat."""
        with torch.no_grad():
            return list(self.run(*(_double(x) for x in inputs), False))


def _is_one_of(value: Any, kinds: tuple[torch.dtype, ...]) -> bool:
    return isinstance(value, torch.dtype) and value in kinds


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    # In-place operators may write into an input; the caller's must stay as it is.
    return value.clone() if isinstance(value, Tensor) else value


class Silenced(Doubled):
    """Runs the original graph in float64 with some units silenced.

    Attributes:
        bias: after a run, what removed units leave in the bias of each reader (by node name).
        leftovers: nodes where something that is no constant had to be silenced.
        exact: whether no statistics had to be restricted to the survivors.
    """

    def __init__(self, dependency: Dependency, gone: np.ndarray) -> None:
        tensors = silenced_tensors(dependency, gone, dependency.graph.tensors)
        super().__init__(dependency.graph.fx, tensors)
        self.dependency = dependency
        self.gone = gone
        self.bias: dict[str, Tensor] = {}
        self.leftovers: list[fx.Node] = []
        self.exact = True

    def keep(self, node: Any, axis: int) -> Tensor | None:
        """Which indices survive on an axis, as a bool tensor; None if all do."""
        keep = self.dependency.kept(self.dependency.propagation.labels[node][axis], self.gone)
        return None if keep is None else torch.from_numpy(keep)

    def batch_keep(self, node: Any, value: Tensor, axis: int) -> Tensor | None:
        """As :meth:`keep`, stretched to the size the axis has in this run."""
        keep = self.keep(node, axis)
        if keep is None or len(keep) == value.shape[axis]:
            return keep
        # The axis joins the free batch with units: the pattern repeats with the batch.
        return keep[: value.shape[axis]]

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            special = _READERS.get(op_name(n.target))
            if special is not None:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                return special(self, n, list(args), dict(kwargs))
        return super().run_node(n)

    def plain(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Runs the node's own operator."""
        return self.call_function(node.target, tuple(args), kwargs)

    def muted(self, node: fx.Node, source: Any, value: Tensor, axes: list[int]) -> Tensor:
        """``value`` with removed indices at zero on ``axes``; notes if they were not."""
        for axis in axes:
            keep = self.batch_keep(source, value, axis)
            if keep is None:
                continue
            gone = value.index_select(axis, (~keep).nonzero().flatten())
            if gone.numel() and gone.abs().max() > _TINY:
                self.leftovers.append(node)
                shape = [-1 if i == axis % value.ndim else 1 for i in range(value.ndim)]
                value = value * keep.view(shape)
        return value

    def survivors(
        self, node: fx.Node, source: Any, value: Tensor, axes: list[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """``value`` without removed indices on ``axes``, and which indices stayed."""
        kept = {}
        for axis in axes:
            axis %= value.ndim
            keep = self.batch_keep(source, value, axis)
            if keep is not None:
                kept[axis] = keep.nonzero().flatten()
                value = value.index_select(axis, kept[axis])
                self.exact = False
        return value, kept


Reader = Callable[[Silenced, fx.Node, list[Any], dict[str, Any]], Any]
_READERS: dict[str, Reader] = {}


def _reader(*names: str) -> Callable[[Reader], Reader]:
    def register(function: Reader) -> Reader:
        for name in names:
            _READERS[name] = function
        return function

    return register


def _scattered(small: Tensor, like: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Puts survivors back to their places among zeros."""
    for axis, places in kept.items():
        shape = list(small.shape)
        shape[axis] = like.shape[axis]
        small = torch.zeros(shape, dtype=small.dtype).index_copy(axis, places, small)
    return small


@_reader("linear", "conv1d", "conv2d", "conv3d")
def _weighted(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Readers with a bias: constants that removed units leave belong into it."""
    axis = -1 if op_name(node.target) == "linear" else args[0].ndim - args[1].ndim + 1
    if op_name(node.target) != "linear":
        axis = 1 if args[0].ndim == args[1].ndim else 0
    keep = s.keep(node.args[0], axis)
    groups = argument(node, 6, "groups", 1) if op_name(node.target) != "linear" else 1
    if keep is None:
        return s.plain(node, args, kwargs)
    if groups > 1:
        args[0] = _muted_inner(s, node, args, groups)
        return s.plain(node, args, kwargs)
    gone = args[0].movedim(axis, -1)[..., ~keep].reshape(-1, int((~keep).sum()))
    if gone.numel() == 0 or gone.abs().max() <= _TINY:
        return s.plain(node, args, kwargs)
    constant = gone[0]
    same = (gone - constant).abs().max() <= _TINY * (1 + constant.abs().max())
    padding = argument(node, 4, "padding", 0) if op_name(node.target) != "linear" else 0
    padded = (
        padding == "same" or any(p != 0 for p in np.atleast_1d(np.asarray(padding)).tolist())
        if not isinstance(padding, str)
        else padding == "same"
    )
    direct = isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
    if same and not padded and direct:
        weight = args[1].flatten(2).sum(-1) if args[1].ndim > 2 else args[1]
        s.bias[node.name] = weight[:, ~keep] @ constant
        return s.plain(node, args, kwargs)
    args[0] = s.muted(node, node.args[0], args[0], [axis])
    return s.plain(node, args, kwargs)


def _muted_inner(s: Silenced, node: fx.Node, args: list[Any], groups: int) -> Tensor:
    """Mutes removed inputs of a grouped convolution (whole groups leave with their outputs)."""
    return s.muted(node, node.args[0], args[0], [1 if args[0].ndim == args[1].ndim else 0])


@_reader("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    args[0] = s.muted(node, node.args[0], args[0], [1])
    return s.plain(node, args, kwargs)


@_reader("matmul", "mm", "bmm", "mv", "dot")
def _product(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    args[0] = s.muted(node, node.args[0], args[0], [-1])
    return s.plain(node, args, kwargs)


@_reader("addmm", "baddbmm")
def _added(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    args[1] = s.muted(node, node.args[1], args[1], [-1])
    return s.plain(node, args, kwargs)


@_reader("einsum")
def _einsum(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    terms, _, out = str(args[0]).replace(" ", "").partition("->")
    letters = terms.split(",")[0]
    contracted = [i for i, letter in enumerate(letters) if letter not in out]
    operands = list(args[1])
    operands[0] = s.muted(node, node.args[1][0], operands[0], contracted)  # type: ignore[index]
    return s.plain(node, [args[0], operands, *args[2:]], kwargs)


@_reader("scaled_dot_product_attention")
def _attention(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    args[0] = s.muted(node, node.args[0], args[0], [-1])
    return s.plain(node, args, kwargs)


@_reader("sum", "linalg_vector_norm", "norm")
def _total(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    position = 1 if op_name(node.target) == "sum" else 2
    args[0] = s.muted(node, node.args[0], args[0], _reduced(node, args[0].ndim, position))
    return s.plain(node, args, kwargs)


def _reduced(node: fx.Node, rank: int, position: int) -> list[int]:
    dims = argument(node, position, "dim", argument(node, position, "dims"))
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else list(dims))]  # type: ignore[arg-type]


@_reader("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "logsumexp", "max", "min",
         "median")  # fmt: skip
def _statistic(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if len(args) > 1 and isinstance(args[1], Tensor):
        return s.plain(node, args, kwargs)
    args[0], _ = s.survivors(node, node.args[0], args[0], _reduced(node, args[0].ndim, 1))
    return s.plain(node, args, kwargs)


@_reader("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    full = args[0]
    args[0], kept = s.survivors(node, node.args[0], full, _reduced(node, full.ndim, 1))
    return _scattered(s.plain(node, args, kwargs), full, kept)


@_reader("layer_norm", "rms_norm")
def _layer_norm(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    full, count = args[0], len(args[1])
    axes = list(range(full.ndim - count, full.ndim))
    args[0], kept = s.survivors(node, node.args[0], full, axes)
    for position in (2, 3):
        if len(args) > position and isinstance(args[position], Tensor):
            for axis, places in kept.items():
                args[position] = args[position].index_select(axis - axes[0], places)
    args[1] = list(args[0].shape[axes[0] :])
    return _scattered(s.plain(node, args, kwargs), full, kept)


@_reader("group_norm")
def _group_norm(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    full, groups = args[0], args[1]
    keep = s.keep(node.args[0], 1)
    args[0], kept = s.survivors(node, node.args[0], full, list(range(1, full.ndim)))
    if keep is not None:
        args[1] = int(keep.view(groups, -1).any(1).sum())
        for position in (2, 3):
            if len(args) > position and isinstance(args[position], Tensor):
                args[position] = args[position][keep]
    return _scattered(s.plain(node, args, kwargs), full, kept)


@_reader("batch_norm", "instance_norm")
def _batch_norm(s: Silenced, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if op_name(node.target) == "batch_norm" and args[5] is not True:
        return s.plain(node, args, kwargs)
    full = args[0]
    axes = [axis for axis in range(full.ndim) if axis != 1]
    args[0], kept = s.survivors(node, node.args[0], full, axes)
    return _scattered(s.plain(node, args, kwargs), full, kept)
