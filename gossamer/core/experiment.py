"""Evidence: contenders measured on the same work, and the relations a paper claims.

An experiment returns rows, one for each (contender, seed, setting), with measured numbers. A
:class:`Claim` is data, not code: which rows it compares, by which relation, by how much. Both are
written into one JSON file; verdicts are computed from that file, never typed, so a table can be
printed without importing what was measured.
"""

from __future__ import annotations

import math
import operator
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossamer.core.errors import InputError
from gossamer.core.files import read_json, write_json

Row = Mapping[str, Any]
Relation = Literal[">=", "<=", ">", "<", "=="]
_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": lambda left, right: math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12),
}


@dataclass(frozen=True)
class Pick:
    """Which numbers of a result: one metric of the rows that match.

    Attributes:
        metric: name of the number.
        where: fields that rows must have, as ``{"contender": "qd", "bits": 2}``.
    """

    metric: str
    where: Mapping[str, Any] = field(default_factory=dict)

    def by_seed(self, rows: Iterable[Row]) -> dict[Any, float]:
        """Mean of the metric for each seed; rows without the metric (or None) are left out."""
        found: dict[Any, list[float]] = {}
        for row in rows:
            matches = all(row.get(key) == value for key, value in self.where.items())
            if matches and row.get(self.metric) is not None:
                found.setdefault(row.get("seed"), []).append(float(row[self.metric]))
        return {seed: float(np.mean(values)) for seed, values in found.items()}


