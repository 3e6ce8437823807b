"""Dataset quantization against one-shot coresets and random selection, at six sizes.

Fashion-MNIST, features are 50 principal components, and the learner is ridge regression on random
cosine features (one solve). Everything is chosen class by class. Quantization and random selection
draw, so each is drawn three times a seed and the spread over draws is compared, too. Then a fifth
of each image's patches is dropped, by importance and at random, and drawn again by a small masked
autoencoder that was trained on the images that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.task import Classification
from gossamer.data.compare import network_learner
from gossamer.data.coreset import herding, k_center
from gossamer.data.patches import (
    PatchStore,
    grad_cam,
    kept_patches,
    most_important,
    train_decoder,
)
from gossamer.data.quantize import bins_of, by_class, gradient_features, one_shot, sample
from gossamer.data.selection import subset
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.cifar import cifar10
from gossamer.experiments.data.prune import fashion, learned, principal, resnet18
from gossamer.experiments.real_data import folder_of

PER_CLASS = 2000
KEEP = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6)
DRAWS = 3
SIDE = 4
DROP = 0.2

Images = tuple[np.ndarray, np.ndarray]


def quick(seeds: Sequence[int]) -> Iterator[Row]:
    """Fashion-MNIST."""
    folder = folder_of("fashion_mnist")
    for seed in seeds:
        train, test = fashion(folder, PER_CLASS, seed)
        yield from _selected(train, test, seed)
        yield from _patches(train, test, seed)


def _selected(train: Images, test: Images, seed: int) -> Iterator[Row]:
    images, labels = train
    features = principal(images)
    bins = bins_of(features, labels)
    yield {
        "seed": seed, "part": "selection", "contender": "everything", "keep": 1.0,
        "accuracy": learned(train, test, seed),
    }  # fmt: skip
    drawn: dict[str, Callable[[float, int], np.ndarray]] = {
        "quantized": lambda keep, draw: sample(bins, keep, labels=labels, seed=draw),
        "random": lambda keep, draw: by_class(
            labels, len(labels), keep,
            lambda rows, count: np.random.default_rng([draw, len(rows), rows[0]]).permutation(
                len(rows)
            )[:count],
        ),
    }  # fmt: skip
    fixed: dict[str, Callable[[float], np.ndarray]] = {
        "graph cut": lambda keep: one_shot(features, keep, labels),
        "k-center": lambda keep: by_class(
            labels, len(labels), keep, lambda rows, n: k_center(features[rows], n, seed=seed)
        ),
        "herding": lambda keep: by_class(
            labels, len(labels), keep, lambda rows, n: herding(features[rows], n)
        ),
    }
    for keep in KEEP:
        for name, draw in drawn.items():
            found = []
            for number in range(DRAWS):
                rows = draw(keep, DRAWS * seed + number)
                found.append(learned((images[rows], labels[rows]), test, seed))
            yield {
                "seed": seed, "part": "selection", "contender": name, "keep": keep,
                "accuracy": float(np.mean(found)), "spread": float(np.std(found, ddof=1)),
            }  # fmt: skip
        for name, choose in fixed.items():
            rows = choose(keep)
            yield {
                "seed": seed, "part": "selection", "contender": name, "keep": keep,
                "accuracy": learned((images[rows], labels[rows]), test, seed),
            }  # fmt: skip


def _patches(train: Images, test: Images, seed: int) -> Iterator[Row]:
    images, labels = train
    rows = sample(bins_of(principal(images), labels), 0.1, labels=labels, seed=seed)
    raw = torch.from_numpy((images[rows] * 255).round().astype(np.uint8)).reshape(-1, 1, 28, 28)
    kept = torch.from_numpy(labels[rows])
    task = _task(raw, kept)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _looker()
    fit(Supervised(network, task, optimizer=sgd(network, lr=0.05)), task, epochs=5, seed=seed)
    importance = torch.cat(
        [
            grad_cam(network, inputs, "4")
            for inputs, _ in task.batches("train", batch_size=256, shuffle=False)
        ]
    )
    decoder = train_decoder(task, SIDE, drop=DROP, epochs=15, batch_size=64, seed=seed)
    count = kept_patches((28 // SIDE) ** 2, DROP)
    random = torch.rand(importance.shape, generator=torch.Generator().manual_seed(seed))
    places = {
        "important": most_important(importance, SIDE, count),
        "random": most_important(random, SIDE, count),
    }
    weights = sum(p.numel() * 4 for p in decoder.parameters())

    def row(name: str, seen: torch.Tensor, image_bytes: float, decoder_bytes: int) -> Row:
        flat = seen.flatten(1).float().numpy() / 255.0
        return {
            "seed": seed, "part": "patches", "contender": name, "keep": 0.1,
            "accuracy": learned((flat, labels[rows]), test, seed),
            "bytes_an_image": image_bytes, "decoder_bytes": decoder_bytes,
            "error": float((seen.float() - raw.float()).square().mean().sqrt()),
        }  # fmt: skip

    yield row("whole images", raw, 784.0, 0)
    for name, at in places.items():
        store = PatchStore.of(raw, kept, at, SIDE)
        stored = store.patches.shape[1] * store.patches.shape[2] + np.ceil(49 / 8)
        yield row(f"{name} patches, drawn", store.whole(decoder), float(stored), weights)
        yield row(f"{name} patches, mean", store.whole(None), float(stored), 0)


def _task(raw: torch.Tensor, labels: torch.Tensor) -> Classification:
    from gossamer.datasets.splits import assemble

    source = ArraySource(raw, labels)
    return assemble(
        source, [str(label) for label in range(10)], name="kept images",
        validation=source, test=source,
    )  # fmt: skip


def _looker() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


def full(seeds: Sequence[int]) -> Iterator[Row]:
    """CIFAR-10: selection by a ResNet-18 of ten epochs, then three architectures, 200 epochs."""
    import timm

    def make(name: str) -> Callable[[int], nn.Module]:
        def network(seed: int) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return timm.create_model(name, num_classes=10)

        return resnet18 if name == "resnet18" else network

    for seed in seeds:
        task = cifar10(folder_of("cifar10"), seed=seed)
        labels = task.splits["train"].labels.numpy()
        selector = resnet18(seed)
        fit(Supervised(selector, task), task, epochs=10, seed=seed)
        features = gradient_features(task, selector, seed=seed)
        bins = bins_of(features, labels)
        for keep in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            chosen = {
                "quantized": sample(bins, keep, labels=labels, seed=seed),
                "random": sample([np.arange(len(labels))], keep, labels=labels, seed=seed),
                "graph cut": one_shot(features, keep, labels),
                "k-center": by_class(
                    labels, len(labels), keep,
                    lambda rows, n, f=features, s=seed: k_center(f[rows], n, seed=s),
                ),
            }  # fmt: skip
            for name, rows in chosen.items():
                for network in ("resnet18", "vgg11_bn", "mobilenetv2_050"):
                    learn = network_learner(
                        make(network), epochs=200, batch_size=16 if keep <= 0.1 else 128
                    )
                    yield {
                        "seed": seed, "part": "selection", "contender": name, "keep": keep,
                        "network": network, "accuracy": learn(subset(task, rows), seed),
                    }  # fmt: skip


def draw(result: Result, path: Path) -> None:
    """Accuracy against the share kept, and against random selection."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = ("quantized", "random", "graph cut", "k-center", "herding")

    def values(name: str) -> np.ndarray:
        found = [_accuracy(name, keep).by_seed(result.rows) for keep in KEEP]
        return np.array([[seeds[seed] for seed in sorted(seeds)] for seeds in found])

    for name in names:
        style = "--o" if name == "random" else "-o"
        left.plot([100 * keep for keep in KEEP], values(name).mean(1), style, label=name)
        if name != "random":
            gained = values(name) - values("random")
            right.errorbar(
                [100 * keep for keep in KEEP], gained.mean(1),
                yerr=gained.std(1, ddof=1) if gained.shape[1] > 1 else None,
                marker="o", capsize=3, label=name,
            )  # fmt: skip
    whole = Pick("accuracy", {"contender": "everything"}).by_seed(result.rows)
    left.axhline(float(np.mean(list(whole.values()))), color="0.5", linestyle=":")
    right.axhline(0.0, color="0.5", linestyle=":")
    left.set(xscale="log", xlabel="kept (%)", ylabel="test accuracy (%)")
    right.set(xscale="log", xlabel="kept (%)", ylabel="points over random", ylim=(-15, 5))
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def _accuracy(name: str, keep: float) -> Pick:
    return Pick("accuracy", {"part": "selection", "contender": name, "keep": keep})


def _claims() -> Iterator[Claim]:
    for keep in (0.05, 0.1, 0.2):
        yield Claim(
            f"at {keep:.0%} quantization beats one-shot graph cut by more than three points",
            _accuracy("quantized", keep), ">", _accuracy("graph cut", keep), offset=3.0,
        )  # fmt: skip
    for keep in KEEP:
        yield Claim(
            f"at {keep:.0%} it is not below random by more than two standard errors",
            _accuracy("quantized", keep), ">=", _accuracy("random", keep), beyond=-2.0,
        )  # fmt: skip
    yield Claim(
        "its accuracy varies no more from draw to draw than that of random selection",
        Pick("spread", {"contender": "quantized"}), "<=", Pick("spread", {"contender": "random"}),
    )  # fmt: skip


EXPERIMENT = Experiment(
    spec="dataset-quantization",
    title="a share of greedy bins against one-shot coresets and chance",
    claims=tuple(_claims()),
    quick=quick,
    full=full,
    draw=draw,
)
