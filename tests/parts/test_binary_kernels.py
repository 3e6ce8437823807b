"""Products of signs: equal to float products of the same signs, bit for bit, whatever the shape."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.parts.binary_kernels import (
    BinaryKernel,
    BinaryTensor,
    integer_thresholds,
    pack_signs,
)
from gossamer.parts.packed import PackedNetwork


def signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def drawn(seed: int, *shape: int) -> Tensor:
    # A third are exact zeros: they count as positive.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator) * torch.rand(shape, generator=generator)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 80), st.integers(0, 1000))
def test_linear_equals_the_float_product_of_signs(
    rows: int, inputs: int, outputs: int, seed: int
) -> None:
    x, w, b = drawn(seed, rows, inputs), drawn(seed + 1, outputs, inputs), drawn(seed + 2, outputs)
    expected = F.linear(signs(x), signs(w))
    assert torch.equal(BinaryKernel(w).linear(x, None), expected)
    assert torch.equal(BinaryKernel(w).linear(x, b), expected + b)


def test_known_dot_products() -> None:
    for length in (1, 63, 64, 65, 200):
        row = drawn(length, 1, length) + 0.1
        assert BinaryKernel(row).linear(row, None).item() == length
        assert BinaryKernel(row).linear(-row, None).item() == -length
    x, w = torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[0.2, -0.4, -0.6]])
    assert BinaryKernel(w).linear(x, None).item() == 1 + 1 - 1


def test_batch_axes_are_kept() -> None:
    x, w = drawn(0, 2, 3, 4, 70), drawn(1, 5, 70)
    assert torch.equal(BinaryKernel(w).linear(x, None), F.linear(signs(x), signs(w)))
    assert BinaryKernel(w).linear(x[:0], None).shape == (0, 3, 4, 5)


@given(st.data())
def test_convolution_equals_the_float_one_borders_included(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    side, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 5), pair(1, 3)
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + data.draw(st.integers(0, 9))
        for d, k, p in zip(dilation, side, padding, strict=True)
    )
    seed = data.draw(st.integers(0, 1000))
    x = drawn(seed, data.draw(st.integers(1, 3)), inputs * groups, height, width)
    w, b = drawn(seed + 1, outputs * groups, inputs, *side), drawn(seed + 2, outputs * groups)
    expected = F.conv2d(signs(x), signs(w), None, stride, padding, dilation, groups)
    kernel = BinaryKernel(w)
    found = kernel.conv2d(x, b, stride, padding, dilation, groups)
    assert torch.equal(found, expected + b[:, None, None])
    # A second size through the same kernel: its border is another.
    x = drawn(seed + 3, 1, inputs * groups, height + 1, width + 2)
    expected = F.conv2d(signs(x), signs(w), None, stride, padding, dilation, groups)
    assert torch.equal(kernel.conv2d(x, None, stride, padding, dilation, groups), expected)


def test_depthwise_and_many_channels() -> None:
    for channels, groups in ((64, 64), (256, 1), (130, 2)):
        x, w = drawn(0, 2, channels, 9, 7), drawn(1, channels, channels // groups, 3, 3)
        expected = F.conv2d(signs(x), signs(w), None, 1, 1, 1, groups)
        found = BinaryKernel(w).conv2d(x, None, (1, 1), (1, 1), (1, 1), groups)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 5])
def test_threads_change_nothing(threads: int, batch: int) -> None:
    before = torch.get_num_threads()
    x, w = drawn(0, batch, 20, 6, 6), drawn(1, 7, 20, 3, 3)
    try:
        torch.set_num_threads(threads)
        found = BinaryKernel(w).conv2d(x, None, (1, 1), (1, 1), (1, 1), 1)
        rows = BinaryKernel(w.flatten(1)).linear(x.flatten(2)[:, :, :1].expand(-1, 20, 180), None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, F.conv2d(signs(x), signs(w), padding=1))
    flat = signs(x.flatten(2)[:, :, :1]).expand(-1, 20, 180)
    assert torch.equal(rows, F.linear(flat, signs(w.flatten(1))))


def test_bits_are_those_of_numpy() -> None:
    x = drawn(0, 11, 130)
    bits = np.packbits((x >= 0).numpy(), axis=1, bitorder="little")
    words = np.pad(bits, ((0, 0), (0, 24 - bits.shape[1]))).view(np.uint64)
    assert (pack_signs(x) == words).all()
    tiny = torch.tensor([[-1e-60, 1e-60, -0.0]], dtype=torch.float64)
    assert pack_signs(tiny).item() == 0b110  # not rounded to zero on the way
    assert pack_signs(torch.tensor([[-1.0, 2.0]], dtype=torch.bfloat16)).item() == 0b10


def test_inputs_that_do_not_fit_are_refused() -> None:
    kernel = BinaryKernel(torch.ones(4, 6, 3, 3))
    with pytest.raises(InputError, match="takes 6 channels, not 5"):
        kernel.conv2d(torch.ones(1, 5, 8, 8), None, (1, 1), (1, 1), (1, 1), 1)
    with pytest.raises(InputError, match="smaller than"):
        kernel.conv2d(torch.ones(1, 6, 2, 8), None, (1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(InputError, match="takes 6 values, not 5"):
        BinaryKernel(torch.ones(4, 6)).linear(torch.ones(1, 5), None)


@given(st.integers(1, 60), st.integers(0, 1000))
def test_thresholds_are_the_condition_itself(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(6, 1, generator=generator)
    offset = torch.randn(6, 1, generator=generator) * length / 2
    scale[5] = 0.0
    dots = torch.arange(-length, length + 1, dtype=torch.float32)
    positive = F.hardtanh(dots * scale + offset) >= 0
    found = integer_thresholds(positive)
    assert found is not None
    threshold, flipped = found
    assert torch.equal((dots >= threshold[:, None]) != flipped[:, None], positive)


def test_a_sign_that_changes_twice_has_no_threshold() -> None:
    dots = torch.arange(-3, 4)
    assert integer_thresholds((dots.abs() > 1)[None]) is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 100))
def test_signs_are_stored_in_one_bit_each(shape: list[int], seed: int) -> None:
    tensor = signs(drawn(seed, *shape))
    stored = BinaryTensor.of(tensor)
    assert stored.nbytes() == -(-tensor.numel() // 8)
    record = json.loads(json.dumps(stored.record()))
    assert torch.equal(BinaryTensor.restore(record, stored.arrays()).decode(), tensor)
    with pytest.raises(ValueError, match="another number"):
        BinaryTensor.restore([*record, 9], stored.arrays())


def test_only_signs_are_stored_as_signs() -> None:
    with pytest.raises(InputError, match=r"only -1 and \+1"):
        BinaryTensor.of(torch.tensor([1.0, 0.0]))


class Signed(nn.Module):
    """Two convolutions of signs with everything per channel between them."""

    def __init__(self, middle: nn.Module, *, first: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(5, 12, 3, padding=1, bias=False)
        self.b = nn.Conv2d(12, 6, 3, padding=1, stride=2, groups=groups, bias=False)
        for layer in (self.a, self.b):
            layer.weight.data = signs(layer.weight.data)
        self.scale = nn.Parameter(torch.randn(12, 1, 1))
        self.offset = nn.Parameter(torch.randn(12, 1, 1) * 4)
        self.shift = nn.Parameter(torch.randn(12))
        self.middle, self.first = middle, first

    def forward(self, x: Tensor) -> Tensor:
        y = self.a((x >= 0).to(x.dtype) * 2 - 1 if self.first else x)
        y = self.middle(y * self.scale + self.offset) + self.shift.view(-1, 1, 1)
        return self.b((y >= 0).to(y.dtype) * 2 - 1)


def run(network: nn.Module, x: Tensor) -> tuple[Tensor, list[str]]:
    """Output of the packed network and the operators that are left in it."""
    weights = {f"{n}.weight": BinaryTensor.of(network.get_submodule(n).weight) for n in "ab"}
    runner = PackedNetwork.of(network, weights).runner(network, (x[:2],))
    names = [str(n.target) for n in runner.program.graph.nodes if n.op.startswith("call")]
    with torch.inference_mode():
        return runner(x), names


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("middle", [nn.Hardtanh(), nn.ReLU(), nn.Identity()])
def test_between_two_products_of_signs_only_integers_are_compared(
    middle: nn.Module, groups: int
) -> None:
    torch.manual_seed(0)
    network, x = Signed(middle, groups=groups).eval(), torch.randn(3, 5, 8, 8)
    found, names = run(network, x)
    assert torch.equal(found, network(x))
    assert len(names) == 2 and all(name.startswith("packed_") for name in names)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x - 3.0


def test_what_is_not_per_channel_stays_and_the_shift_is_taken_in() -> None:
    torch.manual_seed(0)
    network, x = Signed(Square()).eval(), torch.randn(3, 5, 8, 8)
    found, names = run(network, x)
    assert torch.equal(found, network(x))
    assert sum("ge" in name for name in names) == 0
    assert names[-2].startswith("aten.sub")  # its "- 3"; the shift after it is gone


def test_weights_behind_no_sign_are_decoded() -> None:
    torch.manual_seed(0)
    network, x = Signed(nn.ReLU(), first=False).eval(), torch.randn(3, 5, 8, 8)
    found, names = run(network, x)
    assert torch.allclose(found, network(x), atol=1e-5)
    assert [name.startswith("packed_") for name in names].count(True) == 1


def test_padding_with_ones() -> None:
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, bias=False)
            self.b = nn.Conv2d(4, 4, 3, bias=False)
            for layer in (self.a, self.b):
                layer.weight.data = signs(layer.weight.data)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.a, self.b):
                x = layer(F.pad((x >= 0).to(x.dtype) * 2 - 1, (1, 1, 1, 1), value=1.0))
            return x

    torch.manual_seed(0)
    network, x = Ones().eval(), torch.randn(2, 3, 6, 6)
    found, names = run(network, x)
    assert torch.equal(found, network(x))
    assert sum(name.startswith("packed_") for name in names) == 2
