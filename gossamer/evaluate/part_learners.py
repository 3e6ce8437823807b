"""Base learners of certified ensembles: many small models, one for each part of the data.

A learner fits a model to each part, all in few batched operations, so that each model is a function
of its own part, its number and the version of its seed alone, to the bit: shapes of operators never
depend on what other parts hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gossamer.core.errors import InputError
from gossamer.core.fit import sgd
from gossamer.core.progress import progress
from gossamer.core.task import Augment, Source, seed_of
from gossamer.parts.stacked_networks import CHUNK, TrainedStacks, train_stacked

FETCH = 4096
"""Images that are fetched at once."""
TOGETHER = 16
"""Parts that are solved together."""
STEP = 32
"""Parts are filled up to a multiple of this many samples."""


class PartModels(Protocol):
    """Trained models, one for each part."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``[n, parts, classes]`` of raw images ``[n, channels, height, width]``."""
        ...


class PartLearner(Protocol):
    """Makes a model of each part."""

    def fit(
        self, source: Source, classes: int, parts: Sequence[np.ndarray], *, version: int = 0
    ) -> PartModels:
        """Learns.

        Args:
            source: labelled raw images.
            classes: how many.
            parts: the rows of each part, in an order that is a function of their content.
            version: of the seeds; another one makes other models of the same parts.
        """
        ...


