"""A light segmentation network from few labels: two teachers, three granularities (MGD).

Source: Qin et al., "Multi-granularity distillation scheme towards lightweight semi-supervised
semantic segmentation", arXiv:2208.10169 (not masked generative distillation, which has the same
initials). A wide and a deep teacher, both trained with few labels already, teach a student by
pixel-wise pseudo-labels, by the self-similarity of regions and by the global content of images.

The teachers run in evaluation mode. The authors' loop leaves them in training mode, where their
running statistics drift although their weights are frozen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, fit
from gossamer.core.graph import GraphNetwork
from gossamer.core.network import Network
from gossamer.core.saved import load_network
from gossamer.core.segmentation import IGNORED, Segmentation, pixel_cross_entropy
from gossamer.core.task import Batch, Task, logits_of, seed_of
from gossamer.datasets.segmentation import labelled_rows
from gossamer.models.segmentation import segmentation_network
from gossamer.parts.distillation import frozen_teacher
from gossamer.parts.masks import Masks
from gossamer.parts.taps import tapped

Term = Literal["labelled", "unlabelled", "image", "region"]
TERMS: tuple[Term, ...] = ("labelled", "unlabelled", "image", "region")

Imitated = Literal["logits", "structure", "channels", "variation"]


def box_cutmix_mask(
    batch: int,
    height: int,
    width: int,
    *,
    boxes: int = 3,
    share: tuple[float, float] = (0.25, 0.5),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks of random boxes; where boxes overlap they cancel.

    The area of a box is drawn uniformly from ``share`` of the image, divided among the boxes.

    Args:
        batch: masks.
        height: pixels.
        width: pixels.
        boxes: in each mask.
        share: smallest and largest area of a box, times the number of boxes.
        generator: draws; None takes torch's own state, which training forks and seeds each step.

    Returns:
        0 or 1, ``[batch, 1, height, width]``.

    Raises:
        InputError: if the numbers leave no box.
    """
    low, high = share
    if boxes < 1 or not 0.0 < low <= high <= 1.0:
        raise InputError(f"CutMix needs 1 box or more and areas in 0..1, not {boxes} and {share}")
    area, shape, top, left = torch.rand(4, batch, boxes, generator=generator)
    area = low + (high - low) * area
    tall = (area**shape * math.sqrt(1.0 / boxes) * height).round()
    broad = (area ** (1.0 - shape) * math.sqrt(1.0 / boxes) * width).round()
    return flipped_boxes(
        ((height - tall) * top).round(),
        ((width - broad) * left).round(),
        tall,
        broad,
        (height, width),
    )


def flipped_boxes(
    top: Tensor, left: Tensor, tall: Tensor, broad: Tensor, size: tuple[int, int]
) -> Tensor:
    """1 where an odd number of boxes (each argument ``[batch, boxes]``, pixels) lies.

    Returns:
        ``[batch, 1, *size]``.
    """
    rows = torch.arange(size[0]).view(1, 1, -1)
    columns = torch.arange(size[1]).view(1, 1, -1)
    inside_rows = (rows >= top[..., None]) & (rows < (top + tall)[..., None])
    inside_columns = (columns >= left[..., None]) & (columns < (left + broad)[..., None])
    count = torch.einsum("bkh,bkw->bhw", inside_rows.float(), inside_columns.float())
    return (count % 2).unsqueeze(1)


