import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from gossamer.compress.quantize.post_training import _calibration_inputs, int8, pays
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.export import OnnxRunner, onnx_model, write_onnx
from gossamer.core.fit import Supervised, fit
from gossamer.core.network import Network
from gossamer.datasets.digits import digits


def block(inputs, outputs):
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


@pytest.fixture(scope="module")
def task():
    return digits(seed=0)


@pytest.fixture(scope="module")
def network(task):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = nn.Sequential(
        *block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    fit(Supervised(module, task), task, epochs=4, batch_size=64, seed=0)
    # Spread the channels' magnitudes (a batch norm after them undoes it): where one scale a
    # tensor is poor and one scale a channel is not.
    with torch.no_grad():
        spread = 2.0 ** torch.linspace(-5, 5, 64)
        module[3].weight *= spread.view(-1, 1, 1, 1)
        module[4].running_mean *= spread
        module[4].running_var *= spread**2
        module[4].eps = 0.0
    return Network(module.eval(), task.example_inputs)


@pytest.fixture(scope="module")
def quantized(network, task):
    return int8(network, task)


def model_of(network, path):
    write_onnx(network, path)
    return onnx.load(path)


def test_accuracy_and_bytes(network, quantized, task, tmp_path):
    report = quantized.steps[-1]["report"]
    assert report["float_score"] == pytest.approx(task.score(network.module, "validation"))
    assert report["float_score"] > 90
    assert report["int8_score"] > report["float_score"] - 1.5
    model_of(quantized, tmp_path / "q.onnx")
    size = (tmp_path / "q.onnx").stat().st_size
    assert size == report["int8_bytes"]
    # a byte a weight, and little more: scales, zero points, biases, nodes
    weights = sum(p.numel() for p in network.module.parameters())
    assert weights < size < 1.15 * weights
    assert 0.25 < size / report["float_bytes"] < 0.29


def test_the_file_computes_in_integers_per_channel(network, quantized, tmp_path):
    model = model_of(quantized, tmp_path / "q.onnx")
    initial = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    kernels = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in initial
        and initial[node.input[0]].ndim == 4
    }
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    for node in convolutions:
        dequantize = kernels[node.input[1]]
        weight, scale = initial[dequantize.input[0]], initial[dequantize.input[1]]
        assert weight.dtype == np.int8 and scale.shape == (weight.shape[0],)
        # symmetric: every channel reaches one end of the grid, none leaves it
        assert np.abs(weight.astype(int)).reshape(len(weight), -1).max(1).min() == 127
        assert not initial[dequantize.input[2]].any()
    # the kernels are those of the network with batch norm folded
    module = network.module
    folded = torch.nn.utils.fuse_conv_bn_eval(module[3], module[4]).weight.detach().numpy()
    dequantize = kernels[convolutions[1].input[1]]
    got = initial[dequantize.input[0]] * initial[dequantize.input[1]].reshape(-1, 1, 1, 1)
    step = initial[dequantize.input[1]].reshape(-1, 1, 1, 1)
    assert np.all(np.abs(got - folded) <= step / 2 * 1.001)


def test_one_scale_a_tensor_is_worse(network, task, quantized, tmp_path):
    by_tensor = int8(network, task, per_channel=False)
    model = model_of(by_tensor, tmp_path / "t.onnx")
    initial = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    scales = [
        initial[node.input[1]].size
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in initial
        and initial[node.input[0]].ndim == 4
    ]  # fmt: skip
    assert scales == [1, 1, 1]
    x = next(iter(task.batches("validation", batch_size=128)))[0]
    reference = network.module(x).detach()

    def error(candidate):
        write_onnx(candidate, tmp_path / "e.onnx")
        return float((OnnxRunner(tmp_path / "e.onnx")(x) - reference).norm() / reference.norm())

    assert error(quantized) < 0.1
    assert error(quantized) < error(by_tensor)


def test_the_given_network_is_not_changed(network, task):
    before = {name: t.clone() for name, t in network.module.state_dict().items()}
    result = int8(network, task, samples=64, calibration="percentile")
    assert network.write_onnx is None and network.steps == ()
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert result.steps[-1]["step"] == "int8"
    assert result.storage["3.weight"] == "int8/channel" and "4.weight" not in result.storage


def test_metadata_travel_and_batch_stays_free(quantized, tmp_path):
    write_onnx(quantized, tmp_path / "q.onnx", metadata={"labels": ["0", "1"]})
    runner = OnnxRunner(tmp_path / "q.onnx")
    assert runner.metadata() == {"labels": ["0", "1"]}
    assert runner(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_calibration_sees_all_of_the_training_split(task):
    inputs = torch.cat([x for (x,) in _calibration_inputs(task, 512, 64)])
    assert 450 <= len(inputs) <= task.size("train")
    assert len({len(x) for (x,) in _calibration_inputs(task, 512, 64)}) == 1
    whole = [batch[0] for batch in task.batches("train", batch_size=53, shuffle=False)]
    places = [i for i, x in enumerate(whole) if any(torch.equal(x, c) for c in inputs.split(53))]
    assert places[0] == 0 and places[-1] >= len(whole) - 2  # from the first to the last
    few = _calibration_inputs(task, 1, 64)
    assert len(few) == 1


def test_operators_can_stay_float(network, task, tmp_path):
    model = model_of(int8(network, task, samples=32, skip_operators=["Gemm"]), tmp_path / "q.onnx")
    initial = {t.name: t for t in model.graph.initializer}
    (gemm,) = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert initial[gemm.input[1]].data_type == onnx.TensorProto.FLOAT


def test_whether_it_pays_is_measured(network, quantized, task):
    payoff = pays(network, quantized, task, rounds=5, need_speed=False, max_drop=2.0)
    assert payoff.bytes_ratio < 0.3 and payoff.speed.rounds == 5
    assert payoff.score_before == quantized.steps[-1]["report"]["float_score"]
    same = pays(network, network, task, rounds=5)
    assert not same.pays  # not smaller, not faster
    hopeless = pays(network, quantized, task, rounds=5, need_speed=False, max_drop=-101.0)
    assert not hopeless.pays


def test_bad_options(network, task):
    with pytest.raises(InputError, match="calibrations"):
        int8(network, task, calibration="guess")
    with pytest.raises(InputError, match="at least one sample"):
        int8(network, task, samples=0)

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match="Branch"):
        int8(Network(Branch(), task.example_inputs), task)


def test_float_file_of_the_same_network_is_not_disturbed(network, quantized):
    data = onnx_model(network.module, network.example_inputs).SerializeToString()
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(OnnxRunner(data)(x), network.module(x), atol=1e-4, rtol=1e-4)
