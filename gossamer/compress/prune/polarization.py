"""One static sub-network that input-dependent gates agree on in a single training run.

Small binary gates decide for every input which residual blocks (or inner channels) it goes through.
A *polarization* term drives each gate's average over inputs to 0 or 1, so that all inputs agree; an
*activation* term sets how many stay open. At the end what is closed for all inputs is cut and the
gates are dropped: a plain smaller network, without fine-tuning.

Source: Zhi, Babbar, Liu, Sun, Silavong, Shi and Moran, "Learning a consensus sub-network with
polarization regularization and one pass training", arXiv:2302.10798. No code was published; these
details are ours, each an option: the gate's hidden width and normalisation, where it starts, how
the weights of the two terms develop, and how a target is reached. Baselines beside it: Liu et al.,
"Network slimming", ICCV 2017, and Zhuang et al., "Neuron-level structured pruning using
polarization regularizer", NeurIPS 2020 (:func:`scaling_penalty`); Gumbel-sigmoid gates as in Veit
and Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from gossamer.core import surgery
from gossamer.core.dependency import Dependency
from gossamer.core.errors import BudgetError, InputError, UnsupportedError
from gossamer.core.fit import Log, Rule, cosine, fit, sgd
from gossamer.core.graph import Graph, GraphNetwork, module_of, op_name
from gossamer.core.network import Network
from gossamer.core.task import (
    Batch,
    Classification,
    Task,
    device_of,
    evaluating,
    seed_of,
    to_device,
)
from gossamer.parts.batchnorm import recalibrate_on
from gossamer.parts.straight_through import straight_through

log = logging.getLogger(__name__)

Mode = Literal["layer", "channel"]
Binarize = Literal["straight", "hard", "gumbel"]
Control = Literal["distance", "integral"]

TOLERANCE = 1e-4  # between the extracted network and the gated one, relative, float32
SETTLED = 2 / 3  # of training: ramps end here, since a learning rate near 0 moves no gate

# Losses


def polarization(means: Tensor) -> Tensor:
    """``mean g (1 - g)``: 0 if all inputs agree on every gate, at most .25 (R_polar).

    Args:
        means: of each gate over inputs, ``[gates]``.
    """
    return (means * (1.0 - means)).mean()


def activation(means: Tensor, weights: Tensor | None = None) -> Tensor:
    """The share of gates that are open (R_act).

    Args:
        means: of each gate over inputs, ``[gates]``.
        weights: of each gate, adding up to 1; as their MACs, so that dear ones count more.
            Default: equal.
    """
    return means.mean() if weights is None else (means * weights).sum()


def consensus_gap(means: Tensor) -> float:
    """``mean min(g, 1 - g)``: how far inputs are from agreeing, 0 to .5."""
    return float(torch.minimum(means, 1.0 - means).mean())


def scaling_penalty(network: nn.Module, *, t: float | None = None) -> Tensor:
    """A penalty on the scales of batch normalisation, ``sum t |s| - |s - mean s|``.

    Args:
        network: all its batch-norm weights.
        t: of the polarizing regularizer (1.2 in its paper); None is plain L1, network slimming.
    """
    scales = [m.weight for m in network.modules() if isinstance(m, _BatchNorm) and m.affine]
    flat = torch.cat([scale.flatten() for scale in scales])
    if t is None:
        return flat.abs().sum()
    return (t * flat.abs() - (flat - flat.mean()).abs()).sum()


# Where gates can be


@dataclass(frozen=True)
class Residual:
    """An addition ``x + F(x)`` in a traced network.

    Attributes:
        module: path of the innermost module that adds.
        add: name of the addition's node.
        source: name of x.
        branch: name of F(x).
        inside: names of the operators that only F needs.
        features: size of x along its feature axis.
        axis: that axis.
        shape: of x for one sample; blocks of equal shape are one stage.
        macs: of the operators inside.
    """

    module: str
    add: str
    source: str
    branch: str
    inside: frozenset[str]
    features: int
    axis: int
    shape: tuple[int, ...]
    macs: int


def find_residuals(graph: Graph, exclude: Collection[str] = ()) -> list[Residual]:
    """The innermost residual blocks whose shortcut is the identity, in execution order.

    Blocks that change the shape, and so have a shortcut of their own, are none of them.

    Args:
        graph: the trace.
        exclude: paths of modules whose blocks are left out.
    """
    nodes = list(graph.fx.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    found: list[Residual] = []
    for node in nodes:
        if node.op != "call_function" or op_name(node.target) not in ("add", "add_"):
            continue
        pair = [n for n in node.args[:2] if isinstance(n, fx.Node)]
        if len(pair) != 2 or graph.shape(pair[0]) != graph.shape(pair[1]) or node.kwargs:
            continue
        source, branch = sorted(pair, key=place.__getitem__)
        path = module_of(node)
        if any(f"{path}.".startswith(f"{part}.") for part in exclude) or source is branch:
            continue
        inside = _between(source, branch, node)
        if inside is None:
            continue
        macs = sum(graph._macs(n) for n in inside)
        shape = graph.shape(source)
        if not macs or not shape or len(shape) < 2 or not _by_sample(graph, source):
            continue
        names = frozenset(n.name for n in inside)
        # An addition inside of another's branch: the inner one is the block.
        if any(other.add in names for other in found):
            continue
        axis = _feature_axis(source, len(shape))
        found.append(
            Residual(
                path, node.name, source.name, branch.name, names, shape[axis], axis, shape, macs
            )
        )
    return found


def _between(source: fx.Node, branch: fx.Node, add: fx.Node) -> list[fx.Node] | None:
    """The operators that only the branch needs; None if it does not come from the source."""
    above: set[fx.Node] = set()
    stack = [branch]
    meets = False
    while stack:
        node = stack.pop()
        if node is source:
            meets = True
            continue
        if node in above or node.op != "call_function":
            continue
        above.add(node)
        stack.extend(node.all_input_nodes)
    if not meets:
        return None
    # What something else reads too stays when the branch leaves.
    ordered = [n for n in reversed(list(branch.graph.nodes)) if n in above]
    inside: set[fx.Node] = set()
    for node in ordered:
        if all(user in inside or user is add for user in node.users):
            inside.add(node)
    return [n for n in reversed(ordered) if n in inside] if branch in inside else None


def _by_sample(graph: Graph, node: fx.Node) -> bool:
    """Whether the first axis counts samples, and no windows or tokens beside them."""
    shape = graph.shape(node, 2)
    return shape is not None and shape[0] == (2 if graph.dynamic else 1)


def _mixed(graph: Graph, inside: frozenset[str]) -> set[str]:
    """Operators whose outputs meet other activations in a product, as queries meet keys.

    What leaves there changes more than what the readers see.
    """
    found: set[str] = set()
    for node in reversed(list(graph.fx.nodes)):
        if node.name not in inside:
            continue
        activations = [n for n in node.all_input_nodes if n.op == "call_function"]
        product = len(activations) > 1 and graph._macs(node) > 0
        if product or node.name in found:
            found.update(n.name for n in activations if n.name in inside)
    return found


def _feature_axis(source: fx.Node, rank: int) -> int:
    normed = any(op_name(user.target) == "layer_norm" for user in source.users)
    return 1 if rank == 4 and not normed else rank - 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels inside a residual block that can leave without changing its width.

    Attributes:
        block: index of the residual.
        family: index of the dependency's family.
        readers: the operators that read the channels, by name: axis and, for each index of it, the
            channel.
        units: how many channels.
        macs: of one channel, everything that would go with it.
    """

    block: int
    family: int
    readers: Mapping[str, tuple[int, Tensor]]
    units: int
    macs: float


