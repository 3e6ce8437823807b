"""Adam whose weight decay pulls towards given weights: AdamR of DAREx.

Fine-tuned by it, a network stays near the one it began with, so that what it learned can be stored
as a sparse difference.

Source: Deng, Zhao, Vakilian, Chen, Li and Thrampoulidis, "DARE the Extreme: Revisiting
Delta-Parameter Pruning For Fine-Tuned Models", ICLR 2025, arXiv:2410.09344, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gossamer.core.errors import InputError


class AdamR(Optimizer):
    """Adam with decay towards reference weights.

    The decay of a step is ``lr * weight_decay / sqrt(v)`` with v the second moment averaged over
    *all* parameters, so one parameter's gradients do not decide how fast it returns. Without weight
    decay this is Adam.

    Args:
        params: what is trained.
        reference: weights to stay near, in the order of ``params``; copied. Default: what
            ``params`` are now.
        lr: learning rate.
        betas: of the two moments.
        eps: added to the root of the second moment.
        weight_decay: strength of the pull.
        norm: "l2" pulls by the distance, "l1" by its sign.

    Raises:
        InputError: if an option is out of range or the references do not fit.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        reference: Iterable[Tensor] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        norm: Literal["l2", "l1"] = "l2",
    ) -> None:
        if lr < 0.0 or weight_decay < 0.0 or eps < 0.0:
            raise InputError(
                f"learning rate, weight decay and eps are 0 or more, not {lr:g}, "
                f"{weight_decay:g} and {eps:g}"
            )
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise InputError(f"the betas are in [0, 1), not {betas}")
        if norm not in ("l2", "l1"):
            raise InputError(f"the norm is l2 or l1, not {norm!r:.20}")
        held = list(params)
        anchors = held if reference is None else list(reference)
        if [p.shape for p in held] != [a.shape for a in anchors]:
            raise InputError("the reference weights have other shapes than the parameters")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                    "norm": norm}  # fmt: skip
        super().__init__(held, defaults)
        for parameter, anchor in zip(held, anchors, strict=True):
            # In the state, so that it is saved, restored and moved with the moments.
            self.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
                "reference": anchor.detach().clone().to(parameter),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        total, count = 0.0, 0
        work: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name, value in state.items():
                    # fit moves parameters to the device after the optimizer was made.
                    if name != "step" and value.device != parameter.device:
                        state[name] = value.to(parameter.device)
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad, 1.0 - beta1)
                second = state["exp_avg_sq"]
                second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1.0 - beta2)
                total = total + second.sum(dtype=torch.float64) / (
                    1.0 - beta2 ** float(state["step"])
                )
                count += second.numel()
                work.append((parameter, state, group))
        spread = math.sqrt(float(total) / max(1, count))
        for parameter, state, group in work:
            beta1, beta2 = group["betas"]
            lr, steps = group["lr"], float(state["step"])
            if group["weight_decay"] and spread > 0.0:
                away = parameter - state["reference"]
                pull = away.sign() if group["norm"] == "l1" else away
                parameter.sub_(pull, alpha=lr * group["weight_decay"] / spread)
            denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(1.0 - beta2**steps)).add_(
                group["eps"]
            )
            parameter.addcdiv_(state["exp_avg"], denominator, value=-lr / (1.0 - beta1**steps))
        return loss
