"""Labelled images whose parts are known: key-points, and which of them can be seen.

Readers of the CUB-200-2011 layout (Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011)
and of key-points as COCO has them. Each image is the crop to the object's box, stretched to one
size; its key-points are moved with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.core.files import read_json
from gossamer.core.task import Augment, Classification, Preprocess
from gossamer.datasets.augment import flip
from gossamer.datasets.decode import decode, probe
from gossamer.datasets.splits import Pool, assemble


class KeypointSource:
    """Labelled images with key-points.

    Args:
        images: labelled images.
        locations: x and y in whole pixels of what ``images`` fetches, ``[n, parts, 2]``.
        visible: which parts can be seen, ``[n, parts]``.

    Raises:
        InputError: if the shapes do not belong together.
    """

    def __init__(self, images: Pool, locations: Tensor, visible: Tensor) -> None:
        if locations.shape != (*visible.shape, 2) or visible.ndim != 2:
            raise InputError(
                f"key-points of shape {list(locations.shape)} and visibility of shape "
                f"{list(visible.shape)} do not belong together; [n, parts, 2] and [n, parts] are "
                "needed"
            )
        if len(images) != len(visible):
            raise InputError(f"there are {len(images)} images and key-points of {len(visible)}")
        self.images = images
        self.locations = locations.long()
        self.visible = visible.bool()

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: np.ndarray) -> Tensor:
        return self.images.fetch(indices)

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    def take(self, rows: np.ndarray) -> KeypointSource:
        """The source of these rows alone."""
        at = torch.from_numpy(rows)
        return KeypointSource(self.images.take(rows), self.locations[at], self.visible[at])

    def verify(self) -> None:
        """Names the first image that cannot be read."""
        self.images.verify()


class KeypointTask(Classification):
    """A classification whose images have key-points; training does not see them.

    Args:
        splits: by name.
        preprocess: how raw images become inputs.
        classes: names, in label order.
        parts: names of the parts, in the order of the key-points.
        name: for reports.
        augment: of raw training batches.

    Raises:
        InputError: as :class:`~gossamer.core.task.Classification`, or if the key-points are not of
            ``parts``.
    """

    def __init__(
        self,
        splits: Mapping[str, KeypointSource],
        preprocess: Preprocess,
        classes: Sequence[str],
        *,
        parts: Sequence[str],
        name: str,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(splits, preprocess, classes, name=name, augment=augment)
        self.keypoints = dict(splits)
        self.parts = tuple(map(str, parts))
        for split, source in splits.items():
            if source.visible.shape[1] != len(self.parts):
                raise InputError(
                    f"the {split} split of {name} has {source.visible.shape[1]} key-points an "
                    f"image, but there are {len(self.parts)} parts"
                )

    def keypoint_batches(
        self, split: str, *, batch_size: int = 128
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The batches of a split, in stored order and not augmented.

        Yields:
            Inputs ``[batch, channels, height, width]``, labels ``[batch]``, key-points ``[batch,
            parts, 2]`` (x, y) and visibility ``[batch, parts]``.
        """
        source = self.keypoints.get(split)
        if source is None:
            raise InputError(f"{self.name} has no {split} split")
        at = 0
        for images, labels in self.batches(split, batch_size=batch_size, shuffle=False):
            rows = slice(at, at + len(labels))
            yield images, labels, source.locations[rows], source.visible[rows]
            at += len(labels)


