"""Predictors of latency: counted exactly, added up exactly, fitted honestly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.network import Network
from gossamer.hardware.device import Device, Figure, Memory
from gossamer.hardware.onnx_operators import OnnxOperator, onnx_operators
from gossamer.hardware.predictor import LearnedTimes, LookupTable, Roofline, errors
from gossamer.models.resnet import digits_resnet

DEVICE = Device(
    "a machine",
    "cpu",
    {"float32": Figure(1e9, "made up"), "int8": Figure(4e9, "made up")},
    (
        Memory("cache", Figure(1e4, "made up"), Figure(1e10, "made up")),
        Memory("memory", Figure(1e9, "made up"), Figure(1e9, "made up")),
    ),
    operator_seconds={"onnxruntime": Figure(1e-6, "made up")},
)


def operators_of(module: nn.Module, inputs: Tensor, path: Path) -> list[OnnxOperator]:
    write_onnx(Network(module.eval(), (inputs,)), path)
    return onnx_operators(path, OnnxRunner(path).feed(inputs))


class Block(nn.Module):
    """32 channels, so that blocked layouts need no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.head(self.depthwise(x).mean((2, 3)))


def test_operators_are_those_that_run(tmp_path: Path) -> None:
    found = operators_of(Block(), torch.randn(4, 32, 8, 8), tmp_path / "block.onnx")
    kinds = [o.kind for o in found]
    # Normalisation is folded and the activation fused: neither is an operator any more.
    assert "BatchNormalization" not in kinds and "Relu" not in kinds
    first, second = (o for o in found if o.kind in ("Conv", "FusedConv"))
    assert first.macs == 4 * 64 * 64 * 32 * 9 and second.macs == 4 * 64 * 36 * 9
    (head,) = (o for o in found if o.kind in ("Gemm", "FusedGemm"))
    assert head.macs == 4 * 64 * 10
    assert head.bytes == 4 * (4 * 64 + 64 * 10 + 10 + 4 * 10)


def test_the_table_times_each_kind_of_work_once(tmp_path: Path) -> None:
    found = operators_of(digits_resnet(), torch.randn(8, 1, 8, 8), tmp_path / "net.onnx")
    table = LookupTable(path=tmp_path / "table.json")
    assert table.known(found) == 0.0
    predicted = table.predict(found)
    assert table.known(found) == 1.0 and set(table.times) == {o.signature for o in found}
    assert predicted == pytest.approx(sum(table.times[o.signature] for o in found))
    assert table.measure(found) == 0
    again = LookupTable(path=tmp_path / "table.json")
    assert again.predict(found) == predicted  # read, not timed again


def test_a_larger_product_takes_longer(tmp_path: Path) -> None:
    small, large = (
        operators_of(nn.Linear(n, n), torch.randn(64, n), tmp_path / f"{n}.onnx") for n in (64, 768)
    )
    table = LookupTable()
    assert table.predict(large) > 10 * table.predict(small)


def test_a_network_with_whole_numbers_inside(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x)[:, 1:].reshape(x.shape[0], -1, 16))

    tokens = torch.randint(0, 50, (4, 7))
    found = operators_of(Tokens(), tokens, tmp_path / "tokens.onnx")
    assert LookupTable().predict(found) > 0.0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"format": 0, "threads": 1, "milliseconds": {}}, "another format"),
        ({"format": 1, "threads": 2, "milliseconds": {}}, "other threads"),
        ({"format": 1, "threads": 1, "milliseconds": [1]}, "is not a table"),
        ({"format": 1, "threads": 1, "milliseconds": {"a": -1}}, "times that are none"),
        ([], "is not a table"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, content: object, said: str) -> None:
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        LookupTable(path=tmp_path / "table.json")


def test_the_roofline_is_its_formula(tmp_path: Path) -> None:
    found = operators_of(Block(), torch.randn(4, 32, 8, 8), tmp_path / "block.onnx")
    expected = 0.0
    for o in found:
        bandwidth = 1e10 if o.bytes <= 1e4 else 1e9
        expected += max(o.macs / 1e9, o.bytes / bandwidth) + 1e-6
    assert Roofline(DEVICE).predict(found) == pytest.approx(1e3 * expected)
    quantized = replace(found[0], dtypes=("uint8",) * len(found[0].dtypes), macs=10**9)
    assert Roofline(DEVICE).seconds(quantized) == pytest.approx(0.25 + 1e-6)


def test_learned_times_recover_a_rule_and_extend_it(tmp_path: Path) -> None:
    found: list[OnnxOperator] = []
    for width in range(8, 72, 8):
        for size in (4, 8, 16):
            module = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
            name = tmp_path / f"{width}-{size}.onnx"
            found += [o for o in operators_of(module, torch.randn(2, width, size, size), name)
                      if o.macs]  # fmt: skip
    roofline = Roofline(DEVICE)
    # Everything takes three times as long as the roofline says.
    times = [3e3 * roofline.seconds(o) for o in found]
    learned = LearnedTimes(DEVICE, found, times)
    assert learned.predict(found) == pytest.approx(sum(times), rel=1e-6)
    beyond = replace(found[-1], macs=100 * found[-1].macs)
    assert learned.predict([beyond]) == pytest.approx(3e3 * roofline.seconds(beyond), rel=1e-6)
    with pytest.raises(InputError, match="ten operators"):
        LearnedTimes(DEVICE, found[:9], times[:9])


def test_errors_against_numbers_by_hand() -> None:
    found = errors([1.0, 3.0, 2.0], [2.0, 2.0, 4.0])
    assert found.mape == pytest.approx(50.0) and found.bias == pytest.approx(-50.0 / 3)
    assert errors([1, 2, 3, 4], [10, 20, 40, 30]).kendall == pytest.approx(4 / 6)
    with pytest.raises(InputError, match="two networks"):
        errors([1.0], [1.0])
    assert np.isfinite(found.kendall)
