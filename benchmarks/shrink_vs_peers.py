"""Shrinking against the peers: accuracy at half of the MACs, and int8.

CIFAR-10 (JPEG) and a pretrained CIFAR ResNet, which is adapted to the JPEG images first, once for
everyone. Then every contender removes channels until at most half of the MACs are left and is
fine-tuned for the same epochs, by the same loop, on the same samples: Torch-Pruning by magnitude
and by group norm, gossamer by L2 norms and by Taylor scores, random channels as the control, and
the dense network with the same epochs as the reference. Every contender has equally many short
trials on the validation split (which channels, which allocation, which learning rate); the test
split is scored once a final network. Distillation is a row of its own, since it could be added to
any contender. Int8: gossamer against NNCF, both run by ONNX Runtime, timed in turns on one thread.

Peers run in environments of their own (``--setup`` makes them); only safetensors, ONNX and JSON
pass between them. Finished runs are kept in ``--work``: an interrupted benchmark goes on.

    python benchmarks/shrink_vs_peers.py --setup
    python benchmarks/shrink_vs_peers.py --mode quick
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import numpy as np
import torch
from contest import (  # pyright: ignore[reportMissingImports]  (beside the peers' scripts)
    SETTINGS,
    Setting,
    adapt,
    adapted_file,
    data_folder,
    empty_network,
    open_task,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.compress.prune.allocation import ALLOCATIONS, cost_of, select
from gossamer.compress.prune.criterion import CRITERIA
from gossamer.compress.quantize.post_training import int8
from gossamer.core import surgery
from gossamer.core.dependency import analyse
from gossamer.core.experiment import Claim, Pick, Result, about
from gossamer.core.export import OnnxRunner, write_onnx
from gossamer.core.files import read_json, write_json
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import Classification
from gossamer.hardware.measure import compare, measure
from gossamer.models.build import load_weights

HERE = Path(__file__).resolve().parent
SHARE = 0.5
SCOPES = ("inner", "all")
"""Only the channels inside the residual blocks, or those of the residual stream too."""
PEERS = {"torch-pruning": "torch-pruning", "nncf": "nncf"}
"""Environments and the packages installed in them."""
OURS = {
    "gossamer l2": "l2",
    "gossamer group": "group",
    "gossamer taylor": "taylor",
    "random (control)": "random",
}
TORCH_PRUNING = {
    "Torch-Pruning magnitude": "magnitude",
    "Torch-Pruning group-norm": "group-norm",
}
REFERENCE_SEEDS = {"quick": 1, "standard": 0, "full": 3}
"""Seeds of the dense reference and of distillation, which are beside the comparison."""
DENSE = "dense (reference)"
DISTILLED = " + distillation"


def setup(environments: Path) -> None:
    """Makes the peers' environments; what gossamer needs is shared with this interpreter's."""
    for name, package in PEERS.items():
        folder = environments / name
        if not folder.exists():
            venv.create(folder, with_pip=True)
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            # One torch for everyone: the same kernels, and no second copy of gigabytes.
            shared = folder / "lib" / version / "site-packages" / "shared.pth"
            shared.write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([folder / "bin" / "pip", "install", "-q", package], check=True)


def ask_peer(
    environments: Path, peer: str, script: str, request: dict[str, Any], folder: Path
) -> Any:
    """Runs a peer's script in its environment; returns its answer."""
    folder.mkdir(parents=True, exist_ok=True)
    question, answer = folder / f"{script}.request.json", folder / f"{script}.answer.json"
    if answer.exists():
        return read_json(answer)
    write_json(question, request | {"out": str(folder), "answer": str(answer)})
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [environments / peer / "bin" / "python", HERE / "peers" / f"{script}.py", question],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return read_json(answer)


