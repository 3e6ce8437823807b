"""The contrasts of pruning, each as one comparison on the same work.

Weights against patterns against filters; at once against in rounds; with data against without;
first weights against trained ones; fine-tuning against training anew; a mask from another task;
fixed channels against channels chosen for each input; a share for each layer against one ranking.
Both sides of a contrast leave the same number of parameters and have the same epochs in all, unless
training time is the contrast itself. A dense network with as many epochs is in every table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.compress.prune.dynamic_channels import boosted
from gossamer.compress.prune.magnitude import prune
from gossamer.compress.prune.post_training import prune_after_training
from gossamer.compress.prune.rewind import Retraining
from gossamer.compress.prune.sparsify import sparsify
from gossamer.core.experiment import Claim, Experiment, Pick, Result, Row
from gossamer.core.fit import Supervised, fit, warm_cosine
from gossamer.core.graph import Graph
from gossamer.core.language import LanguageModelling
from gossamer.core.network import Network
from gossamer.core.task import Classification, Labelled, seed_of
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.cifar import cifar10
from gossamer.datasets.digits import digits
from gossamer.datasets.tokenizers import Characters
from gossamer.experiments.drawing import lines
from gossamer.experiments.real_data import folder_of
from gossamer.hardware.measure import compare, measure
from gossamer.models.language import causal_llama
from gossamer.models.plain import ConvNet
from gossamer.models.resnet import cifar_resnet
from gossamer.parts.masks import Masks, multiplied_weights


@dataclass(frozen=True)
class Setting:
    """The work.

    Attributes:
        task: by seed of the split.
        network: untrained.
        train: of the dense network, and of anything that is trained anew.
        tune: epochs after pruning.
        sparsities: each tried.
    """

    task: Callable[[int], Labelled]
    network: Callable[[], nn.Module]
    train: Retraining
    tune: int
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.95)


DIGITS = Setting(
    task=lambda seed: digits(seed=seed),
    network=lambda: ConvNet(1, 8, (16, "pool", 32, "pool"), (64,)),
    train=Retraining(epochs=12, batch_size=64, lr=0.05),
    tune=10,
)

CIFAR_EPOCHS = 100


def _cifar(folder: Path) -> Setting:
    return Setting(
        task=lambda seed: cifar10(folder, seed=seed),
        network=lambda: cifar_resnet(20),
        train=Retraining(epochs=CIFAR_EPOCHS, batch_size=128, lr=0.1),
        tune=40,
    )


@dataclass
class Bench:
    """One seed's work: the task, first weights and the trained network.

    Attributes:
        setting: the work.
        seed: of the split, first weights and training.
        task: its data.
        first: with first weights.
        dense: trained from them.
    """

    setting: Setting
    seed: int
    task: Labelled
    first: Network
    dense: Network

    @classmethod
    def of(cls, setting: Setting, seed: int, task: Labelled | None = None) -> Bench:
        """Trains the dense network."""
        task = task or setting.task(seed)
        torch.manual_seed(seed_of("network", seed) % 2**32)
        module = setting.network()
        if isinstance(module, ConvNet) and len(task.classes) != module[-1].out_features:
            module[-1] = nn.Linear(int(module[-1].in_features), len(task.classes))  # type: ignore[arg-type]
        first = Network(copy.deepcopy(module), task.example_inputs)
        setting.train.train(module, task, seed=seed, title="dense")
        return cls(setting, seed, task, first, Network(module.eval(), task.example_inputs))

    def options(self, **more: Any) -> dict[str, Any]:
        """Of a step that trains for as long as tuning takes."""
        training = self.setting.train
        return {
            "epochs": self.setting.tune, "batch_size": training.batch_size,
            "lr": training.lr, "seed": self.seed, **more,
        }  # fmt: skip

    def tuned(self, network: Network, epochs: int | None = None) -> Network:
        """Trained on with its zeros kept."""
        module = copy.deepcopy(network.module)
        training = replace(
            self.setting.train, epochs=self.setting.tune if epochs is None else epochs
        )
        masks = Masks.of_zeros(network, module)
        training.train(module, self.task, masks, seed=self.seed)
        return replace(network, module=module.eval())

    def row(self, contrast: str, contender: str, network: Network, **more: Any) -> dict[str, Any]:
        """What is known of a contender."""
        graph = Graph.trace(network.module, network.example_inputs)
        whole = Graph.trace(self.dense.module, self.dense.example_inputs)
        zeros = sum(int((t == 0).sum()) for n, t in graph.tensors.items() if t.ndim > 1)
        kept = (graph.parameters - zeros) / whole.parameters
        return {
            "contrast": contrast, "contender": contender, "seed": self.seed,
            "accuracy": self.task.score(network.module, "test"),
            "parameters_kept": kept, "macs_kept": graph.macs_effective / whole.macs,
            "line": f"{contrast}: {contender}", **more,
        }  # fmt: skip


def structure(bench: Bench, sparsity: float) -> Iterator[dict[str, Any]]:
    """1: single weights, n of m and filters; latency shows who gains on dense kernels."""
    row = partial(bench.row, "1 structure", sparsity=sparsity)
    pattern = {0.5: "2:4", 0.8: "1:5", 0.95: "1:16"}[sparsity]
    cut = prune_after_training(bench.dense, bench.task, method="magnitude", n_of_m=pattern)
    n_of_m = bench.tuned(cut)
    # Inputs that do not fill a pattern stay dense: the others keep as much as it really does.
    reached = cut.steps[-1]["report"]["sparsity"]
    weights = sparsify(bench.dense, bench.task, sparsity=reached, rounds=1, **bench.options())
    filters = prune(
        bench.dense, bench.task, criterion="l1", allocation="uniform", parameters=1 - reached,
        **bench.options(),
    )  # fmt: skip
    made = {"weights": weights, f"{pattern}": n_of_m, "filters": filters}
    contenders: dict[str, Any] = {"dense": bench.dense} | made
    timings = measure(contenders, bench.task.example_inputs, batch_sizes=(64,), rounds=10)
    for (name, network), timing in zip(made.items(), timings[1:], strict=True):
        shown = "n of m" if name == pattern else name
        yield row(shown, network, speedup=compare(timings[0], timing).ratio)


def rounds(bench: Bench, sparsity: float) -> Iterator[dict[str, Any]]:
    """2: one cut or five, with the same epochs in all."""
    for name, number in (("one-shot", 1), ("iterative", 5)):
        made = sparsify(
            bench.dense, bench.task, sparsity=sparsity, rounds=number, **bench.options()
        )
        yield bench.row("2 rounds", name, made, sparsity=sparsity)


def needs_data(bench: Bench, sparsity: float) -> Iterator[dict[str, Any]]:
    """3: criteria at first weights that need data and that need none; then training."""
    epochs = bench.setting.train.epochs + bench.setting.tune
    for criterion, data in (
        ("synflow", False), ("magnitude", False), ("random", False), ("snip", True),
        ("grasp", True),
    ):  # fmt: skip
        made = sparsify(
            bench.first, bench.task, sparsity=sparsity, criterion=criterion, epochs=0,
            rounds=100 if criterion == "synflow" else 1, seed=bench.seed,
        )  # fmt: skip
        empty = len(made.steps[-1]["report"]["empty_layers"])
        made = bench.tuned(made, epochs)
        yield bench.row(
            "3 data", criterion, made, sparsity=sparsity, needs_data=data, empty_layers=empty
        )


def trained_weights(bench: Bench, sparsity: float) -> Iterator[dict[str, Any]]:
    """4: SNIP's score at first weights and on the trained network, equal epochs in all."""
    epochs = bench.setting.train.epochs + bench.setting.tune
    for name, start, after in (
        ("first weights", bench.first, epochs), ("trained", bench.dense, bench.setting.tune)
    ):  # fmt: skip
        made = sparsify(
            start, bench.task, sparsity=sparsity, criterion="snip", rounds=1, epochs=0,
            seed=bench.seed,
        )  # fmt: skip
        yield bench.row("4 trained", name, bench.tuned(made, after), sparsity=sparsity)


