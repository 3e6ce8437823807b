"""Bad input: one clear sentence, exit code 2, nothing half-written, and no file's code is run."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from gossamer.cli import main
from gossamer.core.errors import GossamerError
from gossamer.core.export import set_metadata
from gossamer.core.saved import save_network
from gossamer.models import load_weights

NETWORKS = """\
import torch
from torch import nn


def good(num_classes=3, in_chans=3):
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )


class Branches(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.inner = nn.Linear(3, classes)

    def forward(self, x):
        if x.mean() > 0:
            x = -x
        return self.inner(x.mean((2, 3)))


def branches(num_classes=3):
    return Branches(num_classes)


class Special(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.inner = nn.Linear(3, classes)

    def forward(self, x):
        x = torch.special.airy_ai(x)
        return self.inner(x.mean((2, 3)))


def special(num_classes=3):
    return Special(num_classes)


def no_module(num_classes=3):
    return 7


def fails(num_classes=3):
    raise RuntimeError("no such luck")
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with good photos and networks of many kinds."""
    here = tmp_path_factory.mktemp("bad")
    (here / "own_bad_net.py").write_text(NETWORKS)
    photos(here / "photos")
    (here / "recipe.yaml").write_text("steps:\n  - prune: {macs: 0.7, epochs: 0}\n")
    return here


def photos(folder: Path, names: tuple[str, ...] = ("zero", "one", "four")) -> Path:
    digits: Any = load_digits()
    for digit, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == digit][:12]):
            image = Image.fromarray((pixels * 15).astype(np.uint8)).convert("RGB")
            image.save(folder / name / f"{number}.png")
    return folder


class Refused:
    """Runs commands in this process that must be refused."""

    def __init__(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(here)
        self.here, self.monkeypatch, self.capfd = here, monkeypatch, capfd

    def __call__(self, *words: str | Path) -> str:
        before = visible(self.here)
        self.monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = self.capfd.readouterr().err.strip()
        assert stop.value.code == 2, said
        lines = [line for line in said.splitlines() if "it is trained for" not in line]
        assert len(lines) == 1 and lines[0].startswith("gossamer: "), said
        assert visible(self.here) == before, "nothing is left behind"
        return lines[0].removeprefix("gossamer: ")


def visible(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


@pytest.fixture
def refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Refused:
    return Refused(here, monkeypatch, capfd)


SHRINK = ("shrink", "own_bad_net:good", "--data", "photos", "--out", "out")


# Networks and weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("resnt18", "the nearest names are resnet18"),
        ("torchvision:resnet81", "the nearest names are resnet"),
        ("own_bad_net:god", "the nearest names are good"),
        ("own_bad_ned:good", "run from the folder that holds it"),
        ("own_bad_net:no_module", "returned a int, not a torch.nn.Module"),
        ("own_bad_net:fails", "no such luck"),
        ("./photos", "photos holds no network.json"),
    ],
)
def test_unknown_models(refused: Refused, model: str, said: str) -> None:
    assert said in refused("shrink", model, "--data", "photos", "--out", "out")
    assert said in refused("profile", model)


def test_half_of_a_pair(refused: Refused) -> None:
    assert "--data is missing" in refused("shrink", "resnet18")
    assert "MODEL is missing" in refused("shrink", "--data", "photos")


@pytest.fixture
def good(here: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    from gossamer.models import build

    monkeypatch.chdir(here)
    return build("own_bad_net:good", classes=3, channels=3)


def test_weights_that_do_not_fit(refused: Refused, good: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"

    def said(state: dict[str, Any]) -> str:
        save_file(state, path)
        return refused(*SHRINK, "--weights", path)

    state = good.state_dict()
    assert "0.weight is [9, 3, 3, 3] in the file and [8, 3, 3, 3] in the network" in said(
        state | {"0.weight": torch.zeros(9, 3, 3, 3)}
    )
    assert "5.bias [3] is missing" in said({k: v for k, v in state.items() if k != "5.bias"})
    assert "it has extra [1], which the network has not" in said(state | {"extra": torch.ones(1)})
    assert "holds NaN or infinity in 5.bias" in said(
        state | {"5.bias": torch.tensor([0.0, float("nan"), 0.0])}
    )


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".pt2", ".ckpt"])
def test_a_pickle_as_weights_does_not_run(refused: Refused, tmp_path: Path, suffix: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Bomb(canary)))
    assert str(path) in refused(*SHRINK, "--weights", path)
    torch.save({"0.weight": Bomb(canary)}, path)
    assert str(path) in refused(*SHRINK, "--weights", path)
    assert not canary.exists()


def test_a_doctored_pt2_does_not_run(refused: Refused, good: nn.Module, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "doctored.pt2"
    program = torch.export.export(good.eval(), (torch.zeros(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "honest.pt2")
    with (
        zipfile.ZipFile(tmp_path / "honest.pt2") as honest,
        zipfile.ZipFile(path, "w") as doctored,
    ):
        for name in honest.namelist():
            doctored.writestr(name, honest.read(name))
            folder = name.split("/")[0]
        for name in ("data.pkl", "data/constants/evil.pt", "data/sample_inputs/model.pt"):
            doctored.writestr(f"{folder}/{name}", pickle.dumps(Bomb(canary)))
    # Neither as weights, nor as a network, nor in a folder that is given as one.
    assert str(path) in refused(*SHRINK, "--weights", path)
    refused("shrink", str(path), "--data", "photos", "--out", "out")
    save_network(tmp_path / "net", good, (torch.zeros(2, 3, 8, 8),))
    path.replace(tmp_path / "net" / "model.pt2")
    assert "holds no model.onnx" in refused("predict", tmp_path / "net", "photos/one/1.png")
    assert not canary.exists()


def test_a_network_file_that_names_code_does_not_run(
    refused: Refused, good: nn.Module, here: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    (here / "own_evil_net.py").write_text(f"open({str(canary)!r}, 'w')\ndef make(): ...\n")
    save_network(tmp_path / "net", good, (torch.zeros(2, 3, 8, 8),))
    path = tmp_path / "net" / "network.json"
    honest = path.read_text()
    for target in ("own_evil_net:make", "own_evil_net.make", "os.system", "aten.from_file.default"):
        content = json.loads(honest)
        content["about"] = {"origin": {"model": target, "factory": target}}
        content["nodes"].insert(-1, {"name": "evil", "op": "call_function", "target": target})
        path.write_text(json.dumps(content))
        for words in (
            ("shrink", tmp_path / "net", "--data", "photos", "--out", "out"),
            ("profile", tmp_path / "net"),
        ):
            assert "which is not allowed" in refused(*words)
    # A factory that is only on record is not imported either.
    content = json.loads(honest)
    content["about"] = {"origin": {"model": "own_evil_net:make"}, "task": "own_evil_net:make"}
    path.write_text(json.dumps(content))
    refused("shrink", tmp_path / "net", "--data", "photos", "--macs", "x", "--out", "out")
    (here / "own_evil_net.py").unlink()
    assert not canary.exists() and "own_evil_net" not in sys.modules


def test_a_pickle_as_state_does_not_run(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    out = tmp_path / "out"
    words = (*SHRINK[:-1], out, "--epochs", "1", "--recipe", "recipe.yaml")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.compress.shrink._Job._publish", interrupt)
    monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, words)])
    with pytest.raises(SystemExit, match="130"):
        main()
    refused.capfd.readouterr()
    for name in ("dense.safetensors", "steps/0-prune/weights.safetensors"):
        path = out / ".work" / name
        honest = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb(canary)))
        assert path.name in refused(*words)
        path.write_bytes(honest)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own_bad_net:branches", ("cannot be traced", "own_bad_net.py:18: if x.mean() > 0")),
        (
            "own_bad_net:special",
            ("special_airy_ai", "own_bad_net.py:33: x = torch.special.airy_ai"),
        ),
    ],
)
def test_what_cannot_be_exported_names_operator_and_line(
    refused: Refused, model: str, said: tuple[str, str]
) -> None:
    sentence = refused("shrink", model, "--data", "photos", "--out", "out")
    assert said[0] in sentence and said[1] in sentence


# Data --------------------------------------------------------------------------------------------


def test_folders_that_are_no_data(refused: Refused, here: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "1.png").write_bytes((here / "photos" / "one" / "1.png").read_bytes())
    one = photos(tmp_path / "one", ("only",))
    for data, said in (
        (tmp_path / "missing", "missing"),
        (flat, "flat"),
        (one, "has only one class, 'only'"),
    ):
        assert said in refused("shrink", "own_bad_net:good", "--data", data, "--out", "out")


@pytest.mark.parametrize("content", ["truncated", "no image", "empty"])
def test_images_that_cannot_be_read(
    refused: Refused, here: Path, tmp_path: Path, content: str
) -> None:
    whole = (here / "photos" / "one" / "1.png").read_bytes()
    data = photos(tmp_path / "data")
    bad = {"truncated": whole[:60], "no image": b"not an image", "empty": b""}[content]
    (data / "one" / "3.png").write_bytes(bad)
    sentence = refused(
        "shrink", "own_bad_net:good", "--data", data, "--epochs", "1", "--out", tmp_path / "out"
    )
    assert "3.png" in sentence


# Recipes, budgets and folders --------------------------------------------------------------------


def test_recipes_and_budgets(refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{prun: {}}]")
    assert "did you mean prune?" in refused(*SHRINK, "--recipe", recipe)
    recipe.write_text("steps: !!python/object/apply:os.mkdir [canary]")
    assert "not valid YAML" in refused(*SHRINK, "--recipe", recipe)
    assert "--macs cannot be 'half'" in refused(*SHRINK, "--macs", "half")
    assert "--max-drop" in refused(*SHRINK, "--max-drop", "-1")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("finetune: {lr: -1.0}", "learning rate"),
        ("finetune: {epochs: -1}", "0 epochs or more"),
        ("finetune: {batch_size: 0}", "batches of 1 sample or more"),
        ("prune: {macs: 2.0}", "share in (0, 1]"),
        ("prune: {criterion: best}", "there is no best"),
        ("sparsify: {sparsity: 1.0}", "share in [0, 1)"),
        ("sparsify: {sparsity: -0.5}", "share in [0, 1)"),
        ("sparsify: {skip: [head]}", "no part 'head'"),
        ("rate-distortion: {samples: 0}", "1 sample or more"),
        ("bip: {sparsity: 2.0}", "share in [0, 1)"),
        ("hydra: {granularity: block}", "cannot be 'block'"),
        ("activating-pruning: {rate: 0.1, ap_rate: 0.2}", "of which activation is a part"),
        ("adaptive-pruning: {p: 2.0}", "p < q"),
        ("prune-after-training: {n_of_m: '4:2'}", "0 < n < m"),
        ("dynamic-sparse: {sparsity: 1.0}", "share in [0, 1)"),
        ("movement: {warm: 0.9, cool: 0.9}", "no room"),
        ("low-rank: {rank: 0.5, macs: 0.5}", "one"),
        ("svd: {rank: 0.0}", "0"),
        ("codebook: {entries: 1}", "1"),
        ("fixed-point: {method: none}", "cannot be 'none'"),
        ("binarize: {algorithm: best}", "best"),
    ],
)
def test_options_that_no_step_can_use(
    here: Path, good: nn.Module, tmp_path: Path, step: str, said: str
) -> None:
    from gossamer import open_task, shrink
    from gossamer.compress.recipe import Recipe

    with pytest.raises(GossamerError) as caught:
        recipe = Recipe.from_yaml(f"steps:\n- {step}")
        shrink(good, open_task(here / "photos"), recipe=recipe, out=tmp_path / "out")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "step",
    ["sparsify", "rate-distortion", "bip", "prune-after-training", "svd", "codebook", "binarize",
     "fixed-point"],
)  # fmt: skip
def test_a_network_with_nothing_to_prune(here: Path, tmp_path: Path, step: str) -> None:
    from gossamer import open_task
    from gossamer.compress.recipe import Step
    from gossamer.core.network import Network

    task = open_task(here / "photos")
    empty = Network(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), task.example_inputs)
    with pytest.raises(GossamerError) as caught:
        Step(step).apply(empty, task, teacher=empty, cpu=True)
    assert "\n" not in str(caught.value)


def test_a_truncated_packed_file(here: Path, tmp_path: Path, good: nn.Module) -> None:
    from gossamer import open_task, shrink
    from gossamer.compress.deploy import packed_runner
    from gossamer.compress.recipe import Recipe

    recipe = Recipe.from_yaml("steps:\n- sparsify: {sparsity: 0.8, rounds: 1, epochs: 0}")
    out = tmp_path / "out"
    shrink(good, open_task(here / "photos"), recipe=recipe, out=out)
    packed_runner(out)
    packed = out / "packed.safetensors"
    whole = packed.read_bytes()
    for length in (0, 7, 60, len(whole) // 2, len(whole) - 1):
        packed.write_bytes(whole[:length])
        with pytest.raises(GossamerError, match="not a packed network, or it is damaged"):
            packed_runner(out)


def test_a_budget_that_cannot_be_met(refused: Refused, tmp_path: Path, good: nn.Module) -> None:
    save_file(good.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "r.yaml").write_text("steps:\n- prune: {macs: 0.9, epochs: 0}\n")
    sentence = refused(
        *SHRINK[:-1], tmp_path / "out", "--weights", tmp_path / "w.safetensors",
        "--recipe", tmp_path / "r.yaml", "--params", "0.01", "--size", "100MB",
    )  # fmt: skip
    assert "the budget cannot be met: --params 0.01 of the original (nearest: 0." in sentence
    assert sentence.endswith("change the recipe") and "--size" not in sentence
    assert not list((tmp_path / "out").glob("*"))or {
        p.name for p in (tmp_path / "out").iterdir()
    } <= {".lock", ".work"}  # fmt: skip


def test_a_folder_in_use(refused: Refused, here: Path) -> None:
    (here / "busy").mkdir(exist_ok=True)
    with open(here / "busy" / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "busy is in use by another run" in refused(*SHRINK[:-1], "busy")


def test_a_folder_that_is_a_file(refused: Refused) -> None:
    assert "recipe.yaml" in refused(*SHRINK[:-1], "recipe.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 3_000, 12_000])
def test_a_full_disk(here: Path, tmp_path: Path, size: int) -> None:
    """No file may grow past ``size`` bytes: what a full disk looks like to a program."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "gossamer.cli", *SHRINK[:-1], str(out), "--epochs", "1",
         "--recipe", "recipe.yaml"],
        cwd=here, preexec_fn=fill, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "it is trained" not in line]
    assert len(said) == 1 and said[0].startswith("gossamer: "), done.stderr
    # With no room at all Python finds no place for temporary files, and says so.
    assert ("file too large" if size else "no usable temporary directory") in said[0]
    left = [p for p in out.rglob("*") if p.is_file()]
    assert not [p for p in left if p.name.endswith(".part")]
    for path in left:
        if path.suffix == ".json":
            json.loads(path.read_text())
    assert not (out / "report.json").exists()


