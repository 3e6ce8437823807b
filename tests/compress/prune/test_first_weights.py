"""Criteria at first weights: the worked quadratic, conservation of flow, classes drawn alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.compress.prune.first_weights import _balanced, grasp, snip, synflow
from gossamer.compress.prune.sparsify import sparsify
from gossamer.compress.prune.weight_scores import CRITERIA, fisher, mean_gradients
from gossamer.core.network import Network
from gossamer.core.task import Labelled
from gossamer.datasets import open_task
from gossamer.models.plain import ConvNet, mlp


@pytest.fixture(scope="module")
def task() -> Any:
    torch.set_num_threads(1)
    return open_task("digits", limit=300)


def test_snip_and_grasp_on_a_quadratic() -> None:
    """L = w'Hw/2 - b'w with H = [[2, .5], [.5, 1]], b = (1, 1) at w = (1, -1)."""
    hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    w = torch.tensor([1.0, -1.0], requires_grad=True)
    loss = 0.5 * w @ hessian @ w - w.sum()
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    assert g.tolist() == [0.5, -1.5]
    assert ((w * g).abs() / (w * g).abs().sum()).tolist() == [0.25, 0.75]
    (hg,) = torch.autograd.grad((g.detach() * g).sum(), w)
    removed_first = -w * hg
    assert removed_first.tolist() == [-0.25, -1.25]


def test_synflow_by_hand_and_conserved() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
        network[1].weight.copy_(torch.tensor([[2.0, -1.0]]))
    task: Any = type("T", (), {"example_inputs": (torch.randn(2, 2),)})()
    found = synflow(network, ["0.weight", "1.weight"], task, 0)
    assert found["0.weight"].tolist() == [[2, 4], [0.5, 3]]
    assert found["1.weight"].tolist() == [[6, 3.5]]
    assert all(float(s.sum()) == 9.5 for s in found.values())
    deep = ConvNet(1, 8, (4, "pool", 6), (9,))
    # Biases add flow that no weight of a layer carries.
    with torch.no_grad():
        for name, p in deep.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    task = type("T", (), {"example_inputs": (torch.randn(2, 1, 8, 8),)})()
    names = [n for n, p in deep.named_parameters() if p.ndim > 1]
    sums = [float(s.sum()) for s in synflow(deep, names, task, 0).values()]
    assert sums == pytest.approx([sums[0]] * len(sums))


def test_snip_is_the_share_of_w_g(task: Any) -> None:
    torch.manual_seed(0)
    network = mlp((64, 12, 10))
    names = ["1.weight", "3.weight"]
    found = snip(network, names, task, 5)
    assert sum(float(s.sum()) for s in found.values()) == pytest.approx(1.0, rel=1e-5)
    batch = next(iter(task.batches("train", batch_size=128, seed=5)))
    task.loss(network, batch).backward()
    for name in names:
        w = network.get_parameter(name)
        expected = (w * w.grad).abs().detach()
        large = expected > 1e-9
        ratio = found[name][large] / expected[large]
        torch.testing.assert_close(ratio, ratio.max().expand_as(ratio), rtol=1e-3, atol=0.0)


def test_rescaling_a_relu_layer_moves_magnitudes_not_snip(task: Any) -> None:
    torch.manual_seed(0)
    network = mlp((64, 12, 10))
    scaled = copy.deepcopy(network)
    with torch.no_grad():
        scaled[1].weight.mul_(4.0)
        scaled[1].bias.mul_(4.0)
        scaled[3].weight.div_(4.0)
    names = ["1.weight", "3.weight"]
    for name in names:
        torch.testing.assert_close(
            snip(network, names, task, 0)[name], snip(scaled, names, task, 0)[name],
            rtol=1e-4, atol=1e-9,
        )  # fmt: skip
    plain = CRITERIA["magnitude"](network, names, task, 0)
    assert not torch.allclose(
        plain["1.weight"], CRITERIA["magnitude"](scaled, names, task, 0)["1.weight"]
    )


def test_grasp_is_w_times_the_curvature_along_the_gradient(task: Any) -> None:
    torch.manual_seed(0)
    network = mlp((64, 6, 10)).double()
    names = ["1.weight", "3.weight"]
    found = grasp(network, names, _Double(task), 3)
    images, labels = _balanced(_Double(task), 3)
    assert torch.bincount(labels, minlength=10).tolist() == [10] * 10

    def slopes(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        used = {n: v.detach().requires_grad_() for n, v in values.items()}
        rest = {n: p.detach() for n, p in network.named_parameters() if n not in used}
        outputs = torch.func.functional_call(network, {**used, **rest}, (images,)) / 200.0
        loss = nn.functional.cross_entropy(outputs, labels)
        return torch.autograd.grad(loss, list(used.values()))

    here = {n: network.get_parameter(n).detach() for n in names}
    g = slopes(here)
    # The gradient's change along itself, by a central difference.
    step = 1e-6 / max(float(x.norm()) for x in g)
    ahead = slopes({n: w + step * x for (n, w), x in zip(here.items(), g, strict=True)})
    back = slopes({n: w - step * x for (n, w), x in zip(here.items(), g, strict=True)})
    for name, a, b in zip(names, ahead, back, strict=True):
        expected = here[name] * (a - b) / (2 * step)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)


class _Double(Labelled):
    """A task whose images are float64."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.classes = task.classes
        self.example_inputs = tuple(x.double() for x in task.example_inputs)

    def size(self, split: str) -> int:
        return self.task.size(split)

    def batches(self, *args: Any, **kwargs: Any) -> Any:
        for images, labels in self.task.batches(*args, **kwargs):
            yield images.double(), labels

    def inputs(self, batch: Any) -> Any:
        return self.task.inputs(batch)


def test_fisher_is_the_mean_of_squared_gradients_of_single_samples(task: Any) -> None:
    torch.manual_seed(0)
    network = mlp((64, 5, 10))
    names = ["1.weight", "3.weight"]
    found = fisher(network, names, task, 2)
    total = {n: torch.zeros_like(network.get_parameter(n)) for n in names}
    seen = 0
    for images, labels in task.batches("train", batch_size=64, seed=2):
        for i in range(len(labels)):
            network.zero_grad()
            task.loss(network, (images[i : i + 1], labels[i : i + 1])).backward()
            for n in names:
                total[n] += network.get_parameter(n).grad.square()  # type: ignore[union-attr]
            seen += 1
        if seen >= 256:
            break
    for n in names:
        expected = 0.5 * total[n] / seen * network.get_parameter(n).detach().square()
        torch.testing.assert_close(found[n], expected, rtol=1e-3, atol=1e-12)
    # The square of the mean gradient is another thing.
    mean = mean_gradients(network, names, task, 2)["1.weight"].square()
    assert not torch.allclose(mean, total["1.weight"] / seen)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "fisher"])
def test_the_step_takes_them_and_they_leave_the_network_alone(task: Any, criterion: str) -> None:
    torch.manual_seed(1)
    module = ConvNet(1, 8, (6, "pool"), (12,))
    before = copy.deepcopy(module.state_dict())
    made = sparsify(
        Network(module, task.example_inputs), task, sparsity=0.8, criterion=criterion,
        rounds=5 if criterion == "synflow" else 1, epochs=0, cpu=True,
    )  # fmt: skip
    report = made.steps[-1]["report"]
    assert report["remaining"] == report["weights"] - round(0.8 * report["weights"])
    assert report["empty_layers"] == []
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