def anew(bench: Bench, sparsity: float) -> Iterator[dict[str, Any]]:
    """5: fine-tuning, rewinding and training anew, of filters and of single weights."""
    epochs = bench.setting.train.epochs + bench.setting.tune
    filters = prune(
        bench.dense, bench.task, criterion="l1", allocation="uniform", parameters=1 - sparsity,
        **bench.options(epochs=0),
    )  # fmt: skip
    weights = sparsify(
        bench.dense, bench.task, sparsity=sparsity, rounds=1, seed=bench.seed, epochs=0
    )
    whole = Graph.trace(bench.dense.module, bench.dense.example_inputs).macs
    for kind, made in (("filters", filters), ("weights", weights)):
        row = partial(bench.row, "5 anew", sparsity=sparsity, kind=kind)
        yield row(f"{kind}, fine-tuned", bench.tuned(made))
        macs = Graph.trace(made.module, made.example_inputs).macs_effective
        # Scratch-B spends what the smaller network saves, at most fivefold.
        for name, factor in (("scratch-E", 1.0), ("scratch-B", min(5.0, whole / max(1, macs)))):
            fresh = _again(made, bench.seed)
            yield row(f"{kind}, {name}", bench.tuned(fresh, round(epochs * factor)))
    state = dict(bench.first.module.named_parameters())
    rewound = copy.deepcopy(weights.module)
    with torch.no_grad():
        for name, parameter in rewound.named_parameters():
            parameter.copy_(torch.where(parameter == 0, 0.0, state[name]))
    rewound.load_state_dict(
        {n: b for n, b in bench.first.module.state_dict().items() if n not in state}, strict=False
    )
    yield bench.row(
        "5 anew", "weights, rewound", bench.tuned(replace(weights, module=rewound), epochs),
        sparsity=sparsity, kind="weights",
    )  # fmt: skip


