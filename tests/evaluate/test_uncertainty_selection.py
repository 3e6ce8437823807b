"""Selecting the least uncertain network: worked numbers, invariants, baselines."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.segmentation import IGNORED
from gossamer.datasets.perfusion import drawn_phantoms, series_task
from gossamer.evaluate.sliding_windows import WindowGrid, combine_patches, sliding_probability
from gossamer.evaluate.uncertainty_selection import (
    SELECTORS,
    Labelled,
    Scan,
    calibrate,
    compare_selectors,
    dice,
    least_uncertain,
    mean_entropy,
    pool_network,
    soft_dice_loss,
    spearman,
    train_pool,
)

SCAN = Scan(patch=8, stride=4, fine_stride=2, min_area=0.0)


class Wavering(nn.Module):
    """Finds bright pixels, but what it says of one moves with the mean of the window."""

    def __init__(self, wavering: float, bias: float = 0.0) -> None:
        super().__init__()
        self.wavering = nn.Parameter(torch.tensor(wavering))
        self.bias = bias
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        said = 4.0 * (x[:, :1] - 0.5) + self.bias
        return self.drop(said) + self.wavering * x.mean((1, 2, 3), keepdim=True)


def bright_square(seed: int) -> tuple[Tensor, np.ndarray]:
    truth = np.zeros((16, 16), dtype=bool)
    truth[4:11, 5:12] = True
    noise = 0.1 * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(truth).float() + noise, truth


SERIES: Labelled = [bright_square(seed) for seed in range(3)]
POOL = [Wavering(3.0), Wavering(0.3), Wavering(0.5, bias=-1.0), Wavering(1.0)]


def test_the_index_of_a_worked_map() -> None:
    u = np.zeros((4, 4))
    u[0, 0], u[2, 1] = 0.3, 0.4
    mask = np.zeros((4, 4), dtype=bool)
    mask.flat[:5] = True
    assert Scan().index(u, mask) == pytest.approx(0.05)
    assert Scan(power=1.0).index(u, mask) == pytest.approx(0.7 / 5)
    assert Scan(per="image").index(u, mask) == pytest.approx(0.25 / 16)
    assert Scan().index(u, np.zeros((4, 4), dtype=bool)) == np.inf


def test_the_index_of_worked_patches() -> None:
    patches = torch.tensor(
        [[[0.9, 0.6], [0.2, 0.8]], [[0.4, 0.1], [0.6, 0.3]],
         [[0.4, 0.7], [0.0, 0.2]], [[0.9, 0.5], [0.1, 0.1]]], dtype=torch.float64,
    )  # fmt: skip
    found = combine_patches([patches], WindowGrid.over(3, 3, patch=2, stride=1))
    scan = Scan(min_area=0.0)
    mask = scan.mask_of(found.mean.numpy())
    assert mask.sum() == 2
    assert scan.index(found.deviation.numpy(), mask) == pytest.approx(0.040833, abs=1e-6)


def test_the_least_uncertain_network_is_chosen_by_its_own_windows() -> None:
    series = SERIES[0][0]
    found = least_uncertain(POOL, series, SCAN)
    by_hand = []
    for network in POOL:
        u = sliding_probability(network, series, 8, 2).deviation
        mask = sliding_probability(network, series, 8, 4).mean > 0.5
        by_hand.append(float(u.square().sum() / mask.sum()))
    np.testing.assert_allclose(found.upp, by_hand, rtol=1e-12)
    assert found.index == int(np.argmin(by_hand)) == 1
    assert found.areas[found.index] == found.mask.sum()
    assert np.array_equal(found.u_map, found.views[1].u_map)


def test_pools_of_one_permuted_and_larger() -> None:
    series = SERIES[0][0]
    whole = least_uncertain(POOL, series, SCAN)
    alone = least_uncertain(POOL[:1], series, SCAN)
    assert alone.index == 0
    assert np.array_equal(alone.mask, SCAN.segment(POOL[0], series)[1])
    order = [3, 1, 0, 2]
    moved = least_uncertain([POOL[i] for i in order], series, SCAN)
    assert order[moved.index] == whole.index
    assert np.array_equal(moved.mask, whole.mask)
    for size in range(1, 4):
        less = least_uncertain(POOL[:size], series, SCAN)
        assert less.upp.min() >= least_uncertain(POOL[: size + 1], series, SCAN).upp.min()
    twins = least_uncertain([POOL[0], POOL[1], POOL[1]], series, SCAN)
    assert twins.index == 1  # of equals the first


def test_networks_that_do_not_contradict_themselves_have_an_index_of_zero() -> None:
    sure = nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        sure.weight.copy_(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))
        sure.bias.fill_(-2.0)
    found = least_uncertain([sure], SERIES[0][0], SCAN)
    assert 0 < found.areas[0] < 256
    assert found.upp[0] == pytest.approx(0.0, abs=1e-12)


def test_empty_masks_are_never_selected_and_flagged() -> None:
    nothing = Wavering(0.0, bias=-50.0)
    found = least_uncertain([nothing, POOL[0]], SERIES[0][0], SCAN)
    assert found.upp[0] == np.inf and found.index == 1
    assert found.flagged is None
    none = least_uncertain([nothing, nothing], SERIES[0][0], SCAN, threshold=1.0)
    assert none.index == 0 and none.flagged is True and not none.mask.any()


def test_flags_stand_at_the_percentile_of_validation() -> None:
    found = calibrate(POOL, SERIES, SCAN, percentile=50.0)
    best = sorted(least_uncertain(POOL, series, SCAN).upp.min() for series, _ in SERIES)
    assert found.threshold == best[1]
    flags = [
        least_uncertain(POOL, series, SCAN, threshold=found.threshold).flagged
        for series, _ in SERIES
    ]
    assert sorted(map(bool, flags)) == [False, False, True]
    each = [[dice(v.mask, t) for v in least_uncertain(POOL, s, SCAN).views] for s, t in SERIES]
    np.testing.assert_allclose(found.dice, np.mean(each, 0))
    assert found.established == int(np.mean(each, 0).argmax())


def test_all_selectors_are_compared_on_the_same_masks() -> None:
    found = compare_selectors(POOL, SERIES, SCAN, established=3, samples=3)
    assert set(found.dice) == set(SELECTORS)
    for name, values in found.dice.items():
        if name in found.chosen:
            picked = found.member_dice[np.arange(3), found.chosen[name]]
            np.testing.assert_array_equal(values, picked)
            assert (found.dice["oracle"] >= values).all()
    np.testing.assert_array_equal(found.chosen["established"], [3, 3, 3])
    np.testing.assert_array_equal(found.chosen["least uncertain"], found.upp.argmin(1))
    np.testing.assert_allclose(found.dice["pool mean"], found.member_dice.mean(1))
    series, truth = SERIES[1]
    probabilities = [SCAN.segment(network, series)[0] for network in POOL]
    assert found.dice["ensemble"][1] == dice(np.mean(probabilities, 0) > 0.5, truth)
    votes = np.sum([p > 0.5 for p in probabilities], 0) > 2
    assert found.dice["majority vote"][1] == dice(votes, truth)
    entropies = [mean_entropy(p) for p in probabilities]
    assert found.chosen["entropy"][1] == int(np.argmin(entropies))
    again = compare_selectors(POOL, SERIES, SCAN, established=3, samples=3)
    np.testing.assert_array_equal(found.chosen["mc dropout"], again.chosen["mc dropout"])
    assert found.failed("oracle") <= found.failed("least uncertain")
    assert found.failed("pool mean", below=2.0) == 1.0


def test_dropout_drops_only_where_it_is_asked_for() -> None:
    dull = [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)]
    assert "mc dropout" not in compare_selectors(dull, SERIES, SCAN, established=0).dice
    before = SCAN.segment(POOL[0], SERIES[0][0])[0]
    state = torch.random.get_rng_state()
    compare_selectors(POOL, SERIES[:1], SCAN, established=0, samples=2)
    assert torch.random.get_rng_state().equal(state)
    np.testing.assert_array_equal(before, SCAN.segment(POOL[0], SERIES[0][0])[0])
    # Without anything to drop but certainty, the variance is 0 and ties go to the first.
    sure = [Wavering(0.0) for _ in range(2)]
    for network in sure:
        network.drop.p = 0.0
    found = compare_selectors(sure, SERIES[:1], SCAN, established=0, samples=2)
    assert found.chosen["mc dropout"].tolist() == [0]


def test_statistics_agree_with_scipy() -> None:
    from scipy.stats import spearmanr, wilcoxon

    found = compare_selectors(POOL, SERIES, SCAN, established=0, samples=0)
    ours = found.rank_correlation()
    theirs = spearmanr(found.upp.ravel(), found.member_dice.ravel()).statistic
    assert ours == pytest.approx(theirs)
    one, other = found.dice["least uncertain"], found.dice["established"]
    assert np.any(one != other)
    assert found.p_value("least uncertain", "established") == pytest.approx(
        wilcoxon(one, other).pvalue
    )
    assert found.p_value("oracle", "oracle") == 1.0
    assert spearman(np.array([1.0, np.inf, 2.0]), np.array([3.0, 1.0, 2.0])) == pytest.approx(-1.0)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_dice_of_worked_masks() -> None:
    one = np.array([[1, 1, 0, 0]], dtype=bool)
    assert dice(one, np.array([[0, 1, 1, 1]], dtype=bool)) == pytest.approx(2 / 5)
    assert dice(one & False, one & False) == 1.0
    assert dice(one, one & False) == 0.0
    with pytest.raises(InputError, match="cannot be compared"):
        dice(one, one.T)


def test_a_mask_without_hole_can_be_thresholded_again() -> None:
    probability = np.full((5, 5), 0.1)
    probability[1:4, 1:4] = 0.45
    probability[1, 1:4] = probability[2, 1] = 0.9
    probability[2, 2] = 0.1
    plain = Scan(min_area=0.0)
    assert plain.mask_of(probability).sum() == 4
    opened = Scan(min_area=0.0, reopen=0.4).mask_of(probability)
    assert opened.sum() == 8 and not opened[2, 2]
    probability[1:4, 1:4][np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=bool)] = 0.9
    probability[0, 0] = 0.45
    assert Scan(min_area=0.0, reopen=0.4).mask_of(probability).sum() == 8


def test_what_cannot_be_selected() -> None:
    series = SERIES[0][0]
    with pytest.raises(InputError, match="pool holds no network"):
        least_uncertain([], series, SCAN)
    with pytest.raises(InputError, match="covers the whole series"):
        least_uncertain(POOL, series, Scan(patch=16, stride=4, fine_stride=2))
    with pytest.raises(InputError, match="does not fit"):
        least_uncertain(POOL, series, Scan())
    with pytest.raises(InputError, match="does not divide"):
        least_uncertain(POOL, series, Scan(patch=8, stride=4, fine_stride=3, flush=False))
    with pytest.raises(InputError, match="does not take windows of 7 frames"):
        least_uncertain([nn.Conv2d(2, 2, 1)], torch.zeros(7, 16, 16), SCAN)
    with pytest.raises(InputError, match="no member 9"):
        compare_selectors(POOL, SERIES, SCAN, established=9)
    with pytest.raises(InputError, match="needs networks and labelled series"):
        compare_selectors(POOL, [], SCAN, established=0)
    with pytest.raises(InputError, match="calibration needs"):
        calibrate(POOL, [], SCAN)


def test_soft_dice_is_small_where_the_mask_is_met() -> None:
    masks = torch.tensor([[[0, 1], [1, IGNORED]]])
    right = torch.tensor([[[9.0, -9.0], [-9.0, 0.0]], [[-9.0, 9.0], [9.0, 0.0]]])[None]
    assert float(soft_dice_loss(right, masks)) == pytest.approx(0.0, abs=1e-4)
    # Nothing right: 1 - 1 / (1 found + 2 true + 1).
    assert float(soft_dice_loss(-right, masks)) == pytest.approx(0.75, abs=1e-4)


def test_pools_differ_in_their_seeds_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    series, masks = drawn_phantoms(6, frames=4, size=32, seed=0)
    task = series_task((series, masks), (series[:2], masks[:2]), patch=16)

    def train(seeds: list[int], loss: str = "cross-entropy") -> list[dict[str, Tensor]]:
        pool = train_pool(
            lambda: pool_network(4, width=2, depth=2), task, n=len(seeds), seeds=seeds, epochs=1,
            batch_size=3, loss=loss,  # type: ignore[arg-type]
        )  # fmt: skip
        return [network.state_dict() for network in pool]

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(one[name].equal(other[name]) for name in one)

    first = train([0, 1])
    assert not same(*first)
    assert same(train([1])[0], first[1])
    assert not same(train([1], "dice")[0], first[1])
    for seeds in ([], [2, 2]):
        with pytest.raises(InputError, match="different seeds"):
            train(seeds)


def test_training_lowers_the_loss_and_finds_the_ring() -> None:
    series, masks = drawn_phantoms(24, frames=6, size=32, seed=1)
    task = series_task((series[:20], masks[:20]), (series[20:], masks[20:]), patch=16)
    (network,) = train_pool(
        lambda: pool_network(6, width=8, depth=3), task, n=1, epochs=40, learning_rate=5e-3
    )
    scan = Scan(patch=16, stride=4, fine_stride=4)
    found = [
        dice(scan.segment(network, one)[1], mask.numpy())
        for one, mask in zip(series[20:], masks[20:], strict=True)
    ]
    assert np.mean(found) > 0.75
