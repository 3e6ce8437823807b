"""Rounding with compensation: worked numbers, invariants, and the textbook loop."""

import itertools
import logging

import pytest
import torch

from gossamer.compress.quantize.gptq import (
    Clipping,
    SecondMoment,
    find_scales,
    gptq,
    round_to_nearest,
)
from gossamer.core.errors import InputError
from gossamer.parts.scaled import NumberFormat, WeightFormat

INT4 = NumberFormat("int", 4)
CHANNEL, GROUPS = WeightFormat(INT4), WeightFormat(INT4, 16)


def problem(rows=12, columns=48, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def loss(weight, found, hessian):
    difference = weight - found.double()
    return float(((difference @ hessian) * difference).sum())


def textbook(weight, hessian, scale, number, dampening=0.01):
    """One column after the other, as the algorithm is written down."""
    weight, hessian = weight.clone(), hessian.clone()
    columns = weight.shape[1]
    hessian.diagonal().add_(dampening * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.zeros_like(weight)
    for i in range(columns):
        codes[:, i] = number.codes(weight[:, i], scale[:, i])
        error = (weight[:, i] - codes[:, i] * scale[:, i]) / factor[i, i]
        weight[:, i:] -= error[:, None] * factor[i, i:]
    return codes


def test_three_weights_by_hand():
    weight = torch.tensor([[0.4, 0.45, -0.3]], dtype=torch.float64)
    hessian = torch.tensor([[2, 1.8, 0.2], [1.8, 2, 0.5], [0.2, 0.5, 1]], dtype=torch.float64)
    one = torch.ones(1, 1)
    assert loss(weight, torch.zeros(1, 3), hessian) == pytest.approx(1.28, abs=5e-3)
    made = gptq(weight, hessian, CHANNEL, scale=one, order="none", dampening=0.0)
    assert made.tensor.decode().tolist() == [[0.0, 1.0, 0.0]]
    assert loss(weight, made.tensor.decode(), hessian) == pytest.approx(0.34, abs=5e-3)
    best = min(
        (loss(weight, torch.tensor([codes]), hessian), codes)
        for codes in itertools.product((-1.0, 0.0, 1.0), repeat=3)
    )
    assert best[1] == (1.0, 0.0, 0.0) and best[0] == pytest.approx(0.18, abs=5e-3)


def test_two_hundred_small_problems():
    generator = torch.Generator().manual_seed(0)
    found, nearest = [], []
    for _ in range(200):
        weight = 3 * torch.randn(1, 6, generator=generator, dtype=torch.float64)
        x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
        hessian = x.T @ x
        one = torch.ones(1, 1)
        made = gptq(weight, hessian, CHANNEL, scale=one, order="none", dampening=0.0)
        found.append(loss(weight, made.tensor.decode(), hessian))
        nearest.append(loss(weight, weight.clamp(-8, 7).round(), hessian))
    found, nearest = torch.tensor(found), torch.tensor(nearest)
    assert found.mean() < 0.75 * nearest.mean()
    assert (found <= nearest + 1e-9).double().mean() > 0.8


@pytest.mark.parametrize("format", [CHANNEL, GROUPS], ids=str)
def test_the_identity_leaves_nothing_to_make_good(format):
    # round_to_nearest computes in single precision, where the largest weights are ties
    weight = problem()[0].float()
    nearest = round_to_nearest(weight, format)
    for order in ("none", "static"):
        made = gptq(weight, torch.eye(48), format, order=order)
        assert torch.equal(made.tensor.codes, nearest.codes)
    # an order does nothing if no column can make good for another
    diagonal = torch.diag(torch.linspace(1, 9, 48))
    made = gptq(weight, diagonal, format, order="static")
    assert torch.equal(made.tensor.codes, nearest.codes)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        (CHANNEL, {"order": "none"}),
        (CHANNEL, {"order": "static"}),
        (GROUPS, {"order": "none"}),
        (GROUPS, {"order": "static"}),
        (GROUPS, {"order": "group"}),
        (GROUPS, {"order": "none", "static_groups": False}),
        (WeightFormat(INT4, 16, False), {"order": "static"}),
    ],
    ids=str,
)
def test_blocks_do_not_matter(format, options):
    weight, hessian = problem()
    results = [gptq(weight, hessian, format, block_size=b, **options) for b in (1, 7, 128)]
    for other in results[1:]:
        assert torch.equal(other.tensor.codes, results[0].tensor.codes)
        assert torch.equal(other.tensor.scale, results[0].tensor.scale)
        assert other.loss == pytest.approx(results[0].loss)


