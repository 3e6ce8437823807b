"""How long kernels of known shape take here, as traces show it: the yardstick of a fingerprint.

The ceilings of :mod:`gossamer.hardware.calibrate` are what nothing exceeds; a trace holds times of
whole operators as a profiler records them, with what starting them costs. So layers of known shape
are traced in the same way, and ``t = start + MACs / rate`` is fitted for each kernel size and kind
of grouping, ``t = start + bytes / rate`` for element-wise kernels. The time model is a
reconstruction: the paper (Jha et al., arXiv:2007.15248) does not publish its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.progress import progress
from gossamer.hardware.execution_trace import trace

Grouping = Literal["dense", "grouped", "depthwise"]
KERNELS = (1, 3, 5, 7)
GROUPINGS: tuple[Grouping, ...] = ("dense", "grouped", "depthwise")
_GROUP_WIDTH = 4
_SHAPES = ((16, 32), (64, 16), (64, 32))
"""Channels and side of the layers that are timed."""


@dataclass(frozen=True)
class Line:
    """A time that grows with work.

    Attributes:
        start: seconds.
        slope: seconds for each unit of work.
    """

    start: float
    slope: float

    def at(self, work: float | np.ndarray) -> float | np.ndarray:
        """Seconds of so much work."""
        return self.start + self.slope * work


@dataclass(frozen=True)
class DeviceProfile:
    """Times of kernels on one device, as traces record them.

    Attributes:
        convolutions: over MACs, by kernel size and grouping.
        norm: a normalisation over the bytes of its output, the slowest element-wise kernel.
        copy: a copy over its bytes.
        rounding: allocations are multiples of so many bytes.
    """

    convolutions: dict[tuple[int, Grouping], Line] = field(default_factory=dict)
    norm: Line = Line(0.0, 0.0)
    copy: Line = Line(0.0, 0.0)
    rounding: int = 1

    @property
    def timed(self) -> bool:
        """Whether it knows any time; otherwise only sizes are used."""
        return bool(self.convolutions)

    def convolution(
        self, kernel: int, groups: int, inputs: int, outputs: int, height: int, batch: int
    ) -> float:
        """Modelled seconds of a convolution.

        Args:
            kernel: 1, 3, 5 or 7.
            groups: 1, as many as channels, or between.
            inputs: channels that come in.
            outputs: channels that go out.
            height: rows of its (square) output.
            batch: images.
        """
        macs = batch * height**2 * outputs * kernel**2 * inputs / groups
        kind: Grouping = "dense" if groups == 1 else "grouped"
        if groups == inputs and groups > 1:
            kind = "depthwise"
        return float(self.convolutions[kernel, kind].at(macs))


SIZES_ONLY = DeviceProfile()
"""Knows no times: an attack with it reads sizes alone."""


class _Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def calibrate_device(
    *, repeats: int = 10, kernels: Sequence[int] = KERNELS, device: str = "cpu", rounding: int = 1
) -> DeviceProfile:
    """Traces layers of known shape on this machine, a few seconds.

    Args:
        repeats: recorded passes of each.
        kernels: sizes of the convolutions.
        device: "cpu" or "cuda".
        rounding: of allocations, as the device's allocator has it.
    """

    def line(make: Callable[[int], nn.Module], work: Callable[[int, int], float]) -> Line:
        works, times = [], []
        for channels, side in _SHAPES:
            with torch.random.fork_rng(devices=[]):
                module = make(channels).to(device)
            seen = trace(
                module, (channels, side), batches=(1, 4), repeats=repeats, warmup=3,
                other_sides=False,
            )  # fmt: skip
            works += [batch * work(channels, side) for batch in (1, 4)]
            times += seen.durations.sum(1).tolist()
        return fit_line(works, times)

    found: dict[tuple[int, Grouping], Line] = {}
    with progress() as bar:
        shown = bar.add_task("timing kernels", total=len(kernels) * len(GROUPINGS))
        for kernel in kernels:
            for kind in GROUPINGS:
                width = {"dense": 0, "grouped": _GROUP_WIDTH, "depthwise": 1}[kind]

                def conv(c: int, k: int = kernel, w: int = width) -> nn.Module:
                    return nn.Conv2d(c, c, k, padding=k // 2, groups=c // (w or c), bias=False)

                def macs(c: int, s: int, k: int = kernel, w: int = width) -> float:
                    return s * s * c * k * k * (w or c)

                found[kernel, kind] = line(conv, macs)
                bar.advance(shown)
    size = lambda c, s: 4.0 * c * s * s  # noqa: E731
    return DeviceProfile(found, line(nn.BatchNorm2d, size), line(lambda c: _Copy(), size), rounding)


def fit_line(work: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line of least relative error, neither part below zero."""
    from scipy.optimize import nnls

    times = np.asarray(seconds)
    scale = max(work)
    design = np.stack([np.ones(len(times)), np.asarray(work) / scale], 1) / times[:, None]
    (start, slope), _ = nnls(design, np.ones(len(times)))
    return Line(float(start), float(slope / scale))
