"""Networks on disk: the same network comes back, and no file can make the reader do anything."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, InputError, UnsupportedError
from gossamer.core.graph import Graph, layer_table
from gossamer.core.saved import load_network, read_weights, save_network

INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.attention = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.register_buffer("shift", torch.tensor([1.0, -2.0, 3.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)).flatten(2).transpose(1, 2)
        q = self.attention(x)
        x = nn.functional.scaled_dot_product_attention(q, x, x).mean(1)
        return self.head(x) + self.shift


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Small()
        module.body[0].running_mean.uniform_(-1, 1)
        module.body[0].running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "net"
    save_network(folder, small(), INPUTS, {"origin": "here"})
    return folder


def test_the_same_network_comes_back(saved: Path) -> None:
    module, inputs, about = load_network(saved)
    assert about == {"origin": "here"}
    assert [tuple(x.shape) for x in inputs] == [(2, 3, 8, 8)]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.allclose(module(x), small()(x), atol=1e-6)
    assert not module.training


def test_it_trains_as_the_original_does(saved: Path) -> None:
    module, _, _ = load_network(saved)
    original = small()
    results = []
    for network in (module, original):
        network.train()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network(*INPUTS).square().sum().backward()
        results.append({n.removeprefix("program."): p.grad for n, p in network.named_parameters()})
    assert set(results[0]) == set(results[1])
    for name, gradient in results[0].items():
        assert torch.allclose(gradient, results[1][name], atol=1e-5), name
    state = {n.removeprefix("program."): t for n, t in module.state_dict().items()}
    assert torch.allclose(state["body.0.running_mean"], original.body[0].running_mean)


def test_saving_again_changes_neither_names_nor_layers(saved: Path, tmp_path: Path) -> None:
    module: nn.Module = load_network(saved)[0]
    for turn in range(3):
        save_network(tmp_path / str(turn), module, INPUTS)
        module = load_network(tmp_path / str(turn))[0]
    again = json.loads((tmp_path / "2" / "network.json").read_text())
    names = set(small().state_dict()) - {"body.0.num_batches_tracked"}
    assert set(again["tensors"]) - {"body.0.num_batches_tracked"} == names
    first = layer_table(Graph.trace(small(), INPUTS))
    last = layer_table(Graph.trace(module, INPUTS))
    assert [(r["module"], r["macs"], r["parameters"]) for r in first] == [
        (r["module"], r["macs"], r["parameters"]) for r in last
    ]


class Answers(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"sum": x + y, "parts": [x * 2, (y, x)]}


def test_several_inputs_and_nested_outputs(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    save_network(tmp_path, Answers(), inputs)
    module, _, _ = load_network(tmp_path)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    answer = module(x, y)
    assert torch.equal(answer["sum"], x + y)
    assert torch.equal(answer["parts"][0], x * 2)
    assert isinstance(answer["parts"][1], tuple)


@torch.library.custom_op("gossamer_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x)


def test_an_operator_of_ones_own_cannot_be_saved_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"gossamer_tests.twice.* cannot be saved"):
        save_network(tmp_path / "net", Custom(), INPUTS)
    assert not (tmp_path / "net").exists()


# Doctored files ----------------------------------------------------------------------------------


def doctored(saved: Path, folder: Path, change: Any) -> Path:
    content = json.loads((saved / "network.json").read_text())
    change(content)
    folder.mkdir(exist_ok=True)
    (folder / "network.json").write_text(json.dumps(content))
    (folder / "weights.safetensors").write_bytes((saved / "weights.safetensors").read_bytes())
    return folder


def call(target: str, *args: Any, **kwargs: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        record = {"name": "evil", "op": "call_function", "target": target}
        if args:
            record["args"] = list(args)  # type: ignore[assignment]
        if kwargs:
            record["kwargs"] = kwargs  # type: ignore[assignment]
        content["nodes"].insert(-1, record)

    return change


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "posix.system", "builtins.eval", "builtins.__import__", "subprocess.run",
        "mypackage.factory:make", "torch.load", "aten.__class__", "aten.__class__.__init__",
        "aten.from_file.default", "aten.from_file", "aten._print.default", "aten.warn.default",
        "aten.set_.source_Storage", "aten.set_data.default", "aten.resize_.default",
        "aten._sparse_coo_tensor_unsafe.default", "aten.sparse_coo_tensor.size",
        "quantized.linear.default", "aten.fbgemm_linear_int8_weight.default",
        "aten.manual_seed.default", "aten.manual_seed",
        "aten.set_grad_enabled.default", "aten._cuda_getCurrentRawStream.default",
        "profiler._record_function_enter.default", "prim.device.default",
        "arithmetic.__import__", "arithmetic.system", "arithmetic.attrgetter", "", "aten", "aten..",
    ],
)  # fmt: skip
def test_no_other_operator_is_resolved(saved: Path, tmp_path: Path, target: str) -> None:
    canary = tmp_path / "canary"
    folder = doctored(saved, tmp_path / "net", call(target, f"touch {canary}", False, 4))
    with pytest.raises(InputError, match=r"names an operator .* which is not allowed"):
        load_network(folder)
    assert not canary.exists()


def test_operators_on_files_are_refused_when_saving_too(tmp_path: Path) -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.from_file(str(tmp_path / "numbers"), False, 8)

    (tmp_path / "numbers").write_bytes(bytes(32))
    with pytest.raises(UnsupportedError):
        save_network(tmp_path / "net", Reads(), INPUTS)


def test_other_kinds_of_nodes_are_refused(saved: Path, tmp_path: Path) -> None:
    for kind in ("call_module", "call_method", "root", "eval"):
        with pytest.raises(InputError, match="has a node of the kind"):
            load_network(
                doctored(saved, tmp_path / kind, lambda c, k=kind: c["nodes"][-2].update(op=k))
            )


@pytest.mark.parametrize(
    "name", ["__class__", "../../etc/passwd", "program", "forward", "shift.data"]
)
def test_only_named_tensors_are_read(saved: Path, tmp_path: Path, name: str) -> None:
    def change(content: dict[str, Any]) -> None:
        (node,) = [n for n in content["nodes"] if n.get("target") == "shift"]
        node["target"] = name

    with pytest.raises(InputError):
        load_network(doctored(saved, tmp_path / "net", change))


def evil_input(content: dict[str, Any], code: str) -> None:
    content["nodes"][0]["name"] = f"x={code}"


def evil_node(content: dict[str, Any], code: str) -> None:
    content["nodes"][-2]["name"] = f"a = {code}\n"


def evil_keyword(content: dict[str, Any], code: str) -> None:
    content["nodes"][-2]["kwargs"] = {f"a={code}, b": 1}


def evil_string(content: dict[str, Any], code: str) -> None:
    call("aten.einsum.default", f"'); {code} #", [{"node": "x"}])(content)


def evil_module(content: dict[str, Any], code: str) -> None:
    for node in content["nodes"]:
        node["module"] = f"a\n{code}\n"


def evil_output(content: dict[str, Any], code: str) -> None:
    content["outputs"] = {"dict": [[f"'); {code} #"], [None]]}


def evil_tensor(content: dict[str, Any], code: str) -> None:
    text = json.dumps(content).replace('"shift"', json.dumps(f'a"), {code} #'))
    content.update(json.loads(text))


def evil_tensor_alone(content: dict[str, Any], code: str) -> None:
    content["tensors"][f'a"), {code} #'] = "buffer"


@pytest.mark.parametrize(
    "change",
    [
        evil_input, evil_node, evil_keyword, evil_string, evil_module, evil_output, evil_tensor,
        evil_tensor_alone,
    ],
)  # fmt: skip
def test_names_and_arguments_are_no_code(saved: Path, tmp_path: Path, change: Any) -> None:
    """The graph becomes Python text that is compiled: nothing in the file may add to that text."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')"
    folder = doctored(saved, tmp_path / "net", lambda content: change(content, code))
    # The weights may be the attacker's too, and have the names that the graph asks for.
    tensors = read_weights(saved / "weights.safetensors")
    for name in json.loads((folder / "network.json").read_text())["tensors"]:
        tensors.setdefault(name, tensors["shift"].clone())
    save_file(tensors, folder / "weights.safetensors")
    with contextlib.suppress(GossamerError):
        load_network(folder)
    assert not canary.exists()