def test_it_is_the_textbook_loop():
    weight, hessian = problem(seed=3)
    for format in (CHANNEL, GROUPS):
        scale, _ = find_scales(weight, format, dtype=torch.float32)
        columns = scale[:, format.groups(48)]
        made = gptq(weight, hessian, format, order="none")
        assert torch.equal(
            made.tensor.codes.double(), textbook(weight, hessian, columns, format.number)
        )
    # the order is that of a permuted problem
    order = torch.argsort(hessian.diagonal(), descending=True)
    made = gptq(weight, hessian, GROUPS, order="static")
    scale = find_scales(weight, GROUPS, dtype=torch.float32)[0][:, GROUPS.groups(48)]
    permuted = textbook(weight[:, order], hessian[order][:, order], scale[:, order], GROUPS.number)
    assert torch.equal(made.tensor.codes.double()[:, order], permuted)


def test_the_loss_is_that_of_the_damped_problem():
    weight, hessian = problem()
    made = gptq(weight, hessian, GROUPS)
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    assert 2 * made.loss == pytest.approx(loss(weight, made.tensor.decode(), damped), rel=1e-6)


def test_compensation_and_clipping_pay():
    weight, hessian = problem(rows=64, columns=96, tokens=300)
    nearest = loss(weight, round_to_nearest(weight, GROUPS).decode(), hessian)
    made = {
        order: loss(weight, gptq(weight, hessian, GROUPS, order=order).tensor.decode(), hessian)
        for order in ("none", "static", "group")
    }
    assert max(made.values()) < 0.6 * nearest
    assert made["static"] < made["none"]


def test_groups_of_inputs_are_stored_only_where_they_are_needed():
    weight, hessian = problem()
    stored = gptq(weight, hessian, GROUPS, order="group").tensor
    assert stored.order is not None
    order = torch.argsort(hessian.diagonal(), descending=True)
    assert torch.equal(stored.groups()[order], GROUPS.groups(48))
    assert gptq(weight, hessian, GROUPS, order="static").tensor.order is None
    assert gptq(weight, hessian, CHANNEL, order="group").tensor.order is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_errs_more(symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator) ** 3
    format = WeightFormat(INT4, 32, symmetric)

    def errors(clipping):
        difference = round_to_nearest(weight, format, clipping=clipping).decode() - weight
        return difference.abs().pow(2.4).view(16, 2, 32).sum(2)

    whole, clipped, free = errors(None), errors(Clipping()), errors(Clipping(0.8, patience=80))
    assert (clipped <= whole).all() and (clipped < whole).any()
    assert (free <= clipped).all()


def test_dead_columns_become_zero():
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    made = gptq(weight, hessian, CHANNEL)
    assert not made.tensor.decode()[:, 5].any()
    assert made.dampening == 0.01
    assert loss(weight, made.tensor.decode(), hessian) < loss(
        weight, round_to_nearest(weight, CHANNEL).decode(), hessian
    )


def test_identical_samples(caplog):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x = torch.ones(100, 1) * torch.linspace(0.1, 1, 32)
    moment = SecondMoment(32)
    moment.add(x.view(5, 20, 32))
    assert moment.tokens == 100
    torch.testing.assert_close(moment.total, x.T @ x)
    with caplog.at_level(logging.WARNING):
        made = gptq(weight, moment.total, GROUPS, dampening=0.0)
    assert made.dampening and "singular" in caplog.text
    hopeless = gptq(weight, torch.full((32, 32), float("nan")), GROUPS)
    assert hopeless.loss is None and hopeless.dampening is None
    assert torch.equal(hopeless.tensor.codes, round_to_nearest(weight, GROUPS).codes)


def test_bad_input():
    weight, hessian = problem()
    with pytest.raises(InputError, match="48 x 48"):
        gptq(weight, hessian[:3, :3], CHANNEL)
    with pytest.raises(InputError, match="on the way"):
        gptq(weight, hessian, GROUPS, order="static", static_groups=False)
    with pytest.raises(InputError, match="order"):
        gptq(weight, hessian, GROUPS, order="random")
    with pytest.raises(InputError, match="dampening"):
        gptq(weight, hessian, GROUPS, dampening=-1.0)
    with pytest.raises(InputError, match="share between"):
        Clipping(1.0)
