"""Tables of a data lake: what is there, what it holds by its metadata, and whether it stands still.

A table is a Parquet file, a folder `name.parquet` of such files, a CSV file, or a Delta table.
Structs are flattened into columns `a.b.c`. Of Parquet only the footers are read. CSV has no
metadata and is read once, into a Parquet file in a temporary folder with every value as it was
spelled and, where all of a column allow it, as a number, a date or a boolean
(:mod:`gossamer.data.lake_staging`).

What cannot be compared is skipped and listed with the reason. A table that changes while it is
being compared is an error that names it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.core.progress import progress
from gossamer.data.column_statistics import ALL_NULL, EXACT_WRITERS, Statistics, folded

Kind = Literal[
    "integer", "decimal", "real", "text", "boolean", "date", "timestamp", "instant", "bytes", "null"
]
Format = Literal["parquet", "csv", "delta"]
Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Column:
    """A leaf of a table's schema.

    Attributes:
        name: dotted path, as the user knows it.
        parts: where its value is in the Parquet files that are read.
        type: as stored.
        kind: what it is compared as.
        scale: digits after the point of a decimal; 9 for times in nanoseconds, else 6.
        precision: digits of a decimal.
        spelled: where its text is in the files, if that is kept beside its value.
    """

    name: str
    parts: tuple[str, ...]
    type: str
    kind: Kind
    scale: int = 0
    precision: int = 0
    spelled: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Table:
    """One table of a lake.

    Attributes:
        name: its path below the lake's root.
        path: of the file or folder.
        format: how it is stored.
        files: Parquet files to read its rows from.
        file_rows: rows of each.
        bytes: on disk, as the lake stores it.
        columns: leaves of the schema.
        statistics: of each column.
        column_bytes: compressed bytes of each column in `files`.
        schema: Arrow schema of `files`.
        fingerprint: path, size and time of change of everything it is made of.
        metadata_bytes: read to know all this (footers; for CSV the whole file).
        distinct_rows: if known.
    """

    name: str
    path: Path
    format: Format
    files: tuple[Path, ...]
    file_rows: tuple[int, ...]
    bytes: int
    columns: tuple[Column, ...]
    statistics: Mapping[str, Statistics]
    column_bytes: Mapping[str, int]
    schema: pa.Schema
    fingerprint: Fingerprint
    metadata_bytes: int
    distinct_rows: int | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.file_rows)

    def column(self, name: str) -> Column:
        """A column by its dotted path."""
        return next(column for column in self.columns if column.name == name)

    def names(self) -> frozenset[str]:
        """The schema: dotted paths of all leaves."""
        return frozenset(column.name for column in self.columns)

    def bytes_of(self, names: Sequence[str]) -> int:
        """Compressed bytes of some columns, all rows."""
        return sum(self.column_bytes[name] for name in names)

    def digest(self) -> str:
        """SHA-256 over the contents of everything the table is made of."""
        total = hashlib.sha256()
        for name, _, _ in self.fingerprint:
            total.update(name.encode("utf-8", "surrogateescape") + b"\0")
            with open(self.path.parent / name, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


@dataclass(frozen=True)
class Skipped:
    """A table that is not compared, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Lake:
    """Tables to compare.

    Attributes:
        root: folder that names are relative to.
        tables: sorted by name.
        skipped: what was found and cannot be compared.
    """

    root: Path
    tables: tuple[Table, ...]
    skipped: tuple[Skipped, ...] = ()
    # Staged files live as long as the lake does.
    _staging: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.bytes for table in self.tables)

    def index(self, name: str) -> int:
        """Where a table is in `tables`.

        Raises:
            InputError: if there is none of that name.
        """
        if name not in self._numbers:
            raise InputError(f"{self.root} has no table {name}")
        return self._numbers[name]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {table.name: number for number, table in enumerate(self.tables)}

    def __getitem__(self, name: str) -> Table:
        return self.tables[self.index(name)]

    def check_unchanged(self) -> None:
        """Sees that every file is as it was when the lake was read.

        Raises:
            InputError: if one has changed or gone; it is named.
        """
        for table in self.tables:
            try:
                now = fingerprint(table.path)
            except OSError:
                now = ()
            if now != table.fingerprint:
                what = "changed" if now else "went away"
                raise InputError(
                    f"{table.path} {what} while the lake was being read; "
                    "run again when nothing writes to it"
                )


