"""Adapting word lengths against fixed ones, MuPPET's, float and rounding after training.

Every contender that trains starts from the same weights, sees the same batches in the same order
under the same learning-rate schedule, and gets at least as many trials as AdaPT (learning rates by
what is done to gradients), chosen on the validation split. The test split is scored once, on the
packed file after it was written and read again. Speed-ups and size ratios are those of the paper's
analytical model; bytes and seconds are measured.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.compress.quantize.fixed_point import (
    PLAIN,
    Adaptation,
    AdaptivePrecision,
    BlockFloating,
    FixedPointNetwork,
    FixedPointTraining,
    Numerics,
    Performance,
    ReduceOnPlateau,
    Schedule,
    SwitchPolicy,
    model_performance,
    published_sgd,
    rounded_after_training,
    scaled_profile,
    variance_scaling_,
)
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import cosine, fit
from gossamer.core.task import Task, seed_of
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import cifar_resnet
from gossamer.parts.fixed_point import FixedPoint
from gossamer.parts.packed import PackedNetwork

log = logging.getLogger(__name__)

Make = Callable[[nn.Module, torch.optim.Optimizer, Schedule], FixedPointTraining]

INPUTS = FixedPoint(16, 8)
"""Where the packed network runs in integers: the format of layers' inputs."""


@dataclass(frozen=True)
class Work:
    """What the contenders compete on.

    Attributes:
        task: of a seed.
        network: makes the network; its weights are drawn anew.
        adaptation: how AdaPT's formats adapt.
        fixed: formats of the baselines with a fixed word length.
        epochs: of every training.
        batch_size: samples a batch.
        rates: learning rates tried.
        schedule: makes the learning-rate schedule, the same for all.
    """

    task: Callable[[int], Task]
    network: Callable[[], nn.Module]
    adaptation: Adaptation
    fixed: tuple[FixedPoint, ...]
    epochs: int
    batch_size: int
    rates: tuple[float, ...]
    schedule: Callable[[], Schedule]


@dataclass(frozen=True)
class Trained:
    """One finished trial."""

    rule: FixedPointTraining
    gradients: str
    rate: float
    validation: float
    curve: Sequence[float | None]
    seconds: float


