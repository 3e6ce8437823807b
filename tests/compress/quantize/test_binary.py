"""Binary networks: operators against worked numbers, and deployment that changes nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.compress.quantize import binary
from gossamer.compress.quantize.binary import (
    OPERATORS,
    BinaryLayer,
    BinaryTraining,
    RPReLU,
    binarize,
    binarized,
    binary_layers,
    channel_means,
    complexity,
    deployed,
    fourier_order,
    fourier_slope,
    noise_share,
    operation_ratio,
    overall,
    packed,
    polynomial_slope,
    recu_bound,
    recu_tau,
    robustness_ratio,
    set_progress,
    sign_of,
    storage_ratio,
    training_metric,
)
from gossamer.compress.recipe import Recipe, Step
from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.saved import load_network
from gossamer.core.task import Classification
from gossamer.datasets.digits import digits
from gossamer.models.resnet import digits_resnet
from gossamer.parts.packed import PackedNetwork

W = torch.tensor([[0.2, -0.4, 0.6], [-0.1, 0.3, 0.5]])
X = torch.tensor([[1.0, -2.0, 0.5]])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task() -> Classification:
    return digits()


class Small(nn.Module):
    """A residual network with every kind of layer that a step has to tell apart."""

    def __init__(self, activation: type[nn.Module] = nn.Hardtanh) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.conv1 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 20, 3, stride=2, padding=1, groups=2)
        self.shortcut = nn.Conv2d(12, 20, 1, stride=2)
        self.fc = nn.Linear(20 * 16, 30)
        self.head = nn.Linear(30, 10)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.conv2(y) + self.shortcut(x))
        return self.head(self.act(self.fc(y.flatten(1))))


def small(activation: type[nn.Module] = nn.Hardtanh) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Small(activation)
        with torch.no_grad():  # statistics of their own
            for _ in range(3):
                network(torch.randn(64, 1, 8, 8))
        return network.eval()


@pytest.fixture(scope="module")
def trained(task: Classification) -> Small:
    network = small()
    fit(
        Supervised(network, task, optimizer=torch.optim.Adam(network.parameters(), lr=2e-3)),
        task,
        epochs=4,
        batch_size=64,
    )
    return network.eval()


# Operators on worked numbers


def test_worked_linear_layers() -> None:
    expected = {
        "bnn": [3.0, -1.0],
        "dorefa": [1.2, -0.3],
        "bireal": [1.2, -0.3],
        "react": [1.2, -0.3],
        "xnor": [1.24444, -0.25926],
        "xnor++": [3.0, -1.0],
    }
    for name, values in expected.items():
        found = BinaryLayer(W, algorithm=name)(X)
        assert found.flatten().tolist() == pytest.approx(values, abs=1e-5), name
    assert channel_means(W).tolist() == pytest.approx([0.4, 0.3])
    assert X.abs().mean().item() == pytest.approx(1.16667, abs=1e-5)


def test_bias_and_batch_axes_of_linear_layers() -> None:
    bias = torch.tensor([10.0, 20.0])
    for name in OPERATORS:
        layer = BinaryLayer(W, bias, algorithm=name).eval()
        plain = BinaryLayer(W, algorithm=name).eval()
        plain.load_state_dict(layer.state_dict(), strict=False)
        y = layer(X.expand(4, 5, 3))
        assert torch.allclose(y, plain(X).expand(4, 5, 2) + bias), name


def test_scale_is_the_best_one() -> None:
    w = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    best = channel_means(w)
    for o in range(6):
        error = [
            float((w[o] - a * sign_of(w[o])).square().sum())
            for a in (best[o] - 1e-3, best[o], best[o] + 1e-3)
        ]
        assert error[1] < min(error[0], error[2])


def test_sign_of_zero_is_plus_one() -> None:
    assert sign_of(torch.tensor([-2.0, -0.0, 0.0, 1.0])).tolist() == [-1, 1, 1, 1]


def test_polynomial_slope() -> None:
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert polynomial_slope(x).tolist() == [0, 0, 1, 2, 1, 0, 0]
    # The slope is the derivative of the clipped parabolas.
    x = torch.linspace(-1.4, 1.4, 57, dtype=torch.float64, requires_grad=True)
    parabola = torch.where(x < 0, x * x + 2 * x, -x * x + 2 * x)
    F_ = torch.where(x < -1, -1.0, torch.where(x >= 1, 1.0, parabola))
    (slope,) = torch.autograd.grad(F_.sum(), x)
    assert torch.allclose(slope, polynomial_slope(x.detach()))


def test_fourier_slope() -> None:
    def at(x: float, order: int) -> float:
        return fourier_slope(torch.tensor([x], dtype=torch.float64), order).item()

    assert at(0.0, 9) == pytest.approx(1.27324, abs=1e-5)
    assert at(0.0, 18) == pytest.approx(2.41916, abs=1e-5)
    assert at(1.0, 9) == pytest.approx(0.57984, abs=1e-5)
    assert at(1.0, 18) == pytest.approx(-0.39017, abs=1e-5)
    assert at(1.0001, 9) == at(-1.0001, 9) == 0.0
    x = torch.linspace(-1, 1, 41)
    for order in (9, 13, 17):
        series = sum(torch.cos((2 * i + 1) * 0.1 * x) for i in range(order + 1))
        assert torch.allclose(fourier_slope(x, order), 0.4 / math.pi * series, atol=1e-4)


def test_schedules() -> None:
    taus = [recu_tau(f) for f in (0.0, 0.5, 1.0)]
    assert taus == pytest.approx([0.85, 0.902856, 0.99], abs=1e-6)
    w = torch.tensor([1.0, -3.0])
    bounds = [recu_bound(w, tau).item() / 2 for tau in taus]
    assert bounds == pytest.approx([1.20397, 1.63841, 3.91202], abs=1e-4)
    assert [fourier_order(e, 10) for e in (0, 5, 9)] == [9, 13, 17]
    assert noise_share(9, 10) == 0.0 and noise_share(0, 10) == pytest.approx(
        0.05 * (1 + math.cos(math.pi / 10))
    )
    layer = BinaryLayer(W, algorithm="recu")
    set_progress(layer, 5, 10)
    assert layer.operator.tau == pytest.approx(0.902856, abs=1e-6)


def test_recu_standardises_and_clips() -> None:
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) + 2.0
    layer = BinaryLayer(w, algorithm="recu").train()
    signs, scale = layer.operator.weights(layer.weight)
    assert torch.equal(signs, sign_of(w - w.mean(1, keepdim=True)))
    assert scale is layer.operator.scale and bool(((scale >= 0) & (scale <= 1)).all())
    signs.square().sum().backward()
    rows = w - w.mean(1, keepdim=True)
    rows = rows / ((rows.var(1, keepdim=True) + 1e-5).sqrt() / (2 * math.sqrt(2)))
    far = rows.abs() > recu_bound(rows, recu_tau(0.0))
    assert 0 < int(far.sum()) < far.numel()
    direct = torch.where(far, 0.0, 2 * signs.detach())
    # What is clipped gets no gradient of its own; standardising spreads the others'.
    free = (w - w.mean(1, keepdim=True)).clone().requires_grad_()
    again = free - free.mean(1, keepdim=True)
    again = again / ((again.var(1, keepdim=True) + 1e-5).sqrt() / (2 * math.sqrt(2)))
    (expected,) = torch.autograd.grad((again * direct).sum(), free)
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, expected, atol=1e-5)


def test_rprelu() -> None:
    module = RPReLU(2)
    module.before.data = torch.tensor([1.0, -1.0])
    module.after.data = torch.tensor([0.5, 0.0])
    x = torch.tensor([[[[0.0]], [[0.0]]]])
    assert module(x).flatten().tolist() == pytest.approx([0.25 * -1.0 + 0.5, 1.0])


# Gradients as published: in convolutions the scales are not in them


def published(x: Tensor, w: Tensor, name: str) -> Tensor:
    """Signs with the scales inside of the detached part, as the benchmark's code has them."""
    alpha = w.detach().abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    beta = x.detach().abs().mean((1, 2, 3), keepdim=True) if name == "xnor" else 1.0
    surrogate = x.clamp(-1, 1)
    if name == "bireal":
        parabola = torch.where(x < 0, x * x + 2 * x, -x * x + 2 * x)
        surrogate = torch.where(x < -1, -1.0, torch.where(x >= 1, 1.0, parabola))
    a = (beta * sign_of(x) - surrogate).detach() + surrogate
    clipped = w.clamp(-1, 1)
    b = (alpha * sign_of(w) - clipped).detach() + clipped
    return F.conv2d(a, b, padding=1)


