"""Packed networks: exact, as small as they say, and refused when damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.graph import Graph
from gossamer.models.plain import ConvNet, mlp
from gossamer.parts import packed as packed_module
from gossamer.parts.grids import quantize_tensor
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.sparse import SparseTensor
from gossamer.parts.stored import Kernel, Stored


@given(
    st.integers(1, 3000),
    st.sampled_from([0.0, 0.3, 0.9, 0.99, 0.999, 1.0]),
    st.integers(0, 1000),
)
def test_sparse_tensors_come_back_bit_for_bit(count: int, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(count, generator=generator)
    tensor[torch.rand(count, generator=generator) < sparsity] = 0.0
    stored = SparseTensor.of(tensor.view(1, count))
    assert torch.equal(stored.decode(), tensor.view(1, count))
    again = SparseTensor.restore(json.loads(json.dumps(stored.record())), stored.arrays())
    assert torch.equal(again.decode(), tensor.view(1, count))
    number = int((tensor != 0).sum())
    assert stored.nbytes() <= 4 * number + -(-count // 8) + 1


def test_the_smaller_of_the_two_ways_is_taken() -> None:
    dense, thin = torch.ones(800), torch.zeros(800)
    thin[[0, 256, 799]] = 1.0
    assert (SparseTensor.of(dense).how, SparseTensor.of(dense).nbytes()) == ("bitmap", 3300)
    # 0, 255 zeros, 542 zeros (two of them stored): 3 + 2 values of five bytes.
    assert (SparseTensor.of(thin).how, SparseTensor.of(thin).nbytes()) == ("gaps", 25)


def _network() -> ConvNet:
    torch.manual_seed(0)
    network = ConvNet(1, 8, (4, "pool"), (6,)).eval()
    with torch.no_grad():
        network[0].weight[torch.rand_like(network[0].weight) < 0.8] = 0.0
    return network


def test_a_file_of_several_codecs_decodes_to_the_same_network(tmp_path: Path) -> None:
    network = _network()
    x = torch.randn(3, 1, 8, 8)
    packed = _packed_of(network)
    packed.save(tmp_path / "p.safetensors")
    read = PackedNetwork.load(tmp_path / "p.safetensors")
    for name, tensor in packed.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    size = (tmp_path / "p.safetensors").stat().st_size
    assert 0 < size - read.nbytes() - read.plain_nbytes() < 2500
    fresh = ConvNet(1, 8, (4, "pool"), (6,)).eval()
    read.load_into(fresh)
    runner = read.runner(ConvNet(1, 8, (4, "pool"), (6,)), (x,))
    assert torch.equal(runner(x), fresh(x))
    # Read into a network rebuilt from its graph, whose tensors are one level down.
    rebuilt = Graph.trace(network, (x,)).network().eval()
    assert torch.equal(read.runner(rebuilt, (x,))(x), fresh(x))


def _packed_of(network: nn.Module) -> PackedNetwork:
    state = network.state_dict()
    return PackedNetwork.of(
        network,
        {
            "0.weight": SparseTensor.of(state["0.weight"]),
            "5.weight": quantize_tensor(state["5.weight"], bits=4, bucket=32),
        },
    )


class _Doubling(Kernel):
    """Answers twice what it should, so that its use shows."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight, bias)

    def conv2d(self, x, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        return 2 * nn.functional.conv2d(x, self.weight, bias, stride, padding, dilation, groups)


@dataclass(frozen=True)
class _Plain(Stored):
    codec = "plain-test"
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def decode(self) -> Tensor:
        return self.value

    def arrays(self) -> dict[str, Tensor]:
        return {"v": self.value}

    def record(self) -> Any:
        return None

    @classmethod
    def restore(cls, record: Any, arrays: Mapping[str, Tensor]) -> _Plain:
        return cls(arrays["v"])

    def kernel(self) -> Kernel:
        return _Doubling(self.value)


@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"])
def test_kernels_take_the_place_of_products_and_their_tensors_go(padding: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), padding=padding), nn.Flatten(), nn.LazyLinear(4)
    ).eval()
    x = torch.randn(2, 2, 6, 7)
    network(x)
    state = network.state_dict()
    stored = {name: _Plain(state[name].clone()) for name in ("0.weight", "2.weight")}
    runner = PackedNetwork.of(network, stored).runner(network, (x,))
    by_hand = 2 * network[2](2 * network[0](x).flatten(1))
    torch.testing.assert_close(runner(x), by_hand)
    assert not any(name.endswith("weight") for name, _ in runner.named_parameters())
    assert torch.equal(network.state_dict()["0.weight"], state["0.weight"])


def test_ties_are_stored_once(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    network[2].weight = network[0].weight
    packed = PackedNetwork.of(network, {"0.weight": SparseTensor.of(network[0].weight)})
    assert packed.ties == {"2.weight": "0.weight"}
    x = torch.randn(3, 5)
    torch.testing.assert_close(packed.runner(network, (x,))(x), network(x))


@given(st.binary(max_size=300), st.integers(0, 2000), st.booleans())
def test_damaged_files_are_refused(tmp_path_factory: Any, noise: bytes, at: int, cut: bool) -> None:
    folder = tmp_path_factory.mktemp("packed")
    _packed_of(_network()).save(folder / "good")
    data = (folder / "good").read_bytes()
    at %= len(data)
    data = data[:at] if cut else data[:at] + noise + data[at + len(noise) :]
    (folder / "bad").write_bytes(data)
    try:
        read = PackedNetwork.load(folder / "bad")
    except InputError:
        return
    # What is accepted decodes.
    read.state_dict()


def test_wrong_records_are_refused(tmp_path: Path) -> None:
    stored = SparseTensor.of(torch.tensor([0.0, 1.0, 0.0, 2.0]))
    for record in ([[5000000, 5000000], "bitmap"], [[4], "gaps"], [[-4], "bitmap"], [[4], "?"]):
        with pytest.raises((ValueError, InputError)):
            SparseTensor.restore(record, stored.arrays())
    gaps = {"v": torch.ones(2), "p": torch.tensor([200, 200], dtype=torch.uint8)}
    with pytest.raises(ValueError, match="past the end"):
        SparseTensor.restore([[300], "gaps"], gaps)
    with pytest.raises(InputError, match="does not exist"):
        PackedNetwork.load(tmp_path / "none")
    with pytest.raises(InputError, match="no tensor nope"):
        PackedNetwork.of(mlp((3, 2)), {"nope": stored})
    assert set(packed_module.CODECS) >= {"uniform", "sparse"}
