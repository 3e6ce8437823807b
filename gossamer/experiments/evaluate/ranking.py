"""Plackett-Luce against averages and Elo: mixed metrics, missing results, other scales.

Drawn scores: 30 models with true means from U(0, 1) and spreads from U(0, d), 300 samples, half of
them cut to right and wrong at a random threshold; rankings are compared with the true means by
Kendall's tau. Then most results are dropped, or each sample is put on a scale of its own.

Real scores: 30 classifiers on handwritten digits. On one half of the test images only right or
wrong is known, on the other half the log probability of the true class; the ranking by accuracy on
all images is the reference. And people: 90 observers of altered images, whose rankings from one
half of the trials are compared with accuracy on the other half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.evaluate.comparisons import Scores, choices_of, wins_of
from gossamer.evaluate.plackett_luce import fit_lists, fit_pairs
from gossamer.evaluate.ranking_baselines import (
    borda,
    bradley_terry_of,
    dowdall,
    elo,
    mean_score,
)
from gossamer.experiments.real_data import folder_of

MODELS, SAMPLES = 30, 300
SPREADS = (0.25, 0.5, 1.0)
MISSING = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
REGULAR = 0.01

Rank = Callable[[Scores, int], np.ndarray]
METHODS: dict[str, Rank] = {
    "Plackett-Luce": lambda scores, seed: fit_pairs(wins_of(scores), alpha=REGULAR),
    "Plackett-Luce, choices": lambda scores, seed: fit_lists(
        choices_of(scores), scores.count, alpha=REGULAR
    ),
    "Bradley-Terry": lambda scores, seed: bradley_terry_of(scores),
    "Elo": lambda scores, seed: elo(scores, seed=seed),
    "Borda": lambda scores, seed: borda(scores),
    "Dowdall": lambda scores, seed: dowdall(scores),
    "mean score": lambda scores, seed: mean_score(scores),
}


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Drawn scores, digits and people."""
    for seed in seeds:
        yield from _drawn(seed)
        yield from _digits(seed)
        yield from _people(seed)


def drawn_scores(seed: int, spread: float, samples: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``[models, samples]``, half of the samples right or wrong, and the true means."""
    random = np.random.default_rng(seed)
    means, deviations = random.uniform(0, 1, MODELS), random.uniform(0, spread, MODELS)
    matrix = random.normal(means[:, None], deviations[:, None], (MODELS, samples))
    cut = random.random(samples) < 0.5
    low, high = matrix.min(0), matrix.max(0)
    threshold = random.uniform(low, high)
    return np.where(cut, (matrix > threshold).astype(float), matrix), means


def _drawn(seed: int) -> Iterator[Row]:
    for spread in SPREADS:
        matrix, truth = drawn_scores(seed, spread)
        for name in METHODS:
            yield _row(seed, "drawn", name, matrix, truth, spread=spread, missing=0.0)
    matrix, truth = drawn_scores(seed, 0.5)
    random = np.random.default_rng([seed, 1])
    scaled = matrix * np.exp(2 * random.normal(size=SAMPLES)) + 5 * random.normal(size=SAMPLES)
    for name in METHODS:
        yield _row(seed, "other scales", name, scaled, truth, spread=0.5, missing=0.0)
    for part, count in (("missing", SAMPLES), ("missing of ten times as many", 10 * SAMPLES)):
        matrix, truth = drawn_scores(seed, 0.5, count)
        for share in MISSING:
            thin = matrix.copy()
            for row in thin:  # each model misses samples of its own
                row[random.choice(count, int(np.ceil(share * count)), replace=False)] = np.nan
            for name in METHODS:
                yield _row(seed, part, name, thin, truth, spread=0.5, missing=share)


def _row(
    seed: int, part: str, name: str, matrix: np.ndarray, truth: np.ndarray, **setting: float
) -> Row:
    return {
        "seed": seed, "part": part, "contender": name,
        "tau": _tau(METHODS[name](Scores.of_matrix(matrix), seed), truth), **setting,
    }  # fmt: skip


def _tau(found: np.ndarray, truth: np.ndarray) -> float:
    from scipy.stats import kendalltau

    known = np.isfinite(found) & np.isfinite(truth)
    outcome: Any = kendalltau(found[known], truth[known])
    return float(outcome.statistic)


def _digits(seed: int) -> Iterator[Row]:
    """Classifiers of digits: right or wrong on one half, log probabilities on the other."""
    from gossamer.datasets import open_task

    task = open_task("digits", seed=seed)
    images, labels = {}, {}
    for split in ("train", "test"):
        source = task.splits[split]
        images[split] = source.fetch(np.arange(len(source))).flatten(1).numpy() / 16.0
        labels[split] = source.labels.numpy()
    log_p = np.stack(
        [
            np.log(np.clip(model.predict_proba(images["test"]), 1e-12, 1))
            for model in _classifiers(images["train"], labels["train"], seed)
        ]
    )
    right = (log_p.argmax(2) == labels["test"]).astype(float)
    true = np.take_along_axis(log_p, labels["test"][None, :, None], 2)[..., 0]
    half = np.random.default_rng([seed, 2]).permutation(len(labels["test"]))[::2]
    mixed = true.copy()
    mixed[:, half] = right[:, half]
    truth = right.mean(1)
    for name in METHODS:
        yield _row(seed, "digits", name, mixed, truth, missing=0.0)
    random = np.random.default_rng([seed, 3])
    thin = np.where(random.random(mixed.shape) < 0.9, np.nan, mixed)
    for name in METHODS:
        yield _row(seed, "digits", name, thin, truth, missing=0.9)


def _classifiers(images: np.ndarray, labels: np.ndarray, seed: int) -> list:  # type: ignore[type-arg]
    """Thirty of six kinds, each with five settings from poor to good."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.tree import DecisionTreeClassifier

    made = [
        *(LogisticRegression(C=c, max_iter=300) for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0)),
        *(KNeighborsClassifier(k) for k in (1, 3, 9, 27, 81)),
        *(DecisionTreeClassifier(max_depth=d, random_state=seed) for d in (3, 4, 6, 8, 12)),
        *(RandomForestClassifier(n, max_depth=6, random_state=seed) for n in (2, 4, 8, 16, 64)),
        *(GaussianNB(var_smoothing=v) for v in (1e-9, 1e-3, 1e-2, 0.1, 1.0)),
        *(
            MLPClassifier((w,), max_iter=60, random_state=seed)
            for w in (2, 4, 8, 16, 64)
        ),
    ]  # fmt: skip
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few iterations are few is the point
        return [model.fit(images, labels) for model in made]