class BoxedImages:
    """Image files, each cropped to a box and stretched to one size.

    Args:
        files: paths.
        boxes: x, y, width and height in pixels of the file, ``[n, 4]``.
        labels: ``[n]``.
        size: height and width of what is fetched.
    """

    def __init__(
        self, files: Sequence[Path], boxes: np.ndarray, labels: Tensor, size: tuple[int, int]
    ) -> None:
        self.files = list(files)
        self.boxes = boxes
        self._labels = labels.long()
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def fetch(self, indices: np.ndarray) -> Tensor:
        # One decoder call an image; what is computed on them afterwards is batched.
        read = [self._read(int(row)) for row in indices]
        return torch.from_numpy(np.stack(read).transpose(0, 3, 1, 2).copy())

    def take(self, rows: np.ndarray) -> BoxedImages:
        """The images of these rows alone."""
        files = [self.files[int(row)] for row in rows]
        return BoxedImages(files, self.boxes[rows], self._labels[torch.from_numpy(rows)], self.size)

    def verify(self) -> None:
        """Names the first image that is missing or is none."""
        for file in self.files:
            probe(file, str(file))

    def _read(self, row: int) -> np.ndarray:
        file = self.files[row]
        header = probe(file, str(file))
        whole = decode(file, str(file), channels=3, size=(header.height, header.width))
        x, y, width, height = self.boxes[row]
        left, top = max(0, int(x)), max(0, int(y))
        right, bottom = min(header.width, int(x + width)), min(header.height, int(y + height))
        if right <= left or bottom <= top:
            raise InputError(f"the box of {file} lies outside of the image")
        crop = Image.fromarray(whole[:, top:bottom, left:right].transpose(1, 2, 0))
        return np.array(crop.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR))


def cub(
    root: str | Path,
    *,
    image_size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    augment: Augment | None = None,
) -> KeypointTask:
    """Opens the layout of CUB-200-2011, cropped to the birds' boxes.

    Args:
        root: the folder with ``images.txt``, ``image_class_labels.txt``, ``bounding_boxes.txt``,
            ``train_test_split.txt``, ``parts/part_locs.txt``, and perhaps ``classes.txt`` and
            ``parts/parts.txt``; images lie under ``images/``.
        image_size: side in pixels of what the network sees.
        mean: per channel on the scale 0..1. Default: measured on the training split.
        std: per channel on the scale 0..1. Default: measured on the training split.
        seed: of the validation split, a tenth of the training images.
        augment: of raw training batches. Default: flips.

    Raises:
        InputError: if a file is missing, malformed, or speaks of images that are not listed.
    """
    root = Path(root)
    names = _columns(root / "images.txt", 2, words=True)
    ids = _whole(names[:, 0], root / "images.txt")
    order = {int(number): row for row, number in enumerate(ids)}

    def by_image(name: str, width: int) -> np.ndarray:
        table = _columns(root / name, width)
        rows = _places(table[:, 0], order, root / name)
        if len(set(rows.tolist())) != len(ids):
            raise InputError(f"{root / name} does not speak of every image of images.txt once")
        result = np.zeros((len(ids), width - 1))
        result[rows] = table[:, 1:]
        return result

    labels = torch.from_numpy(by_image("image_class_labels.txt", 2)[:, 0]).long() - 1
    boxes = by_image("bounding_boxes.txt", 5)
    training = by_image("train_test_split.txt", 2)[:, 0] == 1
    located = _columns(root / "parts" / "part_locs.txt", 5)
    rows = _places(located[:, 0], order, root / "parts" / "part_locs.txt")
    number = located[:, 1].astype(np.int64) - 1
    if len(number) and number.min() < 0:
        raise InputError(f"{root / 'parts' / 'part_locs.txt'} numbers parts from 1; it has 0")
    count = int(number.max()) + 1 if len(number) else 0
    points = np.zeros((len(ids), count, 2))
    visible = np.zeros((len(ids), count), dtype=bool)
    points[rows, number], visible[rows, number] = located[:, 2:4], located[:, 4] == 1
    parts = _named(root / "parts" / "parts.txt", count)
    classes = _named(root / "classes.txt", int(labels.max()) + 1)
    files = [root / "images" / name for name in names[:, 1]]
    source = _boxed(files, boxes, labels, points, visible, image_size)
    train, test = np.flatnonzero(training), np.flatnonzero(~training)
    if not len(train) or not len(test):
        raise InputError(f"{root / 'train_test_split.txt'} leaves one of its two splits empty")
    return keypoint_task(
        source.take(train), classes, parts, name=root.resolve().name, test=source.take(test),
        mean=mean, std=std, seed=seed, augment=augment,
    )  # fmt: skip


