import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.compress.quantize.fixed_point import (
    Adaptation,
    AdaptivePrecision,
    BlockFloating,
    FixedPointNetwork,
    FixedPointTraining,
    Numerics,
    ReduceOnPlateau,
    SwitchPolicy,
    block_format,
    divergence,
    fixed_point,
    gradient_diversity,
    model_performance,
    multiply_adds,
    next_lookback,
    performance,
    published_sgd,
    push_down,
    push_up,
    rounded_after_training,
    scaled_profile,
    variance_scaling_,
)
from gossamer.compress.recipe import Recipe
from gossamer.core.errors import InputError
from gossamer.core.fit import constant, fit
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import digits_resnet
from gossamer.parts.fixed_point import FixedPoint, FixedPointTensor, integer_bits
from gossamer.parts.packed import PackedNetwork
from tests.resuming import whole_and_resumed


def cnn(seed=0, norm=False):
    torch.manual_seed(seed)
    return ConvNet(1, 8, (6, "pool", 8, "pool"), (16,), norm=norm)


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return digits(seed=0)


# The grid


def test_fixed_point_numbers():
    x = torch.tensor([0.3, -1.26, 7.9, -9.0, 100.0])
    eight = torch.tensor([0.3125, -1.25, 7.875, -8.0, 7.9375])
    four = torch.tensor([0.25, -1.25, 1.75, -2.0, 1.75])
    assert torch.equal(FixedPoint(8, 4).quantize(x), eight)
    assert torch.equal(FixedPoint(4, 2).quantize(x), four)
    assert (FixedPoint(8, 4).low, FixedPoint(8, 4).high) == (-8.0, 7.9375)
    assert str(FixedPoint(8, 4)) == "<8,4>"
    for wrong in ((0, 0), (33, 4), (8, 65)):
        with pytest.raises(InputError, match="1 to 32 bits"):
            FixedPoint(*wrong)


def test_random_rounding_is_right_on_average():
    x = torch.full((100_000,), 0.3)
    generator = torch.Generator().manual_seed(0)
    drawn = FixedPoint(8, 2).quantize(x, stochastic=True, generator=generator)
    assert set(drawn.tolist()) == {0.25, 0.5}
    standard_error = 0.25 * math.sqrt(0.2 * 0.8 / len(x))
    assert abs(float(drawn.double().mean()) - 0.3) < 3 * standard_error


@settings(max_examples=60, deadline=None)
@given(
    word=st.integers(1, 32), fraction=st.integers(-10, 40), seed=st.integers(0, 9),
    spread=st.integers(-20, 20),
)  # fmt: skip
def test_grid_numbers_stay_and_words_are_held(word, fraction, seed, spread):
    format = FixedPoint(word, fraction)
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2.0**spread
    on_grid = format.quantize(x)
    for stochastic in (False, True):
        assert torch.equal(format.quantize(on_grid, stochastic=stochastic), on_grid)
    codes = (on_grid.double() * 2.0**fraction).long()
    assert int(codes.min()) >= -(2 ** (word - 1)) and int(codes.max()) <= 2 ** (word - 1) - 1
    inside = (x >= format.low) & (x <= format.high)
    assert bool(((on_grid - x).abs()[inside] <= format.step / 2).all())
    stored = FixedPointTensor.of(on_grid, format)
    assert stored.bits <= word
    again = FixedPointTensor.restore(stored.record(), stored.arrays())
    assert torch.equal(again.decode(), on_grid)
    assert again.format == format
    arrays = stored.arrays().values()
    assert stored.nbytes() == sum(a.numel() * a.element_size() for a in arrays)


def test_stored_bytes():
    w = torch.zeros(80, 100)
    w[:, :50] = torch.arange(50) / 16 - 1.5
    dense = FixedPointTensor.of(w + 1 / 16, FixedPoint(12, 4))
    assert dense.bits == 6 and dense.nbytes() == 8000 * 6 // 8
    sparse = FixedPointTensor.of(w, FixedPoint(12, 4))
    # 49 of 100 columns are not zero (one of the fifty is): a bit for each, 6 for those
    assert sparse.nbytes() == 1000 + 80 * 49 * 6 // 8
    wide = FixedPointTensor.of(torch.linspace(-100, 100, 80), FixedPoint(32, 20))
    assert wide.bits == 28 and wide.nbytes() == 80 * 28 // 8


