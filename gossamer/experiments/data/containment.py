"""A lake of derived tables: edges left, false and missed after every filter, and what a plan saves.

Three hundred Parquet tables are made from twelve (those of scikit-learn, statistics of its texts,
and larger generated ones) by filters, projections, samples, shuffles, unions, renamed columns and
noise in 5 % of the cells. The truth is that of brute force: every pair, exact anti joins.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.data.containment import ContainmentGraph, Pair, containment_graph
from gossamer.data.containment_baselines import (
    Found,
    brute_force,
    equal_files,
    equal_rows,
    k_means,
    lsh_ensemble,
)
from gossamer.data.deletion import RetentionPlan, plan_retention
from gossamer.data.lake import Lake, read_lake
from gossamer.data.lake_engine import open_engine
from gossamer.data.retention import Costs, exact, greedy

PRICES = Costs(storage=1.0, read=0.02, write=0.03, read_seconds=0.01, write_seconds=0.02, unit=1e6)
MAX_LATENCY = 0.02
REPEATS = 3


# The lake


def bases(seed: int, scale: float) -> dict[str, pa.Table]:
    """Twelve tables; the generated ones grow with the scale."""
    from sklearn import datasets

    found: dict[str, pa.Table] = {}
    texts: list[str] = []
    for name in ("iris", "wine", "diabetes", "breast_cancer", "linnerud"):
        bunch: Any = getattr(datasets, f"load_{name}")()
        columns = dict(zip(bunch.feature_names, bunch.data.T, strict=True))
        target = bunch.target if bunch.target.ndim == 1 else bunch.target[:, 0]
        found[name] = pa.table({**columns, "target": target, "number": np.arange(len(target))})
        texts += bunch.DESCR.splitlines()
    digits: Any = datasets.load_digits()
    names = [f"pixel {i}" for i in range(16, 32)]
    pixels = dict(zip(names, digits.data[:, 16:32].T.astype(np.int16), strict=True))
    found["digits"] = pa.table({**pixels, "digit": digits.target})
    lines = [line for line in texts if line.strip()]
    found["text"] = pa.table(
        {
            "line": np.arange(len(lines)),
            "first": [line.split()[0] for line in lines],
            "letters": [len(line) for line in lines],
            "words": [len(line.split()) for line in lines],
            "digits": [len(re.findall(r"\d", line)) for line in lines],
        }
    )
    g = np.random.default_rng([seed, 1])
    n = round(20_640 * scale)
    found["housing"] = pa.table(
        {
            "income": np.round(g.gamma(3, 1.3, n), 4),
            "age": g.integers(1, 53, n),
            "rooms": np.round(g.gamma(20, 0.27, n), 6),
            "people": g.integers(3, 5000, n),
            "latitude": np.round(g.uniform(32.5, 42, n), 2),
            "longitude": np.round(g.uniform(-124.3, -114.3, n), 2),
            "value": np.round(g.lognormal(0.6, 0.5, n), 3),
        }
    )
    n = round(30_000 * scale)
    found["sales"] = pa.table(
        {
            "order": np.arange(n),
            "customer": g.zipf(1.5, n) % 4000,
            "product": [f"P{v:05d}" for v in g.integers(0, 3000, n)],
            "country": g.choice(["de", "fr", "it", "us", "in"], n).tolist(),
            "amount": np.round(g.gamma(2, 30, n), 2),
            "day": pa.array(g.integers(18_000, 19_000, n), pa.int32()).cast(pa.date32()),
        }
    )
    found["sensors"] = pa.table(
        {
            "time": pa.array(np.sort(g.integers(0, 10**9, n)) * 1000, pa.timestamp("us")),
            "sensor": g.integers(0, 40, n),
            "value": pa.array(g.normal(size=n), mask=g.random(n) < 0.02),
            "good": g.random(n) < 0.9,
        }
    )
    found["events"] = pa.table(
        {
            "user": g.integers(0, 900, n),
            "kind": pa.array(g.choice(["view", "click", "buy"], n), mask=g.random(n) < 0.05),
            "page": [f"/p/{v}" for v in g.zipf(1.6, n) % 2000],
            "milliseconds": g.integers(1, 10**5, n),
        }
    )
    found["trips"] = pa.table(
        {
            "start": pa.array(g.integers(0, 10**7, n), pa.timestamp("s")),
            "from": g.integers(1, 266, n),
            "to": g.integers(1, 266, n),
            "miles": np.round(g.gamma(1.5, 2, n), 2),
            "fare": np.round(g.gamma(3, 5, n), 2),
            "riders": g.integers(1, 6, n),
        }
    )
    return found


def derive(base: pa.Table, g: np.random.Generator) -> tuple[pa.Table, bool]:
    """A table made from another, and whether it is contained in it by construction."""
    names, n = base.column_names, base.num_rows
    some = sorted(g.choice(len(names), size=g.integers(1, len(names) + 1), replace=False).tolist())
    match int(g.integers(7)):
        case 0:  # a filter: a range of one column
            keys = [(names[g.integers(len(names))], "ascending")]
            order = pc.call_function("sort_indices", [base], pc.SortOptions(keys))
            low = int(g.integers(0, max(1, n - n // 4)))
            keep = order.slice(low, int(g.integers(1, max(2, n // 2))))
            return base.take(pa.array(np.sort(keep.to_numpy()))), True
        case 1:
            return base.select([names[i] for i in some]), True
        case 2:
            rows = np.sort(g.choice(n, size=max(1, n // int(g.integers(2, 6))), replace=False))
            return base.take(pa.array(rows)), True
        case 3:
            return base.take(pa.array(g.permutation(n))), True
        case 4:  # a union of two samples, with the rows of both
            rows = g.choice(n, size=max(2, n // 4), replace=True)
            return base.select([names[i] for i in some]).take(pa.array(rows)), True
        case 5:
            return base.rename_columns([f"{name}_{g.integers(9)}" for name in names]), False
    # 5 % of the cells take the value of another row.
    columns = []
    for column in base.columns:
        at = np.arange(n)
        hit = np.flatnonzero(g.random(n) < 0.05)
        at[hit] = g.integers(0, n, len(hit))
        columns.append(column.take(pa.array(at)))
    noisy = pa.table(dict(zip(names, columns, strict=True)))
    return noisy.select([names[i] for i in some]), False


def write_lake(folder: Path, *, tables: int, seed: int, scale: float) -> set[Pair]:
    """Writes a lake; returns the pairs that are containments by construction."""
    g = np.random.default_rng([seed, 2])
    made: dict[str, pa.Table] = {}
    truth: set[Pair] = set()
    for name, table in bases(seed, scale).items():
        made[f"{name}.parquet"] = table
    first = list(made)
    families = {name: [name] for name in first}
    for number in range(len(first), tables):
        family = families[first[number % len(first)]]
        # Also from what was derived: chains of filters of projections.
        parent = family[int(g.integers(len(family)))]
        table, contained = derive(made[parent], g)
        name = f"{first[number % len(first)].removesuffix('.parquet')}_{number:04d}.parquet"
        made[name] = table
        family.append(name)
        if contained:
            truth.add((parent, name))
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in made.items():
        pq.write_table(table, folder / name, compression="zstd")
    return truth


# Measured


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the seconds it took."""
    began = time.perf_counter()
    done = work()
    return done, time.perf_counter() - began


