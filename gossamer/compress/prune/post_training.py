"""Prune a trained network layer by layer from its inputs, without training: Wanda and SparseGPT.

What a weight is worth depends on what it is multiplied with. Wanda scales magnitudes by the norms
of the inputs; SparseGPT removes weights column by column and lets those that stay make up for the
error (the optimal brain surgeon, one layer at a time). Layers are taken in order of execution, each
with the inputs that the already pruned network gives it.

Sources: Wanda, Sun et al., ICLR 2024, arXiv:2306.11695, eq. 1; SparseGPT, Frantar and Alistarh,
ICML 2023, arXiv:2301.00774, algorithm 1; optimal brain damage, LeCun et al., NeurIPS 1990; optimal
brain surgeon, Hassibi and Stork, NeurIPS 1993.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from gossamer.compress.prune.rate_distortion import calibration_inputs
from gossamer.compress.prune.sparsify import check_sparsity, pruned_so_far, sparse_network
from gossamer.compress.prune.weight_scores import largest
from gossamer.core.errors import InputError
from gossamer.core.graph import Graph, argument, op_name
from gossamer.core.network import Network
from gossamer.core.progress import progress
from gossamer.core.task import Task, evaluating
from gossamer.parts.padding import padded, pair

log = logging.getLogger(__name__)

DAMPING = 0.01


def obd_saliency(weight: Tensor, curvature: Tensor) -> Tensor:
    """Optimal brain damage: half of H_kk w_k^2.

    Args:
        weight: any shape.
        curvature: the Hessian's diagonal, same shape.
    """
    return 0.5 * curvature * weight.square()


def obs_saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    """Optimal brain surgeon: w_q^2 / (2 [H^-1]_qq), ``[n]``.

    Args:
        weight: ``[n]``.
        inverse: of the Hessian, ``[n, n]``.
    """
    return weight.square() / (2.0 * inverse.diagonal())


def obs_removed(weight: Tensor, inverse: Tensor, index: int) -> Tensor:
    """The weights after one is removed and the others make up for it as well as they can."""
    result = weight - weight[index] / inverse[index, index] * inverse[:, index]
    result[index] = 0.0
    return result


def inverse_factor(gram: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse Hessian of a layer.

    Args:
        gram: X X^T over the inputs, ``[inputs, inputs]``.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        U with U^T U = H^-1, float64, and which inputs were always zero ``[inputs]`` (their
        curvature is set to 1: any value will do).
    """
    hessian = gram.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(hessian)
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True), dead


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| times the norm of input j.

    Args:
        weight: ``[outputs, inputs]``.
        norms: ``[inputs]``.
    """
    return weight.abs() * norms


def kept_in_rows(scores: Tensor, sparsity: float) -> Tensor:
    """The highest scores of each row stay; of equal ones the first go. Bool, as ``scores``."""
    gone = int(sparsity * scores.shape[1] + 1e-9)
    order = torch.argsort(scores, dim=1, stable=True)
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, order[:, :gone], False)


def kept_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The ``n`` highest scores of every ``m`` consecutive inputs stay. Bool, as ``scores``.

    Args:
        scores: ``[outputs, inputs]``; a last piece shorter than ``m`` stays dense.
        n: how many stay.
        m: of how many.
    """
    if not 0 < n < m:
        raise InputError(f"n of m needs 0 < n < m, not {n} of {m}")
    rows, columns = scores.shape
    whole = columns // m * m
    pieces = scores[:, :whole].reshape(rows, -1, m)
    order = torch.argsort(pieces, dim=2, stable=True)
    kept = torch.ones_like(pieces, dtype=torch.bool).scatter_(2, order[:, :, : m - n], False)
    result = torch.ones_like(scores, dtype=torch.bool)
    result[:, :whole] = kept.view(rows, whole)
    return result


