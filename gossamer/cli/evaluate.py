"""Commands that say how far a network, or a ranking of networks, can be trusted.

The other commands of the room have files of their own beside this one.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from gossamer.cli.front import Json, app, out_console, print_json
from gossamer.cli.given import both_or_embedded, network_of, task_of
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    from gossamer.evaluate.robustness import Measurement, RobustnessReport

evaluate = App(name="evaluate", help="Robustness, certificates, rankings, interpretability.")
app.command(evaluate)


@evaluate.command
def robustness(
    model: str,
    *,
    data: str,
    eps: str = "8/255",
    attack: str = "pma+",
    weights: Path | None = None,
    steps: int = 100,
    split: Literal["train", "validation", "test"] = "test",
    images: int | None = None,
    labels: Literal["given", "predicted"] = "given",
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str | None = None,
    work: Path | None = None,
    block: int = 1000,
    shard: str = "0/1",
    ray: str | None = None,
    workers: int = 2,
    save_images: bool = False,
    json_: Json = False,
) -> None:
    """Attack a classifier, and say how often it stays right.

    Example: gossamer evaluate robustness shrunk/ --data digits --eps 8/255

    Robust accuracy is the share of images on which no attack fooled the network: an upper bound.

    Parameters
    ----------
    model
        A folder written by gossamer, or a timm name, torchvision:NAME or package.module:factory
        with --weights.
    data
        "digits", or a folder: images with a subfolder for each class, MNIST, CIFAR-10, Parquet.
    eps
        The largest change of a pixel between 0 and 1, as 8/255 or 0.03.
    attack
        pma, pma+ (then targeted APGD), pma+auto-attack, auto-attack, auto-attack-plus,
        auto-attack-random, pgd-LOSS (ce, targeted ce, margin, dlr, pm, mifpe, alternating), md,
        multi-targeted, apgd-ce, apgd-dlr, apgd-t, fab, fab-t or square.
    weights
        A safetensors file or a state dict.
    steps
        Gradients of each run of an attack.
    split
        Which images.
    images
        Only so many, drawn evenly from the split.
    labels
        "predicted": the network's own answers stand for labels. What is measured then is whether
        predictions are stable.
    image_size
        Side in pixels. Default: the data's own, or the network's.
    mean
        Of each channel between 0 and 1, if the network was trained with another normalisation than
        that of the data's training split.
    std
        Of each channel.
    batch_size
        Images at a time.
    seed
        Of random starts.
    device
        cpu or cuda. Default: cuda where there is one.
    work
        A folder that keeps the results of blocks: a killed run goes on, and several runs can share
        the work.
    block
        Images a block.
    shard
        k/n: do only every n-th block from the k-th on, counting from 0; for n runs with one --work.
    ray
        Address of a Ray cluster that does the blocks, or "local"; needs --work on a disk that all
        machines see.
    workers
        Processes on that cluster.
    save_images
        Keep the adversarial images in --work.
    json_
        Print the report as JSON.
    """
    from gossamer.evaluate.robustness import evaluate_robustness

    budget = _fraction(eps)
    which, shards = _shard(shard)
    open_ = partial(
        _measurement, model, data, attack=attack, eps=budget, weights=weights, steps=steps,
        split=split, images=images, predicted=labels == "predicted", image_size=image_size,
        mean=mean, std=std, batch_size=batch_size, seed=seed, device=device, work=work,
        block=block, save_images=save_images,
    )  # fmt: skip
    spread = None
    if ray is not None:
        from gossamer.evaluate.robustness_ray import over_ray

        spread = over_ray(open_, address=ray, workers=workers)
    report = evaluate_robustness(open_(), shard=(which, shards), spread=spread)
    if json_:
        print_json(report.to_json())
    else:
        _show(report)


def _measurement(
    model: str,
    data: str,
    *,
    weights: Path | None,
    split: str,
    images: int | None,
    image_size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    seed: int,
    device: str | None,
    **options: Any,
) -> Measurement:
    import torch

    from gossamer.core.task import Classification
    from gossamer.evaluate.robustness import Measurement, TaskImages
    from gossamer.evaluate.victim import Normalised

    model, data = both_or_embedded(model, data)
    task = task_of(data, model, image_size=image_size, seed=seed, limit=None, mean=mean, std=std)
    assert isinstance(task, Classification)
    module, trained, _ = network_of(model, task, weights, seed=seed)
    if not trained:
        raise InputError(
            f"{model} has no trained weights, so there is nothing to attack; give --weights, or a "
            "folder written by gossamer"
        )
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network = Normalised(module, task.preprocess).to(where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {where!r} here") from error
    return Measurement(network, TaskImages(task, split, images), seed=seed, **options)


def _show(report: RobustnessReport) -> None:
    from rich.table import Table

    table = Table(title=f"{report.attack}, L-infinity eps {report.eps:.4g}")
    for column in ("", "accuracy (%)", "attacked", "broken", "forward", "backward", "seconds"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    name = "clean" if report.labels == "given" else "the network's own answers"
    table.add_row(name, f"{report.clean:.2f}", *[""] * 5)
    for cost, after in zip(report.costs, report.after, strict=True):
        table.add_row(
            f"after {cost.attack}", f"{after:.2f}", f"{cost.attacked:,}", f"{cost.broken:,}",
            f"{cost.forwards:,}", f"{cost.backwards:,}", f"{cost.seconds:.1f}",
        )  # fmt: skip
    console = out_console()
    console.print(table)
    word = "Robust accuracy" if report.labels == "given" else "Prediction stability"
    console.print(
        f"{word} {report.robust:.2f} % of {report.images:,} images: the worst case of each over "
        "all attacks, an upper bound. Forward and backward count images."
    )
    for remark in report.remarks:
        console.print(f"Note: {remark}")


def _fraction(text: str) -> float:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"eps is {text!r}; give a number as 8/255 or 0.03") from error


def _shard(text: str) -> tuple[int, int]:
    which, _, shards = text.partition("/")
    try:
        return int(which), int(shards)
    except ValueError as error:
        raise InputError(f"the shard is {text!r}; give k/n, as 0/4") from error