def scores(pairs: set[Pair] | frozenset[Pair], truth: frozenset[Pair]) -> dict[str, Any]:
    """Edges left, false and missed."""
    right = len(pairs & truth)
    return {
        "edges": len(pairs),
        "false": len(pairs - truth),
        "missed": len(truth - pairs),
        "false_percent": 100.0 * (len(pairs) - right) / max(1, len(pairs)),
        "precision": right / len(pairs) if pairs else 1.0,
        "recall": right / len(truth) if truth else 1.0,
    }


def measure(seed: int, *, tables: int, scale: float, repeats: int) -> Iterator[Row]:
    """One lake: our filters one by one, ablations, baselines, plans."""
    with tempfile.TemporaryDirectory(prefix="gossamer-lake-") as place:
        folder = Path(place) / "lake"
        built = write_lake(folder, tables=tables, seed=seed, scale=scale)
        lake = read_lake(folder)
        engine = open_engine("duckdb", lake)
        found, brute_seconds = timed(lambda: brute_force(lake, engine))
        truth = found.pairs
        about = {"seed": seed, "tables": tables, "lake_bytes": lake.bytes}

        def row(contender: str, pairs: Any, seconds: float, read: int, **more: Any) -> Row:
            return {
                "contender": contender, **about, **scores(pairs, truth), "seconds": seconds,
                "seconds_percent": 100.0 * seconds / brute_seconds, "bytes_read": read,
                "bytes_percent": 100.0 * read / lake.bytes, **more,
            }  # fmt: skip

        lacking = len(built - truth)
        yield row("brute force", truth, brute_seconds, found.bytes_read, unbuilt=lacking)
        graphs: list[ContainmentGraph] = []
        seconds = []
        for _ in range(repeats):
            graph, took = timed(lambda: containment_graph(read_lake(folder), seed=seed))
            graphs.append(graph)
            seconds.append(took)
        graph = graphs[0]
        yield from stages(graph, row)
        total = sum(stage.bytes_read for stage in graph.stages)
        yield row("r2d2", graph.pairs(), statistics.median(seconds), total)
        paper = containment_graph(lake, seed=seed, rows=10, columns=4)
        yield row(
            "r2d2, 10 rows, 4 columns", paper.pairs(), sum(s.seconds for s in paper.stages),
            sum(s.bytes_read for s in paper.stages),
        )  # fmt: skip
        ablations: dict[str, dict[str, Any]] = {
            "schemas + exact": {"min_max": False, "content": False, "verify": True},
            "schemas + min-max + exact": {"content": False, "verify": True},
            "schemas + sampled rows": {"min_max": False},
            "r2d2 + exact": {"verify": True},
        }
        for name, options in ablations.items():
            other, took = timed(lambda o=options: containment_graph(lake, seed=seed, **o))
            yield row(name, other.pairs(), took, sum(s.bytes_read for s in other.stages))
        baselines: dict[str, Callable[[], Found]] = {
            "k-means on schemas + exact": lambda: k_means(lake, engine, clusters=12, seed=seed),
            "LSH ensemble on columns": lambda: lsh_ensemble(lake, engine, seed=seed),
            "equal files": lambda: equal_files(lake),
            "equal rows": lambda: equal_rows(lake, engine),
        }
        for name, work in baselines.items():
            other, took = timed(work)
            yield row(name, other.pairs, took, other.bytes_read)
        # A control that needs nothing of the paper: as many pairs, drawn among those that fit.
        g = np.random.default_rng([seed, 3])
        fits = sorted(graph.clusters.edges)
        picked = g.choice(len(fits), size=min(len(fits), len(graph.edges)), replace=False)
        yield row("random pairs that fit", {fits[i] for i in picked}, 0.0, 0)
        yield from plans(graph, seed, Path(place) / "back", about)


