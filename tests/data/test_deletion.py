"""Plans: only what comes back row for row can go, and it does come back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from gossamer.core.errors import InputError
from gossamer.data.containment import containment_graph
from gossamer.data.deletion import RetentionPlan, plan_retention
from gossamer.data.lake import read_lake
from gossamer.data.reconstruction import Condition, Recipe, decode_rows, encode_rows
from gossamer.data.retention import Costs

FREE = Costs(storage=1.0, read=0.0, write=0.0, unit=1.0)


def multiset(table: pa.Table) -> Counter[tuple[Any, ...]]:
    # repr tells NaN, -0.0 and types apart.
    columns = [map(repr, column.to_pylist()) for column in table.columns]
    return Counter(zip(*columns, strict=True))


def made(root: Path, seed: int = 0) -> dict[str, pa.Table]:
    """A base with repeated rows, and tables made from it in every way."""
    g = np.random.default_rng(seed)
    n = 400
    base = pa.table(
        {
            "id": pa.array(np.arange(n) // 2, pa.int32()),
            "f": pa.array([None if v < 0.1 else float(v) for v in g.random(n)]),
            "k": pa.array(g.choice(["a", "b", "c", None], n).tolist()).dictionary_encode(),
            "t": pa.array(g.integers(0, 10**6, n), pa.timestamp("ms", "UTC")),
            "g": pa.array(g.integers(0, 6, n), pa.uint8()),
        }
    )
    ids = base.column("id").to_numpy()
    tables = {
        "base": base,
        "copy": base.take(pa.array(g.permutation(n))),
        "proj": base.select(["k", "id"]),
        "range": base.filter(pa.array((ids >= 30) & (ids <= 77))),
        "few": base.filter(pa.array(np.isin(base.column("g").to_numpy(), [1, 4]))),
        "rows": base.take(pa.array(g.permutation(n)[:50])),
        "ids": base.select(["id"]).take(pa.array(np.arange(0, n, 2))),
        "wide": base.select(["id", "g"]).cast(pa.schema([("id", pa.int64()), ("g", pa.float64())])),
    }
    root.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, root / f"{name}.parquet")
    return {f"{name}.parquet": pq.read_table(root / f"{name}.parquet") for name in tables}


def test_every_deleted_table_comes_back(tmp_path: Path) -> None:
    tables = made(tmp_path / "lake")
    plan = plan_retention(containment_graph(read_lake(tmp_path / "lake")), costs=FREE)
    kinds = {d.table.split(".")[0]: d.recipe.kind for d in plan.deletions}
    # Of two equal tables one stays.
    assert len({"base", "copy"} & set(kinds)) == 1
    assert {k: v for k, v in kinds.items() if k not in ("base", "copy")} == {
        "proj": "projection", "range": "filter", "few": "filter", "rows": "rows",
        "ids": "distinct", "wide": "projection",
    }  # fmt: skip
    plan.write(tmp_path / "plan.json")
    again = RetentionPlan.read(tmp_path / "plan.json")
    assert again.deletions == plan.deletions and again.cost == plan.cost
    assert len(again.dry_run()) == 7
    # What goes really goes, before anything is rebuilt.
    for deletion in again.deletions:
        (tmp_path / "lake" / deletion.table).unlink()
    for deletion in again.deletions:
        assert deletion.parent in again.keep
        place = again.rebuild(deletion.table, tmp_path / "back" / deletion.table)
        found = pq.read_table(place)
        assert found.schema.equals(tables[deletion.table].schema)
        assert multiset(found) == multiset(tables[deletion.table])
    saved = sum(d.bytes - d.recipe.bytes for d in again.deletions)
    assert again.saved_bytes == saved > 0


@pytest.mark.parametrize("seed", range(6))
def test_random_lakes_come_back(tmp_path: Path, seed: int) -> None:
    g = np.random.default_rng(seed)
    n = 50
    base = pa.table({c: g.integers(0, 4, n) for c in "abc"})
    root = tmp_path / "lake"
    root.mkdir()
    tables = {"base": base}
    for i in range(6):
        names = [c for c in "abc" if g.random() < 0.7] or ["a"]
        rows = pa.array(g.integers(0, n, g.integers(1, 60)))
        tables[f"t{i}"] = base.select(names).take(rows)
    for name, table in tables.items():
        pq.write_table(table, root / f"{name}.parquet")
    graph = containment_graph(read_lake(root))
    plan = plan_retention(graph, costs=FREE)
    for parent, child, reason in plan.refused:
        # What is refused has a row more often than the parent.
        a = multiset(tables[child.removesuffix(".parquet")])
        b = multiset(
            tables[parent.removesuffix(".parquet")].select(
                tables[child.removesuffix(".parquet")].column_names
            )
        )
        assert any(count > b[row] for row, count in a.items()), reason
    for deletion in plan.deletions:
        place = plan.rebuild(deletion.table, tmp_path / deletion.table)
        stem = deletion.table.removesuffix(".parquet")
        assert multiset(pq.read_table(place)) == multiset(tables[stem])


def test_sets_are_not_multisets(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "once.parquet")
    pq.write_table(pa.table({"x": [1, 1, 2]}), tmp_path / "twice.parquet")
    graph = containment_graph(read_lake(tmp_path), verify=True)
    assert graph.pairs() == {("once.parquet", "twice.parquet")}
    plan = plan_retention(graph, costs=FREE)
    assert plan.deletions == ()
    assert plan.refused == (
        ("once.parquet", "twice.parquet", "1 of its rows occur less often in the parent"),
    )


def test_sampled_evidence_is_not_enough(tmp_path: Path) -> None:
    """One wrong row in a thousand passes a sample of five, and never a plan."""
    v = np.arange(1000)
    pq.write_table(pa.table({"v": v, "w": v}), tmp_path / "base.parquet")
    w = v.copy()
    w[500] = 501
    pq.write_table(pa.table({"v": v, "w": w}), tmp_path / "near.parquet")
    graph = containment_graph(read_lake(tmp_path), rows=5)
    assert graph.pairs()
    plan = plan_retention(graph, costs=FREE)
    assert plan.deletions == () and "1 of its rows are not in the parent" in plan.refused[0][2]


def test_lineage_is_used_and_checked(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    v, hidden = np.arange(300), g.integers(0, 9, 300)
    pq.write_table(pa.table({"v": v, "hidden": hidden}), tmp_path / "base.parquet")
    pq.write_table(pa.table({"v": v[hidden < 3]}), tmp_path / "part.parquet")
    graph = containment_graph(read_lake(tmp_path))
    plain = plan_retention(graph, costs=FREE)
    assert plain.deletions[0].recipe.kind == "rows"
    for high, kind in ((2, "filter"), (3, "rows")):
        told = {"part.parquet": ("base.parquet", [Condition("hidden", high=high)])}
        plan = plan_retention(graph, costs=FREE, lineage=told)
        assert plan.deletions[0].recipe.kind == kind
        out = plan.rebuild("part.parquet", tmp_path / f"back{high}.parquet")
        assert pq.read_table(out).column("v").to_pylist() == v[hidden < 3].tolist()
        out.unlink()


def test_csv_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "lake"
    root.mkdir()
    (root / "all.csv").write_text('n;note\n1.50;"a;""b"\n2;\n007;x\n1e3;ü\n')
    (root / "some.csv").write_text('note;n\n"a;""b";1.50\nü;1e3\n')
    plan = plan_retention(containment_graph(read_lake(root)), costs=FREE)
    assert [d.table for d in plan.deletions] == ["some.csv"]
    place = plan.rebuild("some.csv", tmp_path / "some.csv")
    options = pc.ParseOptions(delimiter=";")
    texts = pc.ConvertOptions(column_types={"n": pa.string()})
    a, b = (pc.read_csv(p, None, options, texts) for p in (root / "some.csv", place))
    assert multiset(a) == multiset(b) and a.column_names == b.column_names


def test_delta_comes_back(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    whole = pa.table({"k": list(range(40)), "p": ["x", "y"] * 20})
    deltalake.write_deltalake(str(tmp_path / "lake/whole"), whole, partition_by=["p"])
    deltalake.write_deltalake(str(tmp_path / "lake/part"), whole.slice(3, 9))
    plan = plan_retention(containment_graph(read_lake(tmp_path / "lake")), costs=FREE)
    assert [d.table for d in plan.deletions] == ["part"]
    place = plan.rebuild("part", tmp_path / "part")
    found = deltalake.DeltaTable(str(place)).to_pyarrow_table()
    assert multiset(found.select(["k", "p"])) == multiset(whole.slice(3, 9))


def test_latency_bounds_are_kept(tmp_path: Path) -> None:
    made(tmp_path)
    graph = containment_graph(read_lake(tmp_path))
    prices = Costs(storage=1.0, read=0.0, write=0.0, read_seconds=0.0, write_seconds=1.0, unit=1e3)
    free = plan_retention(graph, costs=prices)
    bound = sorted(d.seconds for d in free.deletions)[0] * 1.01
    tight = plan_retention(graph, costs=prices, max_latency=bound)
    assert all(d.seconds <= bound for d in tight.deletions)
    assert len(tight.deletions) < len(free.deletions)
    assert plan_retention(graph, costs=prices, max_latency=0.0).deletions == ()


def test_a_changed_parent_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "lake"
    made(root)
    plan = plan_retention(containment_graph(read_lake(root)), costs=FREE)
    deletion = plan.deletion("proj.parquet")
    parent = pq.read_table(root / deletion.parent)
    pq.write_table(parent.slice(1), root / deletion.parent)
    with pytest.raises(InputError, match="not what it was when the plan was made"):
        plan.rebuild("proj.parquet", tmp_path / "out.parquet")
    with pytest.raises(InputError, match="not what it was when the plan was made"):
        plan.dry_run()
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(InputError, match="does not delete"):
        plan.rebuild(deletion.parent, tmp_path / "out.parquet")


def test_bad_plans_and_numbers(tmp_path: Path) -> None:
    root = tmp_path / "lake"
    made(root)
    graph = containment_graph(read_lake(root))
    plan = plan_retention(graph, costs=FREE)
    plan.write(tmp_path / "plan.json")
    whole = json.loads((tmp_path / "plan.json").read_text())
    listed = next(i for i, d in enumerate(whole["delete"]) if d["recipe"]["rows"])
    for key, value in (("schema", "AAAA"), ("format", "exe"), ("recipe", {"kind": "rm"})):
        broken = json.loads(json.dumps(whole))
        broken["delete"][listed][key] = value
        (tmp_path / "bad.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match="not a retention plan"):
            RetentionPlan.read(tmp_path / "bad.json")
    broken = json.loads(json.dumps(whole))
    broken["delete"][listed]["recipe"]["rows"] = "AAAA"
    (tmp_path / "bad.json").write_text(json.dumps(broken))
    with pytest.raises(InputError):
        RetentionPlan.read(tmp_path / "bad.json")
    # A plan cannot reach outside of its lake.
    broken = json.loads(json.dumps(whole))
    broken["delete"][listed]["parent"] = "../secret.parquet"
    (tmp_path / "bad.json").write_text(json.dumps(broken))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "secret.parquet")
    with pytest.raises(InputError, match="has no table"):
        name = broken["delete"][listed]["table"]
        RetentionPlan.read(tmp_path / "bad.json").rebuild(name, tmp_path / "out")
    for options in (
        {"accesses": {"nothing": 1}}, {"accesses": {"base.parquet": -1}}, {"max_latency": -1.0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            plan_retention(graph, **options)


def test_row_lists() -> None:
    rows = np.array([0, 1, 2, 900, 10**12])
    assert np.array_equal(decode_rows(encode_rows(rows)), rows)
    assert len(encode_rows(np.arange(100_000))) < 10_000
    with pytest.raises(InputError):
        decode_rows(b"nothing")
    assert str(Recipe("filter", (Condition("a", 1, 2, nulls=True),))) == (
        "rows where 1 <= a <= 2 or null"
    )


def test_conditions_are_spelled_safely(tmp_path: Path) -> None:
    """Quotes, backslashes and SQL in values and in names of columns stay values and names."""
    odd = ["a'b", "c\\", "'); DROP TABLE t0; --", "", "plain"]
    name = 'x" FROM t0; --'
    base = pa.table({name: odd * 3, "n": list(range(15))})
    pq.write_table(base, tmp_path / "base.parquet")
    kept = pa.array([v in ("a'b", "c\\", odd[2]) for v in odd * 3])
    pq.write_table(base.filter(kept), tmp_path / "some.parquet")
    plan = plan_retention(containment_graph(read_lake(tmp_path)), costs=FREE)
    assert plan.deletions[0].recipe.kind == "filter"
    plan.write(tmp_path / "plan.json")
    place = RetentionPlan.read(tmp_path / "plan.json").rebuild("some.parquet", tmp_path / "b.pq")
    assert multiset(pq.read_table(place)) == multiset(base.filter(kept))
