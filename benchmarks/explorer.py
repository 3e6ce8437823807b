"""The explorer at 1,000, 10,000 and 50,000 images: clustering, opening, first paint, zoom.

Images are Fashion-MNIST (`fashion_mnist` in the folder that `GOSSAMER_DATA` names), compared by
their pixels averaged to 16 x 16. Clustering: every route, in turns, beside fastcluster's and
scipy's Ward up to 10,000. Opening: the whole command from nothing, and again from its cache, until
it prints its address. First paint: from navigation until every thumbnail on the screen is drawn;
zoom: from the wish until the new layout with its thumbnails is drawn (motion reduced, so without
the 750 ms of the animation); frames: milliseconds between frames of an animated zoom. One thread,
real Chromium without a GPU.

    python benchmarks/explorer.py --json benchmarks/results/explorer.json
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from gossamer.core.experiment import about
from gossamer.core.files import write_json
from gossamer.data.dendrogram import Dendrogram
from gossamer.data.gallery import pixel_features
from gossamer.data.ward import ward
from gossamer.datasets.collection import open_collection

SIZES = (1_000, 10_000, 50_000)
MATRIX_LIMIT = 10_000
DATA = Path(os.environ.get("GOSSAMER_DATA", Path(__file__).parents[2] / "shared" / "data"))
CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def purity(children: np.ndarray, heights: np.ndarray, labels: np.ndarray, k: int = 20) -> float:
    """Percent of images of the commonest class of their cell, among ``k`` cells."""
    tree = Dendrogram(children, heights, tuple(map(str, range(len(labels)))))
    cells = [tree.members(n) for n in tree.cut(k, "min_merging_distance").leaves]
    return 100.0 * sum(int(np.bincount(labels[r]).max()) for r in cells) / len(labels)


def clustering(features: np.ndarray, labels: np.ndarray, rounds: int) -> dict[str, Any]:
    """Seconds of each contender, in turns; purity of 20 cells tells what the short cut costs."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import pdist

    contenders: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {}

    def ours(route: Any) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        def run() -> tuple[np.ndarray, np.ndarray]:
            found = ward(features, scale=route)
            return found.children, found.heights

        return run

    contenders |= {"vectors": ours("vectors"), "micro": ours("micro")}
    if len(features) <= MATRIX_LIMIT:
        contenders["stored"] = ours("stored")
        wide = features.astype(np.float64)

        def scipy() -> tuple[np.ndarray, np.ndarray]:
            merges = linkage(pdist(wide), "ward")
            return merges[:, :2].astype(np.int64), merges[:, 2]

        contenders["scipy"] = scipy
        try:
            import fastcluster  # type: ignore[import-not-found]
        except ImportError:
            pass
        else:

            def fast() -> tuple[np.ndarray, np.ndarray]:
                merges = fastcluster.linkage_vector(wide, "ward")
                return merges[:, :2].astype(np.int64), merges[:, 2]

            contenders["fastcluster, vectors"] = fast
    times: dict[str, list[float]] = {name: [] for name in contenders}
    pure = {}
    for turn in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            found = run()
            times[name].append(time.perf_counter() - began)
            if turn == 0:
                pure[name] = purity(*found, labels)
            print(f"  {name}: {times[name][-1]:.2f} s", flush=True)
    return {
        name: {"seconds": median(spent), "all": spent, "purity_of_20_cells": pure[name]}
        for name, spent in times.items()
    }


class Command:
    """`gossamer data explore`, running."""

    def __init__(self, data: Path, count: int, cache: Path) -> None:
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gossamer.cli", "data", "explore", str(data), "--limit",
             str(count), "--port", "0", "--cache", str(cache)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = ""
        for line in self.process.stdout:
            if found := re.search(r"http://\S+", line):
                self.address = found.group()
                break
        if not self.address:
            raise RuntimeError("the explorer did not start")
        self.seconds = time.perf_counter() - began

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


PAINTED = """async () => {
    const ready = () => window.explorer && explorer.map.cells.length > 1;
    while (!ready()) await new Promise(r => setTimeout(r, 2));
    await explorer.map.loaded;
    await new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)));
    return performance.now();
}"""
ZOOM = """async () => {
    const map = explorer.map, began = performance.now();
    const cells = map.cells.filter(c => c.leaf && c.node.count > 1);
    if (cells.length && map.stack.length < 4) {
      cells.sort((a, b) => b.node.count - a.node.count);
      await map.zoomIn(cells[0].node.id);
    } else await map.zoomOut();
    const laid = performance.now();
    await map.loaded;
    await new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)));
    return [laid - began, performance.now() - began];
}"""
FRAMES = """async () => {
    const times = []; let on = true;
    const tick = (now) => { times.push(now); if (on) requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
    await explorer.map.zoomOut();
    on = false;
    return times.slice(1).map((t, i) => t - times[i]);
}"""
SLIDE = """async () => {
    const times = [];
    for (let k = 2; k <= 20; k++) {
      const began = performance.now();
      await explorer.map.set({ k });
      explorer.map.paint(explorer.map.canvas, explorer.map.cells);
      times.push(performance.now() - began);
    }
    return times;
}"""


def viewing(address: str) -> Iterator[tuple[str, Any]]:
    """First paint (three times), zooms, frames, and the slider of clusters, in milliseconds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        paints, laid, drawn, frames, slides, shown = [], [], [], [], [], 0
        for _ in range(3):
            context = chromium.new_context(
                viewport={"width": 1400, "height": 900}, reduced_motion="reduce"
            )
            page = context.new_page()
            page.goto(address, wait_until="commit")
            paints.append(page.evaluate(PAINTED))
            shown = page.evaluate("[...explorer.map.rows()].length")
            for _ in range(8):
                layout, all_of_it = page.evaluate(ZOOM)
                laid.append(layout)
                drawn.append(all_of_it)
            slides += page.evaluate(SLIDE)
            page.emulate_media(reduced_motion="no-preference")
            page.evaluate("explorer.map.zoomIn(explorer.map.cells.find(c => c.leaf).node.id)")
            frames += page.evaluate(FRAMES)
            context.close()
        chromium.close()
    yield "images_on_the_screen", shown
    yield "first_paint_ms", median(paints)
    yield "zoom_layout_ms", median(laid)
    yield "zoom_painted_ms", median(drawn)
    yield "zoom_painted_worst_ms", max(drawn)
    yield "slider_ms", median(slides)
    yield "frame_ms", median(frames)
    yield "frame_ms_p95", float(np.percentile(frames, 95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    data = DATA / "fashion_mnist"
    whole = open_collection(data)
    ward(np.random.default_rng(0).normal(size=(3_000, 16)))  # compiles
    rows: list[dict[str, Any]] = []
    for count in SIZES:
        print(f"{count} images", flush=True)
        collection = whole.take(np.linspace(0, len(whole) - 1, count).astype(np.int64))
        features = pixel_features(collection)
        assert collection.labels is not None
        row: dict[str, Any] = {
            "images": count,
            "dimensions": features.shape[1],
            "clustering": clustering(
                features, collection.labels, given.rounds if count < MATRIX_LIMIT else 1
            ),
        }
        with tempfile.TemporaryDirectory() as folder:
            first = Command(data, count, Path(folder))
            first.close()
            again = Command(data, count, Path(folder))
            row |= {"open_seconds": first.seconds, "open_again_seconds": again.seconds}
            row |= dict(viewing(again.address))
            again.close()
        print({key: value for key, value in row.items() if key != "clustering"}, flush=True)
        rows.append(row)
    if given.json:
        write_json(given.json, {"about": about(), "rows": rows})


if __name__ == "__main__":
    main()
