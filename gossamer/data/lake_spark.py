"""Apache Spark over the tables of a lake; see :mod:`gossamer.data.lake_engine`.

The session that is active is used, else a local one is started. Files must be readable under the
same paths by all executors.
"""

from __future__ import annotations

import functools
from typing import Any

import pyarrow as pa

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.data.lake import Column, Lake, Table
from gossamer.data.lake_engine import shared_type

SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    # A value may hold "${...}".
    "spark.sql.variable.substitute": "false",
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.ansi.enabled": "true",
}


class SparkEngine:
    """Answers SQL in Spark.

    Args:
        lake: the tables.
        threads: of a local session.

    Raises:
        MissingExtra: without pyspark.
        InputError: if no session can be started (Spark needs Java).
    """

    name = "spark"

    def __init__(self, lake: Lake, *, threads: int = 1) -> None:
        try:
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise MissingExtra("pyspark", "spark") from error
        self._lake = lake
        self._failure = PySparkException
        active = SparkSession.getActiveSession()
        self._ours = active is None
        try:
            builder: Any = SparkSession.builder
            self._session = active or (
                builder.master(f"local[{threads}]")
                .appName("gossamer")
                .config("spark.ui.enabled", "false")
                .config("spark.sql.shuffle.partitions", str(threads))
                .config("spark.driver.bindAddress", "127.0.0.1")
                .config("spark.driver.host", "127.0.0.1")
                .config("spark.log.level", "ERROR")
                .getOrCreate()
            )
        except Exception as error:  # py4j raises what the missing or failing Java raised
            raise InputError(
                f"Spark could not be started (it needs Java): {first_line(error)}"
            ) from error
        self._before = {key: self._session.conf.get(key, None) for key in SETTINGS}
        for key, value in SETTINGS.items():
            self._session.conf.set(key, value)
        try:
            for index, table in enumerate(lake.tables):
                self._view(index, table)
        except PySparkException as error:
            lake.check_unchanged()
            raise InputError(f"{lake.root} cannot be read: {first_line(error)}") from error

    def _view(self, index: int, table: Table) -> None:
        pieces = []
        start = 0
        for file, rows in zip(table.files, table.file_rows, strict=True):
            selected = [f"{_shared(c)} AS c{i}" for i, c in enumerate(table.columns)]
            selected += [
                f"{_place(c.spelled)} AS x{i}" for i, c in enumerate(table.columns) if c.spelled
            ]
            # Written as a URI, so that no character of the name is a pattern.
            frame = self._session.read.parquet(_escaped(str(file.resolve())))
            pieces.append(frame.selectExpr(*selected, f"{start} + _metadata.row_index AS r"))
            start += rows
        whole = functools.reduce(lambda a, b: a.unionAll(b), pieces)
        whole.createOrReplaceTempView(f"t{index}")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of the answer.

        Raises:
            InputError: if a table changed meanwhile (it is named), or cannot be read.
        """
        try:
            return [tuple(row) for row in self._session.sql(sql).collect()]
        except self._failure as error:
            self._lake.check_unchanged()
            raise InputError(f"{self._lake.root} cannot be read: {first_line(error)}") from error

    def put(self, name: str, rows: pa.Table) -> None:
        """Makes a small table known under a name."""
        self._session.createDataFrame(rows).createOrReplaceTempView(name)

    def close(self) -> None:
        """Ends a session that was started here; gives another one its settings back."""
        if self._ours:
            self._session.stop()
            return
        for key, value in self._before.items():
            if value is None:
                self._session.conf.unset(key)
            else:
                self._session.conf.set(key, value)


def _escaped(path: str) -> str:
    return "".join(f"\\{c}" if c in "*?[]{}\\" else c for c in path)


def _place(parts: tuple[str, ...] | None) -> str:
    return ".".join("`" + part.replace("`", "``") + "`" for part in parts or ())


def _shared(column: Column) -> str:
    at = _place(column.parts)
    if column.kind in ("timestamp", "instant"):
        return at if column.scale == 9 else f"unix_micros(CAST({at} AS TIMESTAMP))"
    return shared_type(column, at, text="STRING")
