"""A gallery as a folder of plain files, to be put on any web server.

The same viewer, with everything it could ask for written down: chunks of trees, sheets of
thumbnails in the order of rows, names and similar images in blocks of 256. Enlarged images are the
thumbnails, and a selection is saved as a list of names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.errors import InputError
from gossamer.core.files import whole_folder
from gossamer.core.progress import progress
from gossamer.data.dendrogram import Dendrogram, chunk_of
from gossamer.data.explorer_server import ASSETS, asset
from gossamer.data.gallery import ALL, SHEET, SIMILAR, Gallery, shown
from gossamer.parts.neighbours import nearest


def export(gallery: Gallery, folder: Path) -> None:
    """Writes the viewer with a gallery's trees and thumbnails.

    Args:
        gallery: what is shown.
        folder: appears in one rename; must not hold anything yet.

    Raises:
        InputError: if the folder is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose another --export")
    labels = gallery.collection.labels
    classes = [] if labels is None else [str(c) for c in np.unique(labels[labels >= 0])]
    with whole_folder(folder) as partial:
        for name in ASSETS:
            (partial / name).write_bytes(asset(name))
        data = partial / "data"
        data.mkdir()
        _json(data / "meta.json", gallery.meta() | {"static": True})
        (data / "labels.bin").write_bytes(gallery.labels())
        blocks = range(-(-len(gallery.collection) // SHEET))
        with progress() as bar:
            for block in bar.track(blocks, description="writing thumbnails"):
                stop = min((block + 1) * SHEET, len(gallery.collection))
                (data / f"sheet-{block}.png").write_bytes(gallery.sheet(range(block * SHEET, stop)))
            for key in gallery.views:
                (data / key).mkdir()
                (data / key / "predictions.bin").write_bytes(gallery.predictions(key))
                for which in bar.track([ALL, *classes], description="writing trees"):
                    _tree(gallery, key, which, data / key / which)
                for block in bar.track(blocks, description="writing similar images"):
                    _infos(gallery, key, block, data / key)


def _tree(gallery: Gallery, view: str, which: str, folder: Path) -> None:
    folder.mkdir()
    tree, _ = gallery.tree(view, which)
    top = gallery.top(view, which)
    _json(folder / "top.json", top)
    (folder / "order.bin").write_bytes(gallery.order(view, which))
    waiting = _open_ends(tree, top["chunk"])
    while waiting:
        node = waiting.pop()
        chunk = chunk_of(tree, node)
        _json(folder / f"node-{node}.json", chunk)
        waiting += _open_ends(tree, chunk)


def _open_ends(tree: Dendrogram, chunk: dict[str, Any]) -> list[int]:
    """The nodes of a chunk that hold more than the chunk shows."""
    return [
        node
        for node, left in zip(chunk["node"], chunk["left"], strict=True)
        if left < 0 and not tree.is_leaf(node)
    ]


def _infos(gallery: Gallery, view: str, block: int, folder: Path) -> None:
    features = gallery.views[view].features
    rows = np.arange(block * SHEET, min((block + 1) * SHEET, len(features)))
    k = min(SIMILAR, len(features) - 1)
    far, near = nearest(features[rows], features, k=k + 1)
    infos = []
    for at, row in enumerate(rows):
        others = [
            [int(other), float(distance)]
            for other, distance in zip(near[at], far[at], strict=True)
            if other != row
        ][:k]
        infos.append(
            {"row": int(row), "name": shown(gallery.collection.names[row]), "similar": others}
        )
    _json(folder / f"infos-{block}.json", infos)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
