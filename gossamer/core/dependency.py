"""Which channels, heads, features and positions must leave a network together.

The labels that :mod:`gossamer.core.label_rules` carries through the graph fall into *families*:
sets of removable units of one kind (the channels of one convolution and of all that follows it, the
heads of one attention, the positions within them). Removing a unit removes the same slices of
every tensor listed in the family's members, and any subset of units may leave as long as one stays.

The dependency graphs of OTO (Chen et al., arXiv:2312.09411) and DepGraph (Fang et al.,
arXiv:2301.12900) group whole modules; here the bookkeeping is by index of each operator's axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from gossamer.core.cost import Cost
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph, Shape
from gossamer.core.label_rules import Pin, Propagation
from gossamer.core.labels import FIXED, Vector

Role = Literal["producer", "accessory", "consumer"]
Exactness = Literal["exact", "approximate"]
Removal = Mapping[int, Tensor]
"""Units to remove of each family: family index to a bool tensor ``[units]``."""


@dataclass(frozen=True)
class Member:
    """The slices of one tensor that belong to a family's units.

    Attributes:
        name: state-dict name of the parameter, buffer or constant.
        axis: which axis is cut.
        owner: int64 ``[size of the axis]``: the unit each index belongs to, -1 for none.
        role: "producer" (rows that create the unit, their biases, embeddings), "accessory"
            (normalisation, scales, statistics) or "consumer" (columns that read it).
        parameter: whether the tensor is a parameter.
    """

    name: str
    axis: int
    owner: Tensor
    role: Role
    parameter: bool


@dataclass(frozen=True)
class Family:
    """Units of one kind that can leave independently of each other.

    Attributes:
        index: position in :attr:`Dependency.families`.
        name: the module whose parameters produce the units.
        units: how many there are.
        members: every tensor slice that goes with them.
        exactness: "exact" if a removed unit's contribution is zero or a constant, "approximate"
            if a normalisation, softmax, mean or maximum runs over the units.
        atoms: the label of each unit.
    """

    index: int
    name: str
    units: int
    members: tuple[Member, ...]
    exactness: Exactness
    atoms: Vector

    def parameters(self, graph: Graph) -> Tensor:
        """Parameters that leave with each unit, int64 ``[units]`` (consumers included)."""
        counts = torch.zeros(self.units, dtype=torch.int64)
        for member in self.members:
            if member.parameter:
                tensor = graph.tensors[member.name]
                owner = member.owner[member.owner >= 0]
                each = tensor.numel() // max(1, tensor.shape[member.axis])
                counts += each * torch.bincount(owner, minlength=self.units)
        return counts


class Dependency:
    """Removable units of a traced network.

    Attributes:
        graph: the trace.
        families: independent of each other, in order of first appearance.
        pins: axes that an operator fixed, and why.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.propagation = Propagation(graph)
        self.propagation.run()
        self.families: list[Family] = []
        self._incidences: dict[int, tuple[Vector, np.ndarray, np.ndarray]] = {}
        self._collect()

    @property
    def pins(self) -> list[Pin]:
        """What had to be fixed and why (once for each operator and reason)."""
        seen: dict[tuple[str, str], Pin] = {}
        for pin in self.propagation.pins:
            seen.setdefault((pin.operator, pin.why), pin)
        return list(seen.values())

    @cached_property
    def units(self) -> int:
        """Removable units over all families."""
        return sum(family.units for family in self.families)

    def _collect(self) -> None:
        store = self.propagation.store
        axes: list[tuple[str, int, np.ndarray, np.ndarray]] = []  # name, axis, positions, atoms
        for name, labels in self.propagation.tensor_labels.items():
            for axis, vector in enumerate(labels):
                if vector is None:
                    continue
                positions, atoms = self._incidence(vector)
                if len(atoms):
                    axes.append((name, axis, positions, atoms))
        if not axes:
            return
        every = np.concatenate([atoms for *_, atoms in axes])
        known, first = np.unique(every, return_index=True)
        # Two atoms are of one family if they were born together and appear in the same axes
        # equally often: their signatures agree.
        signature = np.zeros(len(known), dtype=np.uint64)
        for number, (_, _, _, atoms) in enumerate(axes):
            at, counts = np.unique(np.searchsorted(known, atoms), return_counts=True)
            signature[at] += _mix(np.uint64(number + 1), counts.astype(np.uint64))
        birth = store.dimension(known)
        kinds, family_of = np.unique(
            np.stack([birth.astype(np.uint64), signature], 1), axis=0, return_inverse=True
        )
        family_of = family_of.reshape(-1)
        # An index that depends on two units of one family could not be assigned to either.
        ambiguous = self._ambiguous(axes, known, family_of)
        approximate = np.zeros(len(known), dtype=bool)
        for vector in self.propagation.approximate:
            _, atoms = self._incidence(vector)
            at = np.searchsorted(known, atoms)
            at = at[at < len(known)]
            approximate[at[np.isin(known[at], atoms)]] = True
        order = sorted(range(len(kinds)), key=lambda k: first[family_of == k].min())
        unit_of = np.full(len(known), -1, dtype=np.int64)
        index_of = np.full(len(known), -1, dtype=np.int64)
        chosen: list[np.ndarray] = []
        for kind in order:
            inside = np.flatnonzero(family_of == kind)
            inside = inside[np.argsort(first[inside], kind="stable")]
            if len(inside) < 2 or kind in ambiguous:
                continue
            unit_of[inside] = np.arange(len(inside))
            index_of[inside] = len(chosen)
            chosen.append(inside)
        members: list[list[Member]] = [[] for _ in chosen]
        roles = self.propagation.roles
        for name, axis, positions, atoms in axes:
            at = np.searchsorted(known, atoms)
            size = self.graph.tensors[name].shape[axis]
            for family in np.unique(index_of[at]):
                if family < 0:
                    continue
                mine = index_of[at] == family
                owner = np.full(size, -1, dtype=np.int64)
                owner[positions[mine]] = unit_of[at[mine]]
                members[family].append(
                    Member(
                        name=name,
                        axis=axis,
                        owner=torch.from_numpy(owner),
                        role=roles.get((name, axis), "producer"),  # type: ignore[arg-type]
                        parameter=self.graph.kinds[name] == "parameter",
                    )
                )
        for index, inside in enumerate(chosen):
            producers = [m for m in members[index] if m.role == "producer" and m.parameter]
            named = (producers or members[index])[0].name
            self.families.append(
                Family(
                    index=index,
                    name=named.rpartition(".")[0] or named,
                    units=len(inside),
                    members=tuple(members[index]),
                    exactness="approximate" if approximate[inside].any() else "exact",
                    atoms=known[inside],
                )
            )

    def _incidence(self, vector: Vector) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (position, primitive atom) of an axis."""
        store = self.propagation.store
        roots = store.find(vector)
        products = store.is_product(roots)
        plain = np.flatnonzero(~products & (roots != FIXED))
        positions, atoms = [plain], [roots[plain]]
        if products.any():
            cache: dict[int, tuple[int, ...]] = {}
            for position in np.flatnonzero(products).tolist():
                root = int(roots[position])
                if root not in cache:
                    cache[root] = tuple(store.resolve(root))
                positions.append(np.full(len(cache[root]), position))
                atoms.append(np.array(cache[root], dtype=np.int64))
        return np.concatenate(positions), np.concatenate(atoms).astype(np.int64)

    @staticmethod
    def _ambiguous(
        axes: Sequence[tuple[str, int, np.ndarray, np.ndarray]],
        known: np.ndarray,
        family_of: np.ndarray,
    ) -> set[int]:
        found: set[int] = set()
        for _, _, positions, atoms in axes:
            families = family_of[np.searchsorted(known, atoms)]
            pairs, counts = np.unique(
                np.stack([positions, families], 1), axis=0, return_counts=True
            )
            found.update(pairs[counts > 1, 1].tolist())
        return found

    def removed_atoms(self, removal: Removal) -> np.ndarray:
        """Which atoms go, bool ``[atoms]``: those asked for, except the last of any axis.

        Raises:
            InputError: if a mask does not fit its family or would remove all of it.
        """
        gone = np.zeros(self.propagation.store.size, dtype=bool)
        for index, mask in removal.items():
            if not 0 <= index < len(self.families):
                raise InputError(
                    f"there is no family {index}; the network has {len(self.families)}"
                )
            family = self.families[index]
            mask = torch.as_tensor(mask, dtype=torch.bool).cpu()
            if mask.shape != (family.units,):
                raise InputError(
                    f"family {index} ({family.name}) has {family.units} units, but its mask has "
                    f"shape {tuple(mask.shape)}"
                )
            if mask.all():
                raise InputError(f"family {index} ({family.name}) would lose all of its units")
            gone[family.atoms[mask.numpy()]] = True
        # A slice of an axis (one branch of a split, say) may hold few of a family's units: where
        # all of them would go, the first one stays.
        for size, positions, atoms in self._slices:
            lost = gone[atoms]
            if lost.any() and len(np.unique(positions[lost])) == size:
                gone[atoms[positions == positions.min()]] = False
        return gone

    @cached_property
    def _slices(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Size and incidence of every distinct axis of every tensor that units could empty."""
        found: dict[bytes, tuple[int, np.ndarray, np.ndarray]] = {}
        for labels in self.propagation.labels.values():
            outputs = labels if isinstance(labels, tuple) else (labels,)
            for vector in (v for axes in outputs for v in axes or [] if v is not None):
                key = self.propagation.store.find(vector).tobytes()
                if key not in found:
                    found[key] = (len(vector), *self._incidence(vector))
        return [entry for entry in found.values() if len(np.unique(entry[1])) == entry[0]]

    def kept(self, vector: Vector | None, gone: np.ndarray) -> np.ndarray | None:
        """Which indices of an axis stay, bool ``[size]``; None if all do."""
        if vector is None:
            return None
        known = self._incidences.get(id(vector))
        if known is None:
            # The vector is kept alive beside its incidence: its id stays its own.
            known = self._incidences[id(vector)] = (vector, *self._incidence(vector))
        _, positions, atoms = known
        lost = positions[gone[atoms]]
        if not len(lost):
            return None
        keep = np.ones(len(vector), dtype=bool)
        keep[lost] = False
        return keep

    def size(self, vector: Vector | None, size: int, gone: np.ndarray) -> int:
        """The size of an axis after a removal; ``size`` is the one before."""
        keep = self.kept(vector, gone)
        return size if keep is None else size * int(keep.sum()) // len(keep)

    def cost(self, removal: Removal) -> Cost:
        """Parameters and multiply-accumulates after a removal, without building the network."""
        gone = self.removed_atoms(removal)
        shrunk = _Shrunk(self, gone)
        parameters = self.graph.parameters
        for name, labels in self.propagation.tensor_labels.items():
            if self.graph.kinds[name] == "parameter":
                shape = self.graph.tensors[name].shape
                after = math.prod(self.size(v, s, gone) for v, s in zip(labels, shape, strict=True))
                parameters += after - math.prod(shape)
        macs = sum(shrunk._macs(node) for node in self._counted)
        return Cost(parameters=parameters, macs=macs)

    @cached_property
    def _counted(self) -> list[fx.Node]:
        graph = self.graph
        return [n for n in graph.fx.nodes if n.op == "call_function" and graph._macs(n)]

    def halved(self, share: float = 0.5) -> dict[int, Tensor]:
        """Removes the last ``share`` of every family's units (rounded down); for tests."""
        removal = {}
        for family in self.families:
            mask = torch.zeros(family.units, dtype=torch.bool)
            count = min(family.units - 1, int(family.units * share))
            mask[family.units - count :] = True
            removal[family.index] = mask
        return removal


