"""Scores of single weights before training: SNIP, GraSP and SynFlow.

They judge weights that have learned nothing, from one batch or from none.

Sources: SNIP, Lee, Ajanthan and Torr, ICLR 2019, arXiv:1810.02340, eq. 6; GraSP, Wang, Zhang and
Grosse, ICLR 2020, arXiv:2002.07376, eq. 8; SynFlow, Tanaka et al., NeurIPS 2020, arXiv:2006.05467,
algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UnsupportedError
from gossamer.core.task import Batch, Labelled, Task, logits_of, to_device

TEMPERATURE = 200.0
SAMPLES_PER_CLASS = 10


def _prepared(module: nn.Module) -> nn.Module:
    """A copy in training mode (statistics of the batch, as untrained ones mean nothing) that drops
    nothing."""
    result = copy.deepcopy(module).train()
    for part in result.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    return result


def snip(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> dict[str, Tensor]:
    """|w g| over the sum of all, g the gradient of one batch of 128."""
    network = _prepared(module)
    batch = next(iter(task.batches("train", batch_size=128, seed=seed)))
    weights = [network.get_parameter(name) for name in names]
    slopes = torch.autograd.grad(task.loss(network, batch), weights)
    scores = [(w.detach() * g).abs() for w, g in zip(weights, slopes, strict=True)]
    total = sum(float(score.double().sum()) for score in scores)
    return {n: s / max(total, 1e-300) for n, s in zip(names, scores, strict=True)}


def grasp(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> dict[str, Tensor]:
    """w (H g): how much gradient flow is lost when the weight goes (high = keep).

    The paper removes the largest of -w (H g). The batch has ten samples of each class, and logits
    are divided by 200.

    Raises:
        UnsupportedError: if the task has no classes, or the network no second derivative.
    """
    if not isinstance(task, Labelled):
        raise UnsupportedError("GraSP needs a task with classes, to draw the same number of each")
    network = _prepared(module)
    batch = _balanced(task, seed)
    weights = [network.get_parameter(name) for name in names]
    logits = logits_of(task.outputs(network, batch)) / TEMPERATURE
    loss = nn.functional.cross_entropy(logits, batch[1])
    try:
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        flow = torch.stack([(g.detach() * g).sum() for g in slopes]).sum()
        curved = torch.autograd.grad(flow, weights)
    except RuntimeError as error:
        raise UnsupportedError(
            "GraSP needs second derivatives, which an operator of the network lacks"
        ) from error
    return {n: w.detach() * h for n, w, h in zip(names, weights, curved, strict=True)}


def _balanced(task: Labelled, seed: int) -> Batch:
    """Ten training samples of each class (or as many as there are)."""
    parts: list[Any] = []
    wanted = dict.fromkeys(range(len(task.classes)), SAMPLES_PER_CLASS)
    for batch in task.batches("train", batch_size=256, seed=seed):
        labels = batch[1]
        rows = torch.zeros(len(labels), dtype=torch.bool)
        for label, count in wanted.items():
            found = (labels == label).nonzero().flatten()[:count]
            rows[found] = True
            wanted[label] -= len(found)
        parts.append((batch[0][rows], labels[rows]))
        if not any(wanted.values()):
            break
    return to_device(
        (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), torch.device("cpu")
    )


def synflow(module: nn.Module, names: Sequence[str], task: Task, seed: int) -> dict[str, Tensor]:
    """|w| dR/d|w|, R the sum of the outputs of the network of absolute values for an input of ones.

    Needs no data. Scores of a layer's weights sum to the same in every layer, so with many rounds
    (100 in the paper) no layer is emptied before the others.

    Raises:
        UnsupportedError: if the network takes tokens: ones would be a word.
    """
    if not all(x.is_floating_point() for x in task.example_inputs):
        raise UnsupportedError("SynFlow feeds ones, which for a network of tokens is a word")
    network = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
        # Normalisation would undo the positive scale of a layer: it is made the identity.
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
            elif name.endswith("running_var"):
                buffer.fill_(1.0)
    ones = tuple(torch.ones_like(x[:1], dtype=torch.float64) for x in task.example_inputs)
    weights = [network.get_parameter(name) for name in names]
    slopes = torch.autograd.grad(logits_of(network(*ones)).sum(), weights)
    return {n: (w.detach() * g).abs() for n, w, g in zip(names, weights, slopes, strict=True)}
