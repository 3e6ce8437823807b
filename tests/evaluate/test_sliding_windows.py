"""Windows: counts, coverage, moments against lists of answers, clean-up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.evaluate.sliding_windows import (
    PatchStatistics,
    WindowGrid,
    combine_patches,
    is_closed_ring,
    parts_and_holes,
    patch_probabilities,
    sliding_probability,
    without_specks,
)


def by_lists(patches: Tensor, grid: WindowGrid, trim: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample deviation from a list of answers for each pixel."""
    answers: list[list[list[float]]] = [[[] for _ in range(grid.width)] for _ in range(grid.height)]
    places = itertools.product(grid.rows, grid.columns)
    for patch, (top, left) in zip(patches.tolist(), places, strict=True):
        for i, j in itertools.product(range(grid.patch), repeat=2):
            inner = all(
                (at >= trim or start == 0)
                and (at < grid.patch - trim or start + grid.patch == side)
                for at, start, side in ((i, top, grid.height), (j, left, grid.width))
            )
            if inner:
                answers[top + i][left + j].append(patch[i][j])
    mean = np.array([[np.mean(own) for own in row] for row in answers])
    spread = [[np.std(own, ddof=1) if len(own) > 1 else 0.0 for own in row] for row in answers]
    return mean, np.array(spread)


def test_counts_and_coverage_of_the_papers_windows() -> None:
    coarse = WindowGrid.over(128, 128, patch=64, stride=16)
    assert len(coarse) == 25
    covered = coarse.coverage()
    assert (int(covered.min()), int(covered.max())) == (1, 16)
    assert int((covered == 1).sum()) == 1024
    assert int(covered.sum()) == 25 * 64**2
    fine = WindowGrid.over(128, 128, patch=64, stride=2)
    assert len(fine) == 1089
    covered = fine.coverage()
    assert (int(covered.min()), int(covered.max())) == (1, 1024)
    once = covered == 1
    assert int(once.sum()) == 16
    assert all(bool(once[rows, columns].all()) for rows in (slice(2), slice(-2, None))
               for columns in (slice(2), slice(-2, None)))  # fmt: skip
    assert int(covered.sum()) == 1089 * 64**2


def test_coverage_of_a_small_grid() -> None:
    along = torch.tensor([1, 1, 2, 2, 2, 2, 1, 1])
    assert WindowGrid.over(8, 8, patch=4, stride=2).coverage().equal(along[:, None] * along)


def test_deviation_divides_by_one_less_than_the_answers() -> None:
    one = WindowGrid(1, 1, 1, (0,), (0, 0, 0))  # the same pixel three times
    found = combine_patches([torch.tensor([0.2, 0.4, 0.9]).view(3, 1, 1).double()], one)
    assert float(found.deviation) == pytest.approx(0.360555, abs=1e-6)
    assert float(found.mean) == pytest.approx(0.5)
    assert int(found.coverage) == 3


def example() -> PatchStatistics:
    patches = torch.tensor(
        [[[0.9, 0.6], [0.2, 0.8]], [[0.4, 0.1], [0.6, 0.3]],
         [[0.4, 0.7], [0.0, 0.2]], [[0.9, 0.5], [0.1, 0.1]]], dtype=torch.float64,
    )  # fmt: skip
    return combine_patches([patches], WindowGrid.over(3, 3, patch=2, stride=1))


def test_a_worked_example() -> None:
    found = example()
    mean = [[0.9, 0.5, 0.1], [0.3, 0.75, 0.4], [0.0, 0.15, 0.1]]
    u = [[0.0, 0.141421, 0.0], [0.141421, 0.129099, 0.141421], [0.0, 0.070711, 0.0]]
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.deviation, u, atol=1e-6)
    assert float(found.deviation.square().sum()) == pytest.approx(0.081667, abs=1e-6)


@given(
    st.integers(2, 6), st.integers(0, 5), st.integers(0, 5), st.integers(1, 6), st.integers(0, 2),
    st.integers(1, 40), st.integers(0, 1000),
)  # fmt: skip
def test_streaming_agrees_with_lists(
    patch: int, more: int, wider: int, stride: int, trim: int, batch: int, seed: int
) -> None:
    trim = min(trim, (patch - 1) // 2)
    stride = min(stride, patch - 2 * trim)
    grid = WindowGrid.over(patch + more, patch + wider, patch=patch, stride=stride)
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(len(grid), patch, patch, generator=generator)
    # Answers that hardly differ: where E[p^2] - E[p]^2 in float32 has no digit left.
    patches[:, 0] = 0.9 + 1e-6 * patches[:, 0]
    found = combine_patches(patches.split(batch), grid, trim=trim)
    mean, deviation = by_lists(patches, grid, trim)
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.deviation, deviation, atol=1e-9)
    count = found.coverage.double()
    assert bool((found.deviation <= 0.5 * (count / (count - 1).clamp(min=1)).sqrt() + 1e-9).all())
    assert found.coverage.equal(grid.coverage(trim))
    votes = combine_patches(patches.split(batch), grid, trim=trim, vote=True).mean
    np.testing.assert_allclose(votes, by_lists(patches.round(), grid, trim)[0], atol=1e-12)


