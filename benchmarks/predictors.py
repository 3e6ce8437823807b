"""Predicted against measured latency, on networks that made none of the predictors.

First part: networks of several families. The learned predictor is fitted to the operators of the
networks named first; all three are judged on the others, which they have never seen (the table
times their operators one by one, never the networks). Second part: narrower versions of one
network, as a planner ranks them, and what predicting and measuring cost there.

    python benchmarks/predictors.py --json benchmarks/results/predictors.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from gossamer.compress.prune.magnitude import prune
from gossamer.core.experiment import about
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.files import write_json
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.hardware.calibrate import machine_device
from gossamer.hardware.measure import measure
from gossamer.hardware.onnx_operators import OnnxOperator, onnx_operators
from gossamer.hardware.predictor import LearnedTimes, LookupTable, Roofline, errors
from gossamer.models.resnet import digits_resnet

FITTED = (
    "resnet18", "resnet26d", "mobilenetv2_050", "mobilenetv3_small_100", "efficientnet_b0",
    "regnetx_004", "vit_tiny_patch16_224", "convnext_atto", "densenet121", "repvgg_a0",
)  # fmt: skip
UNSEEN = (
    "resnet10t", "resnet34", "mobilenetv2_100", "mobilenetv3_large_100", "mnasnet_small",
    "ghostnet_050", "regnety_004", "deit_tiny_patch16_224", "convnext_pico", "vgg11",
    "mobileone_s0", "tinynet_c", "levit_128s", "mixer_s32_224", "shufflenet_v2",
)  # fmt: skip
SIZE = 224


def built(name: str) -> nn.Module:
    if name == "shufflenet_v2":
        import torchvision

        return torchvision.models.shufflenet_v2_x1_0(weights=None).eval()
    return timm.create_model(name, num_classes=100).eval()


def exported(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    write_onnx(Network(built(name), (torch.randn(2, 3, SIZE, SIZE),)), path)
    return path


def operators(path: Path, x: torch.Tensor) -> list[OnnxOperator]:
    return onnx_operators(path, OnnxRunner(path).feed(x))


def families(folder: Path, rounds: int) -> list[dict[str, Any]]:
    device, table = machine_device(), LookupTable()
    image = torch.randn(1, 3, SIZE, SIZE)
    seen: list[OnnxOperator] = []
    for name in FITTED:
        found = operators(exported(name, folder), image)
        table.measure(found)
        seen += found
        print("fitted to", name, flush=True)
    unique = list({o.signature: o for o in seen}.values())
    learned = LearnedTimes(device, unique, [table.times[o.signature] for o in unique])
    predictors = {"table": table, "roofline": Roofline(device), "learned": learned}
    rows = []
    for name in UNSEEN:
        path = exported(name, folder)
        found = operators(path, image)
        row: dict[str, Any] = {"network": name, "operators_known": table.known(found)}
        for kind, predictor in predictors.items():
            began = time.perf_counter()
            row[kind] = predictor.predict(found)
            row[f"{kind}_seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        (timing,) = measure({name: path}, (image,), batch_sizes=(1,), rounds=rounds)
        row["measured_seconds"] = time.perf_counter() - began
        row["measured"] = timing.latency.p50
        row["fastest"] = float(timing.rounds.min())
        rows.append(row)
        print(row, flush=True)
    return rows


def candidates(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Narrower versions of one network at the batch and with the rounds of the planner."""
    task = digits()
    torch.manual_seed(0)
    dense = Network(digits_resnet().eval(), task.example_inputs)
    table, rows = LookupTable(), []
    batch = task.example_inputs[0].repeat(64, 1, 1, 1)[:64]
    files = {"dense": folder / "candidate-dense.onnx"}
    write_onnx(dense, files["dense"])
    table.predict(operators(files["dense"], batch))
    for number, keep in enumerate(np.linspace(0.2, 0.9, 8)):
        for multiple in (1, 8):
            name = f"{keep:.1f}/{multiple}"
            small = prune(dense, task, macs=float(keep), round_to=multiple, epochs=0)
            files[name] = folder / f"candidate-{number}-{multiple}.onnx"
            write_onnx(small, files[name])
            began = time.perf_counter()
            predicted = table.predict(operators(files[name], batch))
            between = time.perf_counter()
            timed = measure(
                {"dense": files["dense"], name: files[name]}, (batch,), batch_sizes=(64,),
                rounds=15,
            )  # fmt: skip
            ended = time.perf_counter()
            rows.append(
                {"candidate": name, "predicted": predicted, "predict_seconds": between - began,
                 "measure_seconds": ended - between, "alone": timed[1].latency.p50}
            )  # fmt: skip
    together = measure(files, (batch,), batch_sizes=(64,), rounds=rounds)
    measured = {t.name: t.latency.p50 for t in together}
    return [row | {"measured": measured[row["candidate"]]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ranked = candidates(Path(folder), given.rounds)
        rows = families(Path(folder), given.rounds)
    summary: dict[str, Any] = {}
    for kind in ("table", "roofline", "learned"):
        summary[kind] = asdict(errors([r[kind] for r in rows], [r["measured"] for r in rows]))
        print(kind, summary[kind])
    summary["candidates"] = asdict(
        errors([r["predicted"] for r in ranked], [r["measured"] for r in ranked])
    )
    # What measuring one after the other, as a planner has to, agrees with measuring in turns.
    summary["candidates measured alone"] = asdict(
        errors([r["alone"] for r in ranked], [r["measured"] for r in ranked])
    )
    summary["seconds"] = {
        key: sum(r[f"{key}_seconds"] for r in ranked) for key in ("predict", "measure")
    }
    print(summary)
    if given.json:
        write_json(
            given.json, {"summary": summary, "networks": rows, "candidates": ranked, **about()}
        )


if __name__ == "__main__":
    main()