def coco_keypoints(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    image_size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    augment: Augment | None = None,
) -> KeypointTask:
    """Opens key-points as COCO has them; each annotated object is an image of its category.

    A key-point counts as visible if its flag is 2 (1 is annotated but hidden). Parts are those of
    all categories, by name. Validation and test splits are carved.

    Args:
        annotations: the JSON file.
        images: folder of the images. Default: the file's own.
        image_size: side in pixels of what the network sees.
        mean: per channel on the scale 0..1. Default: measured on the training split.
        std: per channel on the scale 0..1. Default: measured on the training split.
        seed: of the splits.
        augment: of raw training batches. Default: flips.

    Raises:
        InputError: if the file is not such JSON, no object has key-points, or all have one
            category.
    """
    path = Path(annotations)
    value = read_json(path)
    try:
        kinds = {int(kind["id"]): kind for kind in value["categories"] if kind.get("keypoints")}
        known = {int(image["id"]): str(image["file_name"]) for image in value["images"]}
        objects = [
            found
            for found in value["annotations"]
            if int(found["category_id"]) in kinds and any(found.get("keypoints") or ())
        ]
        parts = list(dict.fromkeys(str(p) for kind in kinds.values() for p in kind["keypoints"]))
        present = sorted({int(found["category_id"]) for found in objects})
        classes = [str(kinds[number]["name"]) for number in present]
        labels = torch.tensor([present.index(int(f["category_id"])) for f in objects])
        folder = path.parent if images is None else Path(images)
        files = [folder / known[int(found["image_id"])] for found in objects]
        boxes = np.array([found["bbox"] for found in objects], dtype=np.float64).reshape(-1, 4)
        points = np.zeros((len(objects), len(parts), 2))
        visible = np.zeros((len(objects), len(parts)), dtype=bool)
        for row, found in enumerate(objects):
            own = [parts.index(str(p)) for p in kinds[int(found["category_id"])]["keypoints"]]
            triples = np.array(found["keypoints"], dtype=np.float64).reshape(len(own), 3)
            points[row, own], visible[row, own] = triples[:, :2], triples[:, 2] == 2
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no key-points as COCO has them: {error!r:.200}") from error
    if not objects:
        raise InputError(f"{path} has no object with key-points")
    if len(classes) < 2:
        raise InputError(f"all objects of {path} are of one category, {classes[0]!r:.60}")
    return keypoint_task(
        _boxed(files, boxes, labels, points, visible, image_size), classes, parts,
        name=path.stem, mean=mean, std=std, seed=seed, augment=augment,
    )  # fmt: skip


def keypoint_task(
    pool: KeypointSource,
    classes: Sequence[str],
    parts: Sequence[str],
    *,
    name: str,
    validation: KeypointSource | None = None,
    test: KeypointSource | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    augment: Augment | None = None,
) -> KeypointTask:
    """Makes the task of images with key-points; splits that are not given are carved.

    Args:
        pool: images to train on.
        classes: names, in label order.
        parts: names, in the order of the key-points.
        name: for reports.
        validation: validation images that came apart from the pool.
        test: test images that came apart from the pool.
        mean: per channel on the scale 0..1. Default: measured on the training split.
        std: per channel on the scale 0..1. Default: measured on the training split.
        seed: of the splits.
        augment: of raw training batches. Default: flips.
    """
    plain = assemble(
        pool, classes, name=name, seed=seed, validation=validation, test=test, mean=mean, std=std
    )
    splits: dict[str, KeypointSource] = {}
    for split, source in plain.splits.items():
        assert isinstance(source, KeypointSource)
        splits[split] = source
    return KeypointTask(
        splits, plain.preprocess, plain.classes, parts=parts, name=name, augment=augment or flip()
    )


def to_crop(
    points: np.ndarray, visible: np.ndarray, boxes: np.ndarray, size: int
) -> tuple[Tensor, Tensor]:
    """Moves key-points into crops: ``(point - corner) / side * size``, cut to whole pixels.

    A part outside of its crop is not visible in it.

    Args:
        points: x and y in pixels of the file, ``[n, parts, 2]``.
        visible: ``[n, parts]``.
        boxes: x, y, width and height, ``[n, 4]``.
        size: side of the crop, pixels.

    Returns:
        Key-points ``[n, parts, 2]`` and visibility ``[n, parts]``.
    """
    moved = (points - boxes[:, None, :2]) / boxes[:, None, 2:] * size
    within = ((moved >= 0) & (moved <= size)).all(2)
    return torch.from_numpy(np.trunc(moved)).long(), torch.from_numpy(visible & within)