# Choosing formats


def test_divergence_of_normal_weights():
    # nats, mean of 20 draws, with a third around it
    expected = {4: 9.98, 5: 0.041, 6: 0.018, 7: 0.005, 10: 9e-5}
    found = dict.fromkeys(expected, 0.0)
    for seed in range(20):
        w = 0.1 * torch.randn(4096, generator=torch.Generator().manual_seed(seed))
        for fraction in expected:
            format = FixedPoint(fraction + 8, fraction)
            found[fraction] += divergence(w, format.quantize(w), 20) / 20
    for fraction, value in expected.items():
        assert found[fraction] == pytest.approx(value, rel=0.34)
    values = list(found.values())
    assert values == sorted(values, reverse=True)


def test_divergence_by_hand():
    # two bins; rounding moves one of four weights
    w = torch.tensor([0.0, 0.1, 0.9, 1.0])
    moved = torch.tensor([0.0, 0.9, 0.9, 1.0])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(w, moved, 2) == pytest.approx(expected, abs=1e-9)
    assert divergence(w, w, 2) == 0.0
    # beyond the range counts in the last bin
    assert divergence(w, w + torch.tensor([0, 0, 0, 5.0]), 2) == 0.0


@pytest.mark.parametrize("start", [FixedPoint(8, 4), FixedPoint(16, 8), FixedPoint(32, 24)])
@pytest.mark.parametrize("scale", [0.02, 0.1, 3.0])
def test_push_down_finds_the_smallest(start, scale):
    w = scale * torch.randn(2000, generator=torch.Generator().manual_seed(1))
    found = push_down(w, start, bins=20, epsilon=0.01)

    def kl(word, fraction):
        return divergence(w, FixedPoint(word, fraction).quantize(w), 20)

    if kl(start.word_length, start.fraction) > 0.01:
        assert found == start
        return
    fraction = start.fraction
    while fraction > 4 and kl(start.word_length, fraction - 1) <= 0.01:
        fraction -= 1
    assert found.fraction == fraction
    assert kl(found.word_length, fraction) <= 0.01
    needed = fraction + 1 + max(0, math.ceil(math.log2(float(w.abs().max()))))
    assert found.word_length >= needed
    assert all(kl(word, fraction) > 0.01 for word in range(needed, found.word_length))


def test_push_down_of_constants():
    assert push_down(torch.zeros(5), FixedPoint(16, 8), bins=10) == FixedPoint(5, 4)
    assert integer_bits(torch.tensor([0.3, -5.0])) == 3
    assert integer_bits(torch.tensor([0.2])) == -2
    assert block_format(torch.tensor([0.3, -5.0]), 8) == FixedPoint(8, 4)


@pytest.mark.parametrize(
    ("diversity", "expected"),
    [
        (1.5, [(13, 5), (13, 5), (13, 5)]),
        (3.0, [(12, 4), (32, 24), (32, 24)]),
        (4.0, [(13, 5), (16, 8), (19, 11)]),
        (6.0, [(14, 6), (22, 14), (29, 21)]),
        (10.0, [(13, 5), (27, 19), (32, 24)]),
        (0.0, [(13, 5), (13, 5), (13, 5)]),
        (math.inf, [(13, 5), (27, 19), (32, 24)]),
    ],
)
def test_push_up(diversity, expected):
    for strategy, (word, fraction) in zip(("min", "mean", "max"), expected, strict=True):
        found = push_up(diversity, FixedPoint(8, 4), strategy=strategy)
        assert found == FixedPoint(word, fraction), strategy


@given(
    diversity=st.floats(0, 1e9), word=st.integers(5, 32), data=st.data(),
    strategy=st.sampled_from(["min", "mean", "max"]),
)  # fmt: skip
def test_push_up_keeps_its_buffer(diversity, word, data, strategy):
    fraction = data.draw(st.integers(0, word - 1))
    found = push_up(diversity, FixedPoint(word, fraction), strategy=strategy)
    assert found.fraction <= 24 and found.word_length <= 32
    assert found.word_length - found.fraction >= 8


