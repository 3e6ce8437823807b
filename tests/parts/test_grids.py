import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import InputError
from gossamer.parts.grids import (
    FrozenUnits,
    SortedAssignment,
    bucketed,
    compression_factor,
    fake_quantize,
    nearest_levels,
    quantile_points,
    quantize_tensor,
    redistribute,
    unbucketed,
    uniform_points,
)

V = torch.tensor([-1.0, -0.4, 0.1, 0.7, 2.0])

finite = st.floats(-1e3, 1e3, width=32)
vectors = st.lists(finite, min_size=1, max_size=70).map(lambda v: torch.tensor(v))
buckets = st.sampled_from([None, 1, 2, 3, 7, 64, 256])


@pytest.mark.parametrize(
    ("bits", "bucket", "expected"),
    [
        (2, None, [-1, 0, 0, 1, 2]),
        (2, 3, [-1, -0.266667, 0.1, 0.7, 2]),
        (1, None, [-1, -1, -1, 2, 2]),
    ],
)
def test_worked_uniform_examples(bits, bucket, expected):
    decoded = quantize_tensor(V, bits=bits, bucket=bucket).dequantize()
    torch.testing.assert_close(decoded, torch.tensor(expected).float(), atol=1e-6, rtol=0)


def test_second_bucket_is_padded_with_the_last_value():
    assert bucketed(V, 3).tolist() == [V[:3].tolist(), [*V[3:].tolist(), 2.0]]
    assert torch.equal(unbucketed(bucketed(V, 3), (5,)), V)
    assert bucketed(V, 256).shape == (1, 5)


@settings(deadline=None)
@given(vectors, st.integers(1, 8), buckets)
def test_quantizing_twice_changes_nothing_and_extremes_stay(v, bits, bucket):
    once = quantize_tensor(v, bits=bits, bucket=bucket).dequantize()
    twice = quantize_tensor(once, bits=bits, bucket=bucket).dequantize()
    assert torch.equal(once, twice)
    before, after = bucketed(v, bucket), bucketed(once, bucket)
    wide = before.amax(1) - before.amin(1) >= 1e-10
    assert torch.equal(before.amin(1), after.amin(1))
    assert torch.equal(before.amax(1)[wide], after.amax(1)[wide])
    assert all(len(row.unique()) <= 2**bits for row in after)


@settings(deadline=None)
@given(vectors, st.integers(1, 8), buckets)
def test_error_is_at_most_half_a_step(v, bits, bucket):
    decoded = quantize_tensor(v, bits=bits, bucket=bucket).dequantize()
    rows, back = bucketed(v, bucket).double(), bucketed(decoded, bucket).double()
    step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
    slack = 1e-5 * rows.abs().amax(1) + 1e-10
    assert bool(((rows - back).abs().amax(1) <= step / 2 + slack).all())


def test_constant_tensor_returns_unchanged():
    v = torch.full((3, 4), 0.3)
    for scheme in ("linear", "absmax"):
        assert torch.equal(quantize_tensor(v, bits=2, scheme=scheme).dequantize(), v)
    assert torch.equal(
        quantize_tensor(torch.zeros(5), scheme="absnorm").dequantize(), torch.zeros(5)
    )


def test_stochastic_rounding_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    draws = 100_000
    many = V.repeat(draws)  # buckets of five: each is one draw of the same vector
    decoded = quantize_tensor(
        many, bits=2, bucket=5, stochastic=True, generator=generator
    ).dequantize()
    decoded = decoded.view(draws, 5).double()
    error = decoded.std(0) / math.sqrt(draws)
    assert bool(((decoded.mean(0) - V.double()).abs() <= 3 * error + 1e-6).all())
    assert decoded[:, 1].unique().numel() == 2  # it does draw


def test_symmetric_schemes_by_hand():
    v = torch.tensor([-2.0, -0.9, 0.0, 0.3, 1.4])
    # 2^(3-1) = 4 magnitudes 0, 2/3, 4/3, 2
    expected = torch.tensor([-2.0, -2 / 3, 0.0, 0.0, 4 / 3])
    q = quantize_tensor(v, bits=3, scheme="absmax", bucket=None)
    torch.testing.assert_close(q.dequantize(), expected)
    assert torch.equal(quantize_tensor(-v, bits=3, scheme="absmax").dequantize(), -q.dequantize())
    assert q.levels == 7 and q.size_bits() == 5 * 3 + 32
    v = torch.tensor([3.0, -4.0])  # norm 5: shares .6 and -.8 of 3 steps: 2 and -2
    torch.testing.assert_close(
        quantize_tensor(v, bits=3, scheme="absnorm").dequantize(),
        torch.tensor([10 / 3, -10 / 3]),
    )


