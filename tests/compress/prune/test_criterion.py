"""Criteria against worked numbers, closed forms and each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gossamer.compress.prune import criterion
from gossamer.compress.prune.criterion import (
    CRITERIA,
    batchnorm_scale,
    geometric_median,
    magnitude,
    random,
    slimming_penalty,
    taylor,
    taylor_activation,
)
from gossamer.core.dependency import Dependency, analyse
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.graph import Graph
from gossamer.datasets.digits import digits
from gossamer.models.resnet import digits_resnet

FPGM_ROWS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])


def two_layers(first: Tensor, second: Tensor) -> tuple[nn.Sequential, Dependency]:
    module = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0], bias=False),
        nn.ReLU(),
        nn.Linear(second.shape[1], second.shape[0], bias=False),
    )
    with torch.no_grad():
        module[0].weight.copy_(first)
        module[2].weight.copy_(second)
    return module, analyse(module, (torch.randn(2, first.shape[1]),))


def conv_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )


def test_fpgm_worked_example() -> None:
    module, dependency = two_layers(FPGM_ROWS, torch.ones(2, 4))
    (scores,) = geometric_median(module, dependency, normalise=False)
    expected = torch.tensor([9.0711, 8.8173, 8.8173, 19.8774])
    assert torch.allclose(scores, expected, atol=1e-4)
    assert int(scores.argmin()) in (1, 2)
    (norms,) = magnitude(module, dependency, normalise=False)
    assert int(norms.argmin()) == 0


def test_norms_are_textbook() -> None:
    rows = torch.tensor([[3.0, -4.0], [1.0, 1.0]])
    module, dependency = two_layers(rows, torch.ones(2, 2))
    (l1,) = magnitude(module, dependency, p=1, normalise=False)
    (l2,) = magnitude(module, dependency, p=2, normalise=False)
    assert torch.allclose(l1, torch.tensor([7.0, 2.0]))
    assert torch.allclose(l2, torch.tensor([5.0, 2.0**0.5]))
    with pytest.raises(InputError):
        magnitude(module, dependency, p=3)


def test_normalisation_ignores_a_tensors_scale() -> None:
    module = conv_net()
    dependency = analyse(module, (torch.randn(2, 1, 8, 8),))
    before = magnitude(module, dependency, accessories=True)
    raw = magnitude(module, dependency, accessories=True, normalise=False)
    with torch.no_grad():
        module[0].weight.mul_(100.0)
        module[1].weight.mul_(0.01)
    after = magnitude(module, dependency, accessories=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))
    changed = magnitude(module, dependency, accessories=True, normalise=False)
    assert not torch.allclose(raw[0], changed[0])
    assert all(score.mean() == pytest.approx(1.0, abs=1e-5) for score in after)


class Quadratic:
    """L = .5 w'Hw - b'w of a two-entry weight; the only method a criterion needs of a task."""

    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    linear = torch.tensor([1.0, 1.0])

    def batches(self, *args: object, **options: object):
        yield torch.zeros(1)

    def loss(self, module: nn.Sequential, batch: Tensor) -> Tensor:
        w = module[0].weight.flatten()
        return 0.5 * w @ self.hessian @ w - self.linear @ w


@pytest.mark.parametrize(
    ("shape", "expected"),
    # g w = (.5, 1.5): as two units of one weight each, or as one unit beside an empty one.
    [((2, 1), [0.25, 2.25]), ((1, 2), [4.0])],
)
def test_taylor_weights(shape: tuple[int, int], expected: list[float]) -> None:
    rows = torch.tensor([1.0, -1.0]).view(shape)
    if shape[0] == 1:
        rows = torch.cat([rows, torch.zeros(1, 2)])
        expected = [*expected, 0.0]
    module, dependency = two_layers(rows, torch.ones(2, len(rows)))
    task = Quadratic()
    if shape[0] == 1:
        task.loss = lambda module, batch: (  # type: ignore[method-assign]
            0.5 * module[0].weight[0] @ task.hessian @ module[0].weight[0]
            - task.linear @ module[0].weight[0]
        )
    (scores,) = taylor(module, dependency, task, normalise=False)  # type: ignore[arg-type]
    assert torch.allclose(scores, torch.tensor(expected))
    assert module[0].weight.grad is None


def test_taylor_predicts_the_change_of_loss() -> None:
    # For a loss that is linear in a unit's weights, first-order Taylor is exact.
    module, dependency = two_layers(torch.rand(5, 3) + 0.1, torch.rand(1, 5))
    x = torch.rand(7, 3) + 0.1  # positive inputs and weights: ReLU is the identity

    class Linear(Quadratic):
        def loss(self, module: nn.Module, batch: Tensor) -> Tensor:
            return module(x).mean()

    task = Linear()
    (scores,) = taylor(module, dependency, task, normalise=False)  # type: ignore[arg-type]
    full = task.loss(module, x)
    for unit in range(5):
        kept = module[0].weight[unit].clone()
        with torch.no_grad():
            module[0].weight[unit] = 0
            change = full - task.loss(module, x)
            module[0].weight[unit] = kept
        assert scores[unit] == pytest.approx(float(change) ** 2, rel=1e-4)


def test_taylor_activations() -> None:
    first, second = torch.rand(4, 3), torch.rand(1, 4)
    module, dependency = two_layers(first, second)
    x = torch.randn(6, 3)

    class Sum(Quadratic):
        def batches(self, *args: object, **options: object):
            yield x

        def loss(self, module: nn.Module, batch: Tensor) -> Tensor:
            return module(batch).mean()

    (scores,) = taylor_activation(module, dependency, Sum(), normalise=False)  # type: ignore[arg-type]
    hidden = x @ first.T
    # dL/da = second / n where the unit is active; per sample the factor n is taken out.
    expected = (hidden.clamp(min=0) * second).abs().mean(0)
    assert torch.allclose(scores, expected, atol=1e-6)
    (normed,) = taylor_activation(module, dependency, Sum())  # type: ignore[arg-type]
    assert float(normed.norm()) == pytest.approx(1.0, abs=1e-5)


def test_batchnorm_scale_and_slimming() -> None:
    module = conv_net()
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0, -0.25]))
    dependency = analyse(module, (torch.randn(2, 1, 8, 8),))
    scores = batchnorm_scale(module, dependency)
    assert torch.allclose(scores[0], torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 0.25]))
    # The second family passes no BatchNorm: normalised norms times the mean scale.
    assert float(scores[1].mean()) == pytest.approx(6.75 / 6, rel=1e-5)
    assert float(slimming_penalty(module, weight=1e-4)()) == pytest.approx(6.75e-4, rel=1e-5)
    plain, without = two_layers(torch.rand(3, 3), torch.rand(2, 3))
    with pytest.raises(UnsupportedError, match="BatchNorm"):
        batchnorm_scale(plain, without)


def test_random_is_a_function_of_the_seed() -> None:
    module, dependency = two_layers(torch.rand(50, 3), torch.rand(2, 50))
    first, again, other = (random(module, dependency, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_all_names_score_every_family_and_leave_the_network_alone() -> None:
    torch.set_num_threads(1)
    module = conv_net()
    task = digits()
    dependency = analyse(module, task.example_inputs)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    module.train()
    for name, score in CRITERIA.items():
        scores = score(module, dependency, task, 0)
        assert [len(s) for s in scores] == [f.units for f in dependency.families], name
        assert all(bool(torch.isfinite(s).all()) for s in scores), name
        assert any(float(s.std()) > 0 for s in scores), name
    assert module.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_units_of_several_rows_are_compared_as_wholes() -> None:
    rows = torch.rand(6, 4)
    module, dependency = two_layers(rows, torch.rand(2, 6))
    (family,) = dependency.families
    producer = next(m for m in family.members if m.role == "producer")
    groups = criterion.Groups.of(module, dependency, roles=("producer",))
    entry = groups.entries[0]
    assert producer.name == entry.name
    # Rows 0, 1 are unit 0; rows 2, 3 unit 1; rows 4, 5 unit 2.
    paired = criterion.Entry(entry.name, entry.tensor, 0, torch.arange(6) // 2, "producer")
    table = criterion.Groups([paired], [3])
    found = criterion._distances(table, paired)
    flat = rows.view(3, 8)
    assert torch.allclose(found, torch.cdist(flat, flat).sum(1), atol=1e-5)


def test_group_importance_counts_what_reads_a_unit() -> None:
    """Rows (3, 0), (0, 3) tie; the reader's columns 1 and 5 decide: shares are hand-computed."""
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
        network[2].weight.copy_(torch.tensor([[1.0, 5.0]]))
    dependency = analyse(network, (torch.randn(2, 2),))
    (rows,) = criterion.magnitude(network, dependency, p=2)
    assert rows.tolist() == [1.0, 1.0]
    (both,) = criterion.CRITERIA["group"](network, dependency, None, 0)  # type: ignore[arg-type]
    # Rows give 1 and 1; columns 1/3 and 5/3; their means:
    assert both.tolist() == pytest.approx([2 / 3, 4 / 3])


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_network_rebuilt_from_its_graph_is_scored_alike(name: str) -> None:
    """Between the steps of a recipe networks are graphs without modules that say what they are."""
    task = digits(limit=200)
    torch.manual_seed(0)
    plain = digits_resnet().eval()
    rebuilt = Graph.trace(plain, task.example_inputs).network().eval()
    for mine, other in zip(
        *(CRITERIA[name](m, analyse(m, task.example_inputs), task, 0) for m in (plain, rebuilt)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
