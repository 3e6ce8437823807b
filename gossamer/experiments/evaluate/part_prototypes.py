"""Consistency and stability of part prototypes: ProtoPNet against its improvement.

All contenders start from the same pretrained backbone of a seed and have the same warm and joint
epochs; those with a linear head push and train the head after that. Contenders: ProtoPNet; cosine
prototypes with orthogonality and a linear head; these with score aggregation (SA), with
shallow-deep alignment (SDFA), and with both (the full model). Controls: the full model with random
prototypes, the full model before its training (the pretrained backbone and everything else as
drawn), and peaks at random places. Learning rates were chosen by accuracy on the validation images
of seed 0, among the same three pairs for ProtoPNet, cosine + SA and the full model; the ablations
with a linear head have the full model's. The test images are scored once.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit
from gossamer.core.task import seed_of
from gossamer.datasets.creatures import creatures
from gossamer.datasets.keypoints import KeypointTask, cub, distortions
from gossamer.evaluate.part_prototypes import (
    FeatureMaps,
    HeadKind,
    PartPrototypeNet,
    Similarity,
)
from gossamer.evaluate.part_scores import PrototypeModel, consistency_score, stability_score
from gossamer.evaluate.prototype_training import (
    PooledClassifier,
    Rates,
    Schedule,
    Weights,
    improved_schedule,
    protopnet_schedule,
    train_prototypes,
)
from gossamer.experiments.real_data import folder_of

log = logging.getLogger(__name__)

BASE, FULL = "ProtoPNet", "cosine + SA + SDFA"
RANDOM, UNTRAINED, CHANCE = "random prototypes", "before training", "random places"
HALF_SIZES = (5, 10, 15)
MUS = (0.6, 0.7, 0.8, 0.9)
DELTAS = (0.05, 0.2)
"""Beside the paper's 0.1."""


@dataclass(frozen=True)
class Contender:
    """A combination of parts, and how fast it learns."""

    similarity: Similarity
    head: HeadKind
    align: bool
    rates: Rates = field(default_factory=Rates)


QUICK: Mapping[str, Contender] = {
    BASE: Contender("log_l2", "linear", False, Rates(3e-4, 1e-2, 1e-2, last=1e-3)),
    "cosine": Contender("cosine", "linear", False, Rates(1e-3, 3e-3, 3e-3, last=1e-3)),
    "cosine + SA": Contender("cosine", "sa", False, Rates(1e-3, 3e-3, 3e-3)),
    "cosine + SDFA": Contender("cosine", "linear", True, Rates(1e-3, 3e-3, 3e-3, last=1e-3)),
    FULL: Contender("cosine", "sa", True, Rates(1e-3, 3e-3, 3e-3)),
}
PAPER = {name: replace(contender, rates=Rates()) for name, contender in QUICK.items()}


@dataclass(frozen=True)
class Work:
    """What the contenders compete on.

    Attributes:
        task: of a seed.
        backbone: a pretrained network of a task and seed.
        contenders: by name.
        per_class: prototypes a class.
        base: schedule of contenders with a linear head.
        improved: schedule of those with SA.
        batch_size: images a batch.
        deltas: other values of SDFA's delta, tried on the first seed.
    """

    task: Callable[[int], KeypointTask]
    backbone: Callable[[KeypointTask, int], nn.Module]
    contenders: Mapping[str, Contender]
    per_class: int
    base: Schedule
    improved: Schedule
    batch_size: int
    deltas: tuple[float, ...] = DELTAS