@pytest.mark.parametrize("name", ["dorefa", "xnor", "bireal"])
def test_gradients_of_convolutions_are_the_published_ones(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 5, generator=generator)
    w = torch.randn(4, 3, 3, 3, generator=generator) * 0.9
    upstream = torch.randn(2, 4, 5, 5, generator=generator)
    layer = BinaryLayer(w, algorithm=name, padding=(1, 1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = w.clone().requires_grad_()
    y, z = layer(ours), published(theirs, weight, name)
    assert torch.allclose(y, z, atol=1e-5)
    y.backward(upstream)
    z.backward(upstream)
    for a, b in ((ours.grad, theirs.grad), (layer.weight.grad, weight.grad)):
        assert a is not None and b is not None
        assert torch.allclose(a, b, atol=1e-4)


def test_gradients_of_linear_layers_carry_the_scale() -> None:
    x = X.clone().requires_grad_()
    layer = BinaryLayer(W, algorithm="dorefa")
    layer(x).backward(torch.tensor([[1.0, 1.0]]))
    assert layer.weight.grad is not None and x.grad is not None
    # d/dw = alpha * sign(x); d/dx = sum alpha * sign(w) where |x| <= 1.
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.4], [0.3]]) * sign_of(X))
    assert torch.allclose(x.grad, torch.tensor([[0.4 - 0.3, 0.0, 0.4 + 0.3]]))