def find_channels(dependency: Dependency, residuals: Sequence[Residual]) -> list[ChannelGroup]:
    """The channels inside residual blocks, by family.

    Args:
        dependency: of the traced network.
        residuals: its blocks.
    """
    graph = dependency.graph
    groups: list[ChannelGroup] = []
    users = {str(node.target): list(node.users) for node in graph.fx.nodes if node.op == "get_attr"}
    mixed = [_mixed(graph, block.inside) for block in residuals]
    for family in dependency.families:
        touched = {user.name for member in family.members for user in users[member.name]}
        blocks = [i for i, block in enumerate(residuals) if touched <= block.inside]
        if len(blocks) != 1 or family.exactness != "exact" or touched & mixed[blocks[0]]:
            continue
        readers: dict[str, tuple[int, Tensor]] = {}
        for member in family.members:
            if member.role != "consumer" or not member.parameter:
                continue
            for user in users[member.name]:
                value = user.args[0]
                assert isinstance(value, fx.Node)
                shape = graph.shape(value)
                if shape is None or not _by_sample(graph, value):
                    continue
                axis = 1 if op_name(user.target).startswith("conv") else len(shape) - 1
                if shape[axis] == len(member.owner) and bool((member.owner >= 0).all()):
                    readers[user.name] = (axis, member.owner)
        consumers = {u.name for m in family.members if m.role == "consumer" for u in users[m.name]}
        if not readers or set(readers) != consumers:
            continue
        one = torch.zeros(family.units, dtype=torch.bool)
        one[0] = True
        fewer = dependency.cost({family.index: one}).macs
        assert fewer is not None
        groups.append(
            ChannelGroup(blocks[0], family.index, readers, family.units, float(graph.macs - fewer))
        )
    return groups


