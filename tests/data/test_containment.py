"""Known lakes, known edges: every filter is sound, and the exact answer is that of brute force."""

from __future__ import annotations

import datetime
import decimal
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gossamer.core.errors import InputError
from gossamer.data.column_statistics import ALL_NULL, Statistics, folded, why_not_contained
from gossamer.data.containment import (
    containment_graph,
    rows_for,
    survival,
    survival_without_replacement,
)
from gossamer.data.lake import Lake, draw_rows, fetch_rows, read_lake
from gossamer.data.lake_engine import open_engine
from gossamer.data.reconstruction import compare_exactly, comparisons
from gossamer.data.schema_clusters import SchemaClusters


def write(folder: Path, **tables: dict[str, Any] | pa.Table) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in tables.items():
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def worked_lake(folder: Path) -> Path:
    """base(id, a, b, c), filt = base[a < 25], proj, noisy (every 20th b changed), other."""
    g = np.random.default_rng(0)
    n = 1000
    ids, a, b = np.arange(n), g.integers(0, 100, n), g.normal(size=n)
    c = np.array([f"w{v}" for v in g.integers(0, 50, n)])
    noisy = b.copy()
    inner = np.flatnonzero((b > b.min()) & (b < b.max()))  # so that the range stays
    noisy[inner[::20][:50]] += 1e-3
    base = {"id": ids, "a": a, "b": b, "c": c}
    few = a < 25
    return write(
        folder,
        base=base,
        filt={name: values[few] for name, values in base.items()},
        proj={"id": ids, "a": a},
        noisy={"id": ids, "a": a, "b": noisy},
        other={"id": ids + 2000, "a": a},
    )


def short(pairs: set[tuple[str, str]]) -> set[str]:
    stem = lambda name: name.removesuffix(".parquet")  # noqa: E731
    return {f"{stem(a)}>{stem(b)}" for a, b in pairs}


def python_rows(path: Path, names: list[str]) -> Counter[tuple[Any, ...]]:
    table = pq.read_table(path)
    columns = [table.column(name).to_pylist() for name in names]

    def key(value: Any) -> Any:
        return "nan" if isinstance(value, float) and math.isnan(value) else value

    return Counter(tuple(map(key, row)) for row in zip(*columns, strict=True))


def by_hand(lake: Lake) -> dict[tuple[str, str], float]:
    """CM of every pair whose schemas fit, in plain Python."""
    found = {}
    for parent in lake.tables:
        for child in lake.tables:
            if parent is not child and child.names() <= parent.names():
                names = sorted(child.names())
                a = set(python_rows(child.path, names))
                b = set(python_rows(parent.path, names))
                found[parent.name, child.name] = len(a & b) / len(a)
    return found


# Schemas


def brute_force(schemas: dict[str, frozenset[str]]) -> set[tuple[str, str]]:
    return {(a, b) for a in schemas for b in schemas if a != b and schemas[b] <= schemas[a]}


def random_schemas(count: int, families: int, seed: int) -> dict[str, frozenset[str]]:
    g = np.random.default_rng(seed)
    bases = [[f"f{f}c{c}" for c in range(g.integers(6, 16))] for f in range(families)]
    schemas = {}
    for i in range(count):
        base = bases[i % families] if i >= families else bases[i]
        size = len(base) if i < families else g.integers(1, len(base) + 1)
        schemas[f"t{i:03d}"] = frozenset(g.choice(base, size, replace=False).tolist())
    return schemas


@pytest.mark.parametrize("seed", range(5))
def test_schema_clusters_find_what_brute_force_finds(seed: int) -> None:
    schemas = random_schemas(200, 12, seed)
    found = SchemaClusters.build(schemas)
    assert found.edges == brute_force(schemas)
    assert found.tests < 10_000 < 199 * 200 // 2


@pytest.mark.parametrize("seed", range(5))
def test_schema_clusters_follow_what_comes_and_goes(seed: int) -> None:
    schemas = random_schemas(60, 4, seed)
    g = np.random.default_rng(seed)
    present = dict(list(schemas.items())[:30])
    clusters = SchemaClusters.build(present)
    waiting = dict(list(schemas.items())[30:])
    while waiting:
        if present and g.random() < 0.4:
            # The centres are what it is hardest to lose.
            names = list(clusters.clusters) if g.random() < 0.5 else list(present)
            gone = names[g.integers(len(names))]
            del present[gone]
            clusters.remove(gone)
        else:
            name, schema = waiting.popitem()
            present[name] = schema
            clusters.add(name, schema)
        assert clusters.edges == brute_force(present)


