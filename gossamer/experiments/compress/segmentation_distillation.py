"""Two teachers at three granularities against fewer of them: mean IoU of a light student.

Every contender is the same student from the same first weights, sees the same few labels and the
same images without labels in the same order for as many steps, and uses the same optimizer. The
teachers are trained by cross pseudo supervision from the same labels. "more steps" is the control
that spends on the student, with labels alone, as many epochs as the teachers' four networks had.
Loss weights were chosen on the validation split of another seed, three trials a method
(:func:`trials`); the test split is looked at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.compress.segmentation_distillation import (
    CPS,
    IMITATION_WEIGHTS,
    MGD,
    Imitated,
    Imitation,
    SemiSupervised,
    Term,
    semi_supervised_tasks,
)
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import fit
from gossamer.core.graph import Graph
from gossamer.core.segmentation import Segmentation
from gossamer.core.task import seed_of
from gossamer.datasets.scenes import scenes
from gossamer.datasets.segmentation import segmentation_lists
from gossamer.experiments.real_data import folder_of
from gossamer.hardware.measure import measure
from gossamer.models.segmentation import segmentation_network

IMITATED: tuple[Imitated, ...] = ("logits", "structure", "channels", "variation")


@dataclass(frozen=True)
class Setting:
    """The work.

    Attributes:
        task: by seed.
        share: of the training images that have labels.
        student: name of the network.
        wide: of the wide teacher.
        deep: of the deep teacher.
        epochs: of every student.
        teacher_epochs: of both teachers.
        batch_size: images a batch, of each part.
        lr: of every student that learns from more than labels.
        teacher_lr: of the teachers.
        supervised_lr: of a student that learns from labels alone.
        scale: times which the paper's weights of image and region level are taken.
        cps_weight: of the pseudo-labels where the student supervises itself.
        imitation: times which each imitation's usual weight is taken.
        teacher_cps_weight: of the pseudo-labels in the teachers' training.
        lambda_img: the paper's weight of the image level.
        lambda_reg: the paper's weight of the region level.
        hard_pixels: see :class:`gossamer.compress.segmentation_distillation.MGD`.
    """

    task: Callable[[int], Segmentation]
    share: float
    student: str
    wide: str
    deep: str
    epochs: int
    teacher_epochs: int
    batch_size: int
    lr: float
    teacher_lr: float
    supervised_lr: float
    scale: float = 1.0
    cps_weight: float = 1.0
    imitation: Mapping[Imitated, float] = field(
        default_factory=lambda: dict.fromkeys(IMITATED, 1.0)
    )
    teacher_cps_weight: float = 1.0
    lambda_img: float = 0.002
    lambda_reg: float = 100.0
    hard_pixels: int | None = None


SCENES = Setting(
    task=lambda seed: scenes(
        train=256, validation=60, test=200, size=24, shapes=5, lean=0.8, seed=seed
    ),
    share=1 / 8,
    student="unet:4x3",
    wide="unet:16x2",
    deep="unet:8x4",
    epochs=20,
    teacher_epochs=20,
    batch_size=8,
    lr=0.1,
    teacher_lr=0.1,
    supervised_lr=0.3,
    scale=0.1,
    imitation={"logits": 1.0, "structure": 1 / 3, "channels": 1.0, "variation": 1 / 3},
)


def _voc(root: Path) -> Setting:
    """Pascal VOC; ``train.txt`` and ``val.txt`` in its folder have an image and a mask a line."""
    classes = ("background", *(f"class {number}" for number in range(1, 21)))
    lists = {"train": root / "train.txt", "test": root / "val.txt"}
    return Setting(
        task=lambda seed: segmentation_lists(root, lists, classes, size=(512, 512), seed=seed),
        share=1 / 16,
        student="deeplab:resnet18",
        wide="deeplab:wide_resnet34",
        deep="deeplab:resnet101",
        epochs=34,
        teacher_epochs=34,
        batch_size=16,
        lr=0.005,
        teacher_lr=0.005,
        supervised_lr=0.005,
    )


Build = Callable[[nn.Module], SemiSupervised]


def contenders(setting: Setting, work: _Work) -> dict[str, Build]:
    """How each contender's rule is made of a fresh student."""
    wide, deep, classes = work.wide, work.deep, len(work.task.classes)

    def ours(
        terms: tuple[Term, ...] | None = None,
        *,
        wide: nn.Module | None = wide,
        deep: nn.Module | None = deep,
    ) -> Build:
        options: dict[str, Any] = {} if terms is None else {"terms": terms}
        return lambda student: MGD(
            student, wide, deep, lr=setting.lr, hard_pixels=setting.hard_pixels,
            lambda_img=setting.scale * setting.lambda_img,
            lambda_reg=setting.scale * setting.lambda_reg, **options,
        )  # fmt: skip

    def imitated(kind: Imitated, teacher: nn.Module) -> Build:
        return lambda student: Imitation(
            student, teacher, kind=kind, classes=classes, lr=setting.lr,
            weight=setting.imitation[kind] * IMITATION_WEIGHTS[kind],
        )  # fmt: skip

    return {
        "supervised": lambda student: SemiSupervised(student, lr=setting.supervised_lr),
        "CPS": lambda student: CPS(
            student, copy.deepcopy(work.partner), weight=setting.cps_weight, lr=setting.lr
        ),
        "logits of wide": imitated("logits", wide),
        "logits of deep": imitated("logits", deep),
        "structure of wide": imitated("structure", wide),
        "channels of deep": imitated("channels", deep),
        "variation of deep": imitated("variation", deep),
        "MGD": ours(),
        "wide only": ours(deep=None),
        "deep only": ours(wide=None),
        "swapped teachers": ours(wide=deep, deep=wide),
        "labelled alone": ours(("labelled",)),
        "unlabelled alone": ours(("unlabelled",)),
        "image level alone": ours(("image",)),
        "region level alone": ours(("region",)),
        "pixels alone": ours(("labelled", "unlabelled")),
    }


