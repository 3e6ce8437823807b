"""A growing pool of evaluation results, sample by sample.

A pool is a folder of Parquet files anyone can read, in three tables that only ever grow:

``samples``
    id (text), text, and any columns that say what the sample is: names of nested fields are joined
    by dots (``metadata.source``).
``measurements``
    model, sample (ids, text), score (double, higher is better), kind (binary, numeric, pairwise).
    A pairwise vote is two rows of one sample id: 1 and 0, or .5 and .5.
``embeddings``
    sample (id), space (what made it), vector (list of float).

Every call of :meth:`EvaluationPool.add` writes new files beside the old ones, each by a rename, so
that a reader never sees half of one. A later measurement of the same model on the same sample takes
the place of the earlier one.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from gossamer.core.errors import InputError, first_line
from gossamer.core.files import whole_file
from gossamer.evaluate.comparisons import Scores

pc: Any = pyarrow.compute

KINDS = ("binary", "numeric", "pairwise")
OPERATORS = ("eq", "ne", "gt", "ge", "lt", "le", "contains", "len")
Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors ``[texts, width]``."""


@dataclass(frozen=True)
class Found:
    """A part of a pool.

    Attributes:
        samples: their ids.
        similarity: to what was asked for, ``[samples]``; None if nothing was.
    """

    samples: tuple[str, ...]
    similarity: np.ndarray | None = None


@dataclass(frozen=True)
class Measured:
    """Scores with the names that belong to their numbers.

    Attributes:
        scores: grouped by sample.
        models: names.
        samples: ids.
    """

    scores: Scores
    models: tuple[str, ...]
    samples: tuple[str, ...]