@dataclass(frozen=True)
class Claim:
    """One clause of what a paper claims: ``left relation (right + offset)``.

    It holds if the means stand in the relation, and with ``beyond`` also if they do so by more
    than that many standard errors of the paired difference.

    Attributes:
        text: the clause in words.
        left: the numbers on the left.
        relation: how they should stand to the right side.
        right: other numbers of the same result (paired by seed), or a constant.
        offset: added to the right side, in the metric's unit.
        beyond: standard errors by which the relation must hold.
        paper: what the paper reports, in words, for the page; never used in a verdict.
    """

    text: str
    left: Pick
    relation: Relation
    right: Pick | float
    offset: float = 0.0
    beyond: float = 0.0
    paper: str = ""

    def judge(self, rows: Sequence[Row]) -> Evidence:
        """Computes the verdict from measured rows."""
        left = self.left.by_seed(rows)
        if isinstance(self.right, Pick):
            right = self.right.by_seed(rows)
            seeds = [seed for seed in left if seed in right]
            values = np.array([left[s] - right[s] for s in seeds]) - self.offset
            right_mean = float(np.mean([right[s] for s in seeds])) if seeds else math.nan
        else:
            seeds = list(left)
            values = np.array([left[s] for s in seeds]) - (self.right + self.offset)
            right_mean = float(self.right)
        if not seeds:
            return Evidence(self.text, None, None, None, None, None, 0)
        difference = float(values.mean())
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
        margin = self.beyond * error
        shifted = difference - margin if self.relation in (">=", ">") else difference + margin
        return Evidence(
            text=self.text,
            holds=_RELATIONS[self.relation](shifted, 0.0),
            left=float(np.mean([left[s] for s in seeds])),
            right=right_mean,
            difference=difference + self.offset,
            half_width=half_width(values),
            seeds=len(seeds),
        )

    def to_json(self) -> dict[str, Any]:
        """The claim as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Claim:
        """Reads what :meth:`to_json` wrote.

        Raises:
            ValueError: if the relation is none of ours.
        """
        right = value["right"]
        if value["relation"] not in _RELATIONS:
            raise ValueError(f"unknown relation {value['relation']!r}")
        return cls(
            text=value["text"],
            left=Pick(**value["left"]),
            relation=value["relation"],
            right=Pick(**right) if isinstance(right, Mapping) else float(right),
            offset=float(value.get("offset", 0.0)),
            beyond=float(value.get("beyond", 0.0)),
            paper=value.get("paper", ""),
        )


def half_width(values: Sequence[float] | np.ndarray) -> float | None:
    """Half of the 95 % t-interval of a mean; None for a single value."""
    from scipy.special import stdtrit  # scipy.stats would cost a second at the command line

    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1) / math.sqrt(n))


@dataclass(frozen=True)
class Evidence:
    """What the measured rows say of one claim.

    Attributes:
        text: the clause.
        holds: the verdict; None if nothing was measured.
        left: mean of the left side.
        right: mean of the right side (without the offset).
        difference: mean of left - right.
        half_width: half of the 95 % t-interval of the paired difference; None for one seed.
        seeds: how many pairs.
    """

    text: str
    holds: bool | None
    left: float | None
    right: float | None
    difference: float | None
    half_width: float | None
    seeds: int


@dataclass(frozen=True)
class Result:
    """A measured experiment, as committed.

    Attributes:
        spec: the system's name.
        mode: "quick" or "full".
        rows: the measurements.
        claims: what was claimed.
        reconstruction: whether it is built on our own details where the paper has none.
        about: versions, device, date, settings.
    """

    spec: str
    mode: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    reconstruction: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    def evidence(self) -> list[Evidence]:
        """The verdict on each claim."""
        return [claim.judge(self.rows) for claim in self.claims]

    def verdict(self) -> str:
        """ "holds", "holds (reconstruction)", "does not hold (k of n)" or "not measured"."""
        evidence = self.evidence()
        if not evidence or any(e.holds is None for e in evidence):
            return "not measured"
        kept = sum(bool(e.holds) for e in evidence)
        if kept == len(evidence):
            return "holds (reconstruction)" if self.reconstruction else "holds"
        return f"does not hold ({kept} of {len(evidence)})"

    def write(self, path: Path) -> None:
        """Writes the result as JSON in one rename."""
        write_json(
            path,
            {
                "spec": self.spec,
                "mode": self.mode,
                "reconstruction": self.reconstruction,
                "about": dict(self.about),
                "claims": [claim.to_json() for claim in self.claims],
                "rows": [dict(row) for row in self.rows],
            },
        )

    @classmethod
    def read(cls, path: Path) -> Result:
        """Reads what :meth:`write` wrote.

        Raises:
            InputError: if the file is not a result.
        """
        value = read_json(path)
        try:
            result = cls(
                spec=value["spec"],
                mode=value["mode"],
                rows=tuple(value["rows"]),
                claims=tuple(Claim.from_json(claim) for claim in value["claims"]),
                reconstruction=bool(value["reconstruction"]),
                about=dict(value["about"]),
            )
            result.evidence()  # a result whose verdict cannot be computed is none
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a result of an experiment: {error!r}") from error
        return result


@dataclass(frozen=True)
class Experiment:
    """What a system claims and how it is measured.

    Attributes:
        spec: the system's name, as in ``gossamer systems``.
        title: what is compared, in a few words.
        claims: the relations the paper claims.
        quick: ``(seeds) -> rows``; a few minutes on two cores.
        full: ``(seeds) -> rows``; the sizes of the paper.
        quick_seeds: seeds of the committed quick result.
        full_seeds: seeds of the full run.
        draw: ``(result, path)`` draws the result as PNG.
        reconstruction: whether it is built on our own details where the paper has none.
    """

    spec: str
    title: str
    claims: tuple[Claim, ...]
    quick: Callable[[Sequence[int]], Iterable[Row]]
    full: Callable[[Sequence[int]], Iterable[Row]]
    quick_seeds: tuple[int, ...] = (0, 1, 2)
    full_seeds: tuple[int, ...] = (0, 1, 2)
    draw: Callable[[Result, Path], None] | None = None
    reconstruction: bool = False

    def run(self, mode: Literal["quick", "full"], seeds: Sequence[int] | None = None) -> Result:
        """Measures; returns the result with versions, device and date."""
        measure = self.quick if mode == "quick" else self.full
        default = self.quick_seeds if mode == "quick" else self.full_seeds
        seeds = tuple(default if seeds is None else seeds)
        rows = tuple(dict(row) for row in measure(seeds))
        return Result(
            self.spec, mode, rows, self.claims, self.reconstruction, about(seeds=list(seeds))
        )


def about(**extra: Any) -> dict[str, Any]:
    """Versions, device and date of a measurement, with ``extra`` beside them."""
    import torch

    packages = ("gossamer", "torch", "torchvision", "timm", "onnxruntime", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        **extra,
    }


def device_name() -> str:
    """The processor (and GPU) that this process runs on, in words."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    if torch.cuda.is_available():
        name += f" + {torch.cuda.get_device_name()}"
    return name
