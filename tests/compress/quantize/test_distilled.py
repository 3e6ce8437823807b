import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.compress.quantize.distilled import (
    DifferentiableQuantization,
    HalveOnPlateau,
    LearnedLevels,
    MixedDistillation,
    QuantizedDistillation,
    UniformlyQuantized,
    UniformOptions,
    differentiable_quantization,
    huffman_bits,
    pack_uniform,
    post_mortem,
    published_sgd,
    quantized_distillation,
    quantized_names,
)
from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.parts.grids import bucketed, nearest_levels, quantize_tensor
from gossamer.parts.packed import PackedNetwork


def cnn(width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * width, 10),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task():
    return digits(seed=0)


@pytest.fixture(scope="module")
def teacher(task):
    module = cnn(16)
    fit(Supervised(module, task), task, epochs=5, batch_size=64, seed=0)
    return module


@pytest.fixture(scope="module")
def trained(task):
    module = cnn(4)
    fit(Supervised(module, task), task, epochs=15, batch_size=64, seed=0)
    return module


# Rules


def test_one_step_by_hand(task, teacher):
    """Gradient at the quantized weights, applied to the float shadow."""
    student = cnn()
    reference = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    rule = QuantizedDistillation(
        student, task, teacher=teacher, options=UniformOptions(2), optimizer=optimizer,
        schedule=lambda _: 1.0,
    )  # fmt: skip
    one = 5000  # more than there are samples: one step an epoch
    fit(rule, task, epochs=1, batch_size=one, seed=3)

    batch = next(iter(task.batches("train", batch_size=one, seed=3)))
    at = copy.deepcopy(reference)
    for p in at.parameters():
        p.data = quantize_tensor(p.data, bits=2).dequantize()
    rule.criterion(at.train()(batch[0]), batch).backward()
    pairs = zip(student.parameters(), reference.parameters(), at.parameters(), strict=True)
    for new, old, quantized in pairs:
        torch.testing.assert_close(new, old - 0.1 * quantized.grad)
    # statistics are those of the quantized forward
    torch.testing.assert_close(student[1].running_mean, at[1].running_mean)
    assert rule.shadow is student


def test_what_is_evaluated_is_quantized(task, teacher):
    student = cnn()
    rule = QuantizedDistillation(student, task, teacher=teacher, options=UniformOptions(2, 64))
    fit(rule, task, epochs=1, batch_size=128, seed=0)
    x = next(iter(task.batches("validation")))[0]
    rule.network.eval()
    with torch.no_grad():
        evaluated = rule.network(x)
        shadow = student.eval()(x)
    fresh = cnn(seed=9).eval()
    packed = rule.quantized.packed()
    packed.load_into(fresh)
    torch.testing.assert_close(fresh(x), evaluated)
    assert not torch.allclose(shadow, evaluated, atol=1e-2)
    for name, value in packed.state_dict().items():
        if name in packed.tensors:
            assert all(len(row.unique()) <= 4 for row in bucketed(value, 64)), name


def test_quantized_training_learns_and_beats_rounding(task, teacher):
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    floating = copy.deepcopy(student)
    fit(Supervised(floating, task), task, epochs=10, batch_size=64, seed=0)
    rounded = post_mortem(Network(floating, task.example_inputs), task, bits=2)
    learned = quantized_distillation(
        Network(student, task.example_inputs), task, teacher=teacher, bits=2, epochs=25,
        batch_size=64, lr=0.05,
    )  # fmt: skip
    assert task.score(floating) > 90
    assert task.score(learned.module) > max(75, task.score(rounded.module) + 5)


def test_truncated_keeps_the_shadow_in_range(task, teacher):
    student = cnn()
    student[0].weight.data *= 10
    options = UniformOptions(4, gradient="truncated")
    rule = QuantizedDistillation(student, task, teacher=teacher, options=options)
    fit(rule, task, epochs=1, batch_size=256, seed=0)
    assert max(float(p.detach().abs().max()) for p in student.parameters()) <= 1.0


