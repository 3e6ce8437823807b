"""AdamW for transformers on tokens: what decays, how fast each layer learns, and when."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from gossamer.core.errors import InputError


def adamw(
    network: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW without weight decay on vectors, and with slower layers near the input.

    Args:
        network: its blocks are found by the name ``blocks.NUMBER``; ``head`` and ``norm`` learn
            at the full rate, everything else (the input) at the lowest.
        lr: of the head.
        weight_decay: of matrices and kernels.
        betas: of AdamW.
        layer_decay: each layer's rate is this times that of the layer after it.

    Raises:
        InputError: if a rate is not positive.
    """
    if lr <= 0.0 or weight_decay < 0.0 or not 0.0 < layer_decay <= 1.0:
        raise InputError(
            f"a learning rate above 0, a weight decay of 0 or more and a layer decay in (0, 1] are "
            f"needed, not {lr:g}, {weight_decay:g} and {layer_decay:g}"
        )
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    depths = [int(found.group(1)) for name, _ in named if (found := _BLOCK.match(name))]
    depth = 1 + max(depths, default=-1)

    def layer(name: str) -> int:
        if found := _BLOCK.match(name):
            return 1 + int(found.group(1))
        return depth + 1 if name.startswith(("head", "norm")) else 0

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        rate = lr * layer_decay ** (depth + 1 - layer(name))
        decay = weight_decay if parameter.ndim > 1 and name != "cls" else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        betas=betas,
        fused=True,  # one pass over the weights: small networks have many small ones
    )


_BLOCK = re.compile(r"(?:\w+\.)?blocks\.(\d+)\.")


def set_rate(optimizer: Optimizer, multiplier: float) -> None:
    """Sets every group's learning rate to a multiple of its own initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier


def warm_cosine_to(warm: float, floor: float = 0.0) -> Callable[[float], float]:
    """Linear warm-up over the first ``warm`` of training, then half a cosine down to ``floor``.

    Args:
        warm: share of the training.
        floor: last multiplier (smallest rate over largest).
    """

    def multiplier(fraction: float) -> float:
        if fraction < warm:
            return (fraction + 1e-3) / (warm + 1e-3)
        rest = (fraction - warm) / max(1e-9, 1.0 - warm)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))

    return multiplier