def test_diversity_of_gradients():
    def diversity(*gradients):
        rows = torch.tensor(gradients)
        return gradient_diversity(float(rows.sum(0).norm()), float(rows.norm(dim=1).sum()))

    assert diversity((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)) == pytest.approx(3.0)
    assert diversity(*[(0.6, -0.8)] * 7) == pytest.approx(1.0)
    assert diversity(*torch.eye(9).tolist()) == pytest.approx(3.0)
    assert gradient_diversity(0.0, 0.0) == 0.0
    assert gradient_diversity(0.0, 2.0) == math.inf


def test_lookback():
    assert [next_lookback(d, 10) for d in (1, 2, 5, 20)] == [40, 24, 14, 10]
    assert [next_lookback(d, 100) for d in (1, 2, 5, 20)] == [100, 84, 74, 71]
    assert next_lookback(0.0, 10) == 40
    assert next_lookback(math.inf, 10) == 10


# Rules


def test_float_words_match_sgd_with_normalised_gradients(task):
    network = cnn()
    reference = copy.deepcopy(network)
    numerics = Numerics(quantize_gradients=False, l1=0.0)
    rule = FixedPointTraining(
        network, task, start=FixedPoint(32, 24), numerics=numerics, schedule=constant,
        optimizer=published_sgd(network, lr=0.01),
    )  # fmt: skip
    fit(rule, task, epochs=1, batch_size=128, seed=0)

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    for batch in task.batches("train", batch_size=128, seed=0):
        optimizer.zero_grad()
        task.loss(reference, batch).backward()
        for p in reference.parameters():
            p.grad /= p.grad.norm()
        optimizer.step()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_loss_has_its_penalties(task):
    network = cnn()
    before = copy.deepcopy(network)
    numerics = Numerics(normalise=False, quantize_gradients=False, l1=0.01, l2=0.2)
    rule = FixedPointTraining(
        network, task, start=FixedPoint(8, 4), numerics=numerics, schedule=constant,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )  # fmt: skip
    fit(rule, task, epochs=1, batch_size=5000, seed=0)
    (step,) = rule.log
    # By hand: gradients at the rounded weights; rounding is drawn, so the draw is repeated.
    at = copy.deepcopy(before)
    with torch.random.fork_rng():
        from gossamer.core.task import seed_of

        torch.manual_seed(seed_of("step", 0, 0, 0))
        rounded = FixedPointNetwork(before, FixedPoint(8, 4)).weights(stochastic=True)
    with torch.no_grad():
        for name, p in at.named_parameters():
            p.copy_(rounded[name])
    weights = [p for p in at.parameters() if p.ndim > 1]
    (batch,) = task.batches("train", batch_size=5000, seed=0)
    penalty = sum(0.01 * w.abs().sum() + 0.1 * w.square().sum() for w in weights)
    (task.loss(at, batch) + penalty).backward()
    for new, old, p in zip(network.parameters(), before.parameters(), at.parameters(), strict=True):
        torch.testing.assert_close(new, old - p.grad, rtol=1e-4, atol=1e-5)
    densities = [float((w != 0).float().mean()) for w in weights]
    assert [entry[:2] for entry in step] == [[8.0, pytest.approx(d)] for d in densities]


def test_adapting_keeps_weights_on_their_grids(task):
    network = cnn(norm=True)
    rule = AdaptivePrecision(
        network, task, adaptation=Adaptation(lookback=(3, 6), resolution=(10, 50))
    )
    switched = []
    observe = rule.observe

    def watching(loss, gradients):
        observe(loss, gradients)
        for name, value in rule.fixed.weights(stochastic=True).items():
            format = rule.fixed.formats[name]
            assert format == rule.fixed.formats[rule.fixed.leaders[name]]
            assert torch.equal(format.quantize(value), value)
            assert format.fraction <= 24 and format.word_length <= 32
        switched.append(tuple(rule.fixed.word_lengths().values()))

    rule.observe = watching
    fit(rule, task, epochs=3, batch_size=64, seed=0)
    assert len(set(switched)) > 2
    assert len(set(switched[-1])) > 1
    for name in rule.fixed.weight_names:
        master = network.get_parameter(name)
        assert not torch.equal(rule.fixed.formats[name].quantize(master), master)
    assert rule.fixed.leaders["1.weight"] == rule.fixed.leaders["0.bias"] == "0.weight"


