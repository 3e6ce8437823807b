"""How robust a classifier is: attacks on a whole data set, in blocks that survive a kill.

The images are cut into blocks. Each block is attacked by itself and written as one file, so that a
run goes on where it was stopped, blocks are shared out among processes or machines, and what is
found does not depend on how: random draws are functions of the seed and the image's number.

Without labels the network's own answers can stand for them. What is measured then is whether
predictions are stable, not whether they are right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.files import read_json, write_json, write_tensors
from gossamer.core.progress import progress
from gossamer.core.task import Classification, evaluating, seed_of
from gossamer.evaluate.attack import Cost, Outcome
from gossamer.evaluate.auto_attack import attack_of
from gossamer.evaluate.victim import Victim
from gossamer.parts.embedding import weights_digest

BLOCK = 1000


class Images(Protocol):
    """Labelled images in [0, 1] that can be fetched by number."""

    def __len__(self) -> int: ...

    def fetch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images ``[n, channels, height, width]`` in [0, 1] and labels ``[n]``."""
        ...


@dataclass(frozen=True)
class TaskImages:
    """The images of a split of a task, in [0, 1].

    Attributes:
        task: the data.
        split: of the task.
        count: only so many images, spread evenly over the split. Default: all.

    Raises:
        InputError: if there is no such split, or the count is below one.
    """

    task: Classification
    split: str = "test"
    count: int | None = None

    def __post_init__(self) -> None:
        if not self.task.size(self.split):
            raise InputError(f"{self.task.name} has no {self.split} split")
        if self.count is not None and self.count < 1:
            raise InputError(f"{self.count} images are asked for; at least 1 is needed")

    def __len__(self) -> int:
        size = self.task.size(self.split)
        return size if self.count is None else min(self.count, size)

    def fetch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        source = self.task.splits[self.split]
        rows = rows * self.task.size(self.split) // len(self)
        images = source.fetch(rows).float() / self.task.preprocess.scale
        # Resizing with antialiasing may overshoot by rounding.
        return images.clamp(0.0, 1.0), source.labels[torch.from_numpy(rows)]


@dataclass(frozen=True)
class ArrayImages:
    """Images and labels in memory.

    Attributes:
        images: ``[n, channels, height, width]`` in [0, 1].
        labels: ``[n]``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(rows)
        return self.images[at], self.labels[at]


@dataclass(frozen=True)
class RobustnessReport:
    """What was measured.

    Attributes:
        attack: its name.
        eps: largest change of a pixel in [0, 1].
        images: how many.
        clean: accuracy without attack, in percent.
        robust: accuracy in percent if each image meets the worst of all attacks: an upper bound.
        costs: of each member of the attack, in turn.
        after: accuracy in percent after each of them.
        remarks: what was odd about the network.
        labels: "given", or "predicted" where the network's own answers stood for labels.
        broken_by: for each image the place in ``costs`` of what broke it, -1 if robust, -2 if it
            was misclassified before.
    """

    attack: str
    eps: float
    images: int
    clean: float
    robust: float
    costs: tuple[Cost, ...]
    after: tuple[float, ...]
    remarks: tuple[str, ...]
    labels: str = "given"
    broken_by: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, without the list of images."""
        return {
            "attack": self.attack,
            "eps": self.eps,
            "norm": "Linf",
            "images": self.images,
            "labels": self.labels,
            "clean_accuracy": self.clean,
            "robust_accuracy": self.robust,
            "aggregation": "worst case of each image over all attacks",
            "attacks": [
                asdict(cost) | {"robust_accuracy": after}
                for cost, after in zip(self.costs, self.after, strict=True)
            ],
            "remarks": list(self.remarks),
        }


@dataclass
class Measurement:
    """An attack on all images, block by block.

    Attributes:
        model: maps images in [0, 1] to logits; wrap one that wants normalised inputs in
            :class:`~gossamer.evaluate.victim.Normalised`.
        images: what is attacked.
        attack: a name of :data:`~gossamer.evaluate.auto_attack.ATTACKS`.
        eps: the largest change of a pixel (L-infinity).
        steps: gradients of each run.
        seed: of random starts.
        batch_size: images at a time.
        predicted: the network's own answers stand for labels.
        work: a folder that keeps the results of blocks; without one they are kept in memory.
        block: images a block.
        save_images: keep adversarial images in ``work``, too (safetensors).

    Raises:
        InputError: if an option is out of range, or ``work`` belongs to another measurement.
    """

    model: nn.Module
    images: Images
    attack: str = "pma+"
    eps: float = 8 / 255
    steps: int = 100
    seed: int = 0
    batch_size: int = 128
    predicted: bool = False
    work: Path | None = None
    block: int = BLOCK
    save_images: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InputError(f"blocks of {self.block} images; at least 1 is needed")
        if not len(self.images):
            raise InputError("there are no images to attack")
        if self.work is None and self.save_images:
            raise InputError("saved images need a work folder")
        self._chain = attack_of(self.attack)(
            Victim(self.model),
            eps=self.eps,
            seed=self.seed,
            batch_size=self.batch_size,
            steps=self.steps,
        )
        self._kept: dict[int, dict[str, Any]] = {}
        if self.work is not None:
            _claim(self.work, self._about())

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-len(self.images) // self.block)

    def done(self, number: int) -> bool:
        """Whether a block has been measured, by this process or another one."""
        return number in self._kept or (self.work is not None and self._path(number).is_file())

    def measure(self, number: int) -> None:
        """Attacks the images of one block, and keeps what was found."""
        rows = np.arange(number * self.block, min((number + 1) * self.block, len(self.images)))
        pixels, labels = self.images.fetch(rows)
        victim = self._chain.victim
        if self.predicted:
            with evaluating(victim.model):
                labels = torch.cat(
                    [
                        victim.logits(part.to(victim.device)).argmax(1).cpu()
                        for part in pixels.split(self.batch_size)
                    ]
                )
        flat, asked = victim.flat, victim.backwards
        outcome = self._chain.run(pixels, labels, ids=torch.from_numpy(rows))
        remarks = list(victim.remarks) + _suspicions(
            outcome, victim.flat - flat, victim.backwards - asked
        )
        by = torch.where(outcome.clean, outcome.by, torch.full_like(outcome.by, -2))
        self._kept[number] = {
            "broken_by": by.tolist(),
            "costs": [asdict(cost) for cost in outcome.costs],
            "remarks": remarks,
        }
        if self.work is not None:
            if self.save_images:
                path = self.work / f"images-{number:06d}.safetensors"
                write_tensors(path, {"images": outcome.images})
            write_json(self._path(number), self._kept.pop(number))

    def report(self) -> RobustnessReport:
        """The report on all blocks that are done.

        Raises:
            InputError: if none is.
        """
        results = []
        for number in range(self.blocks):
            if number in self._kept:
                results.append(self._kept[number])
            elif self.done(number):
                results.append(read_json(self._path(number)))
        if not results:
            raise InputError("no block of images has been attacked yet")
        return _merged(self.attack, self.eps, results, self._labels)

    @property
    def _labels(self) -> str:
        return "predicted" if self.predicted else "given"

    def _path(self, number: int) -> Path:
        assert self.work is not None
        return self.work / f"block-{number:06d}.json"

    def _about(self) -> dict[str, Any]:
        return {
            "attack": self.attack, "eps": self.eps, "steps": self.steps, "seed": self.seed,
            "images": len(self.images), "block": self.block, "labels": self._labels,
            "model": weights_digest(self.model), "data": _data_digest(self.images),
        }  # fmt: skip


