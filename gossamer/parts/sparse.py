"""Sparse tensors as they are stored: which values are there, and the values.

Two ways to say which, and the smaller is taken: a bitmap (one bit a value, whatever the sparsity)
or gaps between values that stay (one byte each, with filler zeros where a gap is longer), which
wins above about 90 % sparsity. Gaps are those of Han, Mao and Dally, "Deep Compression", ICLR 2016,
arXiv:1510.00149, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gossamer.parts.packing import pack, unpack
from gossamer.parts.stored import Stored, shape_of

_LONGEST = 255


@dataclass(frozen=True)
class SparseTensor(Stored):
    """A tensor with zeros, stored without them.

    Attributes:
        values: float ``[n]``, in row-major order (with filler zeros where gaps are too long).
        places: uint8: a bitmap ``[ceil(count / 8)]``, or for each value how many zeros come before
            it ``[n]``.
        how: "bitmap" or "gaps".
        shape: of the tensor.
    """

    codec: ClassVar[str] = "sparse"

    values: Tensor
    places: Tensor
    how: Literal["bitmap", "gaps"]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> SparseTensor:
        """Stores ``tensor`` the smaller of the two ways; exact."""
        flat = tensor.detach().cpu().flatten()
        there = flat.nonzero().flatten()
        before = torch.diff(there, prepend=torch.tensor([-1])) - 1
        # A gap of 256 zeros or more is cut by stored zeros, each of which ends 255 others.
        fillers = before // (_LONGEST + 1)
        size = flat.element_size()
        shape = tuple(tensor.shape)
        if (len(there) + int(fillers.sum())) * (size + 1) >= len(there) * size + len(flat) // 8:
            return cls(flat[there], pack((flat != 0).to(torch.uint8), 1), "bitmap", shape)
        ends = (fillers + 1).cumsum(0) - 1
        number = int(ends[-1]) + 1 if len(ends) else 0
        gaps = torch.full((number,), _LONGEST, dtype=torch.uint8)
        values = torch.zeros(number, dtype=flat.dtype)
        gaps[ends] = (before % (_LONGEST + 1)).to(torch.uint8)
        values[ends] = flat[there]
        return cls(values, gaps, "gaps", shape)

    def decode(self) -> Tensor:
        count = math.prod(self.shape)
        flat = torch.zeros(count, dtype=self.values.dtype)
        if self.how == "bitmap":
            flat[unpack(self.places, 1, count).bool()] = self.values
        else:
            flat[(self.places.long() + 1).cumsum(0) - 1] = self.values
        return flat.view(self.shape)

    def arrays(self) -> dict[str, Tensor]:
        return {"v": self.values, "p": self.places}

    def record(self) -> Any:
        return [self.shape, self.how]

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> SparseTensor:
        shape, how = record
        shape = shape_of(shape)
        values, places = arrays["v"], arrays["p"]
        count = math.prod(shape)
        if how == "bitmap":
            there = int(unpack(places, 1, count).sum())
        elif how == "gaps" and places.dtype == torch.uint8 and places.ndim == 1:
            there = len(places)
            if int((places.long() + 1).sum()) > count:
                raise ValueError("the gaps go past the end of the tensor")
        else:
            raise ValueError(record)
        if values.shape != (there,) or not values.is_floating_point():
            raise ValueError("there are not as many values as places")
        return cls(values, places, how, shape)
