"""Choose channels by what their readers would miss, and let the readers make up for the rest.

A reader's outputs are sums of what each channel adds, so both questions are least squares:

- **which channels**: the LASSO over one factor a channel drives the factors of those to zero that
  the others can stand in for (He, Zhang and Sun, "Channel pruning for accelerating very deep neural
  networks", ICCV 2017, arXiv:1707.06168, eq. 3);
- **what then**: the readers' weights on the channels that stay are fitted anew to the outputs of
  the untouched network (:func:`refit`), all of them (He et al., eq. 4 and section 3.2) or one
  factor a channel (ThiNet, Luo et al., ICCV 2017, arXiv:1707.06342, section 3.2.3). Readers are
  taken in order of execution, each with the inputs that the already pruned network gives it.

Sums run over all positions of the samples; the papers draw ten of each image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.compress.prune.groups import Groups
from gossamer.compress.prune.post_training import LayerInputs
from gossamer.compress.prune.rate_distortion import calibration_inputs
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.surgery import silence
from gossamer.core.task import Task

if TYPE_CHECKING:
    from gossamer.core.dependency import Dependency, Removal

Scores = list[Tensor]
Refit = Literal["none", "scale", "least-squares"]


def lasso(
    module: nn.Module, dependency: Dependency, task: Task, *, samples: int = 512, seed: int = 0
) -> Scores:
    """The order in which the LASSO lets units in, as a share of the family: the first is 1.

    With a falling penalty units enter one by one, and the ``k`` first are those that the paper
    finds for ``k`` units wherever no unit leaves again on the way. Several readers of one family
    add up. Units that never enter are worth 0.

    Args:
        module: whose units are scored; families that no convolution or linear layer reads get 1.
        dependency: its removable families.
        task: gives samples of "train".
        samples: how many; every position of each counts.
        seed: chooses the samples.

    Raises:
        UnsupportedError: if no convolution or linear layer reads a removable unit.
    """
    groups, watched, owners = _readers(module, dependency)
    inputs = calibration_inputs(task, samples=samples, source="data", seed=seed, batch_size=64)
    products: dict[int, Tensor] = {}
    for name, owner in owners.items():
        weight = module.get_parameter(name).detach().flatten(1).double()
        owner = owner.clamp(max=groups.total)
        each = channel_products(watched.gram(name, inputs), weight, owner, groups.total + 1)
        for family in groups.family[owner[owner < groups.total]].unique().tolist():
            mine = (groups.family == family).nonzero().flatten()
            own = each[mine][:, mine]
            products[family] = products[family] + own if family in products else own
    scores = torch.ones(groups.total)
    for family, product in products.items():
        scores[groups.family == family] = entering_order(product)
    return groups.split(scores)


def entering_order(products: Tensor) -> Tensor:
    """When each factor becomes nonzero along the LASSO path, ``[units]`` in [0, 1], 1 first.

    Args:
        products: of what each two units add to the responses, ``[units, units]``; the responses
            are the sums over all units.
    """
    from sklearn.linear_model import lars_path_gram

    gram = products.double().numpy()
    scale = max(float(np.abs(gram).max()), 1e-300)
    _, _, path = lars_path_gram(
        Xy=gram.sum(1) / scale, Gram=gram / scale, n_samples=1, method="lasso"
    )
    inside = path != 0
    first = np.where(inside.any(1), inside.argmax(1), inside.shape[1])
    order = np.argsort(first, kind="stable")
    result = np.zeros(len(gram))
    result[order] = 1.0 - np.arange(len(gram)) / len(gram)
    return torch.from_numpy(np.where(inside.any(1), result, 0.0)).float()


def channel_products(gram: Tensor, weight: Tensor, owner: Tensor, total: int) -> Tensor:
    """Inner products of what each two channels add to a layer's outputs, ``[total, total]``.

    Args:
        gram: of the layer's inputs, ``[inputs, inputs]``.
        weight: ``[outputs, inputs]``.
        owner: channel of each input, below ``total``.
        total: how many there are.
    """
    each = gram * (weight.T @ weight)
    rows = torch.zeros(total, len(owner), dtype=each.dtype).index_add_(0, owner, each)
    return torch.zeros(total, total, dtype=each.dtype).index_add_(1, owner, rows)


def fitted_weight(
    weight: Tensor, gram: Tensor, cross: Tensor, kept: Tensor, owner: Tensor, how: Refit
) -> Tensor:
    """A layer's weight for inputs of which some went and the others changed.

    Minimises ``||Y - X W^T||`` over the columns that stay, with Y the old responses.

    Args:
        weight: the old one, ``[outputs, inputs]``; the columns that go are returned as they are,
            for what they are multiplied with is a constant (and mostly 0).
        gram: X^T X of the new inputs, ``[inputs, inputs]``.
        cross: X^T X_old, ``[inputs, inputs]``.
        kept: which inputs stay, bool ``[inputs]``.
        owner: channel of each input, ``[inputs]``.
        how: "least-squares" fits every weight, "scale" one factor a channel.
    """
    old = weight.double()
    # What the columns that go still add is no part of what the others have to reach.
    target = (cross @ old.T - gram[:, ~kept] @ old[:, ~kept].T)[kept]
    inside = gram[kept][:, kept]
    result = old.clone()
    if how == "least-squares":
        result[:, kept] = _solved(inside, target).T
    else:
        names, channel = owner[kept].unique(return_inverse=True)
        system = channel_products(inside, old[:, kept], channel, len(names))
        right = torch.zeros(len(names), dtype=old.dtype)
        right.index_add_(0, channel, (target * old[:, kept].T).sum(1))
        result[:, kept] *= _solved(system, right[:, None])[:, 0][channel]
    return result.to(weight.dtype)


_SILENT = 1e-6
"""Directions of less than this share of the strongest one's power count as dead. What is fitted
along them is noise over nearly nothing: weights a hundred times as large, which fine-tuning did not
survive."""


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The shortest solution: dead and equal inputs leave the matrix singular."""
    return torch.linalg.lstsq(matrix, right, rcond=_SILENT, driver="gelsd").solution


