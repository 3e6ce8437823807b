"""Files of codebooks against float32, float16 and int8: bytes, decoding, products, memory.

    python benchmarks/codebooks.py --json benchmarks/results/codebooks.json

Three questions. How many bytes does the same network take on disk? (Every form is one safetensors
file; int8 has one 16-bit scale a row, codebooks eight groups with a scale each.) How long does it
take to have float32 weights again, from the file (in the page cache) and from its bytes in memory?
And what do a product and resident memory cost when a layer runs from its packed indices? Forms take
turns, one thread; times are medians, with the interquartile range as a share of them.

ResNet-20 takes its weights from ``weights_cifar10_resnet/resnet20.safetensors`` in the folder
that ``GOSSAMER_DATA`` names, and random ones where there is none: neither bytes nor times depend on
them. (A float32 file is mapped: reading it copies nothing.)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.compress.quantize.codebooks import cluster_weights, even_sizes
from gossamer.core.experiment import about
from gossamer.hardware.peak_memory import forget, highest, resident
from gossamer.models.resnet import cifar_resnet
from gossamer.parts.codebook import CodebookKernel, CodebookTensor
from gossamer.parts.packed import PackedNetwork

ENTRIES = (16, 8, 4, 3, 2)
SIDE, LAYERS = 2048, 4


def linear_stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))


def resnet20() -> nn.Module:
    torch.manual_seed(0)
    network = cifar_resnet(20)
    root = Path(os.environ.get("GOSSAMER_DATA", "../shared/data"))
    file = root / "weights_cifar10_resnet" / "resnet20.safetensors"
    if file.exists():
        network.load_state_dict(load_file(file), strict=False)
    return network


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.flatten(1)
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-8).half()
    return (rows / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale.float()


def forms(network: nn.Module, folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Writes every form; returns files and what reads them into float32 weights."""
    state = {k: v.detach().clone() for k, v in network.state_dict().items()}
    weights = {k for k, v in network.named_parameters() if v.ndim > 1}
    made: dict[str, tuple[Path, Callable[[], object]]] = {}

    def halves(v: Tensor) -> Tensor:
        return v.half() if v.is_floating_point() else v

    path = folder / "float32.safetensors"
    save_file(state, path)
    made["float32"] = (path, lambda path=path: load_file(path))
    path = folder / "float16.safetensors"
    save_file({k: halves(v) for k, v in state.items()}, path)
    made["float16"] = (
        path, lambda path=path: {k: v.float() for k, v in load_file(path).items()}
    )  # fmt: skip
    path = folder / "int8.safetensors"
    stored = {}
    for name, value in state.items():
        if name in weights:
            stored[f"{name}.codes"], stored[f"{name}.scale"] = int8(value)
        else:
            stored[name] = value
    save_file(stored, path)

    def read_int8(path: Path = path) -> object:
        held = load_file(path)
        names = [n.removesuffix(".codes") for n in held if n.endswith(".codes")]
        return [from_int8(held[f"{n}.codes"], held[f"{n}.scale"]) for n in names]

    made["int8"] = (path, read_int8)
    for entries in ENTRIES:
        path = folder / f"codebook{entries}.safetensors"
        tensors = {
            name: cluster_weights(state[name], entries, sizes=even_sizes(len(state[name]), 8))
            for name in weights
        }
        PackedNetwork.of(network, tensors).save(path)

        def read(path: Path = path) -> object:
            return [
                stored.kernel().decode(0, stored.shape[0])
                for stored in PackedNetwork.load(path).tensors.values()
            ]

        made[f"codebook of {entries}"] = (path, read)
    return made


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # compiles, fills caches
        call()
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(times, [25, 50, 75])
    return {"ms": float(middle), "spread": float((high - low) / middle)}


def files(rounds: int) -> list[dict]:
    rows = []
    for name, make in (("linear stack", linear_stack), ("ResNet-20", resnet20)):
        network = make()
        count = sum(v.numel() for v in network.parameters())
        with tempfile.TemporaryDirectory() as folder:
            made = forms(network, Path(folder))
            times = interleaved({form: read for form, (_, read) in made.items()}, rounds)
            whole = made["float32"][0].stat().st_size
            for form, (path, _) in made.items():
                size = path.stat().st_size
                rows.append(
                    {
                        "network": name, "parameters": count, "form": form, "bytes": size,
                        "bits_a_parameter": 8 * size / count, "of_float32": size / whole,
                        "read": summary(times[form]),
                    }
                )  # fmt: skip
                print(f"{name:13} {form:15} {size:>11,} bytes {8 * size / count:6.2f} bits  "
                      f"read {rows[-1]['read']['ms']:8.2f} ms")  # fmt: skip
    return rows


