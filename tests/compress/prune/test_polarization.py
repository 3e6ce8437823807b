import copy
import math

import pytest
import torch
from torch import nn

import gossamer
from gossamer.compress.prune.polarization import (
    SETTLED,
    ConsensusTraining,
    Gate,
    activation,
    consensus,
    consensus_gap,
    find_channels,
    find_residuals,
    gate,
    polarization,
    scaling_penalty,
    settle,
)
from gossamer.compress.recipe import Recipe
from gossamer.core.dependency import analyse
from gossamer.core.errors import BudgetError, InputError, UnsupportedError
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.fit import constant, fit
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import evaluating
from gossamer.datasets.digits import digits
from gossamer.models.plain import mlp
from gossamer.models.resnet import digits_resnet
from tests.resuming import whole_and_resumed

EXAMPLE = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 0, 1], [1, 0, 0]])
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return digits(seed=0, limit=300)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.outer = nn.Linear(width, width)

    def forward(self, x):
        return x + self.outer(torch.relu(self.norm(self.inner(x))))


def perceptron(blocks=4, width=16, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = [Block(width) for _ in range(blocks)]
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), *parts, nn.Linear(width, 10))


def resnet(seed=0, **options):
    """With statistics and scales that are not those of the start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = digits_resnet((4, 8), blocks_per_stage=3, **options)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, std=0.1)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.1)
    return module.eval()


def answers(module, inputs=IMAGES):
    with evaluating(module):
        return module(inputs).clone()


# Losses


def test_worked_example_of_the_losses():
    means = EXAMPLE.mean(0).requires_grad_()
    assert means.tolist() == [1.0, 0.0, 0.5]
    polar = polarization(means)
    assert polar.item() == pytest.approx(0.083333, abs=1e-6)
    assert activation(means).item() == 0.5
    polar.backward()
    torch.testing.assert_close(means.grad, torch.tensor([-1 / 3, 1 / 3, 0.0]))
    assert polarization(torch.ones(3)) == 0 and activation(torch.ones(3)) == 1
    assert consensus_gap(means.detach()) == pytest.approx(0.5 / 3)
    weights = torch.tensor([0.5, 0.3, 0.2])
    assert activation(means, weights).item() == pytest.approx(0.6)


def test_gradient_of_a_sample_is_that_of_the_formula():
    """(lambda_act + lambda_polar (1 - 2 mean)) / (gates samples)."""
    network = gate(perceptron(3), (IMAGES,))
    rule = ConsensusTraining(
        network, digits(limit=100), lambda_act=0.7, lambda_polar=0.4, ramp="none", weight_by="none"
    )
    decided = EXAMPLE.clone().requires_grad_()
    rule.regularizer(decided.mean(0), 0.0).backward()
    expected = (0.7 + 0.4 * (1 - 2 * EXAMPLE.mean(0))) / (3 * 4)
    torch.testing.assert_close(decided.grad, expected.expand(4, 3))


def test_ramps_and_targets():
    network = gate(perceptron(3), (IMAGES,))
    task = digits(limit=100)
    linear = ConsensusTraining(network, task, lambda_polar=3.0)
    assert linear.polar_weight(0.0) == 0.0
    assert linear.polar_weight(SETTLED / 2) == pytest.approx(1.5)
    assert linear.polar_weight(SETTLED) == linear.polar_weight(1.0) == 3.0
    steered = ConsensusTraining(network, task, lambda_polar=3.0, target=0.5, control="integral")
    assert steered.lambda_act == 0.0
    assert steered.polar_weight(SETTLED) == 0.0
    assert steered.polar_weight(1.0) == pytest.approx(3.0)
    distance = ConsensusTraining(network, task, lambda_act=2.0, lambda_polar=0.0, target=0.25)
    assert distance.regularizer(torch.full((3,), 0.75), 0.5).item() == pytest.approx(1.0)
    assert distance.regularizer(torch.full((3,), 0.05), 0.5).item() == pytest.approx(0.4)


def test_penalties_on_scales():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(1, affine=False), nn.BatchNorm1d(2))
    network[0].weight.data = torch.tensor([1.0, -2.0])
    network[2].weight.data = torch.tensor([3.0, 0.0])
    assert scaling_penalty(network).item() == 6.0
    # the mean is .5: distances .5, 2.5, 2.5, .5
    assert scaling_penalty(network, t=1.2).item() == pytest.approx(1.2 * 6 - 6)


# Gates


@pytest.mark.parametrize(("kind", "slope"), [("straight", 0.7 * 0.3), ("hard", 1 / 6)])
def test_steps_pass_the_gradient(kind, slope):
    part = Gate(4, 1, 1, binarize=kind)
    logit = torch.tensor([[math.log(0.7 / 0.3)]], requires_grad=True)
    decided = part.decide(logit)
    assert decided.item() == 1.0
    (2 * decided).backward()
    assert logit.grad.item() == pytest.approx(2 * slope, abs=1e-6)
    assert part.decide(-logit.detach()).item() == 0.0


def test_gumbel_gates_are_random_only_in_training():
    part = Gate(4, 1, 1, binarize="gumbel")
    logits = torch.full((4000, 1), math.log(0.8 / 0.2))
    torch.manual_seed(0)
    share = part.train().decide(logits).mean().item()
    assert share == pytest.approx(0.8, abs=0.03)
    assert bool((part.eval().decide(logits) == 1).all())
    assert not part.decide(-logits).any()


def test_gates_start_open_or_half_open():
    x = torch.randn(500, 64)
    open_share = {}
    for bias in (3.0, 0.0, -3.0):
        torch.manual_seed(0)
        part = Gate(64, 1, 20, bias=bias)
        open_share[bias] = part(x).mean().item()
    assert open_share[3.0] > 0.95 and open_share[-3.0] < 0.05
    assert 0.2 < open_share[0.0] < 0.8


def test_the_gate_sees_the_pooled_input():
    part = Gate(3, 1, 1).eval()
    x = torch.randn(2, 3, 4, 5)
    part(x)
    shuffled = x.flatten(2)[:, :, torch.randperm(20)].view_as(x)
    seen = []
    part.inner.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    part(x)
    part(shuffled)
    torch.testing.assert_close(seen[0], x.mean((2, 3)))
    torch.testing.assert_close(seen[0], seen[1])


# Finding blocks


def test_blocks_whose_shortcut_is_the_identity_are_found():
    graph = Graph.trace(resnet(), (IMAGES,))
    blocks = find_residuals(graph)
    assert [b.module for b in blocks] == [
        "layer1.0",
        "layer1.1",
        "layer1.2",
        "layer2.1",
        "layer2.2",
    ]
    by_hand = {"layer1": 2 * 9 * 4 * 4 * 64, "layer2": 2 * 9 * 8 * 8 * 16}
    assert [b.macs for b in blocks] == [by_hand[b.module[:6]] for b in blocks]
    assert [(b.features, b.axis) for b in blocks] == [(4, 1)] * 3 + [(8, 1)] * 2
    assert len(find_residuals(graph, exclude=["layer1", "layer2.1"])) == 1


class Tricky(nn.Module):
    """Nested additions, a sum that is no block, and a shortcut that is written into."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.d = nn.Linear(8, 8)
        self.e = nn.Linear(64, 8)

    def forward(self, x):
        x = self.e(x.flatten(1))
        y = self.a(x)
        x = x + self.b(y + self.c(y))  # the outer addition is not gated
        x = self.d(x) + self.a(x)  # no identity
        return x + self.d(torch.relu_(x))