def test_equal_schemas_contain_each_other() -> None:
    found = SchemaClusters.build({"a": ["x", "y"], "b": ["y", "x"], "c": ["z"]})
    assert found.edges == {("a", "b"), ("b", "a")}


# The worked lake


def test_worked_lake(tmp_path: Path) -> None:
    lake = read_lake(worked_lake(tmp_path))
    schema = containment_graph(lake, min_max=False, content=False)
    assert len(schema.edges) == 12
    metadata = containment_graph(lake, content=False)
    four = {"base>filt", "base>noisy", "base>proj", "noisy>proj"}
    assert short(metadata.pairs()) == four
    truth = by_hand(lake)
    engine = open_engine("duckdb", lake)
    expected = {"base>filt": 1.0, "base>noisy": 0.95, "base>proj": 1.0, "noisy>proj": 1.0}
    for parent, child in metadata.pairs():
        columns = comparisons(lake[child], lake[parent])
        assert not isinstance(columns, str)
        found = compare_exactly(engine, lake.index(child), lake.index(parent), columns)
        assert found.containment == truth[parent, child]
        assert found.containment == expected[short({(parent, child)}).pop()]
    content = containment_graph(lake, rows=90)
    assert short(content.pairs()) == four - {"base>noisy"}
    assert [stage.edges for stage in content.stages] == [12, 4, 3]
    assert content.stages[1].bytes_read == 0
    (why,) = [p for p in content.pruned if p.child == "noisy.parquet" and p.stage == "content"]
    assert "sampled rows are not in the parent" in why.reason


def survivals(lake: Lake, **options: Any) -> float:
    pair = ("base.parquet", "noisy.parquet")
    seeds = options.pop("seeds")
    kept = [pair in containment_graph(lake, seed=s, **options).pairs() for s in range(seeds)]
    return float(np.mean(kept))


def test_a_false_edge_survives_as_often_as_theory_says(tmp_path: Path) -> None:
    root = worked_lake(tmp_path)
    for name in ("filt", "proj", "other"):
        (root / f"{name}.parquet").unlink()
    lake = read_lake(root)
    # 50 bad of 1000 rows, 10 rows without replacement: 0.597.
    theory = survival_without_replacement(50, 1000, 10)
    measured = survivals(lake, rows=10, seeds=80)
    assert abs(measured - theory) < 3.5 * math.sqrt(theory * (1 - theory) / 80)
    assert survivals(lake, rows=90, seeds=25) <= 0.09
    # With two of three columns, one choice in three never looks at the changed one.
    measured = survivals(lake, rows=90, columns=2, choose="random", seeds=60)
    theory = (1 + 2 * survival_without_replacement(50, 1000, 90)) / 3
    assert abs(measured - theory) < 3.5 * math.sqrt(theory * (1 - theory) / 60)


def test_theory_of_sampling() -> None:
    assert survival(0.1, 10) == pytest.approx(0.3487, abs=5e-5)
    assert survival(0.5, 10) == pytest.approx(0.00098, abs=5e-6)
    assert survival(0.05, 90) == pytest.approx(0.0099, abs=5e-5)
    assert survival_without_replacement(5, 100, 10) == pytest.approx(0.5838, abs=5e-5)
    assert rows_for(0.05, 0.01) == 90
    assert rows_for(0.01, 0.01) == 459
    with pytest.raises(InputError):
        rows_for(0.0, 0.01)


