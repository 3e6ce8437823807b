import io
import json
import random

import onnx
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.export import (
    OnnxRunner,
    export_program,
    largest_difference,
    onnx_model,
    set_metadata,
    shorten_names,
    write_onnx,
    write_pt2,
)
from gossamer.core.network import Network


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    module = Small()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    return module


@pytest.fixture(scope="module")
def example():
    return (torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def model(small, example):
    return onnx_model(small, example, metadata={"labels": ["a", "b", "c"]})


def test_file_computes_what_the_network_computes_at_any_batch(small, example, model):
    assert small.training  # left as it was
    runner = OnnxRunner(model.SerializeToString())
    assert largest_difference(small, runner, example) < 1e-5
    assert runner(torch.zeros(17, 1, 6, 6)).shape == (17, 3)
    assert runner.metadata() == {"labels": ["a", "b", "c"]}
    assert [i.name for i in model.graph.input] == ["input"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_a_wrong_file_is_found_out(small, example, model):
    other = Small()
    assert largest_difference(other, OnnxRunner(model.SerializeToString()), example) > 1e-2
    broken = Small()
    broken.head.bias.data[:] = float("nan")
    runner = OnnxRunner(model.SerializeToString())
    assert largest_difference(broken, runner, example) == float("inf")


def test_no_source_code_or_paths_in_the_file(model):
    data = model.SerializeToString()
    assert b"test_export" not in data and b"stack_trace" not in data and b"forward" not in data


def test_short_names_change_nothing_but_the_size(small, example, model):
    short = onnx.ModelProto.FromString(model.SerializeToString())
    shorten_names(short)
    onnx.checker.check_model(short)
    assert len(short.SerializeToString()) < len(model.SerializeToString())
    x = torch.randn(5, 1, 6, 6)
    a, b = OnnxRunner(model.SerializeToString()), OnnxRunner(short.SerializeToString())
    assert torch.equal(a(x), b(x))


def test_network_with_its_own_writer(small, example, tmp_path, model):
    plain = Network(small, example)
    write_onnx(plain, tmp_path / "a.onnx", metadata={"k": [1]})
    assert OnnxRunner(tmp_path / "a.onnx").metadata() == {"k": [1]}
    own = Network(small, example, write_onnx=lambda p: p.write_bytes(model.SerializeToString()))
    write_onnx(own, tmp_path / "b.onnx", metadata={"k": [2]})
    runner = OnnxRunner(tmp_path / "b.onnx")
    assert runner.metadata() == {"k": [2]}
    assert largest_difference(small, runner, example) < 1e-5


def test_pt2_holds_the_network_with_a_free_batch(small, example, tmp_path):
    write_pt2(Network(small, example), tmp_path / "m.pt2")
    program = torch.export.load(io.BytesIO((tmp_path / "m.pt2").read_bytes()))
    x = torch.randn(7, 1, 6, 6)
    small.eval()
    torch.testing.assert_close(program.module()(x), small(x))
    small.train()


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x


class Eigen(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x @ x.transpose(1, 2)).real


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Branches(), ["Branches cannot be traced", "test_export.py", "if x.sum() > 0"]),
        (Eigen(), ["aten.linalg_eig", "no ONNX form", "test_export.py", "torch.linalg.eigvals"]),
        (FixedBatch(), ["FixedBatch", "batch size"]),
    ],
)
def test_what_cannot_be_exported_is_named_in_one_sentence(module, words, capfd):
    with pytest.raises(UnsupportedError) as caught:
        onnx_model(module, (torch.randn(2, 3, 3),))
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b):
            return a @ b.transpose(-1, -2), a.sum(-1)

    inputs = (torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    runner = OnnxRunner(onnx_model(Two(), inputs).SerializeToString())
    product, total = runner(*inputs)
    torch.testing.assert_close(product, inputs[0] @ inputs[1].transpose(-1, -2))
    torch.testing.assert_close(total, inputs[0].sum(-1))
    with pytest.raises(InputError, match="takes 2 inputs"):
        runner(inputs[0])


def test_damaged_files_are_refused(tmp_path, model):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.SerializeToString()[:200])
    with pytest.raises(InputError, match="cannot be loaded"):
        OnnxRunner(bad)
    with pytest.raises(InputError, match="cannot be loaded"):
        OnnxRunner(tmp_path / "absent.onnx")
    doctored = onnx.ModelProto.FromString(model.SerializeToString())
    set_metadata(doctored, {})
    for text in ("{", json.dumps([1])):
        doctored.metadata_props[-1].value = text
        with pytest.raises(InputError, match="metadata"):
            OnnxRunner(doctored.SerializeToString()).metadata()
    raw = model.SerializeToString().replace(b'"labels"', b'"l\xe2bels"')
    with pytest.raises(InputError, match="metadata"):
        OnnxRunner(raw).metadata()
    with pytest.raises(InputError, match="refused"):
        OnnxRunner(model.SerializeToString())(torch.zeros(2, 5, 6, 6))


def test_fuzzed_files_never_raise_anything_else(model):
    good = model.SerializeToString()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            runner = OnnxRunner(bytes(data))
            runner.metadata()
            runner(torch.zeros(2, 1, 6, 6))
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_fixed_batch_on_request():
    program = export_program(FixedBatch(), (torch.randn(2, 3),), dynamic_batch=False)
    assert program.module()(torch.ones(2, 3)).shape == (2, 3)
