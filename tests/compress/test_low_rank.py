import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.low_rank import (
    BiasOnly,
    Decomposed,
    LowRankLayer,
    LowRankTraining,
    PairSampler,
    decompose,
    hierarchical_group_lasso,
    importance,
    low_rank,
    published_sgd,
    search_lam,
    svd,
    tail_norms,
    two_drops,
)
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import BudgetError, InputError, UnsupportedError
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.fit import Supervised, constant, fit
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.models.plain import mlp
from gossamer.models.resnet import digits_resnet
from tests.resuming import whole_and_resumed

U = torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])
V = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return digits(seed=0, limit=300)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@pytest.fixture(scope="module")
def trained(task):
    module = seeded(lambda: mlp((64, 32, 32, 10), norm=True))
    fit(Supervised(module, task), task, epochs=8, batch_size=64, seed=0)
    return module.eval()


# Penalty and importance


def test_worked_example_of_the_penalty():
    torch.testing.assert_close(tail_norms(V), torch.tensor([5.196152, 1.414214, 1.0]))
    torch.testing.assert_close(tail_norms(U.T), torch.tensor([3.162278, 3.0, 1.0]))
    assert hierarchical_group_lasso(U, V).item() == pytest.approx(14.772644, abs=1e-5)
    torch.testing.assert_close(importance(U, V), torch.tensor([16.431677, 4.242640, 1.0]))
    plain = importance(U, V, hierarchical=False)
    torch.testing.assert_close(plain, torch.tensor([5.0, 2.828427, 1.0]))


def test_gradient_of_a_component_is_the_sum_over_its_groups():
    torch.manual_seed(0)
    u = torch.randn(5, 4, requires_grad=True)
    v = torch.randn(4, 3, requires_grad=True)
    hierarchical_group_lasso(u, v).backward()
    for b in range(4):
        by_hand = sum(u[:, b] / u[:, group:].norm() for group in range(b + 1))
        torch.testing.assert_close(u.grad[:, b], by_hand.detach())
        by_hand = sum(v[b] / v[group:].norm() for group in range(b + 1))
        torch.testing.assert_close(v.grad[b], by_hand.detach())
    equal = torch.ones(3, 6, requires_grad=True)
    hierarchical_group_lasso(equal, torch.ones(6, 2)).backward()
    sizes = equal.grad.norm(dim=0)
    assert bool((sizes[1:] > sizes[:-1]).all())


