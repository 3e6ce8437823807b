"""One image under many overlapping windows: the mean and the spread of what a network says of a
pixel.

A window slides over the image; every pixel is seen at several places inside of it, and answered
each time. Mean, sample standard deviation and number of answers are gathered in one pass, batch by
batch, in float64, as moments about the first answer that each pixel got: a network that always says
the same has a deviation of exactly 0, and nothing cancels.

Source: Yalcinkaya et al., "Improved robustness for deep learning-based segmentation of multi-center
myocardial perfusion MRI datasets using data adaptive uncertainty-guided space-time analysis",
arXiv:2408.04805 (patch combination and uncertainty map).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from gossamer.core.errors import InputError, first_line
from gossamer.core.task import device_of, evaluating, logits_of

_EIGHT = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class WindowGrid:
    """Where windows stand on an image.

    Attributes:
        height: of the image, pixels.
        width: of the image, pixels.
        patch: side of a window, pixels.
        rows: the first row of each row of windows, ascending.
        columns: the first column of each column of windows, ascending.
    """

    height: int
    width: int
    patch: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def over(
        cls, height: int, width: int, *, patch: int, stride: int, flush: bool = True
    ) -> WindowGrid:
        """Windows at every ``stride`` pixels, ``(side - patch) // stride + 1`` along each side.

        Args:
            height: of the image, pixels.
            width: of the image, pixels.
            patch: side of a window, pixels.
            stride: pixels between windows.
            flush: where the stride does not divide the way, add a last window that ends with the
                image (pixels there are covered more often); False refuses such a stride.

        Raises:
            InputError: if a window does not fit, or the windows leave gaps or pixels uncovered.
        """
        if patch < 1 or not 1 <= stride <= patch:
            raise InputError(
                f"windows need a side of 1 pixel or more and a stride of 1 up to that side, not "
                f"{patch} and {stride}"
            )
        if min(height, width) < patch:
            raise InputError(
                f"a window of {patch} x {patch} pixels does not fit an image of {height} x {width}"
            )
        sides = []
        for side in (height, width):
            starts = list(range(0, side - patch + 1, stride))
            if starts[-1] != side - patch:
                if not flush:
                    raise InputError(
                        f"a stride of {stride} does not divide the way of a window of {patch} "
                        f"pixels along {side}: the last {side - patch - starts[-1]} pixels would "
                        "stay uncovered; choose another stride, or allow a last window flush with "
                        "the end"
                    )
                starts.append(side - patch)
            sides.append(tuple(starts))
        return cls(height, width, patch, *sides)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def origins(self) -> tuple[Tensor, Tensor]:
        """First row and first column of each window, ``[windows]`` each, row by row."""
        rows, columns = torch.tensor(self.rows), torch.tensor(self.columns)
        return rows.repeat_interleave(len(columns)), columns.repeat(len(rows))

    def cut(self, series: Tensor, first: int, last: int) -> Tensor:
        """Windows ``first`` to ``last - 1`` of ``[frames, height, width]``.

        Returns:
            ``[last - first, frames, patch, patch]``.
        """
        rows, columns = (at[first:last].to(series.device) for at in self.origins())
        inside = torch.arange(self.patch, device=series.device)
        cut = series[:, (rows[:, None] + inside)[:, :, None], (columns[:, None] + inside)[:, None]]
        return cut.transpose(0, 1)

    def kept(self, trim: int = 0) -> tuple[Tensor, Tensor]:
        """Which rows and columns of each window count, bool ``[starts, patch]`` each.

        Windows lose ``trim`` pixels at every side but those on the edge of the image, so that no
        pixel of the image stays without an answer.

        Raises:
            InputError: if the trimmed windows leave gaps.
        """
        if trim < 0 or 2 * trim >= self.patch:
            raise InputError(
                f"a window of {self.patch} pixels cannot lose {trim} pixels at each side"
            )
        sides = []
        for starts, side in ((self.rows, self.height), (self.columns, self.width)):
            at = torch.arange(self.patch)
            begin = torch.tensor([trim if start > 0 else 0 for start in starts])
            end = torch.tensor(
                [self.patch - (trim if start + self.patch < side else 0) for start in starts]
            )
            here = (at >= begin[:, None]) & (at < end[:, None])
            steps = np.diff(starts)
            if len(steps) and int(steps.max()) > self.patch - 2 * trim:
                raise InputError(
                    f"windows of {self.patch} pixels without {trim} at each side leave gaps at a "
                    f"stride of {int(steps.max())}; choose a stride of at most "
                    f"{self.patch - 2 * trim}"
                )
            sides.append(here)
        return sides[0], sides[1]

    def coverage(self, trim: int = 0) -> Tensor:
        """How many windows answer each pixel, int64 ``[height, width]``."""
        counts = []
        for here, starts, side in zip(
            self.kept(trim),
            (self.rows, self.columns),
            (self.height, self.width),
            strict=True,
        ):
            places = torch.tensor(starts)[:, None] + torch.arange(self.patch)
            count = torch.zeros(side, dtype=torch.int64)
            counts.append(count.index_add_(0, places[here], torch.ones_like(places[here])))
        return counts[0][:, None] * counts[1]


@dataclass(frozen=True)
class PatchStatistics:
    """What the windows say of each pixel, float64 on the CPU.

    Attributes:
        mean: ``[height, width]``.
        deviation: sample standard deviation (divided by n - 1), ``[height, width]``; 0 where one
            window answers.
        coverage: answers n, ``[height, width]``.
    """

    mean: Tensor
    deviation: Tensor
    coverage: Tensor


def combine_patches(
    patches: Iterable[Tensor], grid: WindowGrid, *, trim: int = 0, vote: bool = False
) -> PatchStatistics:
    """Mean and sample standard deviation of each pixel over the windows that cover it.

    Args:
        patches: answers of the windows in the grid's order, in batches ``[n, patch, patch]``.
        grid: where the windows stand.
        trim: pixels at the border of each window that do not count, see :meth:`WindowGrid.kept`.
        vote: round each answer to 0 or 1 first, so that the mean is a share of votes.

    Raises:
        InputError: if there are fewer or more patches than windows.
    """
    rows_kept, columns_kept = grid.kept(trim)
    rows, columns = grid.origins()
    inside = torch.arange(grid.patch)
    size = grid.height * grid.width
    # The first window that answers a pixel is the first in both directions.
    first_row, first_column = (
        _first_cover(here, starts, side)
        for here, starts, side in (
            (rows_kept, grid.rows, grid.height),
            (columns_kept, grid.columns, grid.width),
        )
    )
    owner = (first_row[:, None] * len(grid.columns) + first_column).reshape(-1)
    moments: tuple[Tensor, Tensor, Tensor] | None = None
    seen = 0
    for batch in patches:
        values = (batch.round() if vote else batch).double()
        device = values.device
        if moments is None:
            owner, inside = owner.to(device), inside.to(device)
            rows, columns = rows.to(device), columns.to(device)
            rows_kept, columns_kept = rows_kept.to(device), columns_kept.to(device)
            pivot, total, squares = torch.zeros(3, size, dtype=torch.float64, device=device)
            moments = (pivot, total, squares)
        pivot, total, squares = moments
        last = seen + len(values)
        if last > len(grid) or values.shape[1:] != (grid.patch, grid.patch):
            raise InputError(
                f"{last} patches of {list(values.shape[1:])} do not go with {len(grid)} windows "
                f"of {grid.patch} x {grid.patch}"
            )
        number = torch.arange(seen, last, device=device)
        down = rows[number][:, None] + inside
        across = columns[number][:, None] + inside
        places = (down[:, :, None] * grid.width + across[:, None]).reshape(-1)
        counts = (
            rows_kept[number // len(grid.columns)][:, :, None]
            & columns_kept[number % len(grid.columns)][:, None]
        ).reshape(-1)
        flat = values.reshape(-1)
        its = number.repeat_interleave(grid.patch**2)
        begins = counts & (owner[places] == its)
        pivot[places[begins]] = flat[begins]
        away = torch.where(counts, flat - pivot[places], 0.0)
        total.index_add_(0, places, away)
        squares.index_add_(0, places, away.square())
        seen = last
    if moments is None or seen != len(grid):
        raise InputError(f"{seen} patches do not go with {len(grid)} windows")
    pivot, total, squares = moments
    coverage = grid.coverage(trim).to(pivot.device).reshape(-1)
    mean = pivot + total / coverage
    spread = (squares - total.square() / coverage).clamp(min=0.0)
    deviation = torch.sqrt(spread / (coverage - 1).clamp(min=1))
    shape = (grid.height, grid.width)
    return PatchStatistics(
        mean.view(shape).cpu(), deviation.view(shape).cpu(), coverage.view(shape).cpu()
    )


def _first_cover(kept: Tensor, starts: tuple[int, ...], side: int) -> Tensor:
    """The first of the windows along one side that answers each pixel, ``[side]``."""
    places = torch.tensor(starts)[:, None] + torch.arange(kept.shape[1])
    number = torch.arange(len(starts))[:, None].expand_as(places)
    first = torch.full((side,), len(starts))
    return first.scatter_reduce_(0, places[kept], number[kept], "amin")


def patch_probabilities(
    network: nn.Module, series: Tensor, grid: WindowGrid, *, batch_size: int = 256
) -> Iterator[Tensor]:
    """The probability of the foreground in every window, in evaluation mode.

    Args:
        network: ``[batch, frames, patch, patch]`` to logits ``[batch, 2, patch, patch]`` (their
            softmax is taken, class 1 is the foreground) or ``[batch, 1, ...]`` (sigmoid).
        series: ``[frames, height, width]``, prepared as the network's training data were.
        grid: where the windows stand.
        batch_size: windows at a time; no effect on the result.

    Yields:
        ``[batch, patch, patch]``.

    Raises:
        InputError: if the network does not take the series, or answers other shapes or NaN.
    """
    if batch_size < 1:
        raise InputError(f"a batch has 1 window or more, not {batch_size}")
    series = series.to(device_of(network))
    for first in range(0, len(grid), batch_size):
        patches = grid.cut(series, first, min(first + batch_size, len(grid)))
        with evaluating(network):
            try:
                logits = logits_of(network(patches))
            except (RuntimeError, ValueError, AssertionError) as error:
                raise InputError(
                    f"the network does not take windows of {len(series)} frames and {grid.patch} "
                    f"x {grid.patch} pixels: {first_line(error)}"
                ) from error
            if (
                logits.ndim != 4
                or logits.shape[1] not in (1, 2)
                or (logits.shape[0], *logits.shape[2:]) != (len(patches), *patches.shape[2:])
            ):
                raise InputError(
                    f"the network answers {list(logits.shape)} to {len(patches)} windows; logits "
                    f"[{len(patches)}, 2 or 1, {grid.patch}, {grid.patch}] are needed"
                )
            two = logits.shape[1] == 2
            answer = logits.float().softmax(1)[:, 1] if two else logits.float().sigmoid()[:, 0]
            if not bool(answer.isfinite().all()):
                raise InputError("the network answers NaN or infinity")
        yield answer


def sliding_probability(
    network: nn.Module,
    series: Tensor,
    patch: int,
    stride: int,
    *,
    trim: int = 0,
    vote: bool = False,
    flush: bool = True,
    batch_size: int = 256,
) -> PatchStatistics:
    """Slides a window over a series and combines what the network says of each pixel.

    Args:
        network: see :func:`patch_probabilities`.
        series: ``[frames, height, width]``.
        patch: side of the window, pixels.
        stride: pixels between windows.
        trim: see :func:`combine_patches`.
        vote: see :func:`combine_patches`.
        flush: see :meth:`WindowGrid.over`.
        batch_size: windows at a time.

    Raises:
        InputError: if series, network, window and stride do not go together.
    """
    if series.ndim != 3:
        raise InputError(f"a series is [frames, height, width], not of shape {list(series.shape)}")
    grid = WindowGrid.over(
        series.shape[1], series.shape[2], patch=patch, stride=stride, flush=flush
    )
    answers = patch_probabilities(network, series, grid, batch_size=batch_size)
    return combine_patches(answers, grid, trim=trim, vote=vote)


def without_specks(mask: np.ndarray, min_area: float = 0.015) -> np.ndarray:
    """Drops connected parts (8 neighbours) whose area, holes filled, is too small.

    Args:
        mask: bool ``[height, width]``.
        min_area: the least area that stays, as a share of the image.

    Raises:
        InputError: if the share is not in 0..1.
    """
    if not 0.0 <= min_area <= 1.0:
        raise InputError(f"the least area is a share of the image in 0..1, not {min_area:g}")
    labels, _ = _labelled(mask, _EIGHT)
    kept = np.zeros(mask.shape, dtype=bool)
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        part = labels[place] == number
        filled = np.asarray(ndimage.binary_fill_holes(part))
        if filled.sum() >= min_area * mask.size:
            kept[place] |= part
    return kept


def _labelled(mask: np.ndarray, structure: np.ndarray | None) -> tuple[np.ndarray, int]:
    labels = np.zeros(mask.shape, dtype=np.int32)
    return labels, int(ndimage.label(mask, structure, output=labels))  # type: ignore[arg-type]


def parts_and_holes(mask: np.ndarray) -> tuple[int, int]:
    """Connected parts (8 neighbours) and holes (4 neighbours) of a mask ``[height, width]``."""
    _, parts = _labelled(mask, _EIGHT)
    # The frame makes one region of all background that reaches the edge.
    _, regions = _labelled(np.pad(~mask.astype(bool), 1, constant_values=True), None)
    return parts, regions - 1


def is_closed_ring(mask: np.ndarray) -> bool:
    """Whether a mask is one part with exactly one hole, as a myocardium in short axis is."""
    return parts_and_holes(mask) == (1, 1)
