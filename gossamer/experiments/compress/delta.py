"""DARE, DAREx-q with each way of choosing q, importance-based pruning, and AdamR, on equal deltas.

A network learns half of the classes (the base), then all of them in three ways: gently, hard (a
larger learning rate and ten times the epochs), and hard with AdamR. Of each delta 90 and 99 % are
dropped under twenty masks. What is chosen is chosen on validation scores or on inputs without
labels, under other masks than those that are measured. The strength of the pull is one of a few,
by the validation score of the pruned network; decay towards zero, the simplest control, has as many
trials.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.compress.delta import (
    Delta,
    Divisor,
    Method,
    Selection,
    input_moments,
    steady_mean,
)
from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.task import Classification, Task, seed_of
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.digits import digits
from gossamer.datasets.text import text_classification
from gossamer.experiments.real_data import folder_of
from gossamer.models.plain import mlp
from gossamer.parts.anchored_adam import AdamR

RATES = (0.9, 0.99)


@dataclass(frozen=True)
class Setting:
    """The work.

    Attributes:
        start: seed to base network and task.
        head: parts of names that are kept as they are.
        gentle: learning rate and epochs that give small deltas.
        hard: those that give large ones.
        pulls: strengths of AdamR's decay that are tried.
        batch_size: of fine-tuning.
        masks: seeds that are measured.
    """

    start: Callable[[int], tuple[nn.Module, Task]]
    head: tuple[str, ...]
    gentle: tuple[float, int]
    hard: tuple[float, int]
    pulls: tuple[float, ...]
    batch_size: int
    masks: int


CHOICE = (1000, 1001, 1002, 1003)
"""Mask seeds for choosing; those that are measured begin at 0."""


def _half_of_the_classes(seed: int) -> tuple[nn.Module, Task]:
    task = digits(seed=seed)
    halves = {}
    for split, source in task.splits.items():
        assert isinstance(source, ArraySource)
        halves[split] = source.take(np.flatnonzero(source.labels.numpy() < 5))
    half = Classification(
        halves, task.preprocess, task.classes, name="digits 0 to 4", augment=task.augment
    )
    torch.manual_seed(seed_of("network", seed) % 2**32)
    base = mlp((64, 256, 256, 10))
    fit(Supervised(base, half, optimizer=sgd(base, lr=0.05)), half, epochs=30, batch_size=64,
        seed=seed)  # fmt: skip
    return base.cpu(), task


DIGITS = Setting(
    start=_half_of_the_classes,
    head=("5",),
    gentle=(1e-3, 10),
    hard=(5e-3, 100),
    pulls=(0.001, 0.01, 0.1),
    batch_size=64,
    masks=20,
)


def _classifier(folder: Path, data: Path) -> Callable[[int], tuple[nn.Module, Task]]:
    def start(seed: int) -> tuple[nn.Module, Task]:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as error:
            raise MissingExtra("transformers", "llm") from error
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            torch.manual_seed(seed_of("head", seed) % 2**32)
            base = AutoModelForSequenceClassification.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False,
                use_safetensors=True, num_labels=2,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no text classifier: {first_line(error)}") from error
        score = "matthews" if data.stem == "cola" else "accuracy"
        task = text_classification(data, tokenizer=tokenizer, length=128, score=score, seed=seed)
        return base, task

    return start


def finetuned(
    base: nn.Module,
    task: Task,
    setting: Setting,
    how: tuple[float, int],
    seed: int,
    *,
    pull: float = 0.0,
    towards_zero: bool = False,
) -> nn.Module:
    """Fine-tunes a copy of the base; without a pull this is Adam."""
    module = copy.deepcopy(base)
    lr, epochs = how
    anchors = [torch.zeros_like(p) if towards_zero else p.detach() for p in module.parameters()]
    optimizer = AdamR(module.parameters(), anchors, lr=lr, weight_decay=pull)
    fit(Supervised(module, task, optimizer=optimizer), task, epochs=epochs,
        batch_size=setting.batch_size, seed=seed)  # fmt: skip
    return module.cpu().eval()


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned network and its delta."""

    base: nn.Module
    module: nn.Module
    delta: Delta
    task: Task

    @classmethod
    def of(cls, base: nn.Module, module: nn.Module, task: Task, setting: Setting) -> Tuned:
        return cls(base, module, Delta.from_models(base, module, exclude=setting.head), task)

    def scores(
        self,
        p: float,
        masks: Iterable[int],
        split: str,
        *,
        method: Method = "random",
        q: Divisor | None = None,
        moments: Any = None,
    ) -> list[float]:
        """Scores of the pruned network, one for each mask."""
        found = []
        for mask in masks:
            sparse = self.delta.drop(p, method=method, q=q, moments=moments, seed=mask)
            found.append(self.task.score(sparse.apply(self.base, self.module), split))
        return found