class RidgeLearner:
    """Ridge regression to one-hot targets on random cosine features, solved for all parts at once.

    The features ``cos(x W / sqrt(d) + b)`` of an image's ``d`` values (divided by
    ``divisor``) are the same for all parts, so they are computed once. Of a part with fewer samples
    than features the dual system is solved, which is smaller and has the same solution. A part
    without samples answers 0 for every class.

    (Rahimi & Recht, "Random Features for Large-Scale Kernel Machines", 2007.)

    Args:
        count: random features.
        scale: standard deviation of ``W``.
        ridge: weight of the penalty, of a whole part.
        divisor: of raw values; a constant, never measured on the data.
        seed: of the features.
    """

    def __init__(
        self,
        *,
        count: int = 300,
        scale: float = 1.5,
        ridge: float = 1.0,
        divisor: float = 255.0,
        seed: int = 0,
    ) -> None:
        if count < 1 or scale <= 0.0 or ridge <= 0.0:
            raise InputError(
                "ridge regression needs a feature, and a scale and a penalty above 0, "
                f"not {count}, {scale:g} and {ridge:g}"
            )
        self.count = count
        self.scale = scale
        self.ridge = ridge
        self.divisor = divisor
        self.seed = seed

    def fit(
        self, source: Source, classes: int, parts: Sequence[np.ndarray], *, version: int = 0
    ) -> RidgeModels:
        shape = source.fetch(np.arange(1)).shape[1:] if len(source) else torch.Size([1])
        random = np.random.default_rng(seed_of("cosine features", self.seed, version))
        inputs = math.prod(shape)
        projection = random.standard_normal((inputs, self.count)) * self.scale / math.sqrt(inputs)
        models = RidgeModels(
            torch.from_numpy(projection / self.divisor).float(),
            torch.from_numpy(random.uniform(0.0, 2.0 * math.pi, self.count)).float(),
            torch.zeros(len(parts), self.count, classes),
        )
        features = torch.empty(len(source), self.count)
        for low in range(0, len(source), FETCH):
            images = source.fetch(np.arange(low, min(low + FETCH, len(source))))
            # Matrix kernels round a few rows otherwise than many, so a short last block would let
            # the number of all images reach into the parts.
            block = torch.cat([images, images.new_zeros(FETCH - len(images), *shape)])
            features[low : low + FETCH] = models.features(block)[: len(images)]
        sizes = np.array([len(rows) for rows in parts])
        filled = -(-sizes // STEP) * STEP
        with progress() as bar:
            shown = bar.add_task("solving parts", total=len(parts))
            for size in np.unique(filled[sizes > 0]):
                alike = np.flatnonzero(filled == size)
                for low in range(0, len(alike), TOGETHER):
                    own = alike[low : low + TOGETHER]
                    solved = self._solve(
                        features, source.labels, [parts[n] for n in own], int(size), classes
                    )
                    models.weights[torch.from_numpy(own)] = solved
                    bar.advance(shown, len(own))
        return models

    def _solve(
        self,
        features: Tensor,
        labels: Tensor,
        parts: Sequence[np.ndarray],
        size: int,
        classes: int,
    ) -> Tensor:
        """Weights ``[len(parts), features, classes]`` of parts that fill up to ``size``."""
        # Samples of zeros change nothing, and neither does a part of them.
        x_PSF = torch.zeros(TOGETHER, size, self.count, dtype=torch.float64)
        y_PSC = torch.zeros(TOGETHER, size, classes, dtype=torch.float64)
        for place, rows in enumerate(parts):
            x_PSF[place, : len(rows)] = features[rows].double()
            y_PSC[place, torch.arange(len(rows)), labels[rows]] = 1.0
        dual = size <= self.count
        gram = x_PSF @ x_PSF.mT if dual else x_PSF.mT @ x_PSF
        gram.diagonal(dim1=1, dim2=2).add_(self.ridge)
        factor = torch.linalg.cholesky(gram)
        if dual:
            weights = x_PSF.mT @ torch.cholesky_solve(y_PSC, factor)
        else:
            weights = torch.cholesky_solve(x_PSF.mT @ y_PSC, factor)
        return weights[: len(parts)].float()


class RidgeModels:
    """What :class:`RidgeLearner` learned.

    Args:
        projection: of raw values ``[values, features]``.
        phase: ``[features]``.
        weights: ``[parts, features, classes]``.
    """

    def __init__(self, projection: Tensor, phase: Tensor, weights: Tensor) -> None:
        self.projection = projection
        self.phase = phase
        self.weights = weights

    def features(self, images: Tensor) -> Tensor:
        """Cosine features ``[n, features]`` of raw images."""
        return torch.cos(images.flatten(1).float() @ self.projection + self.phase)

    def logits(self, images: Tensor) -> Tensor:
        parts, features, classes = self.weights.shape
        flat = self.weights.permute(1, 0, 2).reshape(features, parts * classes)
        return (self.features(images) @ flat).unflatten(1, (parts, classes))


class NetworkLearner:
    """Networks of one architecture, trained many at a time.

    Each normalises with the channel means and deviations of its own part. Seeds are functions of
    the part's number and the version. (The published code's ``(part + 1) * version ** 2`` gives
    different parts and versions the same seed.)

    Args:
        make_network: makes a network with fresh weights: ``() -> nn.Module``.
        epochs: passes over each part. Default: the paper's.
        batch_size: samples of each network in a step.
        optimizer: made from the stacked networks. Default: the paper's, SGD with Nesterov momentum
            .9, learning rate .1 and weight decay 5e-4 on everything.
        schedule: learning-rate multiplier as a function of the fraction of training done. Default:
            :func:`fifths`, the paper's.
        augment: of raw training batches.
        chunk: networks that train together.
        precision: "no" (float32) or "bf16".
        seed: of initial weights, order and augmentation.
    """

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        *,
        epochs: int = 200,
        batch_size: int = 128,
        optimizer: Callable[[nn.Module], Optimizer] = sgd,
        schedule: Callable[[float], float] | None = None,
        augment: Augment | None = None,
        chunk: int = CHUNK,
        precision: str = "no",
        seed: int = 0,
    ) -> None:
        self.make_network = make_network
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.schedule = schedule or fifths
        self.augment = augment
        self.chunk = chunk
        self.precision = precision
        self.seed = seed

    def fit(
        self, source: Source, classes: int, parts: Sequence[np.ndarray], *, version: int = 0
    ) -> NetworkModels:
        def make(number: int) -> nn.Module:
            mean, std = channel_statistics(source, parts[number])
            return Normalised(self.make_network(), mean, std)

        def fetch(rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            images = source.fetch(rows)
            if self.augment is not None:
                images = self.augment(images, generator)
            return images.float(), source.labels[torch.from_numpy(rows)]

        trained = train_stacked(
            make,
            parts,
            fetch,
            epochs=self.epochs,
            seeds=[seed_of("part", self.seed, n, version) for n in range(len(parts))],
            criterion=cross_entropy,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            schedule=self.schedule,
            chunk=self.chunk,
            seed=seed_of("augment", self.seed, version),
            precision=self.precision,
        )
        learned = torch.tensor([len(rows) > 0 for rows in parts])
        return NetworkModels(trained, learned, classes)


class NetworkModels:
    """What :class:`NetworkLearner` learned.

    A network of an empty part, and one that has diverged, answers 0 for every class: a constant,
    since the certificate counts on an answer of every model.

    Args:
        trained: the networks.
        learned: which of them had samples, ``[parts]``.
        classes: how many logits each answers.
    """

    def __init__(self, trained: TrainedStacks, learned: Tensor, classes: int) -> None:
        self.trained = trained
        self.learned = learned
        self.classes = classes

    def logits(self, images: Tensor) -> Tensor:
        answers = self.trained.outputs(images.float())
        if answers.ndim != 3 or answers.shape[2] != self.classes:
            raise InputError(
                f"the networks answer {list(answers.shape[1:])} for {len(images)} images, where "
                f"{[len(images), self.classes]} is needed"
            )
        usable = self.learned[:, None, None] & answers.isfinite().all(2, keepdim=True)
        return torch.where(usable, answers, 0.0).float().transpose(0, 1).contiguous()


class Normalised(nn.Module):
    """A network behind the normalisation of raw images per channel.

    Args:
        network: reads normalised images.
        mean: of raw values, per channel.
        std: of raw values, per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of raw images ``[batch, channels, height, width]``."""
        return self.network((images - self.mean) / self.std)


def channel_statistics(
    source: Source, rows: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of raw values per channel, of these rows alone.

    Without rows they are 0 and 1; a channel that never varies has the deviation 1.
    """
    if not len(rows):
        channels = source.fetch(np.arange(1)).shape[1]
        return (0.0,) * channels, (1.0,) * channels
    sums = []
    squares = []
    for low in range(0, len(rows), FETCH):
        images = source.fetch(rows[low : low + FETCH]).double()
        sums.append(images.mean((2, 3)).sum(0))
        squares.append(images.square().mean((2, 3)).sum(0))
    mean = torch.stack(sums).sum(0) / len(rows)
    variance = torch.stack(squares).sum(0) / len(rows) - mean.square()
    std = torch.where(variance > 1e-12, variance.clamp(min=0.0).sqrt(), 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


def fifths(fraction: float) -> float:
    """The published learning-rate multiplier: a fifth after 30 %, 60 % and 80 % of training."""
    return 0.2 ** sum(fraction >= bound for bound in (0.3, 0.6, 0.8))
