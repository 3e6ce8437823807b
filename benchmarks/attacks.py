"""How strong and how cheap are attacks, beside torchattacks and AutoAttack on the same networks?

A perceptron and a small convolutional network are trained on adversarial images of Fashion-MNIST.
Each contender attacks the same test images with the same budget; what it returns is clipped into
the budget and the box, and asked of the network here. Passes are images forward and backward;
seconds are of one processor. Peers run in an environment of their own:

    python benchmarks/attacks.py --setup                  # torchattacks, in benchmarks/.envs
    python benchmarks/attacks.py --autoattack FOLDER      # a copy of AutoAttack's repository
    python benchmarks/attacks.py --json benchmarks/results/attacks.json

Without a peer its numbers are null. The data are ``fashion_mnist`` in the folder that GOSSAMER_DATA
names.
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
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.core.fit import fit
from gossamer.datasets.idx import idx_sources
from gossamer.datasets.splits import assemble
from gossamer.evaluate.adversarial_training import AdversarialTraining
from gossamer.evaluate.attack import into_budget
from gossamer.evaluate.auto_attack import ATTACKS
from gossamer.evaluate.victim import Victim
from gossamer.experiments.real_data import folder_of

HERE = Path(__file__).resolve().parent
PEER = HERE / ".envs" / "torchattacks" / "bin" / "python"
EPS, BATCH, CLASSES = 0.1, 250, 10
NETWORKS: dict[str, list[list[Any]]] = {
    "perceptron": [
        ["Flatten"], ["Linear", 784, 200], ["ReLU"], ["Linear", 200, 200], ["ReLU"],
        ["Linear", 200, CLASSES],
    ],
    "convolutions": [
        ["Conv2d", 1, 16, 4, 2, 1], ["ReLU"], ["Conv2d", 16, 32, 4, 2, 1], ["ReLU"], ["Flatten"],
        ["Linear", 32 * 49, 100], ["ReLU"], ["Linear", 100, CLASSES],
    ],
}  # fmt: skip
OURS = ("pgd-ce", "pgd-pm", "md", "pma", "apgd-ce", "apgd-t", "fab-t", "square", "pma+",
        "auto-attack")  # fmt: skip
PEERS = (
    "torchattacks:PGD", "torchattacks:APGD", "torchattacks:APGDT", "torchattacks:FAB",
    "torchattacks:Square", "torchattacks:AutoAttack", "autoattack:apgd-ce", "autoattack:apgd-t",
    "autoattack:fab-t", "autoattack:square", "autoattack:standard",
)  # fmt: skip


def setup(folder: Path) -> None:
    """Makes the peer's environment, which shares torch with this one."""
    venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = folder / "lib" / version / "site-packages" / "shared.pth"
    shared.write_text(sysconfig.get_paths()["purelib"] + "\n")
    packages = ("torchattacks", "requests", "urllib3", "idna", "certifi", "charset-normalizer")
    subprocess.run([folder / "bin" / "pip", "install", "-q", "--no-deps", *packages], check=True)


def network_of(layers: list[list[Any]]) -> nn.Sequential:
    return nn.Sequential(*(getattr(nn, name)(*arguments) for name, *arguments in layers))


