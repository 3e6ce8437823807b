"""What a codec is: how one tensor is stored, read again and multiplied with.

A codec is a class of :class:`Stored`: what a tensor became (codes and scales, a bitmap and the
values that are left, signs ...), how that is written, read and decoded, and where there is one, a
kernel that multiplies with the stored form without inflating it first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, fx


class Kernel(ABC):
    """Multiplies with a stored weight without decoding all of it first."""

    def reads(self, source: fx.Node) -> fx.Node | None:
        """What takes the place of an operator's input: what the kernel does itself is left out.

        Args:
            source: the input's node in the traced network.

        Returns:
            A node before it or itself; None if the kernel cannot multiply with this input.
        """
        return source

    def settle(self, program: fx.GraphModule, node: fx.Node) -> Kernel:
        """Called for each call of a kernel when all of them are in their places.

        A kernel may take in what is computed just before it, by letting ``node`` read an earlier
        node and returning a kernel that does the rest.
        """
        return self

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` ``[..., inputs]`` times the stored ``[outputs, inputs]``, transposed, plus bias."""

    def conv2d(
        self,
        x: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """Convolves ``x`` ``[batch, channels, height, width]`` with the stored kernel."""
        raise NotImplementedError


class Stored(ABC):
    """A tensor in its stored form.

    Attributes:
        shape: of the decoded tensor.
    """

    codec: ClassVar[str]
    shape: tuple[int, ...]

    @abstractmethod
    def decode(self) -> Tensor:
        """The tensor that it stands for."""

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """What is written, by short names."""

    @abstractmethod
    def record(self) -> Any:
        """What is needed beside the arrays to read them (shape, bits), JSON values."""

    @classmethod
    @abstractmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> Self:
        """Reads what :meth:`arrays` and :meth:`record` gave.

        Raises:
            ValueError, KeyError or TypeError: if they do not fit together. Nothing of the file is
                to be believed: every size and code is checked here.
        """

    def kernel(self) -> Kernel | None:
        """What multiplies with this tensor as it is; None where it has to be decoded."""
        return None

    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.numel() * array.element_size() for array in self.arrays().values())


def shape_of(record: Any) -> tuple[int, ...]:
    """A shape read from a file.

    Raises:
        ValueError: if it is none, or of more than 2^40 values.
    """
    shape = tuple(int(size) for size in record)
    if min(shape, default=1) < 1 or math.prod(shape) > 1 << 40:
        raise ValueError(f"{record!r:.60} is no shape")
    return shape
