"""A plan of which tables of a lake can go, what that saves, and how each comes back.

Nothing here deletes a table. A table enters a plan only after all of its rows were compared with
those of the table it would be rebuilt from, and a recipe gives exactly these rows as often as they
are. A rebuild refuses a parent whose content is no longer what it was when the plan was made.

Source: steps 4 to 6 of Shah et al., "R2D2", SIGMOD 2024, arXiv:2312.13427.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.core.files import read_json, whole_file, whole_folder, write_json
from gossamer.data.containment import ContainmentGraph
from gossamer.data.lake import Format, Lake, Table, read_lake
from gossamer.data.lake_duckdb import DuckEngine, place, relation
from gossamer.data.lake_staging import read_header
from gossamer.data.reconstruction import (
    Condition,
    Exact,
    Recipe,
    decode_rows,
    encode_rows,
    find_recipe,
)
from gossamer.data.retention import Costs, Problem, Retention, exact, latency, problem

VERSION = 1


@dataclass(frozen=True)
class Deletion:
    """One table that can go.

    Attributes:
        table: its name.
        parent: the kept table it is rebuilt from.
        recipe: how.
        rows: of the table.
        bytes: that it takes.
        seconds: of a rebuild, as modelled by the costs.
        cost: of not having it, a period.
        format: of the table.
        schema: Arrow schema of the table (of a CSV: its header, as strings).
        digest: SHA-256 of its content.
        parent_digest: SHA-256 of the parent's.
    """

    table: str
    parent: str
    recipe: Recipe
    rows: int
    bytes: int
    seconds: float
    cost: float
    format: Format
    schema: pa.Schema
    digest: str
    parent_digest: str


@dataclass(frozen=True)
class RetentionPlan:
    """What to keep and what can go.

    Attributes:
        root: folder of the lake.
        keep: names.
        deletions: sorted by name.
        cost: of the plan, a period.
        cost_of_keeping: of keeping all.
        costs: prices.
        max_latency: seconds that a rebuild may take.
        bytes: of the lake.
        compared: edges whose rows were all compared.
        refused: edges that a cheaper plan would have used, and why they cannot be.
    """

    root: Path
    keep: tuple[str, ...]
    deletions: tuple[Deletion, ...]
    cost: float
    cost_of_keeping: float
    costs: Costs
    max_latency: float | Mapping[str, float]
    bytes: int
    compared: int = 0
    refused: tuple[tuple[str, str, str], ...] = ()

    @property
    def saved_bytes(self) -> int:
        """Bytes of the tables that can go, less those of the lists of rows."""
        return sum(d.bytes - d.recipe.bytes for d in self.deletions)

    def deletion(self, table: str) -> Deletion:
        """How one table goes.

        Raises:
            InputError: if the plan keeps it.
        """
        for deletion in self.deletions:
            if deletion.table == table:
                return deletion
        raise InputError(f"the plan does not delete {table}")

    def dry_run(self) -> list[str]:
        """What would be done, one line a table, after seeing that nothing has changed since.

        Raises:
            InputError: if a table that goes or is rebuilt from has changed; it is named.
        """
        names = {d.table for d in self.deletions} | {d.parent for d in self.deletions}
        if not names:
            return []
        lake = read_lake(self.root, only=sorted(names))
        digests = {table.name: table.digest() for table in lake.tables}
        for deletion in self.deletions:
            _check(self.root, deletion.table, digests.get(deletion.table), deletion.digest)
            _check(self.root, deletion.parent, digests.get(deletion.parent), deletion.parent_digest)
        return [f"delete {d.table}: {d.recipe} of {d.parent}" for d in self.deletions]

    def rebuild(self, table: str, out: str | Path, *, root: Path | None = None) -> Path:
        """Writes a deleted table again, in the format it had.

        The rows are the same and as often, in no promised order; column types are the same. In a
        CSV a number may be spelled as the parent spells it.

        Args:
            table: name.
            out: file (a folder for Delta) to write.
            root: of the lake, if it has moved.

        Raises:
            InputError: if the plan keeps the table, or the parent has changed.
        """
        deletion = self.deletion(table)
        root = root or self.root
        lake = read_lake(root, only=[deletion.parent])
        if not lake.tables:
            raise InputError(f"{deletion.parent} cannot be read: {lake.skipped[0].reason}")
        parent = lake.tables[0]
        _check(root, parent.name, parent.digest(), deletion.parent_digest)
        engine = DuckEngine(lake)
        try:
            if deletion.recipe.rows is not None:
                engine.put("chosen", pa.table({"row": deletion.recipe.rows}))
            found = engine.arrow(_rebuild_sql(deletion, parent))
            return _write(found, deletion, Path(out))
        finally:
            engine.close()

    def write(self, path: str | Path) -> None:
        """Writes the plan as one JSON file; lists of rows are in it as compressed Parquet."""
        bound = self.max_latency
        write_json(
            Path(path),
            {
                "format": "gossamer retention plan",
                "version": VERSION,
                "root": str(self.root.resolve()),
                "bytes": self.bytes,
                "saved_bytes": self.saved_bytes,
                "cost": self.cost,
                "cost_of_keeping": self.cost_of_keeping,
                "costs": asdict(self.costs),
                "max_latency": _finite(bound)
                if not isinstance(bound, Mapping)
                else {k: _finite(v) for k, v in bound.items()},
                "compared": self.compared,
                "refused": [list(item) for item in self.refused],
                "keep": list(self.keep),
                "delete": [_to_json(deletion) for deletion in self.deletions],
            },
        )

    @classmethod
    def read(cls, path: str | Path) -> RetentionPlan:
        """Reads what :meth:`write` wrote.

        Raises:
            InputError: if it is no plan.
        """
        value = read_json(Path(path))
        try:
            if value["format"] != "gossamer retention plan" or value["version"] != VERSION:
                raise ValueError(f"format {value['format']!r}, version {value['version']!r}")
            bound = value["max_latency"]
            return cls(
                root=Path(value["root"]),
                keep=tuple(map(str, value["keep"])),
                deletions=tuple(_from_json(item) for item in value["delete"]),
                cost=float(value["cost"]),
                cost_of_keeping=float(value["cost_of_keeping"]),
                costs=Costs(**value["costs"]),
                max_latency={k: math.inf if v is None else float(v) for k, v in bound.items()}
                if isinstance(bound, Mapping)
                else math.inf if bound is None else float(bound),
                bytes=int(value["bytes"]),
                compared=int(value["compared"]),
                refused=tuple((str(a), str(b), str(c)) for a, b, c in value["refused"]),
            )  # fmt: skip
        except (
            AttributeError, KeyError, TypeError, ValueError, OverflowError, ArithmeticError,
            pa.ArrowException, OSError,
        ) as error:  # fmt: skip
            raise InputError(f"{path} is not a retention plan: {first_line(error)}") from error


def plan_retention(
    graph: ContainmentGraph,
    *,
    costs: Costs | None = None,
    accesses: Mapping[str, float] | None = None,
    maintenance: Mapping[str, float] | None = None,
    max_latency: float | Mapping[str, float] = math.inf,
    lineage: Mapping[str, tuple[str, Sequence[Condition]]] | None = None,
    solve: Callable[[Problem], Retention] = exact,
) -> RetentionPlan:
    """The cheapest plan, every deletion of which was verified on all rows.

    The plan is solved as if every edge could be used; the edges it uses are compared in full, what
    cannot be rebuilt is taken out, what its recipe takes is added to its cost, and the plan is
    solved again until it rests on verified edges alone. So it is the best over all edges, and only
    few are compared.

    Args:
        graph: from :func:`gossamer.data.containment.containment_graph`.
        costs: prices.
        accesses: of each table in a period. Default: 1 each.
        maintenance: cost a period of keeping each table.
        max_latency: seconds that a rebuild may take; one number or one for each table.
        lineage: (parent, conditions) from which a child is known to have been made.
        solve: finds the choice; :func:`gossamer.data.retention.greedy` is faster and dearer.

    Raises:
        InputError: if a table is named that the lake lacks, or one changes meanwhile.
    """
    lake, prices = graph.lake, costs or Costs()
    known = {table.name for table in lake.tables}
    named = {**(accesses or {}), **(maintenance or {}), **(lineage or {})}
    if isinstance(max_latency, Mapping):
        named |= dict(max_latency)
    for name in named:
        if name not in known:
            raise InputError(f"{lake.root} has no table {name}")
    for what, numbers in (("accesses", accesses), ("maintenance", maintenance)):
        for name, number in (numbers or {}).items():
            if not math.isfinite(number) or number < 0:
                raise InputError(f"{what} of {name} are {number}; give a number of 0 or more")
    if not isinstance(max_latency, Mapping) and not max_latency >= 0:
        raise InputError(f"a latency of {max_latency} s cannot be met; give 0 or more")
    sizes = {table.name: float(table.bytes) for table in lake.tables}
    edges = graph.pairs()
    recipes: dict[tuple[str, str], tuple[Exact | None, Recipe]] = {}
    refused: list[tuple[str, str, str]] = []
    stored: dict[tuple[str, str], float] = {}
    while True:
        given = problem(
            sizes, sorted(edges), costs=prices, accesses=accesses, maintenance=maintenance,
            max_latency=max_latency, stored=stored,
        )  # fmt: skip
        choice = solve(given)
        pending = sorted((p, c) for c, p in choice.rebuilt.items() if (p, c) not in recipes)
        if not pending:
            break
        for parent, child in pending:
            told = (lineage or {}).get(child)
            compared, recipe, reason = find_recipe(
                graph.engine, lake, lake.index(child), lake.index(parent),
                lineage=told[1] if told is not None and told[0] == parent else None,
            )  # fmt: skip
            if recipe is None:
                edges.discard((parent, child))
                refused.append((parent, child, reason))
            else:
                recipes[parent, child] = compared, recipe
                stored[parent, child] = recipe.bytes
    lake.check_unchanged()
    return _plan(
        lake, given, choice, prices, max_latency,
        {pair: recipe for pair, (_, recipe) in recipes.items()},
        len(recipes) + len(refused), refused,
    )  # fmt: skip


def _plan(
    lake: Lake,
    given: Problem,
    choice: Retention,
    costs: Costs,
    max_latency: float | Mapping[str, float],
    recipes: Mapping[tuple[str, str], Recipe],
    compared: int,
    refused: Sequence[tuple[str, str, str]],
) -> RetentionPlan:
    needed = {*choice.rebuilt, *choice.rebuilt.values()}
    digests = {name: lake[name].digest() for name in sorted(needed)}
    deletions = []
    for child, parent in sorted(choice.rebuilt.items()):
        table = lake[child]
        schema = table.schema
        if table.format == "csv":
            schema = pa.schema(
                [pa.field(c.name, pa.string()) for c in table.columns],
                {"separator": read_header(table.path)[0]},
            )
        deletion = Deletion(
            table=child,
            parent=parent,
            recipe=recipes[parent, child],
            rows=table.rows,
            bytes=table.bytes,
            seconds=latency(lake[parent].bytes, table.bytes, costs),
            cost=given.rebuild[parent, child],
            format=table.format,
            schema=schema,
            digest=digests[child],
            parent_digest=digests[parent],
        )
        deletions.append(deletion)
    lake.check_unchanged()
    return RetentionPlan(
        lake.root,
        tuple(t.name for t in lake.tables if t.name not in choice.rebuilt),
        tuple(deletions),
        choice.cost,
        sum(given.keep.values()),
        costs,
        max_latency,
        lake.bytes,
        compared,
        tuple(refused),
    )


def _check(root: Path, name: str, found: str | None, wanted: str) -> None:
    if found != wanted:
        raise InputError(
            f"{root / name} is not what it was when the plan was made; make a new plan"
        )


def _rebuild_sql(deletion: Deletion, parent: Table) -> str:
    """The child's columns from the parent's, in types that can be cast to the child's."""
    outputs: dict[str, str] = {}
    names = deletion.schema.names
    for number, entry in enumerate(deletion.schema):
        column = parent.column(entry.name)
        at = place(column.parts)
        textual = pa.types.is_string(entry.type) or pa.types.is_large_string(entry.type)
        if column.kind == "null" or pa.types.is_null(entry.type):
            at = "NULL"
        elif deletion.format == "csv" or (textual and column.kind != "text"):
            at = place(column.spelled) if column.spelled else f"CAST({at} AS VARCHAR)"
        outputs[f"o{number}"] = at
    listed = ", ".join(outputs)
    rows = relation(parent, outputs)
    match deletion.recipe.kind:
        case "projection":
            return f"SELECT {listed} FROM ({rows}) b"
        case "distinct":
            # Equal values may be spelled differently; one spelling of each row comes back.
            keys = [f"c{parent.columns.index(parent.column(name))}" for name in names]
            firsts = ", ".join(f"first({o} ORDER BY r) AS {o}" for o in outputs)
            return f"SELECT {firsts} FROM ({rows}) b GROUP BY {', '.join(keys)}"
        case "filter":
            where = " AND ".join(
                c.sql(f"b.c{parent.columns.index(parent.column(c.column))}")
                for c in deletion.recipe.conditions
            )
            return f"SELECT {listed} FROM ({rows}) b WHERE {where or 'true'}"
        case "rows":
            return f"SELECT {listed} FROM ({rows}) b WHERE r IN (SELECT row FROM chosen)"


