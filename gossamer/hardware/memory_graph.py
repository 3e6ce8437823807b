"""A network as operators that make and read tensors of so many bytes.

What planning a scratchpad needs and no more (Li, Gupta and Malik 2023, section III): operators are
atomic and take one step each; a step needs its inputs and its outputs in the memory at once.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from gossamer.core.errors import InputError
from gossamer.core.graph import Graph, module_of, op_name, overwrites

_ELEMENT_WISE = {
    "batch_norm", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "silu",
    "gelu", "elu", "celu", "selu", "leaky_relu", "prelu", "tanh", "softplus", "softsign", "exp",
    "sqrt", "rsqrt", "abs", "neg", "square", "pow", "clamp", "clamp_min", "clamp_max", "mish",
    "mul", "add", "sub", "div", "rsub", "to", "_to_copy", "clone", "contiguous", "logsigmoid",
    "threshold",
}  # fmt: skip


@dataclass(frozen=True)
class MemoryOp:
    """One operator: a step of every schedule.

    Attributes:
        name: what it is called in messages, as "layer1.0.conv2 (conv2d)".
        inputs: tensors it reads; each once.
        outputs: tensors it makes.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class MemoryGraph:
    """Operators in a valid order, and the bytes of their tensors.

    Args:
        ops: operators, or pairs ``(inputs, outputs)``; producers before readers.
        sizes: bytes of each tensor.

    Raises:
        InputError: if a tensor is read before it is made, made twice, never made, or its size is
            not a positive whole number.
    """

    def __init__(
        self,
        ops: Iterable[MemoryOp | tuple[Iterable[str], Iterable[str]]],
        sizes: Mapping[str, int],
    ) -> None:
        self.ops = tuple(
            op if isinstance(op, MemoryOp) else _named(number, *op) for number, op in enumerate(ops)
        )
        self.sizes = dict(sizes)
        self.producer: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}
        for number, op in enumerate(self.ops):
            for tensor in op.inputs:
                if tensor not in self.producer:
                    raise InputError(f"operator {op.name} reads {tensor} before it is made")
                self.readers[tensor].append(number)
            if not op.outputs:
                raise InputError(f"operator {op.name} makes nothing")
            for tensor in op.outputs:
                if tensor in self.producer:
                    raise InputError(f"{tensor} is made twice, the second time by {op.name}")
                self.producer[tensor] = number
                self.readers[tensor] = []
        if not self.ops:
            raise InputError("the graph has no operators")
        for tensor in self.producer:
            size = self.sizes.get(tensor)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{tensor} has {size!r} bytes; it needs a positive whole number")
        for tensor in self.sizes:
            if tensor not in self.producer:
                raise InputError(f"no operator makes {tensor}, which has a size")

    @classmethod
    def from_graph(
        cls, graph: Graph, *, dtype_bytes: int = 1, parameters: bool = False, fuse: bool = False
    ) -> MemoryGraph:
        """The memory that one sample takes on its way through a network.

        Inputs arrive in steps of their own. Views, and dropout, which does nothing here, are no
        steps: their result is their input. An operator with one activation that overwrites it
        (``relu_``) runs in the step that made it, if nobody else has read it yet; any other
        that overwrites (``add_`` of two) makes a tensor of its own, since what was evicted before
        could not be told from what was changed since.

        Args:
            graph: the traced network.
            dtype_bytes: of each element; 1 for int8.
            parameters: also the parameters. One that a single operator reads is loaded in its
                step (its first load is compulsory and costs nothing here); one that several read
                is loaded in a step of its own and is then a tensor like any other. Constants
                and the statistics that batch normalisation folds into its bias are not counted.
            fuse: element-wise operators of one activation run in the step that makes it, if they
                are its only reader, as accelerators do. The normalisation is then folded into that
                step too.

        Raises:
            InputError: if ``dtype_bytes`` is not positive.
        """
        if dtype_bytes < 1:
            raise InputError(f"dtype_bytes is {dtype_bytes}; it must be at least 1")
        reading = _Reading(graph, dtype_bytes)
        reading.read()
        if fuse:
            reading.fuse()
        if parameters:
            reading.add_parameters()
        return cls(reading.ops, reading.sizes)

    def working_set(self, op: MemoryOp) -> int:
        """Bytes of the inputs and outputs of an operator."""
        return sum(self.sizes[t] for t in dict.fromkeys((*op.inputs, *op.outputs)))

    @cached_property
    def required(self) -> int:
        """Bytes below which some operator cannot run, however much is moved (M_R)."""
        return max(self.working_set(op) for op in self.ops)

    @property
    def largest(self) -> MemoryOp:
        """The operator that needs :attr:`required` bytes."""
        return max(self.ops, key=self.working_set)

    @property
    def order(self) -> tuple[int, ...]:
        """The order in which the operators are listed."""
        return tuple(range(len(self.ops)))

    @cached_property
    def unit(self) -> int:
        """Greatest common divisor of all sizes."""
        return math.gcd(*(self.sizes[t] for t in self.producer))

    @cached_property
    def predecessors(self) -> list[tuple[int, ...]]:
        """The operators whose results each operator reads."""
        return [tuple(dict.fromkeys(self.producer[t] for t in op.inputs)) for op in self.ops]

    @cached_property
    def windows(self) -> list[tuple[int, int]]:
        """First and last step at which each operator can run in any order."""
        count = len(self.ops)
        before, after = [0] * count, [0] * count
        for number in range(count):
            for earlier in self.predecessors[number]:
                before[number] |= before[earlier] | 1 << earlier
        for number in reversed(range(count)):
            for earlier in self.predecessors[number]:
                after[earlier] |= after[number] | 1 << number
        return [(before[n].bit_count(), count - 1 - after[n].bit_count()) for n in range(count)]

    def is_order(self, order: Sequence[int]) -> bool:
        """Whether every operator comes once, and after those it reads from."""
        place = {op: step for step, op in enumerate(order)}
        return sorted(order) == list(self.order) and all(
            place[p] < place[n] for n in self.order for p in self.predecessors[n]
        )

    def footprints(self, order: Sequence[int]) -> list[int]:
        """Bytes that live in each step when nothing is evicted."""
        place = {op: step for step, op in enumerate(order)}
        changes = [0] * (len(order) + 1)
        for tensor, producer in self.producer.items():
            last = max((place[producer], *(place[r] for r in self.readers[tensor])))
            changes[place[producer]] += self.sizes[tensor]
            changes[last + 1] -= self.sizes[tensor]
        return list(itertools.accumulate(changes))[:-1]


