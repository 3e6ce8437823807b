"""What compares rows: an engine that answers SQL over the tables of a lake.

An engine shows table ``i`` as a view ``t<i>`` whose column ``c<j>`` is the table's j-th column in a
type that all engines share (``x<j>`` its spelling, for CSV; ``r`` the number of the row), so one
text of SQL serves all and the results are the same. Nulls are equal to nulls, NaN to NaN, -0.0 to
0.0; text is compared byte by byte.
"""

from __future__ import annotations

import datetime
import decimal
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pyarrow as pa

from gossamer.core.errors import InputError
from gossamer.data.lake import Column, Lake, Table

EngineName = Literal["duckdb", "spark"]
EXACT_INTEGERS = 2**53
"""Above this, neighbouring integers are the same real number."""


class Engine(Protocol):
    """Answers SQL over the views of a lake's tables."""

    name: str

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of the answer."""
        ...

    def put(self, name: str, rows: pa.Table) -> None:
        """Makes a small table known under a name."""
        ...

    def close(self) -> None:
        """Lets go of everything."""
        ...


def open_engine(name: EngineName, lake: Lake, *, threads: int = 1) -> Engine:
    """An engine that knows the tables of a lake.

    Args:
        name: "duckdb" (in this process) or "spark" (a local session, or the one that is active).
        lake: the tables.
        threads: that it may use; an active Spark session keeps its own.

    Raises:
        InputError: if there is no such engine.
        MissingExtra: if its package is not installed.
    """
    if name == "duckdb":
        from gossamer.data.lake_duckdb import DuckEngine

        return DuckEngine(lake, threads=threads)
    if name == "spark":
        from gossamer.data.lake_spark import SparkEngine

        return SparkEngine(lake, threads=threads)
    raise InputError(f"there is no engine {name!r}; choose duckdb or spark")


@dataclass(frozen=True)
class Comparison:
    """How one column of a child is compared with its namesake in a parent.

    Attributes:
        name: of the column.
        child: SQL over an alias, as ``CAST({t}.c3 AS DOUBLE)``.
        parent: the same for the parent.
        kind: what both are.
        cast: whether either was converted.
    """

    name: str
    child: str
    parent: str
    kind: str
    cast: bool


def compare_columns(child: Table, parent: Table, name: str) -> Comparison | str:
    """How a column of two tables can be compared; why not, if it cannot.

    Integers and reals are compared as reals if no integer is so large that reals cannot tell it
    from its neighbour; decimals with decimals or integers, at the larger scale; CSV values as they
    are spelled with text. Nothing else is converted.
    """
    a, b = child.column(name), parent.column(name)
    left, right = _place(child, a), _place(parent, b)
    if a.kind == b.kind == "decimal" and a.scale != b.scale:
        return _decimals(name, a, b, left, right)
    if a.kind == b.kind and a.scale == b.scale:
        return Comparison(name, left, right, a.kind, a.type != b.type)
    if a.kind == b.kind:  # times in different units
        left = left if a.scale == 9 else f"({left} * 1000)"
        right = right if b.scale == 9 else f"({right} * 1000)"
        return Comparison(name, left, right, a.kind, True)
    if "null" in (a.kind, b.kind):
        # Nothing but nulls fits any type; a null in it equals a null.
        sql = {"integer": "BIGINT", "timestamp": "BIGINT", "instant": "BIGINT", "real": "DOUBLE"}
        other = b if a.kind == "null" else a
        type_ = sql.get(other.kind) or {
            "decimal": f"DECIMAL({other.precision},{other.scale})", "boolean": "BOOLEAN",
            "date": "DATE", "bytes": "BINARY",
        }.get(other.kind, "STRING")  # fmt: skip
        nothing = f"CAST(NULL AS {type_})"
        if a.kind == "null":
            return Comparison(name, nothing, right, b.kind, True)
        return Comparison(name, left, nothing, a.kind, True)
    texts = [_text_place(table, column) for table, column in ((child, a), (parent, b))]
    if None not in texts:
        return Comparison(name, str(texts[0]), str(texts[1]), "text", True)
    kinds = {a.kind, b.kind}
    if kinds == {"integer", "real"}:
        table, column = (child, a) if a.kind == "integer" else (parent, b)
        known = table.statistics[column.name]
        if known.low is None or max(-known.low, known.high) > EXACT_INTEGERS:
            return f"{name} holds integers that reals cannot tell apart"
        cast = "CAST({} AS DOUBLE)"
        left = cast.format(left) if a.kind == "integer" else left
        right = cast.format(right) if b.kind == "integer" else right
        return Comparison(name, left, right, "real", True)
    if kinds == {"integer", "decimal"}:
        return _decimals(name, a, b, left, right)
    return f"{name} is {a.type} in one and {b.type} in the other"


def _decimals(name: str, a: Column, b: Column, left: str, right: str) -> Comparison | str:
    scale = max(a.scale, b.scale)
    digits = max((c.precision if c.kind == "decimal" else 19) - c.scale for c in (a, b))
    if digits + scale > 38:
        return f"{name} is {a.type} in one and {b.type} in the other, too wide to compare"
    type_ = f"DECIMAL({digits + scale},{scale})"
    left, right = f"CAST({left} AS {type_})", f"CAST({right} AS {type_})"
    return Comparison(name, left, right, "decimal", True)


def _place(table: Table, column: Column) -> str:
    return f"{{t}}.c{table.columns.index(column)}"


def _text_place(table: Table, column: Column) -> str | None:
    number = table.columns.index(column)
    if column.kind == "text":
        return f"{{t}}.c{number}"
    return f"{{t}}.x{number}" if column.spelled is not None else None


def literal(value: Any, comparison_kind: str) -> str:
    """A value as SQL that all engines read as the same value.

    Raises:
        ValueError: if the value has no such text.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"CAST('{value}' AS BIGINT)"
        case float() if value == value and abs(value) != float("inf"):
            return f"CAST('{value!r}' AS DOUBLE)"
        case str() if "\0" not in value:
            # Dialects differ in how quotes and backslashes are written inside of quotes.
            pieces = re.split(r"(['\\])", value)
            spoken = [f"chr({ord(p)})" if p in ("'", "\\") else f"'{p}'" for p in pieces if p]
            return (
                "concat('', " + ", ".join(spoken) + ")" if len(spoken) > 1 else (*spoken, "''")[0]
            )
        case datetime.date() if not isinstance(value, datetime.datetime):
            return f"DATE '{value.isoformat()}'"
        case decimal.Decimal() if value.is_finite():
            exponent = value.as_tuple().exponent
            scale = max(0, -exponent) if isinstance(exponent, int) else 0
            return f"CAST('{value:f}' AS DECIMAL(38,{scale}))"
    raise ValueError(f"{value!r} ({comparison_kind}) has no literal")


def same(pairs: Sequence[tuple[str, str]]) -> str:
    """SQL that rows are equal in all of some columns, nulls included."""
    return " AND ".join(f"{a} IS NOT DISTINCT FROM {b}" for a, b in pairs)


def shared_type(column: Column, at: str, *, text: str) -> str:
    """SQL of a column, other than of times, in the type that all engines share.

    Args:
        column: of a table.
        at: SQL of where its values are.
        text: the engine's name of the type of text.
    """
    match column.kind:
        case "integer":
            return f"CAST({at} AS BIGINT)"
        case "real":
            return f"CAST({at} AS DOUBLE)"
        case "decimal":
            return f"CAST({at} AS DECIMAL({column.precision},{column.scale}))"
        case "text":
            return f"CAST({at} AS {text})"
        case "date":
            return f"CAST({at} AS DATE)"
        case "null":
            return f"CAST(NULL AS {text})"
    return at