def test_a_deviation_of_zero_is_exactly_zero() -> None:
    grid = WindowGrid.over(24, 24, patch=12, stride=1)
    same = torch.full((len(grid), 12, 12), 0.1234567)
    assert not combine_patches(same.split(7), grid).deviation.any()


class Contrary(nn.Module):
    """Answers that depend on everything in the window, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.mix(x)).relu()) + x.mean((1, 2, 3), keepdim=True)


def test_batch_size_and_training_mode_have_no_effect() -> None:
    torch.manual_seed(0)
    network, series = Contrary(), torch.randn(3, 20, 24)
    network.train()
    one = sliding_probability(network, series, 8, 4, batch_size=1)
    many = sliding_probability(network, series, 8, 4, batch_size=100)
    np.testing.assert_allclose(one.mean, many.mean, atol=1e-6)
    np.testing.assert_allclose(one.deviation, many.deviation, atol=1e-6)
    assert network.training and network.norm.num_batches_tracked == 0
    assert float(one.deviation.max()) > 1e-3


def test_a_network_of_single_pixels_never_contradicts_itself() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    found = sliding_probability(network, torch.randn(3, 16, 16), 8, 2)
    assert float(found.deviation.max()) < 1e-6
    constant = nn.Conv2d(3, 1, 1)
    nn.init.zeros_(constant.weight)
    answer = sliding_probability(constant, torch.randn(3, 16, 16), 8, 2)
    assert not answer.deviation.any()
    assert float(answer.mean.std()) == 0.0


def test_windows_are_cut_where_the_grid_says() -> None:
    series = torch.arange(2 * 5 * 7).view(2, 5, 7)
    grid = WindowGrid.over(5, 7, patch=3, stride=2)
    cut = grid.cut(series, 1, 4)
    at = list(zip(*(origins.tolist() for origins in grid.origins()), strict=True))[1:4]
    for patch, (top, left) in zip(cut, at, strict=True):
        assert patch.equal(series[:, top : top + 3, left : left + 3])


def test_strides_that_do_not_divide() -> None:
    grid = WindowGrid.over(11, 8, patch=4, stride=3)
    assert grid.rows == (0, 3, 6, 7)
    assert grid.columns == (0, 3, 4)
    assert int(grid.coverage().min()) == 1
    with pytest.raises(InputError, match="stride of 3 does not divide"):
        WindowGrid.over(11, 8, patch=4, stride=3, flush=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patch": 4, "stride": 5}, "stride of 1 up to that side"),
        ({"patch": 4, "stride": 0}, "stride of 1 up to that side"),
        ({"patch": 9, "stride": 1}, "does not fit"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        WindowGrid.over(8, 8, **options)


def test_what_does_not_go_together() -> None:
    grid = WindowGrid.over(8, 8, patch=4, stride=2)
    with pytest.raises(InputError, match="leave gaps"):
        WindowGrid.over(8, 8, patch=4, stride=4).coverage(trim=1)
    with pytest.raises(InputError, match="cannot lose 2 pixels"):
        grid.coverage(trim=2)
    for number in (8, 10):
        with pytest.raises(InputError, match=f"{number} patches"):
            combine_patches([torch.zeros(number, 4, 4)], grid)
    with pytest.raises(InputError, match="does not take windows of 5 frames"):
        list(patch_probabilities(nn.Conv2d(3, 2, 1), torch.zeros(5, 8, 8), grid))
    with pytest.raises(InputError, match="logits"):
        list(patch_probabilities(nn.Conv2d(3, 2, 3), torch.zeros(3, 8, 8), grid))
    with pytest.raises(InputError, match="logits"):
        list(patch_probabilities(nn.Conv2d(3, 5, 1), torch.zeros(3, 8, 8), grid))
    with pytest.raises(InputError, match="NaN"):
        list(patch_probabilities(nn.Conv2d(3, 2, 1), torch.full((3, 8, 8), torch.nan), grid))
    with pytest.raises(InputError, match=r"\[frames, height, width\]"):
        sliding_probability(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 8, 8), 4, 2)


RING = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=bool)


def test_small_parts_are_dropped_with_their_holes_counted() -> None:
    # The ring has 8 pixels and encloses 9 of 20; the speck has 1.
    kept = without_specks(RING, 9 / 20)
    assert kept.sum() == 8 and not kept[3, 4]
    assert not without_specks(RING, 9.5 / 20).any()
    assert np.array_equal(without_specks(RING, 0.0), RING)
    with pytest.raises(InputError, match="share of the image"):
        without_specks(RING, 1.5)


def test_rings_are_told_from_other_shapes() -> None:
    assert parts_and_holes(RING) == (2, 1)
    assert not is_closed_ring(RING)
    assert is_closed_ring(RING[:3, :3])  # also where it touches the edge
    broken = RING[:3, :3].copy()
    broken[0, 1] = False
    assert not is_closed_ring(broken)
    assert not is_closed_ring(np.ones((3, 3), dtype=bool))
    assert not is_closed_ring(np.zeros((3, 3), dtype=bool))
    two = np.pad(np.hstack([RING[:3, :3], RING[:3, 1:3]]), 1)
    assert parts_and_holes(two) == (1, 2)
