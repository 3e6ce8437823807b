"""Tensors of which a random part is kept: a seed says which, so only the values are stored.

The draw is a function of the seed, the tensor's name and the place in the tensor alone, by a
counter-based generator: neither the order of tensors, nor the device, nor the number of threads
changes it. Philox 4x64 is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.core.task import seed_of
from gossamer.parts.stored import Stored, shape_of

Unit = Literal["entries", "rows", "columns"]
"""What is kept or dropped as a whole. Columns are places within a row (inputs of a matrix); a
vector has entries only."""


def key_of(seed: int, name: str) -> int:
    """The generator's key for one tensor."""
    return seed_of("kept", seed, name)


def threshold_of(p: float) -> int:
    """Drop rate in [0, 1) to the number below which a 32-bit draw keeps its unit.

    Raises:
        InputError: if ``p`` is out of range.
    """
    if not 0.0 <= p < 1.0:
        raise InputError(f"the share that is dropped is in [0, 1), not {p}")
    return round((1.0 - p) * 2**32)


def random_kept(shape: Sequence[int], threshold: int, key: int, unit: Unit = "entries") -> Tensor:
    """Which values stay: bool, ``shape``, on the CPU.

    Args:
        shape: of the tensor.
        threshold: see :func:`threshold_of`.
        key: see :func:`key_of`.
        unit: what is drawn.
    """
    return _drawn(tuple(shape), threshold, key, unit).expand(tuple(shape))


def _units(shape: tuple[int, ...], unit: Unit) -> tuple[int, ...]:
    """Shape of what is drawn; it spreads over ``shape``."""
    if len(shape) > 1 and unit == "rows":
        return (shape[0],) + (1,) * (len(shape) - 1)
    if len(shape) > 1 and unit == "columns":
        return (1, *shape[1:])
    return shape


def _drawn(shape: tuple[int, ...], threshold: int, key: int, unit: Unit) -> Tensor:
    units = _units(shape, unit)
    count = math.prod(units)
    words = np.random.Philox(key=key).random_raw(-(-count // 2)).astype("<u8").view("<u4")[:count]
    return torch.from_numpy(words.astype(np.int64) < threshold).view(units)


@dataclass(frozen=True)
class SeededTensor(Stored):
    """A tensor of which random values stay, each divided by a number of its row.

    Attributes:
        values: floating point ``[n]``, in row-major order, before the division.
        divisor: float32 ``[1]``, or ``[rows]``.
        threshold: see :func:`threshold_of`.
        key: see :func:`key_of`.
        unit: what was drawn.
        shape: of the tensor.
    """

    codec: ClassVar[str] = "seeded"

    values: Tensor
    divisor: Tensor
    threshold: int
    key: int
    unit: Unit
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        p: float,
        *,
        divisor: float | Tensor,
        seed: int,
        name: str,
        unit: Unit = "entries",
    ) -> SeededTensor:
        """Drops a share ``p`` of ``tensor``.

        Args:
            tensor: floating point, of one dimension or more.
            p: drop rate in [0, 1).
            divisor: one number, or ``[rows]``.
            seed: of the draw.
            name: of the tensor.
            unit: what is drawn.
        """
        threshold, key = threshold_of(p), key_of(seed, name)
        flat = tensor.detach().cpu()
        by = torch.as_tensor(divisor, dtype=torch.float32).detach().cpu().flatten()
        shape = tuple(tensor.shape)
        return cls(
            flat[random_kept(shape, threshold, key, unit)], by, threshold, key, unit, shape
        )  # fmt: skip

    def decode(self) -> Tensor:
        tensor = torch.zeros(self.shape, dtype=self.values.dtype)
        tensor[random_kept(self.shape, self.threshold, self.key, self.unit)] = self.values
        return divided(tensor, self.divisor)

    def arrays(self) -> dict[str, Tensor]:
        return {"v": self.values, "q": self.divisor}

    def record(self) -> Any:
        return [self.shape, self.threshold, self.key, self.unit]

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> SeededTensor:
        shape, threshold, key, unit = record
        shape = shape_of(shape)
        values, divisor = arrays["v"], arrays["q"]
        if not isinstance(threshold, int) or not 0 <= threshold <= 1 << 32:
            raise ValueError("the share that stays is none")
        if not isinstance(key, int) or not 0 <= key < 1 << 63:
            raise ValueError("the key is none")
        if unit not in ("entries", "rows", "columns") or not shape:
            raise ValueError(record)
        if divisor.dtype != torch.float32 or divisor.shape not in ((1,), (shape[0],)):
            raise ValueError("there is not one divisor, nor one for each row")
        units = math.prod(_units(shape, unit))
        # Far more units than values were never meant; and this bounds what is drawn.
        if units > (1 << 20) * (1 + values.numel()):
            raise ValueError("there are not as many values as were kept")
        count = int(_drawn(shape, threshold, key, unit).sum()) * (math.prod(shape) // units)
        if values.shape != (count,) or not values.is_floating_point():
            raise ValueError("there are not as many values as were kept")
        return cls(values, divisor, threshold, key, unit, shape)


def divided(tensor: Tensor, divisor: float | Tensor) -> Tensor:
    """``tensor`` divided by one number, or by one for each of its rows ``[rows]``."""
    by = torch.as_tensor(divisor, dtype=torch.float32, device=tensor.device).flatten()
    return tensor / by.to(tensor.dtype).view(-1, *(1,) * (tensor.ndim - 1))
