"""A class for each pixel: data, cross-entropy with an ignored label, and mean IoU.

Images and masks stay together: whatever moves an image moves its mask. Pixels that carry
:data:`IGNORED` belong to no class; they take part in neither the loss nor the metric.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.core.task import (
    Preprocess,
    Task,
    device_of,
    evaluating,
    logits_of,
    seed_of,
    to_device,
)

IGNORED = 255
"""The label of pixels that belong to no class."""

JointAugment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Raw images ``[batch, channels, height, width]``, masks ``[batch, height, width]`` and a
generator in; augmented images and masks out."""


class Segmentation(Task):
    """Images with one class a pixel, scored by mean intersection over union in percent.

    The mean is over the classes of the whole split's confusion matrix; a class that neither the
    truth nor the prediction holds is skipped.

    Args:
        splits: images ``[n, channels, height, width]`` (raw) and masks ``[n, height, width]``
            (class indices, or :data:`IGNORED`) by split; "train" and "validation" are needed.
        preprocess: how raw images become inputs.
        classes: the names of the classes, in label order.
        name: for reports.
        augment: of raw training batches.
        evaluation_batch_size: images a batch when scoring.

    Raises:
        InputError: if a split is missing or empty, shapes do not belong together, or a label is
            out of range.
    """

    metric = "mean IoU (%)"

    def __init__(
        self,
        splits: Mapping[str, tuple[Tensor, Tensor]],
        preprocess: Preprocess,
        classes: Sequence[str],
        *,
        name: str,
        augment: JointAugment | None = None,
        evaluation_batch_size: int = 16,
    ) -> None:
        self.name = name
        self.splits = dict(splits)
        self.preprocess = preprocess
        self.classes = tuple(map(str, classes))
        self.augment = augment
        self.evaluation_batch_size = evaluation_batch_size
        if not 2 <= len(self.classes) <= IGNORED:
            raise InputError(
                f"{name} has {len(self.classes)} classes; segmentation needs 2 to {IGNORED}"
            )
        for split in ("train", "validation"):
            if split not in self.splits:
                raise InputError(f"{name} has no {split} split")
        for split, (images, masks) in self.splits.items():
            self._check(split, images, masks)
        self.example_inputs = (preprocess(self.splits["train"][0][:2]),)

    def _check(self, split: str, images: Tensor, masks: Tensor) -> None:
        if images.ndim != 4 or masks.shape != (len(images), *images.shape[2:]):
            raise InputError(
                f"the {split} split of {self.name} has images of shape {list(images.shape)} and "
                f"masks of shape {list(masks.shape)}; [n, channels, height, width] and "
                "[n, height, width] are needed"
            )
        if len(images) == 0:
            raise InputError(f"the {split} split of {self.name} is empty")
        if masks.is_floating_point():
            raise InputError(
                f"the masks of {self.name} are {masks.dtype}; whole numbers are needed"
            )
        odd = masks[(masks != IGNORED) & ((masks < 0) | (masks >= len(self.classes)))]
        if odd.numel():
            raise InputError(
                f"the {split} split of {self.name} has label {int(odd[0])}, but there are "
                f"{len(self.classes)} classes, and {IGNORED} for pixels without one"
            )

    def size(self, split: str) -> int:
        return len(self.splits[split][0]) if split in self.splits else 0

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for step, shuffled, rows in self.rows_of(split, batch_size, seed, epoch, start, shuffle):
            some, their = (tensor[torch.from_numpy(rows)] for tensor in self.splits[split])
            if shuffled and self.augment is not None:
                generator = torch.Generator().manual_seed(seed_of("augment", seed, epoch, step))
                some, their = self.augment(some, their, generator)
            yield self.preprocess(some), their.long()

    def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (batch[0],)

    def criterion(self, outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return pixel_cross_entropy(logits_of(outputs), batch[1])

    def confusion(self, model: Callable[..., Any], split: str) -> Tensor:
        """Pixels by true class (rows) and predicted class (columns), ``[classes, classes]``."""
        device = device_of(model)
        count = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        with evaluating(model):
            for batch in self.batches(split, batch_size=self.evaluation_batch_size, shuffle=False):
                answer = self.decisions(self.outputs(model, to_device(batch, device)))
                count += confusion_matrix(answer.cpu(), batch[1], len(self.classes))
        return count

    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        return 100.0 * mean_of_present(intersection_over_union(self.confusion(model, split)))

    def class_scores(self, model: Callable[..., Any], split: str) -> dict[str, float | None]:
        """IoU in percent of each class (None for one in neither truth nor prediction)."""
        each = 100.0 * intersection_over_union(self.confusion(model, split))
        return {
            name: None if bool(value.isnan()) else float(value)
            for name, value in zip(self.classes, each, strict=True)
        }

    def subset(self, split: str, rows: np.ndarray, *, labelled: bool = True) -> Self:
        """The task of these rows of a split; the other splits stay whole.

        Args:
            split: of which a part is kept.
            rows: which images.
            labelled: False hides every label of them (all pixels become :data:`IGNORED`).

        Raises:
            InputError: if there are no rows, or one is out of range.
        """
        images, masks = self.splits[split]
        if len(rows) == 0 or int(np.min(rows)) < 0 or int(np.max(rows)) >= len(images):
            raise InputError(
                f"a part of the {split} split of {self.name} takes rows 0 to {len(images) - 1}, "
                "at least one"
            )
        at = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        kept = masks[at] if labelled else torch.full_like(masks[at], IGNORED)
        result = copy.copy(self)
        result.splits = self.splits | {split: (images[at], kept)}
        return result

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_json(),
        }

    def fingerprint(self) -> str:
        return self.digest_of(t for split in sorted(self.splits) for t in self.splits[split])