def test_what_is_no_block():
    torch.manual_seed(0)
    module = Tricky().eval()
    blocks = find_residuals(Graph.trace(module, (IMAGES,)))
    assert [block.macs for block in blocks] == [64, 64]  # y + c(y), and the last one
    gated = gate(module, (IMAGES,))
    for pattern in ([1, 0], [0, 1], [0, 0]):
        keep = torch.tensor(pattern, dtype=torch.bool)
        gated.force(keep)
        made = gated.extract(keep)
        torch.testing.assert_close(answers(made.module), answers(gated), atol=1e-6, rtol=1e-6)
        assert made.way == "graph"


@pytest.mark.parametrize("mode", ["layer", "channel"])
def test_open_gates_are_the_network_itself(mode):
    module = resnet()
    gated = gate(module, (IMAGES,), mode=mode)
    gated.force(torch.ones(sum(gated.counts)))
    torch.testing.assert_close(answers(gated), answers(module), atol=1e-6, rtol=1e-6)
    assert gated.macs == Graph.trace(module, (IMAGES,)).macs
    assert float(gated.shares.sum()) == pytest.approx(1.0)


def test_closed_gates_leave_the_shortcuts():
    module = perceptron()
    gated = gate(module, (IMAGES,))
    gated.force(torch.zeros(4))
    shortcut = module[-1](module[1](IMAGES.flatten(1)))
    torch.testing.assert_close(answers(gated), shortcut.detach())
    one = torch.tensor([0.0, 0.0, 1.0, 0.0])
    gated.force(one)
    expected = module.eval()[-1](module[4](module[1](IMAGES.flatten(1))))
    torch.testing.assert_close(answers(gated), expected.detach())