def _again(network: Network, seed: int) -> Network:
    """The same structure and zeros with new random weights."""
    module = copy.deepcopy(network.module)
    generator = torch.Generator().manual_seed(seed_of("again", seed))
    masks = Masks.of_zeros(network, module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                bound = (6.0 / parameter[0].numel()) ** 0.5
                drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(bound * drawn)
            else:
                parameter.fill_(1.0 if _is_scale(module, name) else 0.0)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.zero_()
            elif name.endswith("running_var"):
                buffer.fill_(1.0)
    masks.hold_weights()
    return replace(network, module=module)


def _is_scale(module: nn.Module, name: str) -> bool:
    """Whether a vector scales a normalisation: beside it there are running statistics."""
    owner = name.rpartition(".")[0]
    return name.endswith("weight") and f"{owner}.running_mean" in dict(module.named_buffers())


def transfer(bench: Bench, sparsity: float, other: Bench) -> Iterator[dict[str, Any]]:
    """6: a mask found on one half of the classes, trained on the other half."""
    epochs = bench.setting.train.epochs + bench.setting.tune
    for name, source in (("own mask", bench), ("mask of another task", other)):
        found = sparsify(
            source.dense, source.task, sparsity=sparsity, rounds=1, epochs=0, seed=bench.seed
        )
        module = copy.deepcopy(bench.first.module)
        kept = {n: found.module.get_parameter(n) != 0 for n in found.storage}
        masks = Masks(module, kept)
        masks.hold_weights()
        made = replace(bench.first, module=module, storage=masks.storage())
        yield bench.row("6 transfer", name, bench.tuned(made, epochs), sparsity=sparsity)


def chosen_channels(bench: Bench, share: float) -> Iterator[dict[str, Any]]:
    """7: fixed channels against channels chosen for each input, at equal work on average."""
    if not isinstance(bench.dense.module, nn.Sequential):
        return
    epochs = bench.setting.tune
    dynamic = boosted(bench.dense.module, share)
    replace(bench.setting.train, epochs=epochs).train(dynamic, bench.task, seed=bench.seed)
    # A convolution reads and makes a share of the channels, the first reads the image; what comes
    # after reads a share of its inputs, the last layer all of them.
    macs = list(multiplied_weights(bench.dense.module, bench.task.example_inputs).items())
    first, last = macs[0][0], macs[-1][0]
    work = sum(
        count * (1.0 if name == last else share if name == first or "conv" not in kind
                 else share**2)
        for (name, count), kind in zip(macs, _kinds(bench.dense.module, macs), strict=True)
    ) / sum(count for _, count in macs)  # fmt: skip
    static = prune(
        bench.dense, bench.task, criterion="l1", allocation="uniform", macs=work,
        **bench.options(),
    )  # fmt: skip
    row = bench.row(
        "7 dynamic", "dynamic", replace(bench.dense, module=dynamic.eval()), share=share
    )
    yield row | {"macs_kept": work}
    yield bench.row("7 dynamic", "static", static, share=share)


def _kinds(module: nn.Module, names: Sequence[tuple[str, int]]) -> list[str]:
    return ["conv" if module.get_parameter(n).ndim == 4 else "linear" for n, _ in names]


def scope(bench: Bench, sparsity: float) -> Iterator[dict[str, Any]]:
    """8: the same share of every layer against one ranking over all."""
    for name, allocation in (("local", "uniform"), ("global", "global")):
        made = sparsify(
            bench.dense, bench.task, sparsity=sparsity, allocation=allocation, rounds=1,
            **bench.options(),
        )  # fmt: skip
        yield bench.row("8 scope", name, made, sparsity=sparsity)


def halves(task: Labelled) -> tuple[Labelled, Labelled]:
    """The task of the first half of the classes and that of the second."""
    assert isinstance(task, Classification)
    middle = len(task.classes) // 2
    made = []
    for low, high in ((0, middle), (middle, 2 * middle)):
        splits = {}
        for name, source in task.splits.items():
            labels = source.labels
            rows = ((labels >= low) & (labels < high)).nonzero().flatten()
            splits[name] = ArraySource(source.fetch(rows.numpy()), labels[rows] - low)
        made.append(
            Classification(
                splits, task.preprocess, task.classes[low:high], name=f"{task.name} {low}-{high}"
            )
        )
    return made[0], made[1]


def language(seeds: Sequence[int], *, epochs: int = 3, width: int = 64) -> Iterator[Row]:
    """Half of a small language model's weights removed after training, three ways."""
    # The manual that every Python brings along: real English text, no download.
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokenizer = Characters(text)
    ids = torch.tensor(tokenizer.encode(text))
    cut = len(ids) * 9 // 10
    half = (len(ids) - cut) // 2
    task = LanguageModelling(
        {"train": ids[:cut], "validation": ids[cut : cut + half], "test": ids[cut + half :]},
        name="python manual", tokens=len(tokenizer), length=64,
    )  # fmt: skip
    for seed in seeds:
        torch.manual_seed(seed_of("language", seed) % 2**32)
        module = causal_llama(len(tokenizer), width=width, layers=2, heads=4, length=64)
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.01)
        rule = Supervised(module, task, optimizer=optimizer, schedule=warm_cosine(0.1))
        fit(rule, task, epochs=epochs, batch_size=64, seed=seed, title="language model")
        dense = Network(module.eval(), task.example_inputs)
        base = {"contrast": "language", "seed": seed, "sparsity": 0.5}
        yield base | {"contender": "dense", "perplexity": task.perplexity(module, "test")}
        for method in ("sparsegpt", "wanda", "magnitude"):
            made = prune_after_training(
                dense, task, method=method, sparsity=0.5, samples=128, skip=["lm_head"], seed=seed
            )  # fmt: skip
            score = task.perplexity(made.module, "test")
            yield base | {"contender": method, "perplexity": score}