def _network(task: Segmentation, name: str, *seeds: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(*seeds) % 2**32)
        return segmentation_network(
            name, channels=task.preprocess.channels, classes=len(task.classes)
        )


@dataclass(frozen=True)
class _Work:
    """What all contenders of a seed share."""

    seed: int
    task: Segmentation
    tasks: Mapping[str, Segmentation]
    wide: nn.Module
    deep: nn.Module
    student: nn.Module
    partner: nn.Module


def _prepared(setting: Setting, seed: int) -> _Work:
    task = setting.task(seed)
    tasks = semi_supervised_tasks(task, setting.share, seed)

    def teacher(name: str, kind: str) -> nn.Module:
        one = _network(task, name, kind, "one", seed)
        rule = CPS(
            one, _network(task, name, kind, "two", seed),
            weight=setting.teacher_cps_weight, lr=setting.teacher_lr,
        )  # fmt: skip
        fit(
            rule, tasks, epochs=setting.teacher_epochs, batch_size=setting.batch_size,
            seed=seed_of(kind, seed), title=f"training the {kind} teacher",
        )  # fmt: skip
        return one

    return _Work(
        seed,
        task,
        tasks,
        teacher(setting.wide, "wide"),
        teacher(setting.deep, "deep"),
        _network(task, setting.student, "student", seed),
        _network(task, setting.student, "partner", seed),
    )


def measured(setting: Setting, seeds: Sequence[int]) -> Iterator[Row]:
    """Rows of teachers and contenders."""
    for seed in seeds:
        work = _prepared(setting, seed)
        networks = {"student": work.student, "wide": work.wide, "deep": work.deep}
        costs = _costs(networks, work.task)
        yield {"contender": "student", "seed": seed} | costs["student"]
        for name in ("wide", "deep"):
            yield _row(work, networks[name], f"{name} teacher") | costs[name]
        for name in contenders(setting, work):
            yield _trained(setting, work, name)
        # Both teachers are pairs of networks, each at least as dear as the student.
        longer = replace(setting, epochs=setting.epochs + 4 * setting.teacher_epochs)
        yield _trained(longer, work, "supervised") | {"contender": "more steps"}


def _trained(setting: Setting, work: _Work, name: str) -> dict[str, Any]:
    student = copy.deepcopy(work.student)
    fit(
        contenders(setting, work)[name](student), work.tasks, epochs=setting.epochs,
        batch_size=setting.batch_size, seed=work.seed, title=name,
    )  # fmt: skip
    return _row(work, student, name)


