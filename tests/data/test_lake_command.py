"""`gossamer data dedupe` and `gossamer data rebuild` as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

import gossamer.cli
from gossamer.core.errors import GossamerError


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    gossamer.cli.app([*map(str, words), "--json"], result_action="return_value")
    return json.loads(capsys.readouterr().out)


def lake(root: Path) -> Path:
    root.mkdir()
    base = pa.table({"id": list(range(2000)), "v": [i * 0.25 for i in range(2000)]})
    pq.write_table(base, root / "base.parquet")
    pq.write_table(base.slice(100, 900), root / "part.parquet")
    (root / "latin.csv").write_bytes("name\ncafé\n".encode("latin-1"))
    return root


def test_plan_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = lake(tmp_path / "lake")
    before = {p.name: p.read_bytes() for p in root.iterdir()}
    plan = tmp_path / "plan.json"
    report = run(capsys, "data", "dedupe", root, "--out", plan)
    (item,) = report["delete"]
    assert (item["table"], item["parent"]) == ("part.parquet", "base.parquet")
    assert item["recipe"] == "rows where 100 <= id <= 999"
    assert report["saved_bytes"] == len(before["part.parquet"])
    assert report["skipped"] == [
        {"table": "latin.csv", "reason": "is not UTF-8: byte 8 cannot be decoded"}
    ]
    # Nothing is deleted, and nothing is written into the lake.
    assert {p.name: p.read_bytes() for p in root.iterdir()} == before
    (root / "part.parquet").unlink()
    back = root / "part.parquet"
    told = run(capsys, "data", "rebuild", plan, "part.parquet", "--out", back)
    assert told["rows"] == 900
    assert pq.read_table(back).sort_by("id") == pq.read_table(pa.BufferReader(before[back.name]))


def test_prices_accesses_and_lineage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = lake(tmp_path / "lake")
    accesses, told = tmp_path / "accesses.json", tmp_path / "lineage.json"
    accesses.write_text('{"part.parquet": 100000}')
    report = run(capsys, "data", "dedupe", root, "--accesses", accesses)
    assert report["delete"] == [] and report["contained"]
    told.write_text(
        '{"part.parquet": {"parent": "base.parquet", "where": [{"column": "v", "low": 25.0,'
        ' "high": 249.75}]}}'
    )
    report = run(capsys, "data", "dedupe", root, "--lineage", told)
    assert report["delete"][0]["recipe"] == "rows where 25.0 <= v <= 249.75"


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = lake(tmp_path / "lake")
    bad = tmp_path / "bad.json"
    bad.write_text('{"speed": 1}')
    for words, sentence in (
        (("data", "dedupe", tmp_path / "none"), "is not a folder"),
        (("data", "dedupe", root, "--out", root / "plan.json"), "lies in the lake"),
        (("data", "dedupe", root, "--costs", bad), "names 'speed'"),
        (("data", "dedupe", root, "--accesses", bad), "has no table speed"),
        (("data", "dedupe", root, "--lineage", bad), "must hold"),
        (("data", "dedupe", root, "--rows", 0), "give 1 or more"),
        (("data", "dedupe", root, "--max-latency", -1), "cannot be met"),
        (("data", "rebuild", bad, "part.parquet", "--out", tmp_path / "x"), "not a retention plan"),
    ):
        with pytest.raises(GossamerError, match=sentence):
            run(capsys, *words)


def test_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gossamer.cli", "data", "dedupe", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"gossamer: {tmp_path} holds no Parquet, CSV or Delta table\n"


@pytest.mark.data
def test_real_tables(
    real_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real CSV files with parts of two of them: these and nothing false is found."""
    source = real_data("tables")
    root = tmp_path / "lake"
    root.mkdir()
    for file in sorted(source.glob("MASS__*.csv")):
        (root / file.name).write_bytes(file.read_bytes())
    boston = (source / "MASS__Boston.csv").read_text().splitlines()
    (root / "some.csv").write_text("\n".join([boston[0], *boston[40:90]]) + "\n")
    report = run(capsys, "data", "dedupe", root, "--out", tmp_path / "plan.json")
    deleted = {d["table"]: d["parent"] for d in report["delete"]}
    assert deleted["some.csv"] == "MASS__Boston.csv"
    run(capsys, "data", "rebuild", tmp_path / "plan.json", "some.csv", "--out", tmp_path / "x.csv")
    one, other = (pc.read_csv(p) for p in (root / "some.csv", tmp_path / "x.csv"))
    first = one.column_names[0]
    assert one.sort_by(first) == other.sort_by(first)