def distortions(
    *, rotate: float = 15.0, skew: float = 0.2, shear: float = 10.0, mirror: float = 0.5
) -> Augment:
    """Each image is turned, tilted in perspective or sheared (one of the three), then mirrored.

    The offline augmentation of ProtoPNet (arXiv:1806.10574) drawn anew in each pass. What enters
    from outside repeats the border.

    Args:
        rotate: largest turn either way, degrees.
        skew: largest perspective share either way.
        shear: largest angle either way, degrees.
        mirror: probability of a mirror image.
    """

    def apply(images: Tensor, generator: torch.Generator) -> Tensor:
        batch, _, height, width = images.shape
        drawn = 2.0 * torch.rand(4, batch, generator=generator) - 1.0
        kind = torch.randint(0, 3, (batch,), generator=generator)
        mirrored = torch.rand(batch, generator=generator) < mirror
        angle = torch.where(kind == 0, drawn[0] * math.radians(rotate), torch.zeros(batch))
        tilt = torch.where(kind == 1, skew, 0.0) * drawn[1:3]
        slant = torch.where(kind == 2, (drawn[3] * math.radians(shear)).tan(), torch.zeros(batch))
        across, down = torch.meshgrid(
            (torch.arange(width) + 0.5) * 2 / width - 1,
            (torch.arange(height) + 0.5) * 2 / height - 1,
            indexing="xy",
        )
        cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        x = cos * across - sin * down + slant.view(-1, 1, 1) * down
        y = sin * across + cos * down
        depth = 1.0 + tilt[0].view(-1, 1, 1) * across + tilt[1].view(-1, 1, 1) * down
        x = torch.where(mirrored.view(-1, 1, 1), -x, x)
        grid = torch.stack((x / depth, y / depth), -1)
        moved = F.grid_sample(
            images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return moved if images.is_floating_point() else moved.round().to(images.dtype)

    return apply


def _boxed(
    files: Sequence[Path],
    boxes: np.ndarray,
    labels: Tensor,
    points: np.ndarray,
    visible: np.ndarray,
    size: int,
) -> KeypointSource:
    odd = np.flatnonzero((boxes[:, 2:] < 1).any(1))
    if len(odd):
        raise InputError(f"the box of {files[int(odd[0])]} has no area")
    locations, shown = to_crop(points, visible, boxes, size)
    return KeypointSource(BoxedImages(files, boxes, labels, (size, size)), locations, shown)


def _columns(path: Path, width: int, *, words: bool = False) -> Any:
    """The lines of a file as a table of numbers (or words) separated by blanks."""
    try:
        lines = [line.split(maxsplit=width - 1) for line in path.read_text("utf-8").splitlines()]
        lines = [[word.strip() for word in line] for line in lines if line]
        odd = next((n for n, line in enumerate(lines, 1) if len(line) != width), None)
        if odd is not None:
            raise InputError(f"line {odd} of {path} has no {width} columns")
        return np.array(lines, dtype=str if words else np.float64).reshape(-1, width)
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise InputError(f"{path} holds something that is not a number: {error}") from error


def _whole(values: np.ndarray, path: Path) -> np.ndarray:
    try:
        return values.astype(np.int64)
    except ValueError as error:
        raise InputError(f"{path} numbers its images by something else: {error}") from error


def _places(numbers: np.ndarray, order: Mapping[int, int], path: Path) -> np.ndarray:
    try:
        return np.array([order[int(number)] for number in numbers], dtype=np.int64)
    except KeyError as error:
        raise InputError(
            f"{path} speaks of image {error.args[0]}, which is not in images.txt"
        ) from error


def _named(path: Path, count: int) -> list[str]:
    """Names from a file "number name"; the numbers themselves where there is no file."""
    if not path.is_file():
        return [str(number + 1) for number in range(count)]
    table = _columns(path, 2, words=True)
    if len(table) < count:
        raise InputError(f"{path} names {len(table)} of {count}")
    return [str(name) for name in table[:, 1]]
