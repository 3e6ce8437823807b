"""What the metadata of files say of a column: least, greatest, nulls, without reading a row.

The statistics of Parquet's row groups are folded over groups and files. A value that a writer may
have cut short is a bound, not a value; a NaN makes a bound unknown; nulls are outside of both and
are counted beside them.

Source: min-max pruning of Shah et al., "R2D2: Reducing Redundancy and Duplication in Data Lakes",
SIGMOD 2024, arXiv:2312.13427; statistics of Parquet as in its format's `ColumnOrder` and
`Statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EXACT_WRITERS = ("parquet-cpp", "DuckDB")
"""Writers whose string statistics are whole or absent; others cut long ones short."""


@dataclass(frozen=True)
class Statistics:
    """Of one column of one table.

    Attributes:
        low: no value is less; None if that is not known.
        high: no value is greater; None if that is not known.
        exact: whether `low` and `high` occur, rather than only bound what does.
        nulls: number of nulls; None if that is not known.
    """

    low: Any = None
    high: Any = None
    exact: bool = True
    nulls: int | None = None

    def with_numbers_as(self, kind: str) -> Statistics:
        """The same in the values that another kind of number has."""
        if kind != "real" or self.low is None or self.high is None:
            return self
        return Statistics(float(self.low), float(self.high), self.exact, self.nulls)


def folded(parts: Sequence[Statistics | None]) -> Statistics:
    """One column over all row groups; a group that tells nothing makes the whole unknown.

    A group whose values are all null has no bounds and changes none: give it as
    ``Statistics(None, None, True, nulls)`` with `nulls` of its rows, marked by :data:`ALL_NULL`.
    """
    known = [part for part in parts if part is not None]
    nulls = (
        sum(part.nulls or 0 for part in known)
        if len(known) == len(parts) and all(part.nulls is not None for part in known)
        else None
    )
    valued = [part for part in known if part.low is not ALL_NULL]
    if len(known) < len(parts) or not valued or any(not _usable(part) for part in valued):
        return Statistics(nulls=nulls)
    return Statistics(
        min(part.low for part in valued),
        max(part.high for part in valued),
        all(part.exact for part in valued),
        nulls,
    )


ALL_NULL: Any = type("AllNull", (), {"__repr__": lambda self: "all null"})()
"""In place of a bound: the group holds nothing but nulls."""


def _usable(part: Statistics) -> bool:
    return not any(
        bound is None or (isinstance(bound, float) and math.isnan(bound))
        for bound in (part.low, part.high)
    )


def why_not_contained(child: Statistics, parent: Statistics) -> str | None:
    """Why a child's column cannot lie within the parent's, or None if it may.

    Sound: a containment that holds is never refused. The child's bounds must be values that occur;
    the parent's may be bounds.
    """
    if child.nulls and parent.nulls == 0:
        return f"{child.nulls} nulls where the parent has none"
    if not child.exact or None in (child.low, child.high, parent.low, parent.high):
        return None
    try:
        if child.low < parent.low:
            return f"least value {child.low!r} is below {parent.low!r}"
        if child.high > parent.high:
            return f"greatest value {child.high!r} is above {parent.high!r}"
    except TypeError:  # bounds of kinds that have no order between them
        return None
    return None