def test_gradient_at_zero_is_zero():
    u, v = torch.zeros(3, 2, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    hierarchical_group_lasso(u, v).backward()
    assert torch.equal(u.grad, torch.zeros(3, 2))
    assert torch.equal(v.grad, torch.zeros(2, 3))


# Layers

LAYERS = [
    (lambda: nn.Linear(7, 5), (3, 4, 7)),
    (lambda: nn.Linear(5, 9, bias=False), (2, 5)),
    (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 9, 8)),
    (lambda: nn.Conv2d(4, 6, (3, 1), padding="same", dilation=(2, 1), bias=False), (2, 4, 6, 5)),
    (lambda: nn.Conv2d(4, 5, 3, padding=2, padding_mode="circular"), (2, 4, 6, 5)),
    (lambda: nn.Conv2d(4, 3, 1, stride=(1, 2)), (1, 4, 5, 6)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_full_rank_is_the_layer_and_export_is_the_truncation(make, shape):
    dense = seeded(make)
    x = torch.randn(shape)
    layer = LowRankLayer(dense)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-5, rtol=1e-5)
    assert layer.full_rank == min(dense.weight.flatten(1).shape)
    for rank in range(layer.full_rank + 1):
        layer.rank = rank
        masked = copy.deepcopy(layer)
        masked.rank = layer.full_rank
        with torch.no_grad():
            masked.u[:, rank:] = 0
            masked.v[rank:] = 0
        torch.testing.assert_close(layer(x), masked(x), atol=1e-5, rtol=1e-5)
        exported = layer.exported()
        torch.testing.assert_close(exported(x), layer(x), atol=1e-5, rtol=1e-5)
        if rank:
            weights = sum(p.numel() for p in exported.parameters())
            assert weights == layer.size_at(rank) + (0 if layer.bias is None else len(layer.bias))
    assert isinstance(exported, type(dense))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_without_components_the_bias_is_left_at_the_right_size(make, shape):
    dense = seeded(make)
    layer = LowRankLayer(dense)
    layer.rank = 0
    x = torch.randn(shape)
    with torch.no_grad():
        dense.weight.zero_()
    assert torch.equal(layer(x), dense(x))
    assert isinstance(layer.exported(), BiasOnly)
    assert torch.equal(layer.exported()(x), dense(x))


def test_a_pass_uses_exactly_the_first_components():
    layer = LowRankLayer(seeded(lambda: nn.Linear(6, 8)))
    x = torch.randn(4, 6)
    for rank in range(1, 7):
        layer.zero_grad()
        layer.sampled = rank
        layer(x).square().sum().backward()
        assert bool((layer.u.grad[:, :rank] != 0).any(0).all())
        assert bool((layer.v.grad[:rank] != 0).any(1).all())
        assert not layer.u.grad[:, rank:].any() and not layer.v.grad[rank:].any()


def test_break_even():
    conv = LowRankLayer(nn.Conv2d(64, 64, 3))
    assert conv.size_at(57) == 57 * (576 + 64) < 64 * 576 == conv.size_at(58)
    linear = LowRankLayer(nn.Linear(128, 128))
    assert linear.size_at(63) == 63 * 256 < 128 * 128 == linear.size_at(64)
    linear.rank = 63
    assert isinstance(linear.exported(), nn.Sequential)
    linear.rank = 64
    assert type(linear.exported()) is nn.Linear


# Sampling


def test_every_pair_comes_once_a_cycle():
    sampler = PairSampler({"a": 3, "b": 0, "c": 5})
    assert len(sampler) == 8
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        drawn = [next(iter(sampler.draw(generator).items())) for _ in range(8)]
        assert sorted(drawn) == [("a", b) for b in (1, 2, 3)] + [("c", b) for b in range(1, 6)]
    assert PairSampler({"a": 0}).draw() == {}


def test_order_of_pairs_is_uniform():
    sampler = PairSampler({"a": 2, "b": 2})
    generator = torch.Generator().manual_seed(0)
    first = []
    for _ in range(2000):
        first.append(str(sampler.draw(generator)))
        for _ in range(3):
            sampler.draw(generator)
    counts = [first.count(pair) for pair in sorted(set(first))]
    assert len(counts) == 4
    assert max(abs(c - 500) for c in counts) < 5 * math.sqrt(2000 * 0.25 * 0.75)


def test_steps_truncate_one_layer_and_count_their_macs(task):
    network = decompose(mlp((64, 12, 8, 10)), task.example_inputs)
    rule = LowRankTraining(network, task, lam=0.0, eps=0.0)
    seen, expected = [], 0
    draw = rule.draw

    def noted():
        seen.append(draw())
        return seen[-1]

    rule.draw = noted
    fit(rule, task, epochs=4, batch_size=64, seed=0)
    pairs = [pair for ranks in seen for pair in ranks.items()]
    assert len(pairs) == len(seen) == 20
    assert sorted(pairs) == [("1", b) for b in range(1, 13)] + [("3", b) for b in range(1, 9)]
    sizes = [len(batch[0]) for batch in task.batches("train", batch_size=64)] * 4
    for (name, rank), samples in zip(pairs, sizes, strict=True):
        ranks = {"1": 12, "3": 8} | {name: rank}
        expected += samples * (ranks["1"] * (64 + 12) + ranks["3"] * (12 + 8) + 80)
    assert rule.macs == expected


# Networks


def test_decomposed_counts_what_its_export_costs():
    module = seeded(digits_resnet).eval()
    x = torch.randn(2, 1, 8, 8)
    network = decompose(module, (x,))
    assert network.dense == {"linear": "last"}
    torch.testing.assert_close(network(x), module(x), atol=1e-4, rtol=1e-4)
    assert network.parameters_at() == sum(p.numel() for p in module.parameters())
    assert network.macs_at() == Graph.trace(module, (x,)).macs
    generator = torch.Generator().manual_seed(0)
    ranks = {
        name: int(torch.randint(0, full + 1, (), generator=generator))
        for name, full in network.full_ranks().items()
    }
    ranks["layer1.0.conv1"] = 0
    network.set_ranks(ranks)
    small = network.export()
    torch.testing.assert_close(small(x), network(x), atol=1e-5, rtol=1e-5)
    assert network.parameters_at() == sum(p.numel() for p in small.parameters())
    assert network.macs_at() == Graph.trace(small, (x,)).macs
    assert network.macs_at(factorised=True) >= network.macs_at()
    assert network.ranks() == ranks


class Odd(nn.Module):
    """Layers that must stay dense, and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.last = nn.Linear(11, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.again(torch.relu(self.twice(x)))
        x = self.grouped(x.unflatten(2, (4, 2)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.last(self.head(self.normed(x)).mean(1))


def test_what_cannot_be_factorised_stays_dense():
    module = seeded(Odd).eval()
    tokens = torch.randint(0, 11, (2, 6))
    network = decompose(module, (tokens,))
    assert network.dense == {
        "attention.out_proj": "not called by its parent",
        "grouped": "grouped, or with a forward of its own",
        "normed": "grouped, or with a forward of its own",
        "head": "tied",
        "last": "last",
    }
    assert list(network.layers) == ["twice"] and network.uses == {"twice": 12}
    assert network.network.again is network.network.twice
    torch.testing.assert_close(network(tokens), module(tokens), atol=1e-5, rtol=1e-5)
    network.set_ranks({"twice": 2})
    small = network.export()
    assert small.again is small.twice
    torch.testing.assert_close(small(tokens), network(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedError, match="no linear layer"):
        decompose(module, (tokens,), skip=["twice"])


def test_a_network_that_runs_a_graph_is_factorised():
    module = seeded(digits_resnet).eval()
    x = torch.randn(2, 1, 8, 8)
    traced = Graph.trace(module, (x,)).network().eval()
    network = decompose(traced, (x,), skip=["conv1"])
    own = decompose(module, (x,), skip=["conv1"])
    assert len(network.layers) == len(own.layers) == 14
    torch.testing.assert_close(network(x), module(x), atol=1e-4, rtol=1e-4)
    for one in (network, own):
        one.set_ranks(one.share_of_ranks(0.3))
    assert network.parameters_at() == own.parameters_at()
    assert network.macs_at() == own.macs_at()
    torch.testing.assert_close(network.export()(x), own(x), atol=1e-4, rtol=1e-4)
    assert isinstance(traced.program.get_submodule("conv1"), nn.Module)
    assert Graph.trace(network.export(), (x,)).macs == own.macs_at()


def test_components_leave_by_their_importance():
    """Greedy removal by hand, one component at a time."""
    network = decompose(seeded(lambda: mlp((64, 12, 8, 10))), (torch.randn(2, 64),))
    limit = 700
    ranks = network.ranks()
    while network.parameters_at(ranks) > limit:
        last = {
            name: float(importance(layer.u, layer.v).detach()[ranks[name] - 1])
            for name, layer in network.layers.items()
            if ranks[name] > 1
        }
        ranks[min(last, key=last.__getitem__)] -= 1
    found = network.ranks_within(limit, network.parameters_at)
    assert found == ranks
    assert network.parameters_at(found) <= limit
    with pytest.raises(BudgetError, match=r"nearest.*one component"):
        network.ranks_within(100, network.parameters_at)
    halved = network.ranks_within(network.parameters_at({"1": 6, "3": 4}), network.parameters_at,
                                  order="uniform")  # fmt: skip
    assert halved == {"1": 6, "3": 4}


# Training


def test_without_penalty_and_threshold_ranks_stay(task):
    network = decompose(mlp((64, 12, 8, 10)), task.example_inputs)
    rule = LowRankTraining(network, task, lam=0.0, eps=0.0)
    fit(rule, task, epochs=3, batch_size=64, seed=0)
    assert network.ranks() == {"1": 12, "3": 8}
    assert rule.history == [[12, 8]] * 3


def test_a_huge_penalty_leaves_the_biases(task):
    network = decompose(seeded(lambda: mlp((64, 12, 8, 10))), task.example_inputs)
    rule = LowRankTraining(
        network, task, lam=3.0, optimizer=published_sgd(network, lr=0.02), eps=1e-3
    )
    fit(rule, task, epochs=25, batch_size=64, seed=0)
    assert network.ranks() == {"1": 0, "3": 0}
    assert len(rule.pairs) == 0
    totals = [sum(ranks) for ranks in rule.history]
    assert totals == sorted(totals, reverse=True) and totals[0] > 0
    x = torch.randn(3, 1, 8, 8)
    constant_logits = network.network[5](torch.relu(network.layers["3"].bias))
    torch.testing.assert_close(network(x), constant_logits.expand(3, -1))
    torch.testing.assert_close(network.export()(x), network(x))


def test_shrinking_rebuilds_the_sampler(task):
    network = decompose(seeded(lambda: mlp((64, 32, 16, 10))), task.example_inputs)
    rule = LowRankTraining(
        network, task, lam=3e-3, optimizer=published_sgd(network, lr=0.05), eps=1e-2
    )
    fit(rule, task, epochs=12, batch_size=32, seed=0)
    ranks = network.ranks()
    assert 0 < sum(ranks.values()) < 48
    assert len(rule.pairs) == sum(ranks.values())
    assert list(ranks.values()) == rule.history[-1]


def test_components_of_a_linear_teacher_are_ordered():
    """On Gaussian inputs the norms fall, and the leading ones are the teacher's."""
    from gossamer.experiments.compress.low_rank import LeastSquares

    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    teacher = left[:, :6] @ torch.diag(torch.tensor([6.0, 4.0, 2.5, 1.5, 0.8, 0.4])) @ right
    inputs = torch.randn(512, 6, generator=generator)
    task = LeastSquares(inputs, inputs @ teacher.T)
    network = decompose(
        seeded(lambda: nn.Sequential(nn.Linear(6, 8, bias=False))), (inputs[:2],), last=True
    )
    rule = LowRankTraining(
        network, task, lam=0.0, eps=0.0, schedule=constant,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.05),
    )  # fmt: skip
    fit(rule, task, epochs=800, batch_size=512, seed=0)
    layer = network.layers["0"]
    norms = importance(layer.u, layer.v, hierarchical=False).detach()
    assert bool((norms[1:] <= norms[:-1]).all())
    expected = torch.tensor([6.0, 4.0, 2.5, 1.5, 0.8, 0.4])
    torch.testing.assert_close(norms, expected, atol=0.1, rtol=0.05)


