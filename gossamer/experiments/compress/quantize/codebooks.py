"""Learned codebooks and indices against k-means, even grids, trained centroids and vectors.

Three pieces of work: one linear layer with heavy-tailed weights and correlated inputs, whose
output error on fresh inputs is measured for tables of 3, 4 and 8; a digits network at two bits, as
accurate as its packed file, written and read again; and layers of 1024 x 1024, whose files are
compared with the formula. Whatever is learned gets as many trials as JLCM, chosen on inputs or
images that neither learning nor the final measurement sees. Deep Compression and DKM train the
whole network on labels; JLCM sees 512 images without labels.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compress.quantize.codebooks import (
    Compressed,
    Grouping,
    Learned,
    Learning,
    calibration_batches,
    cluster_weights,
    compress,
    even_sizes,
    formula_bits,
    learn_codebook,
    output_error,
)
from gossamer.compress.quantize.weight_sharing import (
    SharedWeights,
    SoftClusters,
    product_quantize,
    uniform_codebook,
)
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.language import LanguageModelling
from gossamer.core.task import Task, seed_of
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.datasets.text import language_modelling
from gossamer.models.language import causal_llama
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import cifar_resnet
from gossamer.parts.codebook import CodebookTensor
from gossamer.parts.masks import multiplied_weights
from gossamer.parts.packed import PackedNetwork

log = logging.getLogger(__name__)

# One layer


def heavy_layer(seed: int, *, side: int = 32) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Weights from Student's t with three degrees of freedom; a source of correlated inputs.

    Returns:
        The weight ``[side, side]`` and ``(samples) -> inputs``, Gaussian, whose deviations along
        random directions fall from 1 to .03.
    """
    generator = torch.Generator().manual_seed(seed_of("layer", seed))
    normal = torch.randn(4, side, side, generator=generator)
    # t = Z / sqrt(chi^2_3 / 3)
    weight = 0.1 * normal[0] / (normal[1:].square().mean(0)).sqrt()
    turned = torch.randn(side, side, generator=generator) * torch.logspace(0, -1.5, side)

    def inputs(samples: int) -> Tensor:
        return torch.randn(samples, side, generator=generator) @ turned.T / math.sqrt(side)

    return weight, inputs


def _variants(learning: Learning) -> list[Learning]:
    """Four trials: learning rates, and where indices are learned how near entries are preferred."""
    if learning.gradient is None:
        return [replace(learning, lr=lr) for lr in (3e-4, 1e-3, 3e-3, 1e-2)]
    return [
        replace(learning, index_lr=lr, temperature=temperature)
        for lr in (0.01, 0.03)
        for temperature in (2.0, 0.5)
    ]


GROUPINGS: tuple[Grouping, ...] = ("scales", "tables")
CONTENDERS: dict[str, Learning] = {
    "tables learned": Learning(gradient=None),
    "joint, softmax": Learning(gradient="softmax"),
    "joint, proximal": Learning(gradient="proximal", falloff="bell"),
    "joint, proximal inverse": Learning(gradient="proximal", falloff="inverse"),
}


def layer_rows(seed: int, *, steps: int = 600) -> Iterator[Row]:
    """Output errors of one layer (mean square over that of the exact output, on fresh inputs)."""
    weight, source = heavy_layer(seed)
    inputs, chosen_by, fresh = source(512), source(512), source(2048)

    def error(stored: CodebookTensor | Tensor, x: Tensor) -> float:
        return output_error(stored, x, x @ weight.T)

    def row(name: str, entries: int, stored: CodebookTensor, **more: Any) -> Row:
        found = {"work": "layer", "contender": name, "entries": entries, "seed": seed}
        found |= {"error": error(stored, fresh), "bytes": stored.nbytes(), **more}
        log.info("%s", found)
        return found

    for entries in (3, 4, 8):
        start = cluster_weights(weight, entries)
        yield row("uniform", entries, uniform_codebook(weight, entries))
        yield row("uniform per row", entries, uniform_codebook(weight, entries, per_row=True))
        yield row("k-means", entries, start)
        for name, learning in CONTENDERS.items():
            trials: list[Learned] = [
                learn_codebook(
                    weight, start, inputs, inputs @ weight.T,
                    learning=replace(variant, steps=steps), seed=seed_of(seed, name, i),
                )
                for i, variant in enumerate(_variants(learning))
            ]  # fmt: skip
            best = min(trials, key=lambda trial: error(trial.stored, chosen_by))
            moves, jumps = sum(t.moves for t in trials), sum(t.jumps for t in trials)
            yield row(
                name,
                entries,
                best.stored,
                moves=moves,
                jump_percent=100.0 * jumps / moves if moves else None,
            )


