"""Erasing: segments, candidates, validity against an independent search, exact construction."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor, nn

from gossamer.compress.prune.erasing import (
    Candidate,
    Dag,
    Space,
    choose,
    erase,
    is_valid,
    segments,
)
from gossamer.compress.prune.groups import Groups
from gossamer.compress.prune.half_space import H2SPG, Sgd, otov3, output_difference
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph, GraphNetwork
from gossamer.core.network import Network
from gossamer.datasets.digits import digits


class Unit(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Branches(nn.Module):
    """Two cells of parallel branches: one joined by addition, one by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(1, 8)
        self.one = Unit(8, 8, 3)
        self.two = Unit(8, 8, 1)
        self.bridge = Unit(8, 8)
        self.left = Unit(8, 6, 3)
        self.right = Unit(8, 4, 1)
        self.long = nn.Sequential(Unit(8, 4, 1), Unit(4, 4, 3))
        self.mix = nn.Conv2d(14, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.one(x) + self.two(x)
        x = self.bridge(x)
        x = torch.cat([self.left(x), self.right(x), self.long(x)], 1)
        x = self.mix(x)
        return self.head(x.mean((2, 3)))


def make(kind: type[nn.Module] = Branches) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, 0.1, 1.0)
                nn.init.uniform_(part.running_mean)
        return module.eval()


INPUTS = (torch.randn(3, 1, 8, 8),)


def dag(edges: list[tuple[int, int]], **options: object) -> Dag:
    size = 1 + max(v for e in edges for v in e)
    return Dag(size, tuple(edges), frozenset({0}), frozenset({size - 1}), **options)  # type: ignore[arg-type]


# The pure algorithm ------------------------------------------------------------------------


def test_segments_of_a_residual_block() -> None:
    # input - 1 - 2 (branches) - 3 - 4 - add 5; 2 - 6 - add 5; 5 - 7
    graph = dag([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (2, 6), (6, 5), (5, 7)])
    assert segments(graph) == [[1, 2], [3, 4], [6], [5], [7]]


def test_segments_cover_every_reachable_vertex_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        graph = random_dag(generator)
        found = [v for segment in segments(graph) for v in segment]
        assert len(found) == len(set(found))
        reach = reachable(graph, set())
        assert set(found) == reach - graph.inputs


def reachable(graph: Dag, removed: set[int]) -> set[int]:
    """Breadth-first search, written apart from the code under test."""
    seen = set(graph.inputs) - removed
    queue = deque(seen)
    while queue:
        vertex = queue.popleft()
        for start, end in graph.edges:
            if start == vertex and end not in seen and end not in removed:
                seen.add(end)
                queue.append(end)
    return seen


def random_dag(generator: torch.Generator) -> Dag:
    size = int(torch.randint(6, 20, (1,), generator=generator))
    edges = {(v, v + 1) for v in range(size - 1) if float(torch.rand(1, generator=generator)) < 0.5}
    for end in range(1, size):
        starts = torch.randint(0, end, (2,), generator=generator).tolist()
        edges |= {(starts[0], end)} | ({(starts[1], end)} if end % 2 else set())
    return Dag(size, tuple(sorted(edges)), frozenset({0}), frozenset({size - 1}))


def test_choice_is_valid_on_a_thousand_random_graphs() -> None:
    generator = torch.Generator().manual_seed(1)
    invalid = 0
    for _ in range(1000):
        graph = random_dag(generator)
        space = Space(graph, tuple(Candidate(str(v), (v,), ()) for v in range(1, graph.size - 1)))
        scores = torch.rand(len(space.candidates), generator=generator)
        count = int(torch.randint(1, len(space.candidates) + 1, (1,), generator=generator))
        chosen = choose(space, scores.tolist(), count)
        gone = set(space.vertices(chosen))
        assert graph.size - 1 in reachable(graph, gone)
        # At the maximum nothing more could go.
        if len(chosen) < count:
            for index in set(range(len(space.candidates))) - set(chosen):
                cut = gone | set(space.candidates[index].vertices)
                assert graph.size - 1 not in reachable(graph, cut)
        drawn = torch.randperm(len(space.candidates), generator=generator)[:count].tolist()
        invalid += not space.is_valid(drawn)
        agrees = graph.size - 1 in reachable(graph, set(space.vertices(drawn)))
        assert space.is_valid(drawn) == agrees
    # Without the check many draws would have cut the network in two.
    assert invalid > 200


def test_bridge_is_skipped() -> None:
    # 0 - 1 - {2, 3} - 4 (bridge) - {5, 6} - 7
    graph = dag([(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 5), (4, 6), (5, 7), (6, 7)])
    space = Space(graph, tuple(Candidate(str(v), (v,), ()) for v in (2, 3, 4, 5, 6)))
    chosen = choose(space, [0.5, 0.4, 1.0, 0.3, 0.2], 3)
    assert [space.candidates[i].vertices[0] for i in chosen] == [2, 5]
    with pytest.raises(InputError, match="3 scores"):
        choose(space, [1.0, 2.0, 3.0], 1)


def test_products_need_all_their_factors() -> None:
    edges = [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)]
    assert is_valid(dag(edges), {1})
    assert not is_valid(dag(edges, strict=frozenset({3})), {1})


# On traced networks ------------------------------------------------------------------------


