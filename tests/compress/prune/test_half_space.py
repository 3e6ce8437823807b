"""Group optimizers: the papers' arithmetic, exact targets, zeros that stay, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gossamer.compress.prune import half_space
from gossamer.compress.prune.groups import Entry, Groups
from gossamer.compress.prune.half_space import (
    DHSPG,
    HESSO,
    HSPG,
    Adam,
    GroupOptimizer,
    ProximalGroupLasso,
    Sgd,
    construct,
    otov3,
    output_difference,
    penalty_factor,
    redundancy,
)
from gossamer.core.dependency import analyse
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.files import load_state, save_state
from gossamer.core.network import Network
from gossamer.datasets.digits import digits

PLAIN = Sgd(momentum=0.0, nesterov=False)


class Rows(nn.Module):
    """A matrix whose rows are groups, in two families."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.clone())


def rows(values: Tensor, sizes: list[int] | None = None) -> tuple[Rows, Groups]:
    module = Rows(values)
    owner = torch.arange(len(values))
    entries = [Entry("weight", module.weight, 0, owner, "producer")]
    return module, Groups(entries, sizes or [len(values)])


def small_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(48, 10),
        )


# The interval of lambda (x = (3, 4), g = (-2, .5)) -----------------------------------------


def factor(**options: object) -> float:
    x, g = torch.tensor([3.0, 4.0]), torch.tensor([-2.0, 0.5])
    values = {"penalty": 1e-3, "amplify": 2.0, "cap": 10.0} | options
    return float(penalty_factor(x @ g, x.norm(), g.norm(), **values))  # type: ignore[arg-type]


def test_interval_midpoint_lowers_loss_and_norm() -> None:
    x, g = torch.tensor([3.0, 4.0]), torch.tensor([-2.0, 0.5])
    low, high = 0.8, 5.3125
    # An amplification beyond l_max is answered by the middle of the interval.
    middle = factor(amplify=100.0, cap=1e9)
    assert middle == pytest.approx((low + high) / 2, abs=1e-5)
    direction = g + middle * x / x.norm()
    assert float(direction @ x) == pytest.approx(11.28125, abs=1e-4)
    assert float(direction @ g) == pytest.approx(1.805, abs=1e-3)


def test_default_never_capped_below_lower_end() -> None:
    assert factor() == pytest.approx(1.6)
    # The published clip ends at lambda * cap = .01, far below l_min = .8.
    assert factor(published_cap=True) == pytest.approx(0.01)


def test_factor_lies_in_interval_for_random_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 6, generator=generator)
    g = torch.randn(5000, 6, generator=generator)
    for base in (Sgd(), Adam()):
        lam = penalty_factor(
            (x * g).sum(1),
            x.norm(dim=1),
            g.norm(dim=1),
            penalty=base.penalty,
            amplify=base.amplify,
            cap=base.cap,
        )
        direction = g + lam[:, None] * x / x.norm(dim=1, keepdim=True)
        opposed = (x * g).sum(1) < 0
        assert (direction * x).sum(1)[opposed].min() > 0
        assert (direction * g).sum(1)[opposed].min() > 0
        assert torch.all(lam[~opposed] == base.penalty)


# The half-space ----------------------------------------------------------------------------


def project(trial: tuple[float, float], epsilon: float) -> Tensor:
    """One projected step of x = (3, 4) towards ``trial`` without penalty."""
    x = torch.tensor([[3.0, 4.0], [9.0, 9.0]])
    module, groups = rows(x)
    optimizer = HSPG(
        module, groups, start=0, lr=1.0, base=PLAIN, penalty=0.0, epsilon=epsilon, weight_decay=0.0
    )
    module.weight.grad = torch.stack([x[0] - torch.tensor(trial), torch.zeros(2)])
    optimizer.step()
    return module.weight.detach()[0]


