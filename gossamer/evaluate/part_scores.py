"""Can explanations by part prototypes be trusted? Consistency and stability.

A prototype is *consistent* if it lands on the same part of the object in most test images of its
class, and *stable* if small noise does not move it to other parts. Both look at the square around
the peak of its activation map and at key-points of parts, which are needed for nothing else.

Source: Huang et al., arXiv:2212.05946, section 3, and its published code where that is silent
(inclusive borders, noise on normalised pixels, a pair without any part counts as equal).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.task import device_of, evaluating, seed_of
from gossamer.evaluate.part_prototypes import check_labels, peaks, upsample

HALF_SIZE = 36
"""Half the side of the region, for images of 224 pixels."""

KeypointBatch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs ``[B, channels, height, width]``, labels ``[B]``, key-points ``[B, T, 2]`` (x, y in whole
pixels of the input) and which of them are visible ``[B, T]``."""


class PrototypeModel(Protocol):
    """What is scored: anything with maps, and an owner for each prototype."""

    prototype_classes: Tensor

    def prototype_maps(self, images: Tensor, /) -> Tensor:
        """Activation maps ``[B, M, H, W]``."""
        ...


@dataclass(frozen=True)
class PartScore:
    """A score and what it is made of.

    Attributes:
        score: percent; the mean over the prototypes that were measured.
        table: a row for each prototype: ``prototype``, ``class``, ``images`` (of its class),
            ``measured`` (False if its class has no image with a visible part; such prototypes do
            not count), and for consistency ``part`` (the part it lands on most, a number),
            ``share`` (of the images in which that part is visible), ``visible`` (how many those
            are) and ``consistent``; for stability ``stable`` (percent of images).
    """

    score: float
    table: tuple[Mapping[str, Any], ...]


def regions(positions: Tensor, size: tuple[int, int], half_size: int) -> Tensor:
    """Squares around peaks, clipped to the image.

    Args:
        positions: row and column, ``[..., 2]``.
        size: height and width of the image, pixels.
        half_size: of the square, pixels.

    Returns:
        Top, left, bottom, right, both ends included, ``[..., 4]``.
    """
    low = (positions - half_size).clamp(min=0)
    high = torch.minimum(positions + half_size, torch.tensor(size, device=positions.device))
    return torch.cat((low, high), -1)


def parts_in(boxes: Tensor, locations: Tensor, visible: Tensor) -> Tensor:
    """Which visible parts lie in which regions, borders included.

    Args:
        boxes: top, left, bottom, right, ``[B, n, 4]``.
        locations: x and y, ``[B, T, 2]``.
        visible: ``[B, T]``.

    Returns:
        The part vectors, bool ``[B, n, T]``.
    """
    x, y = locations[:, None, :, 0], locations[:, None, :, 1]
    top, left, bottom, right = boxes[..., None].unbind(2)
    inside = (top <= y) & (y <= bottom) & (left <= x) & (x <= right)
    return inside & visible[:, None].bool()


def consistency_score(
    model: PrototypeModel,
    loader: Iterable[KeypointBatch],
    half_size: int | None = None,
    mu: float = 0.8,
    *,
    minimum_visible: int = 1,
) -> PartScore:
    """Percent of prototypes that land on one part in most images of their class.

    Args:
        model: has ``prototype_maps`` and ``prototype_classes``; runs in evaluation mode.
        loader: batches of test images with key-points.
        half_size: of the region, pixels. Default: 36 for images of 224, in proportion.
        mu: share of the images (in which the part is visible) from which a prototype is
            consistent.
        minimum_visible: parts that fewer images of a class show do not make its prototypes
            consistent. The paper has 1: a part visible once can make one consistent by luck.

    Raises:
        InputError: if there are no images or key-points, a label is out of range, or an option.
    """
    if not 0.0 < mu <= 1.0 or minimum_visible < 1:
        raise InputError(
            "consistency needs mu above 0 and at most 1 and a minimum of 1 visible or more, not "
            f"{mu:g} and {minimum_visible}"
        )
    tally = _Tally(model)
    for labels, visible, first, _ in _part_vectors(model, loader, half_size, None):
        tally.add(labels, visible, first, None)
    measured = tally.measured()
    seen = tally.seen[:, None]  # [K, 1, T]
    shares = tally.covered / seen.clamp(min=1)
    shares = torch.where(seen >= minimum_visible, shares, torch.zeros_like(shares))
    best, part = shares.max(2)
    consistent = best >= mu
    visible = seen.expand_as(shares).gather(2, part[..., None])[..., 0]
    rows = tally.rows(
        part=part, share=best, visible=visible, consistent=consistent, measured=measured
    )
    return PartScore(tally.mean(100.0 * consistent), rows)