def test_gates_decide_for_each_input_alone():
    gated = gate(perceptron(), (IMAGES,), bias=0.0).eval()
    together = answers(gated)
    decisions = gated.decided()
    assert 0 < decisions.mean() < 1 and decisions.shape == (6, 4)
    for i in range(6):
        torch.testing.assert_close(answers(gated, IMAGES[i : i + 1])[0], together[i])
        assert torch.equal(gated.decided()[0], decisions[i])


# Cutting


@pytest.mark.parametrize("pattern", ["00100", "01011", "10110", "00000", "11111"])
def test_static_blocks_answer_as_the_gated_network(pattern):
    module = resnet()
    gated = gate(module, (IMAGES,))
    keep = torch.tensor([c == "1" for c in pattern])
    gated.force(keep)
    made = gated.extract(keep)
    torch.testing.assert_close(answers(made.module), answers(gated), atol=1e-6, rtol=1e-6)
    assert made.way == "modules" and type(made.module) is type(module)
    kept = Graph.trace(made.module, (IMAGES,))
    assert kept.macs == pytest.approx(gated.expected_macs(keep.float()) - gated.gate_macs)
    names = set(made.module.state_dict())
    assert names <= set(module.state_dict())
    for block, stays in zip(gated.residuals, keep.tolist(), strict=True):
        assert any(name.startswith(block.module + ".") for name in names) == stays


def test_static_channels_answer_as_the_gated_network():
    """Rows of the inner convolution, its norm and columns of the next leave."""
    module = resnet()
    gated = gate(module, (IMAGES,), mode="channel")
    assert gated.counts == [4, 4, 4, 8, 8]
    keep = torch.rand(28, generator=torch.Generator().manual_seed(1)) > 0.4
    gated.force(keep)
    made = gated.extract(keep)
    torch.testing.assert_close(answers(made.module), answers(gated), atol=1e-5, rtol=1e-5)
    for block, stays in zip(gated.residuals, keep.split(gated.counts), strict=True):
        part = made.module.get_submodule(block.module)
        old = module.get_submodule(block.module)
        assert torch.equal(part.conv1.weight, old.conv1.weight[stays])
        assert torch.equal(part.bn1.running_mean, old.bn1.running_mean[stays])
        assert torch.equal(part.conv2.weight, old.conv2.weight[:, stays])
        assert torch.equal(part.bn2.weight, old.bn2.weight)
    macs = Graph.trace(made.module, (IMAGES,)).macs
    assert macs == pytest.approx(gated.expected_macs(keep.float()) - gated.gate_macs)