def layers(rounds: int) -> list[dict]:
    """Decoding one layer that is in memory, and multiplying with it."""
    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE)
    half, (codes, scale) = weight.half(), int8(weight)
    kernels: dict[str, CodebookKernel] = {}
    stored: dict[str, CodebookTensor] = {}
    for entries in ENTRIES:
        name = f"codebook of {entries}"
        stored[name] = cluster_weights(weight, entries, sizes=even_sizes(SIDE, 8))
        kernels[name] = CodebookKernel(stored[name])
    decode: dict[str, Callable[[], Tensor]] = {
        "float16": half.float,
        "int8": lambda: from_int8(codes, scale),
        **{n: (lambda k=k: k.decode(0, SIDE)) for n, k in kernels.items()},
    }
    rows = [
        {"what": "decode", "form": form, "batch": None, **summary(times)}
        for form, times in interleaved(decode, rounds).items()
    ]
    for batch in (1, 16):
        x = torch.randn(batch, SIDE)
        products: dict[str, Callable[[], Tensor]] = {
            "float32": lambda x=x: x @ weight.T,
            "float16": lambda x=x: x @ half.float().T,
            "int8": lambda x=x: x @ from_int8(codes, scale).T,
            **{f"{n}, blocks": (lambda k=k, x=x: k.linear(x, None)) for n, k in kernels.items()},
        }
        for name in ("codebook of 4", "codebook of 16"):
            buckets = CodebookKernel(stored[name], method="buckets")
            exact = x @ stored[name].decode().T
            for kernel in (kernels[name], buckets):
                torch.testing.assert_close(kernel.linear(x, None), exact, rtol=1e-3, atol=1e-3)
            products[f"{name}, buckets"] = lambda k=buckets, x=x: k.linear(x, None)
        rows += [
            {"what": "product", "form": form, "batch": batch, **summary(times)}
            for form, times in interleaved(products, rounds).items()
        ]
    for row in rows:
        print(f"{row['what']:8} {row['batch'] or '':>3} {row['form']:24} {row['ms']:8.3f} ms "
              f"± {row['spread']:.0%}")  # fmt: skip
    return rows


def memory() -> list[dict]:
    """Resident memory of a network that runs, each form in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        network = linear_stack()
        path = Path(folder) / "packed.safetensors"
        tensors = {n: cluster_weights(p, 4) for n, p in network.named_parameters()}
        PackedNetwork.of(network, tensors).save(path)
        for form in ("float32", "packed"):
            output = subprocess.run(
                [sys.executable, __file__, "--memory-of", form, "--file", str(path)],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            rows.append({"form": form, **json.loads(output.splitlines()[-1])})
            print(f"memory  {form:10} held {rows[-1]['held'] / 1e6:8.1f} MB, "
                  f"peak of a call {rows[-1]['peak'] / 1e6:8.1f} MB")  # fmt: skip
    return rows


def memory_of(form: str, file: Path) -> None:
    """Prints how much a loaded network holds, and the most a call takes, in bytes."""
    torch.set_num_threads(1)
    x = torch.randn(2, SIDE)
    warm = nn.Sequential(nn.Linear(8, 8, bias=False))
    packed = PackedNetwork.of(warm, {"0.weight": cluster_weights(warm[0].weight, 4)})
    with torch.inference_mode():  # everything that is loaded once is loaded now
        packed.runner(warm, (x[:, :8].clone(),))(x[:, :8])
    gc.collect()
    before = resident()
    network: nn.Module = linear_stack()
    if form == "packed":
        network = PackedNetwork.load(file).runner(network, (x,))
    gc.collect()
    with torch.inference_mode():
        network(x)
        held = resident() - before
        forget()
        network(x)
    print(json.dumps({"held": held, "peak": highest() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--memory-of", choices=("float32", "packed"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        memory_of(arguments.memory_of, arguments.file)
        return
    result = {
        "about": about(rounds=arguments.rounds),
        "files": files(arguments.rounds),
        "layer": layers(arguments.rounds),
        "memory": memory(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
