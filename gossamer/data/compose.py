"""Prune, combine, augment: a few stored images a class, each of several small whole images.

Xiao et al., "Rethinking Large-scale Dataset Compression: Shifting Focus From Labels to Images",
2025 (arXiv:2502.06434). Prune: the easiest images of the full set, as many of each class. Combine:
``factor x factor`` whole images of a class, made smaller, tile a stored image. Augment: each epoch
sees one tile of each stored image, cropped inside of it alone. Labels stay hard: one number a
stored image. The paper's own code is not public; which image lies in which tile, and how far crops
go, are ours and are options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, cosine, fit
from gossamer.core.task import Augment, Batch, Classification, Source, logits_of
from gossamer.data.selection import place_in_class
from gossamer.datasets.arrays import ArraySource

Order = Literal["easy", "hard", "random"]


def boundaries(side: int, factor: int) -> list[int]:
    """Where tiles begin and end along a side; the first ``side mod factor`` are a pixel larger.

    Raises:
        InputError: if there are more tiles than pixels.
    """
    if not 1 <= factor <= side:
        raise InputError(f"a side of {side} pixels cannot hold {factor} tiles")
    sizes = [side // factor + (place < side % factor) for place in range(factor)]
    return [0, *np.cumsum(sizes).tolist()]


def pick(
    scores: np.ndarray, labels: np.ndarray, count: int, *, order: Order = "easy", seed: int = 0
) -> np.ndarray:
    """As many samples of each class, by difficulty within the class.

    Args:
        scores: ``[n]``, high is hard; of the full set.
        labels: class indices ``[n]``.
        count: of each class.
        order: which end; ties go to the earlier sample.
        seed: of "random".

    Returns:
        Rows ``[classes, count]``, the first choice first.

    Raises:
        InputError: if a class has fewer samples; nothing is repeated silently.
    """
    match order:
        case "easy":
            ranked = np.argsort(scores, kind="stable")
        case "hard":
            ranked = np.argsort(-scores, kind="stable")
        case "random":
            ranked = np.random.default_rng(seed).permutation(len(scores))
    sizes = np.bincount(labels)
    present = np.flatnonzero(sizes)
    if count < 1 or sizes[present].min() < count:
        label = present[sizes[present].argmin()]
        raise InputError(
            f"{count} samples of each class are wanted, and class {label} has {sizes[label]}"
        )
    ranked = ranked[place_in_class(labels[ranked]) < count]
    return ranked[np.argsort(labels[ranked], kind="stable")].reshape(len(present), count)


def combine(images: Tensor, factor: int) -> Tensor:
    """Tiles whole images, made smaller.

    Args:
        images: ``[stored * factor^2, channels, height, width]``; tile ``t`` (row by row) of stored
            image ``m`` is image ``t * stored + m``, so that each stored image holds easy and less
            easy ones where they come in order of difficulty.
        factor: tiles a side.

    Returns:
        ``[stored, channels, height, width]``, of the images' type.

    Raises:
        InputError: if the number of images does not divide.
    """
    height, width = int(images.shape[2]), int(images.shape[3])
    tiles = factor * factor
    if len(images) % tiles:
        raise InputError(f"{len(images)} images do not fill tiles of {tiles}")
    stored = len(images) // tiles
    rows, columns = boundaries(height, factor), boundaries(width, factor)
    canvas = torch.empty(stored, *images.shape[1:], dtype=images.dtype)
    for tile in range(tiles):
        down, right = divmod(tile, factor)
        top, bottom = rows[down : down + 2]
        left, end = columns[right : right + 2]
        small = resized(images[tile * stored : (tile + 1) * stored], (bottom - top, end - left))
        canvas[:, :, top:bottom, left:end] = small
    return canvas


def separate(stored: Tensor, factor: int) -> Tensor:
    """The tiles of stored images, in the order in which :func:`combine` took them.

    Raises:
        InputError: if tiles differ in size.
    """
    height, width = int(stored.shape[2]), int(stored.shape[3])
    if height % factor or width % factor:
        raise InputError(f"tiles of {height} x {width} pixels by {factor} differ in size")
    cut = stored.reshape(*stored.shape[:2], factor, height // factor, factor, width // factor)
    return cut.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing (the mean of the box where sides halve), of the images' type."""
    if tuple(images.shape[2:]) == size:
        return images
    small = interpolate(images.float(), size=size, mode="area")
    if images.is_floating_point():
        return small.to(images.dtype)
    return small.round().clamp(0, 255).to(images.dtype)


