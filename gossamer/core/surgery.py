"""Removing, silencing, permuting and widening units of a network, for real.

:func:`remove` makes the smaller network from the user's own modules where their code admits the
new sizes, and from the exported graph otherwise, and verifies it: in float64 the smaller network
must agree with the original one in which the removed units are silenced (see
:mod:`gossamer.core.silence`), and in float32 with the traced original.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gossamer.core.dependency import Dependency, Removal
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph, GraphNetwork, argument, module_of, op_name
from gossamer.core.rewrite import Rewrite
from gossamer.core.silence import Doubled, Silenced, silenced_tensors

log = logging.getLogger(__name__)

DOUBLE_TOLERANCE = 1e-8
SINGLE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Surgery:
    """What :func:`remove` made.

    Attributes:
        module: the smaller network; the original is untouched.
        way: "modules" if it is made of the user's own modules, "graph" if of the exported graph.
        verified: whether it agrees with the silenced original (False also if not asked for).
        error: largest difference in float64, relative to the largest output.
        exactness: "exact", "folded" (constants went into biases) or "approximate" (statistics
            over the survivors, or leftovers that no bias can hold).
        notes: what a report should mention.
        seconds: time to make it.
        seconds_verify: time to verify it.
    """

    module: nn.Module
    way: str
    verified: bool
    error: float
    exactness: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    seconds_verify: float = 0.0


def remove(
    module: nn.Module,
    dependency: Dependency,
    removal: Removal,
    *,
    verify: bool = True,
    seed: int = 0,
) -> Surgery:
    """Removes units from a network.

    Args:
        module: the network that ``dependency`` analysed.
        dependency: its removable units.
        removal: the units to remove of each family.
        verify: check the result against the silenced original on random inputs.
        seed: of those inputs.

    Returns:
        The smaller network and what is known about it.

    Raises:
        InputError: if the removal does not fit the network.
        UnsupportedError: if the result does not agree with the silenced original: nothing wrong
            is ever returned.
    """
    began = time.monotonic()
    gone = dependency.removed_atoms(removal)
    _refuse_empty(dependency, gone)
    inputs = random_inputs(dependency.graph.example_inputs, seed)
    # The silenced original is needed in any case: it knows what removed units leave behind.
    silenced = Silenced(dependency, gone)
    expected = silenced.run_on(inputs)
    rewrite = Rewrite(dependency, gone, silenced.bias)
    graph = rewrite.graph()
    graph.fx.lint()
    network, way = _assemble(module, dependency, rewrite, graph, inputs)
    seconds = time.monotonic() - began
    notes = sorted(
        {
            f"{op_name(node.target)} in {module_of(node) or 'the network'} read values of removed "
            "units that no bias can hold; they were silenced"
            for node in silenced.leftovers
        }
    )
    if silenced.leftovers or not silenced.exact:
        exactness = "approximate"
    else:
        exactness = "folded" if silenced.bias else "exact"
    error, verified = math.nan, False
    began = time.monotonic()
    if verify:
        exact = graph.tensors | rewrite.exact
        error = _relative(Doubled(graph.fx, exact).run_on(inputs), expected)
        if not error <= DOUBLE_TOLERANCE:
            raise UnsupportedError(
                f"the smaller {type(module).__name__} differs from the silenced original by "
                f"{error:.1e} (relative, float64); it was not made"
            )
        _verify_trace(module, dependency.graph, inputs)
        if exactness != "approximate":
            _verify_eager(module, dependency, gone, network, inputs)
        verified = True
    return Surgery(
        module=network,
        way=way,
        verified=verified,
        error=error,
        exactness=exactness,
        notes=tuple(notes),
        seconds=seconds,
        seconds_verify=time.monotonic() - began,
    )


def random_inputs(example: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Inputs like ``example``: floating-point tensors are drawn anew, others kept."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return value

    return pytree.tree_map(draw, example)


def _refuse_empty(dependency: Dependency, gone: np.ndarray) -> None:
    for name, labels in dependency.propagation.tensor_labels.items():
        for axis, vector in enumerate(labels):
            keep = dependency.kept(vector, gone)
            if keep is not None and not keep.any():
                raise InputError(f"the removal would leave nothing of axis {axis} of {name}")


def _relative(found: list[Any], expected: list[Any]) -> float:
    """Largest difference, relative to the largest expected value."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            return math.inf
        if b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs()).max().item()
        finite = b[b.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 1.0
        worst = (
            max(worst, difference / max(scale, 1e-12)) if not math.isnan(difference) else math.inf
        )
    return worst


def _flat(outputs: Any) -> list[Any]:
    return pytree.tree_leaves(outputs)


def _verify_trace(module: nn.Module, graph: Graph, inputs: tuple[Any, ...]) -> None:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            eager = _flat(module(*_copies(inputs)))
            traced = _flat(graph.network().eval()(*_copies(inputs)))
    finally:
        for part, mode in modes:
            part.training = mode
    error = _relative(traced, eager)
    if not error <= SINGLE_TOLERANCE:
        raise UnsupportedError(
            f"the trace of {type(module).__name__} differs from the network by {error:.1e} "
            "(relative, float32); it is not cut"
        )


def _verify_eager(
    module: nn.Module,
    dependency: Dependency,
    gone: np.ndarray,
    small: nn.Module,
    inputs: tuple[Any, ...],
) -> None:
    """Compares with the untouched modules run on silenced tensors; no graph takes part."""
    graph = dependency.graph
    silent = silenced_tensors(dependency, gone, graph.tensors)
    changed = {name: t for name, t in silent.items() if t is not graph.tensors[name]}
    own = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if not set(changed) <= own:
        return  # a plain tensor attribute cannot be replaced from outside
    modes = [(m, m.training) for part in (module, small) for m in part.modules()]
    for part, _ in modes:
        part.training = False
    try:
        with torch.no_grad():
            expected = _flat(torch.func.functional_call(module, changed, _copies(inputs)))
            found = _flat(small(*_copies(inputs)))
    finally:
        for part, mode in modes:
            part.training = mode
    error = _relative(found, expected)
    if not error <= SINGLE_TOLERANCE:
        raise UnsupportedError(
            f"the smaller {type(module).__name__} differs from the network run with silenced "
            f"weights by {error:.1e} (relative, float32); it was not made"
        )


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


# The user's own modules ----------------------------------------------------------------------


def _assemble(
    module: nn.Module,
    dependency: Dependency,
    rewrite: Rewrite,
    graph: Graph,
    inputs: tuple[Any, ...],
) -> tuple[nn.Module, str]:
    """The smaller network of the user's modules if they run like the graph, else of the graph."""
    from_graph = graph.network()
    from_graph.train(module.training)
    if isinstance(module, GraphNetwork):
        return from_graph, "graph"
    with torch.no_grad():
        from_graph.eval()
        expected = _flat(from_graph(*_copies(inputs)))
        from_graph.train(module.training)
    try:
        own = _cut_modules(module, dependency, rewrite, graph)
        own.eval()
        with torch.no_grad():
            found = _flat(own(*_copies(inputs)))
            if len(found) != len(expected) or not _relative(found, expected) <= SINGLE_TOLERANCE:
                return from_graph, "graph"
            _try_training(own, inputs)
    except Exception as error:  # the user's code may object to new sizes in any way
        log.debug("the network's own modules do not admit the new sizes: %s", error)
        return from_graph, "graph"
    own.train(module.training)
    return own, "modules"


def _try_training(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Runs the training path once, since its code may differ; the state is put back."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train()
    with torch.random.fork_rng():
        module(*(_repeated(x) for x in inputs))
    module.load_state_dict(state)


def _repeated(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim else value


def _cut_modules(
    module: nn.Module, dependency: Dependency, rewrite: Rewrite, graph: Graph
) -> nn.Module:
    own = copy.deepcopy(module)
    aliases = _aliases(module, dependency.graph)
    for name, tensor in graph.tensors.items():
        if name not in dependency.graph.tensors:
            _place(own, name, tensor)
            continue
        old = dependency.graph.tensors[name]
        if tensor.shape == old.shape and torch.equal(tensor, old):
            continue
        for alias in aliases.get(name, [name]):
            _place(own, alias, tensor)
    for node in graph.fx.nodes:
        if node.op == "call_function":
            _resize(own, node)
    return own


def _aliases(module: nn.Module, graph: Graph) -> dict[str, list[str]]:
    """All state-dict names of each traced tensor (tied ones have several)."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        by_id.setdefault(id(tensor), []).append(name)
    return {name: by_id.get(id(tensor), [name]) for name, tensor in graph.tensors.items()}


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = root.get_submodule(path)
    if last in owner._parameters:
        owner._parameters[last] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        )
    elif last in owner._buffers:
        owner._buffers[last] = tensor.detach()
    elif isinstance(getattr(owner, last, None), Tensor):
        setattr(owner, last, tensor.detach())
    else:
        raise AttributeError(name)


def _resize(root: nn.Module, node: fx.Node) -> None:
    """Puts right the size attributes of the module that ran an operator."""
    path = module_of(node)
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return
    name = op_name(node.target)
    wanted: dict[str, Any] = {}
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = None
    if name.startswith("conv") and weight is not None:
        groups = argument(node, 6, "groups", 1)
        inner, outer = weight.shape[1] * groups, weight.shape[0]
        if "transpose" in name:
            inner, outer = weight.shape[0], weight.shape[1] * groups
        wanted = {"groups": groups, "in_channels": inner, "out_channels": outer}
    elif name == "linear" and weight is not None:
        wanted = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    elif name in ("batch_norm", "instance_norm") and weight is not None:
        wanted = {"num_features": weight.shape[0]}
    elif name in ("layer_norm", "rms_norm"):
        wanted = {"normalized_shape": tuple(node.args[1])}  # type: ignore[arg-type]
    elif name == "group_norm" and weight is not None:
        wanted = {"num_groups": node.args[1], "num_channels": weight.shape[0]}
    elif name == "embedding" and weight is not None:
        wanted = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    for attribute, value in wanted.items():
        if hasattr(module, attribute):
            setattr(module, attribute, value)


# The other verbs -----------------------------------------------------------------------------


def silence(module: nn.Module, dependency: Dependency, removal: Removal) -> nn.Module:
    """A copy of a network in which units are zeroed, not removed.

    Args:
        module: the network that ``dependency`` analysed.
        dependency: its removable units.
        removal: the units to silence.
    """
    gone = dependency.removed_atoms(removal)
    graph = dependency.graph
    silent = silenced_tensors(dependency, gone, graph.tensors)
    result = copy.deepcopy(module)
    aliases = _aliases(module, graph)
    with torch.no_grad():
        for name, tensor in silent.items():
            if tensor is not graph.tensors[name]:
                for alias in aliases[name]:
                    _write(result, alias, tensor)
    return result


def _write(root: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    getattr(root.get_submodule(path), last).copy_(value)


def permute(module: nn.Module, dependency: Dependency, orders: Mapping[int, Tensor]) -> nn.Module:
    """A copy of a network whose units are in another order; it computes the same function.

    Args:
        module: the network that ``dependency`` analysed.
        dependency: its removable units.
        orders: of each family to reorder, int64 ``[units]``: unit ``i`` of the result is unit
            ``orders[i]`` of the original.

    Raises:
        InputError: if an order is not a permutation of its family's units.
    """
    moved = np.arange(dependency.propagation.store.size)
    for index, order in orders.items():
        family = dependency.families[index]
        order = torch.as_tensor(order).cpu()
        if sorted(order.tolist()) != list(range(family.units)):
            raise InputError(f"the order of family {index} is not a permutation of its units")
        moved[family.atoms] = family.atoms[order.numpy()]
    result = copy.deepcopy(module)
    aliases = _aliases(module, dependency.graph)
    with torch.no_grad():
        for name, labels in dependency.propagation.tensor_labels.items():
            tensor = dependency.graph.tensors[name]
            changed = False
            for axis, vector in enumerate(labels):
                places = None if vector is None else _moved_places(dependency, vector, moved)
                if places is not None:
                    tensor = tensor.index_select(axis, torch.from_numpy(places).to(tensor.device))
                    changed = True
            if changed:
                for alias in aliases[name]:
                    _write(result, alias, tensor)
    return result


def _index_sets(dependency: Dependency, vector: np.ndarray) -> list[tuple[int, ...]]:
    """The primitive atoms of each index of an axis, sorted."""
    positions, atoms = dependency._incidence(vector)
    sets: list[list[int]] = [[] for _ in vector]
    for position, atom in zip(positions.tolist(), atoms.tolist(), strict=True):
        sets[position].append(atom)
    return [tuple(sorted(s)) for s in sets]


def _moved_places(
    dependency: Dependency, vector: np.ndarray, moved: np.ndarray
) -> np.ndarray | None:
    """From which index each index of an axis takes its values; None if nothing moves."""
    sets = _index_sets(dependency, vector)
    if not any(moved[atom] != atom for s in sets for atom in s):
        return None
    where: dict[tuple[int, ...], list[int]] = {}
    for position, s in enumerate(sets):
        where.setdefault(s, []).append(position)
    seen: dict[tuple[int, ...], int] = {}
    places = np.empty(len(sets), dtype=np.int64)
    for position, s in enumerate(sets):
        source = tuple(sorted(int(moved[atom]) for atom in s))
        occurrence = seen.get(s, 0)
        seen[s] = occurrence + 1
        places[position] = where[source][occurrence] if s else position
    return places


def widen(
    module: nn.Module,
    dependency: Dependency,
    copies: Mapping[int, Tensor],
    *,
    verify: bool = True,
    seed: int = 0,
) -> nn.Module:
    """A wider network that computes the same function (Net2Net, Chen et al. 2016).

    Each copied unit's producers are repeated and its readers' columns shared out among the
    copies.

    Args:
        module: the network that ``dependency`` analysed.
        dependency: its removable units.
        copies: of each family to widen, int64 ``[units]``: how often each unit is there
            afterwards (1: as before).
        verify: check that the function is the same.
        seed: of the inputs of that check.

    Raises:
        InputError: if a count is below one.
        UnsupportedError: if copies would change the function (statistics run over the units, or
            two activations are contracted over them).
    """
    counts = np.ones(dependency.propagation.store.size, dtype=np.int64)
    for index, count in copies.items():
        family = dependency.families[index]
        count = torch.as_tensor(count).cpu()
        if count.shape != (family.units,) or int(count.min()) < 1:
            raise InputError(f"family {index} needs one count of at least 1 for each of its units")
        if family.exactness != "exact":
            raise UnsupportedError(
                f"family {index} ({family.name}) cannot be widened exactly: statistics run over it"
            )
        counts[family.atoms] = count.numpy()
    graph = dependency.graph
    inputs = random_inputs(graph.example_inputs, seed)
    rewrite = _Widen(dependency, counts)
    rewritten = rewrite.graph()
    result = rewritten.network()
    result.train(module.training)
    if verify:
        found = Doubled(rewritten.fx, rewrite.exact).run_on(inputs)
        expected = Doubled(graph.fx, graph.tensors).run_on(inputs)
        error = _relative(found, expected)
        if not error <= DOUBLE_TOLERANCE:
            raise UnsupportedError(
                f"the wider {type(module).__name__} differs from the original by {error:.1e}: its "
                "units are contracted against each other, so copies change the function"
            )
    return result


class _Widen(Rewrite):
    """The rewrite of :mod:`gossamer.core.rewrite` with counts instead of masks."""

    def __init__(self, dependency: Dependency, counts: np.ndarray) -> None:
        super().__init__(dependency, np.zeros(len(counts), dtype=bool))
        self.counts = counts

    def keep(self, node: Any, axis: int) -> np.ndarray | None:
        labels = self.dependency.propagation.labels[node]
        return self._times(labels[axis])

    def groups(self, node: Any, axis: int, groups: int) -> int:
        vector = self.dependency.propagation.labels[node][axis]
        if vector is None:
            return groups
        store = self.dependency.propagation.store
        whole, _ = store.split(vector, (groups, len(vector) // groups))
        times = self._times(whole)
        return groups if times is None else int(times.sum())

    def _times(self, vector: np.ndarray | None) -> np.ndarray | None:
        """How often each index of an axis is there afterwards (so that sums are new sizes)."""
        if vector is None:
            return None
        positions, atoms = self.dependency._incidence(vector)
        times = np.ones(len(vector), dtype=np.int64)
        np.multiply.at(times, positions, self.counts[atoms])
        return None if (times == 1).all() else times

    def tensors(self) -> dict[str, Tensor]:
        roles = self.dependency.propagation.roles
        result = {}
        for name, tensor in self.dependency.graph.tensors.items():
            labels = self.dependency.propagation.tensor_labels[name]
            # Shares are exact in double precision: what is verified is the structure.
            floating = tensor.is_floating_point()
            new = tensor.detach().double() if floating else tensor.detach().clone()
            for axis, vector in enumerate(labels):
                times = self._times(vector)
                if vector is None or times is None:
                    continue
                if roles.get((name, axis)) == "consumer":
                    shape = [-1 if i == axis else 1 for i in range(new.ndim)]
                    new = new / torch.from_numpy(times).to(new).view(shape)
                places = self._places(vector)
                new = new.index_select(axis, torch.from_numpy(places).to(new.device))
            self.exact[name] = new
            new = new.to(tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            result[name] = nn.Parameter(new, tensor.requires_grad) if parameter else new
        return result

    def _places(self, vector: np.ndarray) -> np.ndarray:
        """Source index of each index of the wider axis: a unit's run of indices is repeated."""
        places = np.arange(len(vector))
        sets = [set(s) for s in _index_sets(self.dependency, vector)]
        for atom in sorted({a for s in sets for a in s if self.counts[a] > 1}):
            has = np.array([atom in sets[place] for place in places])
            edges = np.flatnonzero(np.diff(np.concatenate([[0], has.astype(np.int8), [0]])))
            pieces, at = [], 0
            for start, end in edges.reshape(-1, 2).tolist():
                pieces += [places[at:start], np.tile(places[start:end], int(self.counts[atom]))]
                at = end
            places = np.concatenate([*pieces, places[at:]])
        return places