def stability_score(
    model: PrototypeModel,
    loader: Iterable[KeypointBatch],
    half_size: int | None = None,
    *,
    sigma: float = 0.2,
    eps: float = 0.25,
    on: Literal["normalised", "raw"] = "normalised",
    std: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> PartScore:
    """Percent of (prototype, image) pairs that noise leaves on the same parts.

    Args:
        model: as for :func:`consistency_score`.
        loader: batches of test images with key-points.
        half_size: of the region, pixels. Default: 36 for images of 224, in proportion.
        sigma: standard deviation of the noise.
        eps: it is clipped at this.
        on: "normalised" adds it to the network's inputs, as the published code does; "raw" to
            pixels in 0..1, where the same sigma is several times as strong.
        std: by which pixels in 0..1 are divided, for "raw".
        generator: of the noise. Default: a new one, seed 0.

    Raises:
        InputError: if there are no images or key-points, a label is out of range, or an option.
    """
    if sigma < 0.0 or eps < 0.0 or (on == "raw" and std is None):
        raise InputError(
            "stability needs sigma and eps of 0 or more, and std for noise on raw pixels"
        )
    divide = torch.tensor(std if on == "raw" and std is not None else [1.0]).view(1, -1, 1, 1)
    generator = generator or torch.Generator().manual_seed(seed_of("stability", 0))

    def noisy(images: Tensor) -> Tensor:
        noise = sigma * torch.randn(images.shape, generator=generator)
        return images + (noise.clamp(-eps, eps) / divide).to(images)

    tally = _Tally(model)
    for labels, visible, first, second in _part_vectors(model, loader, half_size, noisy):
        tally.add(labels, visible, first, second)
    stable = 100.0 * tally.equal / tally.images[:, None].clamp(min=1)
    return PartScore(tally.mean(stable), tally.rows(stable=stable, measured=tally.measured()))


def _owners(model: PrototypeModel) -> Tensor:
    """Which prototypes each class has, ``[K, n]``."""
    classes = getattr(model, "prototype_classes", None)
    if not isinstance(classes, Tensor) or not hasattr(model, "prototype_maps"):
        raise InputError(
            "the network shows no prototype_maps and prototype_classes, so it has no prototypes "
            "to score"
        )
    counts = torch.bincount(classes.cpu())
    if len(counts.unique()) != 1:
        raise InputError("the classes own different numbers of prototypes; one number is needed")
    return classes.cpu().argsort(stable=True).view(len(counts), int(counts[0]))


def _part_vectors(
    model: PrototypeModel,
    loader: Iterable[KeypointBatch],
    half_size: int | None,
    noisy: Any,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Labels, visibility, part vectors, and those under noise, of each batch."""
    owners = _owners(model)
    device = device_of(model)
    for batch in loader:
        if len(batch) != 4:
            raise InputError(
                "the batches have no key-points; (images, labels, locations, visible) are needed"
            )
        images, labels, locations, visible = batch
        check_labels(labels, len(owners))
        if locations.shape != (len(images), visible.shape[1], 2) or not visible.shape[1]:
            raise InputError(
                f"key-points of shape {list(locations.shape)} and visibility of shape "
                f"{list(visible.shape)} do not fit {len(images)} images; [n, parts, 2] and "
                "[n, parts] are needed"
            )
        found = []
        for inputs in (images,) if noisy is None else (images, noisy(images)):
            context = model if isinstance(model, nn.Module) else None
            with evaluating(context):
                maps = model.prototype_maps(inputs.to(device)).cpu()
            own = maps[torch.arange(len(maps))[:, None], owners[labels]]
            height, width = int(images.shape[2]), int(images.shape[3])
            half = half_size
            if half is None:
                half = max(1, round(HALF_SIZE * min(height, width) / 224))
            at = peaks(upsample(own.float(), (height, width)))
            found.append(parts_in(regions(at, (height, width), half), locations, visible))
        yield labels, visible.bool(), found[0], found[1] if len(found) > 1 else None


class _Tally:
    """Counts by class and prototype."""

    def __init__(self, model: PrototypeModel) -> None:
        self.owners = _owners(model)
        classes, per_class = self.owners.shape
        self.images = torch.zeros(classes)
        self.equal = torch.zeros(classes, per_class)
        self.seen = torch.zeros(classes, 0)
        self.covered = torch.zeros(classes, per_class, 0)

    def add(self, labels: Tensor, visible: Tensor, first: Tensor, second: Tensor | None) -> None:
        if not self.seen.shape[1]:
            self.seen = torch.zeros(len(self.owners), visible.shape[1])
            self.covered = torch.zeros(*self.owners.shape, visible.shape[1])
        self.images.index_add_(0, labels, torch.ones(len(labels)))
        self.seen.index_add_(0, labels, visible.float())
        self.covered.index_add_(0, labels, first.float())
        if second is not None:
            self.equal.index_add_(0, labels, (first == second).all(2).float())

    def measured(self) -> Tensor:
        """Which prototypes belong to a class with a visible part in some image, ``[K, n]``."""
        shown = (self.seen > 0).any(1) if self.seen.shape[1] else self.images > 0
        if not bool(shown.any()):
            raise InputError(
                "no image of any class of the network has a visible key-point, so consistency "
                "and stability cannot be measured"
            )
        return shown[:, None].expand(self.owners.shape)

    def mean(self, values: Tensor) -> float:
        return float(values[self.measured()].double().mean())

    def rows(self, **columns: Tensor) -> tuple[Mapping[str, Any], ...]:
        classes = torch.arange(len(self.owners))[:, None].expand(self.owners.shape)
        images = self.images[:, None].expand(self.owners.shape).long()
        counts = {k: v.long() if k == "visible" else v for k, v in columns.items()}
        whole = {"prototype": self.owners, "class": classes, "images": images} | counts
        order = self.owners.flatten().argsort()
        lists = {name: value.flatten()[order].tolist() for name, value in whole.items()}
        return tuple(
            dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)
        )