def four_convolutions() -> nn.Module:
    """Maps of 32, 16, 8 and 8 positions a side for images of 64 pixels."""
    layers: list[nn.Module] = []
    plan = ((3, 16, 5, 2), (16, 32, 3, 2), (32, 48, 3, 2), (48, 64, 3, 1))
    for inputs, outputs, kernel, stride in plan:
        layers += [
            nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def pretrained_convolutions(task: KeypointTask, seed: int) -> nn.Module:
    """Four convolutions that learned the classes with a pooled linear head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("backbone", seed))
        backbone = four_convolutions()
        network = PooledClassifier(FeatureMaps(backbone, task.example_inputs[0]), len(task.classes))
    rule = Supervised(network, task, optimizer=torch.optim.Adam(network.parameters(), 3e-3))
    fit(rule, task, epochs=15, batch_size=64, seed=seed, title="backbone")
    return backbone


def pretrained_resnet(_task: KeypointTask, _seed: int) -> nn.Module:
    """ResNet-34 with ImageNet's weights, as the paper has it; timm downloads them."""
    import timm

    return timm.create_model("resnet34.tv_in1k", pretrained=True, num_classes=0)


class RandomPlaces:
    """Maps that say nothing: the level of chance.

    Args:
        like: has the prototypes' owners and the grid.
        seed: of the maps.
    """

    def __init__(self, like: PartPrototypeNet, seed: int) -> None:
        self.prototype_classes = like.prototype_classes.cpu()
        self.grid = like.features.shapes[like.features.deep][1:]
        self.generator = torch.Generator().manual_seed(seed_of("places", seed))

    def prototype_maps(self, images: Tensor) -> Tensor:
        shape = (len(images), len(self.prototype_classes), *self.grid)
        return torch.rand(shape, generator=self.generator)


def contend(work: Work, seed: int, *, sweep: bool = False) -> Iterator[Row]:
    """Trains and scores every contender for one seed.

    Args:
        work: the data, the networks and the budget.
        seed: of data, initial weights and order.
        sweep: also other values of delta.

    Yields:
        A row for each contender: accuracy, consistency and stability on the test split (percent),
        half of the consistency (for the claim on the control), and consistency under other regions
        and thresholds.
    """
    task = work.task(seed)
    backbone = work.backbone(task, seed)

    def fresh(contender: Contender) -> PartPrototypeNet:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("prototypes", seed))
            return PartPrototypeNet(
                copy.deepcopy(backbone), len(task.classes), work.per_class, None,
                contender.similarity, contender.head, contender.align,
                example_inputs=task.example_inputs[0],
            )  # fmt: skip

    def trained(contender: Contender, delta: float = 0.1) -> PartPrototypeNet:
        network = fresh(contender)
        train_prototypes(
            network, task, weights=Weights(delta=delta), rates=contender.rates, seed=seed,
            schedule=work.improved if contender.head == "sa" else work.base,
            batch_size=work.batch_size,
        )  # fmt: skip
        return network

    def row(name: str, network: PrototypeModel, accuracy: float | None, **more: Any) -> Row:
        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
            return task.keypoint_batches("test", batch_size=work.batch_size)

        consistency = consistency_score(network, batches())
        noise = torch.Generator().manual_seed(seed_of("noise", seed))
        result: dict[str, Any] = {
            "contender": name,
            "seed": seed,
            "accuracy": accuracy,
            "consistency": consistency.score,
            "half_consistency": 0.5 * consistency.score,
            "stability": stability_score(network, batches(), generator=noise).score,
            **more,
        }
        if isinstance(network, PartPrototypeNet) and not more:
            side = task.preprocess.height
            result["consistency_by_region"] = {
                str(half): {
                    str(mu): consistency_score(
                        network, batches(), max(1, round(half * side / 64)), mu
                    ).score
                    for mu in MUS
                }
                for half in HALF_SIZES
            }
        log.info("%s", result)
        return result

    full: PartPrototypeNet | None = None
    for name, contender in work.contenders.items():
        network = trained(contender)
        yield row(name, network, task.score(network, "test"))
        full = network if name == FULL else full
    assert full is not None
    yield row(CHANCE, RandomPlaces(full, seed), None)
    start = fresh(work.contenders[FULL])
    yield row(UNTRAINED, start, task.score(start, "test"))
    drawn = torch.Generator().manual_seed(seed_of("random prototypes", seed))
    with torch.no_grad():
        full.prototypes.copy_(torch.rand(full.prototypes.shape, generator=drawn))
        full.normalise()
    yield row(RANDOM, full, task.score(full, "test"))
    for delta in work.deltas if sweep else ():
        network = trained(work.contenders[FULL], delta)
        yield row(f"{FULL}, delta {delta}", network, task.score(network, "test"), delta=delta)


