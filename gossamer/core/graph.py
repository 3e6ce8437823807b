"""The network as ``torch.export`` sees it.

One trace (evaluation mode, dynamic batch where the network admits it) serves counting, removable
groups, surgery and every analysis that needs operators with shapes. Parameters, buffers and
constants are named by their state-dict names; batch normalisation and dropout follow a ``training``
flag instead of the constants an exported program carries, so that a network built from the graph
trains as well as it evaluates.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.core.cost import Cost
from gossamer.core.errors import UnsupportedError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]

# Guards of the tracer: they compute nothing.
_GUARDS = {
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
}
# Operators that only look at their input's storage in another way.
VIEWS = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "flatten", "unflatten",
    "squeeze", "unsqueeze", "expand", "slice", "select", "split", "split_with_sizes", "chunk",
    "unbind", "detach", "detach_", "alias", "narrow", "movedim", "lift_fresh_copy", "swapaxes",
    "expand_as", "view_as", "diagonal", "tensor_split", "numpy_T", "mT", "unsafe_chunk",
    "unsafe_split", "reshape_as", "squeeze_", "unsqueeze_", "lift_fresh",
}  # fmt: skip


def op_name(target: Any) -> str:
    """The operator's bare name: "conv2d" for ``aten.conv2d.default``, "getitem" for indexing."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def overload_name(target: Any) -> str:
    """The operator's full name, as "aten.conv2d.default"."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else op_name(target)


@dataclass(frozen=True)
class Operator:
    """One operator of a network.

    Attributes:
        name: name of its node, unique in the graph.
        op: bare operator name, as "conv2d".
        module: dotted path of the innermost module that ran it.
        inputs: shapes of its tensor inputs at batch 1 (weights included).
        outputs: shapes of its outputs at batch 1.
        weights: state-dict names of the parameters, buffers and constants it reads.
        macs: multiply-accumulates for one sample.
        input_bytes: bytes read, float32.
        output_bytes: bytes written, float32; 0 for a view.
        line: the source line that ran it.
    """

    name: str
    op: str
    module: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    weights: tuple[str, ...]
    macs: int
    input_bytes: int
    output_bytes: int
    line: str


@dataclass(frozen=True)
class Buffer:
    """Memory that one activation takes.

    Attributes:
        node: what makes it.
        elements: of one sample.
        made: position of that node among the graph's steps.
        uses: positions of the later steps that read it, overwrite it or look at it another way.
    """

    node: fx.Node
    elements: int
    made: int
    uses: tuple[int, ...]


class Graph:
    """A traced network.

    Attributes:
        fx: nodes are inputs (placeholders; the last one is the ``training`` flag), tensors
            (``get_attr`` by state-dict name) and ATen operators.
        tensors: parameters, buffers and constants that the operators read, by name. They are the
            module's own, not copies.
        kinds: "parameter", "buffer" or "constant" of each of them.
        outputs: how the flat outputs of ``fx`` are put together again.
        dynamic: whether the batch size is free.
        parameters: parameters of the module, elements (shared ones once).
        example_inputs: what it was traced with.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: dict[str, Tensor],
        kinds: dict[str, str],
        outputs: pytree.TreeSpec,
        *,
        dynamic: bool,
        parameters: int,
        example_inputs: tuple[Any, ...],
    ) -> None:
        self.fx = graph
        self.tensors = tensors
        self.kinds = kinds
        self.outputs = outputs
        self.dynamic = dynamic
        self.parameters = parameters
        self.example_inputs = example_inputs
        self._sizes: dict[tuple[Any, int], int] = {}

    @classmethod
    def trace(cls, module: nn.Module, example_inputs: Sequence[Any]) -> Graph:
        """Traces ``module`` in evaluation mode.

        Args:
            module: the network; unchanged.
            example_inputs: positional arguments, batch first, batch at least 2.

        Raises:
            UnsupportedError: if torch.export cannot trace it; the sentence has the reason.
        """
        inputs = tuple(example_inputs)
        modes = [(m, m.training) for m in module.modules()]
        module.eval()
        try:
            program, dynamic = _export(module, inputs)
        finally:
            for part, mode in modes:
                part.training = mode
        if not dynamic:
            inputs = pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, inputs)
        graph = cls._from_program(module, program, inputs, dynamic)
        if isinstance(module, GraphNetwork):
            _copy_origins(module.program.graph, graph.fx)
        return graph

    @classmethod
    def _from_program(
        cls,
        module: nn.Module,
        program: torch.export.ExportedProgram,
        example_inputs: tuple[Any, ...],
        dynamic: bool,
    ) -> Graph:
        signature = program.graph_signature
        names = _canonical_names(module)
        kinds: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        graph = fx.Graph()
        env: dict[fx.Node, Any] = {}
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        lifted: list[tuple[fx.Node, str]] = []
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            kind = spec.kind.name
            if kind == "USER_INPUT":
                env[node] = _like(graph.placeholder(node.name), node)
            elif kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                target = str(spec.target)
                tensor: Any = (
                    program.state_dict[target]
                    if target in program.state_dict
                    else program.constants[target]
                )
                name = names.get(_identity(tensor), target)
                kinds[name] = {"PARAMETER": "parameter", "BUFFER": "buffer"}.get(kind, "constant")
                tensors[name] = tensor
                lifted.append((node, name))
            else:
                raise UnsupportedError(f"the network takes an input of kind {kind.lower()}")
        training = graph.placeholder("training", default_value=False)
        attributes: dict[str, fx.Node] = {}
        for node, name in lifted:
            if name not in attributes:
                attributes[name] = _like(graph.get_attr(name), node)
            env[node] = attributes[name]
        flat = _copy_nodes(program.graph, program.graph_module, graph, env, training)
        if flat is None:
            raise UnsupportedError("the network has no output")
        kept = [
            out
            for out, spec in zip(flat, signature.output_specs, strict=True)
            if spec.kind.name not in ("BUFFER_MUTATION", "USER_INPUT_MUTATION")
        ]
        graph.output(tuple(kept))
        _drop_unused(graph)
        outputs = program.call_spec.out_spec
        assert outputs is not None
        used = {node.target for node in graph.nodes if node.op == "get_attr"}
        return cls(
            graph,
            {name: tensor for name, tensor in tensors.items() if name in used},
            {name: kind for name, kind in kinds.items() if name in used},
            outputs,
            dynamic=dynamic,
            parameters=sum(p.numel() for p in module.parameters()),
            example_inputs=example_inputs,
        )

    def size(self, value: Any, batch: int) -> int:
        """A size of a traced shape as a number, with every free size set to ``batch``."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        key = (expression, batch)
        if key not in self._sizes:
            self._sizes[key] = int(
                expression.subs({symbol: batch for symbol in expression.free_symbols})
            )
        return self._sizes[key]

    def shape(self, node: fx.Node, batch: int = 1) -> Shape | None:
        """The shape of a node's (single) tensor, or None if it yields something else."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        return tuple(self.size(s, batch) for s in value.shape)

    def shapes(self, node: fx.Node, batch: int = 1) -> tuple[Shape, ...]:
        """The shapes of all tensors a node yields."""
        values = pytree.tree_leaves(node.meta.get("val"))
        return tuple(
            tuple(self.size(s, batch) for s in value.shape)
            for value in values
            if isinstance(value, Tensor)
        )

    @cached_property
    def operators(self) -> list[Operator]:
        """Every operator on tensors, in execution order."""
        return [
            self._operator(node)
            for node in self.fx.nodes
            if node.op == "call_function"
            and self.shapes(node)
            and op_name(node.target) != "getitem"
        ]

    def _operator(self, node: fx.Node) -> Operator:
        sources = [n for n in node.all_input_nodes if self.shapes(n)]
        inputs = tuple(shape for n in sources for shape in self.shapes(n))
        outputs = self.shapes(node)
        name = op_name(node.target)
        view = name in VIEWS
        return Operator(
            name=node.name,
            op=name,
            module=module_of(node),
            inputs=inputs,
            outputs=outputs,
            weights=tuple(str(n.target) for n in sources if n.op == "get_attr"),
            macs=self._macs(node),
            input_bytes=0 if view else 4 * sum(math.prod(s) for s in inputs),
            output_bytes=0 if view else 4 * sum(math.prod(s) for s in outputs),
            line=line_of(node),
        )

    def _macs(self, node: fx.Node) -> int:
        count = _MACS.get(op_name(node.target))
        if count is None:
            return 0
        return count(self, node)

    @cached_property
    def macs(self) -> int:
        """Dense multiply-accumulates of one sample: convolutions, products and attention."""
        return sum(op.macs for op in self.operators)

    @property
    def macs_effective(self) -> int:
        """Multiply-accumulates of one sample that remain when zero weights are skipped."""
        kept = {
            name: float((tensor != 0).sum()) / max(1, tensor.numel())
            for name, tensor in self.tensors.items()
            if self.kinds[name] == "parameter" and tensor.ndim > 1
        }
        return round(
            sum(
                op.macs * math.prod(kept[name] for name in op.weights if name in kept)
                for op in self.operators
            )
        )

    def cost(self) -> Cost:
        """The counted costs."""
        return Cost(
            parameters=self.parameters,
            macs=self.macs,
            macs_effective=self.macs_effective,
            bytes_moved=sum(op.input_bytes + op.output_bytes for op in self.operators),
            activation_bytes=self.peak_activation_bytes(),
        )

    @cached_property
    def steps(self) -> list[fx.Node]:
        """What happens, in order: inputs arrive, operators run, the outputs are read."""
        return [n for n in self.fx.nodes if n.op in ("placeholder", "call_function", "output")]

    @cached_property
    def storage(self) -> dict[fx.Node, fx.Node]:
        """The node that made the memory in which each node's result lies.

        Views, items of several results, operators that overwrite their input and dropout (which
        passes its input on in evaluation) have the memory of their input.
        """
        made: dict[fx.Node, fx.Node] = {}
        for node in self.fx.nodes:
            sources = [made[n] for n in node.all_input_nodes]
            made[node] = sources[0] if sources and _shares_memory(node) else node
        return made

    @cached_property
    def buffers(self) -> list[Buffer]:
        """The memory that activations (inputs and results of operators) take, in order."""
        made: dict[fx.Node, int] = {}
        uses: dict[fx.Node, list[int]] = {}
        for position, step in enumerate(self.steps):
            for source in dict.fromkeys(self.storage[n] for n in step.all_input_nodes):
                if source in made:
                    uses[source].append(position)
            if self.storage[step] is step and step.op != "output" and self.shapes(step):
                made[step] = position
                uses[step] = []
        return [
            Buffer(node, sum(math.prod(s) for s in self.shapes(node)), position, tuple(uses[node]))
            for node, position in made.items()
        ]

    def peak_activation_bytes(self) -> int:
        """Largest sum of live activations while the operators run in order (one sample, float32).

        An activation lives until its last reader has run; what lies in the same memory counts once.
        """
        changes = [0] * (len(self.steps) + 1)
        for buffer in self.buffers:
            changes[buffer.made] += 4 * buffer.elements
            changes[max((buffer.made, *buffer.uses)) + 1] -= 4 * buffer.elements
        return max(itertools.accumulate(changes))

    def network(self) -> GraphNetwork:
        """A module that runs this graph with the tensors it holds (shared, not copied)."""
        return GraphNetwork(self)