def test_statistics_are_those_of_the_whole_network(task):
    network = decompose(seeded(lambda: mlp((64, 16, 10), norm=True)), task.example_inputs)
    fit(LowRankTraining(network, task, lam=0.0), task, epochs=2, batch_size=64, seed=0)
    norm = network.network[2]
    batches = [b[0] for b in task.batches("train", batch_size=128)][:2]
    with torch.no_grad():
        means = torch.stack([network.network[1](x.flatten(1)).mean(0) for x in batches])
    torch.testing.assert_close(norm.running_mean, means.mean(0), atol=1e-5, rtol=1e-4)


def test_full_pass_teaches_the_truncated_one(task):
    """One step by hand: labels for the whole network, its answers for the truncated one."""
    module = seeded(lambda: mlp((64, 6, 10)))
    network = decompose(module, task.example_inputs)
    by_hand = copy.deepcopy(network)
    rule = LowRankTraining(
        network, task, lam=0.5, eps=0.0, full_pass=True, schedule=constant,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
    )  # fmt: skip
    drawn = []
    draw = rule.draw
    rule.draw = lambda: drawn.append(draw()) or drawn[-1]
    fit(rule, task, epochs=1, batch_size=5000, seed=0)
    batch = next(iter(task.batches("train", batch_size=5000, seed=0)))
    whole = by_hand(batch[0])
    with by_hand.sampled(drawn[0]):
        cut = by_hand(batch[0])
    loss = nn.functional.cross_entropy(whole, batch[1])
    loss = loss - (whole.detach().softmax(1) * cut.log_softmax(1)).sum(1).mean()
    loss = loss + 0.5 * by_hand.penalty()
    loss.backward()
    pairs = zip(network.parameters(), by_hand.parameters(), strict=True)
    for new, old in pairs:
        torch.testing.assert_close(new, old - 0.1 * old.grad)


