"""GPTQ on one layer: how well and how fast, against llm-compressor on the same input?

The layer has random weights and inputs whose channels are correlated and of very different sizes.
Contenders round to four bits in groups of 128 from the same ranges, in the order of inputs and in
"static" order, with the same dampening; they take turns, one thread each. Beside them: rounding to
nearest, and the textbook (one column after the other in float64), whose error says what blocks and
single precision cost. llm-compressor runs in an environment of its own:

    python benchmarks/gptq.py --setup          # the peer's environment, in benchmarks/.envs
    python benchmarks/gptq.py --json benchmarks/results/gptq.json

Without the peer its numbers are null.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.compress.quantize.gptq import find_scales, gptq, round_to_nearest
from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.parts.scaled import NumberFormat, WeightFormat

HERE = Path(__file__).resolve().parent
PEER = HERE / ".envs" / "llmcompressor" / "bin" / "python"
PACKAGES = ("llmcompressor", "compressed-tensors", "loguru", "auto-round")
GROUP = 128


def setup(folder: Path) -> None:
    """Makes the peer's environment, which shares torch with this one."""
    venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = folder / "lib" / version / "site-packages" / "shared.pth"
    shared.write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([folder / "bin" / "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)


def problem(size: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight ``[size, size]`` and the second moment of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(size, size, generator=generator)
    hidden = torch.randn(tokens, size // 8, generator=generator)
    mixed = hidden @ torch.randn(size // 8, size, generator=generator) / (size // 8) ** 0.5
    x = mixed + 0.3 * torch.randn(tokens, size, generator=generator)
    x *= torch.randn(size, generator=generator).exp()
    return weight, x.T @ x / tokens


def error(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    """Squared output error relative to the squared output."""
    lost, whole = (weight - found).double(), weight.double()
    wide = hessian.double()
    return float(((lost @ wide) * lost).sum() / ((whole @ wide) * whole).sum())


def textbook(weight: Tensor, hessian: Tensor, order: str) -> Tensor:
    """The algorithm as it is written down, in float64."""
    format = WeightFormat(NumberFormat("int", 4), GROUP)
    columns = weight.shape[1]
    scale = find_scales(weight, format)[0].double()[:, format.groups(columns)]
    wide, moment = weight.double(), hessian.double()
    permutation = torch.arange(columns)
    if order == "static":
        permutation = moment.diagonal().argsort(descending=True, stable=True)
    wide, scale = wide[:, permutation].T.contiguous(), scale[:, permutation].T.contiguous()
    moment = moment[permutation][:, permutation]
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    made = torch.zeros_like(wide)
    for i in range(columns):
        made[i] = format.number.codes(wide[i], scale[i]) * scale[i]
        wide[i:].addr_(factor[i, i:], (wide[i] - made[i]) / factor[i, i], alpha=-1.0)
    return made[permutation.argsort()].T


def ours(weight: Tensor, hessian: Tensor, order: str) -> tuple[Tensor, float]:
    """Our result and its seconds."""
    format = WeightFormat(NumberFormat("int", 4), GROUP)
    began = time.perf_counter()
    made = gptq(weight, hessian, format, order="static" if order == "static" else "none")
    seconds = time.perf_counter() - began
    return made.tensor.decode(), seconds


def peers(python: Path, source: Path, order: str, threads: int) -> tuple[Tensor, float, str] | None:
    """The peer's result, its seconds and its version; None if it is not installed."""
    target = source.with_name("peer.safetensors")
    options = json.dumps({"group": GROUP, "order": order, "threads": threads})
    script = HERE / "peers" / "gptq_llmcompressor.py"
    done = subprocess.run(
        [python, script, source, options, target], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"the peer did not run: {last[:200]}", file=sys.stderr)
        return None
    answer = json.loads(lines[-1])
    return load_file(target)["weight"], answer["seconds"], answer["version"]


def main() -> None:
    parser = argparse.ArgumentParser(description="GPTQ on one layer, beside llm-compressor")
    parser.add_argument("--setup", action="store_true", help="make the peer's environment")
    parser.add_argument("--peer-python", type=Path, default=PEER)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-textbook", action="store_true", help="leave out the slow reference")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    if options.setup:
        setup(options.peer_python.parent.parent)
        return
    torch.set_num_threads(options.threads)
    weight, hessian = problem(options.size, options.tokens, seed=0)
    format = WeightFormat(NumberFormat("int", 4), GROUP)
    nearest = error(weight, round_to_nearest(weight, format).decode(), hessian)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "layer.safetensors"
        save_file({"weight": weight, "hessian": hessian}, source)
        ours(weight[:256, :256], hessian[:256, :256], "none")  # warms up
        for order in ("none", "static"):
            row: dict[str, Any] = {"order": order, "error_nearest": nearest}
            own, other = [], []
            peer_error = version = None
            found = weight
            for _ in range(options.rounds):
                found, seconds = ours(weight, hessian, order)
                own.append(seconds)
                answer = None
                if options.peer_python.exists():
                    answer = peers(options.peer_python, source, order, options.threads)
                if answer is not None:
                    other.append(answer[1])
                    peer_error, version = error(weight, answer[0], hessian), answer[2]
            ratios = [b / a for a, b in zip(own, other, strict=False)]
            row |= {
                "error": error(weight, found, hessian),
                "error_peer": peer_error,
                "error_textbook": None
                if options.no_textbook
                else error(weight, textbook(weight, hessian, order).float(), hessian),
                "seconds": own,
                "seconds_peer": other or None,
                "times_as_fast": median(ratios) if ratios else None,
                "times_as_fast_range": [min(ratios), max(ratios)] if ratios else None,
                "peer": f"llmcompressor {version}" if version else None,
            }
            rows.append(row)
            print(json.dumps(row, indent=1), flush=True)
    if options.json:
        size = {"size": options.size, "tokens": options.tokens, "group": GROUP}
        write_json(options.json, {"about": about(**size), "rows": rows})


if __name__ == "__main__":
    main()
