"""Which operators of a network can be erased as a whole, and how to erase them.

The search space is a graph of operators cut into *segments*: chains that end before a joint (an
operator of several inputs) or at a branching. A segment with parameters whose every successor is
a joint that can do without it is a *minimal removal structure*: its parameters form a generalised
zero-invariant group, and zeroing them makes its output zero. Operators are taken in order of
redundancy as long as a path from input to output remains.

Paper: Chen et al., "OTOv3", 2023, arXiv:2312.09411, section 3 (algorithm 2) and section 4. The
authors never released this part; what the paper leaves open is stated where it is decided:
joints that can do without an input are additions of equal shapes and concatenations (a product
with a gate dies with the gate), and a segment is a candidate only if zero parameters really make
its output zero (a sigmoid at its end would not).

The graph algorithm (:class:`Dag`, :func:`segments`, :func:`is_valid`, :func:`choose`) knows
vertices and edges only; :meth:`Space.of` reads them from a traced network, :func:`erase` builds
the network without the operators.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph, GraphNetwork, argument, op_name


@dataclass(frozen=True)
class Dag:
    """A directed acyclic graph of operators; vertices are numbered in execution order.

    Attributes:
        size: number of vertices.
        edges: pairs (from, to).
        inputs: vertices that are network inputs.
        outputs: vertices whose result the network answers.
        strict: vertices that are dead as soon as one input is (products); all others live as
            long as one input does.
    """

    size: int
    edges: tuple[tuple[int, int], ...]
    inputs: frozenset[int]
    outputs: frozenset[int]
    strict: frozenset[int] = frozenset()

    @cached_property
    def after(self) -> list[list[int]]:
        """Successors of each vertex."""
        result: list[list[int]] = [[] for _ in range(self.size)]
        for start, end in self.edges:
            result[start].append(end)
        return result

    @cached_property
    def before(self) -> list[list[int]]:
        """Predecessors of each vertex."""
        result: list[list[int]] = [[] for _ in range(self.size)]
        for start, end in self.edges:
            result[end].append(start)
        return result

    def is_joint(self, vertex: int) -> bool:
        """Whether several edges end here."""
        return len(self.before[vertex]) > 1


def segments(dag: Dag) -> list[list[int]]:
    """Cuts a graph into segments, breadth first from the inputs.

    A segment grows along single edges until the next vertex is a joint or its own end branches;
    a joint is a segment by itself.

    Returns:
        Vertices of each segment in order; inputs are in none.
    """
    queue = deque(v for i in sorted(dag.inputs) for v in dag.after[i])
    seen: set[int] = set(dag.inputs)
    result = []
    while queue:
        vertex = queue.popleft()
        if vertex in seen:
            continue
        segment = [vertex]
        seen.add(vertex)
        while not dag.is_joint(vertex) and len(dag.after[vertex]) == 1:
            follower = dag.after[vertex][0]
            if dag.is_joint(follower) or follower in seen or vertex in dag.outputs:
                break
            segment.append(follower)
            seen.add(follower)
            vertex = follower
        result.append(segment)
        queue.extend(dag.after[vertex])
    return result


def alive(dag: Dag, removed: Collection[int]) -> list[bool]:
    """Which vertices still carry a signal from an input when ``removed`` vertices are gone."""
    gone = set(removed)
    result = [False] * dag.size
    for vertex in range(dag.size):
        sources = dag.before[vertex]
        if vertex in gone:
            continue
        if vertex in dag.inputs:
            result[vertex] = True
        elif vertex in dag.strict:
            # What no input feeds (a constant) cannot die.
            result[vertex] = bool(sources) and all(
                result[s] or (not dag.before[s] and s not in dag.inputs and s not in gone)
                for s in sources
            )
        else:
            result[vertex] = any(result[s] for s in sources)
    return result


def is_valid(dag: Dag, removed: Collection[int]) -> bool:
    """Whether every output still has a path from an input when ``removed`` vertices are gone."""
    living = alive(dag, removed)
    return all(living[vertex] for vertex in dag.outputs)


@dataclass(frozen=True)
class Candidate:
    """An operator (or chain of operators) that can be erased as a whole.

    Attributes:
        name: for reports: the module of its first parameter.
        vertices: in the graph.
        parameters: state-dict names; one generalised zero-invariant group.
    """

    name: str
    vertices: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """What may be erased from a network.

    Attributes:
        dag: its operators.
        candidates: minimal removal structures.
        nodes: name of each vertex in the traced graph.
    """

    dag: Dag
    candidates: tuple[Candidate, ...]
    nodes: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, graph: Graph) -> Space:
        """Reads the erasing search space of a traced network.

        Raises:
            UnsupportedError: if no operator can be erased.
        """
        nodes: list[fx.Node] = []
        fed: set[fx.Node] = set()
        for node in graph.fx.nodes:
            # What depends on no input (a reshaped parameter) is a constant, not an operator.
            if _is_vertex(node) and (
                node.op == "placeholder" or any(s in fed for s in node.all_input_nodes)
            ):
                nodes.append(node)
                fed.add(node)
        number = {node: i for i, node in enumerate(nodes)}
        edges = [
            (number[source], number[node])
            for node in nodes
            for source in node.all_input_nodes
            if source in number and node.op == "call_function"
        ]
        inputs = frozenset(number[n] for n in nodes if n.op == "placeholder")
        (answer,) = (n for n in graph.fx.nodes if n.op == "output")
        outputs = frozenset(number[n] for n in answer.all_input_nodes if n in number)
        joints = {end for end in range(len(nodes)) if sum(e == end for _, e in edges) > 1}
        optional = {number[n] for n in nodes if _can_do_without(graph, n)}
        dag = Dag(len(nodes), tuple(edges), inputs, outputs, frozenset(joints - optional))
        own = {node: _parameters(graph, node, fed) for node in nodes}
        uses: dict[str, set[int]] = {}
        for node in nodes:
            for name in own[node]:
                uses.setdefault(name, set()).add(number[node])
        candidates = []
        for segment in segments(dag):
            end = segment[-1]
            followers = dag.after[end]
            names = [name for v in segment for name in own[nodes[v]]]
            if (
                names
                and followers
                and end not in dag.outputs
                and all(f in optional and dag.is_joint(f) for f in followers)
                and all(uses[name] <= set(segment) for name in names)
                and _zero_makes_zero([nodes[v] for v in segment], own)
            ):
                unique = tuple(dict.fromkeys(names))
                module = unique[0].rpartition(".")[0] or unique[0]
                candidates.append(Candidate(module, tuple(segment), unique))
        if not candidates:
            raise UnsupportedError(
                "the network has no operator that can be erased: none lies on a branch that ends "
                "in an addition or a concatenation"
            )
        return cls(dag, tuple(candidates), tuple(n.name for n in nodes))

    def vertices(self, chosen: Iterable[int]) -> list[int]:
        """The vertices of these candidates."""
        return [v for index in chosen for v in self.candidates[index].vertices]

    def is_valid(self, chosen: Iterable[int]) -> bool:
        """Whether a path from input to output remains without these candidates."""
        return is_valid(self.dag, self.vertices(chosen))


def choose(space: Space, redundancy: Sequence[float], count: int) -> list[int]:
    """The most redundant candidates that can all go while a path remains (H2SPG, step 2).

    Args:
        space: what may be erased.
        redundancy: of each candidate, high = erase.
        count: how many.

    Returns:
        Indices of candidates, ``count`` of them or as many as validity allows.

    Raises:
        InputError: if the scores do not fit the candidates.
    """
    if len(redundancy) != len(space.candidates):
        raise InputError(
            f"{len(redundancy)} scores were given for {len(space.candidates)} operators"
        )
    chosen: list[int] = []
    for index in sorted(range(len(redundancy)), key=lambda i: -redundancy[i]):
        if len(chosen) == count:
            break
        if space.is_valid([*chosen, index]):
            chosen.append(index)
    return chosen


def erase(module: nn.Module, graph: Graph, space: Space, chosen: Sequence[int]) -> GraphNetwork:
    """Builds the network without some operators; its tensors are copies.

    A dead operand is dropped from additions, and from concatenations together with the input
    columns that read it; where those columns cannot be cut exactly (a BatchNorm sits between)
    zeros take its place, so the outputs are those of the network with the operators zeroed.

    Args:
        module: the network.
        graph: its trace.
        space: the erasing space of that trace.
        chosen: indices of candidates.

    Raises:
        InputError: if no path from input to output would remain.
    """
    if not space.is_valid(chosen):
        names = ", ".join(space.candidates[i].name for i in chosen)
        raise InputError(f"erasing {names} would leave no path from input to output")
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    answer = new.graph_copy(graph.fx, mapped)
    new.output(answer)
    tensors = {
        name: nn.Parameter(t.detach().clone(), requires_grad=t.requires_grad)
        if graph.kinds[name] == "parameter"
        else t.detach().clone()
        for name, t in graph.tensors.items()
    }
    gone = {space.nodes[v] for v in space.vertices(chosen)}
    _Eraser(graph, new, mapped, tensors).run(gone)
    used = {str(node.target) for node in new.nodes if node.op == "get_attr"}
    tensors = {name: t for name, t in tensors.items() if name in used}
    smaller = Graph(
        new,
        tensors,
        {name: kind for name, kind in graph.kinds.items() if name in used},
        copy.deepcopy(graph.outputs),
        dynamic=graph.dynamic,
        parameters=sum(t.numel() for n, t in tensors.items() if graph.kinds[n] == "parameter"),
        example_inputs=graph.example_inputs,
    )
    result = smaller.network()
    result.train(module.training)
    return result


class _Eraser:
    """Walks a copied graph in order and takes dead values out of it."""

    def __init__(
        self,
        old: Graph,
        new: fx.Graph,
        mapped: dict[fx.Node, fx.Node],
        tensors: dict[str, Tensor],
    ) -> None:
        self.old = old
        self.new = new
        self.origin = {copy_: node for node, copy_ in mapped.items()}
        self.mapped = mapped
        self.tensors = tensors
        self.dead: set[fx.Node] = set()
        self.input = next(n for n in new.nodes if n.op == "placeholder" and n.name != "training")

    def run(self, gone: set[str]) -> None:
        self.dead = {self.mapped[n] for n in self.old.fx.nodes if n.name in gone}
        for node in list(self.new.nodes):
            if node in self.dead or node.op != "call_function":
                continue
            if not any(source in self.dead for source in node.all_input_nodes):
                continue
            self._visit(node)
        for node in reversed(list(self.new.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.new.erase_node(node)
        self.new.lint()

    def _visit(self, node: fx.Node) -> None:
        name = op_name(node.target)
        sources = [s for s in node.all_input_nodes if _is_tensor(s) and s.op != "get_attr"]
        lost = [s for s in sources if s in self.dead]
        if name == "sym_size":
            self._resize(node)
        elif name in _ADDITIONS and len(lost) < len(sources):
            (left,) = (s for s in sources if s not in self.dead)
            node.replace_all_uses_with(left)
        elif name in ("cat", "concat"):
            self._concatenate(node)
        elif (
            name in _ADDITIONS
            or name in _PRODUCTS
            or (name in _ZERO_PRESERVING and len(lost) == len(sources))
            or (name in _AFFINE and not _has_bias(node))
        ):
            self.dead.add(node)
        else:
            for source in lost:
                node.replace_input_with(source, self._zeros(source, node))

    def _concatenate(self, node: fx.Node) -> None:
        parts = list(node.args[0])  # type: ignore[arg-type]
        left = [part for part in parts if part not in self.dead]
        if not left:
            self.dead.add(node)
            return
        source = self.origin[node]
        shape = self.old.shape(source)
        assert shape is not None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        assert isinstance(dim, int)
        axis = dim % len(shape)
        keep = torch.cat(
            [torch.full((self._width(part, axis),), part not in self.dead) for part in parts]
        )
        readers = self._readers(node, axis, len(shape))
        if readers is None:
            for part in parts:
                if part in self.dead:
                    node.replace_input_with(part, self._zeros(part, node))
            return
        for reader in readers:
            weight = reader.args[1]
            assert isinstance(weight, fx.Node)
            tensor = self.tensors[str(weight.target)]
            cut = tensor.detach()[:, keep.to(tensor.device)].clone()
            self.tensors[str(weight.target)] = nn.Parameter(cut, tensor.requires_grad)
        if len(left) == 1:
            node.replace_all_uses_with(left[0])
        else:
            node.args = (left, *node.args[1:])

    def _width(self, part: fx.Node, axis: int) -> int:
        shape = self.old.shape(self.origin[part])
        assert shape is not None
        return shape[axis]

    def _readers(self, node: fx.Node, axis: int, ndim: int) -> list[fx.Node] | None:
        """The layers whose input columns are this concatenation's, or None if not only those."""
        found = []
        stack = list(node.users)
        seen = set()
        while stack:
            user = stack.pop()
            if user in seen or user in self.dead:
                continue
            seen.add(user)
            name = op_name(user.target) if user.op == "call_function" else user.op
            sources = [s for s in user.all_input_nodes if _is_tensor(s)]
            weight = user.args[1] if len(user.args) > 1 else None
            own = isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1
            if name == "sym_size" and tuple(user.args)[1:] != (axis,):
                continue
            if (name in _CONVOLUTIONS and axis == 1 and own and _groups(user) == 1) or (
                name == "linear" and axis == ndim - 1 and own
            ):
                found.append(user)
            elif name in _CHANNELWISE and axis == 1 and len(sources) == 1:
                stack.extend(user.users)
            else:
                return None
        return found

    def _zeros(self, source: fx.Node, before: fx.Node) -> fx.Node:
        """A tensor of zeros with the shape that a dead value had."""
        one = self.old.shape(self.origin[source], 1)
        two = self.old.shape(self.origin[source], 2)
        assert one is not None and two is not None
        with self.new.inserting_before(before):
            batch = self.new.call_function(torch.ops.aten.sym_size.int, (self.input, 0))
            sizes: list[int | fx.Node] = []
            for first, second in zip(one, two, strict=True):
                if first == second:
                    sizes.append(first)
                elif (first, second) == (1, 2):
                    sizes.append(batch)
                else:
                    raise UnsupportedError(f"the shape of {source.name} depends oddly on the batch")
            result = self.new.call_function(torch.ops.aten.new_zeros.default, (self.input, sizes))
        result.meta["val"] = self.origin[source].meta.get("val")
        self.origin[result] = self.origin[source]
        return result

    def _resize(self, node: fx.Node) -> None:
        """A size read from a dead value: the batch size, or a number."""
        source, axis = node.args[0], node.args[1]
        assert isinstance(source, fx.Node) and isinstance(axis, int)
        one = self.old.shape(self.origin[source], 1)
        two = self.old.shape(self.origin[source], 2)
        assert one is not None and two is not None
        if one[axis] != two[axis]:
            node.args = (self.input, 0)
        else:
            for user in list(node.users):
                user.args = fx.map_arg(user.args, lambda n: one[axis] if n is node else n)


