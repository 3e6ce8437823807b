"""Dead neurons are counted as by hand, and a little of each round revives them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.compress.prune.activation import (
    Plan,
    activating,
    activating_pruning,
    dead_neuron_rate,
    movement,
    run_rounds,
)
from gossamer.compress.prune.rewind import Retraining, prune_and_retrain
from gossamer.compress.prune.sparsify import allocated
from gossamer.compress.prune.weight_scores import CRITERIA, lookahead
from gossamer.compress.prune.wiring import Wiring
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.network import Network
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet, mlp
from gossamer.models.resnet import cifar_resnet
from gossamer.parts.masks import Masks


def _identity(rows: int) -> nn.Sequential:
    """Pre-activations are the inputs."""
    network = nn.Sequential(nn.Linear(rows, rows), nn.ReLU(), nn.Linear(rows, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(rows))
        network[0].bias.zero_()
        network[2].weight.fill_(1.0)
    return network


def test_dead_neurons_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0, -4.0], [2.0, 3.0, -4.0]])
    network = _identity(3)
    rates = dead_neuron_rate(network, [(z,)])
    assert (rates.total, rates.static, rates.dynamic) == pytest.approx((0.5, 0.0, 0.5))
    with torch.no_grad():
        network[0].weight[2] = 0.0
    cut = dead_neuron_rate(network, [(z,)])
    assert (cut.total, cut.static, cut.dynamic) == pytest.approx((0.5, 1 / 3, 1 / 6))
    # Nobody reads the first neuron: cut off as well.
    with torch.no_grad():
        network[2].weight[:, 0] = 0.0
    unread = dead_neuron_rate(network, [(z,)])
    assert (unread.static, unread.dynamic) == pytest.approx((2 / 3, 1 / 6))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.fill_(1.0)
    nothing = dead_neuron_rate(network, [(z,)])
    assert (nothing.static, nothing.dynamic) == (1.0, 0.0)


@given(st.integers(0, 500), st.floats(0, 1))
def test_static_and_dynamic_make_up_the_total(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = mlp((6, 5, 4, 3))
    x = torch.randn(8, 6, generator=generator)
    masks = Masks(
        network,
        {
            f"{i}.weight": torch.rand(network[i].weight.shape, generator=generator) > share
            for i in (1, 3, 5)
        },
    )
    masks.hold_weights()
    rates = dead_neuron_rate(network, [(x[:4],), (x[4:],)], masks)
    assert rates.total == pytest.approx(rates.static + rates.dynamic)
    # By hand, with hooks on the modules.
    seen: list[torch.Tensor] = []
    for layer in network:
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda m, i, o: seen.append(i[0] <= 0))
    network(x)
    kept = [masks.kept[f"{i}.weight"] for i in (1, 3, 5)]
    cut = [~kept[i].any(1) | ~kept[i + 1].any(0) for i in (0, 1)]
    dead = [flags | gone for flags, gone in zip(seen, cut, strict=True)]
    expected = sum(int(d.sum()) for d in dead) / sum(d.numel() for d in dead)
    assert rates.total == pytest.approx(expected)


def test_channels_count_at_every_position_and_through_pools_and_shortcuts() -> None:
    torch.manual_seed(0)
    network = ConvNet(1, 8, (4, "pool"), (5,)).eval()
    with torch.no_grad():
        # Nobody reads channel 2 after flattening: 16 columns a channel.
        network[5].weight[:, 32:48] = 0.0
    x = torch.randn(6, 1, 8, 8)
    rates = dead_neuron_rate(network, [(x,)])
    z = network[1](network[0](x))
    alive = torch.tensor([True, True, False, True])
    hidden = network[5](network[3](z.relu()).flatten(1))
    count = 6 * (4 * 64 + 5)
    dynamic = int((z <= 0)[:, alive].sum()) + int((hidden <= 0).sum())
    assert rates.static == pytest.approx(6 * 64 / count)
    assert rates.dynamic == pytest.approx(dynamic / count)
    shortcut = cifar_resnet(8)
    wiring = Wiring.of(shortcut, (torch.randn(2, 3, 32, 32),))
    # The stem's ReLU is read by the first block and by its shortcut: something else reads it.
    assert wiring.rectifiers[0].producers == ["conv1.weight"]
    assert wiring.rectifiers[0].consumers is None
    inside = wiring.rectifiers[1]
    assert inside.producers == ["layer1.0.conv1.weight"]
    assert inside.consumers is not None
    assert [w.weight for w in inside.consumers] == ["layer1.0.conv2.weight"]
    # After the sum both sides make the channel.
    assert wiring.rectifiers[2].producers == ["layer1.0.conv2.weight", "conv1.weight"]
    with pytest.raises(UnsupportedError, match="no ReLU"):
        dead_neuron_rate(nn.Sequential(nn.Linear(3, 3), nn.GELU()), [(torch.randn(2, 3),)])


def test_the_metric_takes_negative_weights_that_moved_least() -> None:
    network = nn.Sequential(nn.Linear(5, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[-0.5, 0.4, -0.1, -0.9, 0.2]]))
    start = {"0.weight": torch.tensor([[-0.45, 0.1, -0.3, -0.2, 0.2]])}
    moved = movement(network, start, ["0.weight"])
    torch.testing.assert_close(moved["0.weight"], torch.tensor([[0.05, 0.3, 0.2, 0.7, 0.0]]))
    alive = {"0.weight": torch.ones(1, 5, dtype=torch.bool)}

    def gone(count: int, sign: Any = "negative") -> list[int]:
        stays = activating(network, alive, moved, count, sign=sign)["0.weight"]
        return (~stays).flatten().nonzero().flatten().tolist()

    assert gone(1) == [0] and gone(2) == [0, 2] and gone(9) == [0, 2, 3]
    assert gone(1, "positive") == [4] and gone(1, "any") == [4]
    alive["0.weight"][0, 0] = False
    assert gone(1) == [0, 2]


@given(st.integers(0, 200))
def test_removing_a_negative_weight_never_kills(seed: int) -> None:
    """For inputs that are not negative."""
    generator = torch.Generator().manual_seed(seed)
    w, a = torch.randn(7, generator=generator), torch.rand(30, 7, generator=generator)
    for index in range(7):
        rest = w.clone()
        rest[index] = 0.0
        before, after = a @ w > 0, a @ rest > 0
        if w[index] < 0:
            assert bool((after | ~before).all())
        else:
            assert bool((before | ~after).all())


@pytest.fixture(scope="module")
def task() -> Any:
    return open_task("digits", limit=200)


@pytest.fixture(scope="module")
def begun(task: Any) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """A network's first state, and the network trained from it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = mlp((64, 24, 10))
    start = copy.deepcopy(module.state_dict())
    Retraining(epochs=3, lr=0.05).train(module, task)
    return start, module


