"""Which schemas are contained in which, without comparing every pair.

Tables are taken from the widest schema to the narrowest. Each is compared with the centres of the
clusters there are, joins every cluster whose centre contains it, and becomes a centre itself if
there is none. Only tables of one cluster are then compared with each other. No containment is
missed: what contains a schema shares a cluster with it, as both are contained in the centre.

Source: the schema graph builder of Shah et al., "R2D2: Reducing Redundancy and Duplication in Data
Lakes", SIGMOD 2024, arXiv:2312.13427.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class SchemaClusters:
    """Clusters of schemas, and the containments that they hold.

    Schemas are bit sets over all names, so a subset test is one operation on integers.

    Attributes:
        clusters: members by centre; the centre is its own first member.
        edges: (parent, child): every name of the child is one of the parent's.
        tests: subset tests made so far.
    """

    clusters: dict[str, list[str]] = field(default_factory=dict)
    edges: set[tuple[str, str]] = field(default_factory=set)
    tests: int = 0
    _bits: dict[str, int] = field(default_factory=dict)
    _schemas: dict[str, int] = field(default_factory=dict)

    @classmethod
    def build(cls, schemas: Mapping[str, Iterable[str]]) -> SchemaClusters:
        """Clusters all tables.

        Args:
            schemas: names of the columns of each table.
        """
        found = cls()
        sets = {name: frozenset(schema) for name, schema in schemas.items()}
        for name in sorted(sets, key=lambda name: (-len(sets[name]), name)):
            found._encode(name, sets[name])
            if not found._join(name):
                found.clusters[name] = [name]
        compared: set[tuple[str, str]] = set()
        for members in found.clusters.values():
            # Members are in order of width, so only the first of two can be the parent.
            for number, child in enumerate(members):
                for parent in members[:number]:
                    if (parent, child) not in compared:
                        compared.add((parent, child))
                        found._compare(parent, child)
        return found

    def add(self, name: str, schema: Iterable[str]) -> None:
        """Adds one table.

        If it joins clusters, it is compared with their members alone. If it opens one, every table
        is asked whether it belongs to it, as one in another cluster may.
        """
        self._encode(name, schema)
        if self._join(name):
            near = {m for members in self.clusters.values() if name in members for m in members}
        else:
            near = {other for other in self._schemas if other != name and self._within(other, name)}
            self.clusters[name] = [name, *sorted(near, key=self._order)]
        for other in sorted(near - {name}):
            wide, narrow = sorted((name, other), key=self._order)
            self._compare(wide, narrow)

    def remove(self, name: str) -> None:
        """Takes one table out; the members of a cluster that loses its centre are added anew."""
        del self._schemas[name]
        self.edges = {edge for edge in self.edges if name not in edge}
        orphans = [m for m in self.clusters.pop(name, []) if m != name]
        for members in self.clusters.values():
            if name in members:
                members.remove(name)
        housed = {m for members in self.clusters.values() for m in members}
        for orphan in sorted(orphans, key=self._order):
            if orphan not in housed and not self._join(orphan):
                within = [o for o in orphans if o != orphan and self._within(o, orphan)]
                self.clusters[orphan] = [orphan, *sorted(within, key=self._order)]

    def _encode(self, name: str, schema: Iterable[str]) -> None:
        value = 0
        for column in schema:
            value |= 1 << self._bits.setdefault(column, len(self._bits))
        self._schemas[name] = value

    def _order(self, name: str) -> tuple[int, str]:
        return -self._schemas[name].bit_count(), name

    def _within(self, child: str, parent: str) -> bool:
        self.tests += 1
        return not self._schemas[child] & ~self._schemas[parent]

    def _join(self, name: str) -> bool:
        homes = [c for c in self.clusters if c != name and self._within(name, c)]
        for centre in homes:
            if name not in self.clusters[centre]:
                self.clusters[centre].append(name)
        return bool(homes)

    def _compare(self, wide: str, narrow: str) -> None:
        if self._within(narrow, wide):
            self.edges.add((wide, narrow))
            if self._schemas[narrow] == self._schemas[wide]:
                self.edges.add((narrow, wide))
