"""What a convolution's padding comes to in pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def padded(
    x: Tensor, kernel: Sequence[int], padding: int | Sequence[int] | str, dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """The input of a 2-D convolution, and how many zeros it takes on both sides of each axis.

    "same" may need one more zero at the end of an axis than at its beginning; that one is put in.

    Args:
        x: ``[batch, channels, height, width]``.
        kernel: height and width.
        padding: of the convolution, in any of its forms.
        dilation: of both axes.
    """
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return F.pad(x, (0, total[1] % 2, 0, total[0] % 2)), [t // 2 for t in total]
    if isinstance(padding, str):  # "valid"
        return x, [0, 0]
    return x, pair(padding)


def pair(value: int | Sequence[int]) -> list[int]:
    """One number for both axes, or one for each, as two."""
    values = [value] if isinstance(value, int) else list(value)
    return values * (3 - len(values))
