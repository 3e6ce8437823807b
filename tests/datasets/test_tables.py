"""Image tables: Parquet files, Hugging Face's saved data sets, and what is wrong with either."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.datasets import open_task
from gossamer.datasets.tables import read_table


def png(value: int, side: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def table(count: int = 40, **columns: Any) -> pa.Table:
    given = {
        "image": [png(k) for k in range(count)],
        "label": [k % 4 for k in range(count)],
    }
    return pa.table({k: v for k, v in (given | columns).items() if v is not None})


def check(task: Any) -> None:
    """Every image still has its label."""
    for part in task.splits.values():
        images = part.fetch(np.arange(len(part)))
        assert torch.equal(images[:, 0, 0, 0].long() % 4, part.labels)


def test_one_file(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "x.parquet")
    task = open_task(tmp_path / "x.parquet")
    assert {s: task.size(s) for s in task.splits} == {"train": 29, "validation": 3, "test": 8}
    assert task.classes == ("0", "1", "2", "3") and task.name == "x"
    check(task)
    check(open_task(tmp_path))


def test_files_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test"):
        pq.write_table(table(), tmp_path / "data" / f"{name}.parquet")
    task = open_task(tmp_path)
    assert {s: task.size(s) for s in task.splits} == {"train": 80, "validation": 40, "test": 40}
    (tmp_path / "data" / "test.parquet").unlink()
    task = open_task(tmp_path)
    assert {s: task.size(s) for s in task.splits} == {"train": 72, "validation": 8, "test": 40}
    check(task)


def test_names_of_classes(tmp_path: Path) -> None:
    words = ["dcba"[k % 4] for k in range(40)]
    pq.write_table(table(label=words), tmp_path / "x.parquet")
    task = open_task(tmp_path)
    assert task.classes == ("a", "b", "c", "d")
    red = task.splits["test"].fetch(np.arange(8))[:, 0, 0, 0].long()
    assert torch.equal(3 - red % 4, task.splits["test"].labels)
    pq.write_table(table(label=pa.array(words).dictionary_encode()), tmp_path / "x.parquet")
    assert open_task(tmp_path).classes == ("a", "b", "c", "d")
    pq.write_table(table(), tmp_path / "x.parquet")
    (tmp_path / "classes.json").write_text('["n", "o", "p", "q"]')
    assert open_task(tmp_path).classes == ("n", "o", "p", "q")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": None}, "has no column of images"),
        ({"label": None}, "has no column of labels"),
        ({"label": [0.5] * 40}, "are double; whole numbers or words are needed"),
        ({"label": [None] * 40}, "has rows without a label"),
        ({"image": [None, *[b"x"] * 39]}, "row 0 of .* holds no image bytes"),
        ({"image": ["cat.png"] * 40}, "row 0 of .* holds no image bytes"),
        ({"image": [png(1), b"no image", *[png(2)] * 38]}, "row 1 of .* cannot be read as an"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 40}, "outside of the table"),
        ({"label": [3] * 40}, "have one and the same class"),
        ({"label": [-1, *[2] * 39]}, "has label -1"),
        ({"label": [1 << 61, *[2] * 39]}, "has label 2305843009213693952, but only 40 images"),
        ({"image": pa.array([], "binary"), "label": pa.array([], "int8")}, "there are no images"),
    ],
)
def test_tables_of_other_things(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    pq.write_table(table(**columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=sentence):
        open_task(tmp_path)


def test_a_small_file_cannot_promise_many_rows(tmp_path: Path) -> None:
    rows = 3_000_000
    images = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), pa.array([png(1)]))
    given = pa.table({"image": images, "label": pa.nulls(rows, pa.int8())})
    pq.write_table(given, tmp_path / "x.parquet")
    # Columns of nothing take no bytes, whatever their length.
    given = pa.table({"image": pa.nulls(rows), "label": pa.nulls(rows)})
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, given.schema) as stream,
    ):
        stream.write_table(given)
    for name in ("x.parquet", "x.arrow"):
        assert (tmp_path / name).stat().st_size < rows
        with pytest.raises(InputError, match="3000000 rows are promised"):
            read_table(tmp_path / name)


def test_files_that_disagree(tmp_path: Path) -> None:
    pq.write_table(table(label=["a", "b"] * 20), tmp_path / "train-0.parquet")
    pq.write_table(table(label=["a", "c"] * 20), tmp_path / "train-1.parquet")
    with pytest.raises(InputError, match="disagree about the classes"):
        open_task(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 100, -1, -9])
def test_truncated_parquet(tmp_path: Path, kept: int) -> None:
    pq.write_table(table(), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:kept])
    with pytest.raises(InputError, match="is not a table that can be read"):
        open_task(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_table(tmp_path / "y.parquet")


def hugging(count: int = 40) -> datasets.Dataset:
    features = datasets.Features(
        {"pixels": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    )
    rows = {
        "pixels": [{"bytes": png(k), "path": None} for k in range(count)],
        "kind": [k % 4 for k in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
def test_saved_datasets(tmp_path: Path) -> None:
    hugging().save_to_disk(tmp_path / "one")
    task = open_task(tmp_path / "one")
    assert task.classes == ("a", "b", "c", "d") and task.size("train") == 29
    check(task)
    parts = datasets.DatasetDict(train=hugging(), validation=hugging(20), test=hugging(8))
    parts.save_to_disk(tmp_path / "parts", num_shards={"train": 3, "validation": 1, "test": 1})
    task = open_task(tmp_path / "parts")
    assert {s: task.size(s) for s in task.splits} == {"train": 40, "validation": 20, "test": 8}
    check(task)


@pytest.mark.usefixtures("offline")
def test_hugging_face_s_parquet(tmp_path: Path) -> None:
    hugging().to_parquet(tmp_path / "train-00000-of-00001.parquet")
    task = open_task(tmp_path)
    assert task.classes == ("a", "b", "c", "d")
    check(task)


def test_saved_datasets_stay_in_their_folder(tmp_path: Path) -> None:
    hugging().save_to_disk(tmp_path / "one")
    hugging().save_to_disk(tmp_path / "two")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    name = state["_data_files"][0]["filename"]
    (tmp_path / "one" / name).unlink()
    state["_data_files"][0]["filename"] = f"../two/{name}"
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="does not exist"):
        open_task(tmp_path / "one")
    for content in ("{}", "[]", '{"_data_files": []}', '{"_data_files": [3]}'):
        (tmp_path / "one" / "state.json").write_text(content)
        with pytest.raises(InputError, match="lists no data files"):
            open_task(tmp_path / "one")


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append(name)
        # A selection lives beside the table: the rows must be those selected.
        return datasets.DatasetDict(train=hugging().select(range(39, -1, -1)), test=hugging(8))

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = open_task("hub:owner/name")
    assert asked == ["owner/name"]
    assert {s: task.size(s) for s in task.splits} == {"train": 36, "validation": 4, "test": 8}
    check(task)

    def fail(name: str, config: str | None) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"owner/name cannot be loaded from the hub: no route$"):
        open_task("hub:owner/name")