def _row(work: _Work, module: nn.Module, name: str) -> dict[str, Any]:
    return {
        "contender": name,
        "seed": work.seed,
        "miou": work.task.score(module, "test"),
        "validation": work.task.score(module, "validation"),
    }


def _costs(networks: Mapping[str, nn.Module], task: Segmentation) -> dict[str, dict[str, Any]]:
    """Counted costs, and the median time of one image in ONNX Runtime, measured in turns."""
    timings = measure(networks, task.example_inputs, batch_sizes=(1,))
    found = {}
    for timing in timings:
        graph = Graph.trace(networks[timing.name], task.example_inputs)
        found[timing.name] = {
            "parameters": graph.parameters,
            "macs": graph.macs,
            "milliseconds": timing.latency.p50,
        }
    return found


def trials(setting: Setting, seed: int) -> Iterator[Row]:
    """Validation scores by which weights are chosen, three trials a method.

    The supervised student has its learning rate to choose.

    Args:
        setting: whose weights are tried.
        seed: other than those that are reported.
    """
    work = _prepared(setting, seed)
    for factor in (1 / 3, 1.0, 3.0):
        row = _trained(replace(setting, supervised_lr=factor * setting.lr), work, "supervised")
        yield {"factor": factor, **row}
        tried = replace(
            setting,
            cps_weight=factor,
            imitation=dict.fromkeys(IMITATED, factor),
        )
        for name in (
            "CPS", "logits of wide", "logits of deep", "structure of wide", "channels of deep",
            "variation of deep",
        ):  # fmt: skip
            yield {"factor": factor, **_trained(tried, work, name)}
    for factor in (0.1, 1.0, 10.0):  # summed and averaged terms differ by more than pixels do
        yield {"factor": factor, **_trained(replace(setting, scale=factor), work, "MGD")}


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """U-Nets on drawn scenes: 32 with labels, 224 without."""
    return measured(SCENES, seeds)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """DeepLabv3+ on Pascal VOC, a sixteenth of the labels."""
    return measured(_voc(folder_of("voc2012")), seeds)


def draw(result: Result, path: Path) -> None:
    """Mean IoU of every contender, a dot a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [n for n in dict.fromkeys(r["contender"] for r in result.rows) if n != "student"]
    means = {name: Pick("miou", {"contender": name}).by_seed(result.rows) for name in names}
    names.sort(key=lambda name: sum(means[name].values()) / len(means[name]))
    figure = Figure(figsize=(7.0, 0.3 * len(names) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        values = list(means[name].values())
        color = "tab:red" if name == "MGD" else "tab:gray" if "teacher" in name else "tab:blue"
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5, markersize=4)
        axes.plot([sum(values) / len(values)], [place], "|", color=color, markersize=16)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("mean IoU on the test split (%); a bar is the mean of the seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _miou(contender: str) -> Pick:
    return Pick("miou", {"contender": contender})


EXPERIMENT = Experiment(
    spec="mgd",
    title="a student under a wide and a deep teacher against fewer teachers and losses",
    claims=(
        Claim(
            "MGD is better than a student that supervises itself (CPS)",
            _miou("MGD"), ">", _miou("CPS"),
            paper="+11.5 points over its baseline (ResNet-18, Cityscapes, 1/16 of the labels)",
        ),
        Claim(
            "a student that supervises itself is better than labels alone",
            _miou("CPS"), ">", _miou("supervised"),
        ),
        Claim(
            "MGD is at least as good as imitating the logits of the wide teacher",
            _miou("MGD"), ">=", _miou("logits of wide"),
        ),
        Claim(
            "MGD is at least as good as imitating the logits of the deep teacher",
            _miou("MGD"), ">=", _miou("logits of deep"),
        ),
        Claim("without the wide teacher it is worse", _miou("deep only"), "<", _miou("MGD")),
        Claim("without the deep teacher it is worse", _miou("wide only"), "<", _miou("MGD")),
    ),
    quick=quick,
    full=full,
    draw=draw,
)  # fmt: skip
