"""Commands that make data fewer, cleaner, private and visible: the choice of samples.

The other commands of the room have files of their own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from gossamer.cli.front import Json, app, out_console, print_json
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from gossamer.datasets.collection import Collection

data = App(name="data", help="Fewer, cleaner, private and visible data.")
app.command(data)


@data.command
def prune(
    folder: str,
    *,
    keep: float,
    metric: str = "prototypes",
    order: Literal["hard", "easy", "middle", "random"] = "hard",
    out: Path = Path("kept.parquet"),
    embed: str = "pixels",
    weights: Path | None = None,
    layer: str | None = None,
    labels: Path | None = None,
    clusters: int | None = None,
    balance: float = 0.5,
    drop_hardest: float = 0.0,
    model: str | None = None,
    epochs: int = 10,
    networks: int = 1,
    image_size: int | None = None,
    seed: int = 0,
    work: Path | None = None,
    thorough: bool = False,
    copy_to: Path | None = None,
    json_: Json = False,
) -> None:
    """Score the images of a folder, and keep one end of the ranking.

    Example: gossamer data prune photos/ --keep 0.3 --metric prototypes --out kept.parquet

    The result is an index file (Parquet): a row for each image with its name, label, score, and
    whether and in which order it is kept.

    Parameters
    ----------
    folder
        Images with a subfolder for each class or without, Parquet, MNIST, CIFAR-10, or "digits".
    keep
        Fraction of the images that stays.
    metric
        A method: see gossamer data methods.
    order
        Which end of the ranking stays. With much data the hard end, with little the easy one.
    out
        The index file.
    embed
        Features for metrics that need them: "pixels"; a timm name, torchvision:NAME, or folder
        written by gossamer; or a file (.npy in the order of the images, or .parquet with the
        columns name and embedding).
    weights
        Of the network that embeds: a safetensors file or a state dict.
    layer
        Whose output is the feature. Default: what the last linear layer reads.
    labels
        A CSV file with the columns name and label, for a folder without classes.
    clusters
        Prototypes of k-means. Default: as many as classes, at least ten.
    balance
        Share of an even choice that each class keeps at least.
    drop_hardest
        Share of the hardest images that never stays: among them are wrong labels.
    model
        The network that metrics of training dynamics train. Default: a small residual network.
    epochs
        Of that training.
    networks
        Networks to average over.
    image_size
        Side in pixels. Default: the images' own.
    seed
        Of whatever is drawn.
    work
        A folder that keeps embeddings and trainings, so that a killed run goes on.
    thorough
        Decode every image first, so that any damage is listed and skipped.
    copy_to
        Copy what stays into this new folder, too.
    json_
        Print the summary as JSON.
    """
    from gossamer.data.methods import Candidates, Effort, choose, method_of
    from gossamer.data.selection import Selection, keep_count, write_selection
    from gossamer.datasets.collection import open_collection

    method = method_of(metric)
    keep_count(1, keep)
    if copy_to is not None and copy_to.exists():
        raise InputError(f"{copy_to} exists; name a new folder to copy to")
    images = open_collection(folder, labels=labels, image_size=image_size, thorough=thorough)
    if copy_to is not None and images.root is None:
        raise InputError(f"{folder} is no folder of image files, so there are none to copy")
    candidates = Candidates(
        images.labels,
        size=len(images),
        features=lambda: features_of(images, embed, weights, layer, work),
        task=whole_task(images) if images.classes and method.trains else None,
        make_network=networks_of(model or DEFAULT_NETWORK, images),
        effort=Effort(epochs=epochs, networks=networks, clusters=clusters),
        seed=seed,
        work=work,
    )
    chosen = choose(
        method, candidates, keep, order=order, balance=balance, drop_hardest=drop_hardest
    )
    named = images.labels
    about = {
        "method": metric, "order": order, "keep": keep, "balance": balance,
        "drop_hardest": drop_hardest, "embed": embed, "seed": seed, "data": images.name,
        "fingerprint": images.fingerprint(), "clusters": candidates.clusters,
        "skipped": [[skipped.name, skipped.reason] for skipped in images.skipped],
    }  # fmt: skip
    write_selection(
        out,
        Selection(
            images.names,
            chosen.scores,
            chosen.rows,
            None if named is None else [images.classes[label] for label in named],
            about,
        ),
    )
    if copy_to is not None and images.root is not None:
        copy_files(images.root, [images.names[int(row)] for row in chosen.rows], copy_to)
    summary: dict[str, Any] = {
        "images": len(images),
        "kept": len(chosen.rows),
        "skipped": [skipped.name for skipped in images.skipped],
        "out": str(out),
        "classes": class_counts(images, chosen.rows),
    }
    if json_:
        print_json(summary)
        return
    console = out_console()
    console.print(f"{len(chosen.rows):,} of {len(images):,} images stay; {out}")
    for skipped in images.skipped[:10]:
        console.print(f"skipped: {skipped.reason}", markup=False)
    if len(images.skipped) > 10:
        console.print(f"... and {len(images.skipped) - 10} more, listed in {out}")
    counts = summary["classes"]
    if counts:
        fewest = min(counts, key=counts.get)
        console.print(f"the smallest class is {fewest} with {counts[fewest]}", markup=False)


@data.command
def methods(*, json_: Json = False) -> None:
    """List the methods that choose samples.

    Parameters
    ----------
    json_
        Print JSON.
    """
    from rich.table import Table

    from gossamer.data.methods import methods as known

    rows = [
        {"name": m.name, "looks at": m.text, "trains": m.trains, "source": m.source}
        for m in known().values()
    ]
    if json_:
        print_json(rows)
        return
    table = Table("method", "looks at", "trains networks", "source")
    for row in rows:
        table.add_row(row["name"], row["looks at"], "yes" if row["trains"] else "", row["source"])
    out_console().print(table)


@data.command
def compare(
    folder: str,
    *,
    methods: list[str],
    keep: list[float] = [0.05, 0.1, 0.2, 0.4, 0.8],  # noqa: B006
    index: list[Path] = [],  # noqa: B006
    out: Path = Path("data-compared"),
    learner: str = "random-features",
    epochs: int = 20,
    equal_steps: bool = False,
    embed: str = "pixels",
    weights: Path | None = None,
    layer: str | None = None,
    balance: float = 0.5,
    networks: int = 1,
    scoring_epochs: int = 10,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    image_size: int | None = None,
    limit: int | None = None,
    json_: Json = False,
) -> None:
    """Learn from what several methods keep, and plot accuracy against the fraction kept.

    Example: gossamer data compare digits --methods prototypes el2n:easy el2n:hard

    Random selection and the whole training split are always measured, too.

    Parameters
    ----------
    folder
        Labelled images: a subfolder for each class, Parquet, MNIST, CIFAR-10, or "digits".
    methods
        See gossamer data methods; METHOD:easy, METHOD:middle keep that end.
    keep
        Fractions to keep.
    index
        Index files about the training split, compared by their rank.
    out
        Folder for compare.json and compare.png; an interrupted run goes on there.
    learner
        "random-features" (ridge regression, a second each), or a network: a timm name,
        torchvision:NAME.
    epochs
        Of the network that learns.
    equal_steps
        Train as many steps on what is kept as the epochs would take on everything.
    embed
        As for gossamer data prune.
    weights
        As for gossamer data prune.
    layer
        As for gossamer data prune.
    balance
        As for gossamer data prune.
    networks
        Networks that metrics of training average over.
    scoring_epochs
        Of those networks.
    seeds
        Of splits, methods and learners; intervals are over them.
    image_size
        Side in pixels. Default: the data's own.
    limit
        At most this many training images.
    json_
        Print the result as JSON.
    """
    from rich.table import Table

    from gossamer.core.task import Classification
    from gossamer.data import compare as comparing
    from gossamer.data.methods import Candidates, Effort
    from gossamer.datasets import open_task
    from gossamer.datasets.collection import collection_of

    contenders = [comparing.Contender.parse(text) for text in methods]

    def task_of(seed: int) -> Classification:
        return open_task(folder, image_size=image_size, seed=seed, limit=limit)

    first = task_of(seeds[0] if seeds else 0)
    contenders += [comparing.Contender.of_file(path, first) for path in index]
    network = DEFAULT_NETWORK if learner == "random-features" else learner
    if learner == "random-features":
        learn = comparing.random_features_learner()
    else:
        make = networks_of(learner, collection_of(first))
        steps = epochs * first.steps_per_epoch("train", 128) if equal_steps else None
        learn = comparing.network_learner(make, epochs=epochs, steps=steps)

    def candidates_of(task: Classification, seed: int) -> Candidates:
        images = collection_of(task)
        return Candidates(
            features=lambda: features_of(images, embed, weights, layer, None),
            task=task,
            make_network=networks_of(network, images),
            effort=Effort(epochs=scoring_epochs, networks=networks),
            seed=seed,
        )

    result = comparing.compare(
        task_of,
        candidates_of,
        contenders,
        learn,
        fractions=keep,
        out=out,
        seeds=seeds,
        balance=balance,
        identity={
            "data": first.describe(), "learner": learner, "epochs": epochs, "embed": embed,
            "equal_steps": equal_steps, "scoring_epochs": scoring_epochs, "networks": networks,
        },
    )  # fmt: skip
    if json_:
        print_json(result)
        return
    table = Table("kept", *result["curves"])
    for place, fraction in enumerate(sorted(keep)):
        cells = []
        for points in result["curves"].values():
            point = points[place]
            half = "" if point["half_width"] is None else f" ± {point['half_width']:.2f}"
            cells.append(f"{point['accuracy']:.2f}{half}")
        table.add_row(f"{fraction:.0%}", *cells)
    console = out_console()
    console.print(table)
    console.print(f"everything kept: {result['whole']:.2f} %; {out / 'compare.png'}")


DEFAULT_NETWORK = "gossamer_digits_resnet"


def features_of(
    images: Collection, embed: str, weights: Path | None, layer: str | None, work: Path | None
) -> np.ndarray:
    """Features of a collection: its pixels, a file's, or a network's."""
    from gossamer.parts.embedding import embed as run
    from gossamer.parts.embedding import pixels, read_features

    if embed == "pixels":
        return pixels(images, scale=images.scale)
    if Path(embed).suffix in (".npy", ".parquet"):
        return read_features(Path(embed), images.names)
    network, preprocess = embedder(embed, weights, images)
    found = run(
        images,
        network,
        preprocess,
        layer=layer,
        cache=None if work is None else work / "embedding",
        fingerprint=images.fingerprint(),
    )
    return found.features


def embedder(
    model: str, weights: Path | None, images: Collection
) -> tuple[nn.Module, Callable[[Any], Any]]:
    """A network that embeds, and what makes its inputs of raw images."""
    from gossamer.cli.given import is_folder, module_of
    from gossamer.core.files import read_json
    from gossamer.core.task import Preprocess
    from gossamer.models import build, load_weights

    if is_folder(model):
        module, _ = module_of(model, weights)
        record = read_json(Path(model) / "network.json")
        try:
            preprocess = Preprocess.from_json(record["about"]["task"]["preprocess"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{model} does not say how its inputs are preprocessed") from error
        if (preprocess.channels, preprocess.height, preprocess.width) != (
            images.channels,
            *images.size,
        ):
            raise InputError(
                f"the network in {model} reads images of {preprocess.channels} x "
                f"{preprocess.height} x {preprocess.width}, these are {images.channels} x "
                f"{images.size[0]} x {images.size[1]}; give --image-size"
            )
        return module, preprocess
    classes = len(images.classes) or None
    module = build(model, classes=classes, channels=images.channels, image_size=images.size)
    mean = std = None
    if weights is not None:
        load_weights(module, weights)
        config = getattr(module, "pretrained_cfg", None) or {}
        # The statistics that weights of this name were trained with, where they are known.
        if len(config.get("mean", ())) == images.channels:
            mean, std = config["mean"], config["std"]
    return module, images.preprocess(mean, std)


def networks_of(model: str, images: Collection) -> Callable[[int], nn.Module]:
    """Makes fresh networks for the classes and the size of a collection."""

    def make(seed: int) -> nn.Module:
        import torch

        from gossamer.models import build

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(
                model,
                classes=len(images.classes),
                channels=images.channels,
                image_size=images.size,
            )

    return make


def whole_task(images: Collection) -> Any:
    """All images of a collection as a training split, for what scores them by training."""
    from gossamer.core.task import Classification

    return Classification(
        {"train": images.source, "validation": images.source},
        images.preprocess(),
        images.classes,
        name=images.name,
    )


def class_counts(images: Collection, rows: np.ndarray) -> dict[str, int]:
    """How many of these rows each class has."""
    import numpy as np

    if images.labels is None:
        return {}
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return {name: int(count) for name, count in zip(images.classes, counts, strict=True)}


def copy_files(root: Path, names: list[str], target: Path) -> None:
    """Copies files into a new folder that appears when all are there."""
    import shutil

    from gossamer.core.files import whole_folder

    with whole_folder(target) as partial:
        for name in names:
            place = partial / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, place)