def test_sampled_rows_are_uniform(tmp_path: Path) -> None:
    root = tmp_path / "lake"
    root.mkdir()
    pq.write_table(pa.table({"v": np.arange(40)}), root / "t.parquet", row_group_size=7)
    table = read_lake(root).tables[0]
    g = np.random.default_rng(0)
    counts = np.zeros(40)
    for _ in range(2000):
        counts[draw_rows(table, 10, g)] += 1
    # Each row is in a quarter of the samples; a LIMIT would take the first ten.
    assert np.abs(counts / 2000 - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / 2000)
    rows = np.array([0, 6, 7, 39])
    found, read = fetch_rows(table, rows)
    assert found.column("c0").to_pylist() == rows.tolist()
    assert found.column("r").to_pylist() == rows.tolist()
    with pq.ParquetFile(table.path) as file:
        groups = [file.metadata.row_group(g).column(0) for g in (0, 1, 5)]
        assert read == sum(group.total_compressed_size for group in groups)


# Pitfalls


@pytest.mark.parametrize("seed", range(4))
def test_random_lakes_agree_with_plain_python(tmp_path: Path, seed: int) -> None:
    """Nulls, NaN, repeated rows, texts, dates, decimals: exact edges, none lost on the way."""
    g = np.random.default_rng(seed)

    def some(values: list[Any], n: int) -> list[Any]:
        return [values[i] for i in g.integers(len(values), size=n)]

    n = 60
    base = pa.table(
        {
            "i": pa.array(some([None, 1, 2, 3], n), pa.int32()),
            "f": pa.array(some([None, math.nan, 0.5, 2.0], n)),
            "s": pa.array(some([None, "", "a", "é'\\"], n)),
            "d": pa.array(some([None, datetime.date(2020, 2, 29), datetime.date(1, 1, 1)], n)),
            "m": pa.array(some([decimal.Decimal("1.20"), None], n), pa.decimal128(9, 2)),
            "t": pa.array(
                some([None, datetime.datetime(1969, 1, 1, 1, 1, 1, 5)], n), pa.timestamp("us")
            ),
        }
    )
    tables: dict[str, pa.Table] = {"base": base}
    for k in range(7):
        names = [c for c in base.column_names if g.random() < 0.5] or ["i"]
        rows = g.integers(n, size=g.integers(1, 30))
        part = base.select(names).take(rows)
        if k % 3 == 2:
            values = part.column(0).to_pylist()
            values[0] = part.column(0)[-1].as_py()
            part = part.set_column(0, names[0], pa.array(values, part.schema.field(0).type))
        tables[f"t{k}"] = part
    lake = read_lake(write(tmp_path, **tables))
    truth = {pair for pair, measure in by_hand(lake).items() if measure == 1}
    exact = containment_graph(lake, rows=3, verify=True)
    assert exact.pairs() == truth
    assert containment_graph(lake, content=False).pairs() >= truth
    assert containment_graph(lake, rows=10).pairs() >= truth
    brute = containment_graph(lake, min_max=False, content=False, verify=True)
    assert brute.pairs() == truth


def test_nulls_and_nan(tmp_path: Path) -> None:
    nan = math.nan
    lake = read_lake(
        write(
            tmp_path,
            a={"x": [1.0, nan, None, -0.0]},
            b={"x": [1.0, nan, None, 0.0]},
            no_null={"x": [1.0, nan, 0.0]},
            no_nan={"x": [1.0, None, 0.0]},
        )
    )
    graph = containment_graph(lake, verify=True)
    assert short(graph.pairs()) == {
        "a>b", "b>a", "a>no_null", "b>no_null", "a>no_nan", "b>no_nan",
    }  # fmt: skip
    reasons = {(p.parent, p.child): p for p in graph.pruned}
    nulls = reasons["no_null.parquet", "a.parquet"]
    assert nulls.stage == "min-max" and "nulls" in nulls.reason
    # No bound tells of NaN: only rows do.
    assert reasons["no_nan.parquet", "no_null.parquet"].stage == "content"


def test_bounds_are_used_only_as_far_as_they_hold() -> None:
    wide, cut = Statistics("b", "x", True, 0), Statistics("a", "zz", False, 0)
    assert why_not_contained(cut, wide) is None  # a cut child may well lie inside
    assert why_not_contained(Statistics("a", "c"), Statistics("b", "z", exact=False)) is not None
    assert why_not_contained(Statistics("b", "c"), wide) is None
    assert why_not_contained(Statistics(1, 5, True, 2), Statistics(0, 9, True, 0)) is not None
    assert why_not_contained(Statistics(1, 5, True, 0), Statistics(2, 9, True, 0)) is not None
    assert folded([Statistics(1, 3, True, 1), Statistics(ALL_NULL, ALL_NULL, True, 4)]) == (
        Statistics(1, 3, True, 5)
    )
    assert folded([Statistics(1, 3), None]) == Statistics()
    assert folded([Statistics(1.0, math.nan), Statistics(0.0, 1.0)]).low is None
    assert folded([Statistics(ALL_NULL, ALL_NULL, True, 4)]) == Statistics(nulls=4)


