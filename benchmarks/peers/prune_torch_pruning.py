"""Prunes with Torch-Pruning, inside Torch-Pruning's own environment.

Called by ``benchmarks/shrink_vs_peers.py`` with one JSON request; writes, for every candidate, the
pruned network's tensors (safetensors) and one JSON answer. Torch-Pruning chooses channels by their
share, not by MACs; here the share is searched until the MACs are at most the budget and as close to
it as its channel counts allow, single layers being cut by one channel more where a share common to
all layers would overshoot.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from contest import empty_network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GRID = 1000
"""Shares that are tried are multiples of 1 / GRID."""


def importance(criterion: str) -> Any:
    """Torch-Pruning's scores: filter norms (L1), or the group norms of DepGraph (its default)."""
    if criterion == "magnitude":
        return tp.importance.MagnitudeImportance(p=1, group_reduction="first")
    return tp.importance.GroupMagnitudeImportance(p=2)


def macs(module: nn.Module, inputs: Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers, one sample."""
    total = 0

    def count(layer: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * layer.weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        module(inputs)
    for handle in handles:
        handle.remove()
    return total


def prune(
    dense: nn.Module, inputs: Tensor, candidate: dict[str, str], ratio: float, more: int
) -> nn.Module:
    """One pruned copy; ``more`` inner layers, from the last backwards, lose one channel more."""
    module = empty_network(dense_depth(dense))
    module.load_state_dict(dense.state_dict())
    module.eval()
    blocks = [b for s in module.stages for b in module.get_submodule(s)]
    ignored: list[nn.Module] = [module.get_submodule("linear")]
    if candidate["scope"] == "inner":
        # The residual stream passes shortcuts that pad channels, which Torch-Pruning's tracing
        # takes for element-wise; its users leave such layers alone.
        ignored += [module.get_submodule("conv1")] + [b.conv2 for b in blocks]
    options: dict[str, Any] = {}
    if more:
        options["pruning_ratio_dict"] = {
            b.conv1: ratio + 1.0 / b.conv1.out_channels for b in blocks[::-1][:more]
        }
    kind = (
        tp.pruner.GroupNormPruner
        if candidate["criterion"] == "group-norm"
        else tp.pruner.MagnitudePruner
    )
    pruner = kind(
        module,
        inputs,
        importance=importance(candidate["criterion"]),
        global_pruning=candidate["allocation"] == "global",
        pruning_ratio=ratio,
        ignored_layers=ignored,
        **options,
    )
    pruner.step()
    return module


def dense_depth(dense: Any) -> int:
    """6 n + 2."""
    return 6 * len(dense.get_submodule("layer1")) + 2


def silenced(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """The dense network with the channels silenced that the pruned one has not.

    Which channels survived is read off the batch-norm variances, which are all different.
    """
    result = empty_network(dense_depth(dense))
    result.load_state_dict(dense.state_dict())
    small = dict(pruned.named_modules())
    for name, norm in result.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            own, kept = norm.running_var, small[name].running_var
            assert isinstance(own, Tensor) and isinstance(kept, Tensor)
            gone = ~torch.isin(own, kept)
            with torch.no_grad():
                norm.weight[gone] = 0.0
                norm.bias[gone] = 0.0
    return result.eval()


def search(dense: nn.Module, inputs: Tensor, candidate: dict[str, str], budget: float) -> nn.Module:
    """The pruned network of most MACs that meets the budget."""
    low, high = 1, GRID - 1  # low is too large a network, high is small enough
    while high - low > 1:
        middle = (low + high) // 2
        if macs(prune(dense, inputs, candidate, middle / GRID, 0), inputs) <= budget:
            high = middle
        else:
            low = middle
    best = prune(dense, inputs, candidate, high / GRID, 0)
    if candidate["allocation"] == "local":
        blocks = (dense_depth(dense) - 2) // 2
        for more in range(1, blocks + 1):
            module = prune(dense, inputs, candidate, low / GRID, more)
            if macs(module, inputs) <= budget:
                if macs(module, inputs) > macs(best, inputs):
                    best = module
                break
    return best


def main() -> None:
    """Answers the request whose path is the only argument."""
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dense = empty_network(request["depth"])
    dense.load_state_dict(load_file(request["weights"]), strict=False)
    dense.eval()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 3, 32, 32, generator=generator)
    probe = torch.randn(4, 3, 32, 32, generator=generator)
    budget = request["share"] * macs(dense, inputs)
    answer: dict[str, Any] = {
        "version": metadata.version("torch-pruning"),
        "torch": torch.__version__,
        "candidates": {},
    }
    for candidate in request["candidates"]:
        name = candidate["file"]
        try:
            module = search(dense, inputs, candidate, budget).eval()
            with torch.no_grad():
                found, expected = module(probe), silenced(dense, module)(probe)
        except Exception as error:  # whatever the peer raises is its outcome
            answer["candidates"][name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        state = {f"network.{k}": v.contiguous() for k, v in module.state_dict().items()}
        state |= {"probe.inputs": probe, "probe.outputs": found}
        save_file(state, Path(request["out"]) / name)
        answer["candidates"][name] = {
            "share": macs(module, inputs) / macs(dense, inputs),
            # Zero up to rounding for a pruned network that is wired as the dense one was.
            "error": float((found - expected).abs().max() / expected.abs().max()),
        }
    Path(request["answer"]).write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