def test_mean_subtraction_and_clipping():
    v = torch.tensor([9.0, 10.0, 11.0])
    plain = quantize_tensor(v, bits=2, scheme="absmax")
    centred = quantize_tensor(v, bits=2, scheme="absmax", subtract_mean=True)
    assert torch.equal(centred.dequantize(), v)
    assert not torch.equal(plain.dequantize(), v)
    assert centred.size_bits() == plain.size_bits() + 32
    clipped = quantize_tensor(torch.tensor([-5.0, 0.0, 5.0]), bits=2, clip=1.5).dequantize()
    assert (clipped.min(), clipped.max()) == (-1.5, 1.5)


@pytest.mark.parametrize(("bits", "factor"), [(2, 14.22), (4, 7.53), (8, 3.88)])
def test_compression_factor(bits, factor):
    assert compression_factor(bits, 256) == pytest.approx(factor, abs=0.005)
    n = 256 * 40
    stored = quantize_tensor(torch.randn(n, generator=torch.Generator().manual_seed(0)), bits=bits)
    assert 4 * n / stored.nbytes() == pytest.approx(compression_factor(bits, 256))


def test_size_counts_codes_scales_and_table():
    v = torch.arange(10.0)
    assert quantize_tensor(v, bits=3, bucket=4).size_bits() == 30 + 2 * 32 * 3
    units = FrozenUnits.of(v, bucket=4)
    points = uniform_points(5)
    q = units.quantized(points, nearest_levels(units.unit, points))
    assert q.bits == 3
    assert q.size_bits() == 30 + 2 * 32 * 3 + 32 * 5


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([1.0, math.nan], {}, "NaN"),
        ([math.inf, 1.0], {}, "infinite"),
        ([1.0], {"bits": 17}, "1 to 16 bits"),
        ([1.0], {"bits": 1, "scheme": "absmax"}, "2 to 16 bits"),
        ([], {}, "empty"),
        ([1.0], {"bucket": 0}, "at least one"),
        ([1.0], {"bits": 2, "levels": 5}, "levels"),
    ],
)
def test_bad_input_is_one_sentence(values, options, words):
    with pytest.raises(InputError, match=words):
        quantize_tensor(torch.tensor(values), **options)


# Gradients


def test_straight_gradient_is_the_identity():
    w = V.clone().requires_grad_()
    g = torch.arange(1.0, 6.0)
    value = fake_quantize(w, bits=2, bucket=3)
    assert torch.equal(value.detach(), quantize_tensor(V, bits=2, bucket=3).dequantize())
    value.backward(g)
    assert torch.equal(w.grad, g)


def test_truncated_gradient_clamps_and_masks():
    w = V.clone().requires_grad_()
    value = fake_quantize(w, bits=2, bucket=None, gradient="truncated")
    assert value.max() == 1.0
    value.backward(torch.ones(5))
    assert w.grad.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("bucket", [None, 3, 4])
def test_complicated_gradient_equals_finite_differences(bucket):
    # With the level positions q held (rounding as the identity leaves the term dQ = dw), the
    # derivative of alpha * (q + (v - v0)) + beta is what the formula gives.
    generator = torch.Generator().manual_seed(1)
    w0 = torch.randn(11, generator=generator, dtype=torch.float64)
    g = torch.randn(11, generator=generator, dtype=torch.float64)

    rows0 = bucketed(w0, bucket)
    low0, alpha0 = rows0.amin(1, True), rows0.amax(1, True) - rows0.amin(1, True)
    v0 = (rows0 - low0) / alpha0
    q0 = torch.round(3 * v0) / 3

    def surrogate(w):
        rows = bucketed(w, bucket)
        low, alpha = rows.amin(1, True), rows.amax(1, True) - rows.amin(1, True)
        v = (rows - low) / alpha
        return (unbucketed(alpha * (q0 + v - v0) + low, (11,)) * g).sum()

    eps = 1e-6
    eye = torch.eye(11, dtype=torch.float64) * eps
    numeric = torch.stack([(surrogate(w0 + e) - surrogate(w0 - e)) / (2 * eps) for e in eye])
    w = w0.clone().requires_grad_()
    fake_quantize(w, bits=2, bucket=bucket, gradient="complicated").backward(g)
    torch.testing.assert_close(w.grad, numeric, atol=1e-5, rtol=1e-5)