class GraphNetwork(nn.Module):
    """A network that runs a :class:`Graph`; it trains, evaluates, exports and is traced again.

    Parameter names are those of the original module.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        holder = nn.Module()
        for name, tensor in graph.tensors.items():
            _attach(holder, name, tensor, graph.kinds[name])
        self.program = fx.GraphModule(holder, graph.fx)
        self.output_spec = graph.outputs
        self.arity = sum(node.op == "placeholder" for node in graph.fx.nodes) - 1
        if not 1 <= self.arity <= 6:
            raise UnsupportedError(f"a network of {self.arity} inputs cannot be rebuilt")

    # Named inputs, not ``*inputs``: exporters describe free sizes by the signature.
    def forward(
        self, a: Any, b: Any = None, c: Any = None, d: Any = None, e: Any = None, f: Any = None
    ) -> Any:
        """Runs the graph; ``self.training`` decides batch statistics and dropout."""
        outputs = self.program(*(a, b, c, d, e, f)[: self.arity], self.training)
        return pytree.tree_unflatten(list(outputs), self.output_spec)


def overwrites(node: fx.Node) -> bool:
    """Whether an operator writes its result over its first input, as ``relu_`` does."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or op_name(target) in VIEWS:
        return False
    arguments = target._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and alias.is_write


