"""The command that shows a collection of images as a zoomable treemap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gossamer.cli.data import data
from gossamer.cli.front import Json, out_console, print_json
from gossamer.cli.given import is_folder
from gossamer.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from gossamer.data.gallery import View
    from gossamer.datasets.collection import Collection


@data.command
def explore(
    images: str,
    *,
    model: list[str] | None = None,
    weights: list[Path] | None = None,
    layer: str | None = None,
    features: Path | None = None,
    labels: Path | None = None,
    split: Literal["train", "test"] = "train",
    image_size: int | None = None,
    limit: int | None = None,
    normalise: Literal["standard", "length", "none"] = "none",
    scale: Literal["auto", "vectors", "stored", "micro"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8765,
    cache: Path | None = None,
    export: Path | None = None,
    tree: Path | None = None,
    json_: Json = False,
) -> None:
    """Show images in the browser as a zoomable treemap of what is alike.

    Example: gossamer data explore photos/ --model smaller/

    Without a model, images are compared by their pixels (averaged to 16 x 16). With one, by its
    penultimate features, and its errors are shown. Open the printed address; interrupt to end.

    Parameters
    ----------
    images
        A folder of images, with a subfolder a class or without; a Parquet file or folder; a folder
        of idx files or of CIFAR-10; or "digits".
    model
        A folder written by gossamer, or a timm name with --weights. Given several times, the
        viewer offers a choice.
    weights
        For each timm name in turn: a safetensors file or a state dict.
    layer
        Whose output is the feature. Default: the input of the last linear layer.
    features
        A NumPy file [n, d] of your own features, in place of a model.
    labels
        A CSV file with the columns name and label.
    split
        Where the data has stored splits.
    image_size
        Side in pixels to which images are read. Default: their own, or what the model needs.
    limit
        Show this many images at most, drawn evenly.
    normalise
        Features as they are, with variance 1, or vectors of length 1.
    scale
        How the tree is computed; auto is exact up to 20,000 images.
    host
        Address to listen on. Anything but the loopback shows the images to the network.
    port
        0 takes any that is free.
    cache
        Keeps features, tree and thumbnails for the next time. Default: a folder of the user's
        cache.
    export
        Write the viewer as a folder of plain files for any web server, and end.
    tree
        Write the tree as JSON, and end.
    json_
        Print what was built as JSON before serving.
    """
    from gossamer.core.files import exclusive
    from gossamer.data.gallery import Gallery, make_thumbnails, without_links

    if features is not None and model:
        raise InputError("give either --model or --features, not both")
    if limit is not None and limit < 1:
        raise InputError(f"--limit shows at least 1 image, not {limit}")

    def opened(size: Any = None, channels: int | None = None) -> Collection:
        from gossamer.datasets.collection import open_collection

        found = open_collection(
            images, split=split, labels=labels, image_size=size or image_size, channels=channels
        )
        return _limited(without_links(found), limit)

    collection = opened()
    kept = (cache or _cache_home()) / collection.fingerprint()
    with exclusive(kept):
        thumbnails = make_thumbnails(collection, kept / "thumbnails.npy")
        options: dict[str, Any] = {"normalise": normalise, "scale": scale}
        views: dict[str, View] = {}
        if model:
            files = list(weights or [])
            for number, name in enumerate(model):
                file = None if is_folder(name) or not files else files.pop(0)
                key = f"view{number}"
                views[key] = _network_view(
                    name, file, layer, opened, collection, kept / key, options
                )
            if files:
                raise InputError(f"there are more --weights than timm names: {files[0]}")
        else:
            views["view0"] = _plain_view(features, collection, kept / "view0", options)
    gallery = Gallery(collection, thumbnails, views)
    record = _record(gallery)
    if tree is not None:
        views["view0"].tree.to_json(tree)
        record["tree"] = str(tree)
    if export is not None:
        from gossamer.data.explorer_export import export as write

        write(gallery, export)
        record["export"] = str(export)
    if json_:
        print_json(record)
    else:
        _tell(record)
    if tree is None and export is None:
        _serve(gallery, host, port, quiet=json_)


def _serve(gallery: Any, host: str, port: int, *, quiet: bool) -> None:
    import contextlib
    import sys

    from gossamer.data.explorer_server import is_loopback, serve

    if not is_loopback(host):
        print(
            f"gossamer: {host} is not the loopback: everybody who reaches it can see these images",
            file=sys.stderr,
        )

    def ready(address: str) -> None:
        print(f"open {address}", file=sys.stderr if quiet else sys.stdout, flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        serve(gallery, host=host, port=port, ready=ready)


def _cache_home() -> Path:
    import os

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gossamer" / "explore"


def _limited(collection: Collection, limit: int | None) -> Collection:
    import numpy as np

    if limit is None or limit >= len(collection):
        return collection
    return collection.take(np.linspace(0, len(collection) - 1, limit).astype(np.int64))


def _network_view(
    name: str,
    weights: Path | None,
    layer: str | None,
    opened: Any,
    shown: Collection,
    cache: Path,
    options: dict[str, Any],
) -> View:
    """A view of a network: its features, and its predictions where it knows the classes."""
    import numpy as np

    from gossamer.core.files import read_json
    from gossamer.core.task import Preprocess
    from gossamer.data.gallery import make_view
    from gossamer.models import build, load_weights
    from gossamer.parts.embedding import embed, weights_digest

    if is_folder(name):
        from gossamer.core.saved import load_network

        module, _, _ = load_network(Path(name))
        record: Any = read_json(Path(name) / "network.json")
        for part in ("about", "task", "preprocess"):
            record = record.get(part) if isinstance(record, dict) else None
        if record is None:
            raise InputError(f"{name} does not say how its images are prepared")
        preprocess = Preprocess.from_json(record)
        collection = opened((preprocess.height, preprocess.width), preprocess.channels)
    else:
        if weights is None:
            raise InputError(
                f"{name} without --weights is untrained and its features mean nothing; give "
                "weights, or leave --model out to compare pixels"
            )
        collection = opened()
        module = build(
            name,
            classes=len(shown.classes) or None,
            channels=collection.channels,
            image_size=collection.size,
        )
        load_weights(module, weights)
        preprocess = collection.preprocess()
    if collection.names != shown.names:
        raise InputError(f"{images_differ(shown, collection)}; run again when nothing changes")
    found = embed(
        collection, module, preprocess,
        layer=layer, cache=cache, fingerprint=collection.fingerprint(),
    )  # fmt: skip
    knows = bool(shown.classes) and found.logits.shape[1] == len(shown.classes)
    y_pred = np.asarray(found.logits).argmax(1) if knows else None
    if shown.classes and not knows:
        _warn(
            f"{name} answers {found.logits.shape[1]} classes and the images have "
            f"{len(shown.classes)}: its errors are not shown"
        )
    key = [weights_digest(module), layer, repr(preprocess), shown.fingerprint()]
    return make_view(
        name, shown, np.asarray(found.features), y_pred, cache=cache, key=key, **options
    )


def images_differ(one: Collection, other: Collection) -> str:
    """Which images came or went between two looks at a collection."""
    changed = sorted(set(one.names) ^ set(other.names))
    return f"{len(changed)} images came or went while they were read, {changed[0]} first"


def _plain_view(
    features: Path | None, collection: Collection, cache: Path, options: dict[str, Any]
) -> View:
    """A view by features from a file, or by pixels."""
    import hashlib

    from gossamer.data.gallery import make_view

    if features is None:
        vectors, name = _kept_pixels(collection, cache / "pixels.npy"), "pixels"
    else:
        vectors, name = _vectors(features, len(collection)), features.name
    digest = hashlib.blake2b(vectors.tobytes(), digest_size=8).hexdigest()
    return make_view(
        name, collection, vectors, cache=cache, key=[digest, collection.fingerprint()], **options
    )


def _kept_pixels(collection: Collection, cache: Path) -> np.ndarray:
    import numpy as np

    from gossamer.core.files import whole_file
    from gossamer.data.gallery import pixel_features

    if cache.exists():
        return np.load(cache, allow_pickle=False)
    vectors = pixel_features(collection)
    with whole_file(cache) as partial, open(partial, "wb") as file:
        np.save(file, vectors)
    return vectors


def _vectors(path: Path, count: int) -> np.ndarray:
    import numpy as np

    try:
        vectors = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not a NumPy file (.npy) of numbers") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or len(vectors) != count:
        shape = getattr(vectors, "shape", "several arrays")
        raise InputError(f"{path} holds {shape}, but there are {count} images (rows)")
    if vectors.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {vectors.dtype}, not numbers")
    return vectors.astype(np.float32)


def _warn(sentence: str) -> None:
    import sys

    print(f"gossamer: {sentence}", file=sys.stderr)


def _record(gallery: Any) -> dict[str, Any]:
    collection = gallery.collection
    return {
        "data": collection.name,
        "images": len(collection),
        "classes": len(collection.classes),
        "skipped": [{"name": s.name, "reason": s.reason} for s in collection.skipped],
        "views": [
            {"name": view.name, "accuracy": view.tree.accuracy(view.tree.root), **view.tree.about}
            for view in gallery.views.values()
        ],
    }


def _tell(record: dict[str, Any]) -> None:
    console = out_console()
    console.print(
        f"{record['data']}: {record['images']} images, {record['classes']} classes", markup=False
    )
    for skipped in record["skipped"][:10]:
        console.print(f"left out: {skipped['name']} ({skipped['reason']})", markup=False)
    if len(record["skipped"]) > 10:
        console.print(f"and {len(record['skipped']) - 10} others were left out", markup=False)
    for name in ("tree", "export"):
        if name in record:
            console.print(f"wrote {record[name]}", markup=False)