def test_complicated_gradient_by_hand():
    w = V.clone().requires_grad_()
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    fake_quantize(w, bits=2, bucket=None, gradient="complicated").backward(g)
    # vhat = 0, .2, .36667, .56667, 1; q = 0, 1/3, 1/3, 2/3, 1
    slope = 2 * (1 / 3 - 0.2) + 3 * (1 / 3 - 1.1 / 3) + 4 * (2 / 3 - 1.7 / 3)
    torch.testing.assert_close(w.grad, g + torch.tensor([-slope, 0, 0, 0, slope]))


# Learned levels


def test_worked_learned_levels():
    units = FrozenUnits.of(V, bucket=None)
    points = torch.tensor([0.0, 0.25, 0.6, 1.0], requires_grad=True)
    codes = nearest_levels(units.unit, points.detach())
    assert codes.tolist() == [0, 1, 1, 2, 3]
    decoded = units.decode(points, codes)
    torch.testing.assert_close(decoded.detach(), torch.tensor([-1, -0.25, -0.25, 0.8, 2]))
    decoded.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    torch.testing.assert_close(points.grad, torch.tensor([3.0, 15.0, 12.0, 15.0]))


def test_learned_gradient_equals_autograd_and_finite_differences():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(50, generator=generator)
    g = torch.randn(50, generator=generator)
    units = FrozenUnits.of(v, bucket=16)
    points = quantile_points(units.unit, 4)
    codes = nearest_levels(units.unit, points)

    ours = points.clone().requires_grad_()
    units.decode(ours, codes).backward(g)
    plain = points.clone().requires_grad_()
    (units.alpha * plain[codes] + units.beta).backward(g)
    torch.testing.assert_close(ours.grad, plain.grad)

    def loss(p):  # assigns anew, as training does
        return float((units.decode(p, nearest_levels(units.unit, p)).double() * g).sum())

    eps = 1e-4
    for k in range(4):
        step = torch.zeros(4)
        step[k] = eps
        assert torch.equal(nearest_levels(units.unit, points + step), codes)
        numeric = (loss(points + step) - loss(points - step)) / (2 * eps)
        assert numeric == pytest.approx(float(ours.grad[k]), abs=2e-2, rel=1e-2)


def test_exactly_midway_goes_up():
    assert nearest_levels(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).tolist() == [1]


def test_quantile_points():
    torch.testing.assert_close(
        quantile_points(torch.arange(10.0), 4) / 9, torch.tensor([0, 1 / 3, 2 / 3, 1])
    )
    v = torch.randn(101, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(
        quantile_points(v, 7), np.percentile(v.numpy(), np.linspace(0, 100, 7)), rtol=1e-5
    )


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=6),
)
def test_incremental_assignment_equals_the_plain_one(values, moves):
    unit = torch.tensor(values)
    tables = [torch.tensor(sorted(move)) for move in moves]
    assignment = SortedAssignment(unit, tables[0])
    assert torch.equal(assignment.codes, nearest_levels(unit, tables[0]))
    for table in tables[1:]:
        assert torch.equal(assignment.update(table), nearest_levels(unit, table))


@pytest.mark.parametrize(
    ("norms", "levels", "expected"),
    [([1, 3, 6], 16, [11, 15, 22]), ([1, 1, 1], 4, [4, 4, 4]), ([1, 2, 4], 4, [3, 4, 5])],
)
def test_worked_redistribution(norms, levels, expected):
    assert redistribute(norms, levels) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.sampled_from([2, 3, 4, 16, 256]))
def test_redistribution_keeps_the_sum(norms, levels):
    result = redistribute(norms, levels)
    assert sum(result) == levels * len(norms)
    assert min(result) >= 2