def test_other_types_are_converted_or_refused(tmp_path: Path) -> None:
    g = np.arange(100)
    lake = read_lake(
        write(
            tmp_path,
            whole={"k": pa.array(g, pa.int64())},
            small={"k": pa.array(g[:9], pa.int8())},
            real={"k": pa.array(g[:9], pa.float64())},
            fixed={"k": pa.array(g[:9].tolist(), pa.decimal128(6, 2))},
            text={"k": [str(v) for v in g[:9]]},
            zoned={"k": pa.array(g[:9], pa.timestamp("us", "UTC"))},
            local={"k": pa.array(g[:9], pa.timestamp("us"))},
            nanos={"k": pa.array(g[:9] * 1000, pa.timestamp("ns"))},
            big={"k": pa.array(g + 2**53 + 1, pa.int64())},
            near={"k": pa.array([float(2**53 + 2)])},
        )
    )
    graph = containment_graph(lake, verify=True)
    pairs = short(graph.pairs())
    assert {"whole>small", "whole>real", "whole>fixed", "real>small", "local>nanos"} <= pairs
    # A real number cannot tell such integers apart; times with and without zone are not the same.
    refused = {(p.parent.split(".")[0], p.child.split(".")[0]): p.reason for p in graph.pruned}
    assert "cannot tell apart" in refused["big", "near"]
    assert refused["text", "whole"] == "k is int64 in one and string in the other"
    assert "timestamp" in refused["local", "zoned"]
    assert not any("text" in pair or "zoned" in pair for pair in pairs)
    (edge,) = [e for e in graph.edges if (e.parent, e.child) == ("whole.parquet", "real.parquet")]
    assert edge.casts == ("k",)
    strict = containment_graph(lake, typed=True, verify=True)
    assert strict.pairs() == set()


def test_structs_are_flattened(tmp_path: Path) -> None:
    rows = [{"u": 1, "v": {"w": 2.0}}, {"u": 3, "v": None}, None]
    lake = read_lake(
        write(
            tmp_path, deep={"s": rows, "k": [1, 2, 3]}, flat={"s.u": [1, 3], "s.v.w": [2.0, None]}
        )
    )
    assert lake["deep.parquet"].names() == {"s.u", "s.v.w", "k"}
    assert short(containment_graph(lake, verify=True).pairs()) == {"deep>flat"}


def test_what_cannot_be_compared_is_listed(tmp_path: Path) -> None:
    write(tmp_path, good={"a": [1]}, lists={"a": [[1]]}, none={"a": pa.array([], pa.int64())})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "latin.csv").write_bytes("name\ncafé\n".encode("latin-1"))
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n4,5,6\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "zero.csv").write_bytes(b"a\n1\0\n")
    lake = read_lake(tmp_path)
    assert [table.name for table in lake.tables] == ["good.parquet"]
    reasons = {skip.name: skip.reason for skip in lake.skipped}
    assert "list" in reasons["lists.parquet"]
    assert "no rows" in reasons["none.parquet"]
    assert "cannot be read" in reasons["broken.parquet"]
    assert reasons["latin.csv"] == "is not UTF-8: byte 8 cannot be decoded"
    assert "not a CSV table" in reasons["ragged.csv"]
    assert reasons["empty.csv"] == "it is empty"
    assert reasons["twice.csv"] == "two columns are called 'a'"
    assert "zero byte" in reasons["zero.csv"]
    assert len(reasons) == 8
    with pytest.raises(InputError, match="not a folder"):
        read_lake(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="no Parquet, CSV or Delta"):
        read_lake(tmp_path / "void")


