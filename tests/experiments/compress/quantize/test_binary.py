"""The experiment: what its tracks measure, in small, and that verdicts come from the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.compress.quantize.binary import (
    OPERATORS,
    BinaryTraining,
    binarized,
    deployed,
    overall,
    packed,
)
from gossamer.core.errors import InputError
from gossamer.core.experiment import Result
from gossamer.core.fit import Supervised, fit
from gossamer.core.graph import Graph
from gossamer.datasets.digits import digits
from gossamer.datasets.text import text_classification
from gossamer.experiments.compress.quantize import binary as experiment
from gossamer.experiments.compress.quantize.binary import (
    CONFIGURATIONS,
    CONTENDERS,
    CORRUPTIONS,
    DIGITS,
    EXPERIMENT,
    QUICK,
    TUMOURS,
    Transformer,
    benchmark_corruptions,
    contend,
    corrupted,
    full,
    hardtanh_mlp,
    hardtanh_resnet,
    step_decay,
    tumours,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_networks_have_the_published_sizes() -> None:
    network = hardtanh_resnet()
    assert parameters(network) == pytest.approx(11.17e6, rel=1e-3)
    macs = Graph.trace(network, (torch.randn(2, 3, 32, 32),)).macs
    assert macs == pytest.approx(0.556e9, rel=1e-2)
    small = hardtanh_resnet((32, 64), 1, in_channels=1)
    convolutions = 9 * (32 + 2 * 32 * 32 + 32 * 64 + 64 * 64) + 32 * 64
    assert parameters(small) == convolutions + 2 * (3 * 32 + 3 * 64) + 64 * 10 + 10


def test_no_activation_is_a_relu() -> None:
    networks = [
        (hardtanh_resnet((8, 8), 1, in_channels=1), torch.randn(2, 1, 8, 8)),
        (hardtanh_mlp(64, 16, 2, 10), torch.randn(2, 1, 8, 8)),
        (Transformer(16, 1, classes=3, length=8, row=8), torch.randn(2, 1, 8, 8)),
    ]
    for network, x in networks:
        operators = {op.op for op in Graph.trace(network, (x,)).operators}
        assert "hardtanh" in operators and "relu" not in operators


def test_transformer_leaves_padding_out() -> None:
    torch.manual_seed(0)
    network = Transformer(16, 2, classes=3, length=6, tokens=20).eval()
    ids = torch.randint(1, 20, (2, 6))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    other = ids.clone()
    other[0, 3:] = 7
    assert torch.allclose(network(ids, mask)[0], network(other, mask)[0], atol=1e-6)
    assert torch.allclose(network(ids, mask)[0], network(ids[:1, :3], mask[:1, :3])[0], atol=1e-6)


def test_corruptions_grow_and_touch_the_test_images_only() -> None:
    task = digits()
    clean = task.splits["test"].fetch(np.arange(100)).float()
    for name in CORRUPTIONS:
        distances = []
        for level in range(5):
            changed = corrupted(task, name, level, 0)
            assert changed.splits["train"] is task.splits["train"]
            images = changed.splits["test"].fetch(np.arange(100))
            assert float(images.min()) >= 0 and float(images.max()) <= 16
            distances.append(float((images - clean).abs().mean()))
        assert distances == sorted(distances) and distances[0] < distances[-1], name
    again = corrupted(task, "gaussian noise", 2, 0).splits["test"].fetch(np.arange(5))
    assert torch.equal(
        again, corrupted(task, "gaussian noise", 2, 0).splits["test"].fetch(np.arange(5))
    )


def test_known_corruptions() -> None:
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator()
    assert torch.allclose(CORRUPTIONS["brightness"](x, 1, generator), x + 0.1)
    mean = x.mean((2, 3), keepdim=True)
    assert torch.allclose(CORRUPTIONS["contrast"](x, 1, generator), mean + (x - mean) / 2)
    flat = torch.full((1, 1, 8, 8), 0.3)
    assert torch.allclose(CORRUPTIONS["blur"](flat, 4, generator), flat)
    assert torch.allclose(CORRUPTIONS["pixelate"](flat, 4, generator), flat)


def test_published_corruptions_are_read(tmp_path: Path) -> None:
    task = digits(channels=3, image_size=(32, 32))
    images = np.arange(10 * 32 * 32 * 3, dtype=np.uint8).reshape(10, 32, 32, 3)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile([3, 7], 5))
    ((name, severities),) = benchmark_corruptions(task, tmp_path)
    assert name == "fog" and len(severities) == 5
    third = severities[2].splits["test"]
    assert torch.equal(third.fetch(np.arange(2)), torch.from_numpy(images[4:6]).permute(0, 3, 1, 2))
    assert third.labels.tolist() == [3, 7]
    (tmp_path / "fog.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="is not CIFAR-10-C"):
        list(benchmark_corruptions(task, tmp_path))
    with pytest.raises(InputError, match="no corrupted images"):
        list(benchmark_corruptions(task, tmp_path / "absent"))


def test_tumours_are_whole() -> None:
    task = tumours(seed=1)
    assert sum(task.size(split) for split in ("train", "validation", "test")) == 569
    images, labels = next(iter(task.batches("train", batch_size=8)))
    assert images.shape == (8, 1, 1, 30) and set(labels.tolist()) <= {0, 1}


def test_the_eight_configurations() -> None:
    assert len(set(CONFIGURATIONS)) == 8
    assert {c[:2] for c in CONFIGURATIONS} == {
        ("sgd", 0.1), ("sgd", 0.01), ("adam", 1e-3), ("adam", 1e-4)
    }  # fmt: skip
    assert [step_decay(f) for f in (0.0, 0.49, 0.5, 0.75, 0.99)] == [1, 1, 0.1, 0.01, 0.01]


def test_tracks_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("bnn", "react")
    monkeypatch.setattr(experiment, "OPERATORS", {n: OPERATORS[n] for n in names})
    contenders = ("float", "signs without training", *names)
    monkeypatch.setattr(experiment, "CONTENDERS", contenders)
    work = replace(DIGITS, float_epochs=2, epochs=1)
    bench = replace(
        QUICK,
        tasks=(work, replace(TUMOURS, float_epochs=1, epochs=1)),
        architectures={"CNN": (work,)},
        configurations=(("adam", 1e-3, "cosine"), ("sgd", 0.1, "step")),
        corruptions=lambda task, seed: (
            (name, [corrupted(task, name, level, seed) for level in (0, 4)])
            for name in ("contrast", "pixelate")
        ),
        layers=((1, 64, 8),),
        products=((64, 64, 576), (32, 128, 256)),
        deployed={},
    )
    rows = list(contend(bench, 0))

    def one(**where: Any) -> Any:
        (row,) = [r for r in rows if all(r.get(k) == v for k, v in where.items())]
        return row

    for name in names:
        ratios = [
            one(track="task", item=item, contender=name)["accuracy"]
            / one(track="task", item=item, contender="float")["accuracy"]
            for item in ("digits", "tumours")
        ]
        found = one(track="task", item="overall", contender=name)["overall"]
        assert found == pytest.approx(overall([[r] for r in ratios]))
        assert one(track="architecture", item="overall", contender=name)["overall"] == (
            pytest.approx(ratios[0])
        )
        measured = one(track="hardware", item="digits", contender=name)
        assert measured["difference"] == 0.0
        scores = [
            one(track="training", item=item, contender=name)["accuracy"]
            for item in ("adam 0.001 cosine", "sgd 0.1 step")
        ]
        assert one(track="training", item="overall", contender=name)["spread"] == (
            pytest.approx(np.std(scores))
        )
        assert scores[0] == one(track="task", item="digits", contender=name)["accuracy"]
        gaps = []
        for corruption in ("contrast", "pixelate"):
            real, binary = (
                one(track="corruption", item=corruption, contender=c) for c in ("float", name)
            )
            lost = [max(r["clean"] - r["accuracy"], 0.1) for r in (real, binary)]
            gaps.append([lost[0] / lost[1]])
        assert one(track="corruption", item="overall", contender=name)["overall"] == (
            pytest.approx(overall(gaps))
        )
    # Signs, a scale, an offset and (ReActNet) a shift; the float layers' weights over them.
    signs = 9 * (2 * 32 * 32 + 32 * 64 + 64 * 64)
    vectors = 2 * (2 * 32 + 2 * 64)
    shifts = 3 * 32 + 64
    row = one(track="hardware", item="digits", contender="react")
    assert row["layer_ratio"] == pytest.approx(4 * signs / (signs / 8 + 4 * (vectors + shifts)))
    row = one(track="hardware", item="digits", contender="bnn")
    assert row["layer_ratio"] == pytest.approx(4 * signs / (signs / 8 + 4 * vectors))
    assert one(track="task", item="digits", contender="float")["accuracy"] > 60


def test_full_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no labelled texts"):
        next(iter(full([0], images=tmp_path, fashion=tmp_path, text=tmp_path)))


def test_committed_result_is_drawn_and_judged(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for seed in (0, 1):
        accuracies = {"bnn": 90.0, "react": 91.0, "recu": 89.0, "bireal": 90.0}
        rows += [
            {"track": "task", "item": "digits", "contender": n, "seed": seed, "accuracy": a}
            for n, a in accuracies.items()
        ]
        rows += [
            {"track": "training", "item": "overall", "contender": n, "seed": seed, "spread": s,
             "overall": 0.5}
            for n, s in (("bnn", 9.0), ("react", 7.0))
        ]  # fmt: skip
        rows.append(
            {"track": "hardware", "item": "digits", "contender": "react", "seed": seed,
             "layer_ratio": 24.9}
        )  # fmt: skip
        rows.append(
            {"track": "hardware", "item": "least of the products", "contender": "kernel",
             "seed": seed, "speedup": 3.0}
        )  # fmt: skip
    result = Result("bibench", "quick", tuple(rows), EXPERIMENT.claims)
    assert [e.holds for e in result.evidence()] == [True, False, True, True, False, True]
    assert EXPERIMENT.draw is not None
    EXPERIMENT.draw(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(CONTENDERS) == 10


@pytest.mark.data
def test_texts_are_binarized_and_packed(real_data: Any) -> None:
    file = real_data("text_cls") / "trec6.parquet"
    task = text_classification(file, length=16, limit=600)
    torch.manual_seed(0)
    network = Transformer(32, 1, classes=6, length=16, tokens=task.tokens)
    for epochs, rule, module in ((3, Supervised, network), (2, BinaryTraining, None)):
        if module is None:
            module = binarized(network, task.example_inputs, algorithm="react")
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        fit(rule(module, task, optimizer=optimizer), task, epochs=epochs, batch_size=32)
    final = deployed(module)
    stored = packed(final)
    runner = stored.runner(final, task.example_inputs)
    # Tokens are looked up, not multiplied: the first linear layer is the first that is kept.
    assert len(stored.tensors) == 5
    inputs = task.inputs(next(iter(task.batches("test", shuffle=False))))
    with torch.inference_mode():
        assert torch.equal(runner(*inputs), final(*inputs))
    assert task.score(runner, "test") > 25
