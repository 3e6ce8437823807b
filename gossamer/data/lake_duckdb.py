"""DuckDB over the tables of a lake, in this process; see :mod:`gossamer.data.lake_engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.data.lake import Column, Lake, Table
from gossamer.data.lake_engine import shared_type


class DuckEngine:
    """Answers SQL in DuckDB.

    Args:
        lake: the tables.
        threads: that it may use.

    Raises:
        MissingExtra: without duckdb.
    """

    name = "duckdb"

    def __init__(self, lake: Lake, *, threads: int = 1) -> None:
        try:
            import duckdb
        except ImportError as error:
            raise MissingExtra("duckdb", "lake") from error
        self._lake = lake
        self._failure = duckdb.Error
        self._connection = duckdb.connect(config={"threads": threads})
        self.query("SET TimeZone = 'UTC'")
        # A table that changes on disk must be seen to, not answered from memory.
        self.query("SET enable_external_file_cache = false")
        for index, table in enumerate(lake.tables):
            self.query(f"CREATE VIEW t{index} AS {relation(table)}")

    def _ask(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._failure as error:
            self._lake.check_unchanged()
            raise InputError(f"{self._lake.root} cannot be read: {first_line(error)}") from error

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of the answer.

        Raises:
            InputError: if a table changed meanwhile (it is named), or cannot be read.
        """
        return self._ask(lambda: self._connection.execute(sql).fetchall())

    def put(self, name: str, rows: pa.Table) -> None:
        """Makes a small table known under a name."""
        self._connection.register("given", rows)
        self.query(f"CREATE OR REPLACE TEMP TABLE {name} AS SELECT * FROM given")
        self._connection.unregister("given")

    def arrow(self, sql: str, *, rows: int = 1 << 16) -> pa.RecordBatchReader:
        """The answer in batches."""
        return self._ask(lambda: self._connection.sql(sql).to_arrow_reader(rows))

    def close(self) -> None:
        """Closes the database."""
        self._connection.close()


def relation(table: Table, extra: Mapping[str, str] | None = None) -> str:
    """SQL of a table's rows in shared types.

    Args:
        table: of a lake.
        extra: more columns, by name, as SQL over the files' columns.
    """
    selected = [f"{_shared(c)} AS c{i}" for i, c in enumerate(table.columns)]
    selected += [f"{place(c.spelled)} AS x{i}" for i, c in enumerate(table.columns) if c.spelled]
    selected += [f"{sql} AS {name}" for name, sql in (extra or {}).items()]
    pieces = []
    start = 0
    for file, rows in zip(table.files, table.file_rows, strict=True):
        name = str(file).replace("'", "''")
        pieces.append(
            f"SELECT {', '.join(selected)}, {start} + file_row_number AS r "
            f"FROM read_parquet('{_no_pattern(name)}', file_row_number=true)"
        )
        start += rows
    return " UNION ALL ".join(pieces)


def _no_pattern(name: str) -> str:
    """A path whose `*`, `?` and `[` stand for themselves."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def place(parts: tuple[str, ...] | None) -> str:
    """SQL of a (nested) column of the files."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts or ())


def _shared(column: Column) -> str:
    at = place(column.parts)
    if column.kind in ("timestamp", "instant"):
        return f"epoch_{'ns' if column.scale == 9 else 'us'}({at})"
    return shared_type(column, at, text="VARCHAR")
