import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import InputError
from gossamer.parts import packing
from gossamer.parts.packing import huffman_lengths, huffman_mean_bits, pack, unpack


@settings(deadline=None)
@given(st.integers(1, 16), st.data())
def test_round_trip_and_exact_size(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.numel() == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_bit_order_is_least_significant_first():
    # 1, 2, 3 as two bits each: 0b11_10_01
    assert pack(torch.tensor([1, 2, 3]), 2).tolist() == [0b111001]
    assert pack(torch.tensor([0b101, 0b011, 0b110]), 3).tolist() == [0b10011101, 0b1]


@pytest.mark.parametrize("bits", [1, 3, 5, 12])
def test_pieces_join(bits, monkeypatch):
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 2**bits, 1003))
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_PIECE", 64)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 1003).long(), codes)


def test_bad_input():
    with pytest.raises(InputError, match="do not fit"):
        pack(torch.tensor([4]), 2)
    with pytest.raises(InputError, match="do not fit"):
        pack(torch.tensor([-1]), 2)
    with pytest.raises(InputError, match="1 to 16"):
        pack(torch.tensor([0]), 17)
    with pytest.raises(InputError, match="take 3 bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, 6)


@pytest.mark.parametrize(
    ("frequencies", "bits"), [((0.5, 0.25, 0.125, 0.125), 1.75), ((0.4, 0.3, 0.2, 0.1), 1.9)]
)
def test_worked_huffman_examples(frequencies, bits):
    assert huffman_mean_bits(frequencies) == pytest.approx(bits)


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(lambda f: sum(map(bool, f)) > 1)
)
def test_huffman_is_a_complete_prefix_code_within_a_bit_of_entropy(counts):
    lengths = huffman_lengths(counts)
    used = [(c, l) for c, l in zip(counts, lengths, strict=True) if c]
    assert sum(2.0**-l for _, l in used) == 1.0  # Kraft with equality
    assert all(l == 0 for c, l in zip(counts, lengths, strict=True) if not c)
    p = np.array([c for c, _ in used]) / sum(counts)
    entropy = float(-(p * np.log2(p)).sum())
    assert entropy - 1e-9 <= huffman_mean_bits(counts) < entropy + 1


def test_lone_symbol_takes_one_bit():
    assert huffman_lengths([0, 7]) == [0, 1]
    assert huffman_mean_bits([0, 0]) == 0.0