def test_xnor_plus_plus_learns_its_factors() -> None:
    w = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    layer = BinaryLayer(w, algorithm="xnor++", padding=(1, 1), output_size=(5, 6))
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    product = F.conv2d(sign_of(x), sign_of(w), padding=1)
    assert torch.equal(layer(x), product)
    operator = layer.operator
    with torch.no_grad():
        operator.channel.copy_(torch.arange(4.0))
        operator.row.copy_(torch.arange(5.0))
        operator.column.copy_(torch.arange(6.0))
    factors = torch.einsum("o,h,w->ohw", torch.arange(4.0), torch.arange(5.0), torch.arange(6.0))
    assert torch.allclose(layer(x), product * factors)
    layer(x).sum().backward()
    assert torch.allclose(
        operator.channel.grad, torch.einsum("bohw,h,w->o", product, *map(torch.arange, (5.0, 6.0)))
    )


def test_react_learns_its_shift_and_fda_its_noise() -> None:
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    w = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    react = BinaryLayer(w, algorithm="react", shift=torch.tensor([0.0, 5.0, -5.0]))
    assert torch.equal(
        sign_of(x + react.shift.view(-1, 1, 1))[:, 1:].mean((0, 2, 3)), X.new_tensor([1, -1])
    )
    react(x).sum().backward()
    assert react.shift.grad is not None and react.shift.grad[0] != 0 and react.shift.grad[1] == 0
    fda = BinaryLayer(w, algorithm="fda").train()
    held = {name for name, _ in fda.named_parameters()}
    assert "operator.input_noise.down.weight" in held  # there before an optimizer is
    set_progress(fda, 0, 10)
    noisy = fda(x)
    noisy.sum().backward()
    assert fda.operator.weight_noise.up.weight.grad.abs().sum() > 0
    plain = copy.deepcopy(fda).eval()(x)
    assert not torch.equal(noisy, plain)
    set_progress(fda, 9, 10)
    assert torch.equal(fda(x), plain)  # no noise in the last epoch