def contend(work: Work, seed: int) -> Iterator[Row]:
    """Trains and scores every contender for one seed.

    Args:
        work: data, network and budget.
        seed: of split, initial weights and data order.

    Yields:
        One row for each contender.
    """
    task = work.task(seed)

    def train(make: Make, gradients: str, rate: float) -> Trained:
        network = work.network()
        variance_scaling_(network, scale=2.0, seed=seed_of("weights", seed))
        rule = make(network, published_sgd(network, lr=rate), work.schedule())
        history = fit(
            rule, task, epochs=work.epochs, batch_size=work.batch_size, seed=seed,
            validate="validation", title=gradients,
        )  # fmt: skip
        validation = task.score(rule.network, "validation")
        return Trained(rule, gradients, rate, validation, history.score, history.seconds)

    def trials(variants: Mapping[str, Make]) -> list[Trained]:
        return [
            train(make, gradients, rate)
            for gradients, make in variants.items()
            for rate in work.rates
        ]

    def best(found: Sequence[Trained]) -> Trained:
        return max(found, key=lambda trial: trial.validation)

    def fixed(start: FixedPoint | None, numerics: Numerics) -> Make:
        return lambda network, optimizer, schedule: FixedPointTraining(
            network, task, start=start, numerics=numerics, optimizer=optimizer, schedule=schedule
        )

    def adapt(adaptation: Adaptation, numerics: Numerics) -> Make:
        return lambda network, optimizer, schedule: AdaptivePrecision(
            network, task, adaptation=adaptation, numerics=numerics, optimizer=optimizer,
            schedule=schedule,
        )  # fmt: skip

    def muppet(policy: SwitchPolicy) -> Make:
        return lambda network, optimizer, schedule: BlockFloating(
            network, task, policy=policy, optimizer=optimizer, schedule=schedule
        )

    def row(name: str, trial: Trained, reference: Trained) -> Row:
        rule = trial.rule
        after = [score or 0.0 for score in trial.curve]
        reached = [e for e, s in enumerate(after, 1) if s >= reference.validation]
        words = torch.tensor([[entry[0] for entry in step] for step in rule.log])
        found = _stored(name, rule.fixed, task, seed) | {
            "validation": trial.validation,
            "learning_rate": trial.rate,
            "gradients": trial.gradients,
            "trained_word_length": float(words.mean()),
            "epoch_of_float_accuracy": reached[0] if reached else None,
            "training_seconds": trial.seconds,
        }
        batch = model_performance(rule, task.example_inputs, samples=work.batch_size)
        single = model_performance(rule, task.example_inputs)
        found |= _modelled(batch) | {"train_speedup_per_sample": single.train_speedup}
        if isinstance(rule, BlockFloating):
            found["epochs_at_level"] = list(rule.spent)
        log.info("%s", found)
        return found

    normal, unrounded = Numerics(), Numerics(quantize_gradients=False)
    plain = trials({"plain": fixed(None, PLAIN)})
    normalised = trials({"normalised": fixed(None, unrounded)})
    reference = best([*plain, *normalised])
    yield row("float32", reference, reference)
    yield row("float32, plain gradients", best(plain), reference)
    yield row("float32, normalised gradients", best(normalised), reference)

    averaged = replace(work.adaptation, published_average=True)
    found: dict[str, Trained] = {}
    for name, adaptation in (("AdaPT", work.adaptation), ("AdaPT, published average", averaged)):
        variants = {
            "normalised, rounded": adapt(adaptation, normal),
            "normalised": adapt(adaptation, unrounded),
        }
        found[name] = best(trials(variants))
        yield row(name, found[name], reference)
    ours = found["AdaPT"].rule.fixed
    yield _stored("AdaPT in integers", ours, task, seed, INPUTS)

    for format in work.fixed:
        variants = {
            "normalised, rounded": fixed(format, normal),
            "normalised": fixed(format, unrounded),
            "plain": fixed(format, PLAIN),
        }
        yield row(f"fixed {format}", best(trials(variants)), reference)

    profile = SwitchPolicy(profile=scaled_profile(work.epochs))
    variants = {"policy": muppet(SwitchPolicy()), "published profile": muppet(profile)}
    yield row("MuPPET", best(trials(variants)), reference)

    words = list(ours.word_lengths().values())
    average = round(sum(words) / len(words))
    for name, word in (
        ("rounded after training, AdaPT's mean word", average),
        ("rounded after training, 8 bits", 8),
        ("rounded after training, PushDown", None),
    ):
        rounded = rounded_after_training(
            reference.rule.master, word, epsilon=work.adaptation.epsilon,
            bins=work.adaptation.resolution[1],
        )  # fmt: skip
        yield _stored(name, rounded, task, seed)