# A network


@dataclass(frozen=True)
class Work:
    """What the contenders compete on.

    Attributes:
        name: for the rows.
        task: of a seed.
        network: trained, of a task and a seed.
        entries: K.
        groups: of each layer.
        samples: for calibration.
        steps: of learning, for each layer.
        tuning_epochs: of Deep Compression and DKM.
        metric: what the test score is called in the rows.
    """

    name: str
    task: Callable[[int], Task]
    network: Callable[[Task, int], nn.Module]
    entries: int = 4
    groups: int = 8
    samples: int = 512
    steps: int = 400
    tuning_epochs: int = 10
    metric: str = "accuracy"


def network_rows(work: Work, seed: int) -> Iterator[Row]:
    """Every contender on a network, scored from its packed file."""
    task = work.task(seed)
    dense = work.network(task, seed).cpu().eval()
    inputs = task.example_inputs
    calibration = calibration_batches(task, work.samples)
    names = list(multiplied_weights(dense, inputs))
    plain = [v for k, v in dense.state_dict().items() if k not in names]
    plain_bytes = sum(v.numel() * v.element_size() for v in plain)

    def row(name: str, made: Compressed | None, module: nn.Module, **more: Any) -> Row:
        found: dict[str, Any] = {
            "work": work.name,
            "contender": name,
            "entries": work.entries,
            "seed": seed,
            "validation": task.score(module, "validation"),
            **more,
        }
        running = module
        if made is not None:
            formula = sum(formula_bits(t) for t in made.tensors.values()) / 8 + plain_bytes
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "packed.safetensors"
                PackedNetwork.of(module, made.tensors).save(path)
                found["file_bytes"] = path.stat().st_size
                running = PackedNetwork.load(path).runner(module, inputs)
            found["formula_bytes"] = formula
            found["over_formula_percent"] = 100.0 * (found["file_bytes"] / formula - 1.0)
        found[work.metric] = task.score(running, "test")
        if isinstance(task, LanguageModelling):
            found["perplexity"] = task.perplexity(running, "test")
        log.info("%s", found)
        return found

    def packed(name: str, made: Compressed, **more: Any) -> Row:
        return row(name, made, made.module, **more)

    def of(tensors: Mapping[str, CodebookTensor], network: nn.Module = dense) -> Compressed:
        module = copy.deepcopy(network)
        with torch.no_grad():
            for name, stored in tensors.items():
                module.get_parameter(name).copy_(stored.decode())
        return Compressed(module, tensors, {})

    def best(trials: Iterable[Compressed]) -> Compressed:
        return max(trials, key=lambda made: task.score(made.module, "validation"))

    full = sum(4 * v.numel() for v in dense.state_dict().values())
    yield row("float32", None, dense, file_bytes=full)
    weights = {name: dense.get_parameter(name).detach() for name in names}
    for name, per_row in (("uniform", False), ("uniform per row", True)):
        grids = {n: uniform_codebook(w, work.entries, per_row=per_row) for n, w in weights.items()}
        yield packed(name, of(grids))

    clustered = partial(
        compress, dense, inputs, calibration, entries=work.entries, seed=seed, learning=None
    )
    kmeans = clustered(groups=1)
    base = packed("k-means", kmeans)
    yield base
    for grouping in GROUPINGS:
        for rearrange in (True, False):
            made = clustered(groups=work.groups, grouping=grouping, rearrange=rearrange)
            how = "" if rearrange else ", rows as they are"
            found = packed(f"k-means, {grouping}{how}", made)
            extra = 100.0 * (found["file_bytes"] / base["file_bytes"] - 1.0)
            yield {**found, "extra_percent": extra}

    for groups, grouping in zip((1, work.groups), GROUPINGS, strict=True):
        for name, learning in CONTENDERS.items():
            if name == "joint, proximal inverse":
                continue
            trials = [
                compress(
                    dense, inputs, calibration, entries=work.entries, groups=groups,
                    grouping=grouping, learning=replace(variant, steps=work.steps), seed=seed,
                )
                for variant in _variants(learning)[1:3]  # two of them, as for all others here
            ]  # fmt: skip
            rows = [r for made in trials for r in made.layers.values()]
            moves, jumps = (sum(r[key] for r in rows) for key in ("moves", "jumps"))
            where = "" if groups == 1 else ", tables of groups"
            yield packed(
                f"{name}{where}",
                best(trials),
                moves=moves,
                jump_percent=100.0 * jumps / moves if moves else None,
            )

    def tuned(make: Callable[[nn.Module], SharedWeights | SoftClusters], lr: float) -> Compressed:
        network = make(copy.deepcopy(dense))
        trained = [p for p in network.parameters() if p.requires_grad]
        rule = Supervised(network, task, optimizer=torch.optim.Adam(trained, lr=lr))
        fit(rule, task, epochs=work.tuning_epochs, batch_size=64, seed=seed, title="tuning")
        network.cpu().eval()
        return of(network.tensors(), network.network)

    centroids = (
        tuned(lambda network: SharedWeights(network, kmeans.tensors), lr) for lr in (1e-3, 3e-3)
    )
    yield packed("Deep Compression", best(centroids))
    soft = (
        tuned(
            lambda network, tau=tau: SoftClusters(network, names, work.entries, temperature=tau),
            1e-3,
        )
        for tau in (0.2, 0.5)
    )
    yield packed("DKM", best(soft))

    vectors = {n: product_quantize(w, seed=seed) for n, w in weights.items()}
    module = copy.deepcopy(dense)
    with torch.no_grad():
        for name, product in vectors.items():
            module.get_parameter(name).copy_(product.decoded)
    formula = sum(product.bits for product in vectors.values()) / 8 + plain_bytes
    yield row("product quantization", None, module, formula_bytes=formula)


