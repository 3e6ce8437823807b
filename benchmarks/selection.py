"""How long do prototype scores and greedy selection take, against textbook implementations?

Prototypes: 50,000 x 512 embeddings, 100 clusters, against scikit-learn's KMeans with pairwise
distances. Greedy functions: one class of a few thousand points, against loops that compute all
gains from the stored similarity in each step, as coreset libraries do. Everything is checked
to be the same choice. One thread, in turns; the ratio is theirs over ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.data.coreset import herding, k_center
from gossamer.data.prune import prototype_distance
from gossamer.data.submodular import FacilityLocation, GraphCut, cosine, greedy
from gossamer.parts.neighbours import normalised


def textbook_prototypes(features: np.ndarray, k: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centres = KMeans(k, n_init=1, random_state=0).fit(unit).cluster_centers_
    return pairwise_distances(unit, centres, metric="cosine").min(1)


def similarity(features: np.ndarray) -> np.ndarray:
    unit = normalised(features).astype(np.float64)
    return 0.5 + 0.5 * unit @ unit.T


def textbook_graph_cut(features: np.ndarray, count: int) -> np.ndarray:
    s = similarity(features)
    whole = s.sum(0)
    chosen: list[int] = []
    for _ in range(count):
        gains = whole - (2.0 * s[chosen].sum(0) if chosen else 0.0)
        gains[chosen] = -np.inf
        chosen.append(int(gains.argmax()))
    return np.array(chosen)


def textbook_facility(features: np.ndarray, count: int) -> np.ndarray:
    s = similarity(features)
    chosen: list[int] = []
    best = np.zeros(len(s))
    for _ in range(count):
        gains = np.maximum(0.0, s - best).sum(1)
        gains[chosen] = -np.inf
        chosen.append(int(gains.argmax()))
        best = np.maximum(best, s[chosen[-1]])
    return np.array(chosen)


def textbook_k_center(features: np.ndarray, count: int) -> np.ndarray:
    index = int(np.random.default_rng(0).integers(len(features)))
    chosen = [index]
    nearest = np.full(len(features), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.linalg.norm(features - features[chosen[-1]], axis=1))
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


def textbook_herding(features: np.ndarray, count: int) -> np.ndarray:
    mean = features.mean(0)
    chosen: list[int] = []
    for step in range(count):
        total = features[chosen].sum(0)
        away = np.linalg.norm((step + 1) * mean - total - features, axis=1)
        away[chosen] = np.inf
        chosen.append(int(away.argmin()))
    return np.array(chosen)


def timed(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=3000)
    parser.add_argument("--prototypes", type=int, default=50_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    random = np.random.default_rng(0)
    few = random.normal(size=(given.points, 64)).astype(np.float32)
    centres = random.normal(size=(100, 512))
    many = centres[random.integers(0, 100, given.prototypes)] + random.normal(
        size=(given.prototypes, 512)
    )
    many = many.astype(np.float32)
    count = given.points // 10
    pairs: dict[str, tuple[Callable[[], np.ndarray], Callable[[], np.ndarray], str]] = {
        "prototypes": (
            lambda: prototype_distance(many, 100),
            lambda: textbook_prototypes(many, 100),
            "close",
        ),
        "graph cut": (
            lambda: greedy(GraphCut(cosine(few)), len(few), count),
            lambda: textbook_graph_cut(few, count),
            "equal",
        ),
        "facility location, lazy against naive": (
            lambda: greedy(FacilityLocation(cosine(few)), len(few), count, engine="lazy"),
            lambda: textbook_facility(few, count),
            "equal",
        ),
        "k-center": (
            lambda: k_center(few, count), lambda: textbook_k_center(few, count), "equal",
        ),
        "herding": (lambda: herding(few, count), lambda: textbook_herding(few, count), "equal"),
    }  # fmt: skip
    rows = []
    for name, (ours, theirs, same) in pairs.items():
        times = []
        for _ in range(given.rounds):
            mine, found = timed(ours)
            other, expected = timed(theirs)
            times.append((mine, other))
        # Two runs of k-means end in different optima, so prototypes are compared by how well
        # they fit: the mean distance, theirs over ours.
        agree = (
            float(expected.mean() / found.mean())
            if same == "close"
            else float((found == expected).mean())
        )
        ratios = [other / mine for mine, other in times]
        rows.append(
            {
                "what": name, "ours": float(np.median([a for a, _ in times])),
                "theirs": float(np.median([b for _, b in times])),
                "ratio": float(np.median(ratios)), "low": min(ratios), "high": max(ratios),
                "agreement": agree,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]))
    sizes = (1000, 2000, 4000, 8000)
    growth = []
    for size in sizes:
        points = random.normal(size=(size, 64)).astype(np.float32)
        seconds, _ = timed(
            lambda points=points: greedy(GraphCut(cosine(points)), len(points), len(points) // 10)
        )
        growth.append({"points": size, "seconds": seconds})
        print(json.dumps(growth[-1]))
    if given.json:
        write_json(given.json, {"rows": rows, "growth": growth, **about()})


if __name__ == "__main__":
    main()