@dataclass(frozen=True)
class Composed:
    """A compressed set.

    Attributes:
        images: raw ``[classes * per_class, channels, height, width]``.
        labels: class indices of the stored images.
        factor: tiles a side; 1 is a plain image.
        sources: rows of the images in each stored image, ``[stored, factor^2]``.
    """

    images: Tensor
    labels: Tensor
    factor: int
    sources: np.ndarray

    @property
    def image_bytes(self) -> int:
        """Raw bytes of the stored images."""
        return self.images.numel() * self.images.element_size()

    @property
    def label_bytes(self) -> int:
        """One integer (of one byte up to 256 classes) a stored image."""
        return len(self.labels) * (1 if int(self.labels.max()) < 256 else 2)

    def task(
        self,
        whole: Classification,
        *,
        scale: tuple[float, float] | None = None,
        flip: bool = True,
        confined: bool = True,
    ) -> Classification:
        """The task that trains on the stored images and is scored as ``whole`` is.

        Args:
            whole: gives the other splits.
            scale: least and greatest share of a tile's area that a crop keeps. Default: 0.5 to 1 up
                to ten images a class, 0.08 to 1 beyond (ours: small data wants weak augmentation).
            flip: mirror half of the crops.
            confined: crop inside of one tile; False crops the stored image as if it were one
                picture, which is how RDED trains.
        """
        per_class = len(self.labels) // len(torch.unique(self.labels))
        scale = scale or ((0.5, 1.0) if per_class <= 10 else (0.08, 1.0))
        return Classification(
            {**whole.splits, "train": ArraySource(self.images, self.labels)},
            whole.preprocess,
            whole.classes,
            name=whole.name,
            augment=tile_crop(self.factor if confined else 1, scale=scale, flip=flip),
            evaluation_batch_size=whole.evaluation_batch_size,
        )


def compose(
    source: Source,
    scores: np.ndarray,
    *,
    per_class: int,
    factor: int = 2,
    order: Order = "easy",
    crop: bool = False,
    seed: int = 0,
) -> Composed:
    """Compresses a labelled set to some stored images a class.

    Args:
        source: the full training split.
        scores: difficulty of each of its samples, ``[n]``, high is hard.
        per_class: stored images a class (IPC); ``per_class * factor^2`` images are taken.
        factor: tiles a side.
        order: which images; the paper's is "easy".
        crop: cut a random square of half the area of each image in place of the whole one (the
            baseline that crops).
        seed: of "random" and of crops.

    Raises:
        InputError: if a class has too few images.
    """
    rows = pick(scores, source.labels.numpy(), per_class * factor**2, order=order, seed=seed)
    images, labels, sources = [], [], []
    for own in rows:
        taken = source.fetch(own)
        if crop:
            generator = torch.Generator().manual_seed(seed)
            # Tiles that are cut out: the size of a tile at full resolution.
            share = 1.0 / factor**2
            taken = _cropped(taken, (share, share), generator, ratio=(1.0, 1.0)).to(taken.dtype)
        images.append(combine(taken, factor))
        labels.append(source.labels[own[:per_class]])
        sources.append(own.reshape(factor**2, per_class).T)
    return Composed(torch.cat(images), torch.cat(labels), factor, np.concatenate(sources))


