"""Quantized distillation against rounding after training, on images and on text.

A large teacher, a small student and few bits. Contenders are the float networks, the distilled
student rounded after training with and without buckets (post mortem), quantized distillation,
quantized training without a teacher (the control that separates the teacher from training through
the quantizer), and differentiable quantization with equal and with redistributed levels. Every
contender that trains gets the same number of trials, chosen on the validation split; the test split
is scored once, on the network decoded from its packed form.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.compress.distil import DistillationCriterion
from gossamer.compress.quantize.distilled import (
    DifferentiableQuantization,
    QuantizedDistillation,
    UniformOptions,
    huffman_bits,
    pack_uniform,
    published_sgd,
)
from gossamer.core.errors import InputError
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit
from gossamer.core.task import Task, device_of, evaluating, logits_of, seed_of, to_device
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.models.plain import ConvNet
from gossamer.parts.packed import PackedNetwork

log = logging.getLogger(__name__)

T = TypeVar("T", nn.Module, PackedNetwork)

# Networks


def digits_teacher() -> nn.Module:
    """Convolutions of 32 and 64 channels, a hidden layer of 128."""
    return ConvNet(1, 8, (32, "pool", 64, "pool"), (128,))


def digits_student() -> nn.Module:
    """Convolutions of 8 and 16 channels, a hidden layer of 32."""
    return ConvNet(1, 8, (8, "pool", 16, "pool"), (32,))


def cifar_teacher() -> nn.Module:
    """The paper's teacher, 5.3 million parameters."""
    plan = (76, 76, "pool", "drop:0.2", 126, 126, "pool", "drop:0.3")
    deep = (148, 148, 148, 148, "pool", "drop:0.35")
    return ConvNet(3, 32, (*plan, *deep), (1200, 1200), drop=0.4)


def cifar_student() -> nn.Module:
    """The paper's first student, 1.0 million parameters, without dropout."""
    return ConvNet(3, 32, (75, "pool", 50, 50, "pool", 25), (500,), kernel=5)