class EvaluationPool:
    """A pool in a folder.

    Args:
        folder: of the pool; made when something is added.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def add(
        self,
        measurements: pa.Table | Sequence[Mapping[str, Any]] | None = None,
        *,
        samples: pa.Table | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Adds results, and what their samples are.

        Args:
            measurements: rows of model, sample, score and, if not numeric, kind.
            samples: rows of id and whatever else is known; nested fields are flattened.

        Raises:
            InputError: if a column is missing or a value is none of its kind; nothing is written.
        """
        results = None if measurements is None else _measurements(_table(measurements))
        described = None if samples is None else _samples(samples)
        if described is not None and len(described):
            self._write("samples", described)
        if results is not None and len(results):
            self._write("measurements", results)

    def embed(self, encode: Encode, *, space: str, column: str = "text") -> int:
        """Embeds the samples that have no vector of this kind yet; returns how many they were.

        Args:
            encode: texts to vectors.
            space: a name for what makes the vectors.
            column: of the samples, what is embedded.

        Raises:
            InputError: if samples have no such column.
        """
        samples = self.samples()
        if column not in samples.column_names:
            raise InputError(f"the samples of {self.folder} have no column {column}")
        known = set(self._vectors(space)[0])
        ids = samples["id"].to_pylist()
        texts = samples[column].to_pylist()
        new = [k for k, name in enumerate(ids) if name not in known and texts[k] is not None]
        if new:
            vectors = np.asarray(encode([str(texts[k]) for k in new]), np.float32)
            self._write(
                "embeddings",
                pa.table(
                    {
                        "sample": pa.array([ids[k] for k in new], pa.string()),
                        "space": pa.array([space] * len(new), pa.string()),
                        "vector": pa.array(list(vectors), pa.list_(pa.float32())),
                    }
                ),
            )
        return len(new)

    def samples(self) -> pa.Table:
        """What is known of the samples, one row an id (the latest)."""
        return _latest(self._read("samples", pa.table({"id": pa.array([], pa.string())})), ["id"])

    def query(
        self,
        *,
        filters: Mapping[str, Any] | None = None,
        near: np.ndarray | Sequence[np.ndarray] | None = None,
        space: str | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> Found:
        """The samples that fit a description.

        Args:
            filters: what columns must be, as ``{"metadata.source.eq": "exam", "tags.len": 2}``;
                the last part of a name is one of eq, ne, gt, ge, lt, le, contains, len.
            near: a vector, or several of which a sample must be near each (for a question and its
                answer); compared by cosine.
            space: of the vectors.
            top_k: at most so many, the nearest; ties by id.
            threshold: only samples whose cosine is above.

        Raises:
            InputError: if a column or operator is unknown, or vectors are missing.
        """
        samples = self.samples()
        keep = np.ones(len(samples), bool)
        for name, value in (filters or {}).items():
            keep &= _passes(samples, name, value)
        ids = np.array(samples["id"].to_pylist(), object)[keep]
        if near is None:
            return Found(tuple(sorted(ids)))
        if space is None:
            raise InputError("say in which space the vectors are")
        wanted = [near] if isinstance(near, np.ndarray) and near.ndim == 1 else list(near)
        known, vectors = self._vectors(space)
        place = {name: k for k, name in enumerate(known)}
        ids = np.array([name for name in ids if name in place], object)
        if not len(ids):
            return Found((), np.empty(0))
        rows = _unit(vectors[[place[name] for name in ids]])
        cosines = np.stack([rows @ _unit(np.asarray(v, np.float32)) for v in wanted])
        chosen = np.ones(len(ids), bool)
        for cosine in cosines:  # each query chooses by itself; what all chose stays
            fits = np.ones(len(ids), bool) if threshold is None else cosine > threshold
            if top_k is not None:
                best = np.lexsort((ids.astype(str), -cosine))[:top_k]
                near_enough = np.zeros(len(ids), bool)
                near_enough[best] = True
                fits &= near_enough
            chosen &= fits
        similarity = cosines.min(0)[chosen]
        order = np.lexsort((ids[chosen].astype(str), -similarity))
        return Found(tuple(ids[chosen][order]), similarity[order])

    def measured(self, samples: Sequence[str] | None = None) -> Measured:
        """The results on some samples, or on all.

        Raises:
            InputError: if there are none.
        """
        table = self._read("measurements", None)
        if table is None or not len(table):
            raise InputError(f"{self.folder} holds no measurements")
        table = _latest(table, ["model", "sample"])
        if samples is not None:
            table = table.filter(pc.is_in(table["sample"], pa.array(list(samples), pa.string())))
        if not len(table):
            raise InputError("no model was measured on the samples that were chosen")
        return _numbered(table)

    def vector_of(self, sample: str, space: str) -> np.ndarray:
        """The vector of a sample.

        Raises:
            InputError: if it has none.
        """
        known, vectors = self._vectors(space)
        if sample not in known:
            raise InputError(f"sample {sample} has no vector of {space} in {self.folder}")
        return vectors[known.index(sample)]

    def _vectors(self, space: str) -> tuple[list[str], np.ndarray]:
        table = self._read("embeddings", None)
        if table is None:
            return [], np.empty((0, 0), np.float32)
        table = _latest(table.filter(pc.equal(table["space"], space)), ["sample"])
        if not len(table):
            return [], np.empty((0, 0), np.float32)
        return table["sample"].to_pylist(), np.stack(table["vector"].to_pylist()).astype(np.float32)

    def _write(self, name: str, table: pa.Table) -> None:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.parquet")))
        with whole_file(folder / f"{number:06d}-{uuid.uuid4().hex[:8]}.parquet") as path:
            pq.write_table(table, path)

    def _read(self, name: str, empty: Any) -> Any:
        paths = sorted((self.folder / name).glob("*.parquet"))
        if not paths:
            return empty
        try:
            tables = [pq.read_table(path) for path in paths]
            return pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.folder / name} cannot be read: {first_line(error)}") from error


def measured_of(measurements: pa.Table | Sequence[Mapping[str, Any]]) -> Measured:
    """The results of a table alone, without a pool.

    Args:
        measurements: rows of model, sample, score and, if not numeric, kind.

    Raises:
        InputError: if a column is missing, a value is none of its kind, or there are no rows.
    """
    table = _measurements(_table(measurements))
    if not len(table):
        raise InputError("there are no measurements")
    return _numbered(_latest(table, ["model", "sample"]))


def _numbered(table: pa.Table) -> Measured:
    models, model_numbers = np.unique(table["model"].to_numpy(), return_inverse=True)
    samples, sample_numbers = np.unique(table["sample"].to_numpy(), return_inverse=True)
    return Measured(
        Scores.of(sample_numbers, model_numbers, table["score"].to_numpy(), len(models)),
        tuple(models.tolist()),
        tuple(samples.tolist()),
    )