def _pulled(
    base: nn.Module, task: Task, setting: Setting, seed: int, least: float, *, towards_zero: bool
) -> tuple[Tuned, float]:
    """The strength whose network, pruned to 1 % with the best q, validates best.

    Among those whose unpruned network validates with ``least`` or more, if there are any.
    """
    tried: list[tuple[bool, float, Tuned, float]] = []
    for pull in setting.pulls:
        module = finetuned(
            base, task, setting, setting.hard, seed, pull=pull, towards_zero=towards_zero
        )
        tuned = Tuned.of(base, module, task, setting)
        found = Selection(tuned.delta, base, module, task, max(RATES), seeds=CHOICE).validated()
        whole = task.score(module, "validation")
        tried.append((whole >= least, found.score if whole >= least else whole, tuned, pull))
    _, _, tuned, pull = max(tried, key=lambda entry: entry[:2])
    return tuned, pull


def measured(setting: Setting, seeds: Sequence[int]) -> Iterator[Row]:
    """Rows of all contenders."""
    for seed in seeds:
        base, task = setting.start(seed)
        yield {"contender": "base", "seed": seed, "score": task.score(base, "test")}
        gentle = finetuned(base, task, setting, setting.gentle, seed)
        hard = finetuned(base, task, setting, setting.hard, seed)
        least = task.score(hard, "validation") - 1.0
        near, pull = _pulled(base, task, setting, seed, least, towards_zero=False)
        decayed, decay = _pulled(base, task, setting, seed, least, towards_zero=True)
        networks = {
            "small": (Tuned.of(base, gentle, task, setting), 0.0),
            "large": (Tuned.of(base, hard, task, setting), 0.0),
            "large, AdamR": (near, pull),
            "large, decay to zero": (decayed, decay),
        }
        for deltas, (tuned, strength) in networks.items():
            yield {
                "contender": "unpruned", "deltas": deltas, "seed": seed, "pull": strength,
                "score": task.score(tuned.module, "test"),
                "relative_size": tuned.delta.relative_size,
            }  # fmt: skip
            for p in RATES:
                yield from _contenders(setting, tuned, deltas, p, seed)


def _contenders(setting: Setting, tuned: Tuned, deltas: str, p: float, seed: int) -> Iterator[Row]:
    select = Selection(tuned.delta, tuned.base, tuned.module, tuned.task, p, seeds=CHOICE)
    masks = range(setting.masks)
    about = {"deltas": deltas, "p": p, "seed": seed}
    per_layer, eta = select.per_layer("validation")
    per_layer_e, eta_e = select.per_layer("output")
    random: dict[str, tuple[Divisor, Any]] = {
        "DARE": (1.0 - p, None),
        "no rescaling": (1.0, None),
        "DAREx q_v": (q := select.validated().value, q),
        "DAREx q_e": (q := select.unlabelled().value, q),
        "DAREx per layer": (per_layer, eta),
        "DAREx per layer, q_e": (per_layer_e, eta_e),
        "DAREx learned": (select.learned(), None),
        "DAREx mse": (select.least_squares(), None),
    }
    for name, (q, chosen) in random.items():
        yield (
            about
            | {"contender": name, "chosen": chosen}
            | _summary(tuned.scores(p, masks, "test", q=q))
        )
    for unit in ("rows", "columns"):
        structured = Selection(
            tuned.delta, tuned.base, tuned.module, tuned.task, p, method=unit, seeds=CHOICE
        ).validated()
        yield (
            about
            | {"contender": f"DAREx q_v, {unit}", "chosen": structured.value}
            | _summary(tuned.scores(p, masks, "test", method=unit, q=structured.value))
        )
    moments = input_moments(tuned.module, tuned.task.example_inputs, select.inputs)
    importance: list[tuple[float, float]] = []
    kinds: dict[str, Method] = {"MP": "magnitude", "WANDA": "wanda"}
    for name, method in kinds.items():
        # Nothing is drawn, so one network is all there is.
        scores = [
            tuned.scores(p, [0], split, method=method, moments=moments)[0]
            for split in ("validation", "test")
        ]
        importance.append((scores[0], scores[1]))
        yield about | {"contender": name, "score": scores[1]}
    yield about | {"contender": "importance", "score": max(importance)[1]}


