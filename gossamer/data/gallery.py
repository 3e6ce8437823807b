"""What an explorer shows: images, their thumbnails, and views of them by one or several networks.

A view is a tree over the features of one network, with its predictions; a class has a tree of its
own in each view, built when somebody asks for it. Everything that took long is kept in a cache.
Images are known by their row: no name of a file ever becomes a path here.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.core.files import read_json, whole_file, write_json
from gossamer.core.progress import progress
from gossamer.data.dendrogram import Dendrogram, chunk_of
from gossamer.data.treemap import Normalise, build_dendrogram, scaled
from gossamer.data.ward import Scale
from gossamer.datasets.collection import Collection, Skipped
from gossamer.parts.neighbours import nearest

THUMB_SIDE = 48
"""Pixels of a stored thumbnail, at most."""
ENLARGED_SIDE = 640
"""Pixels of an enlarged image, at most."""
SHEET = 256
"""Thumbnails on a sheet, at most: 16 x 16."""
SIMILAR = 12
"""Similar images that are named with an image."""
EXACT_LIMIT = 20_000
"""Images up to which a gallery's tree is exact by default: it should open in seconds."""

ALL = "all"


@dataclass
class View:
    """Images as one network sees them.

    Attributes:
        name: of the network, for people.
        features: as they are compared, ``[n, d]``.
        tree: of all images.
        classes: trees of single classes with the rows they hold, as far as they were asked for.
    """

    name: str
    features: np.ndarray
    tree: Dendrogram
    classes: dict[int, tuple[Dendrogram, np.ndarray]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of_class(self, label: int) -> tuple[Dendrogram, np.ndarray]:
        """The tree of a class, and the row of each of its leaves.

        Raises:
            InputError: if no image has the class.
        """
        with self._lock:
            if label not in self.classes:
                tree = self.tree
                assert tree.y_true is not None
                rows = np.flatnonzero(tree.y_true == label)
                if len(rows) == 0:
                    raise InputError(f"no image has the class {label}")
                self.classes[label] = (
                    build_dendrogram(
                        self.features[rows],
                        [tree.filenames[row] for row in rows],
                        tree.y_true[rows],
                        None if tree.y_pred is None else tree.y_pred[rows],
                        classes=tree.classes,
                        scale=_scale_of("auto", len(rows)),
                    ),
                    rows,
                )
            return self.classes[label]

    def similar(self, row: int, k: int = SIMILAR) -> tuple[np.ndarray, np.ndarray]:
        """The nearest other images of an image: distances ``[k]`` and rows ``[k]``."""
        k = min(k, len(self.features) - 1)
        if k < 1:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        # One more, since the image itself is among them (or as many that equal it).
        far, rows = nearest(self.features[row : row + 1], self.features, k=k + 1)
        others = rows[0] != row
        others[np.cumsum(others) > k] = False
        return far[0][others], rows[0][others]


class Gallery:
    """Images with thumbnails and views.

    Args:
        collection: the images.
        thumbnails: ``[n, side, side, channels]`` uint8, see :func:`make_thumbnails`.
        views: by a short key; at least one.
    """

    def __init__(
        self, collection: Collection, thumbnails: np.ndarray, views: dict[str, View]
    ) -> None:
        if not views or any(view.tree.size != len(collection) for view in views.values()):
            raise InputError("a gallery needs one view of all its images at least")
        self.collection = collection
        self.thumbnails = thumbnails
        self.views = views

    def meta(self) -> dict[str, Any]:
        """What the viewer asks for first."""
        return {
            "title": shown(self.collection.name),
            "count": len(self.collection),
            "classes": [shown(name) for name in self.collection.classes],
            "side": self.thumbnails.shape[1],
            "sheet": SHEET,
            "skipped": len(self.collection.skipped),
            "views": [
                {
                    "key": key,
                    "name": shown(view.name),
                    "predictions": view.tree.y_pred is not None,
                    "about": view.tree.about,
                }
                for key, view in self.views.items()
            ],
        }

    def tree(self, view: str, which: str) -> tuple[Dendrogram, np.ndarray]:
        """The tree of all images ("all") or of a class (its number), and the rows of its leaves.

        Raises:
            InputError: if there is no such view or class.
        """
        if view not in self.views:
            raise InputError(f"there is no view {view!r:.40}")
        if which == ALL:
            tree = self.views[view].tree
            return tree, np.arange(tree.size)
        if not which.isdecimal() or int(which) >= len(self.collection.classes):
            raise InputError(f"there is no class {which!r:.40}")
        return self.views[view].of_class(int(which))

    def top(self, view: str, which: str) -> dict[str, Any]:
        """The root of a tree and what hangs below it."""
        tree, _ = self.tree(view, which)
        return {"root": tree.root, "size": tree.size, "chunk": chunk_of(tree, tree.root)}

    def chunk(self, view: str, which: str, node: int) -> dict[str, Any]:
        """What hangs below a node.

        Raises:
            InputError: if there is no such node.
        """
        tree, _ = self.tree(view, which)
        return chunk_of(tree, node)

    def order(self, view: str, which: str) -> bytes:
        """Rows of images in leaf order, little-endian int32."""
        tree, rows = self.tree(view, which)
        return rows[tree.order].astype("<i4").tobytes()

    def labels(self) -> bytes:
        """The class of each row, little-endian int32; -1 where there is none."""
        labels = self.collection.labels
        return (
            np.full(len(self.collection), -1) if labels is None else labels
        ).astype("<i4").tobytes()  # fmt: skip

    def predictions(self, view: str) -> bytes:
        """The predicted class of each row, little-endian int32; -1 where there is none."""
        if view not in self.views:
            raise InputError(f"there is no view {view!r:.40}")
        found = self.views[view].tree.y_pred
        return (
            np.full(len(self.collection), -1) if found is None else found
        ).astype("<i4").tobytes()  # fmt: skip

    def sheet(self, rows: Sequence[int]) -> bytes:
        """A PNG with the thumbnails of up to 256 rows, 16 beside each other, in their order.

        Raises:
            InputError: if there are none or too many, or a row does not exist.
        """
        if not 1 <= len(rows) <= SHEET:
            raise InputError(f"a sheet holds 1 to {SHEET} images, not {len(rows)}")
        at = np.asarray(rows, dtype=np.int64)
        if at.min() < 0 or at.max() >= len(self.collection):
            raise InputError(f"there are {len(self.collection)} images, from 0")
        side, channels = self.thumbnails.shape[1], self.thumbnails.shape[3]
        columns = min(16, len(rows))
        down = -(-len(rows) // 16)
        tiles = np.zeros((down * columns, side, side, channels), dtype=np.uint8)
        tiles[: len(rows)] = self.thumbnails[at]
        grid = tiles.reshape(down, columns, side, side, channels).swapaxes(1, 2)
        return _png(grid.reshape(down * side, columns * side, channels), level=1)

    def enlarged(self, row: int) -> bytes:
        """A PNG of one image as it is read, at most 640 pixels wide or high.

        It is always encoded anew, so that whatever a file holds besides its pixels stays there.

        Raises:
            InputError: if there is no such row, or its file has become unreadable.
        """
        self._check(row)
        inside(self.collection, row)
        pixels = self.collection.fetch(np.array([row]))
        longest = max(pixels.shape[2:])
        if longest > ENLARGED_SIDE:
            factor = ENLARGED_SIDE / longest
            sides = [max(1, round(side * factor)) for side in pixels.shape[2:]]
            pixels = F.interpolate(pixels.float(), sides, mode="area")
        return _png(_bytes_of(pixels, self.collection.scale)[0], level=6)

    def info(self, view: str, row: int) -> dict[str, Any]:
        """Name of an image, and its similar images with their distances."""
        self._check(row)
        if view not in self.views:
            raise InputError(f"there is no view {view!r:.40}")
        far, rows = self.views[view].similar(row)
        return {
            "row": row,
            "name": shown(self.collection.names[row]),
            "similar": [
                [int(other), float(np.float32(distance))]
                for other, distance in zip(rows, far, strict=True)
            ],
        }

    def names(self, rows: Sequence[int]) -> list[str]:
        """Names of images.

        Raises:
            InputError: if a row does not exist.
        """
        for row in rows:
            self._check(row)
        return [shown(self.collection.names[row]) for row in rows]

    def search(self, text: str, limit: int = 10_000) -> list[int]:
        """Rows whose name holds ``text``, whatever the case."""
        wanted = text.casefold()
        found = (row for row, name in enumerate(self.collection.names) if wanted in name.casefold())
        return [row for row, _ in zip(found, range(limit), strict=False)]

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self.collection):
            raise InputError(f"there are {len(self.collection)} images, from 0")


def inside(collection: Collection, row: int) -> None:
    """Refuses an image whose file is a link out of the collection's folder.

    Raises:
        InputError: naming the image.
    """
    root = collection.root
    if root is None:
        return
    name = collection.names[row]
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise InputError(f"{name} is a link to a place outside of {root}")


def without_links(collection: Collection) -> Collection:
    """The collection without files that are links to places outside of its folder.

    Raises:
        InputError: if nothing is left.
    """
    kept: list[int] = []
    links: list[Skipped] = []
    for row, name in enumerate(collection.names):
        try:
            inside(collection, row)
        except InputError as error:
            links.append(Skipped(name, str(error)))
        else:
            kept.append(row)
    if not links:
        return collection
    if not kept:
        raise InputError(f"all images of {collection.name} are links to other places")
    smaller = collection.take(np.array(kept))
    return Collection(
        smaller.name, smaller.names, smaller.source, smaller.classes, smaller.scale,
        (*smaller.skipped, *links), smaller.root,
    )  # fmt: skip


def make_thumbnails(collection: Collection, cache: Path | None = None) -> np.ndarray:
    """Small square versions of all images, ``[n, side, side, channels]`` uint8.

    Args:
        collection: the images; those that are not square are centred on black.
        cache: a file that keeps them (npy); it is read if it is there.
    """
    height, width = collection.size
    side = min(THUMB_SIDE, max(height, width))
    shape = (len(collection), side, side, collection.channels)
    if cache is not None and cache.exists():
        kept = np.load(cache, mmap_mode="r", allow_pickle=False)
        if kept.shape == shape and kept.dtype == np.uint8:
            return kept
    if cache is None:
        tiles = np.zeros(shape, dtype=np.uint8)
        _fill(tiles, collection, side)
        return tiles
    with whole_file(cache) as partial:
        tiles = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        _fill(tiles, collection, side)
        tiles.flush()
    return np.load(cache, mmap_mode="r", allow_pickle=False)


def pixel_features(collection: Collection, side: int = 16) -> np.ndarray:
    """The images themselves as features: averaged to at most ``side`` x ``side``, ``[n, d]``.

    Values are on the scale 0 to 1.
    """
    height, width = collection.size
    sides = (min(side, height), min(side, width))
    features = np.empty((len(collection), collection.channels * sides[0] * sides[1]), np.float32)
    with progress() as bar:
        for rows in bar.track(_blocks(len(collection)), description="reading images"):
            small = F.interpolate(collection.fetch(rows).float(), sides, mode="area")
            features[rows] = (small.flatten(1) / collection.scale).numpy()
    return features


def make_view(
    name: str,
    collection: Collection,
    features: np.ndarray,
    y_pred: np.ndarray | None = None,
    *,
    normalise: Normalise = "none",
    scale: Scale = "auto",
    cache: Path | None = None,
    key: Any = None,
) -> View:
    """Builds a view, or reads its tree from the cache.

    Args:
        name: for people.
        collection: the images.
        features: ``[n, d]``.
        y_pred: predicted classes ``[n]``, or None.
        normalise: how features are scaled before they are compared.
        scale: how the tree is computed; "auto" is exact up to 20,000 images.
        cache: a folder that keeps the tree.
        key: JSON value that tells this tree from others in the cache.
    """
    route = _scale_of(scale, len(collection))
    comparable = scaled(features, normalise)
    if cache is not None and (cache / "tree.json").exists():
        state = read_json(cache / "tree.json")
        if state.get("key") == [key, normalise, route] and (cache / "tree.npz").exists():
            with np.load(cache / "tree.npz", allow_pickle=False) as kept:
                merges = kept["children"], kept["heights"]
            tree = Dendrogram(
                *merges, collection.names, collection.labels, y_pred, collection.classes,
                state["about"],
            )  # fmt: skip
            return View(name, comparable, tree)
    tree = build_dendrogram(
        comparable, collection.names, collection.labels, y_pred,
        classes=collection.classes, scale=route,
    )  # fmt: skip
    tree.about["normalise"] = normalise
    if cache is not None:
        # The state last: it says that the rest is there.
        (cache / "tree.json").unlink(missing_ok=True)
        with whole_file(cache / "tree.npz") as partial, open(partial, "wb") as file:
            np.savez(file, children=tree.children, heights=tree.heights)
        write_json(cache / "tree.json", {"key": [key, normalise, route], "about": tree.about})
    return View(name, comparable, tree)


def _scale_of(scale: Scale, count: int) -> Scale:
    if scale != "auto":
        return scale
    return "vectors" if count <= EXACT_LIMIT else "micro"


def _blocks(count: int, size: int = 1024) -> list[np.ndarray]:
    return np.array_split(np.arange(count), -(-count // size))


def _fill(tiles: np.ndarray, collection: Collection, side: int) -> None:
    height, width = collection.size
    factor = side / max(height, width)
    down, across = max(1, round(height * factor)), max(1, round(width * factor))
    y, x = (side - down) // 2, (side - across) // 2
    with progress() as bar:
        for rows in bar.track(_blocks(len(collection)), description="making thumbnails"):
            pixels = collection.fetch(rows)
            if (down, across) != (height, width):
                pixels = F.interpolate(pixels.float(), (down, across), mode="area")
            tiles[rows, y : y + down, x : x + across] = _bytes_of(pixels, collection.scale)


def _bytes_of(pixels: torch.Tensor, scale: float) -> np.ndarray:
    """Raw images ``[n, c, h, w]`` as uint8 ``[n, h, w, c]``."""
    bright = (pixels.float() * (255.0 / scale)).round().clamp(0, 255).to(torch.uint8)
    return bright.permute(0, 2, 3, 1).numpy()


def _png(pixels: np.ndarray, *, level: int) -> bytes:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(cast(Any, buffer), format="PNG", compress_level=level)
    return buffer.getvalue()


def shown(name: str) -> str:
    """A name as text: bytes of file names that are no UTF-8 become question marks."""
    return name.encode("utf-8", "replace").decode("utf-8")
