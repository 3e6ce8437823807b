"""How fast are base models trained and answers certified, against sequential training and loops?

Training: networks and ridge regressions of all parts in batched operations, against the same models
one after the other: networks by a bare loop of torch (the leanest there is) and by ``fit``, ridge
regressions by scikit-learn. Certificates: the same logits by the steps as they are published, one
sample at a time, once in plain Python and once with the arithmetic over models in numpy. Answers
and radii are checked to be the same. One thread, in turns, processor time; the ratio is theirs over
ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.core.fit import Supervised, cosine, fit, sgd
from gossamer.core.task import Classification, Preprocess, order_of
from gossamer.datasets.arrays import ArraySource
from gossamer.evaluate.part_learners import RidgeLearner
from gossamer.evaluate.training_partition import finite_shifts, finite_spread
from gossamer.evaluate.vote_certificates import certify
from gossamer.models.plain import mlp
from gossamer.parts.stacked_networks import train_stacked


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


# Training


def data(count: int, side: int, channels: int = 1) -> ArraySource:
    random = np.random.default_rng(0)
    images = torch.from_numpy(
        random.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    )
    return ArraySource(images, torch.from_numpy(random.integers(0, 10, count)))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


def train_together(
    make: Callable[[], nn.Module], source: ArraySource, parts: list[np.ndarray], epochs: int,
    batch: int, chunk: int,
) -> Any:  # fmt: skip
    def fetch(rows: np.ndarray, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return source.fetch(rows).float() / 255.0, source.labels[rows]

    return train_stacked(
        lambda _: make(), parts, fetch, epochs=epochs, seeds=range(len(parts)), batch_size=batch,
        chunk=chunk,
    )  # fmt: skip


def train_in_turn(
    make: Callable[[], nn.Module], source: ArraySource, parts: list[np.ndarray], epochs: int,
    batch: int,
) -> None:  # fmt: skip
    """One network after the other by a bare loop."""
    for seed, rows in enumerate(parts):
        network = make()
        optimizer = sgd(network)
        steps = epochs * -(-len(rows) // batch)
        step = 0
        images = source.fetch(rows).float() / 255.0
        labels = source.labels[rows]
        for epoch in range(epochs):
            order = torch.from_numpy(order_of(len(rows), True, seed, epoch))
            for low in range(0, len(rows), batch):
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 * cosine(step / steps)
                own = order[low : low + batch]
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(network(images[own]), labels[own]).backward()
                optimizer.step()
                step += 1


def train_by_fit(
    make: Callable[[], nn.Module], source: ArraySource, parts: list[np.ndarray], epochs: int,
    batch: int,
) -> None:  # fmt: skip
    """One network after the other by the trainer of everything else."""
    side = source.images.shape[2]
    for seed, rows in enumerate(parts):
        own = source.take(rows)
        preprocess = Preprocess(source.channels, side, side, (0.0,), (1.0,))
        task = Classification(
            {"train": own, "validation": own}, preprocess, tuple("0123456789"), name="part"
        )
        fit(Supervised(make(), task), task, epochs=epochs, batch_size=batch, seed=seed)


def ridges_in_turn(features: np.ndarray, labels: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    from sklearn.linear_model import Ridge

    one_hot = np.eye(10)[labels]
    return np.stack(
        [
            Ridge(alpha=1.0, fit_intercept=False).fit(features[rows], one_hot[rows]).coef_.T
            for rows in parts
        ]
    )


# Certificates, step by step


def dynamic_program(size: int) -> np.ndarray:
    dp = np.zeros((size, size), int)
    for i, j in itertools.product(range(size), repeat=2):
        if i == j == 0:
            continue
        if (i <= 1 and j <= 2) or (i <= 2 and j <= 1):
            dp[i, j] = 1
        elif j <= 1:
            dp[i, j] = -(-i // 2)
        elif i <= 1:
            dp[i, j] = -(-j // 2)
        else:
            dp[i, j] = 1 + min(dp[i - 2, j - 1], dp[i - 1, j - 2])
    return dp


def spent(powers: np.ndarray, gap: int) -> int:
    """Fewest buckets whose powers sum to the gap."""
    if gap <= 0:
        return 0
    return int(np.searchsorted(np.cumsum(np.sort(powers)[::-1]), gap)) + 1


def one_at_a_time(
    logits: np.ndarray, dp: np.ndarray, spread: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Run-off election and certificate, with numpy over models and Python over samples."""
    labels, radii = [], []
    models, classes = logits.shape[1:]
    for sample in logits:
        votes = sample.argmax(1)
        counts = np.bincount(votes, minlength=classes)
        one, two = sorted(np.argsort(-counts, kind="stable")[:2])
        for_one = int((sample[:, one] >= sample[:, two]).sum())
        label, loser = (one, two) if 2 * for_one >= models else (two, one)

        def gap(a: int, b: int, counts: np.ndarray = counts) -> int:
            return int(counts[a] - counts[b] + (b > a))

        def alone(a: int, b: int, votes: np.ndarray = votes, gap: Any = gap) -> int:
            if spread is None:
                return (max(gap(a, b), 0) + 1) // 2
            values = 1 + (votes == a).astype(np.int64) - (votes == b)
            return spent(values[spread].sum(1), gap(a, b))

        units = math.inf
        rivals = [c for c in range(classes) if c != label]
        for b, c in itertools.combinations(rivals, 2):
            if spread is None:
                both = int(dp[max(gap(label, b), 0), max(gap(label, c), 0)])
            else:
                values = 1 + 2 * (votes == label).astype(np.int64) - (votes == b) - (votes == c)
                total = gap(label, b) + gap(label, c)
                both = spent(values[spread].sum(1), total)
                both = max(both, alone(label, b), alone(label, c))
            units = min(units, both)
        for c in rivals:
            wants = (
                sample[:, label] >= sample[:, c] if label < c else sample[:, label] > sample[:, c]
            )
            win = int(2 * wants.sum()) - models + (c > label)
            if spread is None:
                needed = (max(win, 0) + 1) // 2
            else:
                needed = spent(2 * wants[spread].sum(1), win)
            units = min(units, max(0 if c == loser else alone(loser, c), needed))
        labels.append(label)
        radii.append(units - 1)
    return np.array(labels), np.array(radii)