class _Shrunk(Graph):
    """The graph with the shapes it has after a removal."""

    def __init__(self, dependency: Dependency, gone: np.ndarray) -> None:
        vars(self).update(vars(dependency.graph))
        self._dependency = dependency
        self._gone = gone

    def shape(self, node: fx.Node, batch: int = 1) -> Shape | None:
        shape = super().shape(node, batch)
        if shape is None:
            return None
        labels = self._dependency.propagation.labels[node]
        return tuple(
            self._dependency.size(v, s, self._gone) for v, s in zip(labels, shape, strict=True)
        )

    def shapes(self, node: fx.Node, batch: int = 1) -> tuple[Shape, ...]:
        shape = self.shape(node, batch)
        return (shape,) if shape is not None else super().shapes(node, batch)


def _mix(number: np.uint64, counts: np.ndarray) -> np.ndarray:
    """Hashes (axis, how often) to 64 bits (splitmix)."""
    with np.errstate(over="ignore"):
        z = number * np.uint64(0x9E3779B97F4A7C15) + counts * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def analyse(module: nn.Module, example_inputs: Sequence[Any]) -> Dependency:
    """Traces ``module`` and finds its removable units.

    Args:
        module: the network; unchanged.
        example_inputs: positional arguments, batch first, batch at least 2.

    Raises:
        UnsupportedError: if the network cannot be traced.
    """
    return Dependency(Graph.trace(module, example_inputs))
