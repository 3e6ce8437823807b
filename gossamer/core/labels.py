"""The algebra of index labels.

Every index of every axis of every tensor carries a label that says on which removable *atoms* it
depends: the index disappears when any of them is removed. A label is the number of an atom, which
is one of

- ``FIXED`` (0): never removed;
- a primitive atom;
- a product: stands for a set of other atoms (the channel at head h and position d of a head
  disappears with the head or with the position).

Operators state equalities between labels ("these two axes lose the same indices"). Equal primitive
atoms are united (union-find); a primitive atom that must equal a product is substituted by it
everywhere. Where two sets cannot be matched the atoms in question are fixed: the algebra may
forbid a removal that would be possible, never allow one that is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Vector = np.ndarray
"""Labels of one axis, int64 ``[size]``; ``None`` stands for an axis that is fixed throughout."""

FIXED = 0
_LARGEST = 4_000_000  # longer joined axes are fixed rather than labelled


class Labels:
    """A growing set of atoms and the equalities known between them."""

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self._is_product = np.zeros(1024, dtype=bool)
        self._dimension = np.zeros(1024, dtype=np.int64)
        self._count = 1
        self._dimensions = 1
        self._products: dict[int, tuple[int, ...]] = {}
        self._by_parts: dict[tuple[int, ...], int] = {}

    def fresh(self, size: int) -> Vector:
        """``size`` new primitive atoms that belong together (one axis of a parameter, say)."""
        first = self._count
        self._grow(first + size)
        new = np.arange(first, first + size)
        self._parent[new] = new
        self._dimension[new] = self._dimensions
        self._dimensions += 1
        self._count += size
        return new

    def _grow(self, size: int) -> None:
        while size > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
            self._is_product = np.concatenate([self._is_product, np.zeros_like(self._is_product)])
            self._dimension = np.concatenate([self._dimension, np.zeros_like(self._dimension)])

    @property
    def size(self) -> int:
        """How many atoms were ever made; labels are below it."""
        return self._count

    def product(self, parts: Sequence[int]) -> int:
        """The atom that disappears with any of ``parts``; the same parts give the same atom."""
        atoms = tuple(sorted({int(a) for p in parts for a in self.resolve(int(p))}))
        if not atoms:
            return FIXED
        if len(atoms) == 1:
            return atoms[0]
        if atoms not in self._by_parts:
            (new,) = self.fresh(1)
            self._products[int(new)] = atoms
            self._is_product[new] = True
            self._by_parts[atoms] = int(new)
        return self._by_parts[atoms]

    def find(self, vector: Vector) -> Vector:
        """The representative of each label."""
        roots = self._parent[vector]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[vector] = roots
        return roots

    def root(self, atom: int) -> int:
        """The representative of one label."""
        while self._parent[atom] != atom:
            atom = int(self._parent[atom])
        return atom

    def resolve(self, atom: int) -> frozenset[int]:
        """The primitive atoms any of which removes what carries this label."""
        atom = self.root(atom)
        if atom == FIXED:
            return frozenset()
        if not self._is_product[atom]:
            return frozenset((atom,))
        return frozenset().union(*(self.resolve(part) for part in self._products[atom]))

    def dimension(self, roots: Vector) -> Vector:
        """Which axis each primitive atom was born with."""
        return self._dimension[roots]

    def is_product(self, roots: Vector) -> np.ndarray:
        """Which representatives stand for sets."""
        return self._is_product[roots]

    # Equalities -----------------------------------------------------------------------------

    def pin(self, vector: Vector | None) -> None:
        """Declares that none of these indices is ever removed."""
        if vector is None:
            return
        roots = np.unique(self.find(vector))
        primitive = roots[~self._is_product[roots]]
        self._parent[primitive] = FIXED
        for atom in roots[self._is_product[roots]]:
            for part in self.resolve(int(atom)):
                self._parent[part] = FIXED

    def unify(self, left: Vector | None, right: Vector | None) -> None:
        """Declares that two axes of equal size lose the same indices."""
        if left is None:
            self.pin(right)
            return
        if right is None:
            self.pin(left)
            return
        a, b = self.find(left), self.find(right)
        different = a != b
        if not different.any():
            return
        pairs = np.unique(np.stack([a[different], b[different]], 1), axis=0)
        a, b = pairs[:, 0], pairs[:, 1]
        plain_a = ~self._is_product[a] & (a != FIXED)
        plain_b = ~self._is_product[b] & (b != FIXED)
        if plain_a.all() and plain_b.all():
            self._unite(a, b)
        elif plain_b.all() and self._can_substitute(b, a):
            self._parent[b] = a
        elif plain_a.all() and self._can_substitute(a, b):
            self._parent[a] = b
        else:
            for x, y in pairs.tolist():
                self._unify_one(x, y)

    def _unite(self, a: Vector, b: Vector) -> None:
        atoms, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
        half = len(a)
        links = coo_matrix(
            (np.ones(half), (inverse[:half], inverse[half:])), shape=(len(atoms), len(atoms))
        )
        _, component = connected_components(links, directed=False)
        first = np.full(component.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, component, atoms)
        self._parent[atoms] = first[component]

    def _can_substitute(self, plain: Vector, by: Vector) -> bool:
        """Whether distinct primitive atoms may become aliases of ``by`` (no cycle arises)."""
        if len(np.unique(plain)) != len(plain):
            return False
        inside = {p for atom in np.unique(by).tolist() for p in self.resolve(atom)}
        return inside.isdisjoint(plain.tolist())

    def _unify_one(self, x: int, y: int) -> None:
        x, y = self.root(x), self.root(y)
        a, b = self.resolve(x), self.resolve(y)
        if a == b:
            if self._is_product[x] and self._is_product[y]:
                self._parent[y] = x  # two names of one set
            return
        if not a or not b:
            self._fix(a | b)
        elif len(a) == 1 and len(b) == 1:
            self._unite(np.array([*a]), np.array([*b]))
        elif len(a) == 1 or len(b) == 1:
            single, several, target = (a, b, y) if len(a) == 1 else (b, a, x)
            (atom,) = single
            if atom in several:
                self._fix(several - single)
            else:
                self._parent[atom] = target
        else:
            left, right = sorted(a - b), sorted(b - a)
            if len(left) == len(right):
                # Enough for equality: what removes one side removes the other.
                for p, q in zip(left, right, strict=True):
                    self._unify_one(p, q)
            else:
                self._fix((a | b) - (a & b))

    def _fix(self, atoms: frozenset[int]) -> None:
        for atom in atoms:
            for part in self.resolve(atom):
                self._parent[part] = FIXED

    # Axes that are taken apart and put together ---------------------------------------------

    def split(self, vector: Vector | None, sizes: Sequence[int]) -> list[Vector | None]:
        """Labels of the factors when an axis is viewed as several (row-major)."""
        if vector is None:
            return [None] * len(sizes)
        result: list[Vector | None] = [None] * len(sizes)
        roots = self.find(vector).reshape(tuple(sizes))
        varying = [
            axis
            for axis, size in enumerate(sizes)
            if size > 1 and not (roots == roots.take([0], axis)).all()
        ]
        if not varying:
            if roots.size and roots.flat[0] != FIXED:
                # One atom for the whole axis: removing it would leave nothing.
                self.pin(vector)
            return result
        corner = roots[tuple(slice(None) if axis in varying else 0 for axis in range(len(sizes)))]
        if len(varying) == 1:
            result[varying[0]] = corner.copy()
            return result
        factors = self._factor(corner)
        for axis, labels in zip(varying, factors, strict=True):
            result[axis] = labels
        return result

    def _factor(self, roots: np.ndarray) -> list[Vector]:
        """Writes an n-dimensional array of labels as a product of one vector an axis."""
        distinct = len(np.unique(roots)) == roots.size
        if distinct and not self._is_product[roots].any() and (roots != FIXED).all():
            factors = [self.fresh(size) for size in roots.shape]
            grid = np.stack(np.meshgrid(*factors, indexing="ij"), -1).reshape(-1, roots.ndim)
            for atom, parts in zip(roots.ravel().tolist(), grid.tolist(), strict=True):
                self._products[atom] = tuple(parts)
                self._by_parts.setdefault(tuple(sorted(parts)), atom)
            self._is_product[roots] = True
            return factors
        known = {atom: self.resolve(atom) for atom in np.unique(roots).tolist()}
        common: list[list[frozenset[int]]] = []
        for axis in range(roots.ndim):
            slabs = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
            common.append(
                [frozenset.intersection(*(known[a] for a in set(slab.tolist()))) for slab in slabs]
            )
        exact = all(
            frozenset().union(*(common[axis][i] for axis, i in enumerate(index))) == known[atom]
            for index, atom in zip(np.ndindex(*roots.shape), roots.ravel().tolist(), strict=True)
        )
        if exact:
            return [np.array([self.product(tuple(s)) for s in sets]) for sets in common]
        factors = [self.fresh(size) for size in roots.shape]
        for index in np.ndindex(*roots.shape):
            wanted = self.product([int(f[i]) for f, i in zip(factors, index, strict=True)])
            self._unify_one(int(roots[index]), wanted)
        return factors

    def join(self, vectors: Sequence[Vector | None], sizes: Sequence[int]) -> Vector | None:
        """Labels of the axis that several axes are flattened into (row-major)."""
        total = math.prod(sizes)
        labelled = [axis for axis, vector in enumerate(vectors) if vector is not None]
        if not labelled:
            return None
        if total > _LARGEST:
            for vector in vectors:
                self.pin(vector)
            return None
        shape = tuple(sizes)
        spread = []
        for axis in labelled:
            vector = vectors[axis]
            assert vector is not None
            column = vector.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
            spread.append(np.broadcast_to(column, shape).reshape(-1))
        if len(spread) == 1:
            return spread[0].copy()
        rows = np.stack([self.find(s) for s in spread], 1)
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        atoms = np.array([self.product(row) for row in unique.tolist()], dtype=np.int64)
        return atoms[inverse.reshape(-1)]

    def reshape(
        self, vectors: Sequence[Vector | None], old: Sequence[int], new: Sequence[int]
    ) -> list[Vector | None]:
        """Labels after a row-major reshape from sizes ``old`` to sizes ``new``."""
        result: list[Vector | None] = [None] * len(new)
        for (i, k), (j, l) in _aligned(old, new):
            group, sizes = vectors[i:k], new[j:l]
            if all(vector is None for vector in group):
                continue
            # Axes of size one take part in nothing.
            wide = [axis for axis in range(j, l) if new[axis] > 1]
            joined = self.join(group, old[i:k])
            if len(wide) == 1:
                result[wide[0]] = joined
            else:
                for axis, labels in zip(range(j, l), self.split(joined, sizes), strict=True):
                    result[axis] = labels
        return result


def _aligned(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cuts two shapes of equal volume into the finest pairs of runs of equal volume."""
    if math.prod(old) == 0:
        return [((0, len(old)), (0, len(new)))]

    def marks(shape: Sequence[int]) -> list[int]:
        volumes = [1]
        for size in shape:
            volumes.append(volumes[-1] * size)
        return volumes

    a, b = marks(old), marks(new)
    # At each common volume take the last position in both, so that sizes of one stay with the
    # run before them.
    common = sorted(set(a) & set(b))
    cuts = [
        (
            max(i for i, v in enumerate(a) if v == volume),
            max(j for j, v in enumerate(b) if v == volume),
        )
        for volume in common
    ]
    cuts[0] = (0, 0)
    if len(common) == 1:
        cuts.append((len(old), len(new)))
    return [((i, k), (j, l)) for (i, j), (k, l) in pairwise(cuts)]