def test_blocks_of_a_graph_leave_too():
    module = resnet()
    traced = Graph.trace(module, (IMAGES,)).network().eval()
    gated = gate(traced, (IMAGES,))
    keep = torch.tensor([True, False, False, False, True])
    made = gated.extract(keep)
    assert made.way == "graph"
    own = gate(module, (IMAGES,)).extract(keep)
    torch.testing.assert_close(answers(made.module), answers(own.module), atol=1e-6, rtol=1e-6)
    macs = Graph.trace(own.module, (IMAGES,)).macs
    assert Graph.trace(made.module, (IMAGES,)).macs == macs
    count = sum(p.numel() for p in own.module.parameters())
    assert sum(p.numel() for p in made.module.parameters()) == count


class Inplace(nn.Module):
    """A block with operators that write into their input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.act(self.stem(x))
        for layer in (self.one, self.two):
            y = self.act(layer(x))
            y = layer(y)
            y += x
            x = self.act(y)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("pattern", [[True, False], [False, True], [False, False]])
def test_operators_in_place(pattern):
    torch.manual_seed(0)
    module = Inplace().eval()
    gated = gate(module, (IMAGES,))
    keep = torch.tensor(pattern)
    gated.force(keep)
    made = gated.extract(keep)
    torch.testing.assert_close(answers(made.module), answers(gated), atol=1e-6, rtol=1e-6)
    assert Graph.trace(made.module, (IMAGES,)).macs < gated.macs


class Attention(nn.Module):
    """Queries meet keys: only the perceptron has channels that can leave alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.embed(x.squeeze(1))
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.mean(1))


def test_channels_beside_attention():
    torch.manual_seed(0)
    module = Attention().eval()
    dependency = analyse(module, (IMAGES,))
    groups = find_channels(dependency, find_residuals(dependency.graph))
    assert [(g.block, g.units, next(iter(g.readers.values()))[0]) for g in groups] == [(1, 20, 2)]
    assert groups[0].macs == 8 * (12 + 12)
    gated = gate(module, (IMAGES,), mode="channel")
    keep = torch.rand(20, generator=torch.Generator().manual_seed(0)) > 0.5
    gated.force(keep)
    made = gated.extract(keep)
    torch.testing.assert_close(answers(made.module), answers(gated), atol=1e-5, rtol=1e-5)
    blocks = gate(module, (IMAGES,))
    keep = torch.tensor([False, True])
    blocks.force(keep)
    made = blocks.extract(keep)
    torch.testing.assert_close(answers(made.module), answers(blocks), atol=1e-6, rtol=1e-6)
    assert made.way == "graph"  # one of two blocks in one module


def test_a_stage_keeps_a_block_and_a_group_a_channel():
    gated = gate(resnet(), (IMAGES,))
    means = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.0])
    assert gated.pattern(means).tolist() == [False, True, False, True, False]
    gated = gate(resnet(), (IMAGES,), mode="channel")
    means = torch.zeros(28)
    means[2] = 0.3
    assert gated.pattern(means).split(gated.counts)[0].tolist() == [False, False, True, False]
    assert int(gated.pattern(means).sum()) == 5
    with pytest.raises(InputError, match="pattern has 3"):
        gated.extract(torch.ones(3, dtype=torch.bool))


# Training


