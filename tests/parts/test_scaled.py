"""Grids, scales, four-bit packing and products with stored weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.core.errors import InputError
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.scaled import (
    FLOAT8,
    ActivationFormat,
    NumberFormat,
    ScaledTensor,
    WeightFormat,
    integer_product,
    pack_nibbles,
    round_float8,
    unpack_nibbles,
)

INT4, INT8, FP8 = NumberFormat("int", 4), NumberFormat("int", 8), NumberFormat("float")


def rounded(weight, format, dtype=torch.float32):
    scale, zero = format.scales(*format.ranges(weight), dtype)
    return ScaledTensor.of(weight, format, scale, zero, dtype=dtype)


def test_packing_by_hand():
    packed = pack_nibbles(torch.tensor([[-8, -1, 0, 7, 1, 2, 3, 4]]))
    assert packed.tolist() == [[-878053264]]
    assert packed.item() & 0xFFFFFFFF == 0xCBA9F870


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_packing_returns_what_was_packed(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, -(-columns // 8)) and packed.dtype == torch.int32
    assert torch.equal(unpack_nibbles(packed, columns).long(), codes)
    # what is missing of the last eight is bits of zero
    missing = -columns % 8
    if missing:
        top = (packed[:, -1].long() & 0xFFFFFFFF) >> (4 * (8 - missing))
        assert not top.any()


def test_four_bits_by_hand():
    # in double precision, where -1 / scale is -7.5 and not a digit less
    weight = torch.tensor([[-1.0, 0.3, 0.7]], dtype=torch.float64)
    scale, zero = WeightFormat(INT4).scales(*WeightFormat(INT4).ranges(weight))
    assert zero is None
    assert scale.item() == pytest.approx(0.133333, abs=1e-6)
    assert INT4.codes(weight, scale).tolist() == [[-8.0, 2.0, 5.0]]  # -7.5 rounds to even
    assert INT4.codes(-weight[0, :1], scale[0]).tolist() == [7.0]  # the largest is clipped


def test_float8_by_hand():
    values = torch.tensor([0.1, 460.0, 17.0, 19.0, 0.001, 0.0009])
    expected = [0.1015625, 448.0, 16.0, 20.0, 0.001953125, 0.0]
    assert FP8.codes(values, 1.0).tolist() == expected


def test_float8_by_arithmetic_is_the_cast():
    # all codes, all midpoints between neighbours, and both sides of each
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    codes = codes[torch.isfinite(codes)].unique()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middles])
    near = torch.cat([values, values * (1 + 1e-6), values * (1 - 1e-6)]).clamp(-448, 448)
    assert torch.equal(round_float8(near), near.to(FLOAT8).float())


def test_asymmetric_ranges_hold_both_ends():
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-3.0, -2.0, -1.0, -0.5]])
    format = WeightFormat(INT4, symmetric=False)
    scale, zero = format.scales(*format.ranges(weight))
    assert scale.flatten().tolist() == pytest.approx([0.2, 0.2])
    assert zero.flatten().tolist() == [-8.0, 7.0]
    assert torch.allclose(rounded(weight, format).decode(), weight, atol=0.1001)


def test_all_zero_groups_and_positive_rows():
    weight = torch.zeros(2, 8)
    weight[1, 4:] = torch.tensor([0.1, 0.2, 0.3, 0.75])
    stored = rounded(weight, WeightFormat(INT4, 4))
    # half of a step at most, but for the largest, which the code 8 would be needed for
    assert torch.equal(stored.decode()[0], torch.zeros(8))
    assert (stored.decode() - weight)[:, :7].abs().max() <= 0.05 + 1e-6
    assert stored.decode()[1, 7] == pytest.approx(0.7)


@pytest.mark.parametrize("number", [INT8, FP8])
def test_tokens_do_not_see_each_other(number):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[1, 2] *= 1000
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    stored = rounded(weight, WeightFormat(number)).running_on(ActivationFormat(number))
    quiet, found = stored.kernel().linear(x, None), stored.kernel().linear(loud, None)
    others = torch.ones(3, 5, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(quiet[others], found[others])
    fixed = ActivationFormat(number, scale=0.01)
    assert torch.equal(fixed.round(x)[others], fixed.round(loud)[others])


def test_integer_path_is_the_simulated_one():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 300, generator=generator), torch.randn(7, 300, generator=generator)
    bias = torch.randn(24, generator=generator)
    stored = rounded(weight, WeightFormat(INT8)).running_on(ActivationFormat(INT8))
    kernel = stored.kernel()
    assert kernel.integer
    scale = ActivationFormat(INT8).scales(x)
    codes = INT8.codes(x, scale)
    # float64 holds every sum of products exactly
    sums = codes.double() @ stored.codes.double().T
    assert torch.equal(integer_product(codes.to(torch.int8), stored.codes).double(), sums)
    expected = sums.float() * scale * stored.scale.T + bias
    assert torch.equal(kernel.linear(x, bias), expected)
    float_product = nn.functional.linear(ActivationFormat(INT8).round(x), stored.decode(), bias)
    torch.testing.assert_close(expected, float_product, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 70])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiles_multiply_as_the_decoded_weight(columns, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, columns, generator=generator)
    x = torch.randn(2, 3, columns, generator=generator)
    stored = rounded(weight, WeightFormat(INT4, 32, symmetric))
    expected = nn.functional.linear(x, stored.decode())
    torch.testing.assert_close(stored.kernel().linear(x, None), expected)


def test_four_bits_in_bfloat16_use_the_fused_kernel():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    stored = rounded(weight, WeightFormat(INT4, 32), torch.bfloat16)
    kernel = stored.kernel()
    assert kernel.fused is not None
    x = torch.randn(3, 128, generator=generator).bfloat16()
    expected = x.double() @ stored.decode().double().T
    found = kernel.linear(x, None).double()
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


FORMATS = [
    WeightFormat(INT4, 32), WeightFormat(INT4, 32, False), WeightFormat(INT4),
    WeightFormat(INT8), WeightFormat(INT8, 16, False), WeightFormat(FP8),
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_files_are_read_bit_for_bit(tmp_path, format):
    layer = nn.Linear(70, 12)
    stored = rounded(layer.weight.detach(), format, torch.bfloat16)
    stored = stored.running_on(ActivationFormat(format.number)) if format.group is None else stored
    packed = PackedNetwork.of(layer, {"weight": stored})
    packed.save(tmp_path / "one")
    again = PackedNetwork.load(tmp_path / "one").tensors["weight"]
    assert torch.equal(again.decode(), stored.decode())
    assert (again.format, again.activations) == (stored.format, stored.activations)
    # the bytes are those of the arrays: four bits take half a byte
    codes = 12 * -(-70 // 8) * 4 if format.number.bits == 4 else 12 * 70
    assert again.arrays()["c"].numel() * again.arrays()["c"].element_size() == codes
    assert again.nbytes() == stored.nbytes()


@pytest.mark.parametrize("number", [INT8, FP8])
def test_a_packed_network_rounds_inputs_once(number):
    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            rounded = ActivationFormat(number).round(x)
            return nn.functional.linear(rounded, self.layer.weight, self.layer.bias).relu()

    network = Rounding().eval()
    stored = rounded(network.layer.weight.detach(), WeightFormat(number))
    stored = stored.running_on(ActivationFormat(number))
    network.layer.weight.data = stored.decode()
    x = torch.randn(5, 16)
    runner = PackedNetwork.of(network, {"layer.weight": stored}).runner(network, (x,))
    names = {str(node.target) for node in runner.program.graph.nodes}
    assert any("packed" in name for name in names)
    assert not any("round" in name for name in names)  # the kernel has taken it in
    torch.testing.assert_close(runner(x), network(x), rtol=1e-5, atol=1e-5)


def test_damaged_records_are_refused():
    stored = rounded(torch.randn(4, 32), WeightFormat(INT4, 16))
    record, arrays = stored.record(), stored.arrays()
    again = ScaledTensor.restore(record, arrays)
    assert torch.equal(again.codes, stored.codes)
    bad = [
        ([[4, 64], *record[1:]], arrays),
        ([record[0], "int", 5, *record[3:]], arrays),
        (record, arrays | {"s": arrays["s"][:, :1]}),
        (record, arrays | {"s": arrays["s"] * float("nan")}),
        (record, arrays | {"c": arrays["c"].long()}),
        (record, arrays | {"g": torch.full((32,), 2, dtype=torch.int32)}),
    ]
    for wrong, held in bad:
        with pytest.raises(ValueError):
            ScaledTensor.restore(wrong, held)


def test_bad_formats():
    with pytest.raises(InputError, match="integers of 4 or 8"):
        NumberFormat("int", 3)
    with pytest.raises(InputError, match="at least one input"):
        WeightFormat(group=0)
    with pytest.raises(InputError, match="zero point"):
        WeightFormat(FP8, symmetric=False)