def _people(seed: int) -> Iterator[Row]:
    """Observers on 17 sets of images: nobody saw more than a few sets."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder_of("eval_scores") / "human_object_recognition.parquet")
    columns = {
        name: np.array(table[name].to_pylist(), object)
        for name in ("dataset", "subject", "image", "correct")
    }
    half = np.random.default_rng([seed, 4]).random(len(table)) < 0.5
    for dataset in np.unique(columns["dataset"]):
        here = columns["dataset"] == dataset
        who, people = np.unique(columns["subject"][here].astype(str), return_inverse=True)
        if len(who) < 4:
            continue
        # File names begin with the number of the trial and of the observer.
        shown = [re.sub(r"^\d+_[a-z0-9]+_s\d+_", "", name) for name in columns["image"][here]]
        _, images = np.unique(shown, return_inverse=True)
        values, first = columns["correct"][here].astype(float), half[here]
        pairs, place = np.unique(
            np.stack([images[first], people[first]]), axis=1, return_index=True
        )
        scores = Scores.of(pairs[0], pairs[1], values[first][place], len(who))
        truth = np.bincount(people[~first], values[~first]) / np.bincount(people[~first])
        for name, method in METHODS.items():
            yield {
                "seed": seed, "part": "people", "contender": name, "dataset": str(dataset),
                "tau": _tau(method(scores, seed), truth),
            }  # fmt: skip


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """Logs of lm-evaluation-harness and HELM in folders named by GOSSAMER_DATA/eval_logs."""
    from gossamer.evaluate.evaluation_pool import measured_of
    from gossamer.evaluate.result_logs import read_harness, read_helm

    folder = folder_of("eval_logs")
    for name, read in (("harness", read_harness), ("helm", read_helm)):
        rows, _ = read(folder / name)
        scores = measured_of(rows).scores
        truth = mean_score(scores)
        for seed in seeds:
            random = np.random.default_rng(seed)
            for share in MISSING:
                kept = random.random(len(scores.values)) >= share
                thin = Scores.of(
                    scores.samples[kept], scores.models[kept], scores.values[kept], scores.count
                )
                for contender, method in METHODS.items():
                    yield {
                        "seed": seed, "part": name, "contender": contender, "missing": share,
                        "tau": _tau(method(thin, seed), truth),
                    }  # fmt: skip


def _of(part: str, contender: str, **setting: float) -> Pick:
    return Pick("tau", {"part": part, "contender": contender, **setting})


def _claims() -> Iterator[Claim]:
    luce = "Plackett-Luce"
    for spread in SPREADS:
        yield Claim(
            f"drawn scores of spread {spread:g}: Plackett-Luce is nearer the truth than Elo by .05",
            _of("drawn", luce, spread=spread), ">=", _of("drawn", "Elo", spread=spread),
            offset=0.05, paper="on four benchmarks .21 to .63 (Elo), .64 to .99 (Plackett-Luce)",
        )  # fmt: skip
        yield Claim(
            f"drawn scores of spread {spread:g}: and no further from it than Bradley-Terry",
            _of("drawn", luce, spread=spread), ">=",
            _of("drawn", "Bradley-Terry", spread=spread), offset=-0.01,
        )  # fmt: skip
    yield Claim(
        "with 95 % of the results missing it keeps .8 of its tau",
        Pick("kept", {"part": "kept", "contender": luce}), ">=", 0.8,
        paper="rankings stay stable with about 95 % missing",
    )  # fmt: skip
    yield Claim(
        "scales of their own change nothing",
        _of("other scales", luce), "==", _of("drawn", luce, spread=0.5),
    )  # fmt: skip
    yield Claim(
        "but the mean score loses .2",
        _of("other scales", "mean score"), "<=", _of("drawn", "mean score", spread=0.5),
        offset=-0.2,
    )  # fmt: skip
    yield Claim(
        "digits, right or wrong mixed with log probabilities: nearer accuracy than the mean",
        _of("digits", luce, missing=0.0), ">", _of("digits", "mean score", missing=0.0),
    )  # fmt: skip
    yield Claim(
        "digits, nine tenths missing: nearer than Elo",
        _of("digits", luce, missing=0.9), ">", _of("digits", "Elo", missing=0.9),
    )  # fmt: skip
    yield Claim(
        "people: predicts accuracy on other trials no worse than accuracy on these",
        _of("people", luce), ">=", _of("people", "mean score"), offset=-0.02,
    )  # fmt: skip


def _with_kept(measure: Callable[[Sequence[int]], Iterator[Row]]):  # type: ignore[no-untyped-def]
    def rows(seeds: Sequence[int]) -> Iterator[Row]:
        """The rows, and what each method keeps of its tau with 95 % missing."""
        tau: dict[tuple[int, str, float], float] = {}
        for row in measure(seeds):
            if row["part"] == "missing":
                tau[row["seed"], row["contender"], row["missing"]] = row["tau"]
            yield row
        for (seed, name, share), value in tau.items():
            if share == 0.95:
                kept = value / tau[seed, name, 0.0]
                yield {"seed": seed, "part": "kept", "contender": name, "kept": kept}

    return rows


def draw(result: Result, path: Path) -> None:
    """Tau against what is missing, and against the spread of the scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name in METHODS:
        means = [
            np.mean(list(_of("missing", name, missing=share).by_seed(result.rows).values()))
            for share in MISSING
        ]
        left.plot([100 * share for share in MISSING], means, marker="o", markersize=3, label=name)
    left.set(xlabel="results missing (%)", ylabel="Kendall's tau to the true means")
    parts = {
        "drawn": dict(spread=0.5),
        "other scales": {},
        "digits": dict(missing=0.0),
        "people": {},
    }
    width = 0.8 / len(METHODS)
    for k, name in enumerate(METHODS):
        means = [
            np.mean(list(_of(part, name, **where).by_seed(result.rows).values()))
            for part, where in parts.items()
        ]
        right.bar(np.arange(len(parts)) + k * width, means, width, label=name)
    right.set_xticks(np.arange(len(parts)) + 0.4, list(parts))
    right.set_ylabel("Kendall's tau")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110, format="png")


EXPERIMENT = Experiment(
    spec="onebench",
    title="Plackett-Luce on samples of mixed metrics against averages, Elo and Borda",
    claims=tuple(_claims()),
    quick=_with_kept(quick),
    full=_with_kept(full),
    draw=draw,
)
