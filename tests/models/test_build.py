"""Networks by name and weights into them, and one sentence for what does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.models import build, digits_resnet, load_weights


def test_timm_models_are_adapted() -> None:
    network = build("resnet10t", classes=7, channels=1)
    assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    patches = build("vit_tiny_patch16_224", classes=3, image_size=32)
    assert patches(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert build("gossamer_digits_resnet").linear.out_features == 10  # type: ignore[union-attr]


def test_torchvision_models_are_adapted() -> None:
    network = build("torchvision:resnet18", classes=7, channels=1).eval()
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    assert (
        build("torchvision:squeezenet1_0", classes=3).eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        == 3
    )


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("resnet5", "there is no timm model 'resnet5'; the nearest names are resnet50"),
        ("gossamer_resnet21", "the nearest names are gossamer_resnet"),
        ("", "there is no timm model ''"),
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'; the nearest names"),
        ("torchvision:maskrcnn_resnet50_fpn", "torchvision has no classifier"),
        ("no_such_package:net", "no_such_package of .* cannot be imported: No module named"),
        ("torch.nn:Linea", "torch.nn has no function 'Linea'; the nearest names are Linear"),
        ("torch:zeros", "torch:zeros cannot be built with"),
        ("builtins:dict", "returned a dict, not a torch.nn.Module"),
        ("hf-hub:timm/resnet18", "there is no timm model"),
        ("local-dir:/etc", "there is no timm model"),
        ("a b:c:d", "cannot be imported"),
        (":x", "cannot be built|cannot be imported"),
    ],
)
def test_names_that_are_no_networks(model: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        build(model, classes=3, channels=3)
    assert "\n" not in str(caught.value)


FACTORY = """
from torch import nn
def net(num_classes=5, in_chans=2):
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.Flatten(), nn.LazyLinear(num_classes))
def plain():
    return nn.Linear(2, 3)
def broken(classes):
    raise RuntimeError("first line\\nsecond line")
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_networks.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return "own_networks"


def test_factories_of_the_user(own_package: str) -> None:
    network = build(f"{own_package}:net", classes=7, channels=1)
    assert network(torch.zeros(1, 1, 5, 5)).shape == (1, 7)
    assert isinstance(build(f"{own_package}:plain", classes=7), nn.Linear)
    with pytest.raises(InputError, match=r"with 3 classes: RuntimeError: first line$"):
        build(f"{own_package}:broken", classes=3)


def test_a_network_that_does_not_fit_the_task(own_package: str) -> None:
    with pytest.raises(InputError, match=r"plain answers \[4, 3\].* where \[4, 7\] is needed"):
        build(f"{own_package}:plain", classes=7, example_inputs=(torch.zeros(4, 2),))
    with pytest.raises(InputError, match="does not accept inputs of 1x8x8: RuntimeError"):
        build("gossamer_digits_resnet", channels=3, example_inputs=(torch.zeros(2, 1, 8, 8),))
    network = build("gossamer_digits_resnet", example_inputs=(torch.zeros(2, 1, 8, 8),))
    assert network.training


def fresh() -> nn.Module:
    return digits_resnet((4, 8, 8), blocks_per_stage=1)


def weights() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return fresh().state_dict()


def written(path: Path, value: Any, kind: str) -> Path:
    if kind == "safetensors":
        save_file(value, path / "w.safetensors")
        return path / "w.safetensors"
    torch.save(value, path / "w.pt")
    return path / "w.pt"


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_come_back(tmp_path: Path, kind: str) -> None:
    expected = weights()
    network = fresh()
    load_weights(network, written(tmp_path, expected, kind))
    state = network.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_checkpoints_are_unwrapped(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    expected = weights()
    value: Any = {prefix + name: tensor for name, tensor in expected.items()}
    if wrapper:
        value = {"epoch": 3, wrapper: value}
    network = fresh()
    load_weights(network, written(tmp_path, value, "pt"))
    assert torch.equal(network.state_dict()["conv1.weight"], expected["conv1.weight"])


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path, kind: str) -> None:
    network = fresh()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def refused(value: dict[str, Tensor], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            load_weights(network, written(tmp_path, value, kind))
        assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)

    given = weights()
    renamed = {("fc.bias" if n == "linear.bias" else n): t for n, t in given.items()}
    refused(renamed, r"linear\.bias \[10\] is missing")
    resized = given | {"linear.weight": torch.zeros(5, 8)}
    refused(resized, r"linear\.weight is \[5, 8\] in the file and \[10, 8\] in the network")
    refused(given | {"extra": torch.zeros(2)}, r"it has extra \[2\], which the network has not")
    for bad in (float("nan"), float("inf")):
        poisoned = given["layer2.0.bn1.bias"].clone()
        poisoned[3] = bad
        refused(given | {"layer2.0.bn1.bias": poisoned}, r"NaN or infinity in layer2\.0\.bn1\.bias")


def test_counters_may_be_missing(tmp_path: Path) -> None:
    given = {n: t for n, t in weights().items() if "num_batches_tracked" not in n}
    load_weights(fresh(), written(tmp_path, given, "safetensors"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("w.safetensors", b"", "is not a safetensors file"),
        ("w.safetensors", b"\xff" * 100, "is not a safetensors file"),
        ("w.pt", b"", "cannot be read safely|can be read safely"),
        ("w.pt", b"hello", "can be read safely"),
        ("w.pt", b"cos\nsystem\n(S'touch mark'\ntR.", "can be read safely"),
    ],
)
def test_corrupt_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load_weights(fresh(), tmp_path / name)
    with pytest.raises(InputError, match="there is no file of weights"):
        load_weights(fresh(), tmp_path / "missing.pt")


@pytest.mark.parametrize(
    "value", [[1, 2], {}, {"a": 1}, {1: torch.zeros(1)}, torch.zeros(2), {"state_dict": {}}]
)
def test_files_of_other_things(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match="not a state dict"):
        load_weights(fresh(), written(tmp_path, value, "pt"))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.mark}",)


def test_weights_cannot_run_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = written(tmp_path, {"state_dict": weights(), "x": Evil(mark)}, "pt")
    with pytest.raises(InputError, match="can be read safely"):
        load_weights(fresh(), path)
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")  # a whole pickled module
    with pytest.raises(InputError, match="can be read safely"):
        load_weights(fresh(), tmp_path / "module.pt")
    assert not mark.exists()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for kind in ("safetensors", "pt"):
        path = written(tmp_path, weights(), kind)
        content = path.read_bytes()
        for kept in (1, 9, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:kept])
            with pytest.raises(InputError, match=r"truncated|can be read safely"):
                load_weights(fresh(), path)


def test_the_package_itself_imports_no_torch() -> None:
    code = "import gossamer, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