def test_half_space() -> None:
    assert torch.equal(project((2.0, 3.0), 0.0), torch.tensor([2.0, 3.0]))  # inner product 18
    assert torch.equal(project((2.0, 3.0), 0.95), torch.zeros(2))  # 18 < .95 * 25
    assert torch.equal(project((-1.0, 0.2), 0.0), torch.zeros(2))  # -2.2 < 0


# DHSPG -------------------------------------------------------------------------------------


def test_redundancy_score() -> None:
    cosine = torch.tensor([0.6, -0.8, 0.0])
    average = torch.tensor([1.0, 1.0, 0.0])
    score = redundancy(cosine, average)
    # The group that is zero already is out of both norms and comes first.
    half = 0.5 / 2**0.5
    assert score[0] == pytest.approx(0.5 * 0.6 + half, abs=1e-5)
    assert score[1] == pytest.approx(-0.5 * 0.8 + half, abs=1e-5)
    assert score[2] == torch.inf


@pytest.mark.parametrize("base", [Sgd(), Adam()])
def test_dhspg_reaches_target_and_stops_there(base: Sgd | Adam) -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(40, 5, generator=generator)
    goal = torch.randn(40, 5, generator=generator)
    useless = torch.arange(40) % 2 == 0
    goal[useless] = 0.0
    start = start / start.norm(dim=1, keepdim=True) * torch.where(useless, 0.5, 2.0)[:, None]
    module, groups = rows(start, [25, 15])
    optimizer = DHSPG(
        module, groups, target=0.5, start=0, lr=0.02, base=base, penalty=0.5, weight_decay=0.0
    )
    for step in range(1500):
        # Noise as of mini-batches; it fades so that the others can settle.
        noise = torch.randn(40, 5, generator=generator) if step < 1000 else torch.zeros(40, 5)
        module.weight.grad = (module.weight.detach() - goal) + 0.1 * noise
        optimizer.step()
    zero = groups.zero()
    assert int(zero.sum()) == 20
    assert torch.equal(zero, optimizer.zeroed)
    assert torch.equal(zero, useless)
    # The released candidates and all others went on to the minimum.
    assert (module.weight - goal)[~zero].abs().max() < 0.05


def test_dhspg_shrinks_only_candidates() -> None:
    module, groups = rows(torch.eye(6) + 0.5)
    optimizer = DHSPG(
        module, groups, target=1 / 3, tolerance=0.0, start=0, lr=0.1, base=PLAIN, weight_decay=0.0
    )
    before = module.weight.detach().clone()
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    moved = (module.weight.detach() - before).norm(dim=1)
    candidates = optimizer.progress["candidates"]
    assert int(candidates.sum()) == 2
    # Without a gradient a candidate moves by lr * lambda along -x/|x|, the others not at all.
    assert torch.allclose(moved[candidates], torch.full((2,), 0.1 * 1e-3), atol=1e-7)
    assert torch.equal(moved[~candidates], torch.zeros(4))


# HESSO -------------------------------------------------------------------------------------


def decay(published: bool) -> list[float]:
    module, groups = rows(torch.tensor([[0.1, 0.1], [5.0, 5.0]]))
    optimizer = HESSO(
        module,
        groups,
        target=0.5,
        start=0,
        steps=4,
        periods=1,
        base=PLAIN,
        weight_decay=0.0,
        published_decay=published,
    )
    seen = []
    for _ in range(4):
        module.weight.grad = torch.zeros_like(module.weight)
        optimizer.step()
        seen.append(float(module.weight.detach()[0, 0]) / 0.1)
    assert torch.equal(module.weight[1], torch.tensor([5.0, 5.0]))
    return seen


def test_hesso_decay() -> None:
    assert decay(published=False) == pytest.approx([3 / 4, 1 / 2, 1 / 4, 0], abs=1e-6)


def test_hesso_published_decay() -> None:
    assert decay(published=True) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-6)