def fingerprint(path: Path) -> Fingerprint:
    """Path (below the parent), size and time of change in ns of a file, or of all in a folder."""
    found = []
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        state = file.stat()
        found.append((file.relative_to(path.parent).as_posix(), state.st_size, state.st_mtime_ns))
    if not found:
        raise FileNotFoundError(path)
    return tuple(found)


def find_tables(root: Path) -> Iterator[tuple[Path, Format]]:
    """What looks like a table below a folder; hidden files and links are left out."""
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        kept = []
        for name in sorted(folders):
            place = here / name
            if name.startswith((".", "_")) or place.is_symlink():
                continue
            if (place / "_delta_log").is_dir():
                yield place, "delta"
            elif name.endswith(".parquet"):
                yield place, "parquet"
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            if name.startswith((".", "_")) or (here / name).is_symlink():
                continue
            suffix = name.lower().rpartition(".")[2]
            if suffix in ("parquet", "pq"):
                yield here / name, "parquet"
            elif suffix in ("csv", "tsv"):
                yield here / name, "csv"


def read_lake(root: str | Path, *, only: Sequence[str] | None = None) -> Lake:
    """Reads what the metadata of a lake's tables say.

    Args:
        root: a folder. If it is itself a Delta table or one file, that is the only table.
        only: names of tables to read. Default: all.

    Returns:
        The lake; tables that cannot be compared are in `skipped`.

    Raises:
        InputError: if there is no such folder, or it holds no table.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; give the folder that holds the tables")
    found: list[tuple[str, Path, Format]] = [
        (place.relative_to(root).as_posix(), place, kind) for place, kind in find_tables(root)
    ]
    if only is not None:
        wanted = set(only)
        found = [item for item in found if item[0] in wanted]
        if lacking := wanted - {name for name, _, _ in found}:
            raise InputError(f"{root} has no table {sorted(lacking)[0]}")
    if not found:
        raise InputError(f"{root} holds no Parquet, CSV or Delta table")
    staging = tempfile.TemporaryDirectory(prefix="gossamer-lake-")
    tables: list[Table] = []
    skipped: list[Skipped] = []
    with progress() as bar:
        for number, (name, place, kind) in enumerate(bar.track(sorted(found), description="lake")):
            try:
                tables.append(read_table(name, place, kind, Path(staging.name) / f"{number}"))
            except MissingExtra:
                raise
            except InputError as error:
                skipped.append(Skipped(name, str(error)))
    if not tables:
        reasons = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:3])
        raise InputError(f"{root} holds no table that can be compared ({reasons})")
    return Lake(root, tuple(tables), tuple(skipped), staging)


def read_table(name: str, place: Path, format: Format, staging: Path) -> Table:
    """One table's metadata.

    Args:
        name: of the table.
        place: file or folder.
        format: how it is stored.
        staging: where a copy may be written (without suffix).

    Raises:
        InputError: why it cannot be compared.
    """
    from gossamer.data.lake_staging import delta_files, stage_csv

    try:
        mark = fingerprint(place)
        if format == "csv":
            staged = stage_csv(place, staging.with_suffix(".parquet"))
            table = _of_files(name, place, format, [staged.file], mark, columns=staged.columns)
            return Table(
                **{
                    **vars(table),
                    "metadata_bytes": mark[0][1],
                    "distinct_rows": staged.distinct_rows,
                }
            )
        if format == "delta":
            files, copied = delta_files(place, staging.with_suffix(".parquet"))
            table = _of_files(name, place, format, files, mark)
            extra = table.metadata_bytes + copied
            return Table(**{**vars(table), "metadata_bytes": extra})
        files = [place] if place.is_file() else _parts(place)
        return _of_files(name, place, format, files, mark)
    except (pa.ArrowException, OSError, OverflowError, MemoryError) as error:
        raise InputError(f"cannot be read: {first_line(error)}") from error


def _parts(folder: Path) -> list[Path]:
    parts = sorted(
        file
        for file in folder.rglob("*.parquet")
        if file.is_file() and not file.name.startswith((".", "_"))
    )
    if not parts:
        raise InputError("the folder holds no Parquet file")
    if any("=" in p for file in parts for p in file.relative_to(folder).parts[:-1]):
        raise InputError("its folders name values (partitions), which its files do not hold")
    return parts


def _of_files(
    name: str,
    place: Path,
    format: Format,
    files: Sequence[Path],
    mark: Fingerprint,
    *,
    columns: Sequence[Column] | None = None,
) -> Table:
    """A table of Parquet files with one schema, from their footers."""
    schema: pa.Schema | None = None
    rows: list[int] = []
    groups: dict[str, list[Statistics | None]] = {}
    sizes: dict[str, int] = {}
    read = 0
    for file in files:
        with pq.ParquetFile(file) as opened:
            metadata, here = opened.metadata, opened.schema_arrow
        if schema is None:
            schema = here
        elif not schema.equals(here):
            raise InputError(f"its files have different schemas ({file.name} and {files[0].name})")
        # The footer's length and magic take eight bytes.
        read += metadata.serialized_size + 8
        rows.append(metadata.num_rows)
        leaves = list(_leaves(here))
        exact = (metadata.created_by or "").startswith(EXACT_WRITERS)
        for group in range(metadata.num_row_groups):
            chunks = metadata.row_group(group)
            for number, leaf in enumerate(leaves):
                chunk = chunks.column(number)
                sizes[leaf.name] = sizes.get(leaf.name, 0) + chunk.total_compressed_size
                part = _statistics(chunk.statistics, leaf, here, chunk.num_values, exact)
                groups.setdefault(leaf.name, []).append(part)
    assert schema is not None
    stored = list(_leaves(schema))
    found = list(stored if columns is None else columns)
    _check_names(found)
    if sum(rows) == 0:
        raise InputError("it has no rows")
    # A staged column's statistics are those of the place its values are in.
    place_of = {leaf.parts: leaf.name for leaf in stored}
    return Table(
        name=name,
        path=place,
        format=format,
        files=tuple(files),
        file_rows=tuple(rows),
        bytes=sum(size for path, size, _ in mark if "_delta_log/" not in path)
        if format != "delta" or columns is not None
        else sum(file.stat().st_size for file in files),
        columns=tuple(found),
        statistics={c.name: folded(groups[place_of[c.parts]]) for c in found},
        column_bytes={c.name: sizes[place_of[c.parts]] for c in found},
        schema=schema,
        fingerprint=mark,
        metadata_bytes=read,
    )


def _check_names(columns: Sequence[Column]) -> None:
    if not columns:
        raise InputError("it has no columns")
    seen: set[str] = set()
    for column in columns:
        if column.name in seen:
            raise InputError(f"two columns are called {column.name!r}")
        seen.add(column.name)


def _leaves(schema: pa.Schema | pa.StructType, above: tuple[str, ...] = ()) -> Iterator[Column]:
    for number in range(len(schema) if isinstance(schema, pa.Schema) else schema.num_fields):
        entry = schema.field(number)
        parts = (*above, entry.name)
        if pa.types.is_struct(entry.type):
            yield from _leaves(entry.type, parts)
        else:
            kind, scale, precision = _kind(entry.type, ".".join(parts))
            yield Column(".".join(parts), parts, str(entry.type), kind, scale, precision)


def _kind(type: pa.DataType, name: str) -> tuple[Kind, int, int]:
    is_ = pa.types
    if is_.is_dictionary(type):
        return _kind(type.value_type, name)
    if is_.is_uint64(type):
        return "decimal", 0, 20
    if is_.is_integer(type):
        return "integer", 0, 0
    if is_.is_floating(type):
        return "real", 0, 0
    if is_.is_decimal(type):
        if type.precision > 38:
            raise InputError(f"column {name} is a {type}, which is too wide to compare")
        return "decimal", type.scale, type.precision
    if is_.is_boolean(type):
        return "boolean", 0, 0
    if is_.is_string(type) or is_.is_large_string(type) or is_.is_string_view(type):
        return "text", 0, 0
    if is_.is_date(type):
        return "date", 0, 0
    if is_.is_timestamp(type):
        return ("timestamp" if type.tz is None else "instant"), 9 if type.unit == "ns" else 6, 0
    if is_.is_binary(type) or is_.is_large_binary(type) or is_.is_fixed_size_binary(type):
        return "bytes", 0, 0
    if is_.is_null(type):
        return "null", 0, 0
    raise InputError(f"column {name} is a {type}, which cannot be compared")


def _statistics(
    found: Any, column: Column, schema: pa.Schema, values: int, exact: bool
) -> Statistics | None:
    """What one row group says of a column, in the values the column is compared in."""
    if found is None:
        return None
    nulls = found.null_count if found.has_null_count else None
    if nulls == values:
        return Statistics(ALL_NULL, ALL_NULL, True, nulls)
    if not found.has_min_max:
        return Statistics(nulls=nulls)
    low, high = found.min, found.max
    if column.kind in ("timestamp", "instant"):
        unit = column.type[len("timestamp[") :].partition(",")[0].rstrip("]")
        # Files keep no seconds: they are written as milliseconds.
        steps = {"s": 1_000, "ms": 1_000, "us": 1, "ns": 1}[unit]
        low, high = found.min_raw, found.max_raw
        if not isinstance(low, int):  # twelve-byte times have no order
            return Statistics(nulls=nulls)
        low, high = low * steps, high * steps
    elif column.kind == "bytes" or (column.kind == "text" and not isinstance(low, str)):
        return Statistics(nulls=nulls)
    return Statistics(low, high, exact or column.kind != "text", nulls)


def draw_rows(table: Table, count: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers of rows, uniformly without replacement, sorted; all if there are fewer."""
    if count >= table.rows:
        return np.arange(table.rows)
    return np.sort(generator.choice(table.rows, size=count, replace=False, shuffle=False))


