"""Any ``torch.utils.data.Dataset`` of (image, label) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.progress import progress
from gossamer.core.task import Augment, Classification
from gossamer.datasets.arrays import fit_images
from gossamer.datasets.splits import assemble, numbered_classes


class Pairs(Protocol):
    """What is needed of a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DatasetSource:
    """The pairs of a data set, fetched when they are needed.

    Args:
        dataset: answers ``(image, label)``; the image is a tensor ``[channels, height, width]`` or
            ``[height, width]``, an array ``[height, width(, channels)]`` or a Pillow image.
        rows: which samples. Default: all.
        labels: of these rows. Default: read off ``dataset.targets`` if it has them, otherwise off
            every pair.
        channels: 1 or 3. Default: as the first image.
        size: height and width in pixels. Default: as the first image.
    """

    def __init__(
        self,
        dataset: Pairs,
        rows: np.ndarray | None = None,
        labels: Tensor | None = None,
        *,
        channels: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.dataset = dataset
        self.rows = np.arange(len(dataset)) if rows is None else rows
        if len(self.rows) == 0:
            raise InputError("the data set is empty")
        self.labels = _labels(dataset) if labels is None else labels
        first = self._image(0)
        self.channels = channels or int(first.shape[0])
        self.size = size or (int(first.shape[1]), int(first.shape[2]))
        self.dtype = first.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: np.ndarray) -> Tensor:
        images = [self._image(int(index)) for index in indices]
        if len({image.shape for image in images}) == 1:
            return fit_images(torch.stack(images), self.channels, self.size)
        return torch.cat(
            [fit_images(image.unsqueeze(0), self.channels, self.size).float() for image in images]
        )

    def take(self, rows: np.ndarray) -> DatasetSource:
        """The source of these rows alone."""
        return DatasetSource(
            self.dataset,
            self.rows[rows],
            self.labels[torch.from_numpy(rows)],
            channels=self.channels,
            size=self.size,
        )

    def verify(self) -> None:
        """Nothing to do: the data set answers for its samples."""

    def _image(self, index: int) -> Tensor:
        row = int(self.rows[index])
        pair = self.dataset[row]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"sample {row} of the data set is not a pair of image and label")
        return _tensor(pair[0], row)


def from_dataset(
    train: Pairs,
    *,
    validation: Pairs | None = None,
    test: Pairs | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Classification:
    """Makes a task of map-style data sets.

    Images of bytes (uint8 tensors and arrays, Pillow images) are scaled to 0..1 and normalised.
    Float tensors are taken as ready for the network: they are passed on as they are unless
    ``mean`` and ``std`` are given. Random transforms inside of a data set are drawn from its own
    generators, so only ``augment`` is reproduced when a run resumes.

    Args:
        train: pairs of image and label to train on.
        validation: pairs for validation. Default: carved from ``train`` (10 %).
        test: pairs for the final measurement. Default: carved from ``train`` (20 %).
        classes: names of the classes. Default: ``train.classes`` if it has them, otherwise the
            numbers.
        name: for reports. Default: the name of the data set's class.
        seed: of the splits that are carved.
        image_size: height and width in pixels. Default: as the first image.
        channels: 1 or 3. Default: as the first image.
        limit: at most about this many training images.
        mean: per channel. Default: measured for bytes, 0 for floats.
        std: per channel. Default: measured for bytes, 1 for floats.
        augment: of raw training batches. Default: none.

    Raises:
        InputError: if a sample is not a pair of image and whole number.
    """
    sources = {
        split: DatasetSource(dataset, channels=channels, size=image_size)
        for split, dataset in (("train", train), ("validation", validation), ("test", test))
        if dataset is not None
    }
    first = sources["train"]
    whole = first.dtype == torch.uint8
    if not whole and mean is None and std is None:
        mean, std = (0.0,) * first.channels, (1.0,) * first.channels
    name = name or type(train).__name__
    if classes is None:
        classes = getattr(train, "classes", None)
    if classes is None:
        classes = numbered_classes([source.labels for source in sources.values()], name)
    return assemble(
        first,
        classes,
        name=name,
        seed=seed,
        validation=sources.get("validation"),
        test=sources.get("test"),
        limit=limit,
        scale=255.0 if whole else 1.0,
        mean=mean,
        std=std,
        augment=augment,
    )


def _labels(dataset: Pairs) -> Tensor:
    known = getattr(dataset, "targets", None)
    if known is not None and len(known) == len(dataset):
        return torch.as_tensor([_label(value, row) for row, value in enumerate(known)])
    labels = []
    with progress() as bar:
        for row in bar.track(range(len(dataset)), description="reading labels"):
            pair = dataset[row]
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(f"sample {row} of the data set is not a pair of image and label")
            labels.append(_label(pair[1], row))
    return torch.tensor(labels, dtype=torch.int64)


def _label(value: Any, row: int) -> int:
    try:
        number = int(value)
        whole = number == float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"the label of sample {row} is {value!r}, not a whole number") from error
    if not whole:
        raise InputError(f"the label of sample {row} is {value!r}, not a whole number")
    return number


def _tensor(image: Any, row: int) -> Tensor:
    if isinstance(image, Image.Image):
        image = np.array(image if image.mode == "L" else image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(image))
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    if not isinstance(image, Tensor):
        raise InputError(f"the image of sample {row} is a {type(image).__name__}, not a tensor")
    if image.ndim == 2:
        image = image.unsqueeze(0)
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(
            f"the image of sample {row} has shape {list(image.shape)}; [1 or 3, height, width] "
            "is needed"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise InputError(f"the image of sample {row} is {image.dtype}; uint8 or float is needed")
    return image