def _stored(
    name: str, network: FixedPointNetwork, task: Task, seed: int, inputs: FixedPoint | None = None
) -> dict[str, Any]:
    """Writes the packed file, reads it again and scores what it runs as."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        network.packed(inputs).save(path)
        size = path.stat().st_size
        runner = PackedNetwork.load(path).runner(network.network, task.example_inputs)
    words = list(network.word_lengths().values())
    parameters = dict(network.network.named_parameters())
    counts = [parameters[n].numel() for n in network.weight_names]
    return {
        "contender": name,
        "seed": seed,
        "accuracy": task.score(runner, "test"),
        "word_length": sum(words) / len(words),
        "word_length_by_size": sum(w * c for w, c in zip(words, counts, strict=True)) / sum(counts),
        "layers_differ": float(len(set(words)) > 1),
        "formats": [str(network.formats[n] or "float") for n in network.weight_names],
        "file_bytes": size,
        "float_bytes": 4 * sum(t.numel() for t in network.network.state_dict().values()),
    }


def _modelled(performance: Performance) -> dict[str, float]:
    return {
        "train_speedup": performance.train_speedup,
        "adapting_share": performance.overhead,
        "inference_speedup": performance.inference_speedup,
        "size_ratio": performance.size_ratio,
        "size_ratio_by_layer": performance.size_ratio_by_layer,
    }


def _digits(seed: int) -> Task:
    return digits(seed=seed)


DIGITS = Work(
    task=_digits,
    network=lambda: ConvNet(1, 8, (16, "pool", 32, "pool"), (64,), norm=False),
    adaptation=Adaptation(lookback=(5, 20), resolution=(10, 50)),
    fixed=(FixedPoint(8, 4), FixedPoint(6, 3)),
    epochs=20,
    batch_size=64,
    rates=(0.02, 0.05, 0.1, 0.2),
    schedule=lambda: cosine,
)


def cifar_work(folder: Path) -> Work:
    """CIFAR-10, ResNet-20, the paper's defaults, all fixed formats."""
    return Work(
        task=lambda seed: cifar10(folder, seed=seed),
        network=partial(cifar_resnet, 20),
        adaptation=Adaptation(),
        fixed=tuple(FixedPoint(w, f) for w, f in ((6, 3), (8, 4), (16, 8), (32, 16))),
        epochs=100,
        batch_size=128,
        rates=(0.02, 0.05, 0.1, 0.2),
        schedule=ReduceOnPlateau,
    )


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Handwritten digits, a LeNet of two convolutions and two linear layers."""
    for seed in seeds:
        yield from contend(DIGITS, seed)


def full(seeds: Sequence[int], *, images: Path = Path("data/cifar10")) -> Iterable[Row]:
    """CIFAR-10 and ResNet-20.

    Args:
        seeds: one run of everything each.
        images: a folder that :func:`gossamer.datasets.cifar.cifar10` reads.
    """
    work = cifar_work(images)
    for seed in seeds:
        yield from contend(work, seed)


def draw(result: Result, path: Path) -> None:
    """Draws test accuracy against the bytes of the packed file, mean over seeds with the range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = dict.fromkeys(row["contender"] for row in result.rows)
    for marker, name in zip("o^vsDPX*<>pdh", names, strict=False):
        chosen = [row for row in result.rows if row["contender"] == name]
        scores = [row["accuracy"] for row in chosen]
        size, score = (sum(v) / len(chosen) for v in ([r["file_bytes"] for r in chosen], scores))
        spread = [[score - min(scores)], [max(scores) - score]]
        axes.errorbar(size, score, yerr=spread, marker=marker, capsize=3, ls="none", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the packed file")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=120, format="png")


def _of(metric: str, contender: str = "AdaPT") -> Pick:
    return Pick(metric, {"contender": contender})


EXPERIMENT = Experiment(
    spec="adapt-precision",
    title="word lengths that adapt while training against fixed ones, MuPPET's and float",
    claims=(
        Claim(
            "AdaPT is within 1 point of float32",
            _of("accuracy"),
            ">=",
            _of("accuracy", "float32"),
            offset=-1.0,
            paper="CIFAR-10/100, AlexNet and ResNet-20: .98 points above float32 on average",
        ),
        Claim("its mean word is shorter than 16 bits", _of("word_length"), "<", 16.0),
        Claim("layers end with different word lengths", _of("layers_differ"), ">=", 1.0),
        Claim(
            "modelled inference is faster by more than 1.5",
            _of("inference_speedup"),
            ">",
            1.5,
            paper="2.33 on average",
        ),
        Claim(
            "its size ratio is below .6",
            _of("size_ratio"),
            "<",
            0.6,
            paper=".52 on average",
        ),
        Claim(
            "AdaPT is more accurate than training with a fixed <6,3>",
            _of("accuracy"),
            ">",
            _of("accuracy", "fixed <6,3>"),
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0, 1, 2, 3),
    draw=draw,
)
