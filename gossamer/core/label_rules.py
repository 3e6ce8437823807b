"""How ATen operators carry labels: the rule table of the dependency analysis.

A rule looks at one node, states equalities between the labels of its inputs (a convolution's input
channels are its weight's second axis) and returns the labels of its outputs. Element-wise
operators share one rule; an operator without a rule fixes every axis it touches and is named in
the report, so that the result may be less prunable than it could be, never wrong.

A label list has one entry an axis: a vector of atoms, or None for an axis that is fixed. Axes of
size one, and batch axes, are always None.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from gossamer.core.graph import Graph, Shape, argument, line_of, op_name
from gossamer.core.labels import Labels, Vector

AxisLabels = list[Vector | None]
BATCH = 13  # stands for the free batch size; a prime keeps factorisations of shapes unambiguous


# They fix the axis they choose from, which was made to be chosen from: nothing to report.
_SELECTIONS = {"select", "unbind", "embedding", "split", "chunk", "split_with_sizes", "slice"}


@dataclass
class Pin:
    """An axis that was fixed because of an operator.

    Attributes:
        operator: bare operator name.
        why: in a few words.
        line: where the network calls it.
    """

    operator: str
    why: str
    line: str


@dataclass
class Propagation:
    """Labels of every node of a graph.

    Attributes:
        graph: the traced network.
        store: the atoms.
        labels: of each node: one list of axes, or a tuple of them for several outputs.
        pins: what had to be fixed and why.
        approximate: label vectors over which a normalisation or an extremum runs.
        roles: of (tensor name, axis): "producer", "accessory" or "consumer".
    """

    graph: Graph
    store: Labels = field(default_factory=Labels)
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    approximate: list[Vector] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    tensor_labels: dict[str, AxisLabels] = field(default_factory=dict)
    _current: fx.Node | None = None

    def run(self) -> None:
        """Visits every node once, in execution order."""
        for node in self.graph.fx.nodes:
            if node.op == "placeholder":
                shape = self.shape(node)
                self.labels[node] = [None] * len(shape) if shape is not None else None
            elif node.op == "get_attr":
                shape = tuple(self.graph.tensors[str(node.target)].shape)
                labels: AxisLabels = [self.store.fresh(s) if s > 1 else None for s in shape]
                if not self.graph.tensors[str(node.target)].is_floating_point():
                    labels = [None] * len(shape)  # index tables
                self.labels[node] = self.tensor_labels[str(node.target)] = labels
            elif node.op == "call_function":
                self.labels[node] = self._visit(node)
            elif node.op == "output":
                self._current = None
                for source in node.all_input_nodes:
                    self.fix(self.labels.get(source))

    def _visit(self, node: fx.Node) -> Any:
        shapes = self.graph.shapes(node)
        if node.target is operator.getitem:
            source = self.labels[node.args[0]]  # type: ignore[index]
            return source[node.args[1]] if source is not None else None  # type: ignore[index]
        if not shapes:
            return None  # a size or another plain number
        name = op_name(node.target)
        rule = RULES.get(name) or RULES.get(name.rstrip("_"))
        if rule is None and _is_pointwise(node.target):
            rule = pointwise
        if rule is None:
            return self.unknown(node, "no rule for this operator")
        self._current = node
        try:
            return rule(self, node)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            # Arguments of a form the rule does not know: less can be pruned, nothing goes wrong.
            return self.unknown(node, f"its rule does not know this form ({type(error).__name__})")

    def unknown(self, node: fx.Node, why: str) -> Any:
        """Fixes everything a node touches, and says so if that forbids anything."""
        touched, self._current = False, None
        for source in node.all_input_nodes:
            touched |= self.fix(self.labels.get(source))
        if touched:
            self.pins.append(Pin(op_name(node.target), why, line_of(node)))
        value = node.meta.get("val")
        if isinstance(value, tuple | list):
            return tuple([None] * v.ndim if isinstance(v, torch.Tensor) else None for v in value)
        return self.fixed(node)

    def fix(self, labels: Any) -> bool:
        """Fixes every axis; returns whether any of them was removable until now."""
        if labels is None:
            return False
        if isinstance(labels, tuple):
            return any([self.fix(item) for item in labels])
        touched = False
        for vector in labels:
            touched |= self.fix_axis(vector)
        return touched

    def fix_axis(self, vector: Vector | None) -> bool:
        """Fixes one axis; returns whether it was removable until now."""
        if vector is None or not self.store.find(vector).any():
            return False
        self.store.pin(vector)
        if self._current is not None and op_name(self._current.target) not in _SELECTIONS:
            node = self._current
            self.pins.append(Pin(op_name(node.target), "the order along an axis", line_of(node)))
        return True

    def fixed(self, node: fx.Node) -> AxisLabels:
        """A label list with every axis fixed."""
        shape = self.shape(node)
        assert shape is not None
        return [None] * len(shape)

    def shape(self, node: Any) -> Shape:
        """Shape with the free batch size set to ``BATCH``."""
        shape = self.graph.shape(node, BATCH)
        return shape if shape is not None else ()

    def of(self, node: Any) -> AxisLabels:
        """Labels of a tensor argument."""
        labels = self.labels[node]
        assert isinstance(labels, list)
        return labels

    def role(self, node: Any, axis: int, role: str) -> None:
        """Records what an axis of a parameter is for (also through transposes and scalings)."""
        vector = self.labels[node][axis]
        volume = math.prod(self.shape(node))
        while node.op == "call_function":
            same = [n for n in node.all_input_nodes if math.prod(self.shape(n)) == volume]
            if not same:
                return
            node = same[0]
        if node.op != "get_attr" or vector is None:
            return
        axes = self.tensor_labels[str(node.target)]
        wanted = self.store.find(vector)
        fitting = [
            i for i, v in enumerate(axes)
            if v is not None and np.array_equal(self.store.find(v), wanted)
        ]  # fmt: skip
        if fitting:
            chosen = axis if axis in fitting else fitting[0]
            self.roles.setdefault((str(node.target), chosen), role)


def _is_pointwise(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise in target.tags:
        return True
    name = target._schema.name.split("::")[-1]
    functional = getattr(torch.ops.aten, name.rstrip("_"), None)
    if name.endswith("_") and functional is not None:
        return any(
            torch.Tag.pointwise in getattr(functional, o).tags for o in functional.overloads()
        )
    return False


Rule = Callable[[Propagation, fx.Node], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operators by their bare names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


# Element-wise -------------------------------------------------------------------------------

_ROLES_OF_POINTWISE = {"mul": "accessory", "mul_": "accessory", "div": "accessory"}


@rule(
    "dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "to", "_to_copy",
    "type_as", "detach", "alias", "lift_fresh_copy", "lift_fresh", "relu6", "hardtanh", "selu",
    "mish", "softplus", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "celu", "leaky_relu",
    "relu", "sigmoid", "tanh", "where", "masked_fill", "clamp", "add", "sub", "mul", "div", "pow",
    "lerp", "addcmul", "copy", "fill", "zero", "zeros_like", "ones_like", "full_like", "rand_like",
    "empty_like", "nan_to_num", "float", "bernoulli", "log_sigmoid", "logsigmoid", "square",
    "fake_quantize_per_tensor_affine", "threshold", "real", "conj", "expand_as", "rsub",
    "true_divide", "multiply", "subtract", "divide", "logical_and", "logical_or", "logical_not",
)  # fmt: skip
def pointwise(p: Propagation, node: fx.Node) -> AxisLabels:
    """Broadcast axes of equal size are one axis."""
    out = p.shape(node)
    result: AxisLabels = [None] * len(out)
    sources = [
        n for n in node.all_input_nodes if p.graph.shapes(n) and isinstance(p.labels[n], list)
    ]
    role = _ROLES_OF_POINTWISE.get(op_name(node.target))
    for axis in range(1, len(out) + 1):
        if out[-axis] == 1:
            continue
        wide = [n for n in sources if len(p.shape(n)) >= axis and p.shape(n)[-axis] == out[-axis]]
        if not wide:
            continue
        for other in wide[1:]:
            p.store.unify(p.of(wide[0])[-axis], p.of(other)[-axis])
        found = [p.of(n)[-axis] for n in wide]
        result[-axis] = None if any(v is None for v in found) else found[0]
        for n in wide:
            if role and n.op == "get_attr":
                p.role(n, len(p.shape(n)) - axis, role)
    return result


@rule("prelu", "_prelu_kernel")
def prelu(p: Propagation, node: fx.Node) -> AxisLabels:
    labels = p.of(node.args[0])
    (slope,) = p.of(node.args[1])[:1] or [None]
    if p.shape(node.args[1])[:1] not in ((), (1,)) and op_name(node.target) == "prelu":
        p.store.unify(labels[1], slope)
        p.role(node.args[1], 0, "accessory")
    elif op_name(node.target) != "prelu":
        return pointwise(p, node)
    return list(labels)


# Products -----------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def convolution(p: Propagation, node: fx.Node) -> AxisLabels:
    x, w = p.of(node.args[0]), p.of(node.args[1])
    bias = argument(node, 2, "bias")
    groups = argument(node, 6, "groups", 1)
    batched = len(x) == len(w)
    channel = 1 if batched else 0
    for vector in x[channel + 1 :]:
        p.fix_axis(vector)
    for vector in w[2:]:
        p.store.pin(vector)
    _grouped(p, x[channel], w[1], w[0], p.shape(node.args[1])[1], groups)
    if bias is not None:
        p.store.unify(w[0], p.of(bias)[0])
        p.role(bias, 0, "producer")
    p.role(node.args[1], 0, "producer")
    p.role(node.args[1], 1, "consumer")
    result: AxisLabels = [None] * len(p.shape(node))
    if batched:
        result[0] = x[0]
    result[channel] = w[0]
    return result


def _grouped(
    p: Propagation,
    x: Vector | None,
    inner: Vector | None,
    outer: Vector | None,
    size: int,
    groups: int,
) -> None:
    """Ties input channels to a weight's inner axis and, through the group, to its outer axis."""
    if groups == 1:
        p.store.unify(x, inner) if size > 1 else p.fix_axis(x)
        return
    if x is None or outer is None:
        p.fix_axis(x)
        p.fix_axis(outer)
        if size > 1:
            p.fix_axis(inner)
        return
    of_input = p.store.split(x, (groups, size))
    of_output = p.store.split(outer, (groups, len(outer) // groups))
    p.store.unify(of_input[0], of_output[0])
    if size > 1:
        p.store.unify(of_input[1], inner)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(p: Propagation, node: fx.Node) -> AxisLabels:
    x, w = p.of(node.args[0]), p.of(node.args[1])
    bias = argument(node, 2, "bias")
    groups = argument(node, 6, "groups", 1)
    shape = p.shape(node.args[1])
    for vector in x[2:]:
        p.fix_axis(vector)
    for vector in w[2:]:
        p.store.pin(vector)
    p.store.unify(x[1], w[0])
    if groups == 1:
        out = w[1]
    else:
        of_input = p.store.split(w[0], (groups, shape[0] // groups))
        out = p.store.join([of_input[0], w[1]], [groups, shape[1]])
    if bias is not None:
        p.store.unify(out, p.of(bias)[0])
        p.role(bias, 0, "producer")
    p.role(node.args[1], 1, "producer")
    p.role(node.args[1], 0, "consumer")
    result: AxisLabels = [None] * len(p.shape(node))
    result[0], result[1] = x[0], out
    return result


@rule("linear")
def linear(p: Propagation, node: fx.Node) -> AxisLabels:
    x, w = p.of(node.args[0]), p.of(node.args[1])
    bias = argument(node, 2, "bias")
    p.store.unify(x[-1], w[-1])
    p.role(node.args[1], 0, "producer")
    p.role(node.args[1], 1, "consumer")
    if bias is not None:
        p.store.unify(w[0], p.of(bias)[0])
        p.role(bias, 0, "producer")
    return [*x[:-1], w[0]] if len(w) == 2 else list(x[:-1])


@rule("matmul", "mm", "bmm", "mv", "dot")
def product(p: Propagation, node: fx.Node) -> AxisLabels:
    return _product(p, node, node.args[0], node.args[1])


@rule("addmm", "baddbmm")
def added_product(p: Propagation, node: fx.Node) -> AxisLabels:
    result = _product(p, node, node.args[1], node.args[2])
    bias, shape = p.of(node.args[0]), p.shape(node.args[0])
    out = p.shape(node)
    for axis in range(1, len(bias) + 1):
        if shape[-axis] == out[-axis] > 1:
            p.store.unify(bias[-axis], result[-axis])
        p.role(node.args[0], len(bias) - axis, "producer")
    return result


def _product(p: Propagation, node: fx.Node, left: Any, right: Any) -> AxisLabels:
    a, b = p.of(left), p.of(right)
    sa, sb = p.shape(left), p.shape(right)
    p.store.unify(a[-1], b[-2] if len(b) > 1 else b[-1])
    if len(a) == 2 and left.op == "get_attr":
        p.role(left, 0, "producer")
        p.role(left, 1, "consumer")
    if len(b) == 2 and right.op == "get_attr":
        p.role(right, 1, "producer")
        p.role(right, 0, "consumer")
    rows = [a[-2]] if len(a) > 1 else []
    columns = [b[-1]] if len(b) > 1 else []
    batch = _broadcast(p, [(a[:-2], sa[:-2]), (b[:-2], sb[:-2])])
    return [*batch, *rows, *columns]


@rule("outer", "ger")
def outer(p: Propagation, node: fx.Node) -> AxisLabels:
    return [*p.of(node.args[0]), *p.of(node.args[1])]


def _broadcast(p: Propagation, operands: Sequence[tuple[AxisLabels, Sequence[int]]]) -> AxisLabels:
    """Unifies leading axes that broadcast against each other."""
    rank = max((len(shape) for _, shape in operands), default=0)
    result: AxisLabels = [None] * rank
    for axis in range(1, rank + 1):
        present = [(l[-axis], s[-axis]) for l, s in operands if len(s) >= axis]
        size = max(s for _, s in present)
        wide = [vector for vector, s in present if s == size and size > 1]
        for other in wide[1:]:
            p.store.unify(wide[0], other)
        if wide:
            result[-axis] = None if any(v is None for v in wide) else wide[0]
    return result


@rule("einsum")
def einsum(p: Propagation, node: fx.Node) -> Any:
    equation = str(node.args[0]).replace(" ", "")
    operands = list(node.args[1])  # type: ignore[arg-type]
    if "->" not in equation or "..." in equation:
        return p.unknown(node, f"einsum {equation} is not spelled out")
    terms, out = equation.split("->")
    found: dict[str, Vector | None] = {}
    sizes: dict[str, int] = {}
    for letters, operand in zip(terms.split(","), operands, strict=True):
        shape = p.shape(operand)
        for letter, vector, size in zip(letters, p.of(operand), shape, strict=True):
            if size == 1:
                found.setdefault(letter, None)
                continue
            if letter in found and sizes.get(letter, 1) == size:
                p.store.unify(found[letter], vector)
                if vector is None:
                    found[letter] = None
            else:
                found[letter], sizes[letter] = vector, size
        if operand.op == "get_attr":
            for axis, letter in enumerate(letters):
                p.role(operand, axis, "producer" if letter in out else "consumer")
    return [found[letter] for letter in out]


@rule("scaled_dot_product_attention")
def attention(p: Propagation, node: fx.Node) -> AxisLabels:
    q, k, v = (p.of(n) for n in node.args[:3])
    sq, sk, sv = (p.shape(n) for n in node.args[:3])
    mask = argument(node, 3, "attn_mask")
    if node.kwargs.get("enable_gqa") and sq[-3] != sk[-3]:
        shared, within = p.store.split(q[-3], (sk[-3], sq[-3] // sk[-3]))
        p.store.unify(shared, k[-3])
        p.store.unify(shared, v[-3])
        del within
        batch: AxisLabels = list(q[:-2])
    else:
        batch = _broadcast(p, [(q[:-2], sq[:-2]), (k[:-2], sk[:-2]), (v[:-2], sv[:-2])])
    p.store.unify(q[-1], k[-1])
    p.store.unify(k[-2], v[-2])
    _extremum(p, k[-2])
    if mask is not None and p.graph.shapes(mask):
        scores = [*batch, q[-2], k[-2]]
        sizes = [*sq[:-2], sq[-2], sk[-2]]
        _broadcast(p, [(p.of(mask), p.shape(mask)), (scores, sizes)])
    return [*batch, q[-2], v[-1]]


@rule("embedding")
def embedding(p: Propagation, node: fx.Node) -> AxisLabels:
    table = p.of(node.args[0])
    p.fix_axis(table[0])
    p.role(node.args[0], 1, "producer")
    return [*p.of(node.args[1]), table[1]]


# Normalisation and reductions ---------------------------------------------------------------


def _extremum(p: Propagation, vector: Vector | None) -> None:
    """Notes that statistics run over this axis: removing from it changes the survivors."""
    if vector is not None:
        p.approximate.append(vector)


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    for tensor in node.args[1:5]:
        if isinstance(tensor, fx.Node) and p.graph.shapes(tensor):
            p.store.unify(x[1], p.of(tensor)[0])
            p.role(tensor, 0, "accessory")
    if op_name(node.target) == "instance_norm" or node.args[5] is True:
        for vector in (x[0], *x[2:]):
            _extremum(p, vector)
    return list(x)


@rule("layer_norm", "rms_norm")
def layer_norm(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    count = len(node.args[1])  # type: ignore[arg-type]
    for vector in x[len(x) - count :]:
        _extremum(p, vector)
    for position, name in ((2, "weight"), (3, "bias")):
        tensor = argument(node, position, name)
        if isinstance(tensor, fx.Node) and p.graph.shapes(tensor):
            for axis, vector in enumerate(p.of(tensor)):
                p.store.unify(x[len(x) - count + axis], vector)
                p.role(tensor, axis, "accessory")
    return list(x)


@rule("group_norm")
def group_norm(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    groups = int(node.args[1])  # type: ignore[arg-type]
    size = p.shape(node.args[0])[1] // groups
    for position, name in ((2, "weight"), (3, "bias")):
        tensor = argument(node, position, name)
        if isinstance(tensor, fx.Node):
            p.store.unify(x[1], p.of(tensor)[0])
            p.role(tensor, 0, "accessory")
    for vector in x[2:]:
        _extremum(p, vector)
    if x[1] is not None:
        if groups == 1:
            _extremum(p, x[1])
        elif size > 1:
            _, within = p.store.split(x[1], (groups, size))
            _extremum(p, within)
    return list(x)


def _dims(node: fx.Node, position: int, rank: int) -> list[int]:
    dims = argument(node, position, "dim", argument(node, position, "dims"))
    if dims is None or dims == []:
        return list(range(rank))
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [d % rank if rank else 0 for d in dims]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    for axis in _dims(node, 1, len(x)):
        _extremum(p, x[axis])
    return list(x)


def _reduction(exact: bool, position: int = 1) -> Rule:
    def reduce(p: Propagation, node: fx.Node) -> Any:
        x = p.of(node.args[0])
        dims = (
            _dims(node, position, len(x))
            if len(node.args) > position or "dim" in node.kwargs
            else list(range(len(x)))
        )
        for axis in dims:
            if not exact:
                _extremum(p, x[axis])
        shapes = p.graph.shapes(node, BATCH)
        keep = len(shapes[0]) == len(x)
        result: AxisLabels = [
            None if axis in dims else vector
            for axis, vector in enumerate(x)
            if keep or axis not in dims
        ]
        return (
            result
            if isinstance(node.meta["val"], torch.Tensor)
            else tuple(list(result) for _ in shapes)
        )

    return reduce


RULES.update(dict.fromkeys(("sum",), _reduction(exact=True)))
RULES.update(dict.fromkeys(("linalg_vector_norm", "norm"), _reduction(exact=True, position=2)))
RULES.update(
    dict.fromkeys(
        ("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "logsumexp"),
        _reduction(exact=False),
    )
)


@rule("max", "min", "median", "argmax", "argmin", "any", "all")
def extremum(p: Propagation, node: fx.Node) -> Any:
    tensors = [n for n in node.all_input_nodes if p.graph.shapes(n)]
    if len(tensors) == 2:
        return pointwise(p, node)
    x = p.of(node.args[0])
    if op_name(node.target) in ("argmax", "argmin"):
        for axis in _dims(node, 1, len(x)):
            p.fix_axis(x[axis])
    return _reduction(exact=False)(p, node)


@rule("cumsum", "cumprod", "sort", "topk", "flip", "roll", "logcumsumexp")
def along_axis(p: Propagation, node: fx.Node) -> Any:
    """Order along the axis matters (or it is reordered): that axis is fixed."""
    x = list(p.of(node.args[0]))
    position = {"topk": 2, "roll": 2}.get(op_name(node.target), 1)
    dims = argument(node, position, "dim", argument(node, position, "dims", -1))
    for axis in [dims] if isinstance(dims, int) else list(dims or range(len(x))):
        p.fix_axis(x[axis])
        x[axis] = None
    values = node.meta["val"]
    return x if isinstance(values, torch.Tensor) else tuple(list(x) for _ in values)


# Space --------------------------------------------------------------------------------------


def _spatial(channels: int) -> Rule:
    """The last ``channels`` axes are space (fixed); the others pass through."""

    def pool(p: Propagation, node: fx.Node) -> Any:
        x = p.of(node.args[0])
        for vector in x[len(x) - channels :]:
            p.fix_axis(vector)
        result: AxisLabels = [*x[: len(x) - channels], *([None] * channels)]
        if isinstance(node.meta["val"], torch.Tensor):
            return result
        return tuple(list(result) for _ in node.meta["val"])

    return pool


for _name, _axes in (
    *((f"{kind}_pool{n}d", n) for n in (1, 2, 3) for kind in ("max", "avg")),
    *((f"adaptive_{kind}_pool{n}d", n) for n in (1, 2, 3) for kind in ("max", "avg")),
    *((f"max_pool{n}d_with_indices", n) for n in (2, 3)),
    *((f"_adaptive_avg_pool{n}d", n) for n in (2, 3)),
    ("upsample_nearest1d", 1), ("upsample_nearest2d", 2), ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2), ("_upsample_bicubic2d_aa", 2), ("_upsample_bilinear2d_aa", 2),
    ("upsample_linear1d", 1), ("_upsample_nearest_exact2d", 2), ("grid_sampler", 2),
    ("reflection_pad2d", 2), ("reflection_pad1d", 1), ("replication_pad2d", 2),
    ("replication_pad1d", 1), ("affine_grid_generator", 2),
):  # fmt: skip
    RULES[_name] = _spatial(_axes)


@rule("pad", "constant_pad_nd")
def pad(p: Propagation, node: fx.Node) -> Any:
    x = list(p.of(node.args[0]))
    amounts = list(node.args[1])  # type: ignore[arg-type]
    mode = argument(node, 2, "mode", "constant") if op_name(node.target) == "pad" else "constant"
    for pair in range(len(amounts) // 2):
        axis = len(x) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if before == 0 and after == 0:
            continue
        vector = x[axis]
        plain = all(isinstance(a, int) and a >= 0 for a in (before, after))
        if vector is None or mode != "constant" or not plain:
            p.fix_axis(vector)
            x[axis] = None
        else:
            parts = [p.store.fresh(before), vector, p.store.fresh(after)]
            x[axis] = np.concatenate([part for part in parts if len(part)])
    return x


@rule("pixel_shuffle")
def pixel_shuffle(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    r = int(node.args[1])  # type: ignore[arg-type]
    channels = p.shape(node)[-3]
    parts = p.store.split(x[-3], (channels, r * r))
    p.fix_axis(parts[1])
    return [*x[:-3], parts[0], None, None]


@rule("pixel_unshuffle")
def pixel_unshuffle(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    r = int(node.args[1])  # type: ignore[arg-type]
    return [*x[:-3], p.store.join([x[-3], None], [p.shape(node.args[0])[-3], r * r]), None, None]


@rule("im2col")
def im2col(p: Propagation, node: fx.Node) -> AxisLabels:
    x, shape, out = p.of(node.args[0]), p.shape(node.args[0]), p.shape(node)
    for vector in x[2:]:
        p.fix_axis(vector)
    return [x[0], p.store.join([x[1], None], [shape[1], out[1] // shape[1]]), None]


@rule("col2im")
def col2im(p: Propagation, node: fx.Node) -> AxisLabels:
    x, shape, out = p.of(node.args[0]), p.shape(node.args[0]), p.shape(node)
    p.fix_axis(x[2])
    channels, kernel = p.store.split(x[1], (out[1], shape[1] // out[1]))
    p.fix_axis(kernel)
    return [x[0], channels, None, None]


@rule("unfold")
def windows(p: Propagation, node: fx.Node) -> AxisLabels:
    x = list(p.of(node.args[0]))
    axis = int(node.args[1])  # type: ignore[arg-type]
    p.fix_axis(x[axis])
    x[axis] = None
    return [*x, None]


# Shape --------------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze",
      "view_as", "reshape_as")  # fmt: skip
def reshape(p: Propagation, node: fx.Node) -> AxisLabels:
    source = node.args[0]
    result = p.store.reshape(p.of(source), p.shape(source), p.shape(node))
    if op_name(node.target) in ("view_as", "reshape_as"):
        # The sizes are those of the other tensor: it must lose the same indices.
        for mine, other in zip(result, p.of(node.args[1]), strict=True):
            p.store.unify(mine, other)
    return result


@rule("permute")
def permute(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    return [x[d] for d in node.args[1]]  # type: ignore[index, union-attr]


@rule("transpose", "swapaxes")
def transpose(p: Propagation, node: fx.Node) -> AxisLabels:
    x = list(p.of(node.args[0]))
    a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    x[a], x[b] = x[b], x[a]
    return x


@rule("t", "numpy_T", "mT")
def transposed(p: Propagation, node: fx.Node) -> AxisLabels:
    x = list(p.of(node.args[0]))
    if op_name(node.target) == "mT":
        x[-1], x[-2] = x[-2], x[-1]
        return x
    return x[::-1]


@rule("movedim")
def movedim(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    source: Any = node.args[1]
    target: Any = node.args[2]
    # Each axis is told apart by its size.
    order = torch.movedim(torch.empty(range(2, 2 + len(x)), device="meta"), source, target)
    return [x[size - 2] for size in order.shape]


@rule("expand", "broadcast_to")
def expand(p: Propagation, node: fx.Node) -> AxisLabels:
    x, old, new = p.of(node.args[0]), p.shape(node.args[0]), p.shape(node)
    free = _free_axes(p, node)
    result: AxisLabels = []
    for axis, size in enumerate(new):
        at = axis - (len(new) - len(old))
        if at >= 0 and old[at] == size:
            result.append(x[at])
        else:
            # A copied axis may lose any of its copies, if its reader does.
            result.append(p.store.fresh(size) if size > 1 and axis not in free else None)
    return result


def _free_axes(p: Propagation, node: fx.Node) -> set[int]:
    """Axes whose size depends on the batch."""
    value = node.meta["val"]
    return {axis for axis, size in enumerate(value.shape) if not isinstance(size, int)}


@rule("repeat", "tile")
def repeat(p: Propagation, node: fx.Node) -> AxisLabels:
    x, old, new = p.of(node.args[0]), p.shape(node.args[0]), p.shape(node)
    free = _free_axes(p, node)
    result: AxisLabels = []
    for axis, size in enumerate(new):
        at = axis - (len(new) - len(old))
        vector = x[at] if at >= 0 else None
        before = old[at] if at >= 0 else 1
        if before == size:
            result.append(vector)
        elif before == 1:
            result.append(p.store.fresh(size) if axis not in free else None)
        else:
            result.append(None if vector is None else np.tile(vector, size // before))
    return result


@rule("repeat_interleave")
def repeat_interleave(p: Propagation, node: fx.Node) -> Any:
    times, axis = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(times, int) or axis is None:
        return p.unknown(node, "repeats that are not one number")
    x = list(p.of(node.args[0]))
    vector = x[axis]
    if vector is not None:
        x[axis] = np.repeat(vector, times)
    elif p.shape(node.args[0])[axis] == 1 and axis % len(x) not in _free_axes(p, node):
        x[axis] = p.store.fresh(times)
    return x


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand",
      "randn")  # fmt: skip
def filled(p: Propagation, node: fx.Node) -> AxisLabels:
    free = _free_axes(p, node)
    return [
        p.store.fresh(size) if size > 1 and axis not in free else None
        for axis, size in enumerate(p.shape(node))
    ]


@rule("arange", "linspace", "eye", "scalar_tensor", "tril_indices")
def numbered(p: Propagation, node: fx.Node) -> AxisLabels:
    return p.fixed(node)


@rule("cat", "concat", "concatenate")
def cat(p: Propagation, node: fx.Node) -> AxisLabels:
    sources = list(node.args[0])  # type: ignore[arg-type]
    sources = [n for n in sources if math.prod(p.shape(n)) > 0]
    rank = len(p.shape(node))
    axis = argument(node, 1, "dim", 0) % rank
    result: AxisLabels = [None] * rank
    for other in range(rank):
        if other == axis:
            continue
        for n in sources[1:]:
            if p.shape(n)[other] > 1:
                p.store.unify(p.of(sources[0])[other], p.of(n)[other])
        found = [p.of(n)[other] for n in sources]
        result[other] = None if any(v is None for v in found) else found[0]
    parts = [p.of(n)[axis] for n in sources]
    if any(part is not None for part in parts):
        result[axis] = np.concatenate(
            [
                np.zeros(p.shape(n)[axis], dtype=np.int64) if part is None else part
                for n, part in zip(sources, parts, strict=True)
            ]
        )
    return result


@rule("stack")
def stack(p: Propagation, node: fx.Node) -> AxisLabels:
    sources = list(node.args[0])  # type: ignore[arg-type]
    axis = argument(node, 1, "dim", 0) % len(p.shape(node))
    result: AxisLabels = []
    for other in range(len(p.shape(sources[0]))):
        for n in sources[1:]:
            p.store.unify(p.of(sources[0])[other], p.of(n)[other])
        found = [p.of(n)[other] for n in sources]
        result.append(None if any(v is None for v in found) else found[0])
    result.insert(axis, None)
    return result


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(p: Propagation, node: fx.Node) -> Any:
    x = p.of(node.args[0])
    axis = argument(node, 2, "dim", 0) % len(x)
    result = []
    start = 0
    for shape in p.graph.shapes(node, BATCH):
        part = list(x)
        vector = x[axis]
        part[axis] = _selected(p, vector, slice(start, start + shape[axis]))
        start += shape[axis]
        result.append(part)
    return tuple(result)


def _selected(p: Propagation, vector: Vector | None, chosen: slice) -> Vector | None:
    """A part of an axis; a single index stays, since axes of size one carry no labels."""
    if vector is None:
        return None
    part = vector[chosen]
    if len(part) == 1:
        p.fix_axis(part)
    return part if len(part) > 1 else None


@rule("slice", "narrow")
def slice_(p: Propagation, node: fx.Node) -> AxisLabels:
    x = list(p.of(node.args[0]))
    axis = argument(node, 1, "dim", 0) % len(x)
    vector = x[axis]
    if vector is None or p.shape(node)[axis] == len(vector):
        return x
    chosen = slice_of(node, len(vector))
    if chosen is None:
        p.fix_axis(vector)
        x[axis] = None
        return x
    x[axis] = _selected(p, vector, chosen)
    return x


def slice_of(node: fx.Node, size: int) -> slice | None:
    """The constant range that a slice or narrow takes from an axis, or None."""
    if op_name(node.target) == "narrow":
        start, length = node.args[2], node.args[3]
        bounds: tuple[Any, Any, Any] = (
            (start, start + length, 1)  # type: ignore[operator]
            if isinstance(start, int) and isinstance(length, int)
            else (None, fx.Node, 1)
        )
    else:
        bounds = (
            argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
        )  # fmt: skip
    if any(b is not None and not isinstance(b, int) for b in bounds):
        return None
    return slice(*slice(*bounds).indices(size))


@rule("select")
def select(p: Propagation, node: fx.Node) -> AxisLabels:
    x = list(p.of(node.args[0]))
    axis = int(node.args[1]) % len(x)  # type: ignore[arg-type]
    p.fix_axis(x[axis])
    del x[axis]
    return x


@rule("unbind")
def unbind(p: Propagation, node: fx.Node) -> Any:
    x = list(p.of(node.args[0]))
    axis = argument(node, 1, "dim", 0) % len(x)
    p.fix_axis(x[axis])
    del x[axis]
    return tuple(list(x) for _ in p.graph.shapes(node))


@rule("index")
def index(p: Propagation, node: fx.Node) -> AxisLabels:
    x = p.of(node.args[0])
    indices = list(node.args[1])  # type: ignore[arg-type]
    indices += [None] * (len(x) - len(indices))
    used = [axis for axis, i in enumerate(indices) if i is not None]
    for axis in used:
        p.fix_axis(x[axis])
        p.fix(p.labels.get(indices[axis]))
    rest = [x[axis] for axis in range(len(x)) if axis not in used]
    rank = len(p.shape(node)) - len(rest)
    adjacent = used == list(range(used[0], used[-1] + 1)) if used else True
    at = used[0] if used and adjacent else 0
    return [*rest[:at], *([None] * rank), *rest[at:]]


@rule("index_select")
def index_select(p: Propagation, node: fx.Node) -> AxisLabels:
    x = list(p.of(node.args[0]))
    axis = int(node.args[1])  # type: ignore[arg-type]
    p.fix_axis(x[axis])
    x[axis] = None
    return x


@rule("glu")
def glu(p: Propagation, node: fx.Node) -> AxisLabels:
    x = list(p.of(node.args[0]))
    axis = argument(node, 1, "dim", -1)
    vector = x[axis]
    if vector is not None:
        half = len(vector) // 2
        p.store.unify(vector[:half], vector[half:])
        x[axis] = _selected(p, vector, slice(0, half))
    return x


@rule("diagonal", "tril", "triu")
def triangle(p: Propagation, node: fx.Node) -> Any:
    x = p.of(node.args[0])
    for vector in x[-2:]:
        p.fix_axis(vector)
    if op_name(node.target) == "diagonal":
        return p.unknown(node, "a diagonal")
    return [*x[:-2], None, None]