# Networks


def test_layers_are_found_and_kept(task: Classification) -> None:
    network = small()

    def names(**options: Any) -> list[str]:
        made = binarized(network, task.example_inputs, **options)
        return [n.removeprefix("program.") for n in binary_layers(made)]

    assert names() == ["conv1", "conv2", "fc"]
    assert names(keep=("first", "last")) == ["conv1", "conv2", "shortcut", "fc"]
    assert len(names(keep=())) == 6
    assert names(skip=("conv2",)) == ["conv1", "fc"]
    with pytest.raises(InputError, match="no layer 'nothing' to skip"):
        names(skip=("nothing",))
    with pytest.raises(InputError, match="keep cannot hold 'middle'"):
        names(keep=("middle",))
    with pytest.raises(InputError, match="no layer to binarize"):
        binarized(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), task.example_inputs)
    with pytest.raises(InputError, match="no binary operator 'best'; there are bnn"):
        names(algorithm="best")


def test_a_network_read_from_its_graph_is_binarized_under_the_same_names(
    task: Classification,
) -> None:
    rebuilt = Graph.trace(small(), task.example_inputs).network()
    made = deployed(binarized(rebuilt, task.example_inputs))
    assert set(packed(made).tensors) == {"conv1.weight", "conv2.weight", "fc.weight"}


@pytest.mark.parametrize("pad_with", [0, 1])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_packed_logits_are_those_of_the_trained_network(
    name: str, pad_with: Any, task: Classification, tmp_path: Any
) -> None:
    real = torch.cat([b[0] for b in task.batches("validation", shuffle=False)])
    network = binarized(
        small(), task.example_inputs, algorithm=name, pad_with=pad_with, centre=(real[:64],)
    )
    set_progress(network, 9, 10)
    network.train()
    with torch.no_grad():
        for start in range(0, 192, 64):  # statistics of binary activations
            network(real[start : start + 64])
    network.eval()
    final = deployed(network)
    stored = packed(final)
    stored.save(tmp_path / "p.safetensors")
    runner = PackedNetwork.load(tmp_path / "p.safetensors").runner(final, task.example_inputs)
    assert sum("packed_" in n for n, _ in runner.program.named_children()) == 3
    with torch.inference_mode():
        expected, simulated, found = network(real), final(real), runner(real)
    assert torch.equal(found, simulated)  # bit for bit, borders included
    # Folding the normalisation rounds once more, which may flip the sign of a lone activation.
    near = (found - expected).abs().amax(1) <= 1e-4 * float(expected.abs().max())
    assert float(near.float().mean()) >= 0.99