def stages(graph: ContainmentGraph, row: Callable[..., Row]) -> Iterator[Row]:
    """Each filter of one run, with what it and those before it read."""
    dropped: dict[str, set[Pair]] = {}
    for pruned in graph.pruned:
        dropped.setdefault(pruned.stage, set()).add((pruned.parent, pruned.child))
    pairs = set(graph.clusters.edges)
    read, seconds = 0, 0.0
    for stage in graph.stages:
        for name in ("types", "min-max") if stage.name == "min-max" else (stage.name,):
            pairs -= dropped.get(name, set())
        read += stage.bytes_read
        seconds += stage.seconds
        yield row(f"after {stage.name}", pairs, seconds, read, stage=stage.name)


def plans(graph: ContainmentGraph, seed: int, folder: Path, about: dict[str, Any]) -> Iterator[Row]:
    """Plans of both solvers; every table that the best one deletes is rebuilt and compared."""
    g = np.random.default_rng([seed, 4])
    accesses = {table.name: float(g.integers(0, 20)) for table in graph.lake.tables}
    for name, solve in (("exact plan", exact), ("greedy plan", greedy)):
        plan, took = timed(
            lambda s=solve: plan_retention(
                graph, costs=PRICES, accesses=accesses, max_latency=MAX_LATENCY, solve=s
            )
        )
        kinds = [d.recipe.kind for d in plan.deletions]
        more: dict[str, Any] = {}
        if solve is exact:
            more = {"not_rebuilt": rebuild_all(plan, graph.lake, folder)}
        yield {
            "contender": name, **about, "cost": plan.cost, "seconds": took,
            "cost_of_keeping": plan.cost_of_keeping, "deleted": len(plan.deletions),
            "saved_percent": 100.0 * plan.saved_bytes / plan.bytes, "compared": plan.compared,
            "late": sum(d.seconds > MAX_LATENCY for d in plan.deletions),
            "by_projection": kinds.count("projection"), "by_distinct": kinds.count("distinct"),
            "by_filter": kinds.count("filter"), "by_rows": kinds.count("rows"), **more,
        }  # fmt: skip