def test_switches_do_what_push_down_and_up_say(task):
    """One tensor followed by hand through its gradients."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    adaptation = Adaptation(lookback=(2, 4), resolution=(5, 9), strategy="mean")
    numerics = Numerics(quantize_gradients=False)
    rule = AdaptivePrecision(network, task, adaptation=adaptation, numerics=numerics)
    format, lookback, bins = FixedPoint(8, 4), 2, 5
    held, losses, strategy = [], [], "mean"
    observe = rule.observe

    def following(loss, gradients):
        nonlocal format, lookback, bins, strategy
        recent = losses[-lookback:]
        if recent:
            worse = sum(recent) / len(recent) <= loss
            steps = {"mean": "max", "max": "max"}
            strategy = steps[strategy] if worse else "mean"
        losses.append(loss)
        held.append(gradients["1.weight"].clone())
        diversity = len(held) / float(sum(held).norm())
        lookback = next_lookback(diversity, lookback, bounds=(2, 4))
        bins = min(bins + 1, 9) if lookback == 4 else max(bins - 1, 5) if lookback == 2 else bins
        if len(held) >= lookback:
            smallest = push_down(network[1].weight, format, bins=bins)
            format = push_up(diversity, smallest, strategy=strategy)
            held.clear()
        observe(loss, gradients)
        assert rule.fixed.formats["1.weight"] == format
        assert (rule.watched["1.weight"].lookback, rule.strategy) == (lookback, strategy)

    rule.observe = following
    fit(rule, task, epochs=2, batch_size=64, seed=0)
    assert rule.observations("1.weight") == (lookback, bins)


def test_adapting_learns_and_its_words_differ(task):
    network = cnn(norm=True)
    rule = AdaptivePrecision(
        network, task, adaptation=Adaptation(lookback=(5, 20), resolution=(10, 50)),
        optimizer=published_sgd(network, lr=0.05),
    )  # fmt: skip
    fit(rule, task, epochs=8, batch_size=64, seed=0)
    assert task.score(rule.network) > 85
    found = model_performance(rule, task.example_inputs, samples=64)
    assert found.train_speedup > 1 and 0 < found.overhead < 0.2


@pytest.mark.parametrize("kind", ["adapt", "muppet", "accumulate"])
def test_killed_and_resumed_is_bitwise_the_same(task, kind, tmp_path):
    def rule():
        network = cnn()
        optimizer = published_sgd(network, lr=0.05)
        if kind == "muppet":
            policy = SwitchPolicy(beta=0.0, violations=1, resolution=2)
            return BlockFloating(network, task, policy=policy, optimizer=optimizer)
        numerics = Numerics(accumulate=3 if kind == "accumulate" else 1)
        adaptation = Adaptation(lookback=(2, 5), resolution=(5, 9))
        return AdaptivePrecision(
            network, task, adaptation=adaptation, numerics=numerics, optimizer=optimizer,
            schedule=ReduceOnPlateau(patience=0),
        )  # fmt: skip

    whole, resumed = whole_and_resumed(
        rule,
        task,
        dies_at=17,
        file=tmp_path / "state.safetensors",
        epochs=4,
        batch_size=128,
        seed=5,
    )
    assert resumed.fixed.formats == whole.fixed.formats
    assert torch.equal(torch.tensor(resumed.log), torch.tensor(whole.log))
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name
    if kind == "muppet":
        assert resumed.spent == whole.spent and whole.level > 0


def test_accumulated_minibatches_are_one_update(task):
    def trained(batch_size, accumulate):
        network = cnn()
        numerics = Numerics(
            normalise=True, quantize_gradients=False, l1=1e-3, accumulate=accumulate
        )
        rule = FixedPointTraining(
            network, task, start=None, numerics=numerics, schedule=constant,
            optimizer=published_sgd(network, lr=0.01),
        )  # fmt: skip
        fit(rule, Whole(), epochs=1, batch_size=batch_size, seed=0)
        return network

    class Whole:
        """The training split without augmentation, 64 images."""

        def __getattr__(self, name):
            return getattr(task, name)

        def steps_per_epoch(self, split, batch_size):
            return 64 // batch_size

        def batches(self, split, *, batch_size, **_):
            batch = next(iter(task.batches("train", batch_size=64, shuffle=False)))
            for start in range(0, 64, batch_size):
                yield batch[0][start : start + batch_size], batch[1][start : start + batch_size]

    pairs = zip(trained(64, 1).parameters(), trained(16, 4).parameters(), strict=True)
    for one, four in pairs:
        torch.testing.assert_close(one, four, rtol=0, atol=1e-6)


def test_muppet_follows_its_profile_and_its_diversity(task):
    assert scaled_profile(114) == (22, 22, 10, 15, 45)
    assert sum(scaled_profile(20)) == 20
    network = cnn()
    policy = SwitchPolicy(profile=(1, 2, 1, 1))
    rule = BlockFloating(network, task, policy=policy)
    fit(rule, task, epochs=6, batch_size=128, seed=0)
    assert rule.spent == [1, 2, 1, 1, 1]
    words = torch.tensor(rule.log)[:, :, 0]
    assert words[:: len(words) // 6, 0].tolist() == [8, 12, 12, 14, 16, 32]
    assert set(rule.fixed.word_lengths().values()) == {32}

    rule = BlockFloating(cnn(), task, policy=SwitchPolicy(alpha=1.0, beta=0.0, violations=1))
    weights = rule.fixed.weight_names
    # Diversities 1 (one gradient), then .5 (two equal ones): ratio 2 is above 1.
    rule._last_gradients = {name: torch.ones(3) for name in weights}
    rule.spent[0] = 1
    assert not rule._goes_on()
    rule.spent[0] = 2
    assert rule._goes_on()
    calm = BlockFloating(cnn(), task, policy=SwitchPolicy(alpha=2.0, beta=1.0, decay=0.1))
    calm._last_gradients = rule._last_gradients
    assert not any(calm._goes_on() for _ in range(2))


def test_block_formats_hold_every_tensor(task):
    rule = BlockFloating(cnn(), task)
    with torch.no_grad():
        for i, p in enumerate(rule.master.parameters()):
            p.mul_(10.0 ** (i - 3))
    rule.before_step()
    for name, p in rule.master.named_parameters():
        format = rule.fixed.formats[name]
        error = (format.quantize(p.detach()) - p.detach()).abs().max()
        assert error <= format.step
        assert format.step <= float(p.detach().abs().max()) / 63


def test_plateau():
    plateau = ReduceOnPlateau(factor=0.5, patience=2, threshold=0.1)
    for loss in (1.0, 0.95, 0.91, 0.5):
        plateau.see(loss)
    assert plateau.multiplier == 1.0
    for _ in range(3):
        plateau.see(0.49)
    assert plateau.multiplier == 0.5
    copied = ReduceOnPlateau()
    copied.load(plateau.state())
    assert (copied.best, copied.stale, copied.multiplier) == (0.5, 0, 0.5)


def test_fresh_weights():
    network = nn.Sequential(nn.Conv2d(8, 500, 3), nn.Linear(500, 400))
    variance_scaling_(network, scale=2.0, seed=3)
    conv, linear = network
    # A normal cut at two deviations keeps .8796 of its deviation.
    assert float(conv.weight.detach().std()) == pytest.approx(0.8796 * math.sqrt(2 / 72), rel=0.02)
    assert float(conv.weight.detach().abs().max()) <= 2 * math.sqrt(2 / 72)
    assert float(linear.bias.detach().abs().max()) <= 1 / math.sqrt(500)
    assert float(linear.bias.detach().std()) == pytest.approx(1 / math.sqrt(3 * 500), rel=0.1)
    before = copy.deepcopy(network.state_dict())
    variance_scaling_(network, scale=2.0, seed=3)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


# The analytical model


def test_performance_by_hand():
    words = torch.tensor([[8, 4], [16, 8]])
    densities = torch.tensor([[0.5, 1.0], [0.8, 0.9]])
    found = performance([100, 200], words, densities, sizes=[10, 30])
    assert found.quantized_cost == pytest.approx(3920)
    assert found.float_cost == 19200
    assert found.train_speedup == pytest.approx(1.6609, abs=1e-4)
    assert found.inference_speedup == pytest.approx(3.5294, abs=1e-4)
    assert found.size_ratio == pytest.approx((10 * 16 * 0.8 + 30 * 8 * 0.9) / (32 * 40))
    assert found.size_ratio_by_layer == pytest.approx(12 * 0.85 / 32)
    assert found.overhead == 0.0


def test_overhead_by_hand():
    one = torch.ones(1, 1)
    found = performance(
        [1000], 12 * one, 0.5 * one, sizes=[40], lookbacks=20 * one, resolutions=30 * one,
        accumulate=2, samples=4,
    )  # fmt: skip
    # b = 2 log2(12 - 8) = 4; 3 d b r (1 - sp) = 7200; (lb + 1) d + 1 = 841
    overhead = 32 * (7200 + 841) / (20 * 2) / 4
    assert found.quantized_cost == pytest.approx(0.5 * (12000 + overhead))
    assert found.overhead == pytest.approx(overhead / (12000 + overhead))
    short = performance([1000], 8 * one, one, sizes=[40], lookbacks=20 * one, resolutions=30 * one)
    assert short.quantized_cost == pytest.approx(8000 + 32 * (3 * 40 * 30 + 841) / 20)


def test_multiply_adds_of_a_convolution():
    network = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Flatten(), nn.Linear(2048, 10))
    found = multiply_adds(network, (torch.zeros(2, 16, 8, 8),))
    assert found == {"0.weight": 589_824, "2.weight": 40_960}


# Stored form, integers


def test_integer_layers_equal_simulated_ones():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = FixedPoint(12, 9), FixedPoint(14, 6)
    x = 4 * torch.randn(5, 6, 9, 9, generator=generator)
    cases = [
        (nn.Conv2d(6, 8, 3, padding=1), {}),
        (nn.Conv2d(6, 4, 3, stride=2, padding=(2, 0), dilation=(1, 2), groups=2, bias=False), {}),
        (nn.Conv2d(6, 8, (3, 2), padding="same"), {}),
        (nn.Linear(9, 7), {}),
    ]
    for layer, _ in cases:
        network = FixedPointNetwork(layer, weight)
        packed = network.packed(inputs)
        runner = packed.runner(layer, (x,))
        exact = copy.deepcopy(layer).double()
        for name, value in packed.state_dict().items():
            exact.get_parameter(name).data.copy_(value)
        simulated = exact(inputs.quantize(x).double()).float()
        with torch.no_grad():
            assert torch.equal(runner(x), simulated)
    # and in plain integers: the sum of products, shifted by both fractions
    layer = nn.Linear(9, 7, bias=False)
    packed = FixedPointNetwork(layer, weight).packed(inputs)
    codes = packed.tensors["weight"].codes
    x_codes = (inputs.quantize(x) * 2**6).to(torch.int64)
    sums = (x_codes.unsqueeze(-2) * codes.long()).sum(-1)
    with torch.no_grad():
        found = packed.runner(layer, (x,))(x)
    assert torch.equal(found, (sums.double() / 2 ** (9 + 6)).float())


def test_a_network_in_integers_equals_its_simulation(task, tmp_path):
    # Words so short that float32 adds all products exactly, in any order.
    network = FixedPointNetwork(cnn(), FixedPoint(8, 6), round_inputs=True).eval()
    network.packed(FixedPoint(8, 6)).save(tmp_path / "p")
    runner = PackedNetwork.load(tmp_path / "p").runner(network.network, task.example_inputs)
    x = next(iter(task.batches("validation", batch_size=100)))[0]
    with torch.no_grad():
        assert torch.equal(runner(x), network(x))
        assert not torch.equal(network(x), network.network(x))


@pytest.mark.parametrize("make", [cnn, digits_resnet], ids=["cnn", "resnet"])
def test_file_round_trip_and_run(make, task, tmp_path):
    network = FixedPointNetwork(make(), FixedPoint(16, 12)).eval()
    name = network.weight_names[1]
    network.set_format(name, FixedPoint(27, 20))
    with torch.no_grad():
        parameter = network.network.get_parameter(network.weight_names[-1])
        parameter.mul_(torch.rand(parameter.shape) < 0.2)
    packed = network.packed()
    packed.save(tmp_path / "p")
    read = PackedNetwork.load(tmp_path / "p")
    for key, value in packed.state_dict().items():
        assert torch.equal(read.state_dict()[key], value)
    rounded = network.weights(stochastic=False)
    assert all(torch.equal(read.state_dict()[key], value) for key, value in rounded.items())
    size = (tmp_path / "p").stat().st_size
    tensors = len(packed.tensors) + len(packed.plain)
    assert size - packed.nbytes() - packed.plain_nbytes() < 300 * tensors
    x = next(iter(task.batches("validation", batch_size=100)))[0]
    runner = read.runner(network.network, task.example_inputs)
    with torch.no_grad():
        torch.testing.assert_close(runner(x), network(x))
    # The codes stay integers in memory.
    assert not any(w.shape == parameter.shape for w in runner.parameters())


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_one_sentence(data, tmp_path):
    good = tmp_path / "good"
    if not good.exists():
        layer = nn.Linear(9, 5)
        layer.weight.data[:, 1:8] = 0
        FixedPointNetwork(layer, FixedPoint(24, 20)).packed(FixedPoint(9, 3)).save(good)
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    (tmp_path / "p").write_bytes(content)
    try:
        PackedNetwork.load(tmp_path / "p").state_dict()
    except InputError as error:
        assert "\n" not in str(error)


def test_rounding_after_training():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 10))
    with torch.no_grad():
        network[1].weight.mul_(100)
        network[0].bias.fill_(5.0)
    made = rounded_after_training(network, 9)
    assert set(made.word_lengths().values()) == {9}
    for name, p in network.named_parameters():
        format = made.formats[name]
        assert (format.quantize(p.detach()) - p.detach()).abs().max() <= format.step
    chosen = rounded_after_training(network, bins=50)
    for name in chosen.weight_names:
        w, format = network.get_parameter(name).detach(), chosen.formats[name]
        assert divergence(w, format.quantize(w), 50) <= 0.01
        coarser = FixedPoint(format.word_length, format.fraction - 1)
        assert divergence(w, coarser.quantize(w), 50) > 0.01
    assert float(chosen.formats["0.bias"].quantize(torch.tensor(5.0))) == 5.0


# The step


def test_the_step(task, tmp_path):
    module = cnn()
    before = copy.deepcopy(module.state_dict())
    network = Network(module, task.example_inputs)
    options = {"lookback": (2, 5), "resolution": (5, 20), "epochs": 2, "batch_size": 64}
    for method in ("adapt", "muppet", "fixed", "round"):
        made = fixed_point(network, task, method=method, restart=method == "fixed", **options)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        assert made.runtime == "packed"
        report = made.steps[-1]["report"]
        assert report["packed_bytes"] == made.packed.nbytes()
        made.packed.save(tmp_path / "p")
        runner = PackedNetwork.load(tmp_path / "p").runner(made.module, task.example_inputs)
        x = next(iter(task.batches("validation")))[0]
        with torch.no_grad():
            torch.testing.assert_close(runner(x), made.module.eval()(x))
    with pytest.raises(InputError, match="pairs"):
        fixed_point(network, task, lookback=(1, 2, 3))
    with pytest.raises(InputError, match="lookback is a smallest"):
        fixed_point(network, task, lookback=(5, 2))
    with pytest.raises(InputError, match="learning rate above 0"):
        fixed_point(network, task, lr=-1.0)
    with pytest.raises(InputError, match="method is"):
        fixed_point(network, task, method="other")


def test_pruned_weights_stay_zero(task):
    module = cnn()
    with torch.no_grad():
        module[0].weight.mul_(torch.rand(module[0].weight.shape) < 0.5)
    network = Network(module, task.example_inputs, storage={"0.weight": "sparse"})
    made = fixed_point(network, task, lookback=(2, 5), epochs=2, batch_size=64)
    zero = module[0].weight == 0
    assert bool((made.module[0].weight[zero] == 0).all())
    assert bool((made.module[0].weight != 0).any())


def test_inside_shrink(task, tmp_path):
    recipe = Recipe.of(
        ("prune", {"macs": 0.7, "epochs": 0}),
        ("fixed-point", {"lookback": [2, 5], "resolution": [5, 20], "epochs": 3, "lr": 0.05,
                         "batch_size": 64, "inputs": [16, 8]}),
    )  # fmt: skip
    shrunk = gossamer.shrink(
        cnn(norm=True), task, recipe=recipe, trained=False, epochs=3, out=tmp_path / "o"
    )
    packed = shrunk.report["packed"]
    assert packed["agreement"] > 0.95
    assert packed["bytes"] < packed["float_bytes"]
    assert shrunk.report["after"]["macs"] < 0.75 * shrunk.report["before"]["macs"]
    with pytest.raises(InputError, match="the option method"):
        Recipe.of(("fixed-point", {"method": "magic"}))
