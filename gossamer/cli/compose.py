"""The command that compresses labelled images to a few stored images a class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gossamer.cli.data import DEFAULT_NETWORK, class_counts, data, networks_of, whole_task
from gossamer.cli.front import Json, out_console, print_json
from gossamer.core.errors import InputError


@data.command
def compress(
    images: str,
    *,
    per_class: int,
    factor: int = 2,
    out: Path = Path("compressed"),
    order: Literal["easy", "hard", "random"] = "easy",
    scores: Path | None = None,
    metric: Literal["el2n", "forgetting", "aum"] = "el2n",
    model: str = DEFAULT_NETWORK,
    epochs: int = 10,
    networks: int = 1,
    image_size: int | None = None,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Compress labelled images: the easiest of each class, several small ones in a stored image.

    Example: gossamer data compress photos/ --per-class 10 --factor 2 --out small/

    Writes PNG files in a subfolder for each class, and compressed.json, which says how they are
    tiled and which images they are made of. Train with crops inside of one tile
    (gossamer.data.compose.tile_crop).

    Parameters
    ----------
    images
        Labelled images: a subfolder for each class, Parquet, MNIST, CIFAR-10, or "digits".
    per_class
        Stored images of each class.
    factor
        Tiles a side: factor * factor images in each stored one. 1 stores plain images.
    out
        A new folder.
    order
        Which images of each class. Little data wants easy ones.
    scores
        An index file of gossamer data prune, whose scores are taken.
    metric
        Of difficulty, where there are no scores: a network is trained.
    model
        That network: a timm name or torchvision:NAME.
    epochs
        Of its training.
    networks
        Networks to average over.
    image_size
        Side in pixels. Default: the images' own.
    seed
        Of whatever is drawn.
    json_
        Print the summary as JSON.
    """
    import numpy as np
    from PIL import Image

    from gossamer.core.files import whole_folder, write_json
    from gossamer.data.compose import boundaries, compose, stored_images
    from gossamer.data.methods import Candidates, Effort, method_of
    from gossamer.data.selection import read_selection
    from gossamer.datasets.collection import open_collection

    if per_class < 1:
        raise InputError(f"--per-class stores at least one image of each class, not {per_class}")
    if out.exists():
        raise InputError(f"{out} exists; name a new folder")
    collection = open_collection(images, image_size=image_size)
    if not collection.classes:
        raise InputError(f"the images of {images} have no labels, so there are no classes")
    boundaries(min(collection.size), factor)
    if scores is not None:
        found = read_selection(scores)
        if tuple(found.names) != collection.names or not np.isfinite(found.scores).any():
            raise InputError(f"{scores} does not score these images")
        values = found.scores
    elif order == "random":
        values = np.zeros(len(collection))
    else:
        method = method_of(metric)
        assert method.score is not None
        values = method.score(
            Candidates(
                task=whole_task(collection),
                make_network=networks_of(model, collection),
                effort=Effort(epochs=epochs, networks=networks),
                seed=seed,
            )
        )
    made = compose(
        collection.source, values, per_class=per_class, factor=factor, order=order, seed=seed
    )
    scale = 255.0 / collection.scale
    with whole_folder(out) as partial:
        record = []
        for (name, image), rows in zip(
            stored_images(made, collection.classes), made.sources, strict=True
        ):
            pixels = (image.float() * scale).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            place = partial / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(place)
            record.append({"name": f"{name}.png", "of": [collection.names[row] for row in rows]})
        write_json(
            partial / "compressed.json",
            {"factor": factor, "order": order, "per_class": per_class, "images": record},
        )
        stored = sum(file.stat().st_size for file in partial.rglob("*.png"))
    summary = {
        "images": len(collection),
        "stored": len(made.labels),
        "bytes": stored,
        "label_bytes": made.label_bytes,
        "raw_bytes": made.image_bytes,
        "classes": class_counts(collection, made.sources.ravel()),
        "skipped": [skipped.name for skipped in collection.skipped],
        "out": str(out),
    }
    if json_:
        print_json(summary)
        return
    out_console().print(
        f"{len(made.labels):,} stored images of {made.sources.size:,} in {out}, {stored:,} bytes"
    )
