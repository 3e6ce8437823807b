"""The methods of pruning as a table to be asked, and what to take when.

Every row is one published method with the axes along which methods differ: what speed-up its zeros
can have, when it prunes, what it scores by, what data it needs. Where gossamer has the method, the
row says which step with which options it is.

Source: Cheng, Zhang and Shi, "A Survey on Deep Neural Network Pruning: Taxonomy, Comparison,
Analysis, and Recommendations", TPAMI 2024, arXiv:2308.06767; the table as software, and the rules
of :func:`recommend`, are our own design on its sections 2 to 8.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError
from gossamer.core.files import read_json

VALUES: dict[str, tuple[str, ...]] = {
    "speedup": ("specific", "semi-structured", "universal"),
    "granularity": (
        "weight", "filter", "channel", "neuron", "head", "layer", "block", "matrix", "embedding",
        "pattern",
    ),
    "when": ("before-training", "during-training", "after-training", "run-time"),
    "criterion": (
        "magnitude", "norm", "saliency", "loss-change", "reconstruction", "similarity",
        "activation", "random", "none",
    ),
    "learned": (
        "none", "sparsity-regularisation", "mask", "score", "meta", "reinforcement",
        "dynamic-sparse", "gating", "admm", "bi-level",
    ),
    "data": ("none", "unlabelled", "labelled", "few-shot"),
    "supervision": ("none", "supervised", "self", "unsupervised"),
    "scope": ("local", "global", "both"),
    "schedule": ("one-shot", "iterative", "gradual", "learned"),
    "retraining": ("none", "finetune", "rewind", "scratch"),
    "fusion": ("none", "quantization", "distillation", "nas", "low-rank", "decomposition"),
    "architectures": (
        "any", "cnn", "vit", "bert", "llm", "diffusion", "multimodal", "rnn", "gnn",
    ),
}  # fmt: skip
"""What each axis may say. "specific" zeros need hardware or kernels that skip them, "universal"
ones leave smaller dense layers."""


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: as it is known.
        year: of publication.
        venue: of publication.
        speedup: what can make use of its zeros.
        granularity: what goes as a whole.
        when: relative to training.
        criterion: what it scores by ("none" if everything is learned).
        learned: how its masks are learned.
        data: what it needs to decide.
        supervision: of that data.
        scope: one ranking a layer, over all layers, or either.
        schedule: how much goes when.
        retraining: what follows.
        fusion: what it is joined with.
        architectures: it was made for.
        implemented_by: ``module:function`` here, or None.
        options: of that function that make it this method.
        paper: identifier or authors.
    """

    name: str
    year: int
    venue: str
    speedup: str
    granularity: tuple[str, ...]
    when: str
    criterion: str
    learned: str
    data: str
    supervision: str
    scope: str
    schedule: str
    retraining: str
    fusion: tuple[str, ...]
    architectures: tuple[str, ...]
    implemented_by: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""

    @property
    def structured(self) -> bool:
        """Whether smaller dense layers are left."""
        return self.speedup == "universal"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def matches(self, wanted: Mapping[str, Any]) -> bool:
        """Whether every wanted value is that of this method, or among its values."""
        for name, value in wanted.items():
            own = getattr(self, name)
            if name == "architectures" and "any" in own:
                continue
            if own != value and not (isinstance(own, tuple) and value in own):
                return False
        return True


@cache
def methods() -> tuple[Method, ...]:
    """All rows, in the order of the file."""
    rows = read_json(Path(__file__).with_suffix(".json"))
    plural = {"granularity", "fusion", "architectures"}
    found = []
    for row in rows:
        values: dict[str, Any] = {k: tuple(v) if k in plural else v for k, v in row.items()}
        found.append(Method(**values))
    return tuple(found)


def find(
    *, structured: bool | None = None, implemented: bool | None = None, **wanted: str
) -> list[Method]:
    """The methods that match.

    Args:
        structured: whether smaller dense layers are left.
        implemented: whether gossamer has it.
        **wanted: a value for any axis of :data:`VALUES`.

    Raises:
        InputError: if an axis or a value is unknown; the nearest are offered.
    """
    for name, value in wanted.items():
        if name not in VALUES:
            raise InputError(f"methods have no {name!r:.40}; they have {', '.join(VALUES)}")
        if value not in VALUES[name]:
            near = difflib.get_close_matches(str(value), VALUES[name], n=1)
            offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(VALUES[name])}"
            raise InputError(f"{name} is never {value!r:.40}; {offer}")
    return [
        method
        for method in methods()
        if method.matches(wanted)
        and structured in (None, method.structured)
        and implemented in (None, method.implemented_by is not None)
    ]


def named(name: str) -> Method:
    """The method of a name (case does not matter).

    Raises:
        InputError: if there is none; the nearest are offered.
    """
    for method in methods():
        if method.name.lower() == name.lower():
            return method
    near = difflib.get_close_matches(name, [m.name for m in methods()], n=3, cutoff=0.4)
    offer = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"there is no method {name!r:.60} in the table{offer}")