def _table(rows: pa.Table | Sequence[Mapping[str, Any]]) -> pa.Table:
    return rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(r) for r in rows])


def _measurements(table: pa.Table) -> pa.Table:
    missing = [name for name in ("model", "sample", "score") if name not in table.column_names]
    if missing and len(table):
        raise InputError(f"measurements need the columns model, sample, score; no {missing[0]}")
    if not len(table):
        return table
    try:
        score = pc.cast(table["score"], pa.float64())
        model, sample = (pc.cast(table[name], pa.string()) for name in ("model", "sample"))
    except pa.ArrowException as error:
        raise InputError(f"measurements are not usable: {first_line(error)}") from error
    if model.null_count or sample.null_count:
        raise InputError("a measurement names no model or no sample")
    if "kind" in table.column_names:
        kind = pc.fill_null(pc.cast(table["kind"], pa.string()), "numeric")
        other = sorted(set(pc.unique(kind).to_pylist()) - set(KINDS))
        if other:
            raise InputError(f"a measurement is {other[0]!r}; kinds are {', '.join(KINDS)}")
    else:
        kind = pa.array(["numeric"] * len(table))
    binary = np.array(pc.equal(kind, "binary").to_pylist())
    values = score.to_numpy()
    wrong = binary & ~np.isin(values, (0.0, 1.0)) & ~np.isnan(values)
    if wrong.any():
        raise InputError(f"a binary score is {values[wrong][0]:g}; it is 0 or 1")
    return pa.table({"model": model, "sample": sample, "score": score, "kind": kind})


def _samples(rows: pa.Table | Sequence[Mapping[str, Any]]) -> pa.Table:
    records = _table(rows).to_pylist()
    table = pa.Table.from_pylist([_flat(record) for record in records])
    if len(table) and "id" not in table.column_names:
        raise InputError("samples need the column id")
    if len(table) and table["id"].null_count:
        raise InputError("a sample has no id")
    at = table.column_names.index("id") if len(table) else None
    if at is None:
        return table
    return table.set_column(at, "id", pc.cast(table["id"], pa.string()))


def _flat(record: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{above}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _latest(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """The last row of each key."""
    if not len(table):
        return table
    place = table.append_column("row", pa.array(np.arange(len(table))))
    last = place.group_by(list(keys)).aggregate([("row", "max")])["row_max"]
    return table.take(np.sort(last.to_numpy()))


def _passes(samples: pa.Table, name: str, value: Any) -> np.ndarray:
    column, _, operator = name.rpartition(".")
    if operator not in OPERATORS:
        raise InputError(
            f"the filter {name!r} ends in no operator; write COLUMN.OPERATOR with one of "
            f"{', '.join(OPERATORS)}"
        )
    if column not in samples.column_names:
        raise InputError(
            f"samples have no column {column!r}; they have {', '.join(samples.column_names)}"
        )
    values = samples[column]
    try:
        if operator == "len":
            length = (
                pc.list_value_length(values)
                if pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
                else pc.utf8_length(values)
            )
            found = pc.equal(length, int(value))
        elif operator == "contains":
            if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                return np.array([v is not None and value in v for v in values.to_pylist()], bool)
            found = pc.match_substring(values, str(value))
        else:
            compare = {
                "eq": pc.equal, "ne": pc.not_equal, "gt": pc.greater, "ge": pc.greater_equal,
                "lt": pc.less, "le": pc.less_equal,
            }[operator]  # fmt: skip
            found = compare(values, pa.scalar(_as(value, values.type), values.type))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"the filter {name!r} cannot be applied: {first_line(error)}") from error
    return np.array(pc.fill_null(found, False).to_pylist(), bool)


def _as(value: Any, kind: pa.DataType) -> Any:
    """What a user typed, as a value of a column's type."""
    if not isinstance(value, str) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return value
    if pa.types.is_boolean(kind):
        return value.lower() in ("true", "1", "yes")
    return (
        int(value) if pa.types.is_integer(kind) and re.fullmatch(r"-?\d+", value) else float(value)
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