def test_killed_and_resumed_is_bitwise_the_same(task, tmp_path):
    def rule():
        network = decompose(seeded(lambda: mlp((64, 24, 16, 10))), task.example_inputs)
        return LowRankTraining(
            network, task, lam=1e-2, eps=3e-2, optimizer=published_sgd(network, lr=0.05)
        )

    whole, resumed = whole_and_resumed(
        rule, task, dies_at=33, file=tmp_path / "state.safetensors", epochs=8, batch_size=64, seed=5
    )
    assert resumed.network.ranks() == whole.network.ranks()
    assert sum(whole.network.ranks().values()) < 40
    assert resumed.macs == whole.macs and resumed.history == whole.history
    ours, theirs = whole.network.state_dict(), resumed.network.state_dict()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_schedule_is_the_published_one():
    assert [two_drops(f) for f in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [
        1.0, 1.0, 0.1, 0.1, 0.01, 0.01,
    ]  # fmt: skip


def test_search_finds_the_smallest_penalty(task):
    tried = []

    def train(network: Decomposed, lam: float) -> None:
        tried.append(lam)
        network.set_ranks({"1": max(1, round(12 * (1 - lam / 1e-2)))})

    found = search_lam(
        mlp((64, 12, 10)), task, train, 6 * 76 + 12 + 130, lambda n: n.parameters_at(), trials=20
    )
    assert len(tried) == 20
    assert found == pytest.approx(1e-2 * (1 - 6.5 / 12), rel=0.01)


# Steps


@pytest.mark.parametrize(("target", "share"), [("macs", 0.5), ("rank", 0.25)])
def test_steps_meet_their_target(task, trained, target, share, tmp_path):
    network = Network(trained, task.example_inputs)
    before = copy.deepcopy(trained.state_dict())
    made = low_rank(
        network, task, **{target: share}, epochs=4, lr=0.02, batch_size=64, tune_epochs=1
    )
    cut = svd(network, task, **{target: share})
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name])
    dense = Graph.trace(trained, task.example_inputs)
    for result in (made, cut):
        graph = Graph.trace(result.module, task.example_inputs)
        report = result.steps[-1]["report"]
        assert report["parameters"] == [dense.parameters, graph.parameters]
        assert report["macs"] == [dense.macs, graph.macs]
        if target == "rank":
            assert report["ranks"] == {"1": "8 of 32", "4": "8 of 32"}
        else:
            assert getattr(graph, target) <= share * getattr(dense, target)
        assert task.score(result.module) > 60  # a tenth by chance
        assert result.runtime == "onnxruntime"
    write_onnx(network, tmp_path / "a.onnx")
    write_onnx(made, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").stat().st_size < (tmp_path / "a.onnx").stat().st_size
    assert task.score(OnnxRunner(tmp_path / "b.onnx")) == task.score(made.module)


def test_automatic_penalty_reaches_the_target(task, trained):
    network = Network(trained, task.example_inputs)
    made = low_rank(
        network, task, parameters=0.8, lam="auto", search_epochs=4, epochs=8, lr=0.05, eps=0.1,
        batch_size=32,
    )  # fmt: skip
    record = made.steps[-1]
    assert 1e-6 < record["options"]["lam"] < 0.1
    before, after = record["report"]["parameters"]
    assert after <= 0.8 * before


def test_energy_is_that_of_the_singular_values(task, trained):
    network = Network(trained, task.example_inputs)
    made = svd(network, task, energy=0.9)
    for name, text in made.steps[-1]["report"]["ranks"].items():
        weight = trained.get_submodule(name).weight.detach().double().numpy()
        values = np.linalg.svd(weight, compute_uv=False) ** 2
        rank = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9)) + 1
        assert text == f"{rank} of {len(values)}"