@pytest.mark.parametrize("how", ["rewritten", "gone"])
def test_a_lake_that_changes_is_named(tmp_path: Path, how: str) -> None:
    lake = read_lake(write(tmp_path, a={"x": [1, 2]}, b={"x": [1]}))
    if how == "gone":
        (tmp_path / "b.parquet").unlink()
    else:
        before = os.stat(tmp_path / "b.parquet")
        write(tmp_path, b={"x": [2]})
        os.utime(tmp_path / "b.parquet", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"b\.parquet (changed|went away) while"):
        containment_graph(lake)


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(
        '\ufeffcode,n,day,ok,note\n007,1,2020-01-01,true,"a,b"\n12,2.50,2020-01-02,False,\n'
        "12,3e2,,true,x\n"
    )
    (tmp_path / "some.csv").write_text("n;code\n2.5;12\n300;12\n")
    (tmp_path / "typed.csv").write_text("n,day\n1,2020-01-01\n")
    write(tmp_path, table={"n": [2.5, 1.0], "day": [datetime.date(2020, 1, d) for d in (2, 1)]})
    lake = read_lake(tmp_path)
    kinds = {c.name: c.kind for c in lake["all.csv"].columns}
    assert kinds == {"code": "text", "n": "real", "day": "date", "ok": "boolean", "note": "text"}
    assert lake["some.csv"].column("code").kind == "integer"
    assert lake["all.csv"].metadata_bytes == (tmp_path / "all.csv").stat().st_size
    graph = containment_graph(lake, verify=True)
    # A filter leaves only digits in the column of codes; they are compared as spelled.
    assert graph.pairs() == {
        ("all.csv", "some.csv"), ("all.csv", "typed.csv"), ("all.csv", "table.parquet"),
        ("table.parquet", "typed.csv"),
    }  # fmt: skip


def test_delta(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    whole = pa.table({"k": [1, 2, 3, 4], "p": ["x", "x", "y", "y"]})
    deltalake.write_deltalake(str(tmp_path / "plain"), whole.slice(0, 2))
    deltalake.write_deltalake(str(tmp_path / "plain"), whole.slice(2), mode="append")
    deltalake.write_deltalake(str(tmp_path / "parts"), whole, partition_by=["p"])
    deltalake.write_deltalake(str(tmp_path / "now"), pa.table({"k": [9]}))
    deltalake.write_deltalake(str(tmp_path / "now"), pa.table({"k": [1, 4]}), mode="overwrite")
    lake = read_lake(tmp_path)
    assert [(t.name, t.rows, t.format) for t in lake.tables] == [
        ("now", 2, "delta"), ("parts", 4, "delta"), ("plain", 4, "delta"),
    ]  # fmt: skip
    assert containment_graph(lake, verify=True).pairs() == {
        ("parts", "plain"), ("plain", "parts"), ("parts", "now"), ("plain", "now"),
    }  # fmt: skip


def test_updates_compare_only_what_is_new(tmp_path: Path) -> None:
    root = worked_lake(tmp_path)
    before = containment_graph(read_lake(root), verify=True)
    base = pq.read_table(root / "base.parquet")
    pq.write_table(base.slice(0, 300).select(["id", "b"]), root / "late.parquet")
    (root / "proj.parquet").unlink()
    pq.write_table(base.slice(5, 40).select(["id", "a"]), root / "other.parquet")
    lake = read_lake(root)
    after = containment_graph(lake, verify=True, previous=before)
    whole = containment_graph(lake, verify=True)
    assert after.edges == whole.edges
    assert after.clusters.edges == whole.clusters.edges
    assert {(p.parent, p.child) for p in after.pruned} == {
        (p.parent, p.child) for p in whole.pruned
    }
    assert after.stages[-2].bytes_read < whole.stages[-2].bytes_read


def test_file_names_are_no_patterns(tmp_path: Path) -> None:
    write(tmp_path, **{"a[1]*": {"x": [1, 2]}, "a1": {"x": [7]}, "it's": {"x": [2]}})
    assert short(containment_graph(read_lake(tmp_path)).pairs()) == {"a[1]*>it's"}


def test_bad_options(tmp_path: Path) -> None:
    lake = read_lake(write(tmp_path, a={"x": [1]}))
    for options in ({"rows": 0}, {"columns": 0}, {"engine": "pandas"}):
        with pytest.raises(InputError):
            containment_graph(lake, **options)