def tile_crop(
    factor: int, *, scale: tuple[float, float] = (0.08, 1.0), flip: bool = True
) -> Augment:
    """An augmentation: one tile of each image, a random crop inside of it, at full size.

    Args:
        factor: tiles a side; 1 is the usual random resized crop.
        scale: least and greatest share of the tile's area.
        flip: mirror half of them.
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        rows = torch.tensor(boundaries(height, factor))
        columns = torch.tensor(boundaries(width, factor))
        down = torch.randint(factor, (n,), generator=generator)
        right = torch.randint(factor, (n,), generator=generator)
        box = torch.stack([rows[down], columns[right], rows[down + 1], columns[right + 1]], 1)
        return _cropped(images, scale, generator, box=box, flip=flip)

    return augment


def _cropped(
    images: Tensor,
    scale: tuple[float, float],
    generator: torch.Generator,
    *,
    box: Tensor | None = None,
    flip: bool = False,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Random crops inside of boxes (top, left, bottom, right), resized to the images' size.

    Sampling stays half a pixel inside of the box, so that no value of a neighbour mixes in.
    """
    n, _, height, width = images.shape
    if box is None:
        box = torch.tensor([[0, 0, height, width]]).expand(n, 4)
    box = box.float()
    tall, wide = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    area = uniform(*scale)
    shape = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    h = ((area / shape).sqrt() * tall).clamp(max=tall).clamp(min=1.0)
    w = ((area * shape).sqrt() * wide).clamp(max=wide).clamp(min=1.0)
    top = box[:, 0] + uniform(0.0, 1.0) * (tall - h)
    left = box[:, 1] + uniform(0.0, 1.0) * (wide - w)
    mirror = torch.rand(n, generator=generator) < 0.5 if flip else torch.zeros(n, dtype=torch.bool)
    # Pixel centres of the output in the input's pixel coordinates.
    y = top[:, None] + (torch.arange(height) + 0.5) / height * h[:, None] - 0.5
    x = left[:, None] + (torch.arange(width) + 0.5) / width * w[:, None] - 0.5
    x = torch.where(mirror[:, None], x.flip(1), x)
    y = torch.minimum(torch.maximum(y, box[:, 0:1]), box[:, 2:3] - 1.0)
    x = torch.minimum(torch.maximum(x, box[:, 1:2]), box[:, 3:4] - 1.0)
    grid = torch.stack(
        [
            ((x + 0.5) / width * 2.0 - 1.0)[:, None, :].expand(n, height, width),
            ((y + 0.5) / height * 2.0 - 1.0)[:, :, None].expand(n, height, width),
        ],
        3,
    )
    return nn.functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def rded(
    task: Classification,
    teacher: nn.Module,
    *,
    per_class: int,
    factor: int = 2,
    pool: int = 300,
    crops: int = 5,
    seed: int = 0,
) -> Composed:
    """The baseline RDED: the crops a teacher finds easiest, tiled.

    Sun et al., "On the Diversity and Realism of Distilled Dataset", 2024. Of a random pool of each
    class, the best of some square crops of each image (padded with zeros to full size, least
    cross-entropy of the true label), and of those the best.

    Args:
        task: its training split.
        teacher: answers logits.
        per_class: stored images a class.
        factor: tiles a side.
        pool: images of each class that are looked at.
        crops: of each image.
        seed: of pool and crops.
    """
    source = task.splits["train"]
    labels = source.labels.numpy()
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    images, stored, sources = [], [], []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        own = own[random.permutation(len(own))[:pool]]
        wanted = per_class * factor**2
        if len(own) < wanted:
            raise InputError(f"class {label} has {len(own)} images, {wanted} are wanted")
        raw = source.fetch(own)
        height, width = int(raw.shape[2]), int(raw.shape[3])
        small = (height // factor, width // factor)
        best = torch.full((len(own),), torch.inf)
        kept = torch.zeros(len(own), raw.shape[1], *small)
        for _ in range(crops):
            cut = interpolate(
                _cropped(raw, (0.08, 1.0), generator, ratio=(1.0, 1.0)), size=small, mode="area"
            )
            padded = nn.functional.pad(cut, (0, width - small[1], 0, height - small[0]))
            loss = _losses(teacher, task.preprocess(padded), int(label))
            better = loss < best
            kept[better], best = cut[better], torch.minimum(best, loss)
        chosen = best.argsort(stable=True)[:wanted]
        whole = resized(kept[chosen], (height, width))
        images.append(combine(whole, factor).round().clamp(0, 255).to(raw.dtype))
        stored.append(source.labels[own[:per_class]])
        sources.append(own[chosen.numpy()].reshape(factor**2, per_class).T)
    return Composed(torch.cat(images), torch.cat(stored), factor, np.concatenate(sources))


def _losses(teacher: nn.Module, inputs: Tensor, label: int) -> Tensor:
    from gossamer.core.task import device_of, evaluating

    with evaluating(teacher):
        logits = logits_of(teacher(inputs.to(device_of(teacher)))).cpu()
        target = torch.full((len(inputs),), label)
        return nn.functional.cross_entropy(logits, target, reduction="none").clone()


class SoftLabels(Supervised):
    """The protocol with soft labels: images are mixed by CutMix and a teacher labels each mixture.

    Args:
        network: the student.
        task: gives batches.
        teacher: answers logits; frozen.
        optimizer: of the student.
        temperature: of both softmaxes; the loss is not multiplied by its square.
        mix: CutMix, one share of a uniform distribution for a whole batch.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Classification,
        teacher: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[float], float] = cosine,
        temperature: float = 20.0,
        mix: bool = True,
    ) -> None:
        super().__init__(
            network, task, optimizer=optimizer, schedule=schedule, criterion=self._soft
        )
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.mix = mix

    def step(self, batch: Batch) -> dict[str, Tensor | float]:
        images, labels = batch
        if self.mix:
            images = cutmix(images, float(torch.rand(())))
        self._target = logits_of(self.teacher(images)).detach()
        return super().step((images, labels))

    def _soft(self, outputs: object, batch: Batch) -> Tensor:
        return soft_loss(logits_of(outputs), self._target, self.temperature)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 20.0) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch."""
    return nn.functional.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )


def cutmix(images: Tensor, share: float) -> Tensor:
    """Puts a box of each image's successor in a random permutation into it.

    Args:
        images: ``[n, channels, height, width]``.
        share: of the area that stays; 1 changes nothing.
    """
    height, width = int(images.shape[2]), int(images.shape[3])
    cut = math.sqrt(1.0 - share)
    tall, wide = int(cut * height), int(cut * width)
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
    left, right = max(0, x - wide // 2), min(width, x + wide // 2)
    mixed = images.clone()
    partner = images[torch.randperm(len(images), device=images.device)]
    mixed[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    return mixed


def benchmark(
    task: Classification,
    network: nn.Module,
    *,
    teacher: nn.Module | None = None,
    epochs: int = 300,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> float:
    """One protocol for all compressed sets: AdamW along half a cosine, scored after the last epoch.

    Args:
        task: trains on the compressed set, tests on the whole.
        network: from scratch.
        teacher: gives soft labels; None trains on hard labels.
        epochs: passes over the compressed set. Sets of other sizes take other numbers of steps.
        batch_size: images a batch.
        lr: of AdamW.
        weight_decay: on matrices and kernels alone.
        seed: of order and augmentation.
        checkpoint: file that holds the run's state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        Top-1 accuracy on the test split, in percent.
    """
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )
    rule = (
        Supervised(network, task, optimizer=optimizer)
        if teacher is None
        else SoftLabels(network, task, teacher, optimizer=optimizer)
    )
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        cpu=cpu, title="learning from the compressed set",
    )  # fmt: skip
    return task.score(network, "test")


def stored_images(composed: Composed, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The stored images with names ``CLASS/NUMBER``, for writing."""
    place = place_in_class(composed.labels.numpy())
    for image, label, number in zip(composed.images, composed.labels, place, strict=True):
        yield f"{names[int(label)]}/{number:05}", image
