"""Eight binary operators under one protocol, over six tracks.

A network with Hardtanh activations is trained in float; from its weights each operator starts, with
the same epochs, order and augmentation. Tracks: what is left of the accuracy on several tasks and
on several architectures; how corrupted images hurt; how training time and the choice of the
optimizer matter; what is counted; what is measured with the packed kernel on this processor.
Controls: the float network trained on for the same epochs, and the float network whose signs are
taken without any training.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.compress.quantize.binary import (
    OPERATORS,
    BinaryTraining,
    accuracy_ratio,
    binarized,
    complexity,
    deployed,
    overall,
    packed,
    robustness_ratio,
    training_metric,
)
from gossamer.core.errors import InputError
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, cosine, fit
from gossamer.core.language import TextClassification
from gossamer.core.task import Classification, Source, Task, seed_of
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.datasets.idx import idx_folder
from gossamer.datasets.splits import assemble
from gossamer.datasets.text import text_classification
from gossamer.hardware.measure import compare, measure
from gossamer.parts.binary_kernels import BinaryKernel

log = logging.getLogger(__name__)

FLOAT = "float"
UNTRAINED = "signs without training"

# Networks, with Hardtanh where others have ReLU: after a ReLU every sign would be +1


class HardtanhBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, as in a ResNet.

    Args:
        inputs: channels that come in.
        width: channels that go out.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Sequential()
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardtanh(self.bn1(self.conv1(x)))
        return F.hardtanh(self.bn2(self.conv2(y)) + self.downsample(x))


def hardtanh_resnet(
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: int = 2,
    *,
    in_channels: int = 3,
    classes: int = 10,
) -> nn.Sequential:
    """A ResNet with a 3 x 3 stem and no first pool; the default is ResNet-18 for CIFAR-10.

    Args:
        widths: channels of each stage; each but the first halves the resolution.
        blocks: in each stage.
        in_channels: of the images.
        classes: logits.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.Hardtanh(),
    ]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(HardtanhBlock(inputs, width, 2 if stage and not block else 1))
            inputs = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *head)


def hardtanh_mlp(inputs: int, width: int, depth: int, classes: int) -> nn.Sequential:
    """Linear layers with batch normalisation and Hardtanh between them.

    Args:
        inputs: values of a sample.
        width: of the hidden layers.
        depth: hidden layers.
        classes: logits.
    """
    layers: list[nn.Module] = [nn.Flatten(), nn.BatchNorm1d(inputs)]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.Hardtanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


class Transformer(nn.Module):
    """An encoder whose projections can be binarized, over rows of an image or over tokens.

    Args:
        width: of the model.
        depth: blocks.
        heads: of attention.
        classes: logits.
        length: longest sequence.
        row: values of a row of an image (with all channels), or None for tokens.
        tokens: size of the vocabulary, for tokens.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        heads: int = 4,
        classes: int,
        length: int,
        row: int | None = None,
        tokens: int = 0,
    ) -> None:
        super().__init__()
        self.embed: nn.Module = (
            nn.Linear(row, width) if row is not None else nn.Embedding(tokens, width)
        )
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.row = row

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of images ``[b, c, h, w]``, or of tokens ``[b, l]`` and their mask ``[b, l]``."""
        if self.row is not None:
            x = x.transpose(1, 2).flatten(2)
        x = self.embed(x) + self.places[: x.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if mask is None:
            return self.head(x.mean(1))
        share = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * share).sum(1) / share.sum(1).clamp(min=1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm1(x)
        parts = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(y), self.key(y), self.value(y))
        )
        seen = None if mask is None else mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(*parts, attn_mask=seen)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.hardtanh(self.up(self.norm2(x))))


# Corruptions of raw images on the scale 0 to 1, with the five severities of CIFAR-10-C (Hendrycks
# and Dietterich, arXiv:1903.12261)