def mixed(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """``first`` where the mask is 0, ``second`` where it is 1."""
    return first * (1.0 - mask) + second * mask


def image_level_loss(
    student: Tensor, teacher: Tensor, *, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Absolute difference of globally pooled logits (section 3.4, image level).

    Args:
        student: logits ``[batch, classes, height, width]``.
        teacher: logits with the same batch and classes.
        reduction: the authors sum over batch and classes, so their weight depends on both.
    """
    difference = (student.mean((2, 3)) - teacher.detach().mean((2, 3))).abs()
    return difference.sum() if reduction == "sum" else difference.mean()


def region_similarity(features: Tensor, region: int = 7) -> Tensor:
    """Cosine similarity of each region with each other, ``[batch, region^2, region^2]``.

    Args:
        features: ``[batch, channels, height, width]``, pooled to ``region x region``.
        region: regions a side.
    """
    pooled = F.adaptive_avg_pool2d(features, region).flatten(2)
    directions = F.normalize(pooled, dim=1)
    return directions.transpose(1, 2) @ directions


def region_level_loss(student: Tensor, teacher: Tensor, *, region: int = 7) -> Tensor:
    """Mean squared difference of self-similarities; channel counts may differ."""
    difference = region_similarity(student, region) - region_similarity(teacher.detach(), region)
    return difference.square().mean()


def hard_pixel_cross_entropy(
    logits: Tensor, masks: Tensor, *, threshold: float = 0.7, kept: int = 50_000
) -> Tensor:
    """Cross-entropy of the pixels whose class has a probability below ``threshold``.

    At least the ``kept`` hardest pixels of the batch count (Shrivastava et al.,
    arXiv:1604.03540; the authors use it on Cityscapes).
    """
    each = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="none")[masks != IGNORED]
    if each.numel() == 0:
        return logits.sum() * 0.0
    ordered = each.sort(descending=True).values
    floor = ordered[min(kept, each.numel()) - 1].detach()
    hard = each >= torch.clamp(floor, max=-math.log(threshold))
    return each[hard].mean()


def logit_imitation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence (teacher || student) of each pixel's classes, averaged over pixels."""
    each = F.kl_div(
        F.log_softmax(student, 1), F.log_softmax(teacher.detach(), 1),
        log_target=True, reduction="none",
    )  # fmt: skip
    return each.sum(1).mean()


def channel_imitation(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL divergence of where each channel is active (Shu et al., arXiv:2011.13256).

    Args:
        student: logits ``[batch, classes, height, width]``.
        teacher: logits of the same shape.
        temperature: of the softmax over positions.
    """
    ours = F.log_softmax(student.flatten(2) / temperature, 2)
    theirs = F.log_softmax(teacher.detach().flatten(2) / temperature, 2)
    each = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(2)
    return temperature**2 * each.mean()


def variation_imitation(student: Tensor, teacher: Tensor, classes: Tensor, count: int) -> Tensor:
    """Squared difference of each pixel's similarity to the mean feature of its class.

    Source: Wang et al., "Intra-class feature variation distillation for semantic segmentation"
    (ECCV 2020).

    Args:
        student: features ``[batch, channels, height, width]``.
        teacher: features ``[batch, other channels, height, width]``.
        classes: class index of each pixel, or :data:`IGNORED`, at any resolution.
        count: classes.
    """
    size = (student.shape[2], student.shape[3])
    at = F.interpolate(classes.unsqueeze(1).float(), size=size, mode="nearest-exact").long()
    known = (at != IGNORED).flatten(1)
    members = F.one_hot(at.flatten(1).clamp(max=count), count + 1)[..., :count].float()

    def similarity(features: Tensor) -> Tensor:
        flat = F.adaptive_avg_pool2d(features, size).flatten(2)
        centre = flat @ members / members.sum(1, keepdim=True).clamp(min=1)
        return F.cosine_similarity(flat, centre @ members.transpose(1, 2), dim=1)

    difference = (similarity(student) - similarity(teacher.detach())).square() * known
    return difference.sum() / known.sum().clamp(min=1)


def polynomial(fraction: float, power: float = 0.9) -> float:
    """Learning-rate multiplier ``(1 - fraction)^power``."""
    return (1.0 - min(1.0, fraction)) ** power


class SemiSupervised(Rule):
    """Learns from a labelled batch and two unlabelled ones, which are mixed by boxes.

    Batches are dicts: "labelled" (images, masks), "unlabelled" and "other" (images, anything).

    Args:
        network: what is trained.
        optimizer: owns its parameters. Default: SGD with momentum .9, learning rate ``lr`` and
            weight decay 1e-4.
        lr: learning rate at the start, which falls polynomially.
        after_step: called after the optimizer's step.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        lr: float = 0.005,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self.network = network
        self.optimizer = optimizer or torch.optim.SGD(
            self.trained(), lr=lr, momentum=0.9, weight_decay=1e-4
        )
        self.after_step = after_step
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are updated."""
        return list(self.network.parameters())

    def losses(self, labelled: Batch, first: Tensor, second: Tensor, mask: Tensor) -> Log:
        """The terms whose sum is minimised, by name.

        Args:
            labelled: images and masks.
            first: unlabelled images ``[batch, channels, height, width]``.
            second: as many others.
            mask: ``[batch, 1, height, width]``.
        """
        return {
            "supervised": pixel_cross_entropy(logits_of(self.network(labelled[0])), labelled[1])
        }

    def step(self, batch: Mapping[str, Batch]) -> Log:
        multiplier = polynomial(self.run.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        self.optimizer.zero_grad(set_to_none=True)
        first, second = batch["unlabelled"][0], batch["other"][0]
        mask = box_cutmix_mask(len(first), *first.shape[2:]).to(first.device)
        with self.run.accelerator.autocast():
            terms = self.losses(batch["labelled"], first, second, mask)
            loss = torch.stack([torch.as_tensor(term) for term in terms.values()]).sum()
        self.backward(loss)
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        return {"loss": loss.detach()}


class CPS(SemiSupervised):
    """Cross pseudo supervision: two networks, each learning the other's decisions.

    Source: Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision",
    arXiv:2106.01226, with CutMix (section 3.3).

    Args:
        network: the one that is kept.
        partner: another of the same kind, initialised differently.
        weight: of the pseudo-labels (1.5 in the paper with CutMix; 1 for VOC and 5 for Cityscapes
            where it makes teachers).
        **options: of :class:`SemiSupervised`.
    """

    def __init__(
        self, network: nn.Module, partner: nn.Module, *, weight: float = 1.0, **options: Any
    ) -> None:
        self.partner = partner
        self.weight = weight
        super().__init__(network, **options)

    def trained(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *self.partner.parameters()]

    def losses(self, labelled: Batch, first: Tensor, second: Tensor, mask: Tensor) -> Log:
        pair = {"network": self.network, "partner": self.partner}
        with torch.no_grad():
            decided = {
                name: mixed(logits_of(one(first)), logits_of(one(second)), mask).argmax(1)
                for name, one in pair.items()
            }
        both = mixed(first, second, mask)
        terms: Log = {}
        for name, other in (("network", "partner"), ("partner", "network")):
            one = pair[name]
            terms[f"supervised {name}"] = pixel_cross_entropy(
                logits_of(one(labelled[0])), labelled[1]
            )
            terms[f"pseudo {name}"] = self.weight * pixel_cross_entropy(
                logits_of(one(both)), decided[other]
            )
        return terms


class MGD(SemiSupervised):
    """Multi-granularity distillation from a wide and a deep teacher.

    Args:
        student: what is trained.
        wide: gives pseudo-labels and region similarities; None leaves it out.
        deep: gives pseudo-labels and the content of images; None leaves it out.
        lambda_img: of the image-level sum (.002 for ResNet-18 on VOC).
        lambda_reg: of the region-level mean (100 for ResNet-18 on VOC).
        region: regions a side.
        feature: layer whose maps the student's regions are compared by; None takes the logits.
        wide_feature: the same of the wide teacher.
        terms: which losses are added to the supervised one.
        image_reduction: see :func:`image_level_loss`.
        hard_pixels: the supervised loss keeps hard pixels, at least so many a batch; None keeps
            all.
        reverse: adds the cross-entropy of the teachers under the student's decisions, as the
            authors log it. Nobody learns from it: the teachers are frozen.
        **options: of :class:`SemiSupervised`.

    Raises:
        InputError: if a weight is negative or there is no such term.
    """

    def __init__(
        self,
        student: nn.Module,
        wide: nn.Module | None,
        deep: nn.Module | None,
        *,
        lambda_img: float = 0.002,
        lambda_reg: float = 100.0,
        region: int = 7,
        feature: str | None = "decoder",
        wide_feature: str | None = "decoder",
        terms: tuple[Term, ...] = TERMS,
        image_reduction: Literal["sum", "mean"] = "sum",
        hard_pixels: int | None = None,
        reverse: bool = False,
        **options: Any,
    ) -> None:
        if lambda_img < 0.0 or lambda_reg < 0.0 or region < 1:
            raise InputError(
                "distillation weights are 0 or more and there is 1 region or more, not "
                f"{lambda_img}, {lambda_reg} and {region}"
            )
        if unknown := sorted(set(terms) - set(TERMS)):
            raise InputError(f"there is no loss {unknown[0]!r:.60}; there are: {', '.join(TERMS)}")
        self.wide = None if wide is None else frozen_teacher(wide)
        self.deep = None if deep is None else frozen_teacher(deep)
        self.lambda_img = lambda_img
        self.lambda_reg = lambda_reg
        self.region = region
        self.feature = feature
        self.wide_feature = wide_feature
        self.terms = terms
        self.image_reduction: Literal["sum", "mean"] = image_reduction
        self.hard_pixels = hard_pixels
        self.reverse = reverse
        super().__init__(student, **options)

    def losses(self, labelled: Batch, first: Tensor, second: Tensor, mask: Tensor) -> Log:
        images, truth = labelled
        both = mixed(first, second, mask)
        on_labelled = logits_of(self.network(images))
        on_both, features = tapped(self.network, self.feature, partial(self.network, both))
        if self.hard_pixels is None:
            terms: Log = {"supervised": pixel_cross_entropy(on_labelled, truth)}
        else:
            terms = {
                "supervised": hard_pixel_cross_entropy(on_labelled, truth, kept=self.hard_pixels)
            }
        teachers = (("wide", self.wide, self.wide_feature), ("deep", self.deep, None))
        for name, teacher, layer in teachers:
            if teacher is None:
                continue
            with torch.no_grad():
                # In evaluation mode samples do not see each other, so one pass serves all four.
                everything = torch.cat((images, first, second, both))
                logits, maps = tapped(teacher, layer, partial(teacher, everything))
            parts = (len(images), len(first), len(second), len(both))
            known, one, two, its = logits.split(parts)
            if "labelled" in self.terms:
                terms[f"labelled {name}"] = pixel_cross_entropy(on_labelled, known.argmax(1))
            if "unlabelled" in self.terms:
                decided = mixed(one, two, mask).argmax(1)
                terms[f"unlabelled {name}"] = pixel_cross_entropy(on_both, decided)
            if name == "deep" and "image" in self.terms:
                terms["image"] = self.lambda_img * image_level_loss(
                    on_both, its, reduction=self.image_reduction
                )
            if name == "wide" and "region" in self.terms:
                terms["region"] = self.lambda_reg * region_level_loss(
                    features, maps.split(parts)[3], region=self.region
                )
            if self.reverse:
                terms[f"reverse {name}"] = self._reverse(known, its, on_labelled, on_both)
        return terms

    @staticmethod
    def _reverse(known: Tensor, its: Tensor, on_labelled: Tensor, on_both: Tensor) -> Tensor:
        return pixel_cross_entropy(known, on_labelled.argmax(1)) + pixel_cross_entropy(
            its, on_both.argmax(1)
        )


IMITATION_WEIGHTS: dict[str, float] = {
    "logits": 1.0,
    "structure": 10.0,
    "channels": 3.0,
    "variation": 50.0,
}
"""Weights of the losses of single-teacher distillation: 10 in Liu et al. (arXiv:1903.04197), 3 in
Shu et al., 50 in Wang et al."""


class Imitation(SemiSupervised):
    """Single-teacher distillation on labelled and mixed images: what MGD is compared with.

    Args:
        student: what is trained.
        teacher: frozen in evaluation mode.
        kind: "logits" (Hinton et al.), "structure" (pairwise similarity of regions, Liu et al.),
            "channels" or "variation".
        classes: how many.
        weight: of the imitation. Default: :data:`IMITATION_WEIGHTS`.
        region: regions a side, for "structure".
        feature: layer of student and teacher whose maps are compared.
        **options: of :class:`SemiSupervised`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        kind: Imitated = "logits",
        classes: int,
        weight: float | None = None,
        region: int = 7,
        feature: str | None = "decoder",
        **options: Any,
    ) -> None:
        if kind not in IMITATION_WEIGHTS:
            raise InputError(
                f"there is no imitation {kind!r:.60}; there are: {', '.join(IMITATION_WEIGHTS)}"
            )
        self.teacher = frozen_teacher(teacher)
        self.kind = kind
        self.classes = classes
        self.weight = IMITATION_WEIGHTS[kind] if weight is None else weight
        self.region = region
        self.feature = feature
        super().__init__(student, **options)

    def losses(self, labelled: Batch, first: Tensor, second: Tensor, mask: Tensor) -> Log:
        images, truth = labelled
        terms: Log = {}
        for name, seen in (("labelled", images), ("mixed", mixed(first, second, mask))):
            ours, maps = tapped(self.network, self.feature, partial(self.network, seen))
            with torch.no_grad():
                theirs, goal = tapped(
                    self.teacher,
                    self.feature,
                    partial(self.teacher, seen),
                )
            if name == "labelled":
                terms["supervised"] = pixel_cross_entropy(ours, truth)
            match self.kind:
                case "logits":
                    loss = logit_imitation(ours, theirs)
                case "structure":
                    loss = region_level_loss(maps, goal, region=self.region)
                case "channels":
                    loss = channel_imitation(ours, theirs)
                case _:
                    classes = truth if name == "labelled" else theirs.argmax(1)
                    loss = variation_imitation(maps, goal, classes, self.classes)
            terms[name] = self.weight * loss
        return terms


def feature_layer(network: nn.Module) -> str | None:
    """The layer whose maps are compared: ``decoder``, or None (the logits) where there is none.

    A network that was pruned or read from a folder runs as a graph, which has no layers.
    """
    if isinstance(network, GraphNetwork):
        return None
    return "decoder" if "decoder" in dict(network.named_children()) else None


def semi_supervised_tasks(
    task: Segmentation, share: float, seed: int = 0
) -> dict[str, Segmentation]:
    """The tasks of a rule: labels for a share of the training images, none for the others.

    The larger part comes first, so that an epoch is one pass over it.

    Raises:
        InputError: if either part would be empty.
    """
    labelled, rest = labelled_rows(task.size("train"), share, seed)
    few = task.subset("train", labelled)
    hidden = task.subset("train", rest, labelled=False)
    if len(labelled) > len(rest):
        return {"labelled": few, "unlabelled": hidden, "other": hidden}
    return {"unlabelled": hidden, "other": hidden, "labelled": few}


def mgd(
    network: Network,
    task: Task,
    *,
    wide: str = "unet:48x2",
    deep: str = "unet:16x5",
    labelled: float = 0.125,
    teacher_epochs: int = 34,
    teacher_lr: float = 0.05,
    cps_weight: float = 1.0,
    epochs: int = 34,
    batch_size: int = 16,
    lr: float = 0.005,
    lambda_img: float = 0.002,
    lambda_reg: float = 100.0,
    region: int = 7,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains a segmentation network under a wide and a deep teacher (a step of a recipe).

    Weights that an earlier step pruned stay zero.

    Args:
        network: the student; unchanged.
        task: its data, a :class:`gossamer.core.segmentation.Segmentation`.
        wide: the wide teacher: a folder with a network that gossamer wrote, or the name of one
            that is trained first, see :func:`gossamer.models.segmentation.segmentation_network`.
        deep: the deep teacher, likewise.
        labelled: share of the training images whose labels are used.
        teacher_epochs: of training teachers by cross pseudo supervision.
        teacher_lr: learning rate of that.
        cps_weight: of the pseudo-labels in that.
        epochs: passes over the larger of the labelled and the unlabelled part.
        batch_size: images a batch, of each part.
        lr: learning rate at the start; falls polynomially.
        lambda_img: of the image-level loss.
        lambda_reg: of the region-level loss.
        region: regions a side.
        seed: of labels, order and fresh teachers.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The trained student.

    Raises:
        InputError: if the task has no masks, an option is out of range, or a teacher is unknown.
    """
    if not isinstance(task, Segmentation):
        raise InputError(f"mgd needs a segmentation task, and {task.name} is none")
    if min(lr, teacher_lr) <= 0.0 or cps_weight < 0.0 or teacher_epochs < 0:
        raise InputError(
            "mgd needs learning rates above 0 and cps_weight and teacher_epochs of 0 or more, not "
            f"{lr:g}, {teacher_lr:g}, {cps_weight:g} and {teacher_epochs}"
        )
    tasks = semi_supervised_tasks(task, labelled, seed)
    student = copy.deepcopy(network.module)
    masks = Masks.of_zeros(network, student)

    def beside(part: str) -> Path | None:
        return None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{part}")

    def fresh(name: str, *parts: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("teacher", *parts, seed))
            return segmentation_network(
                name, channels=task.preprocess.channels, classes=len(task.classes)
            )

    def teacher(name: str, kind: str) -> nn.Module:
        if Path(name).is_dir():
            return load_network(Path(name))[0]
        one = fresh(name, kind, "one")
        fit(
            CPS(one, fresh(name, kind, "two"), weight=cps_weight, lr=teacher_lr),
            tasks,
            epochs=teacher_epochs,
            batch_size=batch_size,
            seed=seed_of(kind, seed),
            checkpoint=beside(kind),
            cpu=cpu,
            title=f"training the {kind} teacher",
        )
        return one

    broad, tall = teacher(wide, "wide"), teacher(deep, "deep")
    layers = feature_layer(student), feature_layer(broad)
    rule = MGD(
        student,
        broad,
        tall,
        lambda_img=lambda_img,
        lambda_reg=lambda_reg,
        region=region,
        feature=layers[0],
        wide_feature=layers[1],
        lr=lr,
        after_step=masks.hold_weights,
    )
    history = fit(
        rule,
        tasks,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        checkpoint=checkpoint,
        cpu=cpu,
        title="distilling at three granularities",
    )
    options = {
        "wide": wide,
        "deep": deep,
        "labelled": labelled,
        "teacher_epochs": teacher_epochs,
        "teacher_lr": teacher_lr,
        "cps_weight": cps_weight,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "lambda_img": lambda_img,
        "lambda_reg": lambda_reg,
        "region": region,
        "seed": seed,
    }
    report = {
        "loss": history.loss[-1] if history.loss else None,
        "labelled images": tasks["labelled"].size("train"),
        "region features": {"student": layers[0] or "logits", "wide": layers[1] or "logits"},
        "teacher validation scores": {
            "wide": task.score(broad, "validation"),
            "deep": task.score(tall, "validation"),
        },
    }
    return network.after("mgd", options, report, module=student.cpu(), **masks.stored())