def fetch_rows(table: Table, rows: np.ndarray) -> tuple[pa.Table, int]:
    """Some rows, in the values they are compared in.

    Only the row groups that hold one of them are read.

    Args:
        table: of a lake.
        rows: sorted numbers ``[n]`` over all files.

    Returns:
        A table with a column ``c<i>`` for each column, ``x<i>`` for its spelling if there is one,
        and ``r``, the number of the row; and the bytes that were read.
    """
    pieces: list[pa.Table] = []
    read = 0
    start = 0
    for file in table.files:
        with pq.ParquetFile(file) as opened:
            for group in range(opened.metadata.num_row_groups):
                chunk = opened.metadata.row_group(group)
                here = rows[(rows >= start) & (rows < start + chunk.num_rows)]
                if len(here):
                    piece = opened.read_row_group(group, use_threads=False).take(here - start)
                    pieces.append(_comparable(table, piece).append_column("r", pa.array(here)))
                    read += sum(
                        chunk.column(j).total_compressed_size for j in range(chunk.num_columns)
                    )
                start += chunk.num_rows
    return pa.concat_tables(pieces), read


def _comparable(table: Table, rows: pa.Table) -> pa.Table:
    arrays: dict[str, pa.ChunkedArray] = {}
    for number, column in enumerate(table.columns):
        arrays[f"c{number}"] = _converted(_leaf(rows, column.parts), column)
        if column.spelled is not None:
            arrays[f"x{number}"] = rows.column(column.spelled[0])
    return pa.table(arrays)


def _leaf(rows: pa.Table, parts: tuple[str, ...]) -> pa.ChunkedArray:
    import pyarrow.compute as pc

    found = rows.column(parts[0])
    for part in parts[1:]:
        found = pc.call_function(
            "struct_field", [found], pc.StructFieldOptions([part])
        )  # a null struct has null fields
    return found


def _converted(values: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
    """As the engines' views have it."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    match column.kind:
        case "integer":
            return values.cast(pa.int64())
        case "real":
            return values.cast(pa.float64())
        case "decimal":
            return values.cast(pa.decimal128(column.precision, column.scale))
        case "text":
            return values.cast(pa.string())
        case "null":
            return pa.chunked_array([pa.nulls(len(values), pa.string())])
        case "date":
            return values.cast(pa.date32())
        case "bytes":
            return values.cast(pa.binary())
        case "timestamp" | "instant":
            unit = "ns" if column.scale == 9 else "us"
            zone = values.type.tz
            return values.cast(pa.timestamp(unit, zone)).cast(pa.int64())
    return values
