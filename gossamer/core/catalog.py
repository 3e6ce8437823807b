"""The catalogue: 85 published systems, what of them is here, and what was measured.

The systems are data (``catalog.json`` beside this file). They are joined with the code, by whether
its file exists, and with the committed results, from which verdicts are computed. No room is
imported, and neither is torch, so the catalogue can be printed at once and anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError
from gossamer.core.experiment import Evidence, Result
from gossamer.core.files import read_json

PACKAGE = Path(__file__).resolve().parent.parent
ROOMS = (
    "models",
    "compress",
    "data",
    "train",
    "learn",
    "evaluate",
    "hardware",
    "search",
    "serve",
)
PROVENANCES = ("authors' code", "paper", "reconstruction")
"""What an implementation rests on: the authors' public code, the paper alone, or our own details
where neither gives them (those are then options, named as such)."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        number: 1 to 85.
        spec: its short name, as in ``gossamer reproduce SPEC``.
        title: of the paper.
        room: folder of the package that holds it.
        module: path of its code below the package, without suffix.
        provenance: one of :data:`PROVENANCES`, or such with the exception in words.
        here: whether its code is in this package.
        measurable: whether its experiment is in this package.
        result: its committed quick result, if there is one.
        full_result: its committed result at the sizes of the paper, if there is one.
    """

    number: int
    spec: str
    title: str
    room: str
    module: str
    provenance: str
    here: bool = False
    measurable: bool = False
    result: Result | None = None
    full_result: Result | None = None

    @property
    def entry_point(self) -> str:
        """Dotted name of its module."""
        return "gossamer." + self.module.replace("/", ".")

    @property
    def experiment(self) -> str:
        """Dotted name of its experiment."""
        return "gossamer.experiments." + self.module.replace("/", ".")

    @property
    def shown(self) -> Result | None:
        """The result that the verdict is computed from: the quick one, which anyone can repeat,
        or the full one where there is no other."""
        return self.result or self.full_result

    @property
    def verdict(self) -> str:
        """What the committed result says of all claims, see :meth:`Result.verdict`."""
        return self.shown.verdict() if self.shown else NOT_MEASURED

    def evidence(self) -> list[Evidence]:
        """The verdict on each claim, with its figures."""
        return self.shown.evidence() if self.shown else []

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        shown = self.shown
        claims = shown.claims if shown else ()
        evidence = self.evidence()
        return {
            "number": self.number,
            "spec": self.spec,
            "title": self.title,
            "room": self.room,
            "module": self.entry_point,
            "provenance": self.provenance,
            "here": self.here,
            "verdict": self.verdict,
            "mode": shown.mode if shown else None,
            "claims": [
                {"text": claim.text, "holds": found.holds, "paper": claim.paper}
                for claim, found in zip(claims, evidence, strict=True)
            ],
            "figures": [
                {
                    "left": found.left,
                    "right": found.right,
                    "difference": found.difference,
                    "half_width": found.half_width,
                    "seeds": found.seeds,
                }
                for found in evidence
            ],
            "full_verdict": self.full_result.verdict() if self.full_result else NOT_MEASURED,
        }


@dataclass(frozen=True)
class Catalog:
    """All systems.

    Attributes:
        systems: in the order of their numbers.
    """

    systems: tuple[System, ...]

    @classmethod
    def load(cls, *, results: Path | None = None, package: Path = PACKAGE) -> Catalog:
        """Reads the catalogue and joins it with code and results.

        Args:
            results: folder of committed results. Default: the one of the checkout that the
                package lies in, otherwise the one installed with the package.
            package: folder of the package.

        Raises:
            InputError: if a result is not readable or belongs to another system.
        """
        results = results or _results(package)
        entries = read_json(Path(__file__).with_name("catalog.json"))
        return cls(tuple(_joined(entry, package, results) for entry in entries))

    def __getitem__(self, spec: str) -> System:
        """The system of that name.

        Raises:
            InputError: if there is none; the nearest names are offered.
        """
        for system in self.systems:
            if system.spec == spec:
                return system
        near = get_close_matches(spec, [system.spec for system in self.systems], n=3, cutoff=0.4)
        raise InputError(
            f"there is no system {spec!r}"
            + (f"; the nearest names are {', '.join(near)}" if near else "")
            + "; `gossamer systems` lists all"
        )

    def __len__(self) -> int:
        return len(self.systems)

    def as_json(self) -> list[dict[str, Any]]:
        """One row a system, as JSON values."""
        return [system.as_json() for system in self.systems]

    def by_room(self) -> Mapping[str, Sequence[System]]:
        """Systems of each room, rooms in a fixed order."""
        return {room: [system for system in self.systems if system.room == room] for room in ROOMS}


def _joined(entry: Mapping[str, Any], package: Path, results: Path) -> System:
    spec, module = entry["spec"], entry["module"]
    return System(
        **entry,
        here=_exists(package / module),
        measurable=_exists(package / "experiments" / module),
        result=_result(results / f"{spec}.json", spec),
        full_result=_result(results / f"{spec}.full.json", spec),
    )


def _exists(module: Path) -> bool:
    return module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()


def _results(package: Path) -> Path:
    checkout = package.parent / "docs" / "results"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "results"


def _result(path: Path, spec: str) -> Result | None:
    if not path.is_file():
        return None
    result = Result.read(path)
    if result.spec != spec:
        raise InputError(f"{path} is the result of {result.spec!r}, not of {spec!r}")
    return result
