"""Part-prototype networks: every logit is a sum of "this patch looks like that prototype".

A backbone's map is compared, position by position, with learned prototypes, each owned by one
class; what a prototype contributes to a logit is its best match in the image times a weight. Built
in: ProtoPNet (log of the squared distance, linear head over all prototypes) and its improvement
(cosine prototypes; *shallow-deep feature alignment*, SDFA, which keeps deep features at the places
of the shallow ones; *score aggregation*, SA, which sums over the prototypes of a class alone).
:mod:`gossamer.evaluate.part_scores` measures whether such explanations can be trusted, and
:mod:`gossamer.evaluate.prototype_training` trains.

Sources: Chen et al., "This Looks Like That: Deep Learning for Interpretable Image Recognition",
NeurIPS 2019, arXiv:1806.10574; Huang et al., "Evaluation and Improvement of Interpretability for
Self-Explainable Part-Prototype Networks", ICCV 2023, arXiv:2212.05946, and its published code
where the paper is silent (which map is scored, which rows are aligned).

Shapes: B images, C channels, D channels of a prototype, K classes, n prototypes a class, M = n K
prototypes, H x W positions of the map, N = H W.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import GossamerError, InputError, first_line
from gossamer.core.task import device_of, evaluating

Similarity = Literal["cosine", "log_l2"]
HeadKind = Literal["sa", "linear"]

EPSILON = 1e-4
"""Of the logarithm: a distance of 0 has the similarity log(1 / 1e-4) = 9.21."""
SMALLEST_GRID = 4
"""Positions each way that the deep map must have, where it is not chosen by number."""
_UPSAMPLED_AT_ONCE = 64


# The backbone


class FeatureMaps(nn.Module):
    """A deep and a shallow map of any image network.

    Networks with timm's ``forward_intermediates`` are asked for their levels (the classifier is
    not run); of others the last output of each size, ``[B, C, height, width]``, is a level.

    Args:
        backbone: an image network; not copied.
        example_inputs: images of the size that is going to be used.
        deep: number of the level that prototypes look at. Default: the last of at least 4 x 4
            positions.
        shallow: number of the level that SDFA aligns it with. Default: the first at a quarter of
            the image's side or less that can be cut into the deep map's cells (layer1 of a
            ResNet).

    Attributes:
        backbone: the network.
        shapes: channels, height and width of every level.
        deep: number of the deep level.
        shallow: number of the shallow level; None if there is none.

    Raises:
        InputError: if the network does not accept the images, or shows no such maps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        example_inputs: Tensor,
        *,
        deep: int | None = None,
        shallow: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self._asked = hasattr(backbone, "forward_intermediates")
        example = example_inputs[:1].to(device_of(backbone))
        with evaluating(backbone):
            try:
                levels = self._intermediates(example) if self._asked else self._watched(example)
            except GossamerError:
                raise
            # Whatever the network raises on an input of the wrong kind.
            except Exception as error:
                raise InputError(
                    f"the backbone does not accept images of {tuple(example.shape[1:])}: "
                    f"{first_line(error)}"
                ) from error
        self.shapes = [(int(m.shape[1]), int(m.shape[2]), int(m.shape[3])) for m in levels]
        self._size = (int(example.shape[2]), int(example.shape[3]))
        self.deep = self._choose_deep(deep)
        self.shallow = self._choose_shallow(shallow)
        self._wanted = [i for i in (self.shallow, self.deep) if i is not None]

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """The shallow map (None if there is none) and the deep map of ``images``."""
        if self._asked:
            maps = self._intermediates(images, sorted(set(self._wanted)))
        else:
            levels = self._watched(images)
            maps = [levels[i] for i in sorted(set(self._wanted))]
        return (None if self.shallow is None else maps[0]), maps[-1]

    def _intermediates(self, images: Tensor, wanted: Sequence[int] | None = None) -> list[Tensor]:
        backbone: Any = self.backbone
        indices = None if wanted is None else list(wanted)
        return list(backbone.forward_intermediates(images, indices, intermediates_only=True))

    def _watched(self, images: Tensor) -> list[Tensor]:
        last: dict[tuple[int, int], Tensor] = {}

        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                size = (int(output.shape[2]), int(output.shape[3]))
                last.pop(size, None)  # the order is that of the last time
                last[size] = output

        handles = [module.register_forward_hook(see) for module in self.backbone.modules()]
        try:
            self.backbone(images)
        finally:
            for handle in handles:
                handle.remove()
        if not last:
            raise InputError(
                "the backbone shows no maps [batch, channels, height, width] that prototypes "
                "could look at; choose a convolutional network, or one of timm"
            )
        return list(last.values())

    def _choose_deep(self, deep: int | None) -> int:
        listed = ", ".join(f"{h} x {w}" for _, h, w in self.shapes)
        if deep is not None:
            if not -len(self.shapes) <= deep < len(self.shapes):
                raise InputError(
                    f"the backbone has no level {deep}; its maps at this size are {listed}"
                )
            return deep % len(self.shapes)
        for number in reversed(range(len(self.shapes))):
            if min(self.shapes[number][1:]) >= SMALLEST_GRID:
                return number
        raise InputError(
            f"the maps of the backbone are {listed} for images of {self._size[0]} x "
            f"{self._size[1]}, too coarse to tell parts apart; use larger images"
        )

    def _choose_shallow(self, shallow: int | None) -> int | None:
        _, height, width = self.shapes[self.deep]
        for number in range(self.deep) if shallow is None else [shallow % len(self.shapes)]:
            _, h, w = self.shapes[number]
            small = shallow is not None or (4 * h <= self._size[0] and 4 * w <= self._size[1])
            if small and h % height == 0 and w % width == 0:
                return number
        if shallow is not None:
            _, h, w = self.shapes[shallow % len(self.shapes)]
            raise InputError(
                f"level {shallow} has {h} x {w} positions, which cannot be cut into the deep "
                f"map's {height} x {width} cells"
            )
        return None