# Files


def file_rows(seed: int, *, side: int = 1024, groups: int = 8) -> Iterator[Row]:
    """Files of one large layer against the formula."""
    generator = torch.Generator().manual_seed(seed_of("file", seed))
    layer = nn.Linear(side, side, bias=False)
    layer.weight.data = torch.randn(side, side, generator=generator)
    for entries in (3, 4, 8, 16):
        for grouping in ("scales", "tables"):
            stored = cluster_weights(
                layer.weight, entries, sizes=even_sizes(side, groups), grouping=grouping
            )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "packed.safetensors"
                PackedNetwork.of(layer, {"weight": stored}).save(path)
                size = path.stat().st_size
            formula = formula_bits(stored) / 8
            yield {
                "work": "file",
                "contender": grouping,
                "entries": entries,
                "seed": seed,
                "file_bytes": size,
                "formula_bytes": formula,
                "over_formula_percent": abs(100.0 * (size / formula - 1.0)),
            }


# Works


def _digits(seed: int) -> Task:
    return digits(seed=seed)


def _trained(
    make: Callable[[], nn.Module], epochs: int, batch_size: int, lr: float, task: Task, seed: int
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("network", seed))
        network = make()
    rule = Supervised(network, task, optimizer=sgd(network, lr=lr))
    fit(rule, task, epochs=epochs, batch_size=batch_size, seed=seed, title="training the network")
    return network


DIGITS = Work(
    "network",
    _digits,
    partial(_trained, lambda: ConvNet(1, 8, (32, "pool", 64, "pool"), (128,)), 20, 64, 0.05),
)


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """One layer, a digits network of 53 thousand parameters, files of large layers."""
    for seed in seeds:
        yield from layer_rows(seed)
        yield from network_rows(DIGITS, seed)
        yield from file_rows(seed)