# predict -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from gossamer.core.export import onnx_model

    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    model = onnx_model(module, (torch.zeros(2, 3, 8, 8),))
    return model.SerializeToString()


TASK: dict[str, Any] = {
    "classes": ["a", "b"],
    "preprocess": {
        "channels": 3, "height": 8, "width": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "scale": 255.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (None, "carries no preprocessing"),
        ([], "carries no preprocessing"),
        ({"classes": ["a"]}, "carries no preprocessing"),
        (TASK | {"classes": ["a", "b", "c"]}, "one number for each of its 3 classes"),
        (TASK | {"classes": []}, "one number for each of its 0 classes"),
        (TASK | {"preprocess": 3}, "preprocessing record"),
        (TASK | {"preprocess": TASK["preprocess"] | {"channels": 2}}, "one mean and one std"),
        (
            TASK
            | {"preprocess": TASK["preprocess"] | {"channels": 2, "mean": [0, 0], "std": [1, 1]}},
            "takes 2 channels; images have 1 or 3",
        ),
        (TASK | {"preprocess": TASK["preprocess"] | {"height": 10**9}}, "preprocessing record"),
        (TASK | {"preprocess": TASK["preprocess"] | {"height": -1}}, "preprocessing record"),
        (TASK | {"preprocess": TASK["preprocess"] | {"std": [0, 0, 0]}}, "preprocessing record"),
    ],
)
def test_predict_with_a_doctored_file(
    refused: Refused, written: bytes, tmp_path: Path, task: Any, said: str
) -> None:
    model = onnx.ModelProto.FromString(written)
    set_metadata(model, {"task": task})
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert said in refused("predict", tmp_path, "photos/one/1.png")