_ADDITIONS = frozenset(("add", "add_"))
_PRODUCTS = frozenset(("mul", "mul_", "matmul", "bmm", "mm"))
_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d"))
_AFFINE = _CONVOLUTIONS | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
_NORMS = frozenset(("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"))
# phi(0) = 0, or only moves values about.
_CHANNELWISE = frozenset(
    (
        *("relu", "relu_", "gelu", "silu", "silu_", "tanh", "leaky_relu", "leaky_relu_", "elu"),
        *("elu_", "mish", "mish_", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "relu6"),
        *("relu6_", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
        *("max_pool1d", "avg_pool1d", "dropout", "dropout_", "feature_dropout", "contiguous"),
        *("clone", "upsample_nearest2d", "upsample_bilinear2d"),
    )
)
_ZERO_PRESERVING = _CHANNELWISE | frozenset(
    (
        *("view", "reshape", "permute", "transpose", "flatten", "squeeze", "unsqueeze", "expand"),
        *(
            "slice",
            "select",
            "mean",
            "sum",
            "prelu",
            "neg",
            "abs",
            "div",
            "to",
            "_to_copy",
            "detach",
        ),
        *("alias", "getitem", "chunk", "split", "split_with_sizes", "pixel_shuffle"),
    )
)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def _is_vertex(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return isinstance(node.meta.get("val"), Tensor)
    return node.op == "call_function" and _is_tensor(node)


def _parameters(graph: Graph, node: fx.Node, fed: Collection[fx.Node]) -> list[str]:
    """Trainable parameters that an operator reads, also through constants made of them."""
    found: list[str] = []
    stack = [source for source in node.all_input_nodes if source not in fed]
    while stack:
        source = stack.pop(0)
        name = str(source.target)
        if source.op != "get_attr":
            stack.extend(source.all_input_nodes)
        elif graph.kinds[name] == "parameter" and graph.tensors[name].requires_grad:
            found.append(name)
    return found


def _can_do_without(graph: Graph, node: fx.Node) -> bool:
    """Whether an operator can lose one of its inputs: concatenation, addition of equal shapes."""
    if node.op != "call_function":
        return False
    name = op_name(node.target)
    if name in ("cat", "concat"):
        return True
    if name not in _ADDITIONS or len(node.all_input_nodes) != 2:
        return False
    alpha = node.kwargs.get("alpha", 1)
    shapes = {graph.shape(source) for source in node.all_input_nodes}
    return bool(
        alpha == 1
        and shapes == {graph.shape(node)}
        and all(source.op != "get_attr" for source in node.all_input_nodes)
    )


def _zero_makes_zero(chain: Sequence[fx.Node], parameters: Mapping[fx.Node, list[str]]) -> bool:
    """Whether the end of a chain is zero, for every input, when its parameters are zero."""
    zero = False
    for node in chain:
        name = op_name(node.target)
        own = parameters[node]
        if name in _AFFINE:
            held = [s for s in node.all_input_nodes if s.op == "get_attr"]
            zero = len(own) == len(held) > 0 or (zero and not _has_bias(node))
        elif name in _NORMS:
            affine = any(str(n).endswith(("weight", "bias")) for n in own) and len(own) >= 1
            zero = affine and (len(own) == 2 or name == "rms_norm")
        elif name in ("mul", "mul_"):
            # A layer scale; other factors are joints and never inside a chain.
            zero = zero or bool(own)
        elif name not in _ZERO_PRESERVING:
            zero = False
    return zero


def _has_bias(node: fx.Node) -> bool:
    return argument(node, 2, "bias") is not None


def _groups(node: fx.Node) -> int:
    groups = argument(node, 6, "groups", 1)
    return groups if isinstance(groups, int) else 1