def plain_python(
    logits: np.ndarray, dp: np.ndarray, spread: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The same with Python over models and buckets, too."""
    labels, radii = [], []
    models, classes = logits.shape[1:]
    feeds = None if spread is None else spread.tolist()
    for sample in logits.tolist():
        votes = [max(range(classes), key=row.__getitem__) for row in sample]
        counts = [votes.count(c) for c in range(classes)]
        one, two = sorted(sorted(range(classes), key=lambda c: (-counts[c], c))[:2])
        for_one = sum(row[one] >= row[two] for row in sample)
        label, loser = (one, two) if 2 * for_one >= models else (two, one)

        def gap(a: int, b: int, counts: list[int] = counts) -> int:
            return counts[a] - counts[b] + (b > a)

        def used(values: list[int], total: int) -> int:
            assert feeds is not None
            count = 0
            for power in sorted((sum(values[i] for i in own) for own in feeds), reverse=True):
                if total <= 0:
                    break
                total -= power
                count += 1
            return count

        def alone(
            a: int, b: int, votes: list[int] = votes, gap: Any = gap, used: Any = used
        ) -> int:
            if feeds is None:
                return (max(gap(a, b), 0) + 1) // 2
            return used([1 + (v == a) - (v == b) for v in votes], gap(a, b))

        units = math.inf
        rivals = [c for c in range(classes) if c != label]
        for b, c in itertools.combinations(rivals, 2):
            if feeds is None:
                both = int(dp[max(gap(label, b), 0), max(gap(label, c), 0)])
            else:
                values = [1 + 2 * (v == label) - (v == b) - (v == c) for v in votes]
                both = used(values, gap(label, b) + gap(label, c))
                both = max(both, alone(label, b), alone(label, c))
            units = min(units, both)
        for c in rivals:
            wants = [row[label] > row[c] or (row[label] == row[c] and label < c) for row in sample]
            win = 2 * sum(wants) - models + (c > label)
            half = (max(win, 0) + 1) // 2
            needed = half if feeds is None else used([2 * w for w in wants], win)
            units = min(units, max(0 if c == loser else alone(loser, c), needed))
        labels.append(label)
        radii.append(units - 1)
    return np.array(labels), np.array(radii)


def logits_of(samples: int, models: int) -> np.ndarray:
    random = np.random.default_rng(models)
    logits = random.normal(size=(samples, models, 10)).astype(np.float32)
    # Between a unanimous and an open election, as on real data.
    lead = random.uniform(0.5, 4.0, (samples, 1))
    for place, share in enumerate((1.0, 0.6)):
        winner = random.integers(0, 10, samples)
        logits[np.arange(samples), :, winner] += lead * share * (0.5 + place * 0.3)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    training = []
    images = data(20_000, 28)
    tiny = data(20_000, 8)
    networks = (
        ("perceptron 64-16-10, 200 of 50 samples", lambda: mlp((64, 16, 10)), tiny, 200, 50, 10,
         16),
        ("perceptron 784-16-10, 100 of 100 samples", lambda: mlp((784, 16, 10)), images, 100, 100,
         5, 16),
        ("convolutions 8-16 on 28 x 28, 50 of 100 samples", convolutions, images, 50, 100, 5, 16),
    )  # fmt: skip
    for name, make, source, count, size, epochs, batch in networks:
        parts = [np.arange(n * size, (n + 1) * size) for n in range(count)]
        ways: dict[str, Callable[[], Any]] = {
            "together": partial(train_together, make, source, parts, epochs, batch, 50),
            "bare loop": partial(train_in_turn, make, source, parts, epochs, batch),
            "fit": partial(train_by_fit, make, source, parts, epochs, batch),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(given.rounds):
            for way, work in ways.items():
                times[way].append(timed(work)[0])
        training.append(_row(name, count, times))
        print(json.dumps(training[-1]))
    for count, size in ((1200, 16), (300, 66), (50, 400)):
        parts = [np.arange(n * size, (n + 1) * size) for n in range(count)]
        learner = RidgeLearner()
        fitted = learner.fit(images, 10, parts)
        features = fitted.features(images.images).double().numpy()
        labels = images.labels.numpy()
        # Features are the same work for both, so they are left out for both.
        x = torch.from_numpy(features).float()

        def together(
            learner: Any = learner, parts: Any = parts, size: int = size, x: Any = x
        ) -> torch.Tensor:
            filled = -(-size // 32) * 32
            solved = [
                learner._solve(x, images.labels, parts[low : low + 16], filled, 10)
                for low in range(0, len(parts), 16)
            ]
            return torch.cat(solved)

        times = {"together": [], "scikit-learn": []}
        mine, theirs = torch.empty(0), np.empty(0)
        for _ in range(given.rounds):
            seconds, mine = timed(together)
            times["together"].append(seconds)
            seconds, theirs = timed(partial(ridges_in_turn, features, labels, parts))
            times["scikit-learn"].append(seconds)
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-2, atol=1e-3)
        training.append(_row(f"ridge on 300 features, {count} of {size} samples", count, times))
        print(json.dumps(training[-1]))
    certificates = []
    for method, k, d, many, some, few in (
        ("DPA+ROE", 50, 1, 20_000, 400, 100), ("DPA+ROE", 250, 1, 8000, 300, 40),
        ("DPA+ROE", 1200, 1, 2000, 200, 20), ("FA+ROE", 50, 16, 400, 20, 2),
        ("FA+ROE", 250, 8, 200, 10, 1), ("FA+ROE", 1200, 16, 20, 2, 0),
    ):  # fmt: skip
        models = k * d
        spread = finite_spread(models, finite_shifts(k, d)) if d > 1 else None
        logits = logits_of(many, models)
        dp = dynamic_program(min(models + 2, 1210)) if spread is None else np.zeros((1, 1))
        certify(logits[:1], "roe", spread)
        times = {"compiled": [], "numpy, a sample at a time": [], "plain Python": []}
        for _ in range(given.rounds):
            seconds, mine = timed(partial(certify, logits, "roe", spread))
            times["compiled"].append(seconds / many)
            seconds, other = timed(partial(one_at_a_time, logits[:some], dp, spread))
            times["numpy, a sample at a time"].append(seconds / some)
            assert (mine.labels[:some] == other[0]).all() and (mine.radii[:some] == other[1]).all()
            if few:
                seconds, other = timed(partial(plain_python, logits[:few], dp, spread))
                times["plain Python"].append(seconds / few)
                assert (mine.radii[:few] == other[1]).all()
        certificates.append(_row(f"{method}, k={k}, d={d}", 1, times))
        print(json.dumps(certificates[-1]))
    if given.json:
        write_json(given.json, {"training": training, "certificates": certificates, **about()})


def _row(name: str, count: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, a rate of ours, and the ratio of each other way to ours with its range."""
    (_, mine), *others = times.items()
    row: dict[str, Any] = {
        "what": name,
        "per_minute" if count > 1 else "per_second": (60.0 if count > 1 else 1.0)
        * count
        / statistics.median(mine),
        "seconds": {way: statistics.median(t) for way, t in times.items() if t},
        "against": {},
    }
    for way, theirs in others:
        if theirs:
            ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
            row["against"][way] = {
                "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            }  # fmt: skip
    return row


if __name__ == "__main__":
    main()
