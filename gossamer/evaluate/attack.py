"""One protocol for attacks on classifiers.

An attack has an L-infinity budget ``eps`` for images in [0, 1] and goes over the images in rounds
(restarts, target classes): each round sees only images that are still classified correctly, packed
into full batches again. Where a start or a step is drawn at random it is a function of the seed and
the number of the image, so batches, shards and restarts of the program change nothing.

Robust accuracy is the share of images that are classified correctly whatever was tried: an upper
bound, from the worst case of each image. What an attack claims to have fooled is asked of the
network once more, on an image that was put into the budget and into [0, 1].
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.task import seed_of
from gossamer.evaluate.victim import Victim


@dataclass(frozen=True)
class Chunk:
    """Images of one batch, all of them classified correctly, on the network's device.

    Attributes:
        images: ``[n, channels, height, width]`` in [0, 1].
        labels: true classes ``[n]``.
        ids: numbers of the images ``[n]``, of which random draws are functions.
        clean: logits of the images, ``[n, classes]``.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    clean: Tensor


@dataclass(frozen=True)
class Cost:
    """What an attack did.

    Attributes:
        attack: its name.
        attacked: images it was tried on.
        broken: images it fooled the network on.
        forwards: images that went forward.
        backwards: images that gradients were taken of.
        seconds: wall-clock time.
    """

    attack: str
    attacked: int
    broken: int
    forwards: int
    backwards: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.attack,
            self.attacked + other.attacked,
            self.broken + other.broken,
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Outcome:
    """What an attack left.

    Attributes:
        images: the adversarial images where it succeeded, the clean ones elsewhere, on the CPU.
        clean: whether each clean image is classified correctly, ``[n]``.
        robust: whether each image is still classified correctly, ``[n]``.
        by: for each image the index in ``costs`` of the attack that broke it, or -1, ``[n]``.
        costs: of each attack in turn.
    """

    images: Tensor
    clean: Tensor
    robust: Tensor
    by: Tensor
    costs: tuple[Cost, ...]

    @property
    def accuracy(self) -> float:
        """Robust accuracy in percent."""
        return 100.0 * self.robust.float().mean().item()

    @property
    def clean_accuracy(self) -> float:
        """Clean accuracy in percent."""
        return 100.0 * self.clean.float().mean().item()


