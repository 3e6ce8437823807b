import time

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.core.export import onnx_model
from gossamer.core.network import Network
from gossamer.hardware.measure import (
    EnergyMeter,
    Timing,
    compare,
    measure,
    measured_costs,
    peak_memory_of,
)


def timing(name, rounds, batch=1):
    return Timing(name, "torch", batch, 1, np.asarray(rounds, dtype=float))


def test_latency_summary_by_hand():
    latency = timing("a", [[1, 2, 3, 4], [5, 6, 7, 8]]).latency
    assert (latency.p50, latency.calls) == (4.5, 8)
    assert latency.p95 == pytest.approx(np.percentile(range(1, 9), 95))
    assert latency.spread == pytest.approx((6.25 - 2.75) / 4.5)


def test_ratio_and_winner():
    rounds = np.full((10, 3), 2.0)
    result = compare(timing("slow", rounds), timing("fast", rounds / 2))
    assert (result.ratio, result.low, result.high, result.winner) == (2, 2, 2, "fast")
    assert compare(timing("fast", rounds / 2), timing("slow", rounds)).winner == "fast"


def test_no_winner_inside_the_noise():
    noise = np.random.default_rng(0).lognormal(0, 0.2, size=(30, 5))
    again = np.random.default_rng(1).lognormal(0, 0.2, size=(30, 5)) * 1.03
    assert compare(timing("a", noise), timing("b", again)).winner is None
    # the same tiny difference in every round is below the margin
    assert compare(timing("a", noise), timing("b", noise * 1.01)).winner is None
    # drift that both share does not hide a real difference: rounds are paired
    drift = np.linspace(1, 5, 30)[:, None] * np.ones(5)
    assert compare(timing("a", drift * 1.3), timing("b", drift)).winner == "b"
    # three rounds decide nothing
    assert compare(timing("a", noise[:3] * 9), timing("b", noise[:3])).winner is None


def test_only_what_was_measured_together_is_compared():
    with pytest.raises(InputError, match="together"):
        compare(timing("a", np.ones((3, 2))), timing("b", np.ones((4, 2))))
    with pytest.raises(InputError, match="together"):
        compare(timing("a", np.ones((3, 2))), timing("b", np.ones((3, 2)), batch=2))


def test_contenders_take_turns_and_a_known_delay_is_measured():
    order = []

    def sleeper(name, seconds):
        def call(x):
            order.append(name)
            time.sleep(seconds)

        return call

    quick, slow = measure(
        {"quick": sleeper("quick", 0.002), "slow": sleeper("slow", 0.006)},
        (torch.zeros(1),),
        batch_sizes=(1,),
        runtimes=("torch",),
        rounds=6,
        round_ms=1,
        warmup_ms=1,
    )
    assert order[-12:] == ["quick", "slow", "slow", "quick"] * 3
    assert 2.0 <= quick.latency.p50 < 4.5
    assert 6.0 <= slow.latency.p50 < 9
    assert compare(slow, quick).winner == "quick"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    return Network(module, (torch.randn(2, 64),))


def test_batches_threads_and_runtimes(network):
    before = torch.get_num_threads()
    timings = measure(
        {"net": network},
        network.example_inputs,
        batch_sizes=(1, 512),
        threads=(1, 2),
        runtimes=("torch", "onnxruntime"),
        rounds=5,
        round_ms=2,
        warmup_ms=5,
    )
    assert torch.get_num_threads() == before
    got = {(t.runtime, t.threads, t.batch): t.latency.p50 for t in timings}
    assert len(got) == 8
    assert got["onnxruntime", 1, 512] > 3 * got["onnxruntime", 1, 1]
    assert network.module.training  # modes are put back


@pytest.mark.slow
def test_compiled(network):
    (compiled,) = measure(
        {"net": network},
        network.example_inputs,
        batch_sizes=(4,),
        runtimes=("torch-compile",),
        rounds=3,
        round_ms=1,
        warmup_ms=1,
    )
    assert compiled.latency.runtime == "torch-compile"
    assert compiled.latency.p50 > 0


def test_peak_memory_grows_with_the_weights(tmp_path):
    wide = nn.Linear(3000, 3000)  # 36 MB
    big = peak_memory_of(wide, (torch.zeros(2, 3000),))
    small = peak_memory_of(nn.Linear(3, 3), (torch.zeros(2, 3),))
    assert big is not None and small is not None
    assert big - small > 30e6
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_model(wide, (torch.zeros(2, 3000),)).SerializeToString())
    from_file = peak_memory_of(path, (torch.zeros(2, 3000),))
    assert from_file == pytest.approx(big, rel=0.3)


def test_energy_is_read_or_absent_never_estimated(tmp_path):
    assert EnergyMeter.find(tmp_path) is None or torch.cuda.is_available()
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("2500000\n")
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "energy_uj").write_text("999\n")
    if torch.cuda.is_available():
        return
    meter = EnergyMeter.find(tmp_path)
    assert meter is not None and meter.joules() == 2.5
    (zone / "energy_uj").unlink()
    assert meter.joules() is None


def test_costs_of_networks(network):
    costs = measured_costs({"a": network, "b": network}, rounds=3, round_ms=1)
    assert costs["a"].parameters == 64 * 256 + 256 + 256 * 10 + 10
    assert costs["a"].file_bytes == costs["b"].file_bytes > 4 * costs["a"].parameters
    assert costs["a"].latency.batch == 1 and costs["a"].macs is None
    assert costs["a"].peak_memory_bytes > 4 * costs["a"].parameters


def test_bad_settings(network):
    with pytest.raises(InputError, match="at least 1"):
        measure({"a": network}, network.example_inputs, batch_sizes=(0,))
