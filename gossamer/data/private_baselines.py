"""Private synthetic data by one noisy mean of random features: what evolution is compared with.

Harder, Adamczewski & Park, "DP-MERF: Differentially private mean embeddings with random features
for practical privacy-preserving data generation", AISTATS 2021: random Fourier features (Rahimi &
Recht 2007) have length 1, so the sum over a class changes by a norm of 1 with one sample, and one
Gaussian release suffices. Either a generator is trained until its own mean features are those, or
members of a public pool are picked for that (kernel herding: Chen, Welling & Smola, UAI 2010).
Numbers of samples in classes count as public, as in private evolution.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.fit import Log, Rule, fit
from gossamer.core.task import Classification
from gossamer.data.privacy_budget import ROUNDING, Ledger, gaussian_sigma
from gossamer.data.privacy_noise import Noise


class FourierFeatures:
    """``[cos, sin](x W) / sqrt(count)``: vectors of length 1.

    Args:
        public: vectors ``[n, d]`` whose median distance is the kernel's width.
        count: random directions.
        seed: of the directions.
    """

    def __init__(self, public: np.ndarray, *, count: int = 1000, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        pairs = random.integers(0, len(public), (2, 1000))
        apart = np.linalg.norm(public[pairs[0]] - public[pairs[1]], axis=1)
        width = float(np.median(apart[apart > 0.0]))
        directions = random.normal(size=(public.shape[1], count)) / width
        self.directions = torch.from_numpy(directions.astype(np.float32))

    def __call__(self, vectors: Tensor) -> Tensor:
        """``[n, d]`` in, ``[n, 2 * count]`` out."""
        angles = vectors @ self.directions.to(vectors.device)
        return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(self.directions.shape[1])


def mean_features(
    features: FourierFeatures,
    vectors: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    delta: float,
    noise: Noise,
    ledger: Ledger | None = None,
) -> Tensor:
    """The noisy mean of the random features of each class, ``[classes, 2 * count]``.

    Args:
        features: random features, made without private data.
        vectors: private embeddings ``[n, d]``.
        labels: ``[n]``.
        epsilon: of the only release.
        delta: likewise.
        noise: where it comes from.
        ledger: the account it is written into. Default: one of its own.
    """
    sigma = gaussian_sigma(epsilon, 1, delta) * ROUNDING
    classes = int(labels.max()) + 1

    def answer() -> np.ndarray:
        lifted = features(torch.from_numpy(np.asarray(vectors, dtype=np.float32))).numpy()
        sums = np.zeros((classes, lifted.shape[1]))
        np.add.at(sums, labels, lifted)
        return (sums.ravel() + noise.draw(sums.size, sigma)).ravel()

    account = Ledger(epsilon, delta) if ledger is None else ledger
    sums = account.release("mean features", sigma, noise.accounting, answer).reshape(classes, -1)
    means = sums / np.bincount(labels, minlength=classes)[:, None]
    return torch.from_numpy(means.astype(np.float32))


def herd(means: Tensor, features: FourierFeatures, pool: np.ndarray, count: int) -> np.ndarray:
    """Rows of the pool whose mean features come nearest to a mean, greedily, with replacement.

    Args:
        means: of one class, ``[2 * features]``.
        features: the random features.
        pool: public embeddings ``[n, d]``.
        count: rows to pick.
    """
    lifted = features(torch.from_numpy(np.asarray(pool, dtype=np.float32)))
    gram, wanted = lifted @ lifted.T, lifted @ means
    taken, picked = torch.zeros(len(pool)), []
    for step in range(count):
        row = int((wanted - taken / (step + 1)).argmax())
        picked.append(row)
        taken += gram[row]
    return np.array(picked)


class LabelGenerator(nn.Module):
    """Codes and labels to images in 0..1.

    Args:
        classes: how many.
        pixels: values of an image.
        code: length of the codes.
        width: of both hidden layers.
    """

    def __init__(self, classes: int, pixels: int, *, code: int = 16, width: int = 256) -> None:
        super().__init__()
        self.code = code
        self.classes = classes
        self.layers = nn.Sequential(
            nn.Linear(code + classes, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, pixels),
            nn.Sigmoid(),
        )

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(labels, self.classes).to(codes.dtype)
        return self.layers(torch.cat([codes, one_hot], 1))


class MomentMatching(Rule):
    """Trains a generator until its mean features are those that were released.

    Args:
        network: the generator.
        means: released, ``[classes, 2 * features]``.
        features: random features.
        embedding: images in 0..1 ``[n, pixels]`` to vectors, differentiable.
        lr: of Adam.
    """

    def __init__(
        self,
        network: LabelGenerator,
        means: Tensor,
        features: FourierFeatures,
        embedding: nn.Module,
        *,
        lr: float = 1e-2,
    ) -> None:
        self.network = network
        self.embedding = embedding
        self.means = means
        self.features = features
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr)

    def step(self, batch: Any) -> Log:
        _, labels = batch
        generator: Any = self.network
        codes = torch.randn(len(labels), generator.code, device=labels.device)
        lifted = self.features(self.embedding(generator(codes, labels)))
        one_hot = nn.functional.one_hot(labels, generator.classes).to(lifted.dtype)
        counts = one_hot.sum(0).clamp(min=1.0)
        own = one_hot.T @ lifted / counts[:, None]
        present = one_hot.sum(0) > 0
        loss = (own - self.means.to(own.device))[present].square().sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(loss)
        self.optimizer.step()
        return {"loss": loss.detach()}


def dp_merf(
    means: Tensor,
    features: FourierFeatures,
    embedding: nn.Module,
    task: Classification,
    *,
    epochs: int = 60,
    batch_size: int = 500,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> LabelGenerator:
    """Trains DP-MERF's generator; only the released means know of the private data.

    Args:
        means: released, ``[classes, 2 * features]``.
        features: the random features.
        embedding: images in 0..1 ``[n, pixels]`` to vectors.
        task: public; tells labels and the size of images, nothing else of it is used.
        epochs: passes over the task's labels.
        batch_size: codes a step.
        seed: of weights and codes.
        checkpoint: file that holds the run's state.
    """
    shape = task.preprocess
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LabelGenerator(len(means), shape.channels * shape.height * shape.width)
    rule = MomentMatching(network, means, features, embedding)
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        title="matching moments",
    )  # fmt: skip
    return network
