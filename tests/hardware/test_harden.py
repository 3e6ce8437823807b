"""Maneuvers hide something and compute the same."""

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.hardware.execution_trace import trace
from gossamer.hardware.harden import MANEUVERS, harden, secure_mobilenet_v1
from gossamer.hardware.kernel_times import SIZES_ONLY
from gossamer.hardware.trace_layers import read_layers
from gossamer.models.mobilenet import MobileNet, mobilenet_v1, small_mobilenet

STAGES = ((16, 1, 1), (32, 2, 2), (32, 1, 1))


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MobileNet(STAGES, stem=16, stem_stride=1, in_channels=3, classes=10)
        for layer in module.modules():  # nothing that folding or padding could overlook
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return module.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("maneuver", [*MANEUVERS])
def test_each_maneuver_is_exact(network: nn.Module, x: torch.Tensor, maneuver: str) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        expected = network(x)
        changed = harden(network, [maneuver], group_size=4)
        found = changed(x)
        again = changed(x)
    if maneuver in ("identity-add", "arena"):
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, again)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_all_maneuvers_together(network: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        changed = harden(network, [*MANEUVERS], group_size=4)
        torch.testing.assert_close(changed(x), network(x), rtol=1e-4, atol=1e-4)


def test_groups_of_one_are_the_vanilla_network(network: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        assert torch.equal(harden(network, group_size=1)(x), network(x))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vanilla = mobilenet_v1(width=0.25, classes=10).eval()
        torch.manual_seed(0)
        secure = secure_mobilenet_v1(1, width=0.25, classes=10).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(vanilla(pixels), secure(pixels))


def test_groups_are_channels_over_their_size() -> None:
    for module in (secure_mobilenet_v1(8), harden(small_mobilenet(), group_size=8)):
        grouped = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
        assert len(grouped) > 5
        for layer in grouped[1:]:
            assert layer.groups == layer.in_channels // 8


def test_padding_makes_sizes_equal(network: nn.Module) -> None:
    def pairs(module: nn.Module) -> list[tuple[int, int]]:
        seen = trace(module, (3, 16), batches=(1,), repeats=1, warmup=1)
        works = [e.channels for e in read_layers(seen, SIZES_ONLY).events][3:-2]
        return list(zip(works[::6], works[3::6], strict=True))

    assert any(a != b for a, b in pairs(network))
    assert all(a == b for a, b in pairs(harden(network, ["pad"])))


def test_fused_networks_show_one_event_a_layer(network: nn.Module) -> None:
    plain = trace(network, (3, 16), batches=(1,), repeats=1, warmup=1)
    fused = trace(harden(network, ["fuse"]), (3, 16), batches=(1,), repeats=1, warmup=1)
    layers = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    assert np.count_nonzero(plain.allocated[0]) == 3 * layers + 2
    assert np.count_nonzero(fused.allocated[0]) == layers + 2


def test_an_arena_hides_sizes(network: nn.Module) -> None:
    seen = trace(harden(network, ["arena"]), (3, 16), batches=(1,), repeats=1, warmup=1)
    plain = trace(network, (3, 16), batches=(1,), repeats=1, warmup=1)
    assert np.count_nonzero(seen.allocated[0]) == 2  # the mean and the logits
    assert np.count_nonzero(plain.allocated[0]) == plain.events


def test_refusals(network: nn.Module) -> None:
    with pytest.raises(InputError, match="'hide' is no maneuver"):
        harden(network, ["hide"])
    with pytest.raises(InputError, match="at least one channel"):
        harden(network, group_size=0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    for maneuver in MANEUVERS:
        with pytest.raises(UnsupportedError):
            harden(linear, [maneuver])


class Rearranged(nn.Module):
    """Children in another order than they run in, one rectifier for all, inputs read again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.last, self.last_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.conv(self.relu(x)))
        return self.relu(self.last_norm(self.last(self.norm(y)))) + x + y


@pytest.mark.parametrize("maneuver", ["fuse", "arena"])
def test_what_runs_counts_and_not_the_order_of_children(maneuver: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(4, 4, 1), Rearranged()).eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
        x = torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        changed = harden(network, [maneuver])
        expected = network(x)
        for _ in range(2):
            torch.testing.assert_close(changed(x), expected, rtol=1e-4, atol=1e-4)
    if maneuver == "fuse":
        kinds = [type(changed.get_submodule(f"1.{name}")) for name in ("norm", "last_norm")]
        assert kinds == [nn.BatchNorm2d, nn.Identity]