def rebuild_all(plan: RetentionPlan, lake: Lake, folder: Path) -> int:
    """How many tables of a plan do not come back as they were, row for row."""
    import duckdb

    wrong = 0
    with duckdb.connect(config={"threads": 1}) as connection:
        for deletion in plan.deletions:
            back = plan.rebuild(deletion.table, folder / deletion.table)
            one, other = (
                f"SELECT * FROM read_parquet('{path}')"
                for path in (back, lake[deletion.table].path)
            )
            differing = connection.execute(
                f"SELECT count(*) FROM (({one} EXCEPT ALL {other}) UNION ALL "
                f"({other} EXCEPT ALL {one}))"
            ).fetchall()[0][0]
            types = pq.read_schema(back).equals(lake[deletion.table].schema)
            wrong += bool(differing) or not types
    return wrong


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Lakes of 300 tables and some tens of megabytes."""
    for seed in seeds:
        yield from measure(seed, tables=300, scale=1.0, repeats=REPEATS)


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """Lakes of 300 tables and 5 to 10 gigabytes."""
    for seed in seeds:
        yield from measure(seed, tables=300, scale=400.0, repeats=1)


def draw(result: Result, path: Path) -> None:
    """Edges and bytes after each filter; precision and recall of all contenders."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def mean(contender: str, metric: str) -> float:
        found = Pick(metric, {"contender": contender}).by_seed(result.rows)
        return float(np.mean(list(found.values())))

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [f"after {s}" for s in ("schema", "min-max", "content")]
    true = [mean(n, "edges") - mean(n, "false") for n in names]
    false = [mean(n, "false") for n in names]
    left.bar(names, true, label="containments")
    left.bar(names, false, bottom=true, label="false", color="tab:orange")
    for i, name in enumerate(names):
        text = f"{mean(name, 'bytes_percent'):.1f} % of bytes\n{mean(name, 'missed'):.0f} missed"
        left.annotate(text, (i, true[i] + false[i]), ha="center", va="bottom", fontsize=8)
    left.set_ylabel("pairs left")
    left.margins(y=0.15)
    left.legend()
    contenders = {r["contender"] for r in result.rows if "recall" in r and "stage" not in r}
    shown = sorted(contenders, key=lambda n: (mean(n, "recall") + mean(n, "precision"), n))
    at = np.arange(len(shown))
    right.barh(at + 0.2, [mean(n, "recall") for n in shown], 0.38, label="recall")
    right.barh(at - 0.2, [mean(n, "precision") for n in shown], 0.38, label="precision")
    labels = [f"{n} ({mean(n, 'seconds'):.1f} s)" for n in shown]
    right.set_yticks(at, labels, fontsize=8)
    right.legend(fontsize=8)
    right.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _stage(name: str) -> dict[str, str]:
    return {"contender": f"after {name}"}


EXPERIMENT = Experiment(
    spec="r2d2",
    title="contained tables of a lake, after every filter, and the plan of what to delete",
    claims=(
        *(
            Claim(
                f"no containment is missed after the filter '{stage}'",
                Pick("missed", _stage(stage)), "==", 0.0,
                paper="(almost) all true containments are found",
            )
            for stage in ("schema", "min-max", "content")
        ),
        Claim(
            "after 90 sampled rows on all columns at most 1 % of the edges are false",
            Pick("false_percent", _stage("content")), "<=", 1.0,
            paper="nearly all wrong edges are removed",
        ),
        Claim(
            "schemas and metadata take less than 2 % of the lake's bytes",
            Pick("bytes_percent", _stage("min-max")), "<", 2.0,
        ),
        Claim(
            "the whole takes less than 20 % of the time of brute force",
            Pick("seconds_percent", {"contender": "r2d2"}), "<", 20.0,
            paper="hours instead of days at terabytes",
        ),
        Claim(
            "the plan costs no more than the greedy one",
            Pick("cost", {"contender": "exact plan"}), "<=",
            Pick("cost", {"contender": "greedy plan"}),
        ),
        Claim(
            "every bound on latency is kept",
            Pick("late", {"contender": "exact plan"}), "==", 0.0,
        ),
        Claim(
            "every deleted table comes back row for row",
            Pick("not_rebuilt", {"contender": "exact plan"}), "==", 0.0,
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0,),
    full_seeds=(0,),
    draw=draw,
)  # fmt: skip
