"""Every layout gives the same pixels and labels; what is broken is named in a sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.core.segmentation import IGNORED, Segmentation
from gossamer.datasets.segmentation import (
    assemble_masks,
    labelled_rows,
    segmentation_arrays,
    segmentation_folder,
    segmentation_lists,
    segmentation_tables,
)

CLASSES = ("ground", "wall", "sky")
DRAWN = np.random.default_rng(0)
IMAGES = DRAWN.integers(0, 256, (10, 6, 8, 3), dtype=np.uint8)
MASKS = DRAWN.integers(0, 3, (10, 6, 8), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_table(path: Path, rows: range) -> None:
    columns = {"image": [png(IMAGES[r]) for r in rows], "label": [png(MASKS[r]) for r in rows]}
    pyarrow.parquet.write_table(pa.table(columns), path)


def write_folder(folder: Path, rows: range) -> None:
    for kind, arrays in (("images", IMAGES), ("masks", MASKS)):
        (folder / kind).mkdir(parents=True)
        for row in rows:
            (folder / kind / f"{row}.png").write_bytes(png(arrays[row]))


def agrees(task: Segmentation) -> None:
    images, masks = task.splits["train"]
    assert torch.equal(images, torch.from_numpy(IMAGES[:6].transpose(0, 3, 1, 2)))
    assert torch.equal(masks, torch.from_numpy(MASKS[:6]).long())
    assert [task.size(s) for s in ("train", "validation", "test")] == [6, 2, 2]
    assert torch.equal(task.splits["test"][1], torch.from_numpy(MASKS[8:]).long())


def test_every_layout_gives_the_same_pixels(tmp_path: Path) -> None:
    parts = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}
    lists = {}
    for split, rows in parts.items():
        write_folder(tmp_path / "folder" / split, rows)
        (tmp_path / "tables").mkdir(exist_ok=True)
        write_table(tmp_path / "tables" / f"{split}.parquet", rows)
        lists[split] = tmp_path / f"{split}.txt"
        lists[split].write_text(
            "".join(f"/{split}/images/{r}.png /{split}/masks/{r}.png\n" for r in rows)
        )
    np.savez(tmp_path / "stack.npz", images=IMAGES, labels=MASKS)
    agrees(segmentation_folder(tmp_path / "folder", CLASSES, size=(6, 8)))
    agrees(segmentation_tables(tmp_path / "tables", CLASSES, size=(6, 8)))
    agrees(segmentation_lists(tmp_path / "folder", lists, CLASSES, size=(6, 8)))
    agrees(segmentation_arrays(tmp_path / "stack.npz", CLASSES, test=2, validation=2))


def test_labels_without_a_class_are_ignored_and_splits_carved(tmp_path: Path) -> None:
    write_folder(tmp_path, range(10))
    task = segmentation_folder(tmp_path, CLASSES[:2], size=(6, 8), ignored=(2,))
    assert [task.size(s) for s in ("train", "validation", "test")] == [7, 1, 2]
    masks = torch.cat([task.splits[s][1] for s in ("train", "validation", "test")])
    assert set(masks.unique().tolist()) == {0, 1, IGNORED}
    assert int((masks == IGNORED).sum()) == int((MASKS == 2).sum())


def test_resizing_keeps_labels_whole_and_beside_their_pixels(tmp_path: Path) -> None:
    blocks = np.kron(MASKS, np.ones((1, 4, 4), np.uint8))
    np.savez(tmp_path / "a.npz", images=blocks * 100, labels=blocks)
    task = segmentation_arrays(tmp_path / "a.npz", CLASSES, test=1, validation=1, size=(12, 16))
    images, masks = task.splits["train"]
    assert torch.equal(masks[:, ::2, ::2], torch.from_numpy(MASKS[:8]).long())
    assert torch.equal((images[:, 0].float() / 100).round().long(), masks)


def test_tiles_cover_a_row_in_reading_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=MASKS)
    task = segmentation_arrays(tmp_path / "a.npz", CLASSES, test=2, validation=1, tiles=2)
    masks = task.splits["train"][1]
    assert masks.shape == (28, 3, 4)
    assert np.array_equal(masks[1], MASKS[0, :3, 4:]) and np.array_equal(masks[6], MASKS[1, 3:, :4])


def test_partitions_are_fixed_by_their_seed() -> None:
    labelled, rest = labelled_rows(20, 0.25, seed=4)
    assert len(labelled) == 5 and sorted([*labelled, *rest]) == list(range(20))
    assert np.array_equal(labelled, labelled_rows(20, 0.25, seed=4)[0])
    assert not np.array_equal(labelled, labelled_rows(20, 0.25, seed=5)[0])
    with pytest.raises(InputError, match="both parts"):
        labelled_rows(20, 0.001)


def test_what_is_broken_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", range(4))
    (tmp_path / "a/masks/2.png").unlink()
    with pytest.raises(InputError, match=r"2\.png has no mask"):
        segmentation_folder(tmp_path / "a", CLASSES, size=(6, 8))
    (tmp_path / "a/masks/2.png").write_bytes(png(IMAGES[2]))
    with pytest.raises(InputError, match="has colours"):
        segmentation_folder(tmp_path / "a", CLASSES, size=(6, 8))
    (tmp_path / "a/masks/2.png").write_bytes(png(MASKS[2][:4]))
    with pytest.raises(InputError, match="8 x 6 pixels and its mask 8 x 4"):
        segmentation_folder(tmp_path / "a", CLASSES, size=(6, 8))
    (tmp_path / "a/masks/2.png").write_bytes(png(MASKS[2])[:60])
    with pytest.raises(InputError, match="mask of"):
        segmentation_folder(tmp_path / "a", CLASSES, size=(6, 8))
    (tmp_path / "b.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="not an npz file"):
        segmentation_arrays(tmp_path / "b.npz", CLASSES, test=1, validation=1)
    np.savez(tmp_path / "c.npz", images=IMAGES)
    with pytest.raises(InputError, match="no arrays named"):
        segmentation_arrays(tmp_path / "c.npz", CLASSES, test=1, validation=1)
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=MASKS)
    with pytest.raises(InputError, match="too few"):
        segmentation_arrays(tmp_path / "d.npz", CLASSES, test=9, validation=1)
    with pytest.raises(InputError, match="label 2, but there are 2 classes"):
        segmentation_arrays(tmp_path / "d.npz", CLASSES[:2], test=1, validation=1)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a table"):
        segmentation_tables(tmp_path / "t", CLASSES, size=(6, 8))
    pyarrow.parquet.write_table(pa.table({"image": [png(IMAGES[0])]}), tmp_path / "t/train.parquet")
    with pytest.raises(InputError, match="a column 'label'"):
        segmentation_tables(tmp_path / "t", CLASSES, size=(6, 8))
    with pytest.raises(InputError, match="no training images"):
        assemble_masks({}, CLASSES, name="none")


def test_a_real_stack_is_read(real_data: Callable[[str], Path]) -> None:
    stack = segmentation_arrays(
        real_data("em_membrane") / "isbi2012_train.npz",
        ("membrane", "cell"),
        test=6,
        validation=4,
        size=(128, 128),
    )
    assert [stack.size(s) for s in ("train", "validation", "test")] == [20, 4, 6]
    # 78.0 % of all pixels are cell, as published.
    masks = torch.cat([stack.splits[s][1] for s in stack.splits]).float()
    assert float(masks.mean()) == pytest.approx(0.780, abs=0.01)


def test_camvid_has_its_published_shares(real_data: Callable[[str], Path]) -> None:
    classes = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
        "pedestrian", "bicyclist",
    )  # fmt: skip
    task = segmentation_tables(real_data("camvid"), classes, size=(72, 96), ignored=(11,))
    assert [task.size(s) for s in ("train", "validation", "test")] == [367, 101, 233]
    masks = task.splits["train"][1]
    shares = [float((masks == label).float().mean()) for label in (*range(11), IGNORED)]
    published = (16.9, 23.3, 1.0, 31.7, 4.5, 9.7, 1.2, 1.1, 5.9, 0.6, 0.3, 4.0)
    # Nearest pixels of a smaller grid: shares are those of the whole masks to a few per mille.
    assert all(abs(100 * s - p) < 0.2 for s, p in zip(shares, published, strict=True))