class OddName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter('a"b', nn.Parameter(torch.ones(8)))

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, 'a"b')


def test_odd_names_of_tensors_are_refused_when_saving(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"the tensor 'a\"b' cannot be saved"):
        save_network(tmp_path / "net", OddName(), INPUTS)
    assert not (tmp_path / "net").exists()


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_is_not_read_as_weights(saved: Path, tmp_path: Path) -> None:
    folder = doctored(saved, tmp_path / "net", lambda content: None)
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_network(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format=2), "is not a network written by gossamer"),
        (lambda c: c.clear(), "is not a network written by gossamer"),
        (lambda c: c["tensors"].update(ghost="parameter"), "the weights lack ghost"),
        (lambda c: c["tensors"].update(shift="module"), "unknown kind of tensor"),
        (lambda c: c["inputs"][0].update(shape=[2, 3, 8, 10**9]), "describes an input of size"),
        (lambda c: c["inputs"][0].update(shape=[65536] * 4), "does not describe a network"),
        (lambda c: c["inputs"].clear(), "does not describe a network that runs"),
        (lambda c: c.pop("nodes"), "does not describe a network that runs"),
        (lambda c: c.update(outputs={"module": []}), "has an output of the kind"),
        (lambda c: c["nodes"].pop(5), "does not describe a network that runs"),
    ],
)
def test_what_is_no_network_is_refused(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_network(doctored(saved, tmp_path / "net", change))
    assert said in str(caught.value)
    assert capfd.readouterr().err == ""


def test_missing_and_truncated_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_network(tmp_path)
    folder = doctored(saved, tmp_path / "net", lambda content: None)
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(content[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_network(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_network(folder)


def test_unread_weights_are_not_asked_for(saved: Path) -> None:
    assert set(read_weights(saved / "weights.safetensors")) >= {"stem.weight", "head.bias", "shift"}


# Fuzzing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounded_memory() -> Iterator[None]:
    """A doctored size may ask for any amount of memory: that must fail, not fill the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (10 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


VALUES: list[Any] = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 2**70, 0.5, -1e308, "", "x", "aten.relu.default",
    "aten.view.default", "arithmetic.mul", [], [1], [-1, 3], {}, {"node": "x"}, {"float": "nan"},
    {"float": "x"}, {"dtype": "torch.int64"}, {"a": 1, "b": 2}, {"device": "cuda"}, "\0", "\ud800",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield value, key
        yield from places(inner)


@given(st.integers(0, 2**63))
def test_any_file_is_a_network_or_refused(
    saved: Path, bounded_memory: None, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    drawn = random.Random(seed)
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    content = json.loads((saved / "network.json").read_text())
    for _ in range(drawn.randint(1, 3)):
        found = list(places(content))
        owner, key = drawn.choice(found)
        match drawn.randrange(5):
            case 0 if isinstance(owner, dict):
                del owner[key]
            case 1 if isinstance(owner, list):
                owner.pop(key)
            case 2:
                other, its = drawn.choice(found)
                owner[key] = copy.deepcopy(other[its])
            case _:
                owner[key] = copy.deepcopy(drawn.choice(VALUES))
    text = json.dumps(content).encode()
    weights = (saved / "weights.safetensors").read_bytes()
    if drawn.random() < 0.2:
        at = drawn.randrange(len(text))
        text = text[:at] + drawn.randbytes(drawn.randrange(4)) + text[at + drawn.randrange(8) :]
    if drawn.random() < 0.2:
        at = drawn.randrange(min(len(weights), 900))
        weights = weights[:at] + drawn.randbytes(drawn.randrange(4)) + weights[at + 1 :]
    folder.mkdir(exist_ok=True)
    (folder / "network.json").write_bytes(text)
    (folder / "weights.safetensors").write_bytes(weights)
    try:
        module, inputs, _ = load_network(folder)
    except GossamerError as error:
        assert "\n" not in str(error)
        return
    with torch.inference_mode():
        module(*inputs)