def trained(name: str, seed: int, attacked: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A robust network that takes pixels in [0, 1], and test images."""
    sources, _ = idx_sources(folder_of("fashion_mnist"))
    pool = sources["train"].take(np.random.default_rng(seed).permutation(60_000)[:12_000])
    task = assemble(
        pool, [str(k) for k in range(CLASSES)], name="Fashion-MNIST", test=sources["test"],
        mean=[0.0], std=[1.0],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network_of(NETWORKS[name])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rule = AdversarialTraining(model, task, eps=EPS, optimizer=optimizer)
    fit(rule, task, epochs=6, batch_size=64, seed=seed)
    images = sources["test"].fetch(np.arange(attacked)).float() / 255.0
    return model.eval().requires_grad_(True), images, sources["test"].labels[:attacked]


def ours(name: str, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    victim = Victim(model)
    started = time.process_time()
    attack = ATTACKS[name](victim, eps=EPS, seed=seed, batch_size=BATCH, steps=100)
    outcome = attack.run(images, labels)
    seconds = time.process_time() - started
    return judged(model, images, outcome.images, labels) | {
        "forwards": victim.forwards, "backwards": victim.backwards, "seconds": seconds,
    }  # fmt: skip


def theirs(
    name: str, layers: list[list[Any]], model: nn.Module, images: Tensor, labels: Tensor,
    seed: int, autoattack: Path | None,
) -> dict[str, Any] | None:  # fmt: skip
    python = PEER if name.startswith("torchattacks") else Path(sys.executable)
    if not python.exists() or (name.startswith("autoattack") and autoattack is None):
        return None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        save_file(weights | {"images": images, "labels": labels}, folder / "problem.safetensors")
        told = {
            "layers": layers, "eps": EPS, "batch": BATCH, "seed": seed, "attack": name,
            "classes": CLASSES, "autoattack": str(autoattack),
        }  # fmt: skip
        (folder / "problem.json").write_text(json.dumps(told))
        subprocess.run([python, HERE / "peers" / "attacks.py", folder], check=True)
        found = load_file(folder / "answer.safetensors")["images"]
        counted = json.loads((folder / "answer.json").read_text())
    return judged(model, images, found, labels) | counted


def judged(model: nn.Module, images: Tensor, found: Tensor, labels: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        right = model(images).argmax(1) == labels
        robust = right & (model(into_budget(found, images, EPS)).argmax(1) == labels)
    return {"robust": 100 * robust.float().mean().item(), "flags": robust.int().tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", action="store_true")
    parser.add_argument("--autoattack", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    if told.setup:
        setup(PEER.parent.parent)
        return
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if told.json is not None and told.json.is_file():  # an interrupted run goes on
        stored = json.loads(told.json.read_text())
        if stored["about"].get("images") == told.images:
            rows = stored["rows"]
    for seed in range(told.seeds):
        for network, layers in NETWORKS.items():
            model, images, labels = trained(network, seed, told.images)
            with torch.no_grad():
                clean = 100 * (model(images).argmax(1) == labels).float().mean().item()
            broken = torch.zeros(len(labels), dtype=torch.bool)
            done = {row["attack"]: row for row in rows
                    if row["network"] == network and row["seed"] == seed}  # fmt: skip
            for name in (*OURS, *PEERS):
                if name in done:
                    broken |= torch.tensor(done[name]["flags"]) == 0
                    continue
                found = (
                    ours(name, model, images, labels, seed)
                    if name in OURS
                    else theirs(name, layers, model, images, labels, seed, told.autoattack)
                )
                if found is None:
                    print(f"{network} {name}: not installed")
                    found = dict.fromkeys(("robust", "forwards", "backwards", "seconds"))
                else:
                    broken |= torch.tensor(found["flags"]) == 0
                    print(
                        f"{network:>12} {name:<24} {found['robust']:6.2f} %  "
                        f"{found['forwards']:>9,} forward {found['backwards']:>9,} backward "
                        f"{found['seconds']:7.2f} s"
                    )
                if found["robust"] is not None:
                    rows.append({"seed": seed, "network": network, "attack": name, **found})
                    _keep(told, rows)
            worst = 100 * (~broken).float().mean().item()
            if "all together" not in done:
                rows.append(
                    {"seed": seed, "network": network, "attack": "all together", "robust": worst,
                     "clean": clean}
                )  # fmt: skip
            print(f"{network:>12} clean {clean:.2f} %, all together {worst:.2f} %")
    for row in rows:  # which images stand is of use while the run goes on only
        row.pop("flags", None)
    _keep(told, rows)


def _keep(told: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if told.json is not None:
        write_json(told.json, {"about": about(eps=EPS, images=told.images), "rows": rows})


if __name__ == "__main__":
    main()
