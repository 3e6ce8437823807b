"""A ConvFirst block as one Triton kernel, for GPUs.

Each program computes a tile of output pixels: the grouped convolution into registers, then chunk by
chunk of the expanded channels the expansion, SiLU and projection. Input, output and weights are all
that moves; the halo of a tile is read from the second cache. Products are in full float32.

It was written against Triton's interpreter (which the tests run); speed on a GPU was not measured.

Source: Lavin, "On the efficiency of convolutional neural networks", arXiv:2404.03617.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _conv_first(
    x, out, conv_weight, conv_bias, expand_weight, expand_bias, project_weight, project_bias,
    channels, outputs, expanded, height, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    oy, ox = pixel // out_width, pixel % out_width
    real = pixel < out_height * out_width
    c = tl.arange(0, CHANNELS)
    image = x + sample * channels * height * width

    # t[pixel, channel]: the convolution. A group has as many outputs as inputs.
    t = tl.zeros((PIXELS, CHANNELS), tl.float32)
    t += tl.load(conv_bias + c, mask=c < channels, other=0.0)[None, :]
    for member in range(GROUP):
        source = (c // GROUP) * GROUP + member
        for ky in range(KERNEL):
            iy = oy * STRIDE + ky - KERNEL // 2
            for kx in range(KERNEL):
                ix = ox * STRIDE + kx - KERNEL // 2
                inside = real & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                place = source[None, :] * height * width + (iy * width + ix)[:, None]
                mask = inside[:, None] & (c < channels)[None, :]
                value = tl.load(image + place, mask=mask, other=0.0)
                tap = ((c * GROUP + member) * KERNEL + ky) * KERNEL + kx
                weight = tl.load(conv_weight + tap, mask=c < channels, other=0.0)
                t += value * weight[None, :]

    o = tl.arange(0, OUTPUTS)
    sums = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    sums += tl.load(project_bias + o, mask=o < outputs, other=0.0)[None, :]
    for begin in range(0, expanded, CHUNK):
        e = begin + tl.arange(0, CHUNK)
        weight = tl.load(
            expand_weight + e[None, :] * channels + c[:, None],
            mask=(e < expanded)[None, :] & (c < channels)[:, None], other=0.0,
        )  # fmt: skip
        a = tl.dot(t, weight, input_precision="ieee")
        a += tl.load(expand_bias + e, mask=e < expanded, other=0.0)[None, :]
        a = a * tl.sigmoid(a)
        weight = tl.load(
            project_weight + o[None, :] * expanded + e[:, None],
            mask=(e < expanded)[:, None] & (o < outputs)[None, :], other=0.0,
        )  # fmt: skip
        sums += tl.dot(a, weight, input_precision="ieee")

    mask = real[:, None] & (o < outputs)[None, :]
    place = o[None, :] * out_height * out_width + pixel[:, None]
    if RESIDUAL:
        sums += tl.load(image + place, mask=mask, other=0.0)
    tl.store(out + sample * outputs * out_height * out_width + place, sums, mask=mask)


def conv_first(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    groups: int,
    stride: int,
    residual: bool,
    pixels: int = 64,
    chunk: int = 32,
) -> Tensor:
    """Convolution, expansion, SiLU, projection of ``x``.

    Args:
        x: ``[batch, channels, height, width]``, float32.
        weights: of convolution (as many outputs as inputs), expansion and projection, each with its
            bias after it.
        groups: of the convolution.
        stride: of the convolution.
        residual: whether ``x`` is added.
        pixels: of a tile, a power of 2.
        chunk: expanded channels a pass, a power of 2.

    Returns:
        ``[batch, outputs, out_height, out_width]``.
    """
    x = x.contiguous()
    parts = [w.detach().contiguous() for w in weights]
    batch, channels, height, width = x.shape
    kernel = parts[0].shape[-1]
    out_height, out_width = (
        (side + 2 * (kernel // 2) - kernel) // stride + 1 for side in (height, width)
    )
    outputs, expanded = len(parts[4]), len(parts[2])
    out = torch.empty(batch, outputs, out_height, out_width, device=x.device)
    if out.numel():
        grid = (triton.cdiv(out_height * out_width, pixels), batch)
        launch: Any = _conv_first[grid]
        launch(
            x, out, *parts, channels, outputs, expanded, height, width, out_height, out_width,
            KERNEL=kernel, STRIDE=stride, GROUP=channels // groups, RESIDUAL=residual,
            CHANNELS=max(16, triton.next_power_of_2(channels)),
            OUTPUTS=max(16, triton.next_power_of_2(outputs)), PIXELS=pixels, CHUNK=chunk,
        )  # fmt: skip
    return out
