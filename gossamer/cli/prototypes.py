"""The command that trains, scores and shows networks that explain themselves by part prototypes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gossamer.cli.evaluate import evaluate
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    from gossamer.core.task import Classification
    from gossamer.evaluate.part_prototypes import PartPrototypeNet
    from gossamer.evaluate.saved_prototypes import SavedPrototypes


@evaluate.command
def prototypes(
    model: str,
    *,
    data: str,
    weights: Path | None = None,
    out: Path | None = None,
    page: Path | None = None,
    backbone: str | None = None,
    similarity: Literal["cosine", "log-l2"] = "cosine",
    head: Literal["sa", "linear"] = "sa",
    align: bool = True,
    per_class: int = 10,
    dim: int | None = None,
    deep: int | None = None,
    shallow: int | None = None,
    pretrain: int = 10,
    epochs: int | None = None,
    warm: int = 5,
    passes: int = 1,
    rate: float = 1.0,
    batch_size: int = 80,
    image_size: int | None = None,
    images: int = 8,
    half_size: int | None = None,
    mu: float = 0.8,
    minimum_visible: int = 1,
    sigma: float = 0.2,
    eps: float = 0.25,
    noise_on: Literal["normalised", "raw"] = "normalised",
    seed: int = 0,
    device: Literal["cpu", "cuda"] | None = None,
    json_: Json = False,
) -> None:
    """Train a network that explains itself by part prototypes, and say if it can be trusted.

    Example: gossamer evaluate prototypes resnet34 --data CUB_200_2011/ --weights w.safetensors

    Prints accuracy and, where the data has key-points of parts, consistency (do prototypes land on
    one part in the images of their class?) and stability (do they stay there under noise?).

    Parameters
    ----------
    model
        The backbone: a timm name, torchvision:NAME or package.module:factory; or a folder that
        this command wrote with --out, which is then scored and not trained.
    data
        "creatures" (drawn, with key-points); a folder in the layout of CUB-200-2011; a .json file
        with key-points as COCO has them; or any image data, without key-points.
    weights
        Of the backbone: a safetensors file or a state dict.
    out
        A folder for the trained network and the tables of scores.
    page
        A page of explanations, .html or .png: image, prototype, activation, contribution.
    backbone
        The factory of a folder's backbone, if that is code of your own.
    similarity
        "log-l2" with --head linear --no-align is ProtoPNet.
    head
        "sa" adds up each class's own prototypes; "linear" lets all speak, and pushes prototypes to
        training patches.
    align
        Whether deep features keep to the places of shallow ones (SDFA).
    per_class
        Prototypes of each class.
    dim
        Channels of a prototype. Default: 64, or 128 for log-l2.
    deep
        Level of the backbone that prototypes look at. Default: the last of 4 x 4 places or more.
    shallow
        Level that it is aligned with. Default: the first at a quarter of the image's side.
    pretrain
        Epochs in which a backbone without --weights learns the classes first.
    epochs
        Of the warm and joint stages. Default: 12 with --head sa, 31 with linear.
    warm
        Of these, epochs with a frozen backbone.
    passes
        Over the data in each epoch (the paper's copies: 30).
    rate
        All learning rates are multiplied by this; small data need more than the paper's.
    batch_size
        Images a batch.
    image_size
        Side in pixels. Default: the data's own, 224 with key-points, 64 for creatures.
    images
        Explained on the page, drawn evenly from the test split.
    half_size
        Of the region around a peak, pixels. Default: 36 for images of 224, in proportion.
    mu
        Share of the images from which a prototype is consistent.
    minimum_visible
        Images of a class that must show a part before it counts.
    sigma
        Of the noise.
    eps
        At which noise is clipped.
    noise_on
        Normalised inputs (the paper) or raw pixels in 0..1.
    seed
        Of everything that is drawn.
    device
        Default: cuda where there is one.
    json_
        Print the report as JSON.
    """
    import torch

    from gossamer.datasets.keypoints import KeypointTask
    from gossamer.evaluate.part_scores import consistency_score, stability_score
    from gossamer.evaluate.saved_prototypes import ABOUT, load_prototypes, save_prototypes

    if page is not None and page.suffix not in (".html", ".png"):
        raise InputError(f"the page is {page.name!r:.80}; give a name that ends in .html or .png")
    if images < 1 or pretrain < 0 or rate <= 0.0 or batch_size < 1:
        raise InputError(
            "images and --batch-size are 1 or more, --pretrain 0 or more and --rate above 0"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no device 'cuda' here")
    cpu = device == "cpu" or not torch.cuda.is_available()
    saved = None
    if (Path(model) / ABOUT).is_file():
        if weights is not None:
            raise InputError(f"{model} has weights of its own; leave --weights out")
        saved = load_prototypes(Path(model), backbone=backbone)
        image_size = saved.preprocess.height
    task = _task(data, model, saved, image_size=image_size, seed=seed)
    if saved is None:
        saved = _trained(
            model, task, weights=weights, similarity=similarity, head=head, align=align,
            per_class=per_class, dim=dim, deep=deep, shallow=shallow, pretrain=pretrain,
            epochs=epochs, warm=warm, passes=passes, rate=rate, batch_size=batch_size, seed=seed,
            cpu=cpu,
        )  # fmt: skip
        if out is not None:
            save_prototypes(out, saved)
    network = saved.network.to("cpu" if cpu else "cuda").eval()
    split = "test" if task.size("test") else "validation"
    report: dict[str, Any] = {
        "model": model, "backbone": saved.backbone, "data": task.name, "split": split,
        "images": task.size(split), "classes": len(task.classes),
        "prototypes": len(network.prototypes), "accuracy": task.score(network, split),
        "consistency": None, "stability": None,
    }  # fmt: skip
    tables: dict[str, Any] = {}
    if isinstance(task, KeypointTask):
        consistency = consistency_score(
            network, task.keypoint_batches(split, batch_size=batch_size), half_size, mu,
            minimum_visible=minimum_visible,
        )  # fmt: skip
        stability = stability_score(
            network, task.keypoint_batches(split, batch_size=batch_size), half_size,
            sigma=sigma, eps=eps, on=noise_on, std=task.preprocess.std,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        report |= {
            "consistency": consistency.score, "stability": stability.score, "mu": mu,
            "minimum_visible": minimum_visible, "sigma": sigma, "eps": eps, "noise_on": noise_on,
            "parts": list(task.parts),
        }  # fmt: skip
        tables = {
            "consistency": [
                dict(row) | {"class": task.classes[row["class"]], "part": task.parts[row["part"]]}
                for row in consistency.table
            ],
            "stability": [
                dict(row) | {"class": task.classes[row["class"]]} for row in stability.table
            ],
        }
    if out is not None:
        from gossamer.core.files import write_json

        write_json(out / "scores.json", report | {"tables": tables})
    if page is not None:
        _explain(network, task, page, split=split, images=images, half_size=half_size)
        report["page"] = str(page)
    if json_:
        print_json(report | {"tables": tables})
    else:
        _show(report, tables)


def _task(
    data: str, model: str, saved: SavedPrototypes | None, *, image_size: int | None, seed: int
) -> Classification:
    from gossamer.cli.given import task_of
    from gossamer.core.task import Classification
    from gossamer.datasets.creatures import creatures
    from gossamer.datasets.keypoints import coco_keypoints, cub, distortions

    mean = None if saved is None else saved.preprocess.mean
    std = None if saved is None else saved.preprocess.std
    path = Path(data)
    if data == "creatures":
        task: Any = creatures(size=image_size or 64, seed=seed)
    elif (path / "images.txt").is_file() and (path / "parts").is_dir():
        task = cub(
            path, image_size=image_size or 224, mean=mean, std=std, seed=seed,
            augment=distortions(),
        )  # fmt: skip
    elif path.suffix == ".json" and path.is_file():
        task = coco_keypoints(
            path, image_size=image_size or 224, mean=mean, std=std, seed=seed,
            augment=distortions(),
        )  # fmt: skip
    else:
        name = "" if saved is not None else model
        task = task_of(
            data, name or ":", image_size=image_size, seed=seed, limit=None, mean=mean, std=std
        )
    assert isinstance(task, Classification)
    if saved is not None:
        own, given = saved.preprocess, task.preprocess
        if saved.classes != task.classes:
            raise InputError(
                f"the network in {model} knows {len(saved.classes)} classes "
                f"({', '.join(saved.classes[:3])} ...), {task.name} has {len(task.classes)} "
                f"({', '.join(task.classes[:3])} ...); the same are needed"
            )
        if (own.channels, own.height, own.width) != (given.channels, given.height, given.width):
            raise InputError(
                f"the network in {model} takes images of {own.channels} x {own.height} x "
                f"{own.width}, {task.name} has {given.channels} x {given.height} x {given.width}"
            )
        task.preprocess = own
    return task


def _trained(
    model: str,
    task: Classification,
    *,
    weights: Path | None,
    similarity: str,
    pretrain: int,
    epochs: int | None,
    warm: int,
    passes: int,
    rate: float,
    batch_size: int,
    seed: int,
    cpu: bool,
    head: str,
    **options: Any,
) -> SavedPrototypes:
    import torch

    from gossamer.core.fit import Supervised, fit
    from gossamer.evaluate.prototype_training import (
        PooledClassifier,
        Rates,
        improved_schedule,
        protopnet_schedule,
        train_prototypes,
    )
    from gossamer.evaluate.saved_prototypes import SavedPrototypes, prototype_network

    network = prototype_network(
        model, len(task.classes), task.preprocess, weights=weights, seed=seed,
        similarity=similarity.replace("-", "_"), head=head, **options,
    )  # fmt: skip
    make = improved_schedule if head == "sa" else protopnet_schedule
    count = epochs if epochs is not None else (12 if head == "sa" else 31)
    schedule = make(count, warm=min(warm, count), passes=passes)
    if weights is None and pretrain:
        classifier = PooledClassifier(network.features, len(task.classes))
        optimizer = torch.optim.Adam(classifier.parameters(), 1e-3 * rate)
        rule = Supervised(classifier, task, optimizer=optimizer)
        fit(
            rule, task, epochs=pretrain, batch_size=batch_size, seed=seed, cpu=cpu, title="backbone"
        )
    usual = Rates()
    rates = Rates(
        backbone=rate * usual.backbone, add_on=rate * usual.add_on,
        prototypes=rate * usual.prototypes, importance=rate * usual.importance,
        last=rate * usual.last,
    )  # fmt: skip
    train_prototypes(
        network, task, schedule=schedule, rates=rates, batch_size=batch_size, seed=seed, cpu=cpu
    )
    return SavedPrototypes(network.eval(), task.classes, task.preprocess, model)


def _explain(
    network: PartPrototypeNet,
    task: Classification,
    page: Path,
    *,
    split: str,
    images: int,
    half_size: int | None,
) -> None:
    import numpy as np

    from gossamer.evaluate.prototype_page import tell, write_page, write_picture

    patches = network.nearest_patches(task.batches("train", shuffle=False))
    size = task.size(split)
    rows = np.unique(np.linspace(0, size - 1, min(images, size)).round().astype(np.int64))
    top = min(network.per_class, 5)
    told = tell(network, task, rows.tolist(), patches, split=split, half_size=half_size, top=top)
    if page.suffix == ".png":
        write_picture(page, told)
    else:
        remark = (
            "Yellow: the region of a training image that the prototype looks most like. White: the "
            "region around the peak of its activation in this image, which scores are measured in."
        )
        write_page(page, told, title=f"Explanations: {task.name}", remarks=[remark])


def _show(report: dict[str, Any], tables: dict[str, Any]) -> None:
    from rich.table import Table

    console = out_console()
    console.print(
        f"{report['prototypes']} prototypes of {report['classes']} classes over "
        f"{report['backbone']}; {report['split']} split of {report['data']}, "
        f"{report['images']:,} images."
    )
    console.print(f"Accuracy {report['accuracy']:.2f} %")
    if report["consistency"] is None:
        console.print("The data has no key-points: consistency and stability are not measured.")
    else:
        console.print(f"Consistency {report['consistency']:.2f} % (mu {report['mu']:g})")
        console.print(
            f"Stability {report['stability']:.2f} % (noise {report['sigma']:g} on "
            f"{report['noise_on']} pixels)"
        )
        table = Table(title="Prototypes")
        for column in ("prototype", "class", "part", "share", "of images", "stable (%)"):
            table.add_column(column, justify="left" if column in ("class", "part") else "right")
        pairs = list(zip(tables["consistency"], tables["stability"], strict=True))
        for one, two in pairs[:20]:
            table.add_row(
                str(one["prototype"]), one["class"], one["part"], f"{one['share']:.2f}",
                str(one["visible"]), f"{two['stable']:.1f}",
            )  # fmt: skip
        console.print(table)
        if len(pairs) > 20:
            console.print(f"{len(pairs) - 20} more with --json, or in scores.json of --out.")
    if "page" in report:
        console.print(f"Explanations are in {report['page']}")