class CharacterLstm(nn.Module):
    """Embedding, one LSTM layer, linear head: logits of the next character.

    Args:
        characters: size of the alphabet.
        width: of embedding and state.
    """

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits ``[batch, length, characters]`` of what follows each of ``[batch, length]``."""
        return self.head(self.lstm(self.embedding(codes))[0])


class CharacterText(Task):
    """Next-character prediction on the text files of a folder.

    The text is cut in order into 90 % for training, 5 % for validation and 5 % for testing, and
    each part into windows. Characters that the training part lacks share one code.

    Args:
        folder: its ``*.txt`` files, UTF-8, in order of their names.
        length: characters a window.
        limit: characters at most, or None for all.

    Raises:
        InputError: if there is no text or too little of it.
    """

    metric = "next-character accuracy (%)"

    def __init__(self, folder: Path, *, length: int = 64, limit: int | None = None) -> None:
        files = sorted(Path(folder).glob("*.txt"))
        if not files:
            raise InputError(f"{folder} has no text files (*.txt)")
        text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
        points = np.frombuffer(text[:limit].encode("utf-32-le"), dtype=np.uint32)
        ends = [0, int(len(points) * 0.9), int(len(points) * 0.95), len(points)]
        if ends[2] - ends[1] <= length:
            raise InputError(f"{folder} holds {len(points)} characters; {40 * length} are needed")
        self.name = f"text of {Path(folder).name}"
        alphabet = np.unique(points[: ends[1]])
        places = np.searchsorted(alphabet, points).clip(max=len(alphabet) - 1)
        codes = np.where(alphabet[places] == points, places, len(alphabet)).astype(np.int64)
        self.characters = len(alphabet) + 1
        self._windows: dict[str, Tensor] = {}
        names = ("train", "validation", "test")
        for split, low, high in zip(names, ends, ends[1:], strict=False):
            part = torch.from_numpy(codes[low:high])
            count = (len(part) - 1) // length
            starts = torch.arange(count).unsqueeze(1) * length + torch.arange(length + 1)
            self._windows[split] = part[starts]
        self.example_inputs = (self._windows["train"][:2, :-1].clone(),)

    def size(self, split: str) -> int:
        return len(self._windows.get(split, ()))

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        windows = self._windows[split]
        order = np.arange(len(windows))
        if split == "train" if shuffle is None else shuffle:
            np.random.default_rng(seed_of("order", seed, epoch)).shuffle(order)
        for step in range(start, self.steps_per_epoch(split, batch_size)):
            rows = torch.from_numpy(order[step * batch_size : (step + 1) * batch_size])
            yield windows[rows, :-1], windows[rows, 1:]

    def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (batch[0],)

    def criterion(self, outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits_of(outputs).flatten(0, 1), batch[1].flatten())

    def score(self, model: Callable[..., Any], split: str = "validation") -> float:
        right = total = 0
        device = device_of(model)
        with evaluating(model):
            for batch in self.batches(split, batch_size=256, shuffle=False):
                inputs, targets = to_device(batch, device)
                right += int((logits_of(model(inputs)).argmax(-1) == targets).sum())
                total += targets.numel()
        return 100.0 * right / total


# Contenders


@dataclass(frozen=True)
class Work:
    """What the contenders compete on.

    Attributes:
        name: of the data, for the rows.
        task: of a seed.
        teacher: makes the large network.
        student: makes the small one.
        metric: what the test score is called in the rows.
        bits: widths of the codes.
        bucket: values a bucket.
        teacher_epochs: passes for the teacher.
        student_epochs: passes for every student trained from scratch.
        levels_epochs: passes for level positions.
        batch_size: samples a batch.
        temperature: of the distillation.
        rates: learning rates tried for every network that is trained.
        levels_rates: as many, tried for level positions.
    """

    name: str
    task: Callable[[int], Task]
    teacher: Callable[[Task], nn.Module]
    student: Callable[[Task], nn.Module]
    metric: str = "accuracy"
    bits: tuple[int, ...] = (2, 4, 8)
    bucket: int = 256
    teacher_epochs: int = 30
    student_epochs: int = 40
    levels_epochs: int = 10
    batch_size: int = 64
    temperature: float = 2.0
    rates: tuple[float, ...] = (0.02, 0.05, 0.1)
    levels_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)


def contend(work: Work, seed: int) -> Iterator[Row]:
    """Trains and scores every contender for one seed.

    Args:
        work: the data, the networks and the budget.
        seed: of split, initial weights and data order.

    Yields:
        One row for each contender and width, with the test score (percent), the bytes of the
        weights by the formula, the bytes of the packed file, and the chosen learning rate.
    """
    task = work.task(seed)

    def fresh(make: Callable[[Task], nn.Module], role: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(role, seed))
            return make(task)

    def train(rule: Any, epochs: int, title: str) -> None:
        fit(rule, task, epochs=epochs, batch_size=work.batch_size, seed=seed, title=title)

    def supervised(
        make: Callable[[Task], nn.Module],
        role: str,
        epochs: int,
        guide: nn.Module | None,
        rate: float,
    ) -> nn.Module:
        network = fresh(make, role)
        criterion = guide and DistillationCriterion(task, guide, temperature=work.temperature)
        optimizer = published_sgd(network.parameters(), rate)
        rule = Supervised(network, task, optimizer=optimizer, criterion=criterion)
        train(rule, epochs, role)
        return network

    def quantized(bits: int, guide: nn.Module | None, rate: float) -> PackedNetwork:
        student = fresh(work.student, "student")
        rule = QuantizedDistillation(
            student,
            task,
            teacher=guide,
            options=UniformOptions(bits, work.bucket),
            temperature=work.temperature,
            optimizer=published_sgd(student.parameters(), rate),
        )
        train(rule, work.student_epochs, f"{bits} bits")
        return rule.quantized.packed()

    def levels(bits: int, batches: int, rate: float) -> PackedNetwork:
        rule = DifferentiableQuantization(
            distilled,
            task,
            levels=2**bits,
            bucket=work.bucket,
            redistribute_batches=batches,
            temperature=work.temperature,
            learning_rate=rate,
        )
        train(rule, work.levels_epochs, f"{2**bits} levels")
        return rule.levels.packed()

    def unpacked(packed: PackedNetwork) -> nn.Module:
        network = fresh(work.student, "student")
        packed.load_into(network)
        return network

    def best(trial: Callable[[float], T], rates: Sequence[float]) -> tuple[T, float, float]:
        found: list[tuple[float, float, T]] = []
        for rate in rates:
            made = trial(rate)
            network = unpacked(made) if isinstance(made, PackedNetwork) else made
            found.append((task.score(network, "validation"), rate, made))
        score, rate, made = max(found, key=lambda entry: entry[0])
        return made, score, rate

    def row(contender: str, bits: int | None, made: Any, score: float, rate: float | None) -> Row:
        result: dict[str, Any] = {
            "work": work.name,
            "contender": contender,
            "bits": bits,
            "seed": seed,
            "validation": score,
            "learning_rate": rate,
        }
        if isinstance(made, PackedNetwork):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "packed.safetensors"
                made.save(file)
                network = unpacked(PackedNetwork.load(file))
                result["file_bytes"] = file.stat().st_size
            result["bytes"] = made.nbytes()
            result["huffman_bits"] = huffman_bits(made)
        else:
            network = made
            result["bytes"] = 4 * sum(p.numel() for p in network.parameters())
        result[work.metric] = task.score(network, "test")
        log.info("%s", result)
        return result

    trial = partial(supervised, work.teacher, "teacher", work.teacher_epochs, None)
    teacher, score, rate = best(trial, work.rates)
    yield row("teacher", None, teacher, score, rate)
    trial = partial(supervised, work.student, "student", work.student_epochs, None)
    student, score, rate = best(trial, work.rates)
    yield row("student", None, student, score, rate)
    trial = partial(supervised, work.student, "student", work.student_epochs, teacher)
    distilled, score, rate = best(trial, work.rates)
    yield row("distilled student", None, distilled, score, rate)

    for bits in work.bits:
        for name, bucket in (("PM without buckets", None), ("PM", work.bucket)):
            rounded = pack_uniform(distilled, UniformOptions(bits, bucket))
            score = task.score(unpacked(rounded), "validation")
            yield row(name, bits, rounded, score, None)
        yield row("QD", bits, *best(partial(quantized, bits, teacher), work.rates))
        yield row("QD without teacher", bits, *best(partial(quantized, bits, None), work.rates))
        yield row("DQ", bits, *best(partial(levels, bits, 0), work.levels_rates))
        yield row("DQ redistributed", bits, *best(partial(levels, bits, 5), work.levels_rates))


# Works


def _digits(seed: int) -> Task:
    return digits(seed=seed)


DIGITS = Work(
    "digits",
    _digits,
    lambda _: digits_teacher(),
    lambda _: digits_student(),
    bits=(2, 4),
)


def cifar_work(folder: Path) -> Work:
    """CIFAR-10 with the paper's networks and epochs."""
    return Work(
        "cifar10",
        lambda seed: cifar10(folder, seed=seed),
        lambda _: cifar_teacher(),
        lambda _: cifar_student(),
        teacher_epochs=200,
        student_epochs=200,
        levels_epochs=50,
        batch_size=25,
        rates=(0.003, 0.01, 0.03),
        levels_rates=(1e-6, 1e-5, 1e-4),
    )


