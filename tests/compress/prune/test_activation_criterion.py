"""Criteria of activations: worked numbers, and brute force for the greedy order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.compress.prune.activation_criterion import (
    _contributions,
    _leaving_order,
    greedy_reconstruction,
    map_rank,
    nonzero_share,
)
from gossamer.compress.prune.magnitude import prune
from gossamer.core.dependency import analyse
from gossamer.core.errors import UnsupportedError
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import Task
from gossamer.datasets.digits import digits
from gossamer.models.resnet import digits_resnet


class Fixed(Task):
    """The same images in every batch."""

    name = "fixed"

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.example_inputs = (images[:2],)

    def batches(self, split: str, **options: Any) -> Iterator[tuple[Tensor]]:
        while True:
            yield (self.images,)

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return (batch[0],)

    def size(self, split: str) -> int:
        return len(self.images)

    def criterion(self, outputs: Any, batch: Any) -> Tensor:
        raise AssertionError("no labels are needed")

    def score(self, model: Any, split: str = "validation") -> float:
        raise AssertionError("nothing is scored")

    def fingerprint(self) -> str:
        return "fixed"


def copying(*shifts: float, scale: float = 1.0) -> nn.Sequential:
    """Each middle channel is the image plus a shift, then ReLU."""
    net = nn.Sequential(
        nn.Conv2d(1, len(shifts), 1), nn.ReLU(), nn.Conv2d(len(shifts), 2, 1), nn.Flatten(1)
    )
    first = net[0]
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    with torch.no_grad():
        first.weight.fill_(scale)
        first.bias.copy_(torch.tensor(shifts))
    return net.eval()


IMAGES = torch.arange(-8.0, 8.0).view(1, 1, 4, 4).repeat(2, 1, 1, 1)


def scored(function: Any, net: nn.Module, images: Tensor = IMAGES, **options: Any) -> Tensor:
    (scores,) = function(net, analyse(net, (images,)), Fixed(images), **options)
    return scores


def test_zeros_are_counted_behind_the_activation() -> None:
    # -8 .. 7 plus a shift: of 16 values 7, 15 and none are above 0.
    found = scored(nonzero_share, copying(0.0, 8.0, -7.0))
    torch.testing.assert_close(found, torch.tensor([7 / 16, 15 / 16, 0.0]))


def test_ranks_of_maps() -> None:
    flat = torch.ones(2, 1, 4, 4)
    torch.testing.assert_close(scored(map_rank, copying(1.0, -2.0), flat), torch.tensor([1.0, 0.0]))
    # A ramp has rank 2; cut off below 0 its rank is 2 as well, of a single corner 1.
    found = scored(map_rank, copying(9.0, -6.5))
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0]))


def test_the_greedy_order_is_that_of_brute_force() -> None:
    torch.manual_seed(0)
    given = torch.randn(30, 6)
    gone: list[int] = []
    for _ in range(6):
        rest = [c for c in range(6) if c not in gone]
        gone.append(min(rest, key=lambda c: float(given[:, [*gone, c]].sum(1).square().sum())))
    order = _leaving_order(given)
    assert [int(c) for c in order.argsort()] == gone


def test_units_that_cancel_leave_together() -> None:
    given = torch.tensor([[1.0, -1.0, 0.5], [2.0, -2.0, 0.5], [1.0, -1.0, 0.5]])
    order = _leaving_order(given)
    # 2 alone is least; of what is left, each of the pair changes as much, but not both.
    assert order.tolist() == pytest.approx([2 / 3, 1.0, 1 / 3]) or order.tolist() == pytest.approx(
        [1.0, 2 / 3, 1 / 3]
    )
    pair = torch.tensor([[1.0, -1.0, 3.0], [2.0, -2.0, 3.0]])
    assert float(_leaving_order(pair)[2]) == 1.0


@pytest.mark.parametrize(
    "reader",
    [
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.Conv2d(3, 4, (3, 2), stride=2, dilation=(1, 2), bias=False),
        nn.Conv2d(3, 4, 4, padding="same", bias=False),
    ],
)
def test_contributions_add_up_to_outputs(reader: nn.Conv2d) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 7, 8)
    outputs = reader(x).detach().flatten().tolist()
    for total in _contributions(reader, x, 20, torch.Generator().manual_seed(1)).sum(1).tolist():
        assert min(abs(total - o) for o in outputs) < 1e-4


def test_contributions_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    reader, x = nn.Linear(6, 4, bias=False), torch.randn(5, 6)
    outputs = reader(x).detach().flatten().tolist()
    for total in _contributions(reader, x, 9, torch.Generator().manual_seed(1)).sum(1).tolist():
        assert min(abs(total - o) for o in outputs) < 1e-5


def test_thinet_lets_go_of_what_nobody_misses() -> None:
    net = copying(9.0, 9.0, 9.0)
    last = net[2]
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[1.0, 0.01, 2.0], [1.0, 0.01, 2.0]]).view(2, 3, 1, 1))
    found = scored(greedy_reconstruction, net, batches=1)
    assert found.argsort().tolist() == [1, 0, 2]


@pytest.mark.parametrize("criterion", ["apoz", "hrank", "thinet"])
def test_they_prune_a_real_network(criterion: str) -> None:
    task = digits()
    torch.manual_seed(0)
    network = Network(digits_resnet().eval(), task.example_inputs)
    small = prune(network, task, criterion=criterion, macs=0.6, epochs=0)
    before, after = (Graph.trace(n.module, task.example_inputs).macs for n in (network, small))
    assert 0.4 * before < after <= 0.6 * before


def test_what_nobody_reads_is_said() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    task = Fixed(torch.randn(4, 4))
    with pytest.raises(UnsupportedError, match="no conv2d reads"):
        map_rank(net, analyse(net, task.example_inputs), task)
    (shares,) = nonzero_share(net, analyse(net, task.example_inputs), task)
    expected = (net[:2](task.images) != 0).float().mean(0)
    torch.testing.assert_close(shares, expected)