def pixel_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels that have a class; 0 where none has.

    Args:
        logits: ``[batch, classes, height, width]``.
        masks: class indices or :data:`IGNORED`, ``[batch, height, width]``.
    """
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns).

    Args:
        predicted: class indices of any shape.
        truth: class indices or :data:`IGNORED`, of the same shape.
        classes: how many there are.
    """
    counted = truth != IGNORED
    pairs = truth[counted] * classes + predicted[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """IoU of each class ``[classes]``; NaN for one in neither truth nor prediction."""
    counts = confusion.double()
    shared = counts.diagonal()
    return shared / (counts.sum(0) + counts.sum(1) - shared)


def mean_of_present(each: Tensor) -> float:
    """Mean over the classes that are there; NaN if none is."""
    return float(each.nanmean())


def mean_iou(predicted: Tensor, truth: Tensor, classes: int) -> float:
    """Mean IoU (0..1) of predicted and true class indices, see :class:`Segmentation`."""
    return mean_of_present(intersection_over_union(confusion_matrix(predicted, truth, classes)))


def joint_flip(probability: float = 0.5) -> JointAugment:
    """Mirrors image and mask left to right with ``probability``."""

    def apply(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mirrored = torch.rand(len(images), generator=generator) < probability
        return (
            torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images),
            torch.where(mirrored.view(-1, 1, 1), masks.flip(2), masks),
        )

    return apply


def joint_scale_crop(
    size: tuple[int, int], scales: Sequence[float] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
) -> JointAugment:
    """Scales image and mask by one of ``scales`` and crops both at the same random place.

    Images are interpolated bilinearly, masks take the nearest pixel. Where a scaled image is
    smaller than the crop, the rest is black and :data:`IGNORED`.

    Args:
        size: height and width of the crop, pixels.
        scales: chosen from with equal chances.

    Raises:
        InputError: if a size or a scale is not above 0.
    """
    if min(size) < 1 or not scales or min(scales) <= 0.0:
        raise InputError(
            f"a crop needs sides of 1 pixel or more and scales above 0, not {tuple(size)} and "
            f"{tuple(scales)}"
        )

    def apply(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = len(images)
        chosen = torch.randint(0, len(scales), (batch,), generator=generator)
        scale = torch.tensor(scales)[chosen]
        place = torch.rand(2, batch, generator=generator)
        axes = []
        for side, crop, share in zip(images.shape[2:], size, place, strict=True):
            # Whole pixels, so that scale 1 copies pixels instead of blending them.
            first = ((side - crop / scale) * share).round()
            at = first[:, None] + (torch.arange(crop) + 0.5) / scale[:, None]
            axes.append(2.0 * at / side - 1.0)
        rows, columns = axes
        grid = torch.stack(
            (
                columns[:, None, :].expand(-1, size[0], -1),
                rows[:, :, None].expand(-1, -1, size[1]),
            ),
            -1,
        )
        moved = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
        # Outside of the image the sampler answers 0, so labels are counted from IGNORED.
        shifted = (masks.float() - IGNORED).unsqueeze(1)
        labels = F.grid_sample(shifted, grid, mode="nearest", align_corners=False).squeeze(1)
        return moved.to(images.dtype), (labels + IGNORED).round().to(masks.dtype)

    return apply


def joint_compose(*steps: JointAugment) -> JointAugment:
    """Applies one augmentation after the other."""

    def apply(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        for step in steps:
            images, masks = step(images, masks, generator)
        return images, masks

    return apply
