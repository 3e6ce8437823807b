"""Private evolution: points in a box, and MNIST from printed digits.

First the distance of evolved points to four Gaussians, at several noises and thresholds. Then 5,000
images of MNIST are private and rendered digits of public typefaces are the pool: a ridge regression
learns from what evolution makes of the pool at several budgets, and is tested on MNIST's test
split. All options were set before: the paper's threshold in multiples of the noise, the generator's
own schedule, its lookahead; none was chosen by a look at the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.experiment import Claim, Experiment, Pick, Relation, Result, Row
from gossamer.core.task import Classification, Preprocess
from gossamer.data.generators import NearestImage, UniformBox
from gossamer.data.privacy_noise import SeededGaussian
from gossamer.data.private import Population, PrivateEvolution
from gossamer.data.private_baselines import FourierFeatures, dp_merf, herd, mean_features
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.idx import idx_sources
from gossamer.experiments.real_data import folder_of
from gossamer.parts.random_features import RandomFeatureClassifier
from gossamer.parts.sample_distances import (
    frechet_distance,
    precision_recall,
    sliced_wasserstein,
)

CENTRES = np.array([(-2.8, -2.8), (-2.8, 2.8), (2.8, -2.8), (2.8, 2.8)])
TOYS = ((0.0, 0.0), (1.0, 2.0), (1.0, 0.0), (3.0, 6.0), (5 * 2**0.5, 10.0), (5 * 2**0.5, 0.0))
BUDGETS = (0.5, 1.0, 4.0, math.inf)
STEPS = (0, 1, 2, 4, 6)
PRIVATE = 5000
POOL_PER_CLASS = 400
SYNTHETIC = 200
LEARNED_FROM = 2000
ITERATIONS = 6
COMPONENTS = 50
SIDE = 28
TYPEFACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Italic",
    "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10",
)  # fmt: skip


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Points, then images."""
    for seed in seeds:
        yield from _points(seed)
    for seed in seeds:
        yield from _images(folder_of("mnist"), seed)


def gaussians(seed: int, count: int = 5000) -> np.ndarray:
    """Points in four Gaussians of standard deviation 0.35, ``[count, 2]`` float32."""
    random = np.random.default_rng([seed, 1])
    around = CENTRES[random.integers(0, 4, count)]
    return (around + random.normal(0.0, 0.35, (count, 2))).astype(np.float32)


def toy(
    seed: int, *, sigma: float, threshold: float | None, lookahead: int = 4, steps: int = 8
) -> float:
    """Sliced Wasserstein-1 distance of 2,000 evolved points to 5,000 private ones."""
    private = gaussians(seed)
    population = PrivateEvolution(
        UniformBox(), _same, n_samples=2000, iterations=steps, epsilon=math.inf, sigma=sigma,
        lookahead=lookahead, threshold=threshold, noise=SeededGaussian(seed), seed=seed,
    ).fit(private)  # fmt: skip
    return sliced_wasserstein(population.samples, private)


def _same(samples: np.ndarray) -> np.ndarray:
    return samples


def _points(seed: int) -> Iterator[Row]:
    private = gaussians(seed)
    about = {"seed": seed, "part": "points"}
    start = UniformBox().random(np.zeros(2000), seed=seed)
    fresh = gaussians(seed + 1000, 2000)
    yield {**about, "contender": "start", "distance": sliced_wasserstein(start, private)}
    yield {**about, "contender": "fresh sample", "distance": sliced_wasserstein(fresh, private)}
    for sigma, threshold in TOYS:
        yield {
            **about, "contender": "evolved", "sigma": round(sigma, 2), "threshold": threshold,
            "distance": toy(seed, sigma=sigma, threshold=threshold),
        }  # fmt: skip
    yield {
        **about, "contender": "without lookahead", "sigma": 1.0, "threshold": 2.0,
        "distance": toy(seed, sigma=1.0, threshold=2.0, lookahead=0),
    }  # fmt: skip


