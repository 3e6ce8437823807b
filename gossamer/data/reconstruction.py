"""How a table that another one contains is rebuilt from it, row for row.

Deleting needs more than containment of sets: the child's rows must come back as often as they
were. A recipe is sought in this order, each exact, none a guess: all rows of the parent, its
distinct rows, the rows whose values lie in ranges or among few values (found from the child's own
values), and the numbers of the rows, which are stored. Lineage that is given is tried first.

Source: the reconstructible edges of Shah et al., "R2D2", SIGMOD 2024, arXiv:2312.13427; the search
for the recipe is ours.
"""

from __future__ import annotations

import datetime
import decimal
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gossamer.core.errors import InputError
from gossamer.data.lake import Lake, Table
from gossamer.data.lake_engine import Comparison, Engine, compare_columns, literal, same

FEW = 32
ORDERED = ("integer", "decimal", "real", "text", "date", "timestamp", "instant")


@dataclass(frozen=True)
class Condition:
    """What the values of one column must be: within a range, or among some; or null.

    Attributes:
        column: of the parent.
        low: least value, if there is a range.
        high: greatest value, if there is a range.
        values: those allowed; None for a range.
        nulls: whether nulls are allowed too.
    """

    column: str
    low: Any = None
    high: Any = None
    values: tuple[Any, ...] | None = None
    nulls: bool = False

    def sql(self, place: str) -> str:
        """As SQL over an expression."""
        if self.values is not None:
            listed = ", ".join(literal(v, self.column) for v in self.values)
            inside = f"{place} IN ({listed})" if self.values else "false"
        else:
            parts = []
            if self.low is not None:
                parts.append(f"{place} >= {literal(self.low, self.column)}")
            if self.high is not None:
                parts.append(f"{place} <= {literal(self.high, self.column)}")
            inside = " AND ".join(parts) or f"{place} IS NOT NULL"
        return f"coalesce({inside}, {'true' if self.nulls else 'false'})"

    def __str__(self) -> str:
        if self.values is not None:
            text = f"{self.column} in {{{', '.join(map(str, self.values))}}}"
        else:
            sides = ("" if self.low is None else f"{self.low} <= ") + self.column
            text = sides + ("" if self.high is None else f" <= {self.high}")
        return text + (" or null" if self.nulls else "")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "column": self.column,
            "low": _plain(self.low),
            "high": _plain(self.high),
            "values": None if self.values is None else [_plain(v) for v in self.values],
            "nulls": self.nulls,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Condition:
        """Reads what :meth:`to_json` wrote; a user may leave out all but the column."""
        values = value.get("values")
        return cls(
            str(value["column"]),
            _value(value.get("low")),
            _value(value.get("high")),
            None if values is None else tuple(_value(v) for v in values),
            bool(value.get("nulls", False)),
        )


