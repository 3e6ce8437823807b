"""What a network may cost: limits as a share of the original or as absolute values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.core.errors import InputError

_UNITS = {
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "params": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "size": {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20},
    "latency": {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3},
}
MEASURES = {"macs": "macs", "params": "params", "size": "bytes", "latency": "latency"}
"""Budget names and the fields of a measured row that they limit."""


@dataclass(frozen=True)
class Limit:
    """An upper limit of one cost.

    Attributes:
        name: "macs", "params", "size" (bytes of the deployed file) or "latency" (milliseconds).
        value: the limit.
        relative: whether ``value`` is a share of the original's cost.
    """

    name: str
    value: float
    relative: bool

    @classmethod
    def of(cls, name: str, value: Limit | float | str) -> Limit:
        """Reads "0.5" (a share), "100KB", "1.5M", "2ms", or a number (a share up to 1).

        Raises:
            InputError: if it is neither.
        """
        if isinstance(value, Limit):
            return value
        text = str(value).strip().lower()
        match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)", text)
        unit = match.group(2) if match else ""
        if match is None or (unit != "%" and unit not in _UNITS[name]):
            raise InputError(
                f"the budget --{name} cannot be {value!r:.40}: give a share of the original as 0.5 "
                f"or a value with a unit ({', '.join(u for u in _UNITS[name] if u) or 'none'})"
            )
        number = float(match.group(1)) / (100.0 if unit == "%" else 1.0)
        relative = unit == "%" or (unit == "" and number <= 1.0)
        if not relative:
            number *= _UNITS[name][unit]
        if not 0.0 < number < math.inf:
            raise InputError(f"the budget --{name} must be above 0, not {value!r:.40}")
        return cls(name, number, relative)

    def target(self, before: float) -> float:
        """The absolute limit, given the original's cost."""
        return self.value * before if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}{' of the original' if self.relative else ''}"


@dataclass(frozen=True)
class Budget:
    """Limits that a network must meet together.

    Attributes:
        limits: at most one for each cost.
        max_drop: points of the task's score that may be lost, or None.
    """

    limits: Mapping[str, Limit]
    max_drop: float | None = None

    @classmethod
    def of(
        cls,
        *,
        macs: Limit | float | str | None = None,
        params: Limit | float | str | None = None,
        size: Limit | float | str | None = None,
        latency: Limit | float | str | None = None,
        max_drop: float | None = None,
    ) -> Budget:
        """Collects the limits that are given.

        Raises:
            InputError: if one cannot be read.
        """
        given = {"macs": macs, "params": params, "size": size, "latency": latency}
        if max_drop is not None and not 0.0 <= max_drop < math.inf:
            raise InputError(f"--max-drop is points of the score, 0 or more, not {max_drop}")
        return cls({n: Limit.of(n, v) for n, v in given.items() if v is not None}, max_drop)

    def broken(
        self, before: Mapping[str, float], after: Mapping[str, float], drop: float | None
    ) -> list[str]:
        """The limits that a network does not meet, in words; costs by budget name.

        Args:
            before: the original's "macs", "params", "size" and "latency".
            after: the network's.
            drop: points lost, or None to leave the score out.
        """
        words = []
        for name, limit in self.limits.items():
            if name in after and after[name] > limit.target(before[name]) * (1 + 1e-9):
                reached = after[name] / before[name] if limit.relative else after[name]
                words.append(f"--{name} {limit} (nearest: {reached:.3g})")
        if drop is not None and self.max_drop is not None and drop > self.max_drop + 1e-9:
            words.append(f"--max-drop {self.max_drop:g} points (nearest: {drop:.2f})")
        return words

    def share(self, name: str, before: float) -> float | None:
        """A limit as a share of the original's cost."""
        limit = self.limits.get(name)
        return None if limit is None else min(1.0, limit.target(before) / before)

    def to_json(self) -> dict[str, Any]:
        """The budget as JSON values."""
        rows: dict[str, Any] = {
            name: {"value": limit.value, "relative": limit.relative}
            for name, limit in self.limits.items()
        }
        return rows | {"max_drop": self.max_drop}