def test_predict_without_what_it_needs(refused: Refused, written: bytes, tmp_path: Path) -> None:
    assert "name at least one image" in refused("predict", tmp_path)
    assert "holds no model.onnx" in refused("predict", tmp_path, "photos/one/1.png")
    (tmp_path / "model.onnx").write_bytes(written[:100])
    assert "cannot be loaded by ONNX Runtime" in refused("predict", tmp_path, "photos/one/1.png")
    model = onnx.ModelProto.FromString(written)
    set_metadata(model, {"task": TASK})
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert "no-such.png" in refused("predict", tmp_path, "no-such.png")
    assert "recipe.yaml" in refused("predict", tmp_path, "recipe.yaml")
    assert "--top must be at least 1" in refused("predict", tmp_path, "x.png", "--top", "0")


# Fuzzing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, nn.Module]]:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    folder = tmp_path_factory.mktemp("weights")
    save_file(module.state_dict(), folder / "valid.safetensors")
    torch.save(module.state_dict(), folder / "valid.pt")
    torch.save(module.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (10 << 30, before[1]))
    yield folder, module
    resource.setrlimit(resource.RLIMIT_AS, before)


@given(st.integers(0, 2**63))
def test_any_file_of_weights_is_read_or_refused(
    weight_files: tuple[Path, nn.Module], seed: int
) -> None:
    folder, module = weight_files
    drawn = random.Random(seed)
    valid = folder / drawn.choice(["valid.safetensors", "valid.pt", "old.pt"])
    content = bytearray(valid.read_bytes())
    for _ in range(drawn.randint(1, 4)):
        at, length = drawn.randrange(len(content) or 1), drawn.randint(1, 12)
        match drawn.randrange(4):
            case 0:
                content[at : at + length] = drawn.randbytes(length)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = content[at : at + 8 * length]
            case _:
                del content[drawn.randrange(len(content) + 1) :]
    path = folder / f"fuzzed{valid.suffix}"
    path.write_bytes(content)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        load_weights(module, path)
    except GossamerError:
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), "all or none"
    else:
        for tensor in module.state_dict().values():
            assert bool(torch.isfinite(tensor).all())
