"""Key-points: the CUB layout and COCO's, moved into crops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.keypoints import (
    KeypointSource,
    KeypointTask,
    coco_keypoints,
    cub,
    distortions,
    keypoint_task,
    to_crop,
)

BOX = (10.0, 20.0, 40.0, 20.0)
"""x, y, width, height of the bright object in every picture."""


def picture(path: Path, number: int) -> None:
    pixels = np.zeros((60, 80, 3), dtype=np.uint8)
    pixels[20:40, 10:50] = (100 + number, 200, 50)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Twelve images of two classes; part 2 of image 5 is hidden, part 1 of image 6 not given."""
    lines: dict[str, list[str]] = {}
    for number in range(1, 13):
        kind = 1 + number % 2
        name = f"{kind:03d}.Bird {kind}/{number}.png"
        picture(tmp_path / "images" / name, number)
        lines.setdefault("images.txt", []).append(f"{number} {name}")
        lines.setdefault("image_class_labels.txt", []).append(f"{number} {kind}")
        lines.setdefault("bounding_boxes.txt", []).append(f"{number} 10.0 20.0 40.0 20.0")
        lines.setdefault("train_test_split.txt", []).append(f"{number} {int(number <= 8)}")
        for part in (1, 2):
            visible = int((number, part) != (5, 2))
            if (number, part) != (6, 1):
                lines.setdefault("parts/part_locs.txt", []).append(
                    f"{number} {part} {10 * part + 10.0} 30.0 {visible}"
                )
    lines["parts/parts.txt"] = ["1 left wing", "2 tail"]
    lines["classes.txt"] = ["1 001.Bird 1", "2 002.Bird 2"]
    (tmp_path / "parts").mkdir()
    for name, content in lines.items():
        (tmp_path / name).write_text("\n".join(content) + "\n")
    return tmp_path


def test_the_layout_of_cub(birds: Path) -> None:
    task = cub(birds, image_size=32)
    assert task.parts == ("left wing", "tail") and task.classes == ("001.Bird 1", "002.Bird 2")
    assert (task.size("train") + task.size("validation"), task.size("test")) == (8, 4)
    images, labels, points, visible = next(task.keypoint_batches("test"))
    assert labels.tolist() == [1, 0, 1, 0]
    # (20 - 10) / 40 * 32 = 8, (30 - 20) / 20 * 32 = 16; part 2 lies at (30 - 10) / 40 * 32 = 16.
    assert points.tolist() == [[[8, 16], [16, 16]]] * 4 and bool(visible.all())
    mean = torch.tensor(task.preprocess.mean).view(-1, 1, 1)
    std = torch.tensor(task.preprocess.std).view(-1, 1, 1)
    raw = (images * std + mean) * 255
    flat = torch.tensor([[109 + i, 200, 50] for i in range(4)]).view(4, 3, 1, 1).expand_as(raw)
    torch.testing.assert_close(raw, flat.float(), atol=0.1, rtol=0.0)
    shown = torch.cat([task.keypoints[s].visible for s in ("train", "validation")])
    assert int((~shown).sum()) == 2


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("bounding_boxes.txt", None, "cannot read"),
        ("bounding_boxes.txt", "1 2 3\n", "line 1 .* no 5 columns"),
        ("image_class_labels.txt", "1 a\n", "not a number"),
        ("image_class_labels.txt", "1 1\n", "every image"),
        ("parts/part_locs.txt", "99 1 2 3 1\n", "image 99"),
        ("classes.txt", "1 one\n", "names 1 of 2"),
        ("train_test_split.txt", "".join(f"{n} 1\n" for n in range(1, 13)), "empty"),
    ],
)
def test_broken_layouts(birds: Path, name: str, content: str | None, problem: str) -> None:
    (birds / name).unlink()
    if content is not None:
        (birds / name).write_text(content)
    with pytest.raises(InputError, match=problem):
        cub(birds, image_size=16)


def test_a_missing_picture_is_named(birds: Path) -> None:
    next((birds / "images").rglob("3.png")).unlink()
    with pytest.raises(InputError, match=r"3\.png"):
        cub(birds, image_size=16)


def coco(folder: Path, **changes) -> Path:
    value = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(12)],
        "categories": [
            {"id": 7, "name": "cat", "keypoints": ["nose", "tail"]},
            {"id": 9, "name": "dog", "keypoints": ["ear", "nose"]},
        ],
        "annotations": [
            {
                "image_id": n, "category_id": 7 if n % 2 else 9, "bbox": list(BOX),
                "keypoints": [20, 30, 2, 30, 30, 1],
            }
            for n in range(12)
        ],
    } | changes  # fmt: skip
    for n in range(12):
        picture(folder / f"{n}.png", n)
    (folder / "annotations.json").write_text(json.dumps(value))
    return folder / "annotations.json"