def _shares_memory(node: fx.Node) -> bool:
    name = op_name(node.target)
    passes = node.op == "call_function" and overload_name(node.target) in _DROPOUTS
    return name in VIEWS or name == "getitem" or passes or overwrites(node)


def level_of(module: nn.Module) -> str:
    """What the names of a network's tensors begin with, beside what the original modules gave.

    A network that runs a graph keeps its tensors one level down.
    """
    return "program." if isinstance(module, GraphNetwork) else ""


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module that ran a node ("" for the network itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def _copy_origins(old: fx.Graph, new: fx.Graph) -> None:
    """Tells the operators of a graph traced anew which of the original modules they are of."""
    before = [node for node in old.nodes if node.op == "call_function"]
    after = [node for node in new.nodes if node.op == "call_function"]
    match = SequenceMatcher(
        None, [str(n.target) for n in before], [str(n.target) for n in after], autojunk=False
    )
    for block in match.get_matching_blocks():
        for offset in range(block.size):
            source = before[block.a + offset].meta.get("nn_module_stack")
            if source:
                after[block.b + offset].meta["nn_module_stack"] = source


def line_of(node: fx.Node) -> str:
    """The innermost source line outside torch that ran a node, as "file:line"."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/torch/nn/" not in line] or lines
    if not own:
        return ""
    parts = own[-1].split('"')
    number = own[-1].split("line ")[-1].split(",")[0]
    return f"{parts[1].rsplit('/', 1)[-1]}:{number}" if len(parts) > 1 else ""


def _export(
    module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[torch.export.ExportedProgram, bool]:
    auto = torch.export.Dim.AUTO
    shapes = pytree.tree_map(
        lambda x: {0: auto} if isinstance(x, Tensor) and x.ndim else None, inputs
    )
    reason: Exception | None = None
    for dynamic in (True, False):
        if not dynamic:
            inputs = pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, inputs)
        try:
            with torch.no_grad():
                program = torch.export.export(
                    module, inputs, dynamic_shapes=shapes if dynamic else None, strict=False
                )
        except Exception as error:  # torch.export raises nearly every kind there is
            reason = error
            continue
        free = any(
            isinstance(size, torch.SymInt) and not size.node.expr.is_number
            for node in program.graph.nodes
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
            for size in node.meta["val"].shape
        )
        return program, free
    text = str(reason).strip().splitlines()
    first = text[0] if text else type(reason).__name__
    raise UnsupportedError(
        f"{type(module).__name__} cannot be traced by torch.export: {first}"
    ) from reason


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _canonical_names(module: nn.Module) -> dict[tuple[Any, ...], str]:
    """The first name of each parameter and buffer: tied tensors are one."""
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.numel() > 0:
            names.setdefault(_identity(tensor), name)
    return names


def _like(new: fx.Node, old: fx.Node) -> fx.Node:
    for key in ("val", "nn_module_stack", "stack_trace"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    return new


def _copy_nodes(
    source: fx.Graph, root: nn.Module, graph: fx.Graph, env: dict[fx.Node, Any], training: fx.Node
) -> list[Any] | None:
    """Copies the operators of ``source`` into ``graph``; returns its (mapped) outputs.

    Regions that only switch gradients or autocast are inlined.
    """
    for node in source.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return list(
                pytree.tree_leaves(
                    fx.map_arg(node.args[0], lambda n: env[n]), is_leaf=lambda x: x is None
                )
            )
        if node.op == "get_attr":
            env[node] = getattr(root, str(node.target))
            continue
        name = overload_name(node.target)
        if name in _GUARDS:
            continue
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            inner = next(
                arg
                for arg in node.args
                if isinstance(arg, fx.Node) and isinstance(env[arg], fx.GraphModule)
            )
            body = env[inner]
            operands = node.args[node.args.index(inner) + 1 :]
            holes = [n for n in body.graph.nodes if n.op == "placeholder"]
            inside = {
                hole: fx.map_arg(operand, lambda n: env[n])
                for hole, operand in zip(holes, operands, strict=True)
            }
            env[node] = _copy_nodes(body.graph, body, graph, inside, training)
            continue
        if node.target is operator.getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
            continue
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        args = _follow_training(name, args, training)
        new = graph.call_function(node.target, args, kwargs)
        env[node] = _like(new, node)
    return None


def _follow_training(name: str, args: tuple[Any, ...], training: fx.Node) -> tuple[Any, ...]:
    """Makes batch normalisation and dropout follow the flag; the trace has them as constants."""
    if name == "aten.batch_norm.default" and args[3] is not None and args[5] is False:
        return (*args[:5], training, *args[6:])
    if name in _DROPOUTS and args[2] is False:
        return (*args[:2], training)
    return args


_DROPOUTS = {
    f"aten.{kind}.default"
    for kind in (
        "dropout",
        "dropout_",
        "feature_dropout",
        "feature_dropout_",
        "alpha_dropout",
        "feature_alpha_dropout",
    )
}


def _drop_unused(graph: fx.Graph) -> None:
    """Removes nodes nobody reads: unread tensors and what only fed a guard."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if not mutates:
            graph.erase_node(node)


def _attach(root: nn.Module, name: str, tensor: Tensor, kind: str) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if kind == "parameter":
        root.register_parameter(
            last, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        )
    else:
        root.register_buffer(last, tensor.detach())


# Multiply-accumulates of one sample ---------------------------------------------------------


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _macs_convolution(graph: Graph, node: fx.Node) -> int:
    weight = graph.shape(node.args[1])  # type: ignore[arg-type]
    (out,) = graph.shapes(node)
    assert weight is not None
    return math.prod(out) * math.prod(weight[1:])


def _macs_transposed(graph: Graph, node: fx.Node) -> int:
    weight = graph.shape(node.args[1])  # type: ignore[arg-type]
    source = graph.shape(node.args[0])  # type: ignore[arg-type]
    assert weight is not None and source is not None
    return math.prod(source) * math.prod(weight[1:])


def _macs_product(graph: Graph, node: fx.Node) -> int:
    name = op_name(node.target)
    first = 1 if name in ("addmm", "baddbmm") else 0
    left = graph.shape(node.args[first])  # type: ignore[arg-type]
    (out,) = graph.shapes(node)
    assert left is not None
    return math.prod(out) * left[-1]


def _macs_attention(graph: Graph, node: fx.Node) -> int:
    q, k, v = (graph.shape(n) for n in node.args[:3])  # type: ignore[arg-type]
    assert q is not None and k is not None and v is not None
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _macs_einsum(graph: Graph, node: fx.Node) -> int:
    equation = str(node.args[0]).replace(" ", "")
    operands = list(node.args[1])  # type: ignore[arg-type]
    if len(operands) != 2 or "..." in equation:
        return 0
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        shape = graph.shape(operand)
        assert shape is not None
        sizes.update(zip(letters, shape, strict=True))
    return math.prod(sizes.values())


_MACS: dict[str, Callable[[Graph, fx.Node], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _macs_convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _macs_transposed),
    **dict.fromkeys(
        ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot"), _macs_product
    ),
    "scaled_dot_product_attention": _macs_attention,
    "einsum": _macs_einsum,
}


def walk(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """Operators with their bare names."""
    for node in nodes:
        if node.op == "call_function":
            yield node, op_name(node.target)


def layer_table(graph: Graph) -> list[Mapping[str, Any]]:
    """Counted costs summed by module, in execution order, for tables and reports."""
    rows: dict[str, dict[str, Any]] = {}
    for op in graph.operators:
        row = rows.setdefault(
            op.module,
            {
                "module": op.module,
                "ops": [],
                "macs": 0,
                "parameters": 0,
                "bytes_moved": 0,
                "output": op.outputs[-1],
                "seen": set(),
            },
        )
        row["ops"].append(op.op)
        row["macs"] += op.macs
        row["bytes_moved"] += op.input_bytes + op.output_bytes
        row["output"] = op.outputs[-1]
        for name in op.weights:
            if graph.kinds[name] == "parameter" and name not in row["seen"]:
                row["seen"].add(name)
                row["parameters"] += graph.tensors[name].numel()
    for row in rows.values():
        del row["seen"]
    return list(rows.values())