# Gates


class Gate(nn.Module):
    """Binary decisions of a block's input: pooled, linear, batch norm, ReLU, linear, threshold.

    Args:
        features: of the input.
        axis: where they are.
        outputs: gates.
        hidden: width of the hidden layer.
        bias: of the last layer at the start; above 0 gates start open, at 0 half of them.
        binarize: how the step is differentiated: "straight" (as the identity, on the sigmoid),
            "hard" (likewise on a hard sigmoid) or "gumbel" (a relaxed Bernoulli with logistic noise
            while training).

    Attributes:
        temperature: of "gumbel".
        forced: if given, decisions ``[outputs]`` that hold for every input.
        decided: decisions of the last pass, ``[batch, outputs]``.
    """

    def __init__(
        self,
        features: int,
        axis: int,
        outputs: int,
        *,
        hidden: int = 16,
        bias: float = 1.0,
        binarize: Binarize = "straight",
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.outer = nn.Linear(hidden, outputs)
        nn.init.constant_(self.outer.bias, bias)
        self.axis = axis
        self.binarize = binarize
        self.temperature = 1.0
        self.forced: Tensor | None = None
        self.decided: Tensor | None = None

    @property
    def macs(self) -> int:
        """Of one sample; the pool has none."""
        return self.inner.weight.numel() + self.outer.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        if self.forced is not None:
            gates = self.forced.to(x).expand(len(x), -1)
        else:
            others = [axis for axis in range(1, x.ndim) if axis != self.axis]
            pooled = x.mean(others) if others else x
            gates = self.decide(self.outer(F.relu(self.norm(self.inner(pooled)))))
        self.decided = gates
        return gates

    def decide(self, logits: Tensor) -> Tensor:
        """0 or 1 for each logit."""
        if self.binarize == "gumbel":
            if self.training:
                uniform = torch.rand_like(logits).clamp(1e-6, 1.0 - 1e-6)
                logits = logits + torch.log(uniform) - torch.log1p(-uniform)
            soft = torch.sigmoid(logits / self.temperature)
        elif self.binarize == "hard":
            soft = F.hardsigmoid(logits)
        else:
            soft = torch.sigmoid(logits)
        return straight_through(soft, (soft > 0.5).to(soft.dtype))


class _Apply(nn.Module):
    """Multiplies by the gates of the axis' indices."""

    def __init__(self, axis: int, owner: Tensor | None) -> None:
        super().__init__()
        self.axis = axis
        self.owner: Tensor | None
        self.register_buffer("owner", owner)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        if self.owner is not None:
            gates = gates[:, self.owner]
        shape = [len(x)] + [1] * (x.ndim - 1)
        shape[self.axis] = gates.shape[1]
        return x * gates.view(shape)


class Gated(nn.Module):
    """A network with gates; made by :func:`gate`.

    Args:
        original: the network whose tensors are trained; kept for the cut.
        graph: its trace.
        residuals: its blocks.
        groups: the gated channels of each block ("channel"), or None ("layer").
        options: of each :class:`Gate`.

    Attributes:
        network: runs the trace with the gates in it.
        gates: one module a block.
        counts: gates of each module.
        shares: what each gate's MACs are of all gated ones, ``[gates]``.
    """

    def __init__(
        self,
        original: nn.Module,
        graph: Graph,
        residuals: Sequence[Residual],
        groups: Sequence[ChannelGroup] | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        # Not a submodule: its tensors are those that `network` already lists.
        self._original = [original]
        self.example_inputs = graph.example_inputs
        self.macs = graph.macs
        used = sorted({group.block for group in groups}) if groups is not None else None
        blocks = range(len(residuals)) if used is None else used
        self.residuals = [residuals[i] for i in blocks]
        self.groups = (
            None
            if groups is None
            else [[group for group in groups if group.block == i] for i in blocks]
        )
        self.gates = nn.ModuleList()
        self.counts: list[int] = []
        weights: list[Tensor] = []
        for number, block in enumerate(self.residuals):
            if self.groups is None:
                self.counts.append(1)
                weights.append(torch.tensor([float(block.macs)]))
            else:
                mine = self.groups[number]
                self.counts.append(sum(group.units for group in mine))
                weights.extend(torch.full((group.units,), group.macs) for group in mine)
            self.gates.append(Gate(block.features, block.axis, self.counts[-1], **options))
        macs = torch.cat(weights)
        self.gated_macs = float(macs.sum())
        self.shares: Tensor
        self.register_buffer("shares", macs / macs.sum())
        self.network = graph.network()
        self._insert()

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)

    @property
    def mode(self) -> Mode:
        """What is gated."""
        return "layer" if self.groups is None else "channel"

    @property
    def gate_macs(self) -> int:
        """What the gates themselves cost for one sample."""
        return sum(gate.macs for gate in self._gates())

    def _gates(self) -> list[Gate]:
        return [gate for gate in self.gates if isinstance(gate, Gate)]

    def _insert(self) -> None:
        program = self.network.program
        nodes = {node.name: node for node in program.graph.nodes}
        for number, (block, gate) in enumerate(zip(self.residuals, self.gates, strict=True)):
            # Through the holder, so that the graph finds it; listed once all the same.
            program.add_module(f"consensus_gate{number}", gate)
            source = nodes[block.source]
            with program.graph.inserting_after(source):
                decided = program.graph.call_module(f"consensus_gate{number}", (source,))
            if self.groups is None:
                self._multiply(nodes[block.add], nodes[block.branch], decided, 1, None)
                continue
            at = 0
            for group in self.groups[number]:
                for reader, (axis, owner) in group.readers.items():
                    node = nodes[reader]
                    source = node.args[0]
                    assert isinstance(source, fx.Node)
                    self._multiply(node, source, decided, axis, owner + at)
                at += group.units
        program.recompile()

    def _multiply(
        self, reader: fx.Node, value: fx.Node, gates: fx.Node, axis: int, owner: Tensor | None
    ) -> None:
        program = self.network.program
        name = f"consensus_{reader.name}"
        program.add_module(name, _Apply(axis, owner))
        with program.graph.inserting_before(reader):
            product = program.graph.call_module(name, (value, gates))
        reader.replace_input_with(value, product)

    def decided(self) -> Tensor:
        """Decisions of the last pass, ``[batch, gates]``; they are forgotten."""
        parts = []
        for gate in self._gates():
            assert gate.decided is not None
            parts.append(gate.decided)
        self.forget()
        return torch.cat(parts, 1)

    def forget(self) -> None:
        """Drops the decisions of the last pass, which were kept for a loss."""
        for gate in self._gates():
            gate.decided = None

    def force(self, pattern: Tensor | None) -> None:
        """Fixes all decisions, ``[gates]``, or frees them again."""
        for i, gate in enumerate(self._gates()):
            gate.forced = None if pattern is None else pattern.split(self.counts)[i]

    def means(self, task: Task, split: str = "train", *, batch_size: int = 256) -> GateMeans:
        """The gates' averages over a split, in evaluation mode."""
        device = device_of(self)
        total = torch.zeros(sum(self.counts))
        classes = len(task.classes) if isinstance(task, Classification) else 0
        by_class = torch.zeros(classes, sum(self.counts))
        counts = torch.zeros(classes)
        seen = 0
        with evaluating(self):
            for batch in task.batches(split, batch_size=batch_size, shuffle=False):
                task.outputs(self, to_device(batch, device))
                decided = self.decided().float().cpu()
                total += decided.sum(0)
                seen += len(decided)
                if classes:
                    by_class.index_add_(0, batch[1], decided)
                    counts += torch.bincount(batch[1], minlength=classes)
        return GateMeans(total / seen, by_class / counts.clamp(min=1).unsqueeze(1))

    def expected_macs(self, means: Tensor) -> float:
        """Of the gated network for one sample, what is closed skipped, gates included."""
        closed = float(((1.0 - means) * self.shares.cpu()).sum())
        return self.macs - closed * self.gated_macs + self.gate_macs

    def pattern(self, means: Tensor) -> Tensor:
        """Which gates stay open, bool ``[gates]``: those that most inputs keep open.

        A stage (blocks of equal shape) keeps at least one block, a group at least one channel: the
        one that is open most often.
        """
        keep = means > 0.5
        sets: dict[Any, list[int]] = {}
        if self.groups is None:
            for i, block in enumerate(self.residuals):
                sets.setdefault(block.shape, []).append(i)
        else:
            at = 0
            for group in (group for mine in self.groups for group in mine):
                sets[at] = list(range(at, at + group.units))
                at += group.units
        for members in sets.values():
            if not keep[members].any():
                keep[members[int(means[members].argmax())]] = True
        return keep

    @torch.no_grad()
    def extract(self, pattern: Tensor) -> Extracted:
        """The static network in which only ``pattern`` is open; this one is unchanged.

        It is made of the user's own modules where their code admits it, and is verified against
        the gated network with the same decisions.

        Raises:
            UnsupportedError: if it does not agree with it.
        """
        if len(pattern) != sum(self.counts):
            raise InputError(f"the pattern has {len(pattern)} gates, the network {self.counts}")
        module = copy.deepcopy(self._original[0]).cpu()
        own = set(module.state_dict())
        trained = self.network.program.state_dict()
        # Counters of batches are in the module alone.
        module.load_state_dict({n: t for n, t in trained.items() if n in own}, strict=False)
        module.eval()
        if bool(pattern.all()):
            small, way = module, "modules"
        elif self.groups is None:
            small, way = self._without_blocks(module, pattern)
        else:
            small, way = self._without_channels(module, pattern)
        error = self._difference(small, pattern)
        if not error <= TOLERANCE:
            raise UnsupportedError(
                f"the static {type(self._original[0]).__name__} differs from the gated network by "
                f"{error:.1e} (relative, float32); it was not made"
            )
        return Extracted(small.eval(), way, error)

    def _difference(self, small: nn.Module, pattern: Tensor) -> float:
        inputs = surgery.random_inputs(self.example_inputs, 0)
        gated = copy.deepcopy(self).cpu()
        gated.force(pattern)
        with evaluating(gated), evaluating(small):
            expected, found = gated(*inputs), small(*inputs)
        return surgery._relative(surgery._flat(found), surgery._flat(expected))

    def _without_channels(self, module: nn.Module, pattern: Tensor) -> tuple[nn.Module, str]:
        assert self.groups is not None
        dependency = Dependency(Graph.trace(module, self.example_inputs))
        groups = [group for mine in self.groups for group in mine]
        parts = pattern.split([group.units for group in groups])
        removal = {
            group.family: ~part for group, part in zip(groups, parts, strict=True) if not part.all()
        }
        made = surgery.remove(module, dependency, removal)
        return made.module, made.way

    def _without_blocks(self, module: nn.Module, pattern: Tensor) -> tuple[nn.Module, str]:
        graph = Graph.trace(module, self.example_inputs)
        closed = [r for r, keep in zip(self.residuals, pattern.tolist(), strict=True) if not keep]
        own = _without_modules(module, graph, closed)
        from_graph = _without_branches(graph, closed)
        if own is not None:
            inputs = surgery.random_inputs(self.example_inputs, 0)
            with evaluating(own), evaluating(from_graph):
                pair = [surgery._flat(network(*inputs)) for network in (own, from_graph)]
            if surgery._relative(*pair) <= TOLERANCE:
                return own, "modules"
        return from_graph, "graph"


@dataclass(frozen=True)
class GateMeans:
    """Averages of gates over a split.

    Attributes:
        all: over all inputs, ``[gates]``.
        by_class: over those of each class, ``[classes, gates]``; no rows without classes.
    """

    all: Tensor
    by_class: Tensor


@dataclass(frozen=True)
class Extracted:
    """A static sub-network.

    Attributes:
        module: without gates.
        way: "modules" if it is made of the user's own modules, "graph" if of the exported graph.
        error: largest difference to the gated network, relative to the largest output.
    """

    module: nn.Module
    way: str
    error: float


def _without_branches(graph: Graph, closed: Sequence[Residual]) -> nn.Module:
    """The network without the branches of blocks; the graph is changed."""
    nodes = {node.name: node for node in graph.fx.nodes}
    place = {name: i for i, name in enumerate(nodes)}
    for block in closed:
        add, source = nodes[block.add], nodes[block.source]
        followers = list(add.users)
        add.replace_all_uses_with(source)
        graph.fx.erase_node(add)
        _rename(nodes, add, source)
        for name in sorted(block.inside, key=place.__getitem__, reverse=True):
            graph.fx.erase_node(nodes[name])
        for follower in followers:
            if _is_relu(follower) and _is_relu(source):
                follower.replace_all_uses_with(source)
                graph.fx.erase_node(follower)
                _rename(nodes, follower, source)
    for node in reversed(list(graph.fx.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.fx.erase_node(node)
    used = {str(node.target) for node in graph.fx.nodes if node.op == "get_attr"}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if name in used}
    kinds = {name: kind for name, kind in graph.kinds.items() if name in used}
    small = Graph(
        graph.fx,
        tensors,
        kinds,
        graph.outputs,
        dynamic=graph.dynamic,
        parameters=sum(t.numel() for n, t in tensors.items() if kinds[n] == "parameter"),
        example_inputs=graph.example_inputs,
    )
    return small.network()


def _is_relu(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node.target) in ("relu", "relu_")


def _rename(nodes: dict[str, fx.Node], old: fx.Node, new: fx.Node) -> None:
    """Later blocks may have the erased node as their source."""
    for name, node in nodes.items():
        if node is old:
            nodes[name] = new


def _without_modules(
    module: nn.Module, graph: Graph, closed: Sequence[Residual]
) -> nn.Module | None:
    """The network with whole blocks replaced by what is left of them; None if that is unclear."""
    if isinstance(module, GraphNetwork):
        return None
    result = copy.deepcopy(module)
    gone = {name for block in closed for name in (*block.inside, block.add)}
    nodes = {node.name: node for node in graph.fx.nodes}
    for path in dict.fromkeys(block.module for block in closed):
        left = [
            node
            for node in graph.fx.nodes
            if node.op == "call_function"
            and f"{module_of(node)}.".startswith(f"{path}.")
            and node.name not in gone
        ]
        if not path or len(left) > 1 or not all(map(_is_relu, left)):
            return None
        sources = [nodes[block.source] for block in closed if block.module == path]
        rectified = not left or _is_relu(sources[0])
        result.set_submodule(path, nn.Identity() if rectified else nn.ReLU())
    return result


def gate(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    mode: Mode = "layer",
    exclude: Collection[str] = (),
    hidden: int = 16,
    bias: float = 1.0,
    binarize: Binarize = "straight",
    seed: int = 0,
) -> Gated:
    """Puts gates into a copy of a residual network.

    Args:
        module: any network that can be traced; unchanged.
        example_inputs: positional arguments, batch first, batch at least 2.
        mode: "layer" gates whole blocks, "channel" the channels inside of blocks.
        exclude: paths of modules whose blocks have no gates.
        hidden: see :class:`Gate`.
        bias: see :class:`Gate`.
        binarize: see :class:`Gate`.
        seed: of the gates' initial weights.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if there is nothing to gate.
    """
    if mode not in ("layer", "channel"):
        raise InputError(f"consensus gates a layer or a channel, not {mode!r:.40}")
    if binarize not in ("straight", "hard", "gumbel"):
        raise InputError(f"gates are made binary straight, hard or gumbel, not {binarize!r:.40}")
    if hidden < 1:
        raise InputError(f"gates need a hidden layer of at least 1 unit, not {hidden}")
    known = {name for name, _ in module.named_modules()}
    for name in exclude:
        if name not in known:
            raise InputError(f"the network has no module {name:.80} to leave out")
    original = copy.deepcopy(module)
    graph = Graph.trace(original, example_inputs)
    residuals = find_residuals(graph, exclude)
    if not residuals:
        raise UnsupportedError(
            "the network has no residual block with an identity shortcut, so there is nothing to "
            "gate"
        )
    groups = None
    if mode == "channel":
        groups = find_channels(Dependency(graph), residuals)
        if not groups:
            raise UnsupportedError("no residual block has channels inside that could leave")
    options = {"hidden": hidden, "bias": bias, "binarize": binarize}
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("gates", seed))
        return Gated(original, graph, residuals, groups, options)


# Training


class ConsensusTraining(Rule):
    """Weights and gates together: ``L_task + lambda_act R_act + lambda_polar R_polar``.

    At an average of 1 the two terms close a gate only if ``lambda_act`` is above ``lambda_polar``,
    and strong polarization at the start freezes the initial pattern; so it grows along a ramp.

    Args:
        network: a gated network; changed in place.
        task: gives the loss.
        lambda_act: weight of the activation term.
        lambda_polar: weight of the polarization term at the end of its ramp; 0 leaves the network
            dynamic.
        ramp: "linear" from 0 at the start to all of it after two thirds of training, or "none".
        target: the share of (weighted) gates that should stay open, or None.
        control: how a target is reached: by ``|R_act - target|`` in the place of R_act
            ("distance"), or by changing ``lambda_act``, from 0, after each epoch so that the open
            share falls in a straight line and arrives after two thirds of training, where
            polarization begins ("integral").
        gain: of the integral control, per epoch.
        weight_by: "macs" or "none".
        temperature: of "gumbel" gates, from the start to the end of training.
        optimizer: Default: :func:`gossamer.core.fit.sgd` (no weight decay on vectors, which
            would open and close gates by itself).
        schedule: learning-rate multiplier as a function of the fraction of training done.

    Attributes:
        macs: expected multiply-accumulates of all forward passes so far, with closed parts
            skipped (they are computed all the same, so that gates learn to open again).
        history: open share after each epoch.
    """

    def __init__(
        self,
        network: Gated,
        task: Task,
        *,
        lambda_act: float = 1.0,
        lambda_polar: float = 2.0,
        ramp: Literal["linear", "none"] = "linear",
        target: float | None = None,
        control: Control = "distance",
        gain: float = 1.0,
        weight_by: Literal["macs", "none"] = "macs",
        temperature: tuple[float, float] = (1.0, 0.5),
        optimizer: Optimizer | None = None,
        schedule: Callable[[float], float] = cosine,
    ) -> None:
        if not (lambda_act >= 0.0 and lambda_polar >= 0.0):
            raise InputError(
                f"lambda_act and lambda_polar are 0 or more, not {lambda_act:g} and "
                f"{lambda_polar:g}"
            )
        if target is not None and not 0.0 <= target <= 1.0:
            raise InputError(f"the target must be a share in [0, 1], not {target}")
        self.network = network
        self.task = task
        steered = target is not None and control == "integral"
        self.lambda_act = 0.0 if steered else lambda_act
        self.lambda_polar = lambda_polar
        self.ramp = ramp
        self.target = target
        self.control = control
        self.gain = gain
        self.weights = network.shares if weight_by == "macs" else None
        self.temperature = temperature
        self.optimizer = optimizer or sgd(network)
        self.schedule = schedule
        self.macs = 0.0
        self.history: list[float] = []
        self._open = [0.0, 0.0]  # sum and count in this epoch
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def gated(self) -> Gated:
        """The network that is trained."""
        assert isinstance(self.network, Gated)
        return self.network

    def polar_weight(self, fraction: float) -> float:
        """The weight of the polarization term at a fraction of training."""
        if self.target is not None and self.control == "integral":
            fraction = max(0.0, (fraction - SETTLED) / (1.0 - SETTLED))
            return self.lambda_polar * fraction
        return self.lambda_polar * (min(1.0, fraction / SETTLED) if self.ramp == "linear" else 1.0)

    def regularizer(self, means: Tensor, fraction: float) -> Tensor:
        """Both terms.

        Args:
            means: of each gate over a batch, ``[gates]``.
            fraction: of training that is done.
        """
        weights = None if self.weights is None else self.weights.to(means.device)
        share = activation(means, weights)
        if self.target is not None and self.control == "distance":
            share = (share - self.target).abs()
        return self.lambda_act * share + self.polar_weight(fraction) * polarization(means)

    def step(self, batch: Batch) -> Log:
        fraction = self.run.fraction
        multiplier = self.schedule(fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        first, last = self.temperature
        for part in self.gated._gates():
            part.temperature = first * (last / first) ** fraction
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            loss = self.task.criterion(self.task.outputs(self.network, batch), batch)
            decided = self.gated.decided().float()
            means = decided.mean(0)
            loss = loss + self.regularizer(means, fraction)
        self.backward(loss)
        self.optimizer.step()
        with torch.no_grad():
            weights = None if self.weights is None else self.weights.to(means.device)
            share = float(activation(means, weights))
            self._open[0] += share
            self._open[1] += 1
            self.macs += len(decided) * self.gated.expected_macs(means.cpu())
        return {"loss": loss.detach(), "open": share}

    def end_epoch(self) -> None:
        share = self._open[0] / max(1.0, self._open[1])
        self._open = [0.0, 0.0]
        self.history.append(share)
        if self.target is None or self.control != "integral":
            return
        done = (self.run.epoch + 1) / self.run.epochs
        wanted = 1.0 + (self.target - 1.0) * min(1.0, done / SETTLED)
        self.lambda_act = max(0.0, self.lambda_act + self.gain * (share - wanted))
        if share <= self.target:
            self.lambda_act = 0.0

    def extra_state(self) -> dict[str, Any]:
        return {
            "lambda_act": self.lambda_act,
            "macs": self.macs,
            "history": self.history,
            "open": self._open,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.lambda_act = state["lambda_act"]
        self.macs = state["macs"]
        self.history = list(state["history"])
        self._open = list(state["open"])


# Step of recipes


def consensus(
    network: Network,
    task: Task,
    *,
    mode: Mode = "layer",
    macs: float | None = None,
    lambda_act: float = 1.0,
    lambda_polar: float = 2.0,
    ramp: Literal["linear", "none"] = "linear",
    control: Control = "distance",
    weight_by: Literal["macs", "none"] = "macs",
    binarize: Binarize = "straight",
    hidden: int = 16,
    bias: float = 1.0,
    exclude: Collection[str] = (),
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains with gates once and cuts what all inputs close (a step of a recipe).

    Args:
        network: a residual network, trained or not; unchanged.
        task: its data.
        mode: "layer" gates whole blocks, "channel" the channels inside of blocks.
        macs: the share of the network's MACs to arrive at, or None: what the two weights give. It
            is aimed at, not enforced: a run that is too short keeps more, and says so.
        lambda_act: see :class:`ConsensusTraining`.
        lambda_polar: see :class:`ConsensusTraining`.
        ramp: see :class:`ConsensusTraining`.
        control: see :class:`ConsensusTraining`.
        weight_by: see :class:`ConsensusTraining`.
        binarize: see :class:`Gate`.
        hidden: see :class:`Gate`.
        bias: see :class:`Gate`.
        exclude: paths of modules whose blocks have no gates.
        epochs: passes over the training split.
        batch_size: samples a batch; below 64 the gates' averages are noise.
        lr: learning rate at the start; falls to 0 along half a cosine.
        weight_decay: of matrices and kernels.
        seed: of gates and data order.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The static network; its record has the gates' averages, how far inputs are from agreeing,
        and the validation scores of the gated and of the static network, by class too.

    Raises:
        InputError: if an option is out of range.
        BudgetError: if what has no gates costs more than the target.
        UnsupportedError: if there is nothing to gate.
    """
    if macs is not None and not 0.0 < macs <= 1.0:
        raise InputError(f"macs must be a share in (0, 1], not {macs}")
    if batch_size < 64:
        log.warning("batches of %d samples: averages of gates over them are noisy", batch_size)
    gated = gate(
        network.module,
        network.example_inputs,
        mode=mode,
        exclude=exclude,
        hidden=hidden,
        bias=bias,
        binarize=binarize,
        seed=seed,
    )
    target = None
    if macs is not None:
        rest = gated.macs - gated.gated_macs
        if macs * gated.macs < rest:
            raise BudgetError(
                f"consensus cannot reach {macs:g} of the MACs: what has no gates takes "
                f"{rest / gated.macs:.3g}"
            )
        target = (macs * gated.macs - rest) / gated.gated_macs
    rule = ConsensusTraining(
        gated,
        task,
        lambda_act=lambda_act,
        lambda_polar=lambda_polar,
        ramp=ramp,
        target=target,
        control=control,
        weight_by=weight_by,
        optimizer=sgd(gated, lr=lr, weight_decay=weight_decay),
    )
    began = time.monotonic()
    history = fit(
        rule,
        task,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title=f"consensus: {mode}",
    )
    seconds = time.monotonic() - began
    small, report = settle(gated, task)
    if macs is not None and report["macs"][1] > (macs + 0.5 / report["gates"]) * report["macs"][0]:
        log.warning(
            "consensus arrived at %.2f of the MACs, not %.2f; train longer or with a larger "
            "lambda_act",
            report["macs"][1] / report["macs"][0],
            macs,
        )
    report |= {
        "steps": history.steps,
        "open": rule.history,
        "training_macs": rule.macs,
        "training_seconds": seconds,
        "target": target,
    }
    options = {
        "mode": mode,
        "macs": macs,
        "lambda_act": lambda_act,
        "lambda_polar": lambda_polar,
        "ramp": ramp,
        "control": control,
        "weight_by": weight_by,
        "binarize": binarize,
        "hidden": hidden,
        "bias": bias,
        "exclude": list(exclude),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    return network.after("consensus", options, report, module=small)


def settle(
    gated: Gated, task: Task, *, split: str = "validation", batch_size: int = 128
) -> tuple[nn.Module, dict[str, Any]]:
    """Cuts a trained gated network and compares it with what it was.

    Batch-norm statistics are computed anew if inputs did not agree on every gate.

    Args:
        gated: trained; moved to the CPU.
        task: its data; gates are averaged over the training split.
        split: where scores are compared.
        batch_size: of the batches that statistics are computed from.

    Returns:
        The static network, and a report: "gap", "means", "kept", "gates", "dynamic" and "static"
        scores (with "classes" and each class's widest gap), "macs", "parameters", "gate_macs".
    """
    gated.cpu()
    means = gated.means(task)
    keep = gated.pattern(means.all)
    gap = consensus_gap(means.all)
    made = gated.extract(keep)
    small = made.module
    agreed = bool(torch.equal(means.all, keep.to(means.all)))
    if not agreed:
        recalibrate_on(small, task, batch_size=batch_size)
    after = Graph.trace(small, gated.example_inputs)
    parameters = sum(p.numel() for p in gated._original[0].parameters())
    report: dict[str, Any] = {
        "mode": gated.mode,
        "gates": len(keep),
        "kept": int(keep.sum()),
        "gap": gap,
        "agreed": agreed,
        "dynamic": task.score(gated, split),
        "static": task.score(small, split),
        "dynamic_macs": gated.expected_macs(means.all),
        "gate_macs": gated.gate_macs,
        "macs": [gated.macs, after.macs],
        "parameters": [parameters, after.parameters],
        "way": made.way,
        "rounds": [{"verified": True, "error": made.error}],
    }
    if gated.mode == "layer":
        report["means"] = {
            f"{block.module}:{block.add}": float(mean)
            for block, mean in zip(gated.residuals, means.all, strict=True)
        }
    if isinstance(task, Classification):
        odd = (means.by_class - keep.float()).abs().amax(1)
        report["classes"] = {
            "dynamic": task.class_scores(gated, split),
            "static": task.class_scores(small, split),
            "gap": dict(zip(task.classes, odd.tolist(), strict=True)),
        }
    gated.forget()
    return small, report