def _text_network(width: int, task: Task) -> nn.Module:
    assert isinstance(task, CharacterText)
    return CharacterLstm(task.characters, width)


def text_work(
    folder: Path,
    *,
    teacher_width: int = 512,
    student_width: int = 128,
    epochs: int = 20,
    bits: tuple[int, ...] = (2, 4, 8),
    rates: tuple[float, ...] = (0.3, 1.0, 3.0),
) -> Work:
    """A language model of one LSTM layer on the text files of a folder.

    The temperature is 1, as in the paper's translation experiments. The rows' metric has a name
    of its own, so the claims, which are about image accuracy, do not mix with it.
    """
    task = CharacterText(folder)
    return Work(
        "text",
        lambda _: task,
        partial(_text_network, teacher_width),
        partial(_text_network, student_width),
        metric="next_character_accuracy",
        bits=bits,
        teacher_epochs=epochs,
        student_epochs=epochs,
        levels_epochs=max(1, epochs // 4),
        temperature=1.0,
        rates=rates,
        levels_rates=(1e-4, 1e-3, 1e-2)[: len(rates)],
    )


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """Handwritten digits, small networks."""
    for seed in seeds:
        yield from contend(DIGITS, seed)


def full(
    seeds: Sequence[int],
    *,
    images: Path = Path("data/cifar10"),
    text: Path = Path("data/text"),
) -> Iterable[Row]:
    """CIFAR-10 with the paper's networks, then the language model.

    Args:
        seeds: one run of everything each.
        images: a folder that :func:`gossamer.datasets.cifar.cifar10` reads.
        text: a folder of text files.

    Raises:
        InputError: if one of the folders is not there.
    """
    works = (cifar_work(images), text_work(text))
    works[0].task(0)  # says at once if the images are missing
    for seed in seeds:
        for work in works:
            yield from contend(work, seed)


def draw(result: Result, path: Path) -> None:
    """Draws test score against stored bytes, mean over seeds with the range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if row.get("accuracy") is not None]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["contender"] for row in rows):
        chosen = [row for row in rows if row["contender"] == name]
        places = []
        for bits in sorted({row["bits"] for row in chosen}, key=lambda b: b or 32):
            scores = [row["accuracy"] for row in chosen if row["bits"] == bits]
            size = np.mean([row["bytes"] for row in chosen if row["bits"] == bits])
            places.append((size, np.mean(scores), min(scores), max(scores)))
        x, y, low, high = np.array(places).T
        axes.errorbar(x, y, yerr=(y - low, high - y), marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the weights (codes, scales, level tables)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _accuracy(contender: str, bits: int | None) -> Pick:
    return Pick("accuracy", {"contender": contender, "bits": bits})


EXPERIMENT = Experiment(
    spec="quantized-distillation",
    title="few-bit students: quantized distillation and learned levels against rounding afterwards",
    claims=(
        Claim(
            "at 2 bits quantized distillation is at least 10 points above post-mortem rounding",
            _accuracy("QD", 2),
            ">=",
            _accuracy("PM", 2),
            offset=10.0,
            paper="CIFAR-10, student 1: about 82.4 % against about 10.5 %",
        ),
        Claim(
            "at 2 bits differentiable quantization is at least 5 points above post-mortem rounding",
            _accuracy("DQ", 2),
            ">=",
            _accuracy("PM", 2),
            offset=5.0,
            paper="CIFAR-10, student 1: about 80.4 % against about 10.5 %",
        ),
        Claim(
            "at 4 bits quantized distillation is within 1.5 points of the float distilled student",
            _accuracy("QD", 4),
            ">=",
            _accuracy("distilled student", None),
            offset=-1.5,
            paper="CIFAR-10, student 1: 88.0 % against 88.8 %",
        ),
        Claim(
            "the distilled student is better than the student trained on labels alone",
            _accuracy("distilled student", None),
            ">",
            _accuracy("student", None),
            paper="CIFAR-10, student 1: 88.8 % against 84.5 %",
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0, 1, 2, 3, 4),
    draw=draw,
)
