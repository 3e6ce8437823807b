import copy

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.fit import constant, cosine, sgd
from gossamer.core.task import evaluating, order_of, seed_of
from gossamer.models.plain import mlp
from gossamer.parts.stacked_networks import StackedNetworks, train_stacked

pytestmark = pytest.mark.usefixtures("one_thread")


def small(_=0):
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(27, 3),
    )  # fmt: skip


def data(seed=0, count=200):
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.normal(size=(count, 1, 6, 6)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, 3, count))

    def fetch(rows, _):
        return images[rows], labels[rows]

    return images, labels, fetch


ROWS = [np.arange(0, 40), np.arange(40, 97), np.empty(0, int), np.arange(97, 102), np.arange(7)]
OPTIONS = {"epochs": 3, "batch_size": 16, "seeds": [3, 4, 5, 6, 7], "chunk": 3}


def weights(network):
    return [t.clone() for t in (*network.parameters(), *network.buffers())]


def test_a_stack_answers_as_its_members():
    networks = [small().eval() for _ in range(4)]
    stack = StackedNetworks(networks).eval()
    x = torch.randn(5, 1, 6, 6)
    for number, (network, answer) in enumerate(zip(networks, stack(x, shared=True), strict=True)):
        torch.testing.assert_close(answer, network(x))
        for mine, given in zip(weights(stack.member(number)), weights(network), strict=True):
            assert torch.equal(mine, given)
    own = torch.randn(4, 5, 1, 6, 6)
    expected = torch.stack([n(x) for n, x in zip(networks, own, strict=True)])
    torch.testing.assert_close(stack(own), expected)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_training_together_is_training_alone(kind):
    """Members of several sizes, against a loop written out for one network."""
    images, labels, fetch = data()

    def optimizer(network):
        return (
            sgd(network, lr=0.05)
            if kind == "sgd"
            else torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
        )

    trained = train_stacked(small, ROWS, fetch, optimizer=optimizer, **OPTIONS)
    for number, (rows, seed) in enumerate(zip(ROWS, OPTIONS["seeds"], strict=True)):
        torch.manual_seed(seed_of("initial weights", seed))
        network = small()
        steps = -(-3 * len(rows) // 16)
        passes = [rows[order_of(len(rows), True, seed, e)] for e in range(steps * 16)]
        order = np.concatenate(passes)[: steps * 16] if steps else []
        alone = (
            torch.optim.SGD(
                network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
            if kind == "sgd"
            else optimizer(network)
        )
        first = alone.param_groups[0]["lr"]
        for step in range(steps):
            batch = order[step * 16 : (step + 1) * 16]
            alone.param_groups[0]["lr"] = first * cosine(step / steps)
            alone.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            alone.step()
        for mine, expected in zip(weights(trained.member(number)), weights(network), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def test_a_member_does_not_depend_on_the_others_to_the_bit():
    """Others get more, fewer, other or broken samples; the member's weights stay the same."""
    images, _, fetch = data()
    first = train_stacked(small, ROWS, fetch, **OPTIONS)
    others = list(ROWS)
    others[0], others[3] = np.arange(150, 199), np.empty(0, int)
    second = train_stacked(small, others, fetch, **OPTIONS)
    images[150:199] = float("nan")
    third = train_stacked(small, others, fetch, **OPTIONS)
    for other in (second, third):
        for number in (1, 2, 4):
            mine, expected = weights(other.member(number)), weights(first.member(number))
            assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    changed = weights(second.member(0))[0]
    assert not torch.equal(changed, weights(first.member(0))[0])
    assert torch.isnan(weights(third.member(0))[0]).all()


def test_a_member_without_samples_stays_as_it_was_made():
    _, _, fetch = data()
    trained = train_stacked(small, ROWS, fetch, **OPTIONS)
    torch.manual_seed(seed_of("initial weights", 5))
    for mine, made in zip(weights(trained.member(2)), weights(small()), strict=True):
        assert torch.equal(mine, made)
    nothing = train_stacked(small, [np.empty(0, int)], fetch, epochs=3, seeds=[5])
    assert torch.equal(weights(nothing.member(0))[0], weights(trained.member(2))[0])


def test_dropout_differs_between_members_and_repeats():
    _, _, fetch = data()

    def make(_):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))

    rows = [np.arange(50)] * 2
    options = {"epochs": 2, "seeds": [1, 1], "schedule": constant, "batch_size": 16, "chunk": 2}
    first, again = (train_stacked(make, rows, fetch, **options) for _ in range(2))
    one, two = (weights(first.member(number))[0] for number in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, weights(again.member(0))[0])


def test_outputs_are_those_of_the_genuine_members():
    _, _, fetch = data()
    trained = train_stacked(lambda _: mlp((36, 8, 3)), ROWS, fetch, **OPTIONS)
    x = torch.randn(4, 1, 6, 6)
    found = trained.outputs(x)
    assert found.shape == (5, 4, 3) and len(trained) == 5
    for number in range(5):
        member = trained.member(number)
        with evaluating(member):
            torch.testing.assert_close(found[number], member(x))


def test_what_cannot_be_stacked_is_said():
    with pytest.raises(InputError, match="no network"):
        StackedNetworks([])
    with pytest.raises(InputError, match="network 1 is not made like network 0"):
        StackedNetworks([mlp((4, 2, 2)), mlp((4, 3, 2))])
    with pytest.raises(InputError, match="2 members with 1 seeds"):
        train_stacked(small, [np.arange(3)] * 2, data()[2], epochs=1, seeds=[0])
    stack = StackedNetworks([small(), copy.deepcopy(small())])
    with pytest.raises(InputError, match="no member 2"):
        stack.member(2)