def test_key_points_as_coco_has_them(tmp_path: Path) -> None:
    task = coco_keypoints(coco(tmp_path), image_size=16)
    assert task.classes == ("cat", "dog") and task.parts == ("nose", "tail", "ear")
    _, labels, points, visible = next(task.keypoint_batches("train"))
    for label, place, seen in zip(labels.tolist(), points, visible, strict=True):
        # A cat shows its nose and hides its tail; a dog shows its ear and hides its nose.
        assert seen.tolist() == ([True, False, False] if label == 0 else [False, False, True])
        assert place[0 if label == 0 else 2].tolist() == [4, 8]


def test_json_that_is_not_coco(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no key-points as COCO"):
        coco_keypoints(coco(tmp_path, images=[]))
    with pytest.raises(InputError, match="no object with key-points"):
        coco_keypoints(coco(tmp_path, annotations=[]))
    one = [
        {"image_id": n, "category_id": 7, "bbox": [0, 0, 9, 9], "keypoints": [1, 1, 2, 1, 1, 2]}
        for n in range(12)
    ]
    with pytest.raises(InputError, match="one category, 'cat'"):
        coco_keypoints(coco(tmp_path, annotations=one))
    flat = [one[0] | {"bbox": [0, 0, 0, 9]}, one[1] | {"category_id": 9}]
    with pytest.raises(InputError, match="no area"):
        coco_keypoints(coco(tmp_path, annotations=flat))


def test_points_are_cut_to_whole_pixels_and_hidden_outside() -> None:
    points = np.array([[[15.9, 25.0], [50.0, 40.0], [9.0, 25.0]]])
    moved, visible = to_crop(points, np.ones((1, 3), dtype=bool), np.array([BOX]), 224)
    assert moved[0, :2].tolist() == [[33, 56], [224, 224]]  # 5.9 / 40 * 224 = 33.04
    assert visible.tolist() == [[True, True, False]]


def test_sources_and_tasks_refuse_what_does_not_fit() -> None:
    images = ArraySource(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(InputError, match="do not belong together"):
        KeypointSource(images, torch.zeros(4, 2, 3), torch.ones(4, 2))
    with pytest.raises(InputError, match="4 images and key-points of 3"):
        KeypointSource(images, torch.zeros(3, 2, 2), torch.ones(3, 2))
    source = KeypointSource(images, torch.zeros(4, 2, 2), torch.ones(4, 2))
    with pytest.raises(InputError, match="there are 1 parts"):
        keypoint_task(source, ["a", "b"], ["one"], name="few", validation=source, test=source)


def test_splits_keep_images_and_points_together() -> None:
    pixels = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 4, 4).contiguous()
    points = torch.arange(40).view(40, 1, 1).expand(40, 1, 2).contiguous()
    source = KeypointSource(
        ArraySource(pixels, torch.arange(40) % 2), points, torch.ones(40, 1, dtype=torch.bool)
    )
    task = keypoint_task(source, ["a", "b"], ["p"], name="numbers", mean=[0.0], std=[1 / 255])
    assert isinstance(task, KeypointTask)
    for split in ("train", "validation", "test"):
        for images, labels, at, _ in task.keypoint_batches(split, batch_size=7):
            torch.testing.assert_close(images[:, 0, 0, 0], at[:, 0, 0].float())
            assert torch.equal(at[:, 0, 1] % 2, labels)


def test_distortions_move_within_their_limits() -> None:
    ramp = torch.arange(64.0).expand(300, 1, 64, 64).contiguous()
    still = distortions(rotate=0.0, skew=0.0, shear=0.0, mirror=0.0)
    torch.testing.assert_close(still(ramp, torch.Generator()), ramp, atol=1e-3, rtol=0.0)
    mirrored = distortions(rotate=0.0, skew=0.0, shear=0.0, mirror=1.0)
    torch.testing.assert_close(mirrored(ramp, torch.Generator()), ramp.flip(3), atol=1e-3, rtol=0)
    turned = distortions(mirror=0.0, skew=0.0)(ramp, torch.Generator().manual_seed(0))
    centre = turned[:, 0, 16:48, 16:48]
    across = (centre[:, 16, 31] - centre[:, 16, 0]) / 31
    # Turning by at most 15 degrees leaves cos(15) of the slope; shear leaves it as it is.
    assert float(across.min()) > np.cos(np.radians(15.0)) - 1e-3 and float(across.max()) < 1.001
    raw = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert distortions()(raw, torch.Generator().manual_seed(1)).dtype == torch.uint8