def _noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.1)[level] * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[level]
    reach = math.ceil(3 * sigma)
    at = torch.arange(-reach, reach + 1, dtype=x.dtype)
    line = torch.exp(-0.5 * (at / sigma) ** 2)
    line = (line / line.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (reach,) * 4, mode="replicate")
    x = F.conv2d(x, line, groups=x.shape[1])
    return F.conv2d(x, line.transpose(2, 3), groups=x.shape[1])


def _contrast(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + mean


def _brightness(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.05, 0.1, 0.15, 0.2, 0.3)[level]


def _pixelate(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[level]
    size = [max(1, round(side * share)) for side in x.shape[2:]]
    return F.interpolate(F.interpolate(x, size, mode="area"), x.shape[2:], mode="nearest")


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
}
SEVERITIES = 5


def corrupted(task: Classification, name: str, level: int, seed: int) -> Classification:
    """The task with corrupted test images.

    Args:
        task: its data.
        name: of :data:`CORRUPTIONS`.
        level: 0 to 4.
        seed: of the noise.
    """
    source = task.splits["test"]
    scale = task.preprocess.scale
    raw = source.fetch(np.arange(len(source))).float() / scale
    generator = torch.Generator().manual_seed(seed_of(name, level, seed))
    images = CORRUPTIONS[name](raw, level, generator).clamp(0, 1) * scale
    return _with_test(task, ArraySource(images, source.labels), f"{name} {level + 1}")


def _with_test(task: Classification, test: Source, name: str) -> Classification:
    return Classification(
        task.splits | {"test": test}, task.preprocess, task.classes, name=f"{task.name}, {name}"
    )


def benchmark_corruptions(
    task: Classification, folder: Path
) -> Iterator[tuple[str, list[Classification]]]:
    """The published corrupted test sets of CIFAR-10-C, read from its ``.npy`` files.

    Args:
        task: CIFAR-10.
        folder: with ``labels.npy`` and one file of ``[50000, 32, 32, 3]`` bytes a corruption, the
            severities one after the other.

    Raises:
        InputError: if a file is missing or no such array.
    """
    files = sorted(path for path in folder.glob("*.npy") if path.stem != "labels")
    if not files:
        raise InputError(f"{folder} has no corrupted images (*.npy)")
    try:
        labels = torch.from_numpy(np.load(folder / "labels.npy", allow_pickle=False)).long()
        for path in files:
            images = torch.from_numpy(np.load(path, allow_pickle=False)).permute(0, 3, 1, 2)
            parts = zip(images.chunk(SEVERITIES), labels.chunk(SEVERITIES), strict=True)
            yield (
                path.stem,
                [_with_test(task, ArraySource(*part), path.stem) for part in parts],
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} is not CIFAR-10-C: {error}") from error


# Work


def tumours(*, seed: int = 0) -> Classification:
    """Breast tumours, embedded: 569 samples of 30 measurements of cell nuclei, two classes.

    "Breast Cancer Wisconsin (Diagnostic)" (Wolberg, Street and Mangasarian, UCI, 1993), which
    scikit-learn brings along; a sample is an image of one row.

    Args:
        seed: of the split.
    """
    from sklearn.datasets import load_breast_cancer

    values, labels = load_breast_cancer(return_X_y=True)
    rows = np.asarray(values, dtype=np.float32)
    # Measurements differ by five orders of magnitude; their logarithms are alike.
    images = torch.from_numpy(np.log1p(rows)).view(-1, 1, 1, rows.shape[1])
    return assemble(
        ArraySource(images, torch.from_numpy(np.asarray(labels))),
        ["malignant", "benign"],
        name="tumours",
        seed=seed,
        validation_fraction=0.2,
        test_fraction=0.4,
        scale=1.0,
    )


@dataclass(frozen=True)
class Work:
    """One data set and the network that learns it.

    Attributes:
        name: of the data.
        task: of a seed.
        network: makes the float network of a task.
        float_epochs: of its training.
        epochs: of every operator, and of the float network that is trained on.
        batch_size: samples a batch.
        float_lr: Adam's learning rate for the float network.
        lr: Adam's learning rate for the operators.
    """

    name: str
    task: Callable[[int], Task]
    network: Callable[[Any], nn.Module]
    float_epochs: int = 5
    epochs: int = 8
    batch_size: int = 32
    float_lr: float = 1e-3
    lr: float = 1e-3


@dataclass(frozen=True)
class Bench:
    """What the six tracks are measured on.

    Attributes:
        tasks: the task track; the first also serves corruption, training and complexity.
        architectures: one or several works for each family.
        configurations: (optimizer, learning rate, schedule) of the training track.
        corruptions: of a task and a seed, pairs of a name and the task at each severity.
        layers: (batch, channels, side) of 3 x 3 convolutions that are timed.
        products: (rows, outputs, inputs) of linear layers that are timed.
        deployed: networks that are timed whole, by name, with an input.
    """

    tasks: tuple[Work, ...]
    architectures: Mapping[str, tuple[Work, ...]]
    configurations: tuple[tuple[str, float, str], ...]
    corruptions: Callable[[Classification, int], Iterable[tuple[str, list[Classification]]]]
    layers: tuple[tuple[int, int, int], ...] = ((1, 64, 56), (1, 256, 14), (1, 512, 7))
    products: tuple[tuple[int, int, int], ...] = (
        (1024, 256, 2304),
        (256, 512, 4608),
        (1024, 64, 576),
    )
    deployed: Mapping[str, Callable[[], tuple[nn.Module, Tensor]]] = field(default_factory=dict)


def _optimizer(network: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def step_decay(fraction: float) -> float:
    """A tenth after half of the training, a hundredth after three quarters."""
    return 1.0 if fraction < 0.5 else 0.1 if fraction < 0.75 else 0.01


SCHEDULES = {"cosine": cosine, "step": step_decay}


class _Trainer:
    """Trains the contenders of one work and one seed; the float start is made once."""

    def __init__(self, work: Work, seed: int) -> None:
        self.work, self.seed = work, seed
        self.task = work.task(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("network", work.name, seed))
            self.fresh = work.network(self.task)
        self.start = copy.deepcopy(self.fresh)
        self._fit(Supervised, self.start, "adam", work.float_lr, "cosine", work.float_epochs)

    def _fit(
        self, rule: type[Supervised], network: nn.Module, optimizer: str, lr: float, schedule: str,
        epochs: int,
    ) -> float:  # fmt: skip
        made = rule(
            network,
            self.task,
            optimizer=_optimizer(network, optimizer, lr),
            schedule=SCHEDULES[schedule],
        )
        began = time.perf_counter()
        fit(
            made, self.task, epochs=epochs, batch_size=self.work.batch_size, seed=self.seed,
            title=self.work.name,
        )  # fmt: skip
        return time.perf_counter() - began

    def contender(
        self, name: str, optimizer: str = "adam", lr: float | None = None, schedule: str = "cosine"
    ) -> tuple[nn.Module, float]:
        """A trained contender (deployed, if binary) and the seconds that it took."""
        work = self.work
        lr = work.lr if lr is None else lr
        if name == FLOAT:
            network = copy.deepcopy(self.start)
            seconds = self._fit(Supervised, network, optimizer, lr, schedule, work.epochs)
            return network.cpu().eval(), seconds
        algorithm = "dorefa" if name == UNTRAINED else name
        student = binarized(
            self.start.cpu(), self.task.example_inputs, algorithm=algorithm, seed=self.seed
        )
        if name == UNTRAINED:
            student.train()  # so that normalisation sees the new activations; no weight changes
            with torch.no_grad():
                for batch in self.task.batches("train", batch_size=work.batch_size):
                    self.task.outputs(student, batch)
            return deployed(student), 0.0
        seconds = self._fit(BinaryTraining, student, optimizer, lr, schedule, work.epochs)
        return deployed(student), seconds


CONTENDERS = (FLOAT, UNTRAINED, *OPERATORS)


def contend(bench: Bench, seed: int) -> Iterator[Row]:
    """Measures every contender on all tracks for one seed.

    Args:
        bench: the works.
        seed: of splits, initial weights, data order and noise.

    Yields:
        Rows of single measurements (``track``, ``item``, ``contender`` and numbers), then one row
        for each operator and track with the ``overall`` metric.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}

    def row(track: str, contender: str, item: str, **numbers: Any) -> Row:
        made = {"track": track, "item": item, "contender": contender, "seed": seed, **numbers}
        log.info("%s", made)
        return made

    def note(track: str, contender: str, item: str, ratio: float) -> None:
        found.setdefault((track, contender), {}).setdefault(item, []).append(ratio)

    main: _Trainer | None = None
    made: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    accuracies: dict[tuple[str, str], float] = {}
    works = [("task", work.name, work) for work in bench.tasks]
    works += [("architecture", f, work) for f, ws in bench.architectures.items() for work in ws]
    for track, item, work in works:
        shared = work.name in {name for name, _ in accuracies}
        trainer = None if shared else _Trainer(work, seed)
        for name in CONTENDERS:
            if trainer is not None:
                network, took = trainer.contender(name)
                accuracies[work.name, name] = trainer.task.score(network, "test")
                if main is None or main is trainer:
                    made[name], seconds[name] = network, took
            score = accuracies[work.name, name]
            yield row(track, name, item, accuracy=score, work=work.name)
            if name != FLOAT:
                note(track, name, item, accuracy_ratio(score, accuracies[work.name, FLOAT]))
        main = main or trainer
    assert main is not None
    yield from _corruption_track(bench, main, made, row, note)
    yield from _training_track(bench, main, seconds, accuracies, row, found)
    for name in OPERATORS:
        counted = complexity(made[name], main.task.example_inputs)
        yield row("complexity", name, main.work.name, **counted)
        note("complexity", name, "storage", counted["storage_ratio"])
        note("complexity", name, "operations", counted["operation_ratio"])
    yield from _hardware_track(bench, main, made, row, note)
    for (track, name), items in found.items():
        if track != "training":
            yield row(track, name, "overall", overall=overall(items.values()))


def _corruption_track(
    bench: Bench, main: _Trainer, made: Mapping[str, Any], row: Any, note: Any
) -> Iterator[Row]:
    task = main.task
    if not isinstance(task, Classification):
        return
    clean = {name: task.score(network, "test") for name, network in made.items()}
    for corruption, severities in bench.corruptions(task, main.seed):
        scores = {
            name: float(np.mean([one.score(network, "test") for one in severities]))
            for name, network in made.items()
        }
        for name, score in scores.items():
            yield row("corruption", name, corruption, accuracy=score, clean=clean[name])
            if name != FLOAT:
                ratio = robustness_ratio(clean[FLOAT], scores[FLOAT], clean[name], score)
                note("corruption", name, corruption, ratio)


def _training_track(
    bench: Bench,
    main: _Trainer,
    seconds: Mapping[str, float],
    accuracies: Mapping[tuple[str, str], float],
    row: Any,
    found: Any,
) -> Iterator[Row]:
    taken: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    contenders = [FLOAT, *OPERATORS]
    for optimizer, lr, schedule in bench.configurations:
        for name in contenders:
            if (optimizer, lr, schedule) == ("adam", main.work.lr, "cosine"):
                score, took = accuracies[main.work.name, name], seconds[name]
            else:
                network, took = main.contender(name, optimizer, lr, schedule)
                score = main.task.score(network, "test")
            taken.setdefault(name, []).append(took)
            scores.setdefault(name, []).append(score)
            item = f"{optimizer} {lr:g} {schedule}"
            yield row("training", name, item, accuracy=score, seconds=took)
    for name in contenders:
        numbers = {"spread": float(np.std(scores[name]))}
        if name != FLOAT:
            times = list(zip(taken[FLOAT], taken[name], strict=True))
            numbers["overall"] = training_metric(times, scores[FLOAT], scores[name])
        yield row("training", name, "overall", **numbers)


def _hardware_track(
    bench: Bench, main: _Trainer, made: Mapping[str, Any], row: Any, note: Any
) -> Iterator[Row]:
    settings: list[tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = []
    settings += [
        (f"3x3 convolution {b} x {c} x {s} x {s}", partial(_convolution, b, c, s))
        for b, c, s in bench.layers
    ]
    settings += [
        (f"product {m} x {n} x {k}", partial(_linear, m, n, k)) for m, n, k in bench.products
    ]
    ratios = []
    for item, make in settings:
        module, x = make()
        ratio, low, high, float_ms, ms = _timed(module, _KernelLayer(module), x)
        if item.startswith("product"):
            ratios.append(ratio)
        yield row(
            "hardware", "kernel", item, speedup=ratio, low=low, high=high, float_ms=float_ms, ms=ms
        )
    yield row("hardware", "kernel", "least of the products", speedup=min(ratios))
    networks = {main.work.name: (lambda: (made[FLOAT], main.task.example_inputs[0][:1]))}
    networks |= dict(bench.deployed)
    for item, make in networks.items():
        module, x = make()
        for name in OPERATORS:
            network = made[name]
            if item != main.work.name:
                network = deployed(binarized(module, (x.expand(2, *x.shape[1:]),), algorithm=name))
            yield from _deployment(name, item, module, network, x, row, note)


def _deployment(
    name: str, item: str, module: nn.Module, network: Any, x: Tensor, row: Any, note: Any
) -> Iterator[Row]:
    stored = packed(network)
    runner = stored.runner(network, (x.expand(2, *x.shape[1:]),))
    with torch.inference_mode():
        same = float((runner(x) - network(x)).abs().max())
    ratio, low, high, float_ms, ms = _timed(module, runner, x)
    weights = sum(t.decode().numel() for t in stored.tensors.values())
    # Binary layers as they are stored: signs, and the float numbers that belong to them. In the
    # float network these are the weights and the normalisation that the scale and offset replace.
    own = [n.removesuffix("weight") for n in stored.tensors]
    extras = {n: t for n, t in stored.plain.items() if any(n.startswith(layer) for layer in own)}
    layers = stored.nbytes() + sum(4 * t.numel() for t in extras.values())
    total = 4 * sum(p.numel() for p in module.parameters())
    files = stored.nbytes() + stored.plain_nbytes()
    yield row(
        "hardware", name, item, speedup=ratio, low=low, high=high, float_ms=float_ms, ms=ms,
        layer_ratio=4 * weights / layers, file_ratio=total / files, bytes=files,
        float_bytes=total, difference=same,
    )  # fmt: skip
    note("hardware", name, "time", ratio)
    note("hardware", name, "size", total / files)


class _KernelLayer(nn.Module):
    """A layer of signs in the packed kernel, without scales."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        self.kernel = BinaryKernel(layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return self.kernel.linear(x, None)
        return self.kernel.conv2d(x, None, (1, 1), (1, 1), (1, 1), 1)


def _convolution(batch: int, channels: int, side: int) -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return layer, torch.randn(batch, channels, side, side)


def _linear(rows: int, outputs: int, inputs: int) -> tuple[nn.Module, Tensor]:
    return nn.Linear(inputs, outputs, bias=False), torch.randn(rows, inputs)


def _timed(
    real: nn.Module, binary: nn.Module, x: Tensor
) -> tuple[float, float, float, float, float]:
    """Ratio of times with its spread, and both times in milliseconds; one thread, in turns."""
    timings = measure(
        {"float": real.eval(), "packed": binary.eval()}, (x,), batch_sizes=(len(x),),
        runtimes=("torch",), rounds=11, round_ms=10.0, warmup_ms=30.0,
    )  # fmt: skip
    speed = compare(*timings)
    return speed.ratio, speed.low, speed.high, *(t.latency.p50 for t in timings)  # type: ignore[return-value]


# Benches


def _generated(task: Classification, seed: int) -> Iterator[tuple[str, list[Classification]]]:
    for name in CORRUPTIONS:
        yield name, [corrupted(task, name, level, seed) for level in range(SEVERITIES)]


def _digits(seed: int) -> Task:
    return digits(seed=seed)


def _tumours(seed: int) -> Task:
    return tumours(seed=seed)


def _resnet18() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hardtanh_resnet().eval(), torch.randn(1, 3, 32, 32)


def _for_digits(task: Task) -> nn.Module:
    return hardtanh_resnet((32, 64), 1, in_channels=1)


DIGITS = Work("digits", _digits, _for_digits)
TUMOURS = Work("tumours", _tumours, lambda task: hardtanh_mlp(30, 128, 3, 2))
CONFIGURATIONS = tuple(
    (optimizer, lr, schedule)
    for schedule in ("cosine", "step")
    for optimizer, lr in (("sgd", 1e-1), ("sgd", 1e-2), ("adam", 1e-3), ("adam", 1e-4))
)

QUICK = Bench(
    tasks=(DIGITS, TUMOURS),
    architectures={
        "CNN": (DIGITS,),
        "Transformer": (
            Work(
                "digits, transformer",
                _digits,
                lambda task: Transformer(64, 2, classes=10, length=8, row=8),
                float_epochs=20,
            ),
        ),
        "MLP": (Work("digits, MLP", _digits, lambda task: hardtanh_mlp(64, 256, 3, 10)),),
    },
    configurations=CONFIGURATIONS[:4],
    corruptions=_generated,
    deployed={"ResNet-18 for CIFAR-10, untrained": _resnet18},
)


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Handwritten digits and tumours, small networks, half of the training configurations."""
    for seed in seeds:
        yield from contend(QUICK, seed)


def _texts(path: Path, seed: int) -> TextClassification:
    matthews = path.stem.lower().startswith("cola")
    return text_classification(path, seed=seed, score="matthews" if matthews else "accuracy")


def _for_text(task: TextClassification) -> nn.Module:
    return Transformer(
        256, 4, classes=len(task.classes), length=task.example_inputs[0].shape[1],
        tokens=task.tokens,
    )  # fmt: skip


def full_bench(images: Path, fashion: Path, text: Path, corruptions: Path | None = None) -> Bench:
    """The published protocol as far as public data go: CIFAR-10, Fashion-MNIST and texts.

    Args:
        images: a folder that :func:`gossamer.datasets.cifar.cifar10` reads.
        fashion: a folder of idx files.
        text: a folder of labelled texts in Parquet.
        corruptions: a folder of CIFAR-10-C, or None for the generated corruptions.

    Raises:
        InputError: if there are no texts.
    """
    files = sorted(Path(text).glob("*.parquet"))
    if not files:
        raise InputError(f"{text} has no labelled texts (*.parquet)")

    def long(name: str, task: Callable[[int], Task], network: Callable[[Any], nn.Module]) -> Work:
        return Work(name, task, network, float_epochs=200, epochs=400, batch_size=128)

    vision = (
        long("cifar10", lambda seed: cifar10(images, seed=seed), lambda _: hardtanh_resnet()),
        long(
            "fashion",
            lambda seed: idx_folder(fashion, seed=seed),
            lambda _: hardtanh_resnet(in_channels=1),
        ),
    )
    texts = tuple(
        Work(
            file.stem, partial(_texts, file), _for_text, float_epochs=10, epochs=20,
            batch_size=64, float_lr=3e-4,
        )
        for file in files
    )  # fmt: skip
    flat = long(
        "fashion, MLP",
        lambda seed: idx_folder(fashion, seed=seed),
        lambda _: hardtanh_mlp(784, 1024, 3, 10),
    )

    def published(task: Classification, seed: int) -> Iterable[tuple[str, list[Classification]]]:
        if corruptions is None:
            return _generated(task, seed)
        return benchmark_corruptions(task, corruptions)

    return Bench(
        tasks=(*vision, *texts),
        architectures={"CNN": vision[:1], "Transformer": texts, "MLP": (flat,)},
        configurations=CONFIGURATIONS,
        corruptions=published,
        deployed={"ResNet-18": _resnet18},
    )


def full(
    seeds: Sequence[int],
    *,
    images: Path = Path("data/cifar10"),
    fashion: Path = Path("data/fashion_mnist"),
    text: Path = Path("data/text"),
    corruptions: Path | None = None,
) -> Iterable[Row]:
    """CIFAR-10 with ResNet-18 and all eight configurations, Fashion-MNIST, and texts.

    Args:
        seeds: one run of everything each.
        images: a folder that :func:`gossamer.datasets.cifar.cifar10` reads.
        fashion: a folder of idx files.
        text: a folder of labelled texts in Parquet.
        corruptions: a folder of CIFAR-10-C, or None.

    Raises:
        InputError: if data are missing.
    """
    bench = full_bench(images, fashion, text, corruptions)
    for work in bench.tasks:
        work.task(0)  # says at once what is missing
    for seed in seeds:
        yield from contend(bench, seed)


def draw(result: Result, path: Path) -> None:
    """Draws the overall metric of every operator on every track, mean over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    tracks = ("task", "architecture", "corruption", "training", "complexity", "hardware")
    for place, track in enumerate(tracks, start=1):
        axes = figure.add_subplot(2, 3, place)
        for at, name in enumerate(OPERATORS):
            values = [
                row["overall"]
                for row in result.rows
                if (row["track"], row["contender"], row["item"]) == (track, name, "overall")
            ]
            if values:
                axes.bar(at, float(np.mean(values)), color=f"C{at}")
                axes.plot([at] * len(values), values, "k.", markersize=4)
        axes.set_xticks(range(len(OPERATORS)), list(OPERATORS), rotation=45, fontsize=8)
        axes.set_title(track, fontsize=10)
        axes.set_ylabel("overall metric (1: as float)", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110, format="png")


def _task_accuracy(contender: str) -> Pick:
    return Pick("accuracy", {"track": "task", "contender": contender})


def _better(contender: str, name: str) -> Claim:
    return Claim(
        f"{name} is at least as accurate as BNN, mean over tasks",
        _task_accuracy(contender),
        ">=",
        _task_accuracy("bnn"),
        paper="soft slopes and channel-wise scales lead on most tasks",
    )


EXPERIMENT = Experiment(
    spec="bibench",
    title="eight binary operators on six tracks",
    claims=(
        _better("react", "ReActNet"),
        _better("recu", "ReCU"),
        _better("bireal", "Bi-Real"),
        Claim(
            "over the training configurations BNN's accuracy varies more than ReActNet's",
            Pick("spread", {"track": "training", "contender": "bnn"}),
            ">",
            Pick("spread", {"track": "training", "contender": "react"}),
            paper="BNN is among the most, ReActNet among the least sensitive",
        ),
        Claim(
            "packed, binary layers take at most 1/25 of their float32 bytes",
            Pick(
                "layer_ratio", {"track": "hardware", "contender": "react", "item": DIGITS.name}
            ),
            ">=",
            25.0,
            paper="up to 32 times smaller in theory",
        ),
        Claim(
            "the packed product is faster than float32's, at the worst of three sizes",
            Pick("speedup", {"track": "hardware", "item": "least of the products"}),
            ">",
            1.0,
            paper="only with a tuned library",
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0, 1),
    draw=draw,
)  # fmt: skip