@dataclass(frozen=True)
class Peak:
    """The order with the smallest footprint.

    Attributes:
        bytes: its largest footprint (M_P if proved).
        order: operators by number.
        bound: no order needs less.
    """

    bytes: int
    order: tuple[int, ...]
    bound: int

    @property
    def proved(self) -> bool:
        """Whether no order is better."""
        return self.bytes == self.bound


def minimum_peak(graph: MemoryGraph, *, states: int = 50_000, beam: int = 200) -> Peak:
    """The order whose largest sum of live tensors is smallest (M_P), and that sum.

    Same answer as the integer program without eviction and addresses, found by a best-first
    search over sets of executed operators. An operator that does not raise what is live and fits
    under the peak so far runs at once: moving it forward in any schedule raises nothing. Where the
    search would visit too many sets a beam search gives an order, and the bound is what the first
    search had proved until then.

    Args:
        graph: the operators.
        states: sets of operators to visit at most before giving up the proof.
        beam: partial orders that the second search keeps.
    """
    search = _PeakSearch(graph)
    found, bound = search.exact(states)
    if found is None:
        found = min((search.beam(beam), graph.order), key=lambda o: max(graph.footprints(o)))
    peak = max(graph.footprints(found))
    return Peak(peak, tuple(found), min(bound, peak))


_Entry = tuple[int, int, int, int, int, tuple[int, ...], int, int]