def test_normalisation_is_folded_and_layers_take_a_bit_a_weight(task: Classification) -> None:
    made = deployed(binarized(small(), task.example_inputs, algorithm="dorefa"))
    assert not any("running_mean" in name for name in made.state_dict())
    stored = packed(made)
    assert stored.nbytes() == sum(-(-n // 8) for n in (12 * 12 * 9, 20 * 6 * 9, 320 * 30))
    assert all(str(t.codec) == "binary" for t in stored.tensors.values())


def test_normalisation_of_time_steps_stays() -> None:
    """As many steps as outputs: the second axis is time, and the layer's channels are the last."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)]
    network = nn.Sequential(*layers).eval()
    norm = layers[2]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.running_mean = torch.randn(8)
    norm.running_var = torch.rand(8) + 0.5
    x = torch.randn(4, 8, 6)
    trained = binarized(network, (x,), algorithm="dorefa").eval()
    made = deployed(trained)
    assert any("running_mean" in name for name in made.state_dict())
    torch.testing.assert_close(made(x), trained(x))


def test_centring_gives_signs_to_what_a_relu_made_positive(task: Classification) -> None:
    network = small(nn.ReLU)
    (x, _) = next(iter(task.batches("train", batch_size=128)))
    seen: list[Tensor] = []
    for centre in (None, (x,)):
        made = binarized(network, task.example_inputs, algorithm="bnn", centre=centre).eval()
        layer = binary_layers(made)["program.conv1"]
        shift = layer.shift if layer.shift is not None else torch.zeros(12)
        with torch.no_grad():
            inputs = network.act(network.stem(x)) + shift.view(-1, 1, 1)
        seen.append(sign_of(inputs).mean())
    assert seen[0] == 1.0
    assert abs(float(seen[1])) < 0.6


def test_training_learns_and_tells_the_epoch(task: Classification, trained: Small) -> None:
    network = binarized(trained, task.example_inputs, algorithm="fda")
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    rule = BinaryTraining(network, task, optimizer=torch.optim.Adam(network.parameters(), lr=1e-3))
    fit(rule, task, epochs=4, batch_size=64)
    layer = next(iter(binary_layers(network).values()))
    assert layer.operator.share == 0.0 and layer.operator.order == fourier_order(3, 4)
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert {f"program.{n}.weight" for n in ("conv1", "conv2", "fc")} <= moved
    assert any("input_noise" in n for n in moved)
    assert task.score(network) > 60


def test_an_interrupted_run_is_the_same_run(
    task: Classification, trained: Small, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(trained, task.example_inputs)
    options: dict[str, Any] = {"algorithm": "recu", "epochs": 3, "batch_size": 256, "seed": 5}
    whole = binarize(network, task, **options)

    class Killed(BaseException):
        pass

    calls: list[int] = []
    step = BinaryTraining.step

    def dying(self: Any, batch: Any) -> Any:
        if len(calls) == 9:  # in the third epoch
            raise Killed
        calls.append(1)
        return step(self, batch)

    monkeypatch.setattr(BinaryTraining, "step", dying)
    with pytest.raises(Killed):
        binarize(network, task, **options, checkpoint=tmp_path / "state")
    monkeypatch.undo()
    resumed = binarize(network, task, **options, checkpoint=tmp_path / "state")
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name


# The step


def test_the_step_changes_nothing_that_it_is_given(task: Classification, trained: Small) -> None:
    network = Network(trained, task.example_inputs)
    before = copy.deepcopy(trained.state_dict())
    made = binarize(
        network, task, algorithm="bireal", epochs=2, batch_size=128, skip=("fc",),
        teacher=network, weight=0.5,
    )  # fmt: skip
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])
    assert network.steps == () and made.runtime == "packed"
    assert made.storage == {"conv1.weight": "binary", "conv2.weight": "binary"}
    assert made.steps[-1]["options"]["skip"] == ["fc"]
    assert made.packed is not None and made.write_onnx is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": 1.5}, "share of the loss is 0 to 1"),
        ({"weight": 0.5}, "needs a teacher"),
        ({"lr": 0.0}, "learning rate is above 0"),
        ({"algorithm": "adabin"}, "no binary operator 'adabin'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str, task: Classification) -> None:
    with pytest.raises(InputError, match=said):
        binarize(Network(small(), task.example_inputs), task, epochs=1, **options)
    if "algorithm" in options:
        with pytest.raises(InputError, match="algorithm of binarize cannot be 'adabin'"):
            Step("binarize", options)


def test_binarize_inside_shrink(task: Classification, tmp_path: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = digits_resnet((16, 16, 16), blocks_per_stage=1)
    recipe = Recipe.of(
        ("prune", {"macs": 0.8, "round_to": 4, "criterion": "l2", "epochs": 0}),
        ("binarize", {"epochs": 8, "batch_size": 64, "lr": 5e-3, "weight": 0.5}),
    )
    out = tmp_path / "out"
    result = gossamer.shrink(
        network, task, recipe=recipe, trained=False, epochs=4, out=out, cpu=True
    )
    report = result.report
    assert report["verified"] and report["runtime"] == "packed"
    assert report["after"]["score"] > 50
    assert report["packed"]["agreement"] == 1.0
    assert report["packed"]["score"] == pytest.approx(report["after"]["score"], abs=0.3)
    # What was written runs from its files alone.
    structure, inputs, _ = load_network(out)
    stored = PackedNetwork.load(out / "packed.safetensors")
    assert {t.codec for t in stored.tensors.values()} == {"binary"}
    runner = stored.runner(structure, inputs)
    x = next(iter(task.batches("test", shuffle=False)))[0]
    with torch.inference_mode():
        assert torch.equal(runner(x), result.module.eval()(x))


# Tracks


def test_overall_metric() -> None:
    assert overall([[0.9], [0.6], [0.75]]) == pytest.approx(0.75993, abs=1e-5)
    assert overall([[0.8, 1.0], [0.6], [0.75]]) == overall([[0.9], [0.6], [0.75]])
    assert float(np.mean([0.9, 0.6, 0.75])) == pytest.approx(0.75)
    with pytest.raises(InputError, match="without items"):
        overall([])


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6))
def test_the_quadratic_mean_lies_above_the_arithmetic_one(ratios: list[float]) -> None:
    assert overall([[r] for r in ratios]) >= float(np.mean(ratios)) - 1e-9


def test_identical_networks_score_one() -> None:
    assert overall([[binary.accuracy_ratio(93.1, 93.1)]] * 4) == 1.0
    assert overall([[robustness_ratio(95, 80, 95, 80)], [robustness_ratio(95, 95, 95, 95)]]) == 1.0
    scores = [90.0, 80.0, 95.0, 60.0]
    assert training_metric([(3.0, 3.0), (4.0, 4.0)], scores, scores) == 1.0


def test_robustness_and_training_ratios() -> None:
    # The float network loses 20 points, the binary one 10: twice as robust.
    assert robustness_ratio(95, 75, 90, 80) == 2.0
    assert robustness_ratio(95, 75, 90, 91) == pytest.approx(20 / 0.1)
    # Half the time, and accuracies that vary twice as much: ratios 2 and 1/2.
    found = training_metric([(2.0, 1.0), (4.0, 2.0)], [90.0, 92.0], [88.0, 92.0])
    assert found == pytest.approx(math.sqrt((4 + 0.25) / 2))


def test_storage_and_operation_ratios() -> None:
    assert storage_ratio(11.17e6, 0.02e6) == pytest.approx(30.317, abs=1e-3)
    assert storage_ratio(5.0, 5.0) == operation_ratio(5.0, 5.0) == 1.0
    assert storage_ratio(5.0, 0.0) == 32.0 and operation_ratio(5.0, 0.0) == 64.0


def test_complexity_is_counted_by_hand(task: Classification) -> None:
    made = deployed(binarized(small(), task.example_inputs, algorithm="dorefa"))
    found = complexity(made, task.example_inputs)
    signs = 12 * 12 * 9 + 20 * 6 * 9 + 320 * 30
    stem, shortcut, head = 12 * 9 + 12, 20 * 12 + 20, 300 + 10
    scales = 2 * (12 + 20 + 30)  # a scale and an offset a channel
    assert found["real_parameters"] == stem + shortcut + head + scales
    assert found["parameters"] == found["real_parameters"] + signs
    real = 64 * 12 * 9 + 16 * 20 * 12 + 300
    assert found["real_macs"] == real
    assert found["macs"] == real + 64 * 12 * 12 * 9 + 16 * 20 * 6 * 9 + 320 * 30
    assert found["overall"] == overall([[found["storage_ratio"]], [found["operation_ratio"]]])