def _write(found: pa.RecordBatchReader, deletion: Deletion, out: Path) -> Path:
    count = 0

    def batches() -> Any:
        nonlocal count
        for batch in found:
            count += batch.num_rows
            named = pa.Table.from_batches([batch]).rename_columns(deletion.schema.names)
            yield from named.cast(deletion.schema).to_batches()

    def complete() -> None:
        if count != deletion.rows:
            raise InputError(
                f"{deletion.table} came back with {count:,} rows instead of {deletion.rows:,}; "
                "nothing was written"
            )

    if out.exists():
        raise InputError(f"{out} is already there; choose another place")
    try:
        if deletion.format == "delta":
            try:
                import deltalake
            except ImportError as error:
                raise MissingExtra("deltalake", "lake") from error
            with whole_folder(out) as partial:
                reader = pa.RecordBatchReader.from_batches(deletion.schema, batches())
                deltalake.write_deltalake(str(partial), reader)
                complete()
            return out
        with whole_file(out) as partial:
            if deletion.format == "csv":
                import pyarrow.csv as pc

                separator = (deletion.schema.metadata or {}).get(b"separator", b",").decode()
                options = pc.WriteOptions(delimiter=separator, quoting_style="needed")
                writer: Any = pc.CSVWriter(partial, deletion.schema, write_options=options)
            else:
                import pyarrow.parquet as pq

                writer = pq.ParquetWriter(partial, deletion.schema, compression="zstd")
            with writer:
                for batch in batches():
                    writer.write_batch(batch)
            complete()
    except pa.ArrowException as error:
        raise InputError(f"{deletion.table} cannot be rebuilt: {first_line(error)}") from error
    return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _to_json(deletion: Deletion) -> dict[str, Any]:
    recipe = deletion.recipe
    listed = None if recipe.rows is None else base64.b64encode(encode_rows(recipe.rows)).decode()
    return {
        "table": deletion.table,
        "parent": deletion.parent,
        "recipe": {
            "kind": recipe.kind,
            "text": str(recipe),
            "conditions": [c.to_json() for c in recipe.conditions],
            "rows": listed,
            "bytes": recipe.bytes,
        },
        "rows": deletion.rows,
        "bytes": deletion.bytes,
        "seconds": deletion.seconds,
        "cost": deletion.cost,
        "format": deletion.format,
        "schema": base64.b64encode(deletion.schema.serialize().to_pybytes()).decode(),
        "sha256": deletion.digest,
        "parent_sha256": deletion.parent_digest,
    }


def _from_json(value: Mapping[str, Any]) -> Deletion:
    told = value["recipe"]
    if told["kind"] not in ("projection", "distinct", "filter", "rows"):
        raise ValueError(f"unknown recipe {told['kind']!r}")
    if value["format"] not in ("parquet", "csv", "delta"):
        raise ValueError(f"unknown format {value['format']!r}")
    rows: np.ndarray | None = None
    if told["rows"] is not None:
        rows = decode_rows(base64.b64decode(told["rows"], validate=True))
    if (told["kind"] == "rows") != (rows is not None):
        raise ValueError("a list of rows is missing or not asked for")
    return Deletion(
        table=str(value["table"]),
        parent=str(value["parent"]),
        recipe=Recipe(
            told["kind"], tuple(Condition.from_json(c) for c in told["conditions"]), rows,
            int(told["bytes"]),
        ),
        rows=int(value["rows"]),
        bytes=int(value["bytes"]),
        seconds=float(value["seconds"]),
        cost=float(value["cost"]),
        format=value["format"],
        schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(value["schema"], validate=True))),
        digest=str(value["sha256"]),
        parent_digest=str(value["parent_sha256"]),
    )  # fmt: skip