def compare(first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """The axes on which two methods differ, with both values.

    Raises:
        InputError: if a name is unknown.
    """
    a, b = named(first), named(second)
    return {
        f.name: (getattr(a, f.name), getattr(b, f.name))
        for f in fields(Method)
        if f.name in VALUES and getattr(a, f.name) != getattr(b, f.name)
    }


def to_markdown(rows: Sequence[Method]) -> str:
    """A table of methods."""
    lines = [
        "| method | year | speed-up | granularity | when | criterion | learned | data | here |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in rows:
        here = f"`{m.implemented_by.partition(':')[2]}`" if m.implemented_by else "–"
        lines.append(
            f"| {m.name} | {m.year} | {m.speedup} | {', '.join(m.granularity)} | {m.when} | "
            f"{m.criterion} | {m.learned} | {m.data} | {here} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Advice:
    """What to take.

    Attributes:
        method: a name of the table.
        why: in one sentence.
        recipe: steps that do it here, as in a recipe.
    """

    method: str
    why: str
    recipe: tuple[Mapping[str, Any], ...]


def recommend(
    *,
    want: str = "latency",
    sparse_hardware: bool = False,
    n_of_m_hardware: bool = False,
    pretrained: bool = True,
    data: str = "labelled",
    epochs: float = 10.0,
    architecture: str = "cnn",
    sparsity: float = 0.5,
) -> list[Advice]:
    """What the survey's recommendations come to for one situation, the first first.

    Args:
        want: "latency" or "size".
        sparse_hardware: the deployment skips single zeros.
        n_of_m_hardware: the deployment skips two of every four weights.
        pretrained: there are trained weights.
        data: what there is: "none", "unlabelled" or "labelled".
        epochs: of training that can be afforded.
        architecture: one of the architectures of :data:`VALUES`.
        sparsity: that is aimed at.

    Raises:
        InputError: if a value is unknown.
    """
    if want not in ("latency", "size"):
        raise InputError(f"one wants latency or size, not {want!r:.40}")
    if data not in ("none", "unlabelled", "labelled"):
        raise InputError(f"data are none, unlabelled or labelled, not {data!r:.40}")
    if architecture not in VALUES["architectures"]:
        known = ", ".join(VALUES["architectures"])
        raise InputError(f"there is no architecture {architecture!r:.40}; there are {known}")
    if not 0.0 < sparsity < 1.0:
        raise InputError(f"the sparsity is a share in (0, 1), not {sparsity:g}")
    found: list[Advice] = []
    trains = epochs > 0 and data == "labelled"
    tune = {"finetune": {"epochs": int(epochs)}} if trains else None

    def advise(method: str, why: str, *steps: Mapping[str, Any] | None) -> None:
        found.append(Advice(method, why, tuple(s for s in steps if s is not None)))

    def after(**options: Any) -> dict[str, Any]:
        return {"prune-after-training": options}

    if n_of_m_hardware and pretrained:
        name, method = (
            ("2:4 by magnitude", "magnitude") if data == "none" else ("SparseGPT 2:4", "sparsegpt")
        )
        step = after(n_of_m="2:4", method=method)
        advise(name, "the hardware skips two of every four weights", step, tune)
    if want == "latency" and not sparse_hardware:
        share = round(1.0 - sparsity, 3)
        criterion = "taylor" if data == "labelled" else "group"
        name = "Taylor (weights)" if criterion == "taylor" else "DepGraph"
        rounds = 3 if epochs >= 30 else 1
        advise(
            name, "dense hardware gains from smaller dense layers only",
            {"prune": {"criterion": criterion, "macs": share, "rounds": rounds,
                       "epochs": int(epochs) if trains else 0}},
        )  # fmt: skip
    if not trains and pretrained and data != "none":
        advise(
            "SparseGPT", "without training, the weights that stay have to make up for the others",
            after(sparsity=sparsity, method="sparsegpt"),
        )  # fmt: skip
        if architecture == "llm":
            advise("Wanda", "nearly as good, and cheaper", after(sparsity=sparsity, method="wanda"))
    if data == "none":
        advise(
            "SynFlow" if not pretrained else "LAMP",
            "no data is needed to decide",
            {"sparsify": {"criterion": "synflow", "rounds": 100, "epochs": 0,
                          "sparsity": sparsity}} if not pretrained
            else {"sparsify": {"allocation": "lamp", "rounds": 1, "epochs": 0,
                               "sparsity": sparsity}},
        )  # fmt: skip
    elif trains and not pretrained:
        advise(
            "RigL", "a sparse network from the start costs less to train",
            {"dynamic-sparse": {"sparsity": sparsity, "epochs": int(epochs)}},
        )  # fmt: skip
    elif trains and (want == "size" or sparse_hardware):
        if epochs >= 30 or sparsity > 0.95:
            advise(
                "Rate-distortion allocation",
                "iterations reach higher sparsity, and allocation guards against empty layers",
                {"rate-distortion": {"sparsity": sparsity, "rounds": 10, "epochs": int(epochs)}},
            )
        else:
            advise(
                "LAMP", "with little training one cut and a short fine-tuning are all there is",
                {"sparsify": {"allocation": "lamp", "sparsity": sparsity, "rounds": 1,
                              "epochs": int(epochs)}},
            )  # fmt: skip
    return found
