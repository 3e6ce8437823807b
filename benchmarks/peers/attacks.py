"""One attack of a peer on a network of a benchmark; runs inside the peer's environment.

Takes a folder with ``problem.safetensors`` (weights, images, labels) and ``problem.json`` (layers,
eps, attack), counts what goes through the network, and writes ``answer.safetensors`` and
``answer.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Counted(nn.Module):
    """A network that counts images forward and backward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        logits = self.network(images)
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def network_of(layers: list[list[object]], weights: dict[str, Tensor]) -> nn.Module:
    """A sequence of torch's layers, given by name and arguments."""
    made = nn.Sequential(*(getattr(nn, str(name))(*arguments) for name, *arguments in layers))
    made.load_state_dict(weights)
    return made.eval()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    told = json.loads((folder / "problem.json").read_text())
    tensors = load_file(folder / "problem.safetensors")
    images, labels = tensors.pop("images"), tensors.pop("labels")
    model = Counted(network_of(told["layers"], tensors))
    eps, batch, seed = told["eps"], told["batch"], told["seed"]
    library, _, name = told["attack"].partition(":")
    started = time.process_time()
    if library == "autoattack":
        sys.path.insert(0, told["autoattack"])
        from autoattack import AutoAttack

        attack = AutoAttack(
            model, norm="Linf", eps=eps, version="standard", device="cpu", verbose=False, seed=seed
        )
        if name != "standard":
            attack.attacks_to_run = [name]
        found = attack.run_standard_evaluation(images, labels, bs=batch)
    else:
        import torchattacks

        torch.manual_seed(seed)
        options = {
            "PGD": dict(eps=eps, alpha=eps / 4, steps=100),
            "APGD": dict(eps=eps, steps=100, seed=seed),
            "APGDT": dict(eps=eps, steps=100, seed=seed, n_classes=told["classes"]),
            "FAB": dict(eps=eps, steps=100, seed=seed, n_classes=told["classes"]),
            "Square": dict(eps=eps, n_queries=5000, seed=seed),
            "AutoAttack": dict(eps=eps, seed=seed, n_classes=told["classes"]),
        }[name]
        attack = getattr(torchattacks, name)(model, **options)
        found = torch.cat(
            [
                attack(part, answer)
                for part, answer in zip(images.split(batch), labels.split(batch), strict=True)
            ]
        )
    seconds = time.process_time() - started
    save_file({"images": found.detach().contiguous()}, folder / "answer.safetensors")
    answer = {
        "forwards": model.forwards, "backwards": model.backwards, "seconds": seconds,
    }  # fmt: skip
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