def _images(folder: Path, seed: int) -> Iterator[Row]:
    bench = Bench(folder, seed)
    about = {"seed": seed, "part": "images"}
    drawn = bench.api.random(np.repeat(np.arange(10), LEARNED_FROM // 10), seed=seed)
    random = Population(drawn, np.repeat(np.arange(10), LEARNED_FROM // 10))
    # No budget at all: what every other contender has to beat.
    yield {**about, "contender": "evolved", "epsilon": 0.0, **bench.measured(random)}
    for epsilon in BUDGETS:
        pe = bench.evolution(epsilon)
        for number, population in bench.watched(pe, STEPS if epsilon == 1.0 else (ITERATIONS,)):
            found = bench.measured(bench.expanded(population, pe))
            if number == ITERATIONS:
                name = "inf" if math.isinf(epsilon) else epsilon
                yield {**about, "contender": "evolved", "epsilon": name, **found}
            if epsilon == 1.0:
                yield {**about, "part": "steps", "contender": "evolved", "steps": number, **found}
    for name, epsilon, options in (
        ("without threshold", 0.5, {"threshold": None}),
        ("without threshold", 1.0, {"threshold": None}),
        ("without lookahead", 1.0, {"lookahead": 0}),
    ):
        pe = replace(bench.evolution(epsilon), **options)
        ((_, population),) = bench.watched(pe, (ITERATIONS,))
        found = bench.measured(bench.expanded(population, pe))
        yield {**about, "contender": name, "epsilon": epsilon, **found}
    for steps in (1, 12):
        pe = bench.evolution(1.0, steps)
        ((_, population),) = bench.watched(pe, (steps,))
        found = bench.measured(bench.expanded(population, pe))
        yield {**about, "part": "equal budget", "contender": "evolved", "steps": steps, **found}
    for epsilon in (0.5, 1.0, 4.0):
        features = FourierFeatures(bench.pool_vectors, seed=seed)
        means = mean_features(
            features, bench.private_vectors, bench.private[1], epsilon=epsilon, delta=1e-5,
            noise=SeededGaussian(seed),
        )  # fmt: skip
        yield {
            **about, "contender": "mean embedding, herded from the pool", "epsilon": epsilon,
            **bench.measured(bench.herded(means, features)),
        }  # fmt: skip
    # As in its paper on pixels: what leaves a subspace alone would leave the rest of an image grey.
    flat, labels = bench.private[0].reshape(PRIVATE, -1) / 255.0, bench.private[1]
    features = FourierFeatures(bench.pool.reshape(len(bench.pool), -1) / 255.0, seed=seed)
    means = mean_features(
        features, flat, labels, epsilon=1.0, delta=1e-5, noise=SeededGaussian(seed)
    )
    network = dp_merf(means, features, nn.Identity(), bench.pool_task(), seed=seed)
    found = bench.measured(bench.generated(network, seed))
    yield {**about, "contender": "DP-MERF", "epsilon": 1.0, **found}
    real = Population(bench.private[0][:LEARNED_FROM], bench.private[1][:LEARNED_FROM])
    yield {**about, "contender": "private images", "epsilon": "inf", **bench.measured(real)}


class Bench:
    """Private MNIST, a public pool of rendered digits, and what both are measured by.

    Args:
        folder: of MNIST.
        seed: of the private draw, the pool and every run.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        sources, _ = idx_sources(folder)
        random = np.random.default_rng([seed, 2])
        parts = []
        for split, count in (("train", PRIVATE), ("test", 4000)):
            rows = random.permutation(len(sources[split]))[:count]
            images = sources[split].fetch(rows).numpy()
            parts.append((images, sources[split].labels.numpy()[rows]))
        self.seed = seed
        self.private, self.test = parts
        self.pool, self.pool_labels = rendered_digits(POOL_PER_CLASS, seed)
        self.embedding = PrincipalComponents(self.pool)
        self.private_vectors = self.embedded(self.private[0])
        self.pool_vectors = self.embedded(self.pool)
        self.api = NearestImage(self.pool, self.embedded, self.pool_labels)

    def embedded(self, images: np.ndarray) -> np.ndarray:
        """Principal components of the public pool, ``[n, 50]``."""
        with torch.inference_mode():
            flat = torch.from_numpy(images.reshape(len(images), -1)).float() / 255.0
            return self.embedding(flat).numpy()

    def evolution(self, epsilon: float, steps: int = ITERATIONS) -> PrivateEvolution:
        """Evolution with the options that were set before."""
        return PrivateEvolution(
            self.api, self.embedded, n_samples=SYNTHETIC, iterations=steps, epsilon=epsilon,
            delta=1e-5, noise=SeededGaussian(self.seed), seed=self.seed,
        )  # fmt: skip

    def watched(self, pe: PrivateEvolution, wanted: Sequence[int]) -> list[tuple[int, Population]]:
        """Populations at some iterations of a run."""
        kept: list[tuple[int, Population]] = []

        def watch(number: int, population: Population) -> None:
            if number in wanted:
                kept.append((number, population))

        pe.evolve(self.private_vectors, self.private[1], watch=watch)
        return kept

    def expanded(self, population: Population, pe: PrivateEvolution) -> Population:
        """Variants of the last degree, as many as are learned from; they cost nothing more."""
        fold = LEARNED_FROM // len(population.samples)
        samples = np.repeat(population.samples, fold, axis=0)
        labels = np.repeat(population.labels, fold)
        degree = self.api.degrees(pe.iterations)[-1]
        return Population(
            self.api.variation(samples, labels, degree, seed=self.seed + 10_000), labels
        )

    def herded(self, means: torch.Tensor, features: FourierFeatures) -> Population:
        """Members of the pool that have the released means."""
        rows = []
        for label in range(10):
            members = self.api.members(label)
            picked = herd(means[label], features, self.pool_vectors[members], LEARNED_FROM // 10)
            rows.append(members[picked])
        chosen = np.concatenate(rows)
        return Population(self.pool[chosen], self.pool_labels[chosen])

    def generated(self, network: nn.Module, seed: int) -> Population:
        """Images of a trained generator."""
        labels = torch.arange(10).repeat_interleave(LEARNED_FROM // 10)
        codes = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            images = network.cpu().eval()(codes, labels).reshape(-1, 1, SIDE, SIDE)
        return Population((images * 255.0).round().byte().numpy(), labels.numpy())

    def pool_task(self) -> Classification:
        """The public pool as a task."""
        source = ArraySource(torch.from_numpy(self.pool), torch.from_numpy(self.pool_labels))
        preprocess = Preprocess(1, SIDE, SIDE, (0.0,), (1.0,))
        return Classification(
            {"train": source, "validation": source}, preprocess, [str(d) for d in range(10)],
            name="rendered digits",
        )  # fmt: skip

    def measured(self, population: Population) -> dict[str, float]:
        """Accuracy on MNIST's test split, Fréchet distance, precision and recall.

        All but the accuracy look at the private images, so they are for this experiment only.
        """
        flat = population.samples.reshape(len(population.samples), -1) / 255.0
        model = RandomFeatureClassifier(count=1000, seed=self.seed).fit(flat, population.labels, 10)
        vectors = self.embedded(population.samples)
        precision, recall = precision_recall(self.private_vectors[:LEARNED_FROM], vectors)
        return {
            "accuracy": model.accuracy(
                self.test[0].reshape(len(self.test[0]), -1) / 255.0, self.test[1]
            ),
            "distance": frechet_distance(self.private_vectors, vectors),
            "precision": 100.0 * precision,
            "recall": 100.0 * recall,
        }


class PrincipalComponents(nn.Module):
    """Projection on the principal components of public images.

    Args:
        public: ``[n, channels, height, width]`` uint8.
        count: components.
    """

    mean: torch.Tensor
    axes: torch.Tensor

    def __init__(self, public: np.ndarray, count: int = COMPONENTS) -> None:
        super().__init__()
        from sklearn.decomposition import PCA

        flat = public.reshape(len(public), -1).astype(np.float32) / 255.0
        found = PCA(count, svd_solver="covariance_eigh").fit(flat)
        self.register_buffer("mean", torch.from_numpy(np.asarray(found.mean_, dtype=np.float32)))
        self.register_buffer(
            "axes", torch.from_numpy(np.asarray(found.components_, dtype=np.float32).T.copy())
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) @ self.axes


def rendered_digits(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits of typefaces, turned, sheared, thickened and scaled.

    Args:
        per_class: images of each digit.
        seed: of the draws.

    Returns:
        Images ``[10 * per_class, 1, 28, 28]`` uint8, and labels int64.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", 60) for name in TYPEFACES]
    random = np.random.default_rng([seed, 3])
    labels = np.repeat(np.arange(10), per_class)
    images = np.empty((len(labels), 1, SIDE, SIDE), dtype=np.uint8)
    for at, label in enumerate(labels):
        canvas = Image.new("L", (112, 112))
        font, stroke = fonts[random.integers(len(fonts))], int(random.integers(0, 4))
        ImageDraw.Draw(canvas).text(
            (56, 56), str(label), fill=255, font=font, anchor="mm", stroke_width=stroke
        )
        angle, shear = np.deg2rad(random.uniform(-15, 15)), random.uniform(-0.4, 0.4)
        cosine, sine = np.cos(angle), np.sin(angle)
        wide, high = np.exp(random.uniform(-0.35, 0.15, 2))
        matrix = np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[1.0, shear], [0.0, 1.0]])
        matrix = matrix / np.array([wide, high])
        move = np.array([56.0, 56.0]) - matrix @ np.array([56.0, 56.0])
        moved = canvas.transform(
            (112, 112), Image.Transform.AFFINE,
            (*matrix[0], move[0], *matrix[1], move[1]), Image.Resampling.BILINEAR,
        )  # fmt: skip
        images[at, 0] = _as_mnist(moved)
    return images, labels


def _as_mnist(canvas: Any) -> np.ndarray:
    """The ink within 20 x 20 pixels, its centre of mass in the middle of 28 x 28."""
    from PIL import Image

    inked = canvas.crop(canvas.getbbox())
    scale = 20.0 / max(inked.size)
    size = [max(1, round(side * scale)) for side in inked.size]
    small = np.asarray(inked.resize(size, Image.Resampling.BOX), dtype=np.float64)
    page = np.zeros((SIDE, SIDE))
    mass = small.sum()
    centre = [
        float((small.sum(1 - axis) * np.arange(small.shape[axis])).sum() / mass) for axis in (0, 1)
    ]
    top, left = (
        int(np.clip(round(13.5 - middle), 0, SIDE - side))
        for middle, side in zip(centre, small.shape, strict=True)
    )
    page[top : top + small.shape[0], left : left + small.shape[1]] = small
    return page.round().astype(np.uint8)


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """CIFAR-10 by a diffusion model of ImageNet behind ``$GOSSAMER_GENERATOR``, as in the paper."""
    import os

    import timm

    from gossamer.core.errors import InputError
    from gossamer.data.http_generator import HttpGenerator
    from gossamer.datasets.collection import open_collection
    from gossamer.parts.embedding import embed

    url = os.environ.get("GOSSAMER_GENERATOR")
    if url is None:
        raise InputError("set GOSSAMER_GENERATOR to the address of a generator of 32 x 32 images")
    private = open_collection(folder_of("cifar10"))
    network = timm.create_model("inception_v3", pretrained=True).eval()
    preprocess = Preprocess(3, 299, 299, (0.5,) * 3, (0.5,) * 3)

    def prepared(images: torch.Tensor) -> torch.Tensor:
        large = nn.functional.interpolate(images.float(), (299, 299), mode="bilinear")
        return preprocess(large)

    def embedded(images: np.ndarray) -> np.ndarray:
        source = ArraySource(torch.from_numpy(images), torch.zeros(len(images), dtype=torch.int64))
        return embed(source, network, prepared).features

    features = embed(private, network, prepared).features
    for seed in seeds:
        pe = PrivateEvolution(
            HttpGenerator(url, (3, 32, 32)), embedded, n_samples=50_000, iterations=20,
            epsilon=2.6, sigma=5.0 * math.sqrt(2.0), threshold=10.0, lookahead=8,
            degrees=[float(step) for step in range(0, 41, 2)], seed=seed,
        )  # fmt: skip
        rows: list[Row] = []

        def watch(number: int, population: Population, seed: int = seed, rows: Any = rows) -> None:
            rows.append(
                {
                    "seed": seed, "part": "cifar10", "contender": "evolved", "steps": number,
                    "distance": frechet_distance(features, embedded(population.samples)),
                }
            )  # fmt: skip

        pe.evolve(features, private.labels, watch=watch)
        yield from rows


def draw(result: Result, path: Path) -> None:
    """Points by noise; accuracy and distance by budget; the course of a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    points, accuracy, distance = figure.subplots(1, 3)
    rows = [dict(row) for row in result.rows]

    def values(metric: str, **where: Any) -> list[float]:
        return list(Pick(metric, where).by_seed(rows).values()) or [float("nan")]

    bars = [("start", {"contender": "start"})] + [
        (f"σ {s:.3g}, H {h:.3g}", {"contender": "evolved", "sigma": round(s, 2), "threshold": h})
        for s, h in TOYS
    ]
    bars += [("no lookahead, σ 1", {"contender": "without lookahead"})]
    means = [np.mean(values("distance", part="points", **where)) for _, where in bars]
    points.barh([name for name, _ in bars][::-1], means[::-1])
    floor = float(np.mean(values("distance", part="points", contender="fresh sample")))
    points.axvline(floor, color="0.4", linestyle=":")
    points.set(xlabel="sliced Wasserstein-1", xscale="log")
    points.set_title("points (dotted: a fresh sample)", fontsize=10)
    budgets = [0.0, *BUDGETS[:-1], "inf"]
    names = ("evolved", "without threshold", "mean embedding, herded from the pool", "DP-MERF")
    for axes, metric, label in (
        (accuracy, "accuracy", "test accuracy (%)"),
        (distance, "distance", "Fréchet distance"),
    ):
        for name in names:
            found = [
                (at, values(metric, part="images", contender=name, epsilon=epsilon))
                for at, epsilon in enumerate(budgets)
            ]
            found = [(at, v) for at, v in found if np.isfinite(v).all()]
            axes.errorbar(
                [at for at, _ in found], [np.mean(v) for _, v in found],
                [np.std(v) for _, v in found], marker="o", capsize=3, label=name,
            )  # fmt: skip
        axes.set_xticks(range(len(budgets)), [str(b) for b in budgets])
        axes.set(xlabel="epsilon (delta 1e-5)", ylabel=label)
    accuracy.set_title("MNIST from printed digits", fontsize=10)
    accuracy.legend(fontsize=7)
    figure.savefig(path, dpi=110, format="png")


def _at(metric: str, epsilon: Any, contender: str = "evolved") -> Pick:
    return Pick(metric, {"part": "images", "contender": contender, "epsilon": epsilon})


def _claims() -> Iterator[Claim]:
    ladder = [0.0, *BUDGETS[:-1], "inf"]
    directions: tuple[tuple[str, Relation, Relation], ...] = (
        ("distance", ">=", "<"),
        ("accuracy", "<=", ">"),
    )
    for metric, worse, better in directions:
        # Within noise: a step back of up to two standard errors is none.
        for low, high in pairwise(ladder):
            yield Claim(
                f"{metric} does not get worse from epsilon {low} to {high} (within noise)",
                _at(metric, low), worse, _at(metric, high), beyond=-2.0,
            )  # fmt: skip
        for low, high in pairwise(STEPS):
            yield Claim(
                f"{metric} does not get worse from iteration {low} to {high} (within noise)",
                Pick(metric, {"part": "steps", "steps": low}), worse,
                Pick(metric, {"part": "steps", "steps": high}), beyond=-2.0,
            )  # fmt: skip
        yield Claim(
            f"{metric}: epsilon 1 is better than the generator alone by two standard errors",
            _at(metric, 1.0), better, _at(metric, 0.0), beyond=2.0,
            paper="CIFAR-10: FID 7.9 or less at epsilon 0.67",
        )  # fmt: skip
        yield Claim(
            f"{metric}: better than DP-MERF at epsilon 1",
            _at(metric, 1.0), better, _at(metric, 1.0, "DP-MERF"),
        )  # fmt: skip
    high = round(TOYS[-1][0], 2)
    yield Claim(
        "at high noise the threshold helps (points)",
        Pick("distance", {"part": "points", "sigma": high, "threshold": 10.0}), "<",
        Pick("distance", {"part": "points", "sigma": high, "threshold": 0.0}),
    )  # fmt: skip
    for metric, _, better in directions:
        yield Claim(
            f"at high noise the threshold helps (images, epsilon 0.5, {metric})",
            _at(metric, 0.5), better, _at(metric, 0.5, "without threshold"),
        )  # fmt: skip


EXPERIMENT = Experiment(
    spec="private-evolution",
    title="private synthetic data from a generator's two calls, by budget",
    claims=tuple(_claims()),
    quick=quick,
    full=full,
    draw=draw,
)