def _summary(scores: Sequence[float]) -> dict[str, float]:
    return {
        "score": float(np.mean(scores)),
        "spread": float(np.std(scores, ddof=1)),
        "steady": steady_mean(scores),
    }


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """A perceptron on digits: the base knows 0 to 4."""
    return measured(DIGITS, seeds)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """BERT-base on CoLA and SST-2, from ``bert-base-uncased`` and ``text_cls`` in GOSSAMER_DATA."""
    folder = folder_of("bert-base-uncased")
    for name in ("cola", "sst2"):
        setting = Setting(
            start=_classifier(folder, folder_of("text_cls") / f"{name}.parquet"),
            head=("classifier",), gentle=(2e-5, 3), hard=(1e-4, 30), pulls=(0.001, 0.01, 0.1),
            batch_size=32, masks=20,
        )  # fmt: skip
        for row in measured(setting, seeds):
            yield dict(row) | {"task": name}


def draw(result: Result, path: Path) -> None:
    """Score of each contender at each drop rate, one panel for each kind of delta."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(r["deltas"] for r in result.rows if "p" in r))
    figure = Figure(figsize=(4.2 * len(kinds), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, kind in enumerate(kinds, 1):
        axes = figure.add_subplot(1, len(kinds), number)
        rows = [r for r in result.rows if r.get("deltas") == kind]
        names = list(dict.fromkeys(r["contender"] for r in rows if "p" in r))
        for offset, p in enumerate(sorted({r["p"] for r in rows if "p" in r})):
            means = [
                np.mean([r["score"] for r in rows if r["contender"] == n and r.get("p") == p])
                for n in names
            ]
            at = np.arange(len(names)) + 0.4 * offset
            axes.barh(at, means, height=0.38, label=f"{100 * p:g} % dropped")
        whole = np.mean([r["score"] for r in rows if r["contender"] == "unpruned"])
        axes.axvline(float(whole), color="black", linewidth=0.8, linestyle="--", label="unpruned")
        axes.set_yticks(np.arange(len(names)) + 0.2, names if number == 1 else [""] * len(names))
        axes.invert_yaxis()
        axes.set_xlabel("test score (%)")
        axes.set_title(f"deltas: {kind}", fontsize=9)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def _of(contender: str, deltas: str, metric: str = "score", p: float | None = 0.99) -> Pick:
    where: dict[str, Any] = {"contender": contender, "deltas": deltas}
    return Pick(metric, where if p is None else where | {"p": p})


EXPERIMENT = Experiment(
    spec="darex",
    title="ways of dropping 90 and 99 % of what fine-tuning changed",
    claims=(
        *(
            claim
            for kind in ("small", "large")
            for claim in (
                Claim(
                    f"{kind} deltas, 99 % dropped: DAREx-q (q_v) scores higher than DARE by more "
                    "than two standard errors",
                    _of("DAREx q_v", kind),
                    ">",
                    _of("DARE", kind),
                    beyond=2.0,
                    paper="more than 30 points on CoLA and SST-2 with BERT",
                ),
                Claim(
                    f"{kind} deltas, 99 % dropped: its scores vary less from mask to mask",
                    _of("DAREx q_v", kind, "spread"),
                    "<",
                    _of("DARE", kind, "spread"),
                ),
                Claim(
                    f"{kind} deltas, 99 % dropped: q chosen without labels (q_e) is at most two "
                    "points worse than q_v",
                    _of("DAREx q_e", kind),
                    ">=",
                    _of("DAREx q_v", kind),
                    offset=-2.0,
                ),
                Claim(
                    f"{kind} deltas, 99 % dropped: q_e is at most two points better than q_v",
                    _of("DAREx q_e", kind),
                    "<=",
                    _of("DAREx q_v", kind),
                    offset=2.0,
                ),
            )
        ),
        Claim(
            "large deltas, 99 % dropped: keeping important entries beats random ones (DAREx q_v)",
            _of("importance", "large"),
            ">",
            _of("DAREx q_v", "large"),
        ),
        Claim(
            "large deltas, 99 % dropped: AdamR and DAREx q_v beat DAREx q_v",
            _of("DAREx q_v", "large, AdamR"),
            ">",
            _of("DAREx q_v", "large"),
        ),
        Claim(
            "AdamR's unpruned network is at most a point worse",
            _of("unpruned", "large, AdamR", p=None),
            ">=",
            _of("unpruned", "large", p=None),
            offset=-1.0,
        ),
        Claim(
            "AdamR's unpruned network is at most a point better",
            _of("unpruned", "large, AdamR", p=None),
            "<=",
            _of("unpruned", "large", p=None),
            offset=1.0,
        ),
    ),
    quick=quick,
    full=full,
    draw=draw,
)