CONTRASTS: dict[str, Callable[[Bench, float], Iterator[dict[str, Any]]]] = {
    "1": structure, "2": rounds, "3": needs_data, "4": trained_weights, "5": anew, "8": scope,
}  # fmt: skip


def measured(setting: Setting, seeds: Sequence[int]) -> Iterator[Row]:
    """All contrasts."""
    for seed in seeds:
        bench = Bench.of(setting, seed)
        control = bench.tuned(bench.dense)
        yield bench.row("dense", "dense, as many epochs", control)
        for sparsity in setting.sparsities:
            for contrast in CONTRASTS.values():
                yield from contrast(bench, sparsity)
        first, second = halves(bench.task)
        here, there = (Bench.of(setting, seed, task) for task in (second, first))
        for sparsity in setting.sparsities:
            yield from transfer(here, sparsity, there)
        for share in (0.5, 0.25):
            yield from chosen_channels(bench, share)


def quick(seeds: Sequence[int]) -> Iterable[Row]:
    """A small convolutional network on digits, and a small language model on Python's manual."""
    yield from measured(DIGITS, seeds)
    yield from language(seeds)


def full(seeds: Sequence[int]) -> Iterable[Row]:
    """ResNet-20 on CIFAR-10, and a wider language model."""
    yield from measured(_cifar(folder_of("cifar10")), seeds)
    yield from language(seeds, epochs=20, width=256)