Spread = Callable[[Measurement, Sequence[int]], Iterator[int]]
"""Measures the blocks it is given somewhere else, into the same folder, and yields each when it is
done."""


def evaluate_robustness(
    measurement: Measurement, *, shard: tuple[int, int] = (0, 1), spread: Spread | None = None
) -> RobustnessReport:
    """Attacks a classifier on images, and says how often it stays right.

    Args:
        measurement: what is to be attacked how.
        shard: (k, n): only every n-th block from the k-th on (counting from 0), for n runs with one
            work folder.
        spread: has blocks measured by other processes.

    Returns:
        The report on all blocks that are done: this run's, and those that others have finished.

    Raises:
        InputError: if an option is out of range.
    """
    which, shards = shard
    if not 0 <= which < shards:
        raise InputError(f"shard {which} of {shards}: shards are counted from 0")
    if measurement.work is None and (shards > 1 or spread is not None):
        raise InputError("work that is shared out needs a work folder")
    blocks = range(which, measurement.blocks, shards)
    todo = [number for number in blocks if not measurement.done(number)]
    with progress() as bar:
        line = bar.add_task(
            f"{measurement.attack}, eps {measurement.eps:.4g}",
            total=len(blocks),
            completed=len(blocks) - len(todo),
        )
        for _ in _here(measurement, todo) if spread is None else spread(measurement, todo):
            bar.advance(line)
    return measurement.report()


def _here(measurement: Measurement, numbers: Sequence[int]) -> Iterator[int]:
    for number in numbers:
        measurement.measure(number)
        yield number


def _suspicions(outcome: Outcome, flat: int, backwards: int) -> list[str]:
    """What an attack's course says about the network."""
    found = []
    if backwards and flat > 0.05 * backwards:
        found.append(
            "Many gradients were zero everywhere: logits saturate or the network is not "
            "differentiable; robust accuracy is overestimated by attacks that need gradients."
        )
    last = outcome.costs[-1]
    if last.attack == "square" and last.broken > 0.02 * max(last.attacked, 1):
        found.append(
            "Square, which needs no gradients, broke images that the attacks before it could not: "
            "gradients are masked."
        )
    return found


def _merged(
    attack: str, eps: float, results: Sequence[dict[str, Any]], labels: str
) -> RobustnessReport:
    broken_by = np.concatenate([np.array(r["broken_by"], np.int8) for r in results])
    total = len(broken_by)
    columns = zip(*([Cost(**cost) for cost in r["costs"]] for r in results), strict=True)
    costs = tuple(reduce(lambda a, b: a + b, column) for column in columns)
    right = int((broken_by != -2).sum())
    after = [right - int(((broken_by >= 0) & (broken_by <= k)).sum()) for k in range(len(costs))]
    remarks = list(dict.fromkeys(text for r in results for text in r["remarks"]))
    return RobustnessReport(
        attack,
        eps,
        total,
        100.0 * right / total,
        100.0 * int((broken_by == -1).sum()) / total,
        costs,
        tuple(100.0 * left / total for left in after),
        tuple(remarks),
        labels,
        broken_by,
    )


def _claim(work: Path, about: dict[str, Any]) -> None:
    """Makes the folder this measurement's, or refuses another's."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "robustness.json"
    if not path.is_file():
        write_json(path, about)
        return
    stored = read_json(path)
    different = [
        key for key in about if not isinstance(stored, dict) or stored.get(key) != about[key]
    ]
    if different:
        raise InputError(
            f"{work} holds a measurement with another {', '.join(different)}; name another folder"
        )


def _data_digest(images: Images) -> str:
    """A fingerprint of the first and last images and labels."""
    rows = np.unique(np.array([0, len(images) // 2, len(images) - 1]))
    pixels, labels = images.fetch(rows)
    return f"{seed_of(json.dumps([pixels.double().sum((1, 2, 3)).tolist(), labels.tolist()])):016x}"
