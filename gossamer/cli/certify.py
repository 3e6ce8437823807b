"""The command that certifies answers against poisoned training data."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gossamer.cli.evaluate import evaluate
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from gossamer.core.task import Classification
    from gossamer.evaluate.part_learners import PartLearner
    from gossamer.evaluate.vote_certificates import Certified

Choice = Literal["vote", "roe", "both"]


@evaluate.command
def certify(
    data: str | None = None,
    *,
    logits: Path | None = None,
    labels: Path | None = None,
    method: Literal["dpa", "fa", "dpa*"] = "dpa",
    rule: Choice = "both",
    parts: int = 50,
    d: int = 1,
    model: str = "ridge",
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    augment: bool = False,
    content_hash: Literal["pixel-sum", "digest"] = "pixel-sum",
    sizes: list[int] | None = None,
    spread: Path | None = None,
    image_size: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
    out: Path = Path("certified"),
    json_: Json = False,
) -> None:
    """Train an ensemble whose answers no small poisoning can change, and certify each answer.

    Example: gossamer evaluate certify fashion_mnist/ --parts 300 --method "dpa*" --d 4

    The training images are split by content, each part trains a model, and the models elect the
    answers for the test images. The radius of an answer is how many training images may be
    inserted or removed, whichever they are, without changing it. Writes a Parquet file of answers
    and radii, certified.json and certified.png (certified accuracy against size) for each rule.

    Parameters
    ----------
    data
        Labelled images: a subfolder for each class, Parquet, MNIST, CIFAR-10, or "digits".
    logits
        Certify these logits [samples, models, classes] (.npy, or .npz with "logits" and perhaps
        "labels" and "spread") and train nothing.
    labels
        True classes of --logits, .npy [samples]. Without them there is no accuracy.
    method
        "dpa": disjoint parts; "fa": overlapping parts, d times as many models, an image reaches d
        of them; "dpa*": the logits of d models for each part are summed.
    rule
        "vote", "roe" (run-off election) or both.
    parts
        A base model learns from about one of so many parts of the training images.
    d
        See --method.
    model
        "ridge" (ridge regression on random features, solved for all parts at once), a timm name,
        torchvision:NAME, or package.module:factory, trained many at a time.
    epochs
        Of networks.
    batch_size
        Of each network.
    learning_rate
        Of networks: SGD with momentum, half a cosine.
    augment
        Train networks with the augmentation that suits the data set.
    content_hash
        What sends an image to its part: the sum of its pixels, or a digest of them, which fills
        many parts more evenly where images are small.
    sizes
        Poisonings for which certified accuracy is printed. Default: tenths of --parts up to a half.
    spread
        For --logits of "fa": the models that each bucket feeds, .npy [buckets, d].
    image_size
        Side in pixels. Default: the images' own.
    test_images
        Certify only the first so many test images.
    seed
        Of everything that is drawn.
    out
        The folder for the results.
    json_
        Print the summary as JSON.
    """
    from rich.table import Table

    from gossamer.evaluate.vote_certificates import RULES, certified_accuracy

    rules = RULES if rule == "both" else (rule,)
    if (data is None) == (logits is None):
        raise InputError("give either labelled images or --logits")
    summary: dict[str, Any]
    if logits is not None:
        truth, found, models = _given(logits, labels, spread, rules)
        summary = {"logits": str(logits), "models": models}
        default = models
    else:
        assert data is not None
        if labels is not None or spread is not None:
            raise InputError("--labels and --spread go with --logits; the images have their own")
        truth, found, summary = _trained(
            data, method, rules, parts, d, model, epochs, batch_size, learning_rate, augment,
            content_hash, image_size, test_images, seed,
        )  # fmt: skip
        default = parts
    wanted = sizes or sorted({0, *(round(default * tenth / 10) for tenth in range(1, 6))})
    if min(wanted) < 0:
        raise InputError(f"a poisoning has 0 samples or more, not {min(wanted)}")
    summary["sizes"] = wanted
    summary["rules"] = {}
    for name, certified in found.items():
        entry: dict[str, Any] = {"file": str(out / f"{name}.parquet")}
        if len(certified.radii):
            entry["mean_radius"] = float(certified.radii.mean())
            entry["median_radius"] = float(sorted(certified.radii)[len(certified.radii) // 2])
        if truth is not None:
            entry["certified_accuracy"] = certified_accuracy(certified, truth, wanted).tolist()
            entry["clean_accuracy"] = float(certified_accuracy(certified, truth, [0])[0])
        summary["rules"][name] = entry
    _write(out, truth, found, summary)
    if json_:
        print_json(summary)
        return
    console = out_console()
    if truth is not None:
        table = Table("inserted and removed", *(f"{name} (%)" for name in found))
        for place, size in enumerate(wanted):
            cells = [f"{e['certified_accuracy'][place]:.2f}" for e in summary["rules"].values()]
            table.add_row(str(size), *cells)
        console.print(table)
    for name, entry in summary["rules"].items():
        console.print(f"{name}: mean radius {entry.get('mean_radius', 0):.2f}; {entry['file']}")


def _trained(
    data: str,
    method: Literal["dpa", "fa", "dpa*"],
    rules: tuple[Literal["vote", "roe"], ...],
    parts: int,
    d: int,
    model: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    augment: bool,
    content_hash: str,
    image_size: int | None,
    test_images: int | None,
    seed: int,
) -> tuple[np.ndarray, dict[Any, Certified], dict[str, Any]]:
    """Trains an ensemble and certifies the test images: true classes, certificates, a summary."""
    import numpy as np

    from gossamer.datasets import open_task
    from gossamer.datasets.collection import collection_of
    from gossamer.evaluate.certified_ensembles import PoisonCertifiedEnsemble
    from gossamer.evaluate.training_partition import content_digest, pixel_sum, training_data

    if test_images is not None and test_images < 1:
        raise InputError(f"--test-images certifies at least one image, not {test_images}")
    task = open_task(data, image_size=image_size, seed=seed)
    ensemble = PoisonCertifiedEnsemble(
        _learner(task, model, epochs, batch_size, learning_rate, augment, seed),
        k=parts,
        d=d,
        method=method,
        content_hash=content_digest if content_hash == "digest" else pixel_sum,
        seed=seed,
    )
    source = training_data(task)
    ensemble.fit(source, len(task.classes))
    test = collection_of(task, "test")
    test = test.take(np.arange(min(len(test), test_images or len(test))))
    found = ensemble.certify(test.source, rules)
    lacking = ensemble.partition.lacking(source.labels.numpy(), len(task.classes))
    summary = {
        "data": task.name,
        "training_images": len(source),
        "test_images": len(test),
        "method": method,
        "parts": parts,
        "d": d,
        "models": ensemble.members,
        "base": model,
        "parts_lacking_classes": float((lacking > 0).mean()),
        "warning": ensemble.warning,
    }
    return test.source.labels.numpy(), dict(found), summary


def _learner(
    task: Classification,
    model: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    augment: bool,
    seed: int,
) -> PartLearner:
    from gossamer.core.fit import cosine, sgd
    from gossamer.evaluate.part_learners import NetworkLearner, RidgeLearner
    from gossamer.models import build

    if model == "ridge":
        return RidgeLearner(divisor=task.preprocess.scale, seed=seed)
    if epochs < 1 or batch_size < 2:
        raise InputError(
            f"networks need an epoch and batches of 2 or more, not {epochs} and {batch_size}"
        )
    shape = (task.preprocess.height, task.preprocess.width)

    def make(**options: Any) -> Any:
        return build(
            model, classes=len(task.classes), channels=task.preprocess.channels, image_size=shape,
            **options,
        )  # fmt: skip

    make(example_inputs=task.example_inputs)  # says at once what does not fit
    return NetworkLearner(
        make,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=lambda network: sgd(network, lr=learning_rate),
        schedule=cosine,
        augment=task.augment if augment else None,
        seed=seed,
    )


def _given(
    path: Path,
    labels: Path | None,
    spread: Path | None,
    rules: tuple[Literal["vote", "roe"], ...],
) -> tuple[np.ndarray | None, dict[Any, Certified], int]:
    """Certificates of stored logits: true classes if there are any, certificates, models."""
    from gossamer.evaluate.vote_certificates import certify, check_labels

    arrays = _arrays(path)
    stored = arrays.get("logits")
    if stored is None:
        raise InputError(f'{path} holds {", ".join(arrays)}; an array "logits" is needed')
    own = _arrays(labels)["logits"] if labels is not None else arrays.get("labels")
    fed = _arrays(spread)["logits"] if spread is not None else arrays.get("spread")
    found = {name: certify(stored, name, fed) for name in rules}
    truth = None
    if own is not None:
        truth = check_labels(own, stored.shape[2], f"the labels of {path}")
        if len(truth) != len(stored):
            raise InputError(f"{path} has {len(stored)} samples, but there are {len(truth)} labels")
    return truth, found, stored.shape[1]


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of a .npz file by name; the one of an .npy file, not read, as "logits"."""
    import numpy as np

    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        return {"logits": np.load(path, mmap_mode="r", allow_pickle=False)}
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no array of numbers of numpy (.npy, .npz)") from error


def _write(
    out: Path, truth: np.ndarray | None, found: dict[Any, Certified], summary: dict[str, Any]
) -> None:
    import polars as pl

    from gossamer.core.files import whole_file, write_json

    for name, certified in found.items():
        columns = {"label": certified.labels, "radius": certified.radii}
        if truth is not None:
            columns["true_label"] = truth
        with whole_file(out / f"{name}.parquet") as partial:
            pl.DataFrame(columns).write_parquet(partial)
    write_json(out / "certified.json", summary)
    if truth is not None:
        with whole_file(out / "certified.png") as partial:
            _draw(partial, truth, found)


def _draw(path: Path, truth: np.ndarray, found: dict[Any, Certified]) -> None:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gossamer.evaluate.vote_certificates import certified_accuracy

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, certified in found.items():
        sizes = np.arange(int(certified.radii.max()) + 2)
        axes.step(sizes, certified_accuracy(certified, truth, sizes), where="mid", label=name)
    axes.set_xlabel("inserted and removed training samples")
    axes.set_ylabel("certified accuracy (%)")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