class _PeakSearch:
    def __init__(self, graph: MemoryGraph) -> None:
        self.graph = graph
        self.need = [sum(1 << p for p in graph.predecessors[n]) for n in graph.order]
        self.readers = {t: sum(1 << r for r in graph.readers[t]) for t in graph.producer}
        self.made = [sum(graph.sizes[t] for t in op.outputs) for op in graph.ops]
        self.unread = [
            sum(graph.sizes[t] for t in op.outputs if not graph.readers[t]) for op in graph.ops
        ]
        self.after: list[list[int]] = [[] for _ in graph.ops]
        for number in graph.order:
            for earlier in graph.predecessors[number]:
                self.after[earlier].append(number)

    def change(self, done: int, op: int) -> int:
        """How much more lives after an operator than before."""
        with_it = done | 1 << op
        freed = sum(
            self.graph.sizes[t]
            for t in self.graph.ops[op].inputs
            if self.readers[t] & ~with_it == 0
        )
        return self.made[op] - self.unread[op] - freed

    def forced(
        self, done: int, live: int, ready: tuple[int, ...], peak: int
    ) -> tuple[int, int, tuple[int, ...], list[int]]:
        """Runs all operators that cost nothing under ``peak``."""
        ran: list[int] = []
        again = True
        while again:
            again = False
            for op in ready:
                change = self.change(done, op)
                if change <= 0 and live + self.made[op] <= peak:
                    done, ready = self.run(done, ready, op)
                    live += change
                    ran.append(op)
                    again = True
                    break
        return done, live, ready, ran

    def run(self, done: int, ready: tuple[int, ...], op: int) -> tuple[int, tuple[int, ...]]:
        done |= 1 << op
        new = tuple(n for n in self.after[op] if self.need[n] & ~done == 0)
        return done, tuple(n for n in ready if n != op) + new

    def exact(self, states: int) -> tuple[list[int] | None, int]:
        everything = (1 << len(self.graph.ops)) - 1
        start = tuple(n for n in self.graph.order if not self.need[n])
        ticket = itertools.count()
        # Smallest peak first; among equals the one that has run most.
        heap: list[_Entry] = [(self.graph.required, 0, next(ticket), 0, 0, start, 0, -1)]
        came: dict[int, tuple[int, list[int]]] = {}
        offered: dict[int, int] = {}
        bound = self.graph.required
        while heap:
            peak, _, _, done, live, ready, origin, op = heapq.heappop(heap)
            bound = peak
            if done in came:
                continue
            came[done] = (origin, [op] if op >= 0 else [])
            if len(came) > states:
                return None, bound
            before = done
            done, live, ready, ran = self.forced(done, live, ready, peak)
            if ran:
                if done in came:
                    continue
                came[done] = (before, ran)
            if done == everything:
                return self.path(came, done), bound
            for op in ready:
                top = max(peak, live + self.made[op])
                after, new = self.run(done, ready, op)
                if after in came or offered.get(after, top + 1) <= top:
                    continue
                offered[after] = top
                later = live + self.change(done, op)
                entry = (top, -after.bit_count(), next(ticket), after, later, new, done, op)
                heapq.heappush(heap, entry)
        raise AssertionError("some operator can always run")

    def path(self, came: dict[int, tuple[int, list[int]]], done: int) -> list[int]:
        order: list[int] = []
        while done:
            done, ran = came[done]
            order[:0] = ran
        return order

    def beam(self, width: int) -> list[int]:
        start = tuple(n for n in self.graph.order if not self.need[n])
        states = {0: (self.graph.required, 0, start, ())}
        everything = (1 << len(self.graph.ops)) - 1
        while True:
            following: dict[int, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {}
            for done, (peak, live, ready, order) in states.items():
                for op in ready:
                    after, new = self.run(done, ready, op)
                    top = max(peak, live + self.made[op])
                    value = (top, live + self.change(done, op), new, (*order, op))
                    if after not in following or value[:2] < following[after][:2]:
                        following[after] = value
            best = sorted(following.items(), key=lambda item: item[1][:2])[:width]
            states = dict(best)
            if everything in states:
                return list(states[everything][3])


class _Reading:
    """Turns a traced network into operators and tensors."""

    def __init__(self, graph: Graph, dtype_bytes: int) -> None:
        self.graph = graph
        self.dtype_bytes = dtype_bytes
        self.ops: list[MemoryOp] = []
        self.nodes: list[list[fx.Node]] = []  # what runs in each step
        self.sizes: dict[str, int] = {}

    def read(self) -> None:
        graph = self.graph
        elements = {b.node: max(1, b.elements) for b in graph.buffers}
        # What a memory holds now: overwriting it begins another tensor.
        current: dict[fx.Node, str] = {}
        made_by: dict[str, int] = {}
        read: set[str] = set()
        for node in graph.steps:
            root = graph.storage[node]
            if node.op == "output" or root not in elements:
                continue
            if root is not node and not overwrites(node):
                continue  # a view
            memories = [graph.storage[n] for n in node.all_input_nodes]
            sources = tuple(dict.fromkeys(current[m] for m in memories if m in current))
            if root is not node and sources == (current[root],) and sources[0] not in read:
                self.nodes[made_by[sources[0]]].append(node)
                continue
            made_by[node.name] = len(self.ops)
            self.ops.append(MemoryOp(_label(node), sources, (node.name,)))
            self.nodes.append([node])
            self.sizes[node.name] = self.dtype_bytes * elements[root]
            current[root] = node.name
            read.update(sources)

    def fuse(self) -> None:
        readers: dict[str, int] = {}
        for op in self.ops:
            for tensor in op.inputs:
                readers[tensor] = readers.get(tensor, 0) + 1
        ops: list[MemoryOp] = []
        nodes: list[list[fx.Node]] = []
        made_by: dict[str, int] = {}
        for op, ran in zip(self.ops, self.nodes, strict=True):
            (tensor,) = op.outputs
            source = op.inputs[0] if len(op.inputs) == 1 else None
            if (
                source is not None
                and readers[source] == 1
                and ops[made_by[source]].inputs
                and self.sizes[source] == self.sizes[tensor]
                and all(op_name(n.target).rstrip("_") in _ELEMENT_WISE for n in ran)
            ):
                host = made_by[source]
                ops[host] = replace(ops[host], outputs=op.outputs)
                nodes[host] += ran
                made_by[tensor] = host
                del self.sizes[source]
                continue
            made_by[tensor] = len(ops)
            ops.append(op)
            nodes.append(ran)
        self.ops, self.nodes = ops, nodes

    def add_parameters(self) -> None:
        read_by: dict[str, list[int]] = {}
        for number, ran in enumerate(self.nodes):
            for place, node in enumerate(ran):
                for name in self.weights(node, folded=place > 0):
                    if number not in read_by.setdefault(name, []):
                        read_by[name].append(number)
        loads: dict[int, list[str]] = {}
        for name, numbers in read_by.items():
            self.sizes[name] = self.dtype_bytes * max(1, self.graph.tensors[name].numel())
            if len(numbers) == 1:
                op = self.ops[numbers[0]]
                self.ops[numbers[0]] = replace(op, outputs=(*op.outputs, name))
            else:
                loads.setdefault(numbers[0], []).append(name)
                for number in numbers:
                    op = self.ops[number]
                    self.ops[number] = replace(op, inputs=(*op.inputs, name))
        ops: list[MemoryOp] = []
        for number, op in enumerate(self.ops):
            ops += [MemoryOp(f"load {name}", (), (name,)) for name in loads.get(number, ())]
            ops.append(op)
        self.ops = ops

    def weights(self, node: fx.Node, *, folded: bool) -> list[str]:
        roots = [(n, self.graph.storage[n]) for n in node.all_input_nodes]
        names = dict.fromkeys(
            str(root.target)
            for _, root in roots
            if root.op == "get_attr" and self.graph.kinds[str(root.target)] == "parameter"
        )
        if folded and op_name(node.target) == "batch_norm":
            scale = node.args[1]
            names.pop(str(getattr(scale, "target", None)), None)
        return list(names)


def _label(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"input {node.name}"
    module = module_of(node)
    return f"{module} ({op_name(node.target)})" if module else op_name(node.target)


def _named(number: int, inputs: Iterable[str], outputs: Iterable[str]) -> MemoryOp:
    made = tuple(outputs)
    return MemoryOp(f"{number}: {' '.join(made)}", tuple(dict.fromkeys(inputs)), made)