def rebuilt(depth: int, file: Path) -> nn.Module:
    """The network a peer pruned, from its tensors; checked against the outputs the peer had.

    Raises:
        RuntimeError: if the outputs differ.
    """
    tensors = load_file(file)
    state = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    module = empty_network(depth)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight = nn.Parameter(torch.empty_like(state[f"{name}.weight"]))
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        elif isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.empty_like(state[f"{name}.weight"]))
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = len(state[f"{name}.weight"])
            for key in ("weight", "bias"):
                setattr(layer, key, nn.Parameter(torch.empty_like(state[f"{name}.{key}"])))
            for key in ("running_mean", "running_var"):
                setattr(layer, key, torch.empty_like(state[f"{name}.{key}"]))
    module.load_state_dict(state)
    module.eval()
    with torch.no_grad():
        found = module(tensors["probe.inputs"])
    if not torch.allclose(found, tensors["probe.outputs"], rtol=1e-4, atol=1e-4):
        raise RuntimeError(f"{file} was not rebuilt as the peer had it")
    return module


def prune_ours(
    dense: nn.Module,
    task: Classification,
    *,
    criterion: str,
    scope: str,
    allocation: str,
    seed: int,
) -> nn.Module:
    """gossamer's criteria and allocations, without the fine-tuning that is everyone's."""
    module = copy.deepcopy(dense).eval()
    dependency = analyse(module, task.example_inputs)
    scores = CRITERIA[criterion](module, dependency, task, seed)
    priorities: list[Tensor] = ALLOCATIONS[allocation](scores)
    if scope == "inner":
        # Channels inside a block are made by one convolution; the stream's by one a block.
        makers = [
            sum(m.role == "producer" and m.parameter for m in family.members)
            for family in dependency.families
        ]
        priorities = [
            p if n == 1 else torch.full_like(p, torch.inf)
            for p, n in zip(priorities, makers, strict=True)
        ]
    removed = select(
        priorities, cost=cost_of("macs", dependency), target=SHARE * dependency.graph.macs
    )
    removal = {i: mask for i, mask in enumerate(removed) if bool(mask.any())}
    result = surgery.remove(module, dependency, removal)
    if not result.verified:
        raise RuntimeError(f"{criterion} {scope} {allocation} was not verified")
    return result.module