@pytest.mark.parametrize("gradient", ["complicated", "truncated"])
def test_gradient_variants_train(task, teacher, trained, gradient):
    student = copy.deepcopy(trained)
    rule = QuantizedDistillation(
        student, task, teacher=teacher, options=UniformOptions(3, gradient=gradient),
        optimizer=published_sgd(student.parameters(), 0.02),
    )  # fmt: skip
    history = fit(rule, task, epochs=4, batch_size=64, seed=0)
    assert history.loss[-1] < history.loss[0]
    assert task.score(rule.network) > 80


def test_skip_is_by_module_and_keeps_it_float(trained):
    names = quantized_names(trained, skip=["0", "5.bias"])
    assert names == ["1.weight", "1.bias", "5.weight"]
    quantized = UniformlyQuantized(trained, UniformOptions(1), skip=["0"])
    assert "0.weight" not in quantized.weights()
    packed = quantized.packed()
    assert torch.equal(packed.plain["0.weight"], trained[0].weight)
    with pytest.raises(InputError, match="no module or parameter 7"):
        quantized_names(trained, skip=["7"])


# Learned levels


def test_levels_learn_and_bn_statistics_are_stored(task, trained):
    network = Network(trained, task.example_inputs)
    before = trained[1].running_mean.clone()
    start = LearnedLevels(trained, levels=4)
    result = differentiable_quantization(
        network, task, levels=4, epochs=8, batch_size=64, lr=5e-4,
        redistribute_batches=0,
    )  # fmt: skip
    rounded = post_mortem(network, task, bits=2)
    assert torch.equal(trained[1].running_mean, before)
    assert not torch.equal(result.module[1].running_mean, before)
    assert task.score(result.module) > task.score(start) + 20
    assert task.score(result.module) > task.score(rounded.module) + 5
    assert result.storage["5.weight"] == "learned2/256"


def test_step_gradient_equals_autograd_through_indexing(task, trained):
    rule = DifferentiableQuantization(
        trained, task, levels=4, redistribute_batches=0, schedule=lambda _: 1.0,
        optimizer=lambda points: torch.optim.SGD(list(points), lr=1e-3),
    )  # fmt: skip
    before = [p.detach().clone() for p in rule.levels.points]
    one = 5000
    fit(rule, task, epochs=1, batch_size=one, seed=1)
    batch = next(iter(task.batches("train", batch_size=one, seed=1)))
    points = [p.clone().requires_grad_() for p in before]
    weights = {}
    for name, p in zip(rule.levels.names, points, strict=True):
        v = dict(trained.named_parameters())[name].detach()
        rows = bucketed(v, 256)
        low, alpha = rows.amin(1, True), rows.amax(1, True) - rows.amin(1, True)
        codes = nearest_levels((rows - low) / alpha, p.detach())
        weights[name] = (low + alpha * p[codes]).flatten()[: v.numel()].view_as(v)
    outputs = torch.func.functional_call(copy.deepcopy(trained).train(), weights, batch[0])
    rule.criterion(outputs, batch).backward()
    for new, old, p in zip(rule.levels.points, before, points, strict=True):
        torch.testing.assert_close(new.detach(), (old - 1e-3 * p.grad).sort().values)


def test_crossing_levels_are_sorted_with_their_momenta():
    levels = LearnedLevels(nn.Linear(4, 4), levels=3)
    optimizer = torch.optim.SGD(levels.points, lr=0.1, momentum=0.9)
    with torch.no_grad():
        levels.points[0].copy_(torch.tensor([0.5, 0.1, 0.9]))
    optimizer.state[levels.points[0]]["momentum_buffer"] = torch.tensor([1.0, 2.0, 3.0])
    levels.sort(optimizer)
    torch.testing.assert_close(levels.points[0].detach(), torch.tensor([0.1, 0.5, 0.9]))
    assert optimizer.state[levels.points[0]]["momentum_buffer"].tolist() == [2, 1, 3]


