"""L0 regularisation: gates that are exactly 0 or 1 with some probability, learned by gradient.

Every removable unit gets a random gate, a concrete (relaxed Bernoulli) variable stretched beyond
[0, 1] and clipped, so that both ends have probability. The chance that a gate is not zero is known
in closed form; weighted by the unit's parameters it is the expected number of parameters, and is
penalised. Afterwards units whose gate is 0 are removed for real, and the factors of the others go
into the weights that read them.

Source: Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization",
ICLR 2018, arXiv:1712.01312, eq. 10 to 13. Here the gates of a unit multiply the weights that read
it, which is the same as multiplying its activation, behind whatever normalisation there is; one
draw holds for a batch. Starting from a trained network with gates that are mostly open is ours.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.compress.prune.groups import Groups
from gossamer.core import surgery
from gossamer.core.dependency import Dependency, analyse
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.fit import Log, Rule, cosine, fit, sgd
from gossamer.core.graph import Graph
from gossamer.core.network import Network
from gossamer.core.task import Batch, Task
from gossamer.parts.batchnorm import recalibrate_on
from gossamer.parts.swap import swapped

BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1


def drawn_gates(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Hard-concrete samples in [0, 1], as ``log_alpha`` (eq. 10 and 11).

    Args:
        log_alpha: of each gate.
        uniform: in (0, 1), of the same shape.
    """
    s = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not zero, as ``log_alpha`` (eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def settled_gates(log_alpha: Tensor) -> Tensor:
    """The gates of the finished network, in [0, 1], as ``log_alpha`` (eq. 13)."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


class Gates(nn.Module):
    """One gate for every removable unit that some weight reads.

    Args:
        module: the network.
        dependency: its removable families; families that a normalisation or softmax runs over, or
            that no weight reads, have no gates.
        start: probability that a gate is open at first.

    Attributes:
        log_alpha: of each unit, ``[units]``.
        sizes: parameters that leave with each unit, ``[units]``; one between two families
            counts in both.

    Raises:
        InputError: if ``start`` is not in (0, 1).
        UnsupportedError: if no unit can have a gate.
    """

    sizes: Tensor

    def __init__(self, module: nn.Module, dependency: Dependency, *, start: float = 0.9) -> None:
        super().__init__()
        if not 0.0 < start < 1.0:
            raise InputError(f"gates are open with a probability in (0, 1), not {start:g}")
        groups = Groups.of(module, dependency, roles=("consumer",), silenceable=True)
        self.read = groups.elements > 0
        if not bool(self.read.any()):
            raise UnsupportedError("no weight reads a removable unit, so there is nothing to gate")
        self.groups = groups
        first = math.log(start / (1.0 - start)) + BETA * math.log(-GAMMA / ZETA)
        self.log_alpha = nn.Parameter(torch.full((groups.total,), first))
        sizes = [dependency.families[i].parameters(dependency.graph) for i in groups.indices]
        self.register_buffer("sizes", torch.cat(sizes).float() * self.read)

    def expected(self) -> Tensor:
        """The expected share of the gated parameters that stays, in [0, 1]."""
        return (open_probability(self.log_alpha) * self.sizes).sum() / self.sizes.sum()

    def gated(self, values: Tensor) -> dict[str, Tensor]:
        """The weights that read the units, times the units' gates.

        Args:
            values: one gate a unit, ``[units]``.
        """
        padded = torch.cat([values, values.new_ones(1)])
        found: dict[str, Tensor] = {}
        for entry in self.groups.entries:
            shape = [1] * entry.tensor.ndim
            shape[entry.axis] = -1
            factor = padded[entry.owner.to(padded.device)].view(shape)
            found[entry.name] = found.get(entry.name, entry.tensor) * factor
        return found

    @torch.no_grad()
    def fold(self, network: nn.Module) -> dict[int, Tensor]:
        """Writes the finished gates into the readers' weights, in place.

        Args:
            network: the one the gates belong to, on the gates' device.

        Returns:
            The units whose gate is zero, as surgery takes them; of a family that would lose all,
            the one nearest to open stays (silent).
        """
        values = settled_gates(self.log_alpha)
        for name, weight in self.gated(values).items():
            network.get_parameter(name).copy_(weight)
        gone = (values == 0.0) & self.read.to(values.device)
        for logits, mask in zip(
            self.groups.split(self.log_alpha), self.groups.split(gone), strict=True
        ):
            if bool(mask.all()):
                mask[logits.argmax()] = False
        return dict(self.groups.removal(gone))


class HardConcreteTraining(Rule):
    """Weights and gates together: the loss plus ``lam`` times the expected share that stays.

    Args:
        network: trained in place.
        gates: its gates.
        task: gives the loss.
        lam: weight of the penalty.
        lr: of the weights (SGD along half a cosine).
        gate_lr: of the gates (Adam along half a cosine).
        weight_decay: of matrices and kernels.

    Attributes:
        history: expected share after each epoch.
    """

    def __init__(
        self, network: nn.Module, gates: Gates, task: Task, *, lam: float, lr: float = 0.02,
        gate_lr: float = 0.3, weight_decay: float = 5e-4,
    ) -> None:  # fmt: skip
        self.network, self.gates, self.task, self.lam = network, gates, task, lam
        self.weights_optimizer = sgd(network, lr=lr, weight_decay=weight_decay)
        self.gates_optimizer = torch.optim.Adam(gates.parameters(), lr=gate_lr)
        self.rates = (lr, gate_lr)
        self.history: list[float] = []

    def step(self, batch: Batch) -> Log:
        optimizers = (self.weights_optimizer, self.gates_optimizer)
        for optimizer, rate in zip(optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(self.run.fraction)
            optimizer.zero_grad(set_to_none=True)
        assert isinstance(self.gates, Gates)
        log_alpha = self.gates.log_alpha
        uniform = torch.rand_like(log_alpha).clamp(1e-6, 1.0 - 1e-6)
        with (
            self.run.accelerator.autocast(),
            swapped(self.network, self.gates.gated(drawn_gates(log_alpha, uniform))),
        ):
            loss = self.task.loss(self.network, batch) + self.lam * self.gates.expected()
        self.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return {"loss": loss.detach()}

    def end_epoch(self) -> None:
        assert isinstance(self.gates, Gates)
        self.history.append(float(self.gates.expected()))

    def extra_state(self) -> dict[str, list[float]]:
        return {"history": self.history}

    def load_extra_state(self, state: object) -> None:
        assert isinstance(state, dict)
        self.history = list(state["history"])


def hard_concrete(
    network: Network,
    task: Task,
    *,
    lam: float = 3.0,
    start: float = 0.9,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 0.02,
    gate_lr: float = 0.3,
    weight_decay: float = 5e-4,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Network:
    """Trains with L0 gates on channels and removes those that closed (a step of a recipe).

    How much goes follows from ``lam``: the penalty has no budget.

    Args:
        network: trained or not; unchanged.
        task: its data.
        lam: what the loss may rise for all gated parameters to go.
        start: probability that a gate is open at first.
        epochs: of training.
        batch_size: samples a batch.
        lr: of the weights at the start; falls to 0 along half a cosine.
        gate_lr: of the gates, likewise.
        weight_decay: of matrices and kernels.
        seed: of gates and data order.
        checkpoint: file that holds the run's state.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The smaller network; statistics of batch normalisation are computed anew, since those of
        training are of random gates.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or no unit can have a gate.
    """
    if lam < 0.0 or epochs < 0:
        raise InputError(f"lam and epochs are 0 or more, not {lam:g} and {epochs}")
    module = copy.deepcopy(network.module).cpu()
    dependency = analyse(module, network.example_inputs)
    gates = Gates(module, dependency, start=start)
    rule = HardConcreteTraining(
        module, gates, task, lam=lam, lr=lr, gate_lr=gate_lr, weight_decay=weight_decay
    )
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        cpu=cpu, title="L0 gates",
    )  # fmt: skip
    module.cpu().eval()
    gates.cpu()
    # The trace holds the same parameters: what is folded here, surgery sees.
    removal = gates.fold(module)
    result = surgery.remove(module, dependency, removal, verify=True)
    small = result.module.eval()
    recalibrate_on(small, task, batch_size=batch_size)
    after = Graph.trace(small, network.example_inputs)
    options = {
        "lam": lam, "start": start, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "gate_lr": gate_lr, "weight_decay": weight_decay, "seed": seed,
    }  # fmt: skip
    families = dependency.families
    report = {
        "parameters": [dependency.graph.parameters, after.parameters],
        "macs": [dependency.graph.macs, after.macs],
        "expected": rule.history,
        "rounds": [
            {
                "removed": {
                    families[i].name: f"{int(mask.sum())} of {len(mask)}"
                    for i, mask in removal.items()
                },
                "verified": bool(result.verified),
                "error": float(result.error),
                "notes": list(result.notes),
            }
        ],
    }
    return network.after("hard-concrete", options, report, module=small)