def refit(
    module: nn.Module,
    dependency: Dependency,
    removal: Removal,
    inputs: Sequence[tuple[Any, ...]],
    *,
    how: Refit = "least-squares",
) -> dict[str, list[float]]:
    """Fits the weights that read removed units to the responses of the whole network, in place.

    Surgery comes after: the units are still there, and their own parameters are untouched.

    Args:
        module: that ``dependency`` analysed, on the CPU; its readers' weights change.
        dependency: its removable families.
        removal: the units that will go.
        inputs: of the network, batch by batch.
        how: "least-squares" or "scale".

    Returns:
        For each reader the squared error of its responses before and after, relative to theirs.

    Raises:
        InputError: if there is no such way.
        UnsupportedError: if no convolution or linear layer reads a removable unit.
    """
    if how not in ("scale", "least-squares"):
        raise InputError(f"readers are fitted by scale or least-squares, not {how!r:.40}")
    whole = copy.deepcopy(module).eval()
    pruned = silence(module, dependency, removal).eval()
    _, before, owners = _readers(whole, dependency)
    _, after, _ = _readers(pruned, dependency)
    gone = dependency.removed_atoms(removal)
    errors: dict[str, list[float]] = {}
    for name in before.places:
        vector = dependency.propagation.tensor_labels[name][1]
        kept = dependency.kept(vector, gone)
        if kept is None or not kept.any():
            continue
        weight = whole.get_parameter(name).detach().flatten(1)
        taps = weight.shape[1] // len(kept)
        stays = torch.from_numpy(kept).repeat_interleave(taps)
        gram, cross, power = _moments(before, after, name, inputs, weight.shape[1])
        new = fitted_weight(weight, gram, cross, stays, owners[name], how)
        answers = float(((weight.double() @ power) * weight.double()).sum())
        errors[name] = [
            float(
                ((made @ gram) * made).sum() - 2.0 * ((made @ cross) * weight.double()).sum()
                + answers
            ) / max(answers, 1e-300)
            for made in (weight.double(), new.double())
        ]  # fmt: skip
        with torch.no_grad():
            for network in (module, pruned):
                parameter = network.get_parameter(name)
                parameter.copy_(new.view_as(parameter))
    return errors


def _moments(
    before: LayerInputs, after: LayerInputs, name: str, inputs: Sequence[tuple[Any, ...]], n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X, X^T X_old and X_old^T X_old of one layer."""
    gram, cross, power = (torch.zeros(n, n, dtype=torch.float64) for _ in range(3))
    for batch in inputs:
        # A layer that runs twice in a pass is seen twice, in the same order.
        old: list[Tensor] = []
        new: list[Tensor] = []
        before.visit([name], [batch], lambda _, rows, old=old: old.append(rows))
        after.visit([name], [batch], lambda _, rows, new=new: new.append(rows))
        for x_old, x in zip(old, new, strict=True):
            gram += x.T @ x
            cross += x.T @ x_old
            power += x_old.T @ x_old
    return gram, cross, power


def _readers(
    module: nn.Module, dependency: Dependency
) -> tuple[Groups, LayerInputs, dict[str, Tensor]]:
    """The weights that read removable units, in order of execution, and each input's channel.

    Inputs of no unit have numbers of their own, from ``groups.total`` on.
    """
    groups = Groups.of(module, dependency, roles=("consumer",))
    reading = {e.name for e in groups.entries if e.axis == 1}
    watched = LayerInputs(module, dependency.graph.example_inputs, list(reading))
    owners: dict[str, Tensor] = {}
    for name in watched.places:
        weight = module.get_parameter(name)
        taps = weight[0, 0].numel()
        channel = groups.total + torch.arange(weight.shape[1])
        for entry in groups.entries:
            if entry.name == name and entry.axis == 1:
                channel = torch.minimum(channel, entry.owner.cpu())
        owners[name] = channel.repeat_interleave(taps)
    if not owners:
        raise UnsupportedError(
            "no convolution or linear layer reads a removable unit, so its share of their outputs "
            "cannot be seen; use another criterion"
        )
    return groups, watched, owners