@pytest.mark.parametrize(("act", "polar", "falls"), [(1.0, 0.8, True), (1.0, 1.2, False)])
def test_closing_rule(task, act, polar, falls):
    """With every gate open and no task, gates move down iff lambda_act > lambda_polar."""
    gated = gate(perceptron(), (IMAGES,), bias=2.0)

    class Indifferent(type(task)):
        def criterion(self, outputs, batch):
            return 0.0 * outputs.sum()

    indifferent = copy.copy(task)
    indifferent.__class__ = Indifferent
    rule = ConsensusTraining(
        gated, indifferent, lambda_act=act, lambda_polar=polar, ramp="none", schedule=constant,
        optimizer=torch.optim.SGD(gated.parameters(), lr=0.1),
    )  # fmt: skip
    before = [part.outer.bias.item() for part in gated._gates()]
    fit(rule, indifferent, epochs=1, batch_size=1000, seed=0)
    after = [part.outer.bias.item() for part in gated._gates()]
    assert rule.history == [1.0]
    assert all((new < old) == falls and new != old for new, old in zip(after, before, strict=True))


def test_one_pass_and_nothing_is_started_again(task):
    network = Network(perceptron(), task.example_inputs)
    before = copy.deepcopy(network.module.state_dict())
    made = consensus(network, task, epochs=3, batch_size=64, lr=0.05)
    assert made.steps[-1]["report"]["steps"] == 3 * 5
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(tensor, before[name])
    gated = gate(network.module, task.example_inputs)
    names = {id(p) for p in gated.parameters()}
    rule = ConsensusTraining(gated, task)
    fit(rule, task, epochs=1, batch_size=64, seed=0)
    assert {id(p) for p in gated.parameters()} == names


def test_consensus_learns_and_agrees(task):
    """Polarized gates agree, and then cutting changes nothing; without it they do not."""
    found = {}
    for polar in (0.0, 8.0):
        gated = gate(perceptron(6, 32), task.example_inputs, hidden=8)
        rule = ConsensusTraining(
            gated, task, lambda_act=3.0, lambda_polar=polar, schedule=constant,
            optimizer=torch.optim.Adam(gated.parameters(), lr=3e-3),
        )  # fmt: skip
        fit(rule, task, epochs=30, batch_size=64, seed=0)
        small, report = settle(gated, task)
        found[polar] = report
        assert sum(report["means"].values()) / 6 < 0.95
        if report["agreed"]:
            pair = [answers(module, IMAGES) for module in (small, gated)]
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    assert found[8.0]["gap"] < 0.01 < found[0.0]["gap"]
    assert abs(found[8.0]["static"] - found[8.0]["dynamic"]) < 1.0
    assert found[8.0]["static"] > 70
    assert 1 <= found[8.0]["kept"] < 6
    assert found[8.0]["macs"][1] < found[8.0]["macs"][0]
    assert set(found[8.0]["classes"]["gap"]) == set(task.classes)