def _plain(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return {"decimal": str(value)}
    if isinstance(value, datetime.date):
        return {"date": value.isoformat()}
    return value


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "decimal" in value:
            return decimal.Decimal(str(value["decimal"]))
        return datetime.date.fromisoformat(str(value["date"]))
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{value!r} is no value of a column")
    return value


RecipeKind = Literal["projection", "distinct", "filter", "rows"]


@dataclass(frozen=True)
class Recipe:
    """How a child comes from its parent.

    Attributes:
        kind: all rows, the distinct ones, those that meet the conditions, or listed ones; always
            of the child's columns alone.
        conditions: that all must hold.
        rows: numbers of the parent's rows ``[n]``, sorted.
        bytes: that the recipe takes to store (the list of rows).
    """

    kind: RecipeKind
    conditions: tuple[Condition, ...] = ()
    rows: np.ndarray | None = field(default=None, compare=False, repr=False)
    bytes: int = 0

    def __str__(self) -> str:
        if self.kind == "filter":
            return "rows where " + " and ".join(map(str, self.conditions))
        if self.kind == "rows":
            count = 0 if self.rows is None else len(self.rows)
            return f"{count:,} listed rows ({self.bytes:,} bytes)"
        return {"projection": "all rows", "distinct": "distinct rows"}[self.kind]


@dataclass(frozen=True)
class Exact:
    """What a full comparison of a child with a parent says.

    Attributes:
        distinct: distinct rows of the child.
        found: those that the parent has.
        short: those that it has less often than the child.
        parent_distinct: distinct rows of the parent in the child's columns.
    """

    distinct: int
    found: int
    short: int
    parent_distinct: int

    @property
    def containment(self) -> float:
        """CM: the fraction of the child's distinct rows that the parent has."""
        return self.found / self.distinct


def comparisons(child: Table, parent: Table) -> list[Comparison] | str:
    """How all columns of a child are compared; why not, if one cannot be."""
    found = []
    for column in child.columns:
        made = compare_columns(child, parent, column.name)
        if isinstance(made, str):
            return made
        found.append(made)
    return found


def anti_join(engine: Engine, child: int, parent: int, columns: Sequence[Comparison]) -> int:
    """Distinct rows of the child that the parent lacks."""
    left = ", ".join(f"{c.child.format(t='a')} AS k{i}" for i, c in enumerate(columns))
    right = ", ".join(f"{c.parent.format(t='b')} AS k{i}" for i, c in enumerate(columns))
    on = same([(f"x.k{i}", f"y.k{i}") for i in range(len(columns))])
    ((missing,),) = engine.query(
        f"SELECT count(*) FROM (SELECT DISTINCT {left} FROM t{child} a) x WHERE NOT EXISTS "
        f"(SELECT 1 FROM (SELECT {right} FROM t{parent} b) y WHERE {on})"
    )
    return int(missing)


def compare_exactly(
    engine: Engine, child: int, parent: int, columns: Sequence[Comparison], where: str = "true"
) -> Exact:
    """Every distinct row of the child with how often both have it.

    Args:
        engine: that knows the tables.
        child: number of the table.
        parent: number of the table.
        columns: of the child.
        where: SQL over the parent's view, as ``b``.
    """
    keys = [f"k{i}" for i in range(len(columns))]
    left = ", ".join(f"{c.child.format(t='a')} AS k{i}" for i, c in enumerate(columns))
    right = ", ".join(f"{c.parent.format(t='b')} AS k{i}" for i, c in enumerate(columns))
    on = same([(f"x.{k}", f"y.{k}") for k in keys])
    listed = ", ".join(keys)
    ((distinct, found, enough, others),) = engine.query(
        f"WITH y AS (SELECT {listed}, count(*) AS m FROM "
        f"(SELECT {right} FROM t{parent} b WHERE {where}) s GROUP BY {listed}), "
        f"x AS (SELECT {listed}, count(*) AS n FROM (SELECT {left} FROM t{child} a) s "
        f"GROUP BY {listed}) "
        "SELECT count(*), count(m), coalesce(sum(CASE WHEN m >= n THEN 1 ELSE 0 END), 0), "
        f"(SELECT count(*) FROM y) FROM x LEFT JOIN y ON {on}"
    )
    return Exact(int(distinct), int(found), int(found) - int(enough), int(others))


def find_recipe(
    engine: Engine,
    lake: Lake,
    child: int,
    parent: int,
    *,
    lineage: Sequence[Condition] | None = None,
) -> tuple[Exact | None, Recipe | None, str]:
    """Compares a child with a parent in full, and says how to rebuild it.

    Args:
        engine: that knows the tables.
        lake: of the tables.
        child: number of the table.
        parent: number of the table.
        lineage: conditions from which the child is said to have been made.

    Returns:
        The comparison (None if the columns cannot be compared), the recipe (None if there is
        none), and why there is none.
    """
    a, b = lake.tables[child], lake.tables[parent]
    columns = comparisons(a, b)
    if isinstance(columns, str):
        return None, None, columns
    exact = compare_exactly(engine, child, parent, columns)
    if exact.found < exact.distinct:
        return exact, None, f"{exact.distinct - exact.found:,} of its rows are not in the parent"
    if reason := _not_restorable(a, b):
        return exact, None, reason
    if lineage is not None:
        where = " AND ".join(c.sql(_view(b, c.column)) for c in lineage) or "true"
        told = compare_exactly(engine, child, parent, columns, where)
        ((count,),) = engine.query(f"SELECT count(*) FROM t{parent} b WHERE {where}")
        if told.found == told.distinct and told.short == 0 and count == a.rows:
            return exact, Recipe("filter", tuple(lineage)), ""
    if exact.short:
        if exact.distinct == a.rows == exact.parent_distinct:
            return exact, Recipe("distinct"), ""
        return exact, None, f"{exact.short:,} of its rows occur less often in the parent"
    if a.rows == b.rows:
        return exact, Recipe("projection"), ""
    if exact.distinct == a.rows == exact.parent_distinct:
        return exact, Recipe("distinct"), ""
    conditions = _find_conditions(engine, a, child, parent, columns)
    if conditions is not None:
        return exact, Recipe("filter", conditions), ""
    rows = _row_numbers(engine, child, parent, columns)
    return exact, Recipe("rows", rows=rows, bytes=len(encode_rows(rows))), ""


def _view(table: Table, name: str) -> str:
    return f"b.c{table.columns.index(table.column(name))}"


def _not_restorable(child: Table, parent: Table) -> str | None:
    """Structs come back whole or not at all."""
    tops = {c.parts[0] for c in child.columns if len(c.parts) > 1}
    for top in sorted(tops):
        if top not in parent.schema.names:
            return f"its struct {top} is no struct in the parent"
        if not child.schema.field(top).type.equals(parent.schema.field(top).type):
            return f"its struct {top} is another one in the parent"
        # A null struct and a struct of nulls look alike in their leaves.
        return f"it holds the struct {top}, whose nulls cannot be told from those of its fields"
    if any(len(parent.column(c.name).parts) > 1 for c in child.columns):
        return "its columns lie within structs of the parent"
    return None


def _find_conditions(
    engine: Engine, table: Table, child: int, parent: int, columns: Sequence[Comparison]
) -> tuple[Condition, ...] | None:
    """Conditions that as many rows of the parent meet as the child has.

    The child's rows meet them, and the parent has all of these, so they are then the same rows.
    """
    # A value compared as text or after a cast is not what the parent's column holds.
    usable = [c for c in columns if c.kind in ORDERED and c.parent.startswith("{t}.c")]
    if not usable:
        return None
    asked = ", ".join(
        f"min({e}), max({e}), count({e}), count(DISTINCT {e})"
        for e in (c.child.format(t="a") for c in usable)
    )
    (found,) = engine.query(f"SELECT {asked} FROM t{child} a")
    tried: list[tuple[Condition, ...]] = []
    box: list[Condition] = []
    for i, c in enumerate(usable):
        low, high, count, distinct = found[4 * i : 4 * i + 4]
        nulls = count < table.rows
        if count == 0:
            tried.append((Condition(c.name, values=(), nulls=True),))
            continue
        ranged = Condition(c.name, low, high, nulls=nulls)
        if _speakable(ranged):
            tried.append((ranged,))
            box.append(ranged)
        if 1 < distinct <= FEW:
            e = c.child.format(t="a")
            rows = engine.query(f"SELECT DISTINCT {e} AS v FROM t{child} a WHERE {e} IS NOT NULL")
            values = Condition(c.name, values=tuple(sorted(v for (v,) in rows)), nulls=nulls)
            if _speakable(values):
                tried.append((values,))
    if len(box) > 1:
        tried.append(tuple(box))
    if not tried:
        return None
    places = {c.name: c.parent.format(t="b") for c in usable}
    sums = ", ".join(
        "sum(CASE WHEN "
        + " AND ".join(c.sql(places[c.column]) for c in conditions)
        + " THEN 1 ELSE 0 END)"
        for conditions in tried
    )
    (counts,) = engine.query(f"SELECT {sums} FROM t{parent} b")
    return next((t for t, n in zip(tried, counts, strict=True) if n == table.rows), None)


def _speakable(condition: Condition) -> bool:
    try:
        condition.sql("x")
    except ValueError:  # infinities and NaN
        return False
    return True


def _row_numbers(
    engine: Engine, child: int, parent: int, columns: Sequence[Comparison]
) -> np.ndarray:
    """For each of the child's rows one of the parent's, the first that are not taken."""
    keys = ", ".join(f"k{i}" for i in range(len(columns)))
    left = ", ".join(f"{c.child.format(t='a')} AS k{i}" for i, c in enumerate(columns))
    right = ", ".join(f"{c.parent.format(t='b')} AS k{i}" for i, c in enumerate(columns))
    on = same([(f"x.k{i}", f"y.k{i}") for i in range(len(columns))])
    turn = f"row_number() OVER (PARTITION BY {keys} ORDER BY r) AS n"
    found = engine.query(
        f"SELECT y.r FROM (SELECT *, {turn} FROM (SELECT {left}, r FROM t{child} a) s) x JOIN "
        f"(SELECT *, {turn} FROM (SELECT {right}, r FROM t{parent} b) s) y "
        f"ON {on} AND x.n = y.n"
    )
    return np.sort(np.array([r for (r,) in found], dtype=np.int64))


def encode_rows(rows: np.ndarray) -> bytes:
    """Sorted row numbers as a Parquet file (delta encoded)."""
    out = io.BytesIO()
    pq.write_table(
        pa.table({"row": rows}), out, compression="zstd", use_dictionary=False,
        column_encoding={"row": "DELTA_BINARY_PACKED"}, write_statistics=False,
    )  # fmt: skip
    return out.getvalue()


def decode_rows(content: bytes) -> np.ndarray:
    """Reads what :func:`encode_rows` wrote.

    Raises:
        InputError: if it is something else.
    """
    try:
        return pq.read_table(io.BytesIO(content)).column("row").to_numpy()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise InputError("the list of rows is truncated or no list of rows") from error