def test_hesso_sign_of_cosine() -> None:
    module, groups = rows(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    options = {"target": 0.5, "start": 0, "steps": 1, "periods": 1, "weights": (0, 0, 1, 0, 0)}
    for published, first in ((False, 0), (True, 1)):
        optimizer = HESSO(module, groups, published_sign=published, **options)  # type: ignore[arg-type]
        # The first row's gradient is aligned with it: shrinking it lowers the loss.
        dot, one = torch.tensor([0.5, -0.5]), torch.ones(2)
        score = optimizer.importance(dot, one, one, torch.ones(2, dtype=torch.bool))
        assert int(score.argmin()) == first


@pytest.mark.parametrize("divisible", [1, 4])
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_hesso_hits_target_exactly_and_refills(target: float, divisible: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [16, 32, 2, 16, 64]
    values = torch.randn(sum(sizes), 4, generator=generator)
    # One whole family would go by score; it keeps a unit and others take its place.
    values[48:50] *= 1e-3
    module, groups = rows(values, sizes)
    optimizer = HESSO(
        module, groups, target=target, start=3, steps=43, periods=4, divisible=divisible
    )
    goal = values.clone()
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        (module.weight - goal).square().mean().backward()
        optimizer.step()
        history.append(int(groups.zero().sum()))
    wanted = round(target * sum(sizes))
    if divisible == 1:
        assert history[-1] == wanted
        # Equal batches, committed at the end of each period of 10 steps.
        ends = [history[2 + 10 * p] for p in range(1, 5)]
        assert ends == [round(wanted * p / 4) for p in range(1, 5)]
    else:
        assert wanted - divisible < history[-1] <= wanted
    kept = [int((~part).sum()) for part in groups.split(groups.zero())]
    assert min(kept) >= 1
    assert all(k % divisible == 0 or k == n for k, n in zip(kept, sizes, strict=True))


def test_cric_protects_indispensable_group() -> None:
    values = torch.ones(10, 2)
    values[0] = 0.01  # least in every criterion, but the loss needs it
    module, groups = rows(values, [5, 5])
    optimizer = HESSO(module, groups, target=0.2, start=0, steps=2, periods=1, weight_decay=0.0)
    module.weight.grad = torch.full_like(module.weight, 1e-3)
    before = module.weight.detach().clone()

    def loss() -> float:
        return 1.0 + 1e6 * float((module.weight[0] - before[0]).square().sum())

    cycles = optimizer.protect(loss)
    assert 1 < cycles <= 10
    assert torch.equal(module.weight, before)
    assert float(optimizer.progress["protection"][0]) == pytest.approx(201.0, rel=1e-3)
    optimizer.step()
    optimizer.step()
    assert not optimizer.zeroed[0]
    assert int(optimizer.zeroed.sum()) == 2


# Base updates ------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_textbook(decoupled: bool) -> None:
    module, groups = rows(torch.randn(4, 3, generator=torch.Generator().manual_seed(4)))
    twin = copy.deepcopy(module)
    ours = HESSO(
        module,
        groups,
        target=0.5,
        start=10**6,
        steps=10,
        lr=0.01,
        base=Adam(decoupled=decoupled),
        weight_decay=0.1,
    )
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind(twin.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        module.weight.grad = torch.randn(4, 3, generator=generator)
        twin.weight.grad = module.weight.grad.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(module.weight, twin.weight, atol=1e-6)


def test_published_adam_starts_too_small() -> None:
    x, g = torch.ones(3), torch.tensor([2.0, -3.0, 0.5])
    step = Adam(published=True).direction(x, g, {}, 0.0)
    # m = g and v = g^2, both "corrected": (g / .1) / (|g| / sqrt(.001)) = .316 sign(g).
    assert torch.allclose(step, 0.1**0.5 * g.sign(), atol=1e-3)
    assert torch.allclose(Adam().direction(x, g, {}, 0.0), g.sign(), atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_torch_sgd(nesterov: bool) -> None:
    module, groups = rows(torch.randn(4, 3, generator=torch.Generator().manual_seed(6)))
    twin = copy.deepcopy(module)
    base = Sgd(nesterov=nesterov)
    ours = DHSPG(module, groups, target=0.5, start=10**6, lr=0.01, base=base, weight_decay=0.1)
    theirs = torch.optim.SGD(
        twin.parameters(), lr=0.01, momentum=0.9, nesterov=nesterov, weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        module.weight.grad = torch.randn(4, 3, generator=generator)
        twin.weight.grad = module.weight.grad.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(module.weight, twin.weight, atol=1e-6)


@pytest.mark.parametrize("base", [Sgd(), Adam()])
def test_moments_never_revive_zeros(base: Sgd | Adam) -> None:
    module, groups = rows(torch.randn(8, 3, generator=torch.Generator().manual_seed(8)))
    optimizer = HESSO(module, groups, target=0.5, start=5, steps=4, periods=1, lr=0.1, base=base)
    generator = torch.Generator().manual_seed(9)
    for step in range(40):
        module.weight.grad = 10 * torch.randn(8, 3, generator=generator)
        optimizer.step()
        if step >= 9:
            assert torch.equal(module.weight[optimizer.zeroed], torch.zeros(4, 3))
            assert int(groups.zero().sum()) == 4


def test_proximal_step() -> None:
    module, groups = rows(torch.tensor([[3.0, 4.0], [0.003, 0.004]]))
    optimizer = ProximalGroupLasso(
        module, groups, lr=0.1, penalty=1.0, base=PLAIN, weight_decay=0.0
    )
    module.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.allclose(module.weight[0], torch.tensor([3.0, 4.0]) * (1 - 0.1 / 5))
    assert torch.equal(module.weight[1], torch.zeros(2))
    # A zero group may come back, unlike under the half-space methods.
    module.weight.grad = torch.tensor([[0.0, 0.0], [-9.0, 0.0]])
    optimizer.step()
    assert module.weight.detach()[1].norm() > 0


# Checkpoints -------------------------------------------------------------------------------


def optimizers(module: nn.Module, groups: Groups) -> list[GroupOptimizer]:
    return [
        HESSO(module, groups, target=0.5, start=3, steps=12, periods=3),
        HESSO(module, groups, target=0.5, start=3, steps=12, periods=3, base=Adam(), lr=0.01),
        DHSPG(module, groups, target=0.5, start=3, epsilon=0.9),
        DHSPG(module, groups, target=0.5, start=3, epsilon=0.9, base=Adam(), lr=0.01),
        HSPG(module, groups, start=3, penalty=0.1, epsilon=0.9),
        ProximalGroupLasso(module, groups, penalty=0.1),
    ]


@pytest.mark.parametrize("number", range(6))
def test_resumes_bit_for_bit(number: int, tmp_path) -> None:
    values = torch.randn(20, 5, generator=torch.Generator().manual_seed(10))

    def run(module: Rows, optimizer: GroupOptimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            module.weight.grad = torch.randn(20, 5, generator=generator)
            optimizer.step()

    whole, groups = rows(values, [12, 8])
    run(whole, optimizers(whole, groups)[number], range(25))
    first, groups = rows(values, [12, 8])
    optimizer = optimizers(first, groups)[number]
    run(first, optimizer, range(9))
    path = tmp_path / "state.safetensors"
    save_state(path, {"optimizer": optimizer.state_dict(), "weight": first.weight})
    saved = load_state(path)
    second, groups = rows(saved["weight"], [12, 8])
    resumed = optimizers(second, groups)[number]
    resumed.load_state_dict(saved["optimizer"])
    run(second, resumed, range(9, 25))
    assert torch.equal(whole.weight, second.weight)


# Whole networks ----------------------------------------------------------------------------


def test_construction_keeps_outputs_and_needs_the_shifts() -> None:
    module = small_net()
    for part in module:
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight)
            nn.init.uniform_(part.bias, 0.1, 1.0)
            nn.init.uniform_(part.running_mean)
    module.eval()
    inputs = (torch.randn(2, 1, 8, 8),)
    dependency = analyse(module, inputs)
    groups = Groups.of(module, dependency, silenceable=True)
    which = torch.zeros(groups.total, dtype=torch.bool)
    which[[1, 3, 15, 16, 17]] = True
    full = copy.deepcopy(module)
    groups.silence_(which)
    made = construct(module, dependency)
    assert made.removed == 5
    assert made.error < 1e-5
    assert output_difference(full, made.module, inputs) > 1e-3
    # With beta left alone the removed channels still answer, so outputs differ.
    with torch.no_grad():
        module[4].bias.fill_(0.7)
    assert output_difference(module, made.module, inputs) > 1e-3


@pytest.mark.parametrize("optimizer", ["hesso", "dhspg"])
def test_otov3_trains_and_constructs(optimizer: str) -> None:
    torch.set_num_threads(1)
    task = digits()
    network = Network(small_net(), task.example_inputs)
    before = copy.deepcopy(network.module.state_dict())
    result = otov3(
        network,
        task,
        optimizer=optimizer,  # type: ignore[arg-type]
        target=0.5,
        epochs=8,
        batch_size=32,
        start=0.1,
        duration=0.5,
        periods=5,
        penalty=1.0,
        epsilon=0.9,
        cpu=True,
    )
    report = result.steps[-1]["report"]
    assert report["groups"] == 24
    assert report["removed"] == 12
    assert report["output_difference"] < 1e-5
    assert report["parameters"][1] == sum(p.numel() for p in result.module.parameters())
    assert report["macs"][1] < 0.8 * report["macs"][0]
    assert task.score(result.module, "validation") > 85
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_hesso_meets_a_budget_of_cost(budget: str) -> None:
    torch.set_num_threads(1)
    task = digits()
    network = Network(small_net(), task.example_inputs)
    options = {"epochs": 2, "batch_size": 64, "start": 0.1, "duration": 0.6, "periods": 4}
    result = otov3(network, task, **{budget: 0.4}, **options, cpu=True)  # type: ignore[arg-type]
    full, left = result.steps[-1]["report"][budget]
    # The last unit that went is at most a twelfth of either.
    assert 0.3 * full < left <= 0.4 * full
    assert result.steps[-1]["report"]["output_difference"] < 1e-5
    with pytest.raises(InputError, match="one budget"):
        otov3(network, task, macs=0.5, parameters=0.5)
    with pytest.raises(InputError, match="HESSO only"):
        otov3(network, task, macs=0.5, optimizer="dhspg")


def test_protect_runs_before_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    calls: list[int] = []
    original = HESSO.protect

    def spy(self: HESSO, loss, **options) -> int:
        calls.append(self.progress["step"])
        return original(self, loss, **options)

    monkeypatch.setattr(half_space.HESSO, "protect", spy)
    task = digits()
    network = Network(small_net(), task.example_inputs)
    result = otov3(
        network, task, epochs=2, start=0.25, duration=0.5, periods=2, protect=True, cpu=True
    )
    assert calls == [round(0.25 * 2 * 7)]
    assert result.steps[-1]["report"]["removed"] == 12


def test_bad_options() -> None:
    module, groups = rows(torch.ones(4, 2))
    with pytest.raises(InputError, match="share"):
        HESSO(module, groups, target=1.5, start=0, steps=10)
    with pytest.raises(InputError, match="periods"):
        HESSO(module, groups, target=0.5, start=0, steps=5, periods=10)
    with pytest.raises(InputError, match="start"):
        DHSPG(module, groups, target=0.5, start=-1)
    with pytest.raises(InputError, match="epsilon"):
        DHSPG(module, groups, target=0.5, start=0, epsilon=2.0)
    with pytest.raises(UnsupportedError, match="no removable groups"):
        Groups([], [])
