"""Spark's answers are DuckDB's, to the last edge, reason and recipe."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gossamer.data.containment import ContainmentGraph, containment_graph
from gossamer.data.deletion import plan_retention
from gossamer.data.lake import read_lake


@pytest.fixture(scope="module")
def session() -> Any:
    """A session set for small data; it is used as it is active, and left open."""
    if shutil.which("java") is None:
        pytest.skip("no Java")
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip("no peer: pyspark")
    from pyspark.sql import SparkSession

    builder: Any = SparkSession.builder
    settings = {
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "1",
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.log.level": "ERROR",
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    opened = builder.master("local[1]").getOrCreate()
    yield opened
    opened.stop()


def summary(graph: ContainmentGraph) -> Any:
    stages = [(stage.name, stage.edges, stage.bytes_read) for stage in graph.stages]
    return graph.edges, graph.pruned, stages


@pytest.mark.slow
def test_spark_finds_the_same(session: Any, tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    n = 60
    nan, zone = math.nan, pa.timestamp("us", "Europe/Berlin")
    base = pa.table(
        {
            "x": g.choice([1.0, nan, -0.0, 2.5], n),
            "s": pa.array(g.choice(["é'\\", "", "${b}", None], n).tolist()),
            "u": pa.array(g.choice(np.array([2**64 - 1, 0, 1], np.uint64), n)),
            "t": pa.array(g.integers(0, 9, n), pa.timestamp("ns")),
            "z": pa.array(g.integers(0, 9, n), zone),
        }
    )
    rows = pa.array(g.permutation(n)[:25])
    tables = {
        "base": base,
        "some": base.take(rows),
        "zero": base.filter(pa.compute.equal(base["u"], pa.scalar(0, pa.uint64()))),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "text.csv").write_text("x\n1\n2.50\n")
    lake = read_lake(tmp_path)
    duck = containment_graph(lake, rows=5, verify=True)
    spark = containment_graph(lake, rows=5, verify=True, engine="spark")
    assert summary(spark) == summary(duck)
    assert {e.child for e in spark.edges if e.parent == "base.parquet"} == {
        "some.parquet", "zero.parquet", "text.csv",
    }  # fmt: skip
    a, b = plan_retention(duck), plan_retention(spark)
    assert [(d.table, d.parent, str(d.recipe)) for d in a.deletions] == [
        (d.table, d.parent, str(d.recipe)) for d in b.deletions
    ]
    assert {d.recipe.kind for d in a.deletions} >= {"filter", "rows"}
    for one, other in zip(a.deletions, b.deletions, strict=True):
        assert np.array_equal(one.recipe.rows, other.recipe.rows) or one.recipe.rows is None
    assert a.cost == b.cost
    spark.engine.close()
    assert session.sql("SELECT 1").collect()  # a session that was there stays open
