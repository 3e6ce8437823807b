"""Tables without usable metadata, read once into Parquet files in a temporary folder.

CSV: every value is kept as it was spelled; a column is also kept as integers, reals, booleans or
dates if all its values read as such. A number with a leading zero is a code and stays text. An
empty field is null. Delta: the files of the current version are read where they are, unless the
table is partitioned, when its files lack columns and a copy is made.
"""

from __future__ import annotations

import codecs
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.data.lake import Column, Kind

BLOCK = 1 << 20
SEPARATORS = ",;\t|"
# What all values of a column must look like, and the type that then holds them exactly.
SPELLINGS: tuple[tuple[Kind, str, str, str], ...] = (
    ("integer", "int64", "BIGINT", r"-?(0|[1-9][0-9]{0,17})"),
    ("real", "double", "DOUBLE", r"-?(0|[1-9][0-9]*)?(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?"),
    ("boolean", "bool", "BOOLEAN", r"true|false|True|False|TRUE|FALSE"),
    ("date", "date32[day]", "DATE", r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
)


@dataclass(frozen=True)
class Staged:
    """A CSV file as Parquet.

    Attributes:
        file: the Parquet file.
        columns: by the names of the CSV's header.
        distinct_rows: by value.
    """

    file: Path
    columns: tuple[Column, ...]
    distinct_rows: int


def stage_csv(path: Path, file: Path) -> Staged:
    """Reads a CSV file into a Parquet file.

    Raises:
        InputError: if it is not UTF-8, has no header, repeats a name, or its lines do not have as
            many fields as the header.
    """
    duckdb = _duckdb()
    check_utf8(path)
    separator, header = read_header(path)
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InputError(f"two columns are called {repeated[0]!r}")
    raw = [f"x{i}" for i in range(len(header))]
    reader = (
        f"read_csv({_text(str(path))}, auto_detect=false, header=true, delim={_text(separator)}, "
        "quote='\"', escape='\"', nullstr='', strict_mode=true, columns={"
        + ", ".join(f"'{name}': 'VARCHAR'" for name in raw)
        + "})"
    )
    with duckdb.connect(config={"threads": 1}) as connection:
        try:
            connection.execute(f"CREATE TABLE t AS SELECT * FROM {reader}").fetchall()
        except duckdb.Error as error:
            raise InputError(f"is not a CSV table: {first_line(error)}") from error
        tests = [
            f"bool_and({name} IS NULL OR (regexp_full_match({name}, {_text(pattern)})"
            f" AND TRY_CAST({name} AS {sql}) IS NOT NULL))"
            for name in raw
            for _, _, sql, pattern in SPELLINGS
        ]
        counts = [f"count({name})" for name in raw]
        (values,) = connection.execute(f"SELECT {', '.join(counts + tests)} FROM t").fetchall()
        selected: list[str] = []
        columns: list[Column] = []
        for i, name in enumerate(header):
            fits = values[len(raw) + i * len(SPELLINGS) :][: len(SPELLINGS)]
            chosen = next((s for s, fit in zip(SPELLINGS, fits, strict=True) if fit), None)
            if chosen is None or values[i] == 0:
                kind: Kind = "text" if values[i] else "null"
                selected.append(f"x{i} AS c{i}")
                columns.append(Column(name, (f"c{i}",), "string", kind))
            else:
                selected.append(f"CAST(x{i} AS {chosen[2]}) AS c{i}, x{i}")
                columns.append(Column(name, (f"c{i}",), chosen[1], chosen[0], spelled=(f"x{i}",)))
        ((rows,),) = connection.execute("SELECT count(*) FROM t").fetchall()
        if rows == 0:
            raise InputError("it has no rows")
        values_only = ", ".join(item.partition(", ")[0] for item in selected)
        ((distinct,),) = connection.execute(
            f"SELECT count(*) FROM (SELECT DISTINCT {values_only} FROM t)"
        ).fetchall()
        batches = connection.sql(f"SELECT {', '.join(selected)} FROM t").to_arrow_reader(BLOCK // 8)
        # Arrow's writer keeps string statistics whole.
        with pq.ParquetWriter(file, batches.schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
    return Staged(file, tuple(columns), distinct)


def check_utf8(path: Path) -> None:
    """Sees that a file is UTF-8 text.

    Raises:
        InputError: where it is not.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = pending = 0
    with open(path, "rb") as file:
        try:
            while block := file.read(BLOCK):
                pending = len(decoder.getstate()[0])
                if b"\0" in block:
                    raise InputError(f"is not text: it has a zero byte at {at + block.index(0)}")
                decoder.decode(block)
                at += len(block)
            pending = 0
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            where = at - pending + error.start
            raise InputError(f"is not UTF-8: byte {where} cannot be decoded") from error


def read_header(path: Path) -> tuple[str, list[str]]:
    """The separator of a CSV file and the names in its first line.

    Raises:
        InputError: if it is empty.
    """
    best: tuple[str, list[str]] = (",", [])
    for separator in SEPARATORS:
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                found = next(csv.reader(file, delimiter=separator), [])
            except csv.Error as error:
                raise InputError(f"its header cannot be read: {error}") from error
        if len(found) > len(best[1]):
            best = separator, found
    if not best[1]:
        raise InputError("it is empty")
    return best


def delta_files(path: Path, file: Path) -> tuple[list[Path], int]:
    """Parquet files with the rows of a Delta table's current version.

    Returns:
        The files, and the bytes that were copied for it.

    Raises:
        InputError: if it cannot be read, or needs a feature that is not understood.
    """
    try:
        import deltalake
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise MissingExtra("deltalake", "lake") from error
    from urllib.parse import unquote, urlparse

    try:
        table = deltalake.DeltaTable(str(path))
        dataset = table.to_pyarrow_dataset()
        uris = table.file_uris()
        partitions = table.metadata().partition_columns
    except (DeltaError, OSError, ValueError) as error:
        raise InputError(f"is not a Delta table that can be read: {first_line(error)}") from error
    if not uris:
        raise InputError("it has no rows")
    files = [Path(unquote(urlparse(u).path) if u.startswith("file:") else u) for u in uris]
    files = sorted(place if place.is_absolute() else path / place for place in files)
    root = path.resolve()
    if any(not place.resolve().is_relative_to(root) for place in files):
        raise InputError("its log names files outside of its folder")
    if not partitions:
        return files, 0
    with pq.ParquetWriter(file, dataset.schema, compression="zstd") as writer:
        for batch in dataset.to_batches(use_threads=False):
            writer.write_batch(batch)
    return [file], sum(place.stat().st_size for place in files)


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtra("duckdb", "lake") from error
    return duckdb


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