def test_svd_is_the_best_approximation(task, trained):
    made = svd(Network(trained, task.example_inputs), task, rank=0.25)
    weight = trained[1].weight.detach().numpy()
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    best = (left[:, :8] * values[:8]) @ right[:8]
    found = (made.module[1][1].weight @ made.module[1][0].weight).detach().numpy()
    np.testing.assert_allclose(found, best, atol=1e-5)


def test_pufferfish_is_a_setting(task, trained):
    made = low_rank(
        Network(trained, task.example_inputs), task, start=0.25, sampler="full", lam=0.0, eps=0.0,
        dense_epochs=1, epochs=2, lr=0.02, skip=["1"],
    )  # fmt: skip
    report = made.steps[-1]["report"]
    assert report["ranks"] == {"4": "8 of 32"}
    assert report["dense"] == {"1": "skipped", "7": "last"}


def test_steps_chain_inside_shrink(task, tmp_path):
    module = seeded(lambda: digits_resnet((4, 8), blocks_per_stage=1))
    recipe = Recipe.of(
        ("svd", {"macs": 0.8}),
        ("low-rank", {"parameters": 0.7, "epochs": 2, "lr": 0.02}),
        ("prune", {"units": 0.9, "epochs": 0}),
        "int8",
    )
    result = gossamer.shrink(
        module, task, recipe=recipe, trained=False, epochs=2, out=tmp_path / "out", cpu=True
    )
    assert result.report["verified"]
    first, second = (step["report"] for step in result.report["steps"][:2])
    assert first["macs"][1] <= 0.8 * first["macs"][0]
    assert second["parameters"][0] == first["parameters"][1]
    assert result.report["after"]["params"] <= second["parameters"][1]