def draw(result: Result, path: Path) -> None:
    """Accuracy of the first two contrasts and the fourth against sparsity."""
    rows: list[Mapping[str, Any]] = [
        row for row in result.rows
        if str(row.get("contrast", ""))[:1] in ("1", "2", "4") and row.get("sparsity")
    ]  # fmt: skip
    lines(
        rows, path, panels=(("accuracy", "test accuracy (%)"),), x="sparsity",
        x_label="sparsity", by="line",
    )  # fmt: skip


def _at(contrast: str, contender: str, sparsity: float) -> Pick:
    return Pick("accuracy", {"contrast": contrast, "contender": contender, "sparsity": sparsity})


def _higher(text: str, contrast: str, better: str, worse: str, sparsity: float) -> Claim:
    return Claim(
        f"at {sparsity:.0%}: {text}", _at(contrast, better, sparsity), ">",
        _at(contrast, worse, sparsity), beyond=1.0,
    )  # fmt: skip


def _perplexity(contender: str) -> Pick:
    return Pick("perplexity", {"contrast": "language", "contender": contender})


EXPERIMENT = Experiment(
    spec="pruning-survey",
    title="the contrasts of pruning, each as one comparison",
    claims=(
        *(
            claim
            for sparsity in (0.8, 0.95)
            for claim in (
                _higher("single weights beat n of m", "1 structure", "weights", "n of m", sparsity),
                _higher("n of m beats filters", "1 structure", "n of m", "filters", sparsity),
                _higher(
                    "iterations beat one shot", "2 rounds", "iterative", "one-shot", sparsity
                ),
                _higher(
                    "scores of trained weights beat those of first ones", "4 trained", "trained",
                    "first weights", sparsity,
                ),
            )
        ),
        Claim("half of a language model: SparseGPT's perplexity is no higher than Wanda's",
              _perplexity("sparsegpt"), "<=", _perplexity("wanda")),
        Claim("half of a language model: Wanda's perplexity is no higher than magnitude's",
              _perplexity("wanda"), "<=", _perplexity("magnitude")),
    ),
    quick=quick,
    full=full,
    draw=draw,
)  # fmt: skip