def test_redistribution_shifts_levels_and_keeps_their_sum(task, trained):
    rule = DifferentiableQuantization(trained, task, levels=8, learning_rate=1e-4)
    before = copy.deepcopy(trained.state_dict())
    fit(rule, task, epochs=1, batch_size=64, seed=0)
    counts = rule.levels.counts()
    assert sum(counts) == 8 * 6 and len(set(counts)) > 1
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name])  # nor did looking at gradients change it
    # the largest gradient got the most
    assert counts[rule.norms.index(max(rule.norms))] == max(counts)
    packed = rule.levels.packed()
    for name, count in zip(rule.levels.names, counts, strict=True):
        assert packed.tensors[name].bits == math.ceil(math.log2(count))


def test_mixed_mode_ends_with_quantized_distillation(task, teacher, trained):
    student = copy.deepcopy(trained)
    rule = MixedDistillation(
        student, task, teacher=teacher, options=UniformOptions(3),
        optimizer=published_sgd(student.parameters(), 0.02), levels_learning_rate=1e-4,
    )  # fmt: skip
    kinds = []
    step = rule.step
    rule.step = lambda batch: kinds.append(rule._learning_levels()) or step(batch)  # type: ignore[method-assign]
    fit(rule, task, epochs=4, batch_size=256, seed=0)
    by_epoch = [kinds[i * len(kinds) // 4] for i in range(4)]
    assert by_epoch == [False, True, False, False]
    assert task.score(rule.network) > 75


@pytest.mark.parametrize("kind", ["qd", "dq", "mixed"])
def test_killed_and_resumed_is_bitwise_the_same(task, teacher, trained, kind, tmp_path):
    def rule():
        student = copy.deepcopy(trained)
        if kind == "qd":
            return QuantizedDistillation(
                student, task, teacher=teacher,
                options=UniformOptions(2, stochastic=True), schedule=HalveOnPlateau(),
            )  # fmt: skip
        if kind == "dq":
            return DifferentiableQuantization(student, task, levels=4, learning_rate=1e-3)
        return MixedDistillation(student, task, teacher=teacher, levels_learning_rate=1e-3)

    class Killed(BaseException):
        pass

    whole = rule()
    fit(whole, task, epochs=3, batch_size=256, seed=5)
    broken = rule()
    step, calls = broken.step, []

    def dying(batch):
        if len(calls) == 6:  # in the second epoch
            raise Killed
        calls.append(1)
        return step(batch)

    broken.step = dying
    file = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        fit(broken, task, epochs=3, batch_size=256, seed=5, checkpoint=file, checkpoint_every=1)
    resumed = rule()
    fit(resumed, task, epochs=3, batch_size=256, seed=5, checkpoint=file, checkpoint_every=1)
    ours, theirs = whole.network.state_dict(), resumed.network.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_halving_follows_the_published_schedule():
    schedule = HalveOnPlateau()
    schedule.see(50.0)
    for _ in range(9):
        schedule.see(50.01)  # a gain below 0.1 % is none
    assert schedule.multiplier == 1.0
    schedule.see(50.0)
    assert schedule.multiplier == 0.5
    for _ in range(10):
        schedule.see(0.0)
    assert schedule.multiplier == 0.25
    schedule.see(60.0)
    assert schedule.stale == 0
    copied = HalveOnPlateau()
    copied.load(schedule.state())
    assert vars(copied) == vars(schedule)
    for _ in range(1000):
        schedule.see(0.0)
    assert schedule.multiplier == 0.5**11


# Stored form


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 40)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(("bits", "factor"), [(2, 14.22), (4, 7.53), (8, 3.88)])
def test_the_file_shrinks_as_the_formula_says(bits, factor, tmp_path):
    torch.manual_seed(0)
    network = nn.Linear(1024, 1024, bias=False)
    packed = pack_uniform(network, UniformOptions(bits))
    packed.save(tmp_path / "p.safetensors")
    size = (tmp_path / "p.safetensors").stat().st_size
    n = 1024 * 1024
    formula = (n * bits + 64 * -(-n // 256)) / 8
    assert packed.nbytes() == formula
    assert formula <= size <= formula + 600  # a header
    assert 4 * n / size == pytest.approx(factor, rel=0.001)


def test_file_round_trip_with_ties_and_buffers(tmp_path):
    torch.manual_seed(1)
    network = Tied()
    network.norm.running_mean.normal_()
    for packed in (
        pack_uniform(network, UniformOptions(3, 100), skip=["norm"]),
        pack_uniform(network, UniformOptions(5, None, "absmax")),
        LearnedLevels(network, levels=6, bucket=50).packed(),
    ):
        packed.save(tmp_path / "p.safetensors")
        read = PackedNetwork.load(tmp_path / "p.safetensors")
        for name, value in packed.state_dict().items():
            assert torch.equal(read.state_dict()[name], value), name
        assert read.nbytes() == packed.nbytes()
        assert set(packed.ties.items()) == {("head.weight", "embedding.weight")}
        other = Tied()
        read.load_into(other)
        assert other.head.weight is other.embedding.weight
        assert torch.equal(other.norm.running_mean, network.norm.running_mean)


def test_packing_weights_on_the_grid_loses_nothing(trained):
    packed = pack_uniform(trained, UniformOptions(3, 64))
    module = copy.deepcopy(trained)
    packed.load_into(module)
    again = pack_uniform(module, UniformOptions(3, 64))
    for name, value in packed.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_huffman_of_a_network():
    network = nn.Linear(8, 1, bias=False)
    network.weight.data = torch.tensor([[0.0, 0, 0, 0, 1, 1, 2, 3]])
    packed = pack_uniform(network, UniformOptions(2))
    assert huffman_bits(packed) == pytest.approx(1.75)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_one_sentence(data, tmp_path):
    path = tmp_path / "p.safetensors"
    if not (tmp_path / "good").exists():
        torch.manual_seed(0)
        LearnedLevels(nn.Linear(9, 5), levels=5, bucket=16).packed().save(tmp_path / "good")
    content = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    path.write_bytes(content)
    try:
        PackedNetwork.load(path).state_dict()
    except InputError as error:
        assert "\n" not in str(error)


def test_files_of_another_kind_or_network(tmp_path, trained):
    with pytest.raises(InputError, match="does not exist"):
        PackedNetwork.load(tmp_path / "absent")
    packed = pack_uniform(trained, UniformOptions(2))
    with pytest.raises(InputError, match="no tensor"):
        packed.load_into(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"0\.weight has shape"):
        packed.load_into(cnn(5))


# Steps


def test_steps_do_not_change_what_they_are_given(task, teacher, trained, tmp_path):
    network = Network(trained, task.example_inputs)
    before = copy.deepcopy(trained.state_dict())
    file = tmp_path / "packed.safetensors"
    results = [
        post_mortem(network, task, bits=2),
        quantized_distillation(network, task, teacher=teacher, bits=2, epochs=1, batch_size=512),
        differentiable_quantization(network, task, levels=4, epochs=1, batch_size=512),
    ]
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert network.steps == ()
    assert [r.steps[-1]["step"] for r in results] == [
        "post_mortem", "quantized_distillation", "differentiable_quantization"
    ]  # fmt: skip
    assert results[0].packed is not None
    results[0].packed.save(file)
    assert PackedNetwork.load(file).nbytes() == results[0].steps[-1]["report"]["packed_bytes"]
    with pytest.raises(InputError, match="needs a teacher"):
        quantized_distillation(network, task)