def _language_model(task: Task, seed: int) -> nn.Module:
    assert isinstance(task, LanguageModelling)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("language", seed))
        network = causal_llama(task.tokens, width=192, layers=6, heads=6, length=128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    rule = Supervised(network, task, optimizer=optimizer, clip=1.0)
    fit(rule, task, epochs=5, batch_size=32, seed=seed, title="training the language model")
    return network


def full(
    seeds: Sequence[int],
    *,
    images: Path = Path("data/cifar10"),
    text: Path = Path("data/text/shakespeare.txt"),
) -> Iterable[Row]:
    """ResNet-20 on CIFAR-10 at 1.6, 2 and 3 bits, and a character model of Llama's kind at 2.

    Args:
        seeds: one run of everything each.
        images: a folder that :func:`gossamer.datasets.cifar.cifar10` reads.
        text: a file that :func:`gossamer.datasets.text.language_modelling` reads.
    """
    train = partial(_trained, partial(cifar_resnet, 20), 100, 128, 0.1)
    resnet = Work(
        "network", lambda seed: cifar10(images, seed=seed), train,
        samples=1024, steps=5000, tuning_epochs=20,
    )  # fmt: skip
    characters = Work(
        "text", lambda _: language_modelling(text), _language_model,
        samples=1024, steps=2000, tuning_epochs=1, metric="next_character_score",
    )  # fmt: skip
    for seed in seeds:
        yield from layer_rows(seed, steps=2000)
        yield from file_rows(seed)
        for entries in (3, 4, 8):
            named = "network" if entries == 4 else f"network of {entries} entries"
            yield from network_rows(replace(resnet, name=named, entries=entries), seed)
        yield from network_rows(characters, seed)


def draw(result: Result, path: Path) -> None:
    """Draws the layer's error over the table size, and the network's accuracy by contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = [row for row in result.rows if row["work"] == "layer"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["contender"] == name:
                points.setdefault(row["entries"], []).append(row["error"])
        left.plot(list(points), [sum(v) / len(v) for v in points.values()], marker="o", label=name)
    left.set_yscale("log")
    left.set_xticks((3, 4, 8))
    left.set_xlabel("entries of the table")
    left.set_ylabel("output error of one layer, relative")
    left.legend(fontsize=7)
    rows = [row for row in result.rows if row["work"] == "network"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for place, name in enumerate(reversed(names)):
        scores = [row["accuracy"] for row in rows if row["contender"] == name]
        mean = sum(scores) / len(scores)
        spread = [[mean - min(scores)], [max(scores) - mean]]
        right.errorbar(mean, place, xerr=spread, marker="o", color="tab:blue", capsize=2)
    right.set_yticks(range(len(names)), list(reversed(names)), fontsize=7)
    right.set_xlabel("test accuracy of the network at 2 bits (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _error(contender: str) -> Pick:
    return Pick("error", {"work": "layer", "contender": contender})


def _accuracy(contender: str) -> Pick:
    return Pick("accuracy", {"work": "network", "contender": contender})


def _jumps(contender: str) -> Pick:
    return Pick("jump_percent", {"work": "layer", "contender": contender})


EXPERIMENT = Experiment(
    spec="jlcm",
    title="codebooks and indices learned together, against k-means and its relatives",
    claims=(
        Claim(
            "one layer: tables and indices learned together are closer than learned tables",
            _error("joint, proximal"),
            "<",
            _error("tables learned"),
        ),
        Claim(
            "one layer: learned tables are closer than k-means",
            _error("tables learned"),
            "<",
            _error("k-means"),
        ),
        Claim(
            "digits at 2 bits: tables and indices learned together are better than tables alone",
            _accuracy("joint, proximal"),
            ">",
            _accuracy("tables learned"),
        ),
        Claim(
            "digits at 2 bits: learned tables are better than k-means",
            _accuracy("tables learned"),
            ">",
            _accuracy("k-means"),
        ),
        Claim(
            "digits at 2 bits: scales of groups improve k-means",
            _accuracy("k-means, scales"),
            ">",
            _accuracy("k-means"),
        ),
        Claim(
            "they take less than 1 % more bytes",
            Pick("extra_percent", {"work": "network", "contender": "k-means, scales"}),
            "<",
            1.0,
        ),
        Claim(
            "fewer of the proximal gradient's moves jump over an entry (%)",
            _jumps("joint, proximal"),
            "<",
            _jumps("joint, softmax"),
        ),
        Claim(
            "files of 1024 x 1024 layers are within 2 % of the formula",
            Pick("over_formula_percent", {"work": "file"}),
            "<=",
            2.0,
        ),
    ),
    quick=quick,
    full=full,
    quick_seeds=(0, 1, 2),
    draw=draw,
    reconstruction=True,
)
