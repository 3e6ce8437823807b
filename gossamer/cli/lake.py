"""Commands that find what a data lake holds twice, and bring back what was deleted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from gossamer.cli.data import data
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError


@data.command
def dedupe(
    lake: Path,
    *,
    out: Path | None = None,
    engine: Literal["duckdb", "spark"] = "duckdb",
    rows: int = 90,
    columns: int | None = None,
    max_latency: float = math.inf,
    accesses: Path | None = None,
    costs: Path | None = None,
    lineage: Path | None = None,
    seed: int = 0,
    threads: int = 1,
    json_: Json = False,
) -> None:
    """Tell which tables can go, as others hold all they hold, and how each comes back.

    Nothing is deleted. Every table named was compared with the one that it is rebuilt from, row for
    row. `gossamer data rebuild` brings one back.

    Example: gossamer data dedupe lake --out plan.json

    Parameters
    ----------
    lake
        A folder of Parquet, CSV and Delta tables.
    out
        Write the plan here (JSON).
    engine
        What compares rows; the result is the same.
    rows
        Sampled from each table before anything is compared in full.
    columns
        Looked at in the sample. Default: all.
    max_latency
        Seconds that a rebuild may take.
    accesses
        JSON: how often each table is read in a period, by name. Default: once.
    costs
        JSON: prices: storage, read, write, read_seconds, write_seconds, unit.
    lineage
        JSON: by table, {"parent": NAME, "where": [{"column", "low", "high", "values", "nulls"}]}.
    seed
        Of the sample.
    threads
        Of the engine.
    json_
        Print JSON.
    """
    from gossamer.core.files import read_json
    from gossamer.data.containment import containment_graph
    from gossamer.data.deletion import plan_retention
    from gossamer.data.lake import read_lake

    if out is not None and out.resolve().is_relative_to(lake.resolve()):
        raise InputError(f"{out} lies in the lake; write the plan elsewhere")
    prices = _costs(read_json(costs), costs) if costs else None
    read = _numbers(read_json(accesses), accesses) if accesses else None
    told = _lineage(read_json(lineage), lineage) if lineage else None
    found = read_lake(lake)
    graph = containment_graph(
        found, engine=engine, rows=rows, columns=columns, seed=seed, threads=threads
    )
    try:
        plan = plan_retention(
            graph, costs=prices, accesses=read, max_latency=max_latency, lineage=told
        )
    finally:
        graph.engine.close()
    if out is not None:
        plan.write(out)
    report: dict[str, Any] = {
        "lake": str(lake),
        "tables": len(found.tables),
        "bytes": found.bytes,
        "skipped": [{"table": s.name, "reason": s.reason} for s in found.skipped],
        "stages": [vars(stage) for stage in graph.stages],
        "contained": [{"parent": e.parent, "child": e.child} for e in graph.edges],
        "delete": [
            {
                "table": d.table, "parent": d.parent, "recipe": str(d.recipe), "bytes": d.bytes,
                "recipe_bytes": d.recipe.bytes, "rows": d.rows, "seconds": d.seconds,
            }
            for d in plan.deletions
        ],
        "refused": [{"parent": p, "child": c, "reason": why} for p, c, why in plan.refused],
        "saved_bytes": plan.saved_bytes,
        "cost": plan.cost,
        "cost_of_keeping": plan.cost_of_keeping,
        "plan": None if out is None else str(out),
    }  # fmt: skip
    if json_:
        print_json(report)
        return
    _show(report)


@data.command
def rebuild(
    plan: Path, table: str, *, out: Path, lake: Path | None = None, json_: Json = False
) -> None:
    """Write a table again that a plan of `gossamer data dedupe` let go.

    Example: gossamer data rebuild plan.json sales/2023.parquet --out 2023.parquet

    Parameters
    ----------
    plan
        Written by `gossamer data dedupe --out`.
    table
        Its name in the plan.
    out
        The file to write, in the format the table had (a folder for Delta).
    lake
        Where the lake is now. Default: where it was.
    json_
        Print JSON.
    """
    from gossamer.data.deletion import RetentionPlan

    read = RetentionPlan.read(plan)
    deletion = read.deletion(table)
    place = read.rebuild(table, out, root=lake)
    if json_:
        print_json(
            {"table": table, "parent": deletion.parent, "rows": deletion.rows, "out": str(place)}
        )
        return
    out_console().print(
        f"{place}: {deletion.rows:,} rows, {deletion.recipe} of {deletion.parent}", soft_wrap=True
    )


def _costs(value: Any, path: Path) -> Any:
    from gossamer.data.retention import Costs

    numbers = _numbers(value, path)
    if unknown := sorted(set(numbers) - set(vars(Costs()))):
        raise InputError(f"{path} names {unknown[0]!r}; choose from {', '.join(vars(Costs()))}")
    return Costs(**numbers)


def _numbers(value: Any, path: Path) -> dict[str, float]:
    if not isinstance(value, dict) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in value.values()
    ):
        raise InputError(f"{path} must hold one JSON object of numbers by name")
    return {name: float(number) for name, number in value.items()}


def _lineage(value: Any, path: Path) -> dict[str, Any]:
    from gossamer.data.reconstruction import Condition

    try:
        return {
            str(child): (
                str(told["parent"]), tuple(Condition.from_json(c) for c in told["where"])
            )
            for child, told in value.items()
        }  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f'{path} must hold {{table: {{"parent": name, "where": [{{"column": name, ...}}]}}}}'
        ) from error


def _show(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = out_console()
    for skip in report["skipped"]:
        console.print(escape(f"skipped {skip['table']}: {skip['reason']}"), soft_wrap=True)
    shown = Table(title=f"{report['tables']} tables, {_size(report['bytes'])}")
    for name in ("filter", "pairs left", "bytes read", "seconds"):
        shown.add_column(name, justify="left" if name == "filter" else "right")
    for stage in report["stages"]:
        shown.add_row(
            stage["name"], f"{stage['edges']:,}", _size(stage["bytes_read"]),
            f"{stage['seconds']:.2f}",
        )  # fmt: skip
    console.print(shown)
    if not report["delete"]:
        console.print("Nothing can go: no table's rows are all in another one that can be kept.")
        return
    shown = Table(title="Can go (nothing was deleted)")
    for name in ("table", "size", "comes back as", "of", "in"):
        shown.add_column(name, justify="right" if name in ("size", "in") else "left")
    for item in report["delete"]:
        shown.add_row(
            escape(item["table"]), _size(item["bytes"]), escape(item["recipe"]),
            escape(item["parent"]), f"{item['seconds']:.2f} s",
        )  # fmt: skip
    console.print(shown)
    share = 100 * report["saved_bytes"] / report["bytes"]
    console.print(
        f"saves {_size(report['saved_bytes'])} ({share:.1f} %), costs {report['cost']:.3g} instead "
        f"of {report['cost_of_keeping']:.3g}",
        soft_wrap=True,
    )
    if report["plan"]:
        console.print(escape(f"plan written to {report['plan']}"), soft_wrap=True)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