class Attack(ABC):
    """An attack on a classifier of images in [0, 1].

    Args:
        model: maps images to logits, or a :class:`Victim` that several attacks share.
        eps: the largest change of a pixel (L-infinity).
        seed: of random starts and steps.
        batch_size: images at a time.

    Raises:
        InputError: if ``eps`` is not in [0, 1].
    """

    name: str

    def __init__(
        self,
        model: nn.Module | Victim,
        *,
        eps: float = 8 / 255,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        if not 0.0 <= eps <= 1.0:
            raise InputError(f"eps is {eps:g}; a change of pixels in [0, 1] is at most 1")
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}; at least 1 is needed")
        self.victim = model if isinstance(model, Victim) else Victim(model)
        self.eps = float(eps)
        self.seed = seed
        self.batch_size = batch_size

    def rounds(self, classes: int) -> int:
        """How many rounds over what is still standing, for a network of so many classes."""
        return 1

    @abstractmethod
    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        """Adversarial images of a chunk, within the budget: the fooling ones where it found any."""

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images.

        Args:
            images: ``[n, channels, height, width]`` in [0, 1].
            labels: true classes ``[n]``.

        Returns:
            ``[n, channels, height, width]``: within ``eps`` of ``images`` and in [0, 1]; the clean
            image where the network is wrong already or was not fooled.

        Raises:
            InputError: if images or labels are not what a classifier can be attacked on.
        """
        return self.run(images, labels).images

    def run(
        self, images: Tensor, labels: Tensor, *, ids: Tensor | None = None, examine: bool = True
    ) -> Outcome:
        """Attacks, and says what it cost.

        Args:
            images: ``[n, channels, height, width]`` in [0, 1].
            labels: true classes ``[n]``.
            ids: numbers of the images ``[n]`` for random draws. Default: 0, 1, 2 …
            examine: look at the network's answers first, see :meth:`Victim.examine`.

        Raises:
            InputError: as :meth:`attack`.
        """
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise InputError(
                f"images of shape {list(images.shape)} and labels of shape {list(labels.shape)} "
                "do not belong together; [n, channels, height, width] and [n] are needed"
            )
        if not len(images):
            raise InputError("there are no images to attack")
        ids = torch.arange(len(images)) if ids is None else ids
        with self.victim.ready():
            if examine:
                self.victim.examine(images[: min(8, len(images))])
                if not (images.amin() >= 0 and images.amax() <= 1):
                    self.victim.examine(images)
            clean = torch.cat(
                [
                    self.victim.logits(batch.to(self.victim.device)).cpu()
                    for batch in images.split(self.batch_size)
                ]
            )
            classes = clean.shape[1]
            if labels.min() < 0 or labels.max() >= classes:
                raise InputError(
                    f"labels go from {int(labels.min())} to {int(labels.max())}, but the network "
                    f"has {classes} classes"
                )
            right = clean.argmax(1) == labels
            state = Outcome(images, right, right, torch.full(labels.shape, -1), ())
            return self.continue_from(state, images, labels, ids, clean)

    def continue_from(
        self, state: Outcome, images: Tensor, labels: Tensor, ids: Tensor, clean: Tensor
    ) -> Outcome:
        """Attacks what an earlier attack left standing.

        Args:
            state: what is left.
            images: the clean images.
            labels: true classes ``[n]``.
            ids: numbers of the images ``[n]``.
            clean: logits of the clean images, ``[n, classes]``.
        """
        victim, start = self.victim, time.perf_counter()
        forwards, backwards = victim.forwards, victim.backwards
        found, robust, by = state.images.clone(), state.robust.clone(), state.by.clone()
        attacked = int(robust.sum())
        for round in range(self.rounds(clean.shape[1]) if self.eps > 0 else 0):
            for rows in robust.nonzero().flatten().split(self.batch_size):
                chunk = Chunk(
                    images[rows].to(victim.device),
                    labels[rows].to(victim.device),
                    ids[rows].to(victim.device),
                    clean[rows].to(victim.device),
                )
                tried = into_budget(self.perturb(chunk, round), chunk.images, self.eps)
                fooled = (victim.logits(tried).argmax(1) != chunk.labels).cpu()
                found[rows[fooled]] = tried.cpu()[fooled]
                robust[rows[fooled]] = False
        by[state.robust & ~robust] = len(state.costs)
        cost = Cost(
            self.name,
            attacked,
            attacked - int(robust.sum()),
            victim.forwards - forwards,
            victim.backwards - backwards,
            time.perf_counter() - start,
        )
        return Outcome(found, state.clean, robust, by, (*state.costs, cost))

    def seed_of(self, round: int) -> int:
        """The seed of a round."""
        return seed_of(self.seed, self.name, round)


class Chain(Attack):
    """Attacks in turn, each on what the ones before left standing.

    Args:
        name: of the chain.
        attacks: the members; they share one :class:`Victim`.

    Raises:
        InputError: if there is no member, or they attack different networks or budgets.
    """

    def __init__(self, name: str, attacks: Sequence[Attack]) -> None:
        if not attacks:
            raise InputError("a chain needs at least one attack")
        first = attacks[0]
        if any(a.victim is not first.victim or a.eps != first.eps for a in attacks):
            raise InputError("the attacks of a chain need one victim and one eps")
        super().__init__(first.victim, eps=first.eps, seed=first.seed, batch_size=first.batch_size)
        self.name = name
        self.attacks = tuple(attacks)

    def perturb(self, chunk: Chunk, round: int) -> Tensor:
        raise NotImplementedError("a chain has members that do this")

    def continue_from(
        self, state: Outcome, images: Tensor, labels: Tensor, ids: Tensor, clean: Tensor
    ) -> Outcome:
        for attack in self.attacks:
            state = attack.continue_from(state, images, labels, ids, clean)
        return state


def into_budget(moved: Tensor, images: Tensor, eps: float) -> Tensor:
    """The nearest images within ``eps`` of ``images`` (L-infinity) and in [0, 1]."""
    return torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0.0, 1.0)


def likely_targets(chunk: Chunk, rank: int) -> Tensor:
    """The wrong class that is ``rank``-th most likely on the clean image (from 0), ``[n]``."""
    others = chunk.clean.scatter(1, chunk.labels.unsqueeze(1), -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, rank]