def test_a_round_removes_what_it_says(begun: Any, task: Any) -> None:
    start, module = begun
    masks = Masks.full(module, ["1.weight", "3.weight"])
    total = masks.total
    plan = Plan(rate=0.2, ap_rate=0.02)
    kept = plan.kept(module, masks, start, task, 0)
    assert sum(int(m.sum()) for m in kept.values()) == total - round(0.2 * total)
    # Eighteen of the twenty per cent are the criterion's.
    own = int(0.02 * total)
    scores = CRITERIA["magnitude"](module, list(masks.kept), task, 0)
    plain = allocated(module, scores, masks, "global", total - round(0.2 * total) + own)
    taken = {n: plain[n] & ~kept[n] for n in kept}
    assert sum(int(t.sum()) for t in taken.values()) == own
    assert all(bool((module.get_parameter(n)[t] < 0).all()) for n, t in taken.items())


def test_without_a_share_it_is_the_criterion_alone(begun: Any, task: Any) -> None:
    start, module = begun
    training = Retraining(epochs=1, lr=0.05)
    ours, theirs = copy.deepcopy(module), copy.deepcopy(module)
    masks = [Masks.full(m, ["1.weight", "3.weight"]) for m in (ours, theirs)]
    run_rounds(
        ours, task, masks[0], Plan(ap_rate=0.0), rounds=2, training=training, start=start, seed=4
    )

    def choose(now: nn.Module, masks: Masks, number: int) -> Any:
        scores = CRITERIA["magnitude"](now, list(masks.kept), task, 0)
        left = masks.remaining
        return allocated(now, scores, masks, "global", left - round(0.2 * left))

    prune_and_retrain(
        theirs, task, masks[1], choose, rounds=2, retraining=training, rewind=start, seed=4
    )
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_survivors_are_rewound_to_the_bit(begun: Any, task: Any) -> None:
    start, trained = begun
    module = copy.deepcopy(trained)
    masks = Masks.full(module, ["1.weight", "3.weight"])
    run_rounds(module, task, masks, Plan(), rounds=2, training=Retraining(epochs=0), start=start)
    for name, mask in masks.kept.items():
        weight = module.get_parameter(name)
        assert torch.equal(weight[mask], start[name][mask])
        assert not bool(weight[~mask].any())


def test_lookahead_multiplies_by_the_norms_around() -> None:
    torch.manual_seed(0)
    network = ConvNet(1, 4, (3, "pool"), (5,), norm=False, classes=2)
    task = type("T", (), {"example_inputs": (torch.randn(2, 1, 4, 4),)})()
    names = ["0.weight", "4.weight", "6.weight"]
    scores = lookahead(network, names, task, 0)
    first, second, third = (network.get_parameter(n).detach() for n in names)
    rows = first.flatten(1).norm(dim=1)
    # Four positions of each of three channels after pooling and flattening.
    columns = torch.stack([second[:, 4 * c : 4 * c + 4].norm() for c in range(3)])
    torch.testing.assert_close(scores["0.weight"], first.abs() * columns.view(3, 1, 1, 1))
    torch.testing.assert_close(
        scores["4.weight"],
        second.abs() * rows.repeat_interleave(4)[None] * third.norm(dim=0)[:, None],
    )
    torch.testing.assert_close(scores["6.weight"], third.abs() * second.norm(dim=1)[None])


def test_the_step_works_in_the_main_job(begun: Any, task: Any, tmp_path: Path) -> None:
    recipe = Recipe.of(("activating-pruning", {"sparsity": 0.6, "epochs": 1, "rate": 0.4}))
    result = gossamer.shrink(begun[1], task, recipe=recipe, out=tmp_path / "out", cpu=True)
    report = result.report["steps"][-1]["report"]
    total = 64 * 24 + 240
    assert report["remaining"] == round(0.4 * total)
    assert len(report["rounds_run"]) == 2
    last = report["rounds_run"][-1]
    assert last["dead_static"] >= 0 and 0 < last["dead_dynamic"] < 1


def test_bad_input_is_one_sentence(begun: Any, task: Any) -> None:
    network = Network(begun[1], task.example_inputs)
    with pytest.raises(InputError, match="of which activation is a part"):
        activating_pruning(network, task, ap_rate=0.3)
    with pytest.raises(InputError, match=r"\(0, 1\)"):
        activating_pruning(network, task, sparsity=1.0)
    with pytest.raises(InputError, match="needs inputs"):
        dead_neuron_rate(begun[1], [])
