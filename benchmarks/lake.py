"""Containment of tables: the filters against brute force and plain SQL anti joins, as lakes grow.

Lakes of Parquet tables grow in rows, in columns and in tables; a lake of the real CSV tables in
``GOSSAMER_DATA/tables`` is measured too, alone and with tables derived from it. Of each: edges,
precision and recall against brute force, seconds (median of interleaved runs), bytes read (counted
from metadata).

    python benchmarks/lake.py --out benchmarks/results/lake.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gossamer.core.experiment import about
from gossamer.core.files import read_json, write_json
from gossamer.data.containment import Pair, containment_graph
from gossamer.data.containment_baselines import brute_force, equal_files, equal_rows
from gossamer.data.deletion import plan_retention
from gossamer.data.lake import read_lake
from gossamer.data.lake_engine import open_engine
from gossamer.data.retention import Costs

FREE = Costs(storage=1.0, read=0.0, write=0.0, unit=1.0)


def grown(folder: Path, *, tables: int, rows: int, columns: int, seed: int = 0) -> Path:
    """Families of ten: a base, filters, samples and projections of it, and noisy ones."""
    g = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    base = pa.table({})
    for number in range(tables):
        if number % 10 == 0:
            family = number // 10
            base = pa.table(
                {f"f{family}c{c}": np.round(g.normal(size=rows), 3) for c in range(columns)}
            )
            made = base
        elif number % 10 < 4:
            made = base.take(pa.array(np.sort(g.choice(rows, rows // 3, replace=False))))
        elif number % 10 < 7:
            some = sorted(g.choice(columns, max(1, columns // 2), replace=False).tolist())
            made = base.select(some)
        else:
            at = np.arange(rows)
            hit = g.random(rows) < 0.05
            at[hit] = g.integers(0, rows, hit.sum())
            made = base.set_column(0, base.column_names[0], base.column(0).take(pa.array(at)))
        pq.write_table(made, folder / f"t{number:04d}.parquet")
    return folder


def plain_sql(folder: Path) -> tuple[set[Pair], int]:
    """What one would write: for every two tables whose columns fit, one EXCEPT in DuckDB."""
    pairs: set[Pair] = set()
    read = 0
    with duckdb.connect(config={"threads": 1}) as connection:
        files = sorted(folder.glob("*.parquet"))
        names = {file: pq.read_schema(file).names for file in files}
        for parent in files:
            for child in files:
                if parent == child or not set(names[child]) <= set(names[parent]):
                    continue
                listed = ", ".join(f'"{name}"' for name in names[child])
                read += parent.stat().st_size + child.stat().st_size
                left = connection.execute(
                    f"SELECT count(*) FROM (SELECT {listed} FROM '{child}' EXCEPT "
                    f"SELECT {listed} FROM '{parent}')"
                ).fetchall()
                if left[0][0] == 0:
                    pairs.add((parent.name, child.name))
    return pairs, read


def contest(folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """All contenders on one lake, in turns."""

    def ours(**options: Any) -> tuple[set[Pair], int]:
        graph = containment_graph(read_lake(folder), **options)
        graph.engine.close()
        return graph.pairs(), sum(stage.bytes_read for stage in graph.stages)

    def brute() -> tuple[set[Pair], int]:
        lake = read_lake(folder)
        engine = open_engine("duckdb", lake)
        found = brute_force(lake, engine)
        engine.close()
        return set(found.pairs), found.bytes_read

    def hashed() -> tuple[set[Pair], int]:
        lake = read_lake(folder)
        engine = open_engine("duckdb", lake)
        found = equal_rows(lake, engine)
        engine.close()
        return set(found.pairs), found.bytes_read

    def files() -> tuple[set[Pair], int]:
        found = equal_files(read_lake(folder))
        return set(found.pairs), found.bytes_read

    contenders: dict[str, Callable[[], tuple[set[Pair], int]]] = {
        "brute force": brute,
        "r2d2": ours,
        "r2d2 + exact": lambda: ours(verify=True),
        "equal rows": hashed,
        "equal files": files,
    }
    contenders["SQL anti join"] = lambda: plain_sql(folder)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, tuple[set[Pair], int]] = {}
    for _ in range(repeats):
        for name, work in contenders.items():
            began = time.perf_counter()
            found[name] = work()
            seconds[name].append(time.perf_counter() - began)
    truth = found["brute force"][0]
    size = read_lake(folder).bytes
    for name, (pairs, read) in found.items():
        right = len(pairs & truth)
        ratios = [a / b for a, b in zip(seconds[name], seconds["brute force"], strict=True)]
        yield {
            "contender": name, "lake_bytes": size, "containments": len(truth),
            "precision": right / len(pairs) if pairs else 1.0,
            "recall": right / len(truth) if truth else 1.0,
            "seconds": statistics.median(seconds[name]),
            "of_brute_force": statistics.median(ratios),
            "of_brute_force_range": [min(ratios), max(ratios)],
            "bytes_read": read,
        }  # fmt: skip


def real(folder: Path, source: Path, count: int) -> set[Pair]:
    """The real tables, and a filter and a projection of some; returns what is known of these."""
    import csv

    folder.mkdir(parents=True)
    known: set[Pair] = set()
    g = np.random.default_rng(0)
    for number, file in enumerate(sorted(source.glob("*__*.csv"))):
        shutil.copyfile(file, folder / file.name)
        if number % 6 or number // 6 >= count:
            continue
        with open(file, newline="", encoding="utf-8") as opened:
            header, *rows = list(csv.reader(opened))
        for kind in ("rows", "columns"):
            name = f"{file.stem}.{kind}.csv"
            at = list(range(len(header)))
            kept = rows
            if kind == "rows":
                kept = [rows[i] for i in np.sort(g.choice(len(rows), -(-len(rows) // 2), False))]
            else:
                at = at[: max(1, len(at) // 2)]
            with open(folder / name, "w", newline="", encoding="utf-8") as out:
                writer = csv.writer(out)
                writer.writerow([header[i] for i in at])
                writer.writerows([[row[i] for i in at] for row in kept])
            known.add((file.name, name))
    return known


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("all", "grown", "real"), default="all")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.part == "real" and options.out.exists():
        kept = read_json(options.out)["rows"]
        rows = [row for row in kept if row["grows"] != "real"]
    settings = [
        *({"grows": "rows", "tables": 20, "rows": r, "columns": 8} for r in (2000, 20000, 90000)),
        *({"grows": "columns", "tables": 20, "rows": 10_000, "columns": c} for c in (4, 16, 48)),
        *({"grows": "tables", "tables": t, "rows": 10_000, "columns": 8} for t in (20, 60, 120)),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for number, setting in enumerate(settings if options.part != "real" else ()):
            shape = {k: v for k, v in setting.items() if k != "grows"}
            folder = grown(Path(place) / f"{number}", **shape)
            for row in contest(folder, options.repeats):
                rows.append({**setting, **row})
                print(rows[-1], flush=True)
            shutil.rmtree(folder)
            save(options.out, rows)
        source = Path(os.environ.get("GOSSAMER_DATA", "../shared/data")) / "tables"
        if source.is_dir() and options.part != "grown":
            rows += real_rows(Path(place) / "real", source)
            save(options.out, rows)


def real_rows(folder: Path, source: Path) -> Iterator[dict[str, Any]]:
    """The lake of real tables, read once (CSV is staged), its edges and plan."""
    known = real(folder, source, 40)
    sources = {file.name for file in source.iterdir()}
    began = time.perf_counter()
    lake = read_lake(folder)
    about_it = {
        "grows": "real", "tables": len(lake.tables), "lake_bytes": lake.bytes,
        "read_seconds": time.perf_counter() - began, "skipped": [vars(s) for s in lake.skipped],
    }  # fmt: skip
    engine = open_engine("duckdb", lake)
    began = time.perf_counter()
    found = brute_force(lake, engine)
    seconds = time.perf_counter() - began
    truth = set(found.pairs)
    row = {"contender": "brute force", "seconds": seconds, "bytes_read": found.bytes_read}
    yield {**about_it, **row, "containments": len(truth)}
    for name, verify in (("r2d2", False), ("r2d2 + exact", True)):
        began = time.perf_counter()
        graph = containment_graph(lake, verify=verify)
        seconds = time.perf_counter() - began
        pairs = graph.pairs()
        yield {
            **about_it, "contender": name, "seconds": seconds,
            "bytes_read": sum(stage.bytes_read for stage in graph.stages),
            "stages": [vars(stage) for stage in graph.stages],
            "precision": len(pairs & truth) / max(1, len(pairs)),
            "recall": len(pairs & truth) / len(truth),
            "made": len(known), "made_found": len(pairs & known),
            "among_sources": sorted(pair for pair in pairs if sources.issuperset(pair)),
        }  # fmt: skip
        if verify:
            plan = plan_retention(graph, costs=FREE)
            yield {
                **about_it, "contender": "plan", "deleted": len(plan.deletions),
                "saved_bytes": plan.saved_bytes,
                "refused": [list(item) for item in plan.refused],
            }  # fmt: skip


def save(place: Path, rows: list[dict[str, Any]]) -> None:
    """Writes what there is; an interrupted run keeps what it measured."""
    write_json(place, {"about": about(), "rows": rows})


if __name__ == "__main__":
    main()