class Benchmark:
    """One run of the benchmark; finished parts are read back from ``work``.

    Args:
        mode: "quick" or "full".
        work: outside of the repository; keeps weights and finished runs.
        environments: the peers'.
    """

    def __init__(
        self, mode: str, work: Path, environments: Path, contenders: Sequence[str] = ()
    ) -> None:
        self.pruners = tuple(contenders) or (*TORCH_PRUNING, *OURS)
        self.mode, self.environments = mode, environments
        self.setting: Setting = SETTINGS[mode]
        digest = hashlib.blake2b(repr(self.setting).encode(), digest_size=4).hexdigest()
        self.runs = work / f"{mode}-{digest}"
        self.runs.mkdir(parents=True, exist_ok=True)
        weights = adapted_file(work, self.setting)
        if not weights.exists():
            say("adapting the published weights to JPEG")
            adapt(self.setting, weights)
        self.weights = weights
        self.dense = empty_network(self.setting.depth)
        load_weights(self.dense, weights)
        self.dense.eval()
        self.task = open_task(self.setting.tune_images)
        self.trial_task = open_task(self.setting.trial_images)
        self.macs = Graph.trace(self.dense, self.task.example_inputs).macs

    def once(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``run``, or the one an earlier process kept under ``key``."""
        file = self.runs / (key.replace(" ", "-").replace("/", "-") + ".json")
        if file.exists():
            return read_json(file)
        result = run()
        write_json(file, result)
        say(f"{key}: {result}")
        return result

    def before(self) -> dict[str, Any]:
        """Test accuracy of the published weights as they are, and of the adapted ones."""

        def run() -> dict[str, Any]:
            published = empty_network(self.setting.depth)
            file = f"resnet{self.setting.depth}.safetensors"
            load_weights(published, data_folder() / "weights_cifar10_resnet" / file)
            return {
                "published": self.task.score(published, "test"),
                "adapted": self.task.score(self.dense, "test"),
            }

        return self.once("before", run)

    def candidates(self, contender: str) -> list[dict[str, str]]:
        """Scope and allocation, four for everyone who prunes."""
        local = "local" if contender in TORCH_PRUNING else "uniform"
        return [{"scope": s, "allocation": a} for s in SCOPES for a in ("global", local)]

    def peer(self) -> dict[str, Any]:
        """Torch-Pruning's networks."""
        request = {
            "depth": self.setting.depth,
            "weights": str(self.weights),
            "share": SHARE,
            "candidates": [
                c | {"criterion": criterion, "file": peer_file(contender, c)}
                for contender, criterion in TORCH_PRUNING.items()
                for c in self.candidates(contender)
            ],
        }
        return ask_peer(
            self.environments, "torch-pruning", "prune_torch_pruning", request, self.runs
        )

    def pruned(self, contender: str, candidate: dict[str, str], seed: int) -> nn.Module:
        """A contender's pruned network, not fine-tuned."""
        if contender == DENSE:
            return copy.deepcopy(self.dense)
        if contender in TORCH_PRUNING:
            outcome = self.peer()["candidates"][peer_file(contender, candidate)]
            if "failed" in outcome:
                raise RuntimeError(outcome["failed"])
            return rebuilt(self.setting.depth, self.runs / peer_file(contender, candidate))
        criterion = OURS[contender]
        return prune_ours(self.dense, self.task, criterion=criterion, seed=seed, **candidate)

    def trial(self, contender: str, candidate: dict[str, str], lr: float) -> dict[str, Any]:
        """One short fine-tuning, scored on the validation split."""

        def run() -> dict[str, Any]:
            try:
                module = self.pruned(contender, candidate, self.setting.trial_seed)
            except RuntimeError as error:
                return {"validation": 0.0, "failed": str(error)}
            seed = self.setting.trial_seed
            train(module, self.trial_task, self.setting, lr=lr, seed=seed, epochs=1)
            return {"validation": self.trial_task.score(module, "validation")}

        names = "-".join(candidate.values())
        return self.once(f"trial {contender} {names} {lr}", run)

    def choose(self, contender: str) -> tuple[dict[str, str], float, dict[str, float]]:
        """Scope and allocation first, the learning rate then, all on the validation split."""
        first = self.setting.trial_lr
        if contender == DENSE:
            options: list[dict[str, str]] = [{}]
        else:
            options = self.candidates(contender)
        found = [self.trial(contender, c, first)["validation"] for c in options]
        best = options[int(np.argmax(found))]
        lrs = [first, *self.setting.other_lrs]
        by_lr = [self.trial(contender, best, lr)["validation"] for lr in lrs]
        trials = {
            " ".join((*c.values(), str(first))): v for c, v in zip(options, found, strict=True)
        }
        trials |= {" ".join((*best.values(), str(lr))): v for lr, v in zip(lrs, by_lr, strict=True)}
        return best, lrs[int(np.argmax(by_lr))], trials

    def final(self, contender: str, seed: int, *, distil: bool = False) -> dict[str, Any]:
        """One final network: pruned, fine-tuned, scored once on the test split."""
        candidate, lr, trials = self.choose(contender)

        def run() -> dict[str, Any]:
            module = self.pruned(contender, candidate, seed)
            graph = Graph.trace(module, self.task.example_inputs)
            began = time.monotonic()
            teacher = self.dense if distil else None
            train(module, self.task, self.setting, lr=lr, seed=seed, teacher=teacher)
            return {
                "contender": contender + (DISTILLED if distil else ""),
                "seed": seed,
                "accuracy": self.task.score(module, "test"),
                "macs_kept": graph.macs / self.macs,
                "parameters": graph.parameters,
                "seconds": time.monotonic() - began,
                "lr": lr,
                "trials": trials,
            } | candidate

        return self.once(f"final {contender}{DISTILLED if distil else ''} {seed}", run)

    def quantized(self) -> list[dict[str, Any]]:
        """Int8 of the adapted float network, ours against NNCF's, run by ONNX Runtime."""
        folder = self.runs / "int8"
        folder.mkdir(exist_ok=True)
        network = Network(self.dense, self.task.example_inputs)
        floating = folder / "float.onnx"
        write_onnx(network, floating)
        source = self.task.splits["train"]
        rows = np.linspace(0, len(source) - 1, self.setting.calibration).astype(np.int64)
        images = self.task.preprocess(source.fetch(rows)).contiguous()
        save_file({"images": images}, folder / "calibration.safetensors")
        files: dict[str, dict[str, Path]] = {"gossamer int8": {}, "NNCF int8": {}}
        for method in ("minmax", "entropy"):
            path = folder / f"gossamer-{method}.onnx"
            if not path.exists():
                made = int8(
                    network, self.task, calibration=method, samples=self.setting.calibration
                )
                write_onnx(made, path)
            files["gossamer int8"][method] = path
        request = {"model": str(floating), "calibration": str(folder / "calibration.safetensors")}
        answer = ask_peer(self.environments, "nncf", "quantize_nncf", request, folder)
        files["NNCF int8"] = {k: Path(v) for k, v in answer["files"].items()}

        def run() -> dict[str, Any]:
            table: dict[str, Any] = {}
            chosen: dict[str, Path] = {"float32": floating}
            for name, options in files.items():
                scores = {
                    k: self.task.score(OnnxRunner(p), "validation") for k, p in options.items()
                }
                best = max(scores, key=lambda k: scores[k])
                chosen[name] = options[best]
                table[name] = {"chosen": best, "validation": scores}
            for name, path in chosen.items():
                table.setdefault(name, {})
                table[name] |= {
                    "accuracy": self.task.score(OnnxRunner(path), "test"),
                    "bytes": path.stat().st_size,
                }
            # Everything that a user might pick is timed, in turns.
            timed = {"float32": floating} | {
                f"{n} ({k})": p for n, options in files.items() for k, p in options.items()
            }
            latency: dict[str, Any] = {}
            for batch in (1, 64):
                timings = measure(
                    timed, self.task.example_inputs, batch_sizes=(batch,), threads=(1,)
                )
                by_name = {t.name: t for t in timings}
                latency[str(batch)] = {
                    name: {
                        "p50_ms": t.latency.p50,
                        "p95_ms": t.latency.p95,
                        "speedup_over_float": asdict(compare(by_name["float32"], t)),
                    }
                    for name, t in by_name.items()
                }
                pair = [
                    by_name[f"{n} ({table[n]['chosen']})"] for n in ("NNCF int8", "gossamer int8")
                ]
                latency[str(batch)]["NNCF over gossamer"] = asdict(compare(*pair))
            return {"table": table, "latency": latency, "nncf": answer["version"]}

        value = self.once("int8", run)
        rows_ = []
        for name, row in value["table"].items():
            key = f"{name} ({row['chosen']})" if "chosen" in row else name
            times = {
                f"p50_ms_batch_{b}": found[key]["p50_ms"] for b, found in value["latency"].items()
            }
            rows_.append({"contender": name, "seed": 0} | row | times)
        self.latency = value["latency"]
        self.nncf = value["nncf"]
        return rows_

    def run(self) -> Result:
        """Everything; returns the result to be written."""
        before = self.before()
        say(f"test accuracy before pruning: {before}")
        quantized = self.quantized()
        rows: list[dict[str, Any]] = []
        for contender in self.pruners:
            self.choose(contender)
        for seed in self.setting.seeds:
            rows += [self.final(contender, seed) for contender in self.pruners]
        best = max(
            ("gossamer l2", "gossamer group", "gossamer taylor"),
            key=lambda c: max(self.choose(c)[2].values()),
        )
        beside = self.setting.seeds[: REFERENCE_SEEDS[self.mode]]
        rows += [self.final(best, seed, distil=True) for seed in beside]
        rows += [self.final(DENSE, seed) for seed in beside]
        peer = self.peer()
        versions = {"torch-pruning": peer["version"], "nncf": self.nncf}
        return Result(
            "shrink_vs_peers",
            self.mode,
            tuple(rows + quantized),
            claims(),
            about=about(
                setting=asdict(self.setting),
                data="CIFAR-10 (JPEG)",
                before=before,
                chosen_of_ours_on_validation=best,
                peers=versions,
                torch_pruning_networks=peer["candidates"],
                latency=self.latency,
            ),
        )


def claims() -> tuple[Claim, ...]:
    """The target: better than every peer at equal MACs and equal epochs."""

    def accuracy(contender: str) -> Pick:
        return Pick("accuracy", {"contender": contender})

    pruning = [
        Claim(
            f"{ours} is more accurate than {theirs} at half of the MACs",
            accuracy(ours),
            ">",
            accuracy(theirs),
        )
        for ours in ("gossamer l2", "gossamer group", "gossamer taylor")
        for theirs in (*TORCH_PRUNING, "random (control)")
    ]
    return (
        *pruning,
        Claim(
            "gossamer int8 is more accurate than NNCF int8",
            accuracy("gossamer int8"),
            ">",
            accuracy("NNCF int8"),
        ),
        Claim(
            "gossamer int8 is no larger than NNCF int8",
            Pick("bytes", {"contender": "gossamer int8"}),
            "<=",
            Pick("bytes", {"contender": "NNCF int8"}),
        ),
    )


def peer_file(contender: str, candidate: dict[str, str]) -> str:
    """Name of the tensors of one of Torch-Pruning's networks."""
    return "-".join([TORCH_PRUNING[contender], *candidate.values()]) + ".safetensors"


def table(result: Result) -> str:
    """The result as Markdown."""
    lines = [
        "| contender | channels | test accuracy | MACs kept | parameters |",
        "|---|---|---|---|---|",
    ]
    rows = [dict(row) for row in result.rows]
    for name in dict.fromkeys(r["contender"] for r in rows if "macs_kept" in r):
        own = [r for r in rows if r["contender"] == name]
        values = np.array([r["accuracy"] for r in own])
        spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else " (one seed)"
        how = f"{own[0]['scope']}, {own[0]['allocation']}" if "scope" in own[0] else "all kept"
        lines.append(
            f"| {name} | {how}, lr {own[0]['lr']:g} | {values.mean():.2f}{spread} | "
            f"{np.mean([r['macs_kept'] for r in own]):.4f} | "
            f"{np.mean([r['parameters'] for r in own]):,.0f} |"
        )
    lines += [
        "",
        "| int8 | test accuracy | bytes | p50 ms, batch 1 | p50 ms, batch 64 |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        if "bytes" in r:
            kind = f" ({r['chosen']})" if "chosen" in r else ""
            lines.append(
                f"| {r['contender']}{kind} | {r['accuracy']:.2f} | {r['bytes']:,} | "
                f"{r['p50_ms_batch_1']:.3f} | {r['p50_ms_batch_64']:.2f} |"
            )
    lines += ["", "| claim | difference, 95 % interval | holds |", "|---|---|---|"]
    for e in result.evidence():
        half = f" ± {e.half_width:.2f}" if e.half_width is not None else ""
        shown = "-" if e.difference is None else f"{e.difference:+,.2f}{half}"
        lines.append(f"| {e.text} | {shown} | {'yes' if e.holds else 'no'} |")
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Shrinking against the peers.")
    parser.add_argument("--mode", choices=sorted(SETTINGS), default="quick")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CONTENDER", help="leave the others out"
    )
    parser.add_argument("--setup", action="store_true", help="make the peers' environments")
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--envs", type=Path, default=HERE / ".envs")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "gossamer" / "shrink_vs_peers"
    )
    parser.add_argument(
        "--json", type=Path, help="default: results/shrink_vs_peers.json, in quick mode"
    )
    options = parser.parse_args()
    committed = HERE / "results" / "shrink_vs_peers.json"
    target = options.json or (
        committed
        if options.mode == "quick"
        else committed.with_stem(f"shrink_vs_peers_{options.mode}")
    )
    if options.setup:
        setup(options.envs)
        return
    if not options.table:
        torch.set_num_threads(1)
        Benchmark(options.mode, options.work, options.envs, options.only).run().write(target)
    print(table(Result.read(target)))


if __name__ == "__main__":
    main()