def test_candidates_of_a_network() -> None:
    space = Space.of(Graph.trace(make(), INPUTS))
    names = {c.name: c.parameters for c in space.candidates}
    # stem, bridge, mix and head are followed by no joint alone: never erased.
    assert set(names) == {"one.0", "two.0", "left.0", "right.0", "long.0.0"}
    assert set(names["long.0.0"]) == {
        *("long.0.0.weight", "long.0.1.weight", "long.0.1.bias"),
        *("long.1.0.weight", "long.1.1.weight", "long.1.1.bias"),
    }


@pytest.mark.parametrize(
    "names",
    [["one.0"], ["two.0", "right.0"], ["left.0", "long.0.0"], ["one.0", "left.0", "right.0"]],
)
def test_erased_network_answers_as_the_zeroed_one(names: list[str]) -> None:
    module = make()
    graph = Graph.trace(module, INPUTS)
    space = Space.of(graph)
    chosen = [i for i, c in enumerate(space.candidates) if c.name in names]
    groups = Groups.whole(module, [c.parameters for c in space.candidates])
    which = torch.zeros(groups.total, dtype=torch.bool)
    which[chosen] = True
    full = make()
    groups.silence_(which)
    small = erase(module, graph, space, chosen)
    assert output_difference(module, small, INPUTS) < 1e-6
    assert output_difference(full, small, INPUTS) > 1e-3
    gone = sum(
        dict(module.named_parameters())[n].numel()
        for i in chosen
        for n in space.candidates[i].parameters
    )
    widths = {"left.0": 6, "right.0": 4, "long.0.0": 4}
    columns = 8 * sum(widths.get(space.candidates[i].name, 0) for i in chosen)
    kept = sum(p.numel() for p in small.parameters())
    assert kept == sum(p.numel() for p in module.parameters()) - gone - columns
    # It trains, and it is traced again.
    small.train()
    small(*INPUTS).sum().backward()
    assert Graph.trace(small, INPUTS).macs < graph.macs


class NormAfterConcat(nn.Module):
    """A BatchNorm between concatenation and reader: its shift would be lost with the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        return self.mix(torch.relu(self.norm(x))).mean((2, 3))


def test_zeros_stand_in_where_columns_cannot_go() -> None:
    module = make(NormAfterConcat)
    graph = Graph.trace(module, INPUTS)
    space = Space.of(graph)
    assert [c.name for c in space.candidates] == ["a", "b"]
    with torch.no_grad():
        module.get_submodule("a").weight.zero_()  # type: ignore[operator]
        module.get_submodule("a").bias.zero_()  # type: ignore[operator]
    small = erase(module, graph, space, [0])
    assert output_difference(module, small, INPUTS) < 1e-6
    # The batch is still free.
    other = torch.randn(5, 1, 8, 8)
    assert torch.allclose(small.eval()(other), module(other), atol=1e-6)
    with pytest.raises(InputError, match="no path"):
        erase(module, graph, space, [0, 1])


class Gated(nn.Module):
    """Squeeze and excite ends in a sigmoid; an addition of unequal shapes; a plain chain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.bias = nn.Conv2d(4, 4, 1)
        self.sharp = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.b(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = x + self.bias(x.mean((2, 3), keepdim=True))
        return (x + torch.sigmoid(self.sharp(x))).mean((2, 3))


def test_what_zeros_do_not_silence_is_no_candidate() -> None:
    space = Space.of(Graph.trace(make(Gated), INPUTS))
    # Not the gate (a product), not the bias (broadcast), not the one behind a sigmoid.
    assert [c.name for c in space.candidates] == ["a", "b"]
    chain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(UnsupportedError, match="no operator that can be erased"):
        Space.of(Graph.trace(chain, INPUTS))


class Scaled(nn.Module):
    """A residual branch that ends in a layer scale, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return (x + self.branch(x) * self.scale.view(1, -1, 1, 1)).mean((2, 3))


def test_layer_scale_belongs_to_its_branch() -> None:
    module = make(Scaled)
    graph = Graph.trace(module, INPUTS)
    space = Space.of(graph)
    (candidate,) = space.candidates
    assert set(candidate.parameters) == {"branch.weight", "branch.bias", "scale"}
    Groups.whole(module, [candidate.parameters]).silence_(torch.tensor([True]))
    assert output_difference(module, erase(module, graph, space, [0]), INPUTS) < 1e-6


def test_h2spg_skips_what_would_cut_the_network() -> None:
    module = make().train()
    space = Space.of(Graph.trace(module, INPUTS))
    optimizer = H2SPG(
        module, space, erase=5, start=3, base=Sgd(momentum=0.0), lr=0.01, weight_decay=0.0
    )
    for step in range(5):
        module.zero_grad()
        torch.manual_seed(step)
        module(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    candidates = torch.nonzero(optimizer.progress["candidates"]).flatten().tolist()
    # Of one, two (added) and left, right, long (concatenated) one each must stay.
    assert len(candidates) == 3 == optimizer.progress["limit"]
    assert space.is_valid(candidates)


def test_otov3_erases_operators() -> None:
    torch.set_num_threads(1)
    task = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(Branches(), task.example_inputs)
    result = otov3(
        network, task, optimizer="h2spg", erase=2, epochs=10, batch_size=32, penalty=3.0, cpu=True
    )
    report = result.steps[-1]["report"]
    assert report["removed"] == 2 == len(report["erased"])
    assert report["output_difference"] < 1e-5
    assert report["parameters"][1] < report["parameters"][0]
    assert isinstance(result.module, GraphNetwork)
    assert task.score(result.module) > 80