DRAWN = Work(
    task=lambda seed: creatures(seed=seed),
    backbone=pretrained_convolutions,
    contenders=QUICK,
    per_class=3,
    base=protopnet_schedule(12, push_from=12, last=10),
    improved=improved_schedule(12),
    batch_size=32,
)


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Drawn creatures of 64 x 64 pixels, four convolutions."""
    for number, seed in enumerate(seeds):
        yield from contend(DRAWN, seed, sweep=number == 0)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """CUB-200-2011, ResNet-34, the published schedules and augmentation.

    Raises:
        InputError: if the images are missing.
    """
    folder = folder_of("CUB_200_2011")
    work = Work(
        task=lambda seed: cub(folder, seed=seed, augment=distortions()),
        backbone=pretrained_resnet,
        contenders=PAPER,
        per_class=10,
        base=protopnet_schedule(passes=30),
        improved=improved_schedule(passes=30),
        batch_size=80,
    )
    for number, seed in enumerate(seeds):
        yield from contend(work, seed, sweep=number == 0)


def draw(result: Result, path: Path) -> None:
    """Draws the three numbers of each contender, a point a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if "delta" not in row]
    names = list(dict.fromkeys(str(row["contender"]) for row in rows))
    figure = Figure(figsize=(13.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = ("accuracy", "consistency", "stability")
    for number, metric in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for at, name in enumerate(names):
            values = [r[metric] for r in rows if r["contender"] == name and r[metric] is not None]
            if not values:
                continue
            axes.barh(at, float(np.mean(values)), color="C1" if name == FULL else "C0", alpha=0.5)
            axes.plot(values, [at] * len(values), "k.", markersize=5)
        axes.set_yticks(range(len(names)), names if number == 1 else [""] * len(names))
        axes.invert_yaxis()
        axes.set_xlim(0, 102)
        axes.set_xlabel(f"{metric} (%)")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, format="png")


def _pick(metric: str, contender: str) -> Pick:
    return Pick(metric, {"contender": contender})


# With three seeds, one standard deviation of the difference is sqrt(3) of its standard errors.
_ONE_DEVIATION = math.sqrt(3)

EXPERIMENT = Experiment(
    spec="part-prototypes",
    title="consistency and stability of part prototypes: ProtoPNet against its improvement",
    claims=(
        Claim(
            "the full model is more consistent than ProtoPNet by more than one standard deviation "
            "of the seeds",
            _pick("consistency", FULL),
            ">",
            _pick("consistency", BASE),
            beyond=_ONE_DEVIATION,
            paper="higher on all nine backbones, the largest of the three gains",
        ),
        Claim(
            "the full model is more stable than ProtoPNet by more than one standard deviation of "
            "the seeds",
            _pick("stability", FULL),
            ">",
            _pick("stability", BASE),
            beyond=_ONE_DEVIATION,
            paper="higher on all nine backbones",
        ),
        Claim(
            "the full model's accuracy is not more than 1 point below ProtoPNet's",
            _pick("accuracy", FULL),
            ">=",
            _pick("accuracy", BASE),
            offset=-1.0,
            paper="higher on all nine backbones",
        ),
        Claim(
            "random prototypes are at most half as consistent as the full model's",
            _pick("consistency", RANDOM),
            "<=",
            _pick("half_consistency", FULL),
        ),
        Claim(
            "random prototypes are at most half as consistent as ProtoPNet's",
            _pick("consistency", RANDOM),
            "<=",
            _pick("half_consistency", BASE),
        ),
    ),
    quick=quick,
    full=full,
    draw=draw,
)