@pytest.mark.parametrize("mode", ["layer", "channel"])
def test_a_target_is_reached(task, mode):
    gated = gate(perceptron(4, 16), task.example_inputs, mode=mode, hidden=8)
    rule = ConsensusTraining(
        gated, task, lambda_act=4.0, lambda_polar=8.0, target=0.5, schedule=constant,
        optimizer=torch.optim.Adam(gated.parameters(), lr=3e-3),
    )  # fmt: skip
    fit(rule, task, epochs=25, batch_size=64, seed=0)
    gates = sum(gated.counts)
    assert rule.history[-1] == pytest.approx(0.5, abs=1 / gates)
    keep = gated.pattern(gated.means(task).all)
    assert abs(int(keep.sum()) - gates // 2) <= 1


def test_integral_control_follows_a_line_and_stops(task):
    gated = gate(perceptron(), task.example_inputs)
    rule = ConsensusTraining(gated, task, target=0.4, control="integral", gain=2.0)
    rule.run = type("Run", (), {"epochs": 9, "epoch": 0})()
    rule._open = [9.0, 10.0]
    rule.end_epoch()  # wanted after a ninth: 1 - .6 / 6 = .9
    assert rule.lambda_act == pytest.approx(0.0, abs=1e-9)
    rule.run.epoch = 2
    rule._open = [9.0, 10.0]
    rule.end_epoch()  # wanted: .7
    assert rule.lambda_act == pytest.approx(2.0 * 0.2)
    rule._open = [3.9, 10.0]
    rule.end_epoch()
    assert rule.lambda_act == 0.0
    assert rule.history == [0.9, 0.9, 0.39]


def test_averages_over_a_split(task):
    gated = gate(perceptron(), task.example_inputs, bias=0.0)
    means = gated.means(task, "validation", batch_size=50)
    gated.eval()
    inputs, labels = next(iter(task.batches("validation", batch_size=1000)))
    answers(gated, inputs)
    decided = gated.decided()
    torch.testing.assert_close(means.all, decided.mean(0))
    for k in range(10):
        torch.testing.assert_close(means.by_class[k], decided[labels == k].mean(0))
    assert not gated.training


def test_killed_and_resumed_is_bitwise_the_same(task, tmp_path):
    def rule():
        gated = gate(perceptron(), task.example_inputs, binarize="gumbel")
        return ConsensusTraining(gated, task, target=0.5, control="integral", gain=5.0)

    whole, resumed = whole_and_resumed(
        rule, task, dies_at=22, file=tmp_path / "state.safetensors", epochs=6, batch_size=64, seed=5
    )
    assert resumed.lambda_act == whole.lambda_act
    assert resumed.history == whole.history and resumed.macs == whole.macs
    ours, theirs = whole.network.state_dict(), resumed.network.state_dict()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# Step


def test_step_meets_its_target_and_exports(task, tmp_path):
    network = Network(perceptron(), task.example_inputs)
    made = consensus(
        network, task, mode="channel", macs=0.75, lambda_act=4.0, lambda_polar=8.0, epochs=20,
        batch_size=64, lr=0.1,
    )  # fmt: skip
    report = made.steps[-1]["report"]
    graph = Graph.trace(made.module, task.example_inputs)
    assert report["macs"][1] == graph.macs < 0.8 * report["macs"][0]
    assert report["rounds"][0]["verified"] and made.runtime == "onnxruntime"
    write_onnx(made, tmp_path / "m.onnx")
    assert task.score(OnnxRunner(tmp_path / "m.onnx")) == pytest.approx(report["static"])
    assert not any("gate" in name for name in made.module.state_dict())


def test_step_inside_shrink(task, tmp_path):
    recipe = Recipe.of(
        ("consensus", {"epochs": 12, "batch_size": 64, "lambda_act": 4.0, "macs": 0.7}),
        ("prune", {"units": 0.8, "epochs": 0}),
        "int8",
    )
    result = gossamer.shrink(
        perceptron(), task, recipe=recipe, trained=True, out=tmp_path / "out", cpu=True
    )
    assert result.report["verified"]
    assert result.report["after"]["macs"] < result.report["before"]["macs"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"macs": 0.0}, r"share in \(0, 1\]"),
        ({"mode": "weight"}, "layer or a channel"),
        ({"binarize": "soft"}, "straight, hard or gumbel"),
        ({"hidden": 0}, "at least 1 unit"),
        ({"exclude": ["nowhere"]}, "no module nowhere"),
        ({"lambda_act": -1.0}, "0 or more"),
        ({"epochs": -1}, "0 epochs or more"),
    ],
)
def test_bad_options_are_one_sentence(task, options, words):
    with pytest.raises(InputError, match=words) as caught:
        consensus(Network(perceptron(), task.example_inputs), task, **options)
    assert "\n" not in str(caught.value)


def test_networks_that_cannot_be_gated(task):
    with pytest.raises(UnsupportedError, match="nothing to gate"):
        consensus(Network(mlp((64, 16, 10)), task.example_inputs), task)
    with pytest.raises(BudgetError, match="what has no gates takes"):
        consensus(Network(resnet(), task.example_inputs), task, macs=0.01)