def sparse_gpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    *,
    n_of_m: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = DAMPING,
    alive: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prunes one layer and updates the weights that stay.

    Args:
        weight: ``[outputs, inputs]``; unchanged.
        gram: X X^T over the layer's inputs, ``[inputs, inputs]``.
        sparsity: share of the weights of each block of columns that goes.
        n_of_m: in place of ``sparsity``: how many of how many consecutive inputs stay.
        block: columns for which a mask is chosen at a time.
        damping: see :func:`inverse_factor`.
        alive: weights that are still there; the others stay gone.

    Returns:
        The new weights and the mask of those that stay.
    """
    w = weight.detach().double().clone()
    upper, dead = inverse_factor(gram, damping=damping)
    w[:, dead] = 0.0
    mask = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    step = block if n_of_m is None else max(1, block // n_of_m[1]) * n_of_m[1]
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        part, u = w[:, begin:end].clone(), upper[begin:end, begin:end]
        scores = part.square() / u.diagonal().square()
        if alive is not None:
            scores = scores.masked_fill(~alive[:, begin:end], -1.0)
        if n_of_m is not None:
            kept = kept_n_of_m(scores, *n_of_m)
        else:
            stay = scores.numel() - int(sparsity * scores.numel() + 1e-9)
            kept = largest(scores.flatten(), stay).view_as(scores)
        if alive is not None:
            kept &= alive[:, begin:end]
        errors = torch.zeros_like(part)
        # Column by column: each one's error moves the columns after it.
        for j in range(end - begin):
            error = torch.where(kept[:, j], 0.0, part[:, j]) / u[j, j]
            part[:, j:] -= error[:, None] * u[j, j:]
            errors[:, j] = error
        w[:, begin:end] = torch.where(kept, part, 0.0)
        w[:, end:] -= errors @ upper[begin:end, end:]
        mask[:, begin:end] = kept
    return w.to(weight.dtype), mask


class LayerInputs:
    """Products of the inputs of multiplied weights: X X^T of each layer, gathered by running it.

    A convolution's inputs are its patches. Grouped convolutions are left out.

    Args:
        module: the network; its structure is traced once, its weights are read at each run.
        example_inputs: for tracing it.
        names: of the weights.
    """

    def __init__(
        self, module: nn.Module, example_inputs: Sequence[Any], names: Sequence[str]
    ) -> None:
        graph = Graph.trace(module, example_inputs)
        self.network = graph.network()
        self.places: dict[str, list[fx.Node]] = {}
        for node in self.network.program.graph.nodes:
            if node.op != "call_function" or op_name(node.target) not in ("conv2d", "linear"):
                continue
            weight = node.args[1]
            plain = argument(node, 6, "groups", 1) == 1
            if isinstance(weight, fx.Node) and weight.target in names and plain:
                self.places.setdefault(str(weight.target), []).append(node)

    def gram(self, name: str, inputs: Sequence[tuple[Any, ...]]) -> Tensor:
        """X X^T of one weight's inputs, float64 ``[inputs, inputs]``, summed over all of them."""
        weight = dict(self.network.program.named_parameters())[name]
        total = torch.zeros(weight[0].numel(), weight[0].numel(), dtype=torch.float64)
        self.visit([name], inputs, lambda _, rows: total.add_(rows.T @ rows))
        return total

    def visit(
        self,
        names: Collection[str],
        inputs: Iterable[tuple[Any, ...]],
        see: Callable[[str, Tensor], Any],
    ) -> None:
        """Runs the network and shows what weights are multiplied with.

        Args:
            names: of the weights.
            inputs: of the network, batch by batch.
            see: called with a weight's name and its inputs ``[rows, inputs]``, float64.
        """
        wanted = {node.name: name for name in names for node in self.places[name]}
        weights = dict(self.network.program.named_parameters())

        class Watching(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n.name in wanted:
                    args, kwargs = self.fetch_args_kwargs_from_env(n)
                    name = wanted[n.name]
                    see(name, _rows(args[0], weights[name], args[2:], kwargs))
                return super().run_node(n)

        with evaluating(self.network):
            for batch in inputs:
                Watching(self.network.program).run(*batch, False)


def _rows(x: Tensor, weight: Tensor, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The inputs of a layer as rows, float64 ``[positions, inputs]``."""
    if weight.ndim == 2:
        return x.flatten(0, -2).double()
    names = ("bias", "stride", "padding", "dilation")
    given = dict(zip(names, rest, strict=False)) | dict(kwargs)
    dilation: Any = pair(given.get("dilation", 1))
    x, around = padded(x, weight.shape[2:], given.get("padding", 0), dilation)
    patches = nn.functional.unfold(
        x.double(), tuple(weight.shape[2:]), dilation=dilation, padding=tuple(around),
        stride=given.get("stride", 1),
    )  # fmt: skip
    return patches.transpose(1, 2).flatten(0, 1)


def prune_after_training(
    network: Network,
    task: Task,
    *,
    sparsity: float = 0.5,
    method: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt",
    n_of_m: str | None = None,
    samples: int = 128,
    block: int = 128,
    damping: float = DAMPING,
    skip: Collection[str] = (),
    seed: int = 0,
) -> Network:
    """Removes the same share of every layer's weights, without training (a step of a recipe).

    Args:
        network: trained; unchanged.
        task: calibration inputs come from its training split; labels are not used.
        sparsity: share of each layer's weights that goes.
        method: "sparsegpt" updates the weights that stay; "wanda" and "magnitude" do not.
        n_of_m: as "2:4": in place of ``sparsity``, two of every four consecutive inputs stay.
        samples: calibration inputs.
        block: columns for which SparseGPT chooses a mask at a time.
        damping: share of the mean curvature that is added to it.
        skip: names of parameters or modules that stay dense.
        seed: of the choice of inputs.

    Returns:
        The sparse network.

    Raises:
        InputError: if an option is out of range.
        UnsupportedError: if the network cannot be traced or has nothing to prune.
    """
    check_sparsity(sparsity)
    pattern = _pattern(n_of_m)
    if method not in ("sparsegpt", "wanda", "magnitude"):
        raise InputError(f"the method is sparsegpt, wanda or magnitude, not {method!r:.40}")
    module = copy.deepcopy(network.module).cpu().eval()
    masks = pruned_so_far(network, module, skip=skip)
    watched = LayerInputs(module, network.example_inputs, list(masks.kept))
    inputs = calibration_inputs(task, samples=samples, source="data", seed=seed, batch_size=32)
    left_out = [name for name in masks.kept if name not in watched.places]
    errors: dict[str, float] = {}
    with progress() as bar:
        for name in bar.track(list(watched.places), description="pruning layer by layer"):
            weight = module.get_parameter(name)
            rows = weight.detach().flatten(1)
            alive = masks.kept[name].flatten(1)
            gram = watched.gram(name, inputs)
            if method == "sparsegpt":
                made, kept = sparse_gpt(
                    rows, gram, sparsity, n_of_m=pattern, block=block, damping=damping,
                    alive=alive,
                )  # fmt: skip
            else:
                norms = gram.diagonal().sqrt().float()
                scores = wanda_scores(rows, norms if method == "wanda" else torch.ones_like(norms))
                scores = scores.masked_fill(~alive, -1.0)
                kept = kept_in_rows(scores, sparsity) if pattern is None else kept_n_of_m(
                    scores, *pattern
                )  # fmt: skip
                kept &= alive
                made = torch.where(kept, rows, 0.0)
            change = (made - rows).double()
            power = float(((rows.double() @ gram) * rows.double()).sum())
            errors[name] = float(((change @ gram) * change).sum()) / max(power, 1e-300)
            with torch.no_grad():
                weight.copy_(made.view_as(weight))
            masks.narrow({name: kept.view_as(weight)})
    for name in left_out:
        log.info("%s stays as it is: what its inputs are cannot be read off the trace", name)
    options = {
        "sparsity": sparsity, "method": method, "n_of_m": n_of_m, "samples": samples,
        "block": block, "damping": damping, "skip": list(skip), "seed": seed,
    }  # fmt: skip
    report = {"relative_output_error": errors, "left_out": left_out}
    return sparse_network(network, "prune-after-training", options, module, masks, report)


def _pattern(n_of_m: str | None) -> tuple[int, int] | None:
    if n_of_m is None:
        return None
    parts = n_of_m.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise InputError(f"n_of_m is written as 2:4, not {n_of_m!r:.40}")
    n, m = int(parts[0]), int(parts[1])
    if not 0 < n < m:
        raise InputError(f"n of m needs 0 < n < m, not {n} of {m}")
    return n, m