@pytest.mark.parametrize(
    ("step", "options", "words"),
    [
        (low_rank, {"rank": 0.5, "macs": 0.5}, "one target"),
        (low_rank, {"parameters": 0.0}, r"share in \(0, 1\]"),
        (low_rank, {"lam": "auto", "rank": 0.5}, "needs a target"),
        (low_rank, {"lam": -1.0}, "0 or more"),
        (low_rank, {"epochs": -1}, "negative"),
        (low_rank, {"start": 1.5}, "full rank"),
        (low_rank, {"skip": ["nowhere"]}, "no module nowhere"),
        (svd, {"energy": 1.5}, "energy must"),
        (svd, {"energy": 0.5, "rank": 0.5}, "one target"),
        (svd, {"epochs": -1}, "negative"),
    ],
)
def test_bad_options_are_one_sentence(task, trained, step, options, words):
    with pytest.raises(InputError, match=words) as caught:
        step(Network(trained, task.example_inputs), task, **options)
    assert "\n" not in str(caught.value)


def test_targets_out_of_reach_name_the_nearest(task, trained):
    with pytest.raises(BudgetError, match="nearest"):
        svd(Network(trained, task.example_inputs), task, parameters=0.01)
    with pytest.raises(UnsupportedError, match="no linear layer"):
        svd(Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), task.example_inputs), task)
    network = decompose(trained, task.example_inputs)
    with pytest.raises(InputError, match="no low-rank layer"):
        network.set_ranks({"9": 1})
    with pytest.raises(InputError, match="has 32 components"):
        network.set_ranks({"1": 33})