# Heads


class LinearHead(nn.Module):
    """Every prototype speaks for or against every class: 1 for its own, -0.5 for the others.

    Args:
        prototype_classes: owner of each prototype, ``[M]``.
        classes: K.
    """

    def __init__(self, prototype_classes: Tensor, classes: int) -> None:
        super().__init__()
        own = F.one_hot(prototype_classes, classes).T.float()
        self.weight = nn.Parameter(1.5 * own - 0.5)

    def forward(self, scores: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the prototypes' scores ``[B, M]``."""
        return F.linear(scores, self.weight)

    def weights(self) -> Tensor:
        """What each prototype's score is multiplied with in each logit, ``[K, M]``."""
        return self.weight


class ScoreAggregation(nn.Module):
    """The SA module: a weighted sum over the prototypes of a class, and nothing from others.

    Weights are n softmax(a) within a class: positive, and n in sum.

    Args:
        classes: K.
        per_class: n.
    """

    def __init__(self, classes: int, per_class: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(classes, per_class))

    def importance(self) -> Tensor:
        """Weight of each prototype in the logit of its class, ``[K, n]``."""
        return self.a.shape[1] * self.a.softmax(1)

    def forward(self, scores: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the prototypes' scores ``[B, M]``."""
        return (scores.view(len(scores), *self.a.shape) * self.importance()).sum(2)

    def weights(self) -> Tensor:
        """What each prototype's score is multiplied with in each logit, ``[K, M]``."""
        return torch.block_diag(*self.importance())


# The network


@dataclass(frozen=True)
class Answer:
    """Everything a part-prototype network computes for a batch.

    Attributes:
        logits: ``[B, K]``.
        activations: how much each place looks like each prototype, ``[B, M, H, W]``.
        scores: the best of each map, ``[B, M]``; the head weighs these.
        distances: the least distance to each prototype, ``[B, M]``: squared, or minus the cosine.
        deep: the backbone's last map, ``[B, C, H, W]``.
        shallow: its shallow map, or None.
    """

    logits: Tensor
    activations: Tensor
    scores: Tensor
    distances: Tensor
    deep: Tensor
    shallow: Tensor | None


@dataclass(frozen=True)
class Explanation:
    """Why a class got its logit, for each image of a batch.

    Attributes:
        classes: the class that is explained, ``[B]``.
        logits: ``[B, K]``.
        contributions: of every prototype to that class's logit; their sum is the logit,
            ``[B, M]``.
        prototypes: those that contribute most (either way), the first most, ``[B, top]``.
        maps: their activation, upsampled to the image, ``[B, top, height, width]``.
        positions: row and column of the maps' first maximum, pixels, ``[B, top, 2]``.
    """

    classes: Tensor
    logits: Tensor
    contributions: Tensor
    prototypes: Tensor
    maps: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Patches:
    """For each prototype the training patch of its class that it looks most like.

    Attributes:
        images: place of the image in the order it was given, ``[M]``; -1 for a class of which no
            image was given.
        positions: row and column of the patch in the map, ``[M, 2]``.
        distances: squared distance, or minus the cosine, ``[M]``.
        boxes: top, left, bottom, right in pixels (both ends included) of the region that holds the
            5 % highest activations of the upsampled map, ``[M, 4]``.
    """

    images: Tensor
    positions: Tensor
    distances: Tensor
    boxes: Tensor


class PartPrototypeNet(nn.Module):
    """A classifier whose logits are sums over parts that look like prototypes.

    ``similarity="log_l2", head="linear", align=False`` is ProtoPNet; the defaults are the improved
    model. All other combinations are ablations.

    Args:
        backbone: an image network, see :class:`FeatureMaps`; its classifier is not used.
        num_classes: K, 2 or more.
        per_class: prototypes of each class, n.
        dim: channels of a prototype. Default: 64 (cosine) or 128 (log_l2).
        similarity: "cosine": z . p / |p| with unnormalised z as activation and minus the cosine as
            distance; "log_l2": log((d + 1) / (d + 1e-4)) of the squared distance d.
        head: "sa" or "linear".
        align: whether training aligns deep with shallow features (SDFA).
        example_inputs: images of the size that is going to be used, ``[B, channels, height,
            width]``. Default: the size of the backbone's ``default_cfg``.
        deep: level of the backbone, see :class:`FeatureMaps`.
        shallow: level of the backbone.

    Attributes:
        prototypes: ``[M, D]``; prototype j belongs to class floor(j / n).
        prototype_classes: ``[M]``.

    Raises:
        InputError: if the backbone shows no maps that fit, or an option is out of range.
    """

    prototype_classes: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        per_class: int = 10,
        dim: int | None = None,
        similarity: Similarity = "cosine",
        head: HeadKind = "sa",
        align: bool = True,
        *,
        example_inputs: Tensor | None = None,
        deep: int | None = None,
        shallow: int | None = None,
    ) -> None:
        super().__init__()
        dim = dim or (64 if similarity == "cosine" else 128)
        if num_classes < 2 or per_class < 1 or dim < 1:
            raise InputError(
                "part prototypes need 2 classes or more, and 1 or more prototypes a class and "
                f"channels a prototype, not {num_classes}, {per_class} and {dim}"
            )
        if similarity not in ("cosine", "log_l2") or head not in ("sa", "linear"):
            raise InputError(
                "the similarity is cosine or log_l2 and the head sa or linear, not "
                f"{similarity!r:.40} and {head!r:.40}"
            )
        if example_inputs is None:
            example_inputs = _default_inputs(backbone)
        self.num_classes, self.per_class, self.dim = num_classes, per_class, dim
        self.similarity: Similarity = similarity
        self.align = align
        self.features = FeatureMaps(backbone, example_inputs, deep=deep, shallow=shallow)
        if align and self.features.shallow is None:
            listed = ", ".join(f"{h} x {w}" for _, h, w in self.features.shapes)
            raise InputError(
                f"of the backbone's maps ({listed}) none is shallow and can be cut into the cells "
                "of the deep one; use another image size, choose the levels, or do not align"
            )
        channels = self.features.shapes[self.features.deep][0]
        layers: list[nn.Module] = [nn.Conv2d(channels, dim, 1)]
        if similarity == "log_l2":
            layers += [nn.ReLU(), nn.Conv2d(dim, dim, 1)]
        self.add_on = nn.Sequential(*layers, nn.Sigmoid())
        for layer in self.add_on:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.rand(num_classes * per_class, dim))
        owners = torch.arange(num_classes).repeat_interleave(per_class)
        self.register_buffer("prototype_classes", owners, persistent=False)
        self.head: LinearHead | ScoreAggregation = (
            ScoreAggregation(num_classes, per_class)
            if head == "sa"
            else LinearHead(owners, num_classes)
        )

    def answer(self, images: Tensor) -> Answer:
        """All that is computed for ``images`` ``[B, channels, height, width]``."""
        shallow, deep = self.features(images)
        activations, scores, distances = self.compare(self.add_on(deep))
        return Answer(self.head(scores), activations, scores, distances, deep, shallow)

    def compare(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activations ``[B, M, H, W]``, scores and distances ``[B, M]`` of a map ``[B, D, H, W]``.

        arXiv:1806.10574, section 2.1; for cosines as in arXiv:2212.05946's code.
        """
        if self.similarity == "cosine":
            kernel = F.normalize(self.prototypes, dim=1)[:, :, None, None]
            activations = F.conv2d(z, kernel)
            cosines = activations / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
            return activations, activations.amax((2, 3)), -cosines.amax((2, 3))
        distances = squared_distances(z, self.prototypes)
        activations = ((distances + 1.0) / (distances + EPSILON)).log()
        return activations, activations.amax((2, 3)), distances.amin((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images).logits

    def prototype_maps(self, images: Tensor) -> Tensor:
        """Activation of each prototype at each place, ``[B, M, H, W]``."""
        return self.answer(images).activations

    def own(self, values: Tensor, classes: Tensor) -> Tensor:
        """Of what belongs to prototypes, ``[B, M, ...]``, that of one class an image.

        Args:
            values: by image and prototype.
            classes: one an image, ``[B]``.

        Returns:
            ``[B, n, ...]``.
        """
        split = values.unflatten(1, (self.num_classes, self.per_class))
        return split[torch.arange(len(values), device=values.device), classes]

    @torch.no_grad()
    def normalise(self) -> None:
        """Gives cosine prototypes unit length (after each step of the optimizer)."""
        if self.similarity == "cosine":
            self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    def explain(
        self, images: Tensor, classes: Tensor | None = None, *, top: int | None = None
    ) -> Explanation:
        """Which places of each image look like which prototypes, and what that adds to a logit.

        Args:
            images: ``[B, channels, height, width]``.
            classes: whose logit is explained, ``[B]``. Default: the predicted ones.
            top: prototypes shown. Default: n.

        Raises:
            InputError: if a class is out of range.
        """
        images = images.to(device_of(self))
        with evaluating(self):
            answer = self.answer(images)
            if classes is None:
                classes = answer.logits.argmax(1)
            check_labels(classes, self.num_classes)
            classes = classes.to(answer.logits.device)
            contributions = self.head.weights()[classes] * answer.scores
            count = min(top or self.per_class, contributions.shape[1])
            chosen = contributions.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
            some = answer.activations[torch.arange(len(images))[:, None], chosen]
            height, width = images.shape[2:]
            maps = upsample(some, (height, width))
            positions = peaks(maps)
        return Explanation(classes, answer.logits, contributions, chosen, maps, positions)

    def nearest_patches(self, loader: Iterable[Any]) -> Patches:
        """The patch of its own class that each prototype looks most like.

        Args:
            loader: batches that begin with images and labels, unshuffled and not augmented.

        Raises:
            InputError: if there are no images, or a label is out of range.
        """
        return self._search(loader)[0]

    def push(self, loader: Iterable[Any]) -> Patches:
        """Replaces each prototype by the patch of its own class that is closest to it.

        A prototype of a class without images stays as it is (its image is -1).

        Args:
            loader: batches that begin with images and labels: the training images, unshuffled and
                not augmented.

        Returns:
            Where the prototypes come from.

        Raises:
            InputError: if there are no images, or a label is out of range.
        """
        patches, vectors = self._search(loader)
        with torch.no_grad():
            found = (patches.images >= 0).to(vectors.device)
            self.prototypes.copy_(torch.where(found[:, None], vectors, self.prototypes))
        self.normalise()
        return patches

    def _search(self, loader: Iterable[Any]) -> tuple[Patches, Tensor]:
        device = device_of(self)
        count = len(self.prototypes)
        best = torch.full((count,), math.inf, device=device)
        image = torch.full((count,), -1, device=device)
        place = torch.zeros(count, dtype=torch.int64, device=device)
        vectors = torch.zeros(count, self.dim, device=device)
        maps: Tensor | None = None
        seen = 0
        size, width = (1, 1), 1
        every = torch.arange(count, device=device)
        with evaluating(self):
            for batch in loader:
                images, labels = batch[0].to(device), batch[1].to(device)
                check_labels(labels, self.num_classes)
                z = self.add_on(self.features(images)[1])
                activations, _, _ = self.compare(z)
                far = self._distance_maps(z)
                foreign = labels[:, None] != self.prototype_classes
                far = far.flatten(2).masked_fill(foreign[:, :, None], math.inf)
                size, width = (int(images.shape[2]), int(images.shape[3])), z.shape[3]
                least, cell = far.transpose(0, 1).flatten(1).min(1)
                row, position = cell // far.shape[2], cell % far.shape[2]
                closer = least < best
                if maps is None:
                    maps = torch.zeros_like(activations[0])
                best = torch.where(closer, least, best)
                image = torch.where(closer, seen + row, image)
                place = torch.where(closer, position, place)
                patch = z.flatten(2)[row, :, position]
                vectors = torch.where(closer[:, None], patch, vectors)
                maps = torch.where(closer[:, None, None], activations[row, every], maps)
                seen += len(images)
        if maps is None:
            raise InputError("there are no images in which patches could be looked for")
        boxes = torch.cat([high_boxes(some, size) for some in maps.split(_UPSAMPLED_AT_ONCE)])
        positions = torch.stack((place // width, place % width), 1)
        patches = Patches(image.cpu(), positions.cpu(), best.cpu(), boxes.cpu())
        # Clones: what was made in inference mode cannot be saved for a gradient later.
        return patches, vectors.clone()

    def _distance_maps(self, z: Tensor) -> Tensor:
        if self.similarity == "log_l2":
            return squared_distances(z, self.prototypes)
        unit = F.normalize(self.prototypes, dim=1)[:, :, None, None]
        return -F.conv2d(F.normalize(z, dim=1), unit)


def _default_inputs(backbone: nn.Module) -> Tensor:
    size = (getattr(backbone, "default_cfg", None) or {}).get("input_size")
    if size is None:
        raise InputError("the backbone does not say which images it takes; give example_inputs")
    return torch.zeros(1, *size)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuses class indices that are not in 0 .. classes - 1.

    Raises:
        InputError: if there is one.
    """
    odd = labels[(labels < 0) | (labels >= classes)]
    if len(odd):
        raise InputError(f"there is a label {int(odd[0])}, but the network has {classes} classes")


# Maps


def squared_distances(z: Tensor, prototypes: Tensor) -> Tensor:
    """``|z(h, w) - p_j|^2`` as one convolution, ``[B, M, H, W]`` (arXiv:1806.10574).

    Args:
        z: ``[B, D, H, W]``.
        prototypes: ``[M, D]``.
    """
    cross = F.conv2d(z, prototypes[:, :, None, None])
    own = prototypes.square().sum(1)[:, None, None]
    return F.relu(z.square().sum(1, keepdim=True) - 2.0 * cross + own)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``[B, m, H, W]`` at the size of the image, bicubic."""
    return F.interpolate(maps, size=size, mode="bicubic", align_corners=False)


def peaks(maps: Tensor) -> Tensor:
    """Row and column, ``[..., 2]``, of the first maximum of maps ``[..., height, width]``."""
    at = maps.flatten(-2).argmax(-1)
    return torch.stack((at // maps.shape[-1], at % maps.shape[-1]), -1)


def high_boxes(maps: Tensor, size: tuple[int, int], share: float = 0.05) -> Tensor:
    """Boxes around the highest activations of upsampled maps, as ProtoPNet shows its prototypes.

    Args:
        maps: ``[m, H, W]``.
        size: height and width of the image, pixels.
        share: of the pixels that a box must hold.

    Returns:
        Top, left, bottom, right, both ends included, ``[m, 4]``.
    """
    large = upsample(maps[:, None].float(), size)[:, 0]
    flat = large.flatten(1)
    keep = max(1, round(share * flat.shape[1]))
    limit = flat.topk(keep, dim=1).values[:, -1]
    high = large >= limit[:, None, None]
    rows, columns = high.any(2), high.any(1)
    ends = [
        (rows.int().argmax(1), rows.shape[1] - 1 - rows.flip(1).int().argmax(1)),
        (columns.int().argmax(1), columns.shape[1] - 1 - columns.flip(1).int().argmax(1)),
    ]
    return torch.stack((ends[0][0], ends[1][0], ends[0][1], ends[1][1]), 1)


# Losses


def cluster_and_separation(
    distances: Tensor, labels: Tensor, prototype_classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean least distance to a prototype of the own class, and to one of another class.

    arXiv:1806.10574, section 2.2. The published code takes the minima through
    ``max((limit - d) mask)``; here they are masked minima, which need no limit.

    Args:
        distances: ``[B, M]``.
        labels: ``[B]``.
        prototype_classes: ``[M]``.

    Returns:
        The cluster cost (to be lowered) and the separation (to be raised).
    """
    own = labels[:, None] == prototype_classes
    cluster = distances.masked_fill(~own, math.inf).amin(1).mean()
    separation = distances.masked_fill(own, math.inf).amin(1).mean()
    return cluster, separation


def orthogonality(prototypes: Tensor) -> Tensor:
    """Sum over classes of ``|P P^T - I|``, entry by entry.

    Args:
        prototypes: by class, ``[K, n, D]``.
    """
    gram = prototypes @ prototypes.transpose(1, 2)
    return (gram - torch.eye(gram.shape[1], device=gram.device)).abs().sum()


def cross_class_sparsity(weights: Tensor, prototype_classes: Tensor) -> Tensor:
    """Sum of absolute weights between prototypes and other classes than their own.

    Args:
        weights: ``[K, M]``.
        prototype_classes: ``[M]``.
    """
    foreign = torch.arange(len(weights), device=weights.device)[:, None] != prototype_classes
    return (weights.abs() * foreign).sum()


def fold(shallow: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cuts a map into cells and puts the pixels of each cell side by side into channels.

    Args:
        shallow: ``[B, C, height, width]``.
        grid: cells each way, H and W.

    Returns:
        ``[B, C (height / H) (width / W), H, W]``.

    Raises:
        InputError: if the map cannot be cut so.
    """
    batch, channels, height, width = shallow.shape
    if height % grid[0] or width % grid[1]:
        raise InputError(
            f"a map of {height} x {width} positions cannot be cut into {grid[0]} x {grid[1]} cells"
        )
    down, across = height // grid[0], width // grid[1]
    cells = shallow.view(batch, channels, grid[0], down, grid[1], across)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, *grid)


def spatial_similarity(features: Tensor) -> Tensor:
    """Cosines between all positions of a map ``[B, C, H, W]``: ``[B, N, N]``."""
    unit = F.normalize(features.flatten(2), dim=1)
    return unit.transpose(1, 2) @ unit


def alignment(deep: Tensor, shallow: Tensor, activations: Tensor, delta: float = 0.1) -> Tensor:
    """Shallow-deep feature alignment (SDFA).

    At the place where a prototype is most active, the similarities to all other places must be the
    shallow map's, up to ``delta``. No gradient reaches the shallow map.

    Args:
        deep: the last map before the add-on layers, ``[B, C, H, W]``.
        shallow: ``[B, C', height, width]``, a whole number of pixels for each of the H x W cells.
        activations: of the image's own prototypes, ``[B, n, H, W]``.
        delta: difference that costs nothing.

    Returns:
        The mean over images, prototypes and places (arXiv:2212.05946, section 4; the choice of
        rows is its code's).
    """
    grid = (int(deep.shape[2]), int(deep.shape[3]))
    own = spatial_similarity(deep)
    target = spatial_similarity(fold(shallow.detach(), grid))
    rows = activations.flatten(2).argmax(2)
    difference = (own - target).gather(1, rows[:, :, None].expand(-1, -1, own.shape[2]))
    return F.relu(difference.abs() - delta).mean()
