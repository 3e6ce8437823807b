"""The explorer: what the server answers and refuses, and the viewer in a real Chromium."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.data.dendrogram import Dendrogram
from gossamer.data.error_views import class_table
from gossamer.data.explorer_export import export
from gossamer.data.explorer_server import application, is_loopback, selection_of
from gossamer.data.gallery import Gallery, View, make_thumbnails, make_view, without_links
from gossamer.data.selection import read_selection
from gossamer.data.treemap import build_dendrogram, layout
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.collection import Collection, open_collection

EVIL = "<img src=x onerror=document.title='owned'>"
COUNT = 900


def digits_gallery() -> Gallery:
    """Real digits with names and classes that would like to be markup, and invented errors."""
    whole = open_collection("digits").take(np.arange(COUNT))
    names = [f"digits/{row}.png" for row in range(COUNT)]
    names[:3] = [
        f"{EVIL}.png",
        "..%2f..%2fetc%2fpasswd.png",
        "'\"><script>document.title=1</script>",
    ]
    classes = tuple([*(f"digit {c}" for c in range(9)), EVIL])
    collection = Collection("digits " + EVIL, tuple(names), whole.source, classes, whole.scale)
    features = whole.fetch(np.arange(COUNT)).flatten(1).float().numpy() / 16
    labels = collection.labels
    assert labels is not None
    y_pred = labels.copy()
    y_pred[::7] = (y_pred[::7] + 1) % 10
    views = {
        "view0": make_view("pixels " + EVIL, collection, features, y_pred),
        "view1": make_view("plain", collection, features[:, :20]),
    }
    return Gallery(collection, make_thumbnails(collection), views)


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return digits_gallery()


# The server


@pytest.fixture
def client(gallery: Gallery) -> Any:
    testclient = pytest.importorskip("starlette.testclient")
    return testclient.TestClient(application(gallery), base_url="http://localhost:8765")


def test_trees_are_served_in_chunks(client: Any, gallery: Gallery) -> None:
    tree = gallery.views["view0"].tree
    top = client.get("/data/view0/all/top.json").json()
    assert (top["root"], top["size"]) == (2 * COUNT - 2, COUNT)
    order = np.frombuffer(client.get("/data/view0/all/order.bin").content, "<i4")
    assert np.array_equal(order, tree.order)
    closed = [
        n for n, left in zip(top["chunk"]["node"], top["chunk"]["left"], strict=True) if left < 0
    ]
    deeper = next(node for node in closed if tree.count[node] > 1)
    chunk = client.get(f"/data/view0/all/node-{deeper}.json").json()
    assert chunk["node"][0] == deeper and chunk["left"][0] == tree.split(deeper)[0]


def test_a_class_has_a_tree_of_its_own(client: Any, gallery: Gallery) -> None:
    labels = gallery.collection.labels
    assert labels is not None
    order = np.frombuffer(client.get("/data/view0/3/order.bin").content, "<i4")
    assert sorted(order) == np.flatnonzero(labels == 3).tolist()
    own = build_dendrogram(
        gallery.views["view0"].features[labels == 3],
        [str(row) for row in np.flatnonzero(labels == 3)],
    )
    assert gallery.tree("view0", "3")[0].heights == pytest.approx(own.heights)


def test_similar_images_come_with_their_distances(client: Any, gallery: Gallery) -> None:
    features = gallery.views["view0"].features
    info = client.get("/data/view0/info-17.json").json()
    far = np.linalg.norm(features - features[17], axis=1)
    far[17] = np.inf
    expected = np.argsort(far, kind="stable")[:12]
    assert [row for row, _ in info["similar"]] == expected.tolist()
    assert [distance for _, distance in info["similar"]] == pytest.approx(far[expected], rel=1e-4)


def test_images_that_are_equal_are_similar_and_not_themselves() -> None:
    tree = build_dendrogram(np.zeros((30, 2)), [str(row) for row in range(30)])
    far, rows = View("same", np.zeros((30, 2), np.float32), tree).similar(25)
    assert len(rows) == 12 and 25 not in rows and (far == 0).all()


def test_a_sheet_holds_the_thumbnails_that_were_asked_for(client: Any, gallery: Gallery) -> None:
    rows = [5, 700, 3, *range(100, 117)]
    answer = client.get("/data/sheet.png?rows=" + ",".join(map(str, rows)))
    sheet = np.asarray(Image.open(io.BytesIO(answer.content)))
    side = gallery.thumbnails.shape[1]
    assert sheet.shape == (2 * side, 16 * side)
    for at, row in enumerate(rows):
        y, x = side * (at // 16), side * (at % 16)
        assert np.array_equal(sheet[y : y + side, x : x + side], gallery.thumbnails[row, ..., 0])
    pixels = np.asarray(gallery.collection.fetch(np.array([5])))[0, 0]
    assert np.array_equal(sheet[:8, :8], np.round(pixels * 255.0 / 16))


def test_an_image_is_enlarged_to_what_it_was(client: Any, gallery: Gallery) -> None:
    image = np.asarray(Image.open(io.BytesIO(client.get("/data/image-9.png").content)))
    assert np.array_equal(image, gallery.thumbnails[9, ..., 0])


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
        "/data/../../../etc/passwd", "/data/image-..%2f1.png", "/data/image-/etc/passwd.png",
        "/data/view0/..%2f..%2fx/top.json", "/data/%2e%2e/all/top.json", "/explorer.py",
        "/data/image--1.png", "/data/image-900.png", "/data/image-٣.png", "/data/image-1e3.png",
        "/data/sheet.png", "/data/sheet.png?rows=900", "/data/sheet.png?rows=-1",
        "/data/sheet.png?rows=1,", "/data/sheet.png?rows=" + ",".join(["1"] * 257),
        "/data/view0/all/node-99999.json", "/data/view0/10/top.json", "/data/view0/-1/top.json",
        "/data/view9/all/top.json", "/data/view9/predictions.bin", "/data/view9/info-1.json",
        "/data/view0/info-900.json", "/data/names.json?rows=5000", "/__init__.py", "/treemap.py",
    ],
)  # fmt: skip
def test_nothing_else_can_be_read(path: str, client: Any) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 405)
    assert "root:" not in answer.text and "import" not in answer.text


def test_other_host_names_are_refused(client: Any) -> None:
    for host in ("evil.example", "evil.example:8765", "localhost.evil.example", ""):
        assert client.get("/data/meta.json", headers={"host": host}).status_code == 421
    for host in ("localhost", "127.0.0.1:9", "[::1]:80"):
        assert client.get("/data/meta.json", headers={"host": host}).status_code == 200


def test_pages_may_load_nothing_from_elsewhere(client: Any) -> None:
    for path in ("/", "/explorer.js", "/treemap.js", "/explorer.css", "/data/meta.json", "/none"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    text = "".join(client.get(f"/{name}").text for name in ("", "explorer.js", "treemap.js"))
    assert "http://" not in text and "https://" not in text and "innerHTML" not in text


def test_a_selection_is_an_index_file(client: Any, tmp_path: Path) -> None:
    answer = client.post("/data/export", json={"rows": [[2, 4], [10, 11]]})
    (tmp_path / "selection.parquet").write_bytes(answer.content)
    selection = read_selection(tmp_path / "selection.parquet")
    assert selection.kept.tolist() == [2, 3, 10]
    assert selection.names[3] == "digits/3.png"
    assert pq.read_table(tmp_path / "selection.parquet")["kept"].to_pylist().count(True) == 3


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", '{"rows": []}', '{"rows": [[4, 2]]}', '{"rows": [[0, 901]]}',
     '{"rows": [[5, 6], [1, 2]]}', '{"rows": [[-1, 2]]}', '{"rows": "ab"}', "[" * 100_000],
)  # fmt: skip
def test_bad_selections_are_refused(client: Any, body: str) -> None:
    assert client.post("/data/export", content=body).status_code == 404


def test_links_out_of_the_folder_are_left_out(tmp_path: Path) -> None:
    root, secret = tmp_path / "images", tmp_path / "secret.png"
    root.mkdir()
    for path in (secret, root / "a.png", root / "b.png"):
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(path)
    os.symlink(secret, root / "link.png")
    os.symlink(root / "a.png", root / "within.png")
    collection = without_links(open_collection(root))
    assert collection.names == ("a.png", "b.png", "within.png")
    assert [skip.name for skip in collection.skipped] == ["link.png"]
    gallery = Gallery(
        collection, make_thumbnails(collection), {"v": make_view("v", collection, np.eye(3))}
    )
    assert gallery.enlarged(0)
    # A file that becomes a link while the server runs.
    (root / "b.png").unlink()
    os.symlink(secret, root / "b.png")
    with pytest.raises(InputError, match="outside"):
        gallery.enlarged(1)


def test_only_the_loopback_is_the_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org")))


def test_what_was_built_is_read_from_the_cache(tmp_path: Path) -> None:
    collection = open_collection("digits").take(np.arange(60))
    features = collection.fetch(np.arange(60)).flatten(1).float().numpy()
    first = make_view("a", collection, features, cache=tmp_path, key="one")
    thumbs = make_thumbnails(collection, tmp_path / "t.npy")
    began = (tmp_path / "tree.npz").stat().st_mtime_ns
    again = make_view("a", collection, features, cache=tmp_path, key="one")
    assert (tmp_path / "tree.npz").stat().st_mtime_ns == began
    assert np.array_equal(first.tree.children, again.tree.children)
    assert np.array_equal(thumbs, make_thumbnails(collection, tmp_path / "t.npy"))
    other = make_view("a", collection, features[::-1].copy(), cache=tmp_path, key="two")
    assert not np.array_equal(first.tree.children, other.tree.children)
    wide = Collection("w", ("a",), ArraySource(torch.full((1, 3, 30, 90), 9, dtype=torch.uint8),
                      torch.zeros(1, dtype=torch.int64)), ())  # fmt: skip
    tile = make_thumbnails(wide)
    assert tile.shape == (1, 48, 48, 3) and (tile[0, 16:32] == 9).all() and not tile[0, :16].any()


# The browser


class Served:
    """An application on a port of its own, in a thread."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True
        )
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture(scope="module")
def address(gallery: Gallery) -> Iterator[str]:
    pytest.importorskip("uvicorn")
    served = Served(application(gallery))
    yield served.address
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=[
                "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", "--no-first-run",
            ],
        )  # fmt: skip
        yield chromium
        chromium.close()


READY = "window.explorer?.map.cells.length > 1"
CELLS = "() => explorer.map.cells.map(c => [c.node.id, c.box.x0, c.box.y0, c.box.x1, c.box.y1])"


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The explorer, opened; at the end there were no errors and no foreign requests."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, reduced_motion="reduce", accept_downloads=True
    )
    tab = context.new_page()
    tab.errors = []
    tab.on("console", lambda message: tab.errors.append(message.text))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    foreign: list[str] = []
    tab.on(
        "request", lambda r: r.url.startswith((address, "blob:", "data:")) or foreign.append(r.url)
    )
    tab.goto(address)
    until(tab, READY)
    tab.evaluate("explorer.map.loaded")
    yield tab
    assert tab.errors == [] and foreign == []
    context.close()


def until(page: Any, expression: str) -> None:
    """Waits for an expression to be true (the page's policy forbids playwright's own way)."""
    stop = time.monotonic() + 15
    while not page.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < stop, expression
        time.sleep(0.01)


def center(page: Any, node: int) -> tuple[float, float]:
    """A point of the label of a cell, on the page."""
    box = page.evaluate(f"explorer.map.cells.find(c => c.node.id === {node}).box")
    canvas = page.locator("#map").bounding_box()
    return canvas["x"] + box["x0"] + 12, canvas["y"] + box["y0"] + 6


def first_image(page: Any) -> tuple[int, float, float]:
    """The first image of the first cluster: its row, and where it is."""
    row, x, y = page.evaluate(
        """() => { const m = explorer.map, c = m.cells.find(c => c.leaf);
                   return [m.tree.order[c.node.start], ...m.spot(c, 0)]; }"""
    )
    canvas = page.locator("#map").bounding_box()
    return row, canvas["x"] + x + 8, canvas["y"] + y + 8


def shot(page: Any) -> np.ndarray:
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.asarray(Image.open(io.BytesIO(page.locator("#map").screenshot()))).astype(int)[
        ..., :3
    ]


@pytest.mark.browser
def test_the_browser_lays_out_as_python_does(page: Any, gallery: Gallery) -> None:
    tree = gallery.views["view0"].tree
    width, height = page.evaluate(
        "[explorer.map.canvas.clientWidth, explorer.map.canvas.clientHeight]"
    )
    for k, thumb, rule in (
        (8, 32, "breadth"),
        (20, 17, "min_merging_distance"),
        (13, 41, "max_node_count"),
    ):
        page.evaluate(f"explorer.map.set({{k: {k}, thumb: {thumb}, rule: '{rule}'}})")
        cells = layout(tree, None, width, height, thumb, k, rule=rule)  # type: ignore[arg-type]
        found = page.evaluate(CELLS)
        assert [cell[0] for cell in found] == [cell.node for cell in cells]
        for ours, theirs in zip(cells, found, strict=True):
            assert theirs[1:] == pytest.approx([ours.box.x0, ours.box.y0, ours.box.x1, ours.box.y1])
        images = [int(row) for cell in cells for row in cell.images]
        assert sorted(page.evaluate("[...explorer.map.rows()]")) == sorted(images)


@pytest.mark.browser
def test_zoom_in_and_out_restores_the_root(page: Any, gallery: Gallery) -> None:
    before = page.evaluate(CELLS)
    page.evaluate("explorer.map.set({k: 5, thumb: 40})")
    sliders = page.evaluate(CELLS)
    inner = page.evaluate("explorer.map.cells.find(c => c.leaf).node.id")
    page.mouse.click(*center(page, inner))
    until(page, f"explorer.map.root === {inner}")
    assert sum(cell[0] == inner for cell in page.evaluate(CELLS)) == 1
    assert page.locator("#path button").count() == 1
    page.mouse.click(*center(page, inner))  # its frame is the outermost one now
    until(page, "explorer.map.root === explorer.tree.root")
    assert page.evaluate(CELLS) == sliders
    page.evaluate("explorer.map.set({k: 8, thumb: 32})")
    assert page.evaluate(CELLS) == before


@pytest.mark.browser
def test_a_zoom_is_animated_unless_motion_is_reduced(page: Any) -> None:
    inner = page.evaluate("explorer.map.cells.find(c => c.leaf).node.id")
    page.evaluate(f"explorer.map.zoomIn({inner})")
    assert page.evaluate("explorer.map.animation") is None
    page.emulate_media(reduced_motion="no-preference")
    seconds = page.evaluate(
        "(async () => { const t = performance.now(); await explorer.map.zoomOut();"
        "return (performance.now() - t) / 1000; })()"
    )
    assert 0.7 < seconds < 3.0


@pytest.mark.browser
def test_sliders_change_the_layout_and_not_the_root(page: Any) -> None:
    assert (page.locator("#k").input_value(), page.locator("#thumb").input_value()) == ("8", "32")
    for name, low, high in (("k", "2", "20"), ("thumb", "15", "50")):
        slider = page.locator(f"#{name}")
        assert (slider.get_attribute("min"), slider.get_attribute("max")) == (low, high)
    inner = page.evaluate("explorer.map.cells.find(c => c.leaf && c.node.count > 50).node.id")
    page.evaluate(f"explorer.map.zoomIn({inner})")
    page.locator("#k").fill("3")
    until(page, "explorer.map.cells.filter(c => c.leaf).length === 3")
    assert page.evaluate("explorer.map.root") == inner
    assert page.locator("#k-value").inner_text() == "3"


@pytest.mark.browser
def test_labels_and_tooltips(page: Any, gallery: Gallery) -> None:
    tree = gallery.views["view0"].tree
    assert page.evaluate("explorer.label(explorer.map.node)") == (
        f"{COUNT} images, {100 * (tree.accuracy(tree.root) or 0):.1f} % accuracy"
    )
    leaf = page.evaluate("explorer.map.cells.find(c => c.leaf).node.id")
    page.mouse.move(*center(page, leaf))
    tip = page.locator("#tip")
    assert tip.inner_text().endswith("click to go in")
    assert tip.inner_text().startswith(
        f"{tree.count[leaf]} images, {100 * (tree.accuracy(leaf) or 0):.1f} %"
    )
    page.mouse.move(*center(page, tree.root))
    assert tip.inner_text().endswith("this is everything")
    page.evaluate(f"explorer.map.zoomIn({leaf})")
    page.mouse.move(*center(page, leaf))
    page.mouse.move(*(v + 1 for v in center(page, leaf)))
    assert tip.inner_text().endswith("click to go back")
    row, x, y = first_image(page)
    page.mouse.move(x, y)
    assert tip.inner_text().startswith(f"image {row}\ntrue: ")


@pytest.mark.browser
def test_details_and_similar_images(page: Any, gallery: Gallery) -> None:
    row, x, y = first_image(page)
    page.mouse.click(x, y)
    page.locator("#details").wait_for(state="visible")
    far, near = gallery.views["view0"].similar(row)
    items = page.locator("#similar li")
    assert items.count() == 12
    shown = [float(text) for text in items.locator("span").all_inner_texts()]
    assert shown == pytest.approx(far, rel=6e-3)
    facts = page.locator("#facts dd").all_inner_texts()
    assert facts[:2] == [str(row), gallery.collection.names[row]]
    tree = gallery.views["view0"].tree
    assert tree.y_true is not None and tree.y_pred is not None
    assert facts[2] == gallery.collection.classes[tree.y_true[row]]
    page.mouse.move(0, 0)
    items.nth(0).hover()
    assert page.evaluate("explorer.map.marked") == near[0]
    assert page.evaluate("[...explorer.map.highlight]") == [row, *near.tolist()]
    wrong = int(np.flatnonzero(tree.y_true != tree.y_pred)[5])
    page.evaluate(f"explorer.details({wrong})")
    page.locator("#enlarged.wrong").wait_for()
    assert "wrong" in page.locator("#facts dd").nth(3).inner_text()
    page.locator("#details-close").click()
    assert page.locator("#details").is_hidden() and page.evaluate("explorer.map.highlight") is None


@pytest.mark.browser
def test_hovering_highlights_similar_images(page: Any, gallery: Gallery) -> None:
    row, x, y = first_image(page)
    page.locator("#similar-hover").check()
    plain = shot(page)
    page.mouse.move(x, y)
    until(page, "explorer.map.highlight !== null")
    assert set(page.evaluate("[...explorer.map.highlight]")) == {
        row, *gallery.views["view0"].similar(row)[1].tolist(),
    }  # fmt: skip
    # The last one that is faded: far from the tooltip.
    other = page.evaluate(
        """() => { const m = explorer.map; let last = null;
             for (const c of m.cells) if (c.leaf) for (let i = 0; i < c.images; i++)
               if (!m.opaque(m.tree.order[c.node.start + i * c.stride])) last = m.spot(c, i);
             return last.map(Math.round); }"""
    )
    faded, before = (
        image[other[1] + 4 : other[1] + 28, other[0] + 4 : other[0] + 28]
        for image in (shot(page), plain)
    )
    # At a quarter of the opacity a black-and-white digit keeps a quarter of its contrast.
    assert np.ptp(faded) == pytest.approx(0.25 * np.ptp(before), abs=25)
    page.mouse.move(5, 5)
    until(page, "explorer.map.highlight === null")


@pytest.mark.browser
def test_misclassified_images_are_outlined_and_focused(page: Any, gallery: Gallery) -> None:
    red = lambda image: ((image[..., 0] > 190) & (image[..., 1] < 60)).sum()  # noqa: E731
    assert red(shot(page)) == 0
    page.locator("#outline-wrong").check()
    wrongs = page.evaluate("[...explorer.map.rows()].filter(row => explorer.isWrong(row)).length")
    assert wrongs > 20
    # A frame two pixels wide around 30 pixels, and the notch that needs no colour.
    assert red(shot(page)) > wrongs * 150
    page.locator("#focus-wrong").check()
    tree = gallery.views["view0"].tree
    assert tree.y_true is not None and tree.y_pred is not None
    opaque = page.evaluate("[...explorer.map.rows()].filter(row => explorer.map.opaque(row))")
    rows = page.evaluate("[...explorer.map.rows()]")
    assert opaque == [row for row in rows if tree.y_true[row] != tree.y_pred[row]]


@pytest.mark.browser
def test_a_class_has_its_own_map_and_clearing_restores(page: Any, gallery: Gallery) -> None:
    inner = page.evaluate("explorer.map.cells.find(c => c.leaf && c.node.count > 50).node.id")
    page.evaluate(f"explorer.map.zoomIn({inner})")
    before = page.evaluate(CELLS)
    page.locator("#class").fill("digit 4")
    until(page, "explorer.which === '4' && explorer.map.tree === explorer.tree")
    labels = gallery.collection.labels
    assert labels is not None
    assert page.evaluate("explorer.tree.size") == (labels == 4).sum()
    until(page, "[...explorer.map.rows()].every(row => explorer.truth[row] === 4)")
    page.locator("#class-clear").click()
    until(page, f"explorer.which === 'all' && explorer.map.root === {inner}")
    until(page, "explorer.map.cells[0].node.id === explorer.map.root")
    assert page.evaluate(CELLS) == before


@pytest.mark.browser
def test_the_class_table(page: Any, gallery: Gallery) -> None:
    tree = gallery.views["view0"].tree
    assert tree.y_true is not None and tree.y_pred is not None
    inner = page.evaluate("explorer.map.cells.find(c => c.leaf && c.node.count > 50).node.id")
    page.evaluate(f"explorer.map.zoomIn({inner})")
    until(page, f"explorer.map.root === {inner}")
    members = tree.members(inner)
    table = class_table(tree.y_true[members], tree.y_pred[members], 10)
    for row in page.evaluate("explorer.classRows(explorer.map.node)"):
        c = row["c"]
        assert (row["actual"], row["predicted"]) == (table.actual[c], table.predicted[c])
        assert row["accuracy"] == pytest.approx(table.accuracy[c])
        assert row["missed"] == pytest.approx(table.false_negative_rate[c])
        assert row["claimed"] == pytest.approx(table.false_positive_rate[c])
    summary = page.locator("#table-summary").inner_text()
    assert f"{len(members)} images, {100 * len(members) / COUNT:.1f} % of all" in summary

    def column(number: int) -> list[float]:
        cells = page.locator(f"#table-body td:nth-child({number})").all_inner_texts()
        return [float(text.removesuffix(" %")) for text in cells]

    for number in range(2, 7):
        page.locator(f"#table-head th:nth-child({number})").click()
        first = column(number)
        page.locator(f"#table-head th:nth-child({number})").click()
        second = column(number)
        assert sorted([first, second]) == sorted([sorted(first), sorted(first, reverse=True)])
    page.locator("#table-search").fill("digit 7")
    assert page.locator("#table-body tr td:first-child").all_inner_texts() == ["digit 7"]
    page.locator("#table-body td:nth-child(5)").hover()
    missed = page.evaluate("[...explorer.map.rows()].filter(row => explorer.map.highlight(row))")
    shown = page.evaluate("[...explorer.map.rows()]")
    assert missed == [r for r in shown if tree.y_true[r] == 7 and tree.y_pred[r] != 7]


@pytest.mark.browser
def test_the_keyboard_does_everything(page: Any) -> None:
    page.locator("#map").focus()
    page.keyboard.press("ArrowDown")
    start = page.evaluate("explorer.map.focus")
    reached = {start}
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp") * 4:
        page.keyboard.press(key)
        reached.add(page.evaluate("explorer.map.focus"))
    assert len(reached) >= 4
    assert "images" in page.locator("#live").inner_text()
    focused = page.evaluate("explorer.map.focus")
    page.keyboard.press("s")
    count = page.evaluate(f"explorer.tree.get({focused}).count")
    assert page.evaluate("explorer.count") == count
    page.keyboard.press("Enter")
    until(page, f"explorer.map.root === {focused}")
    page.keyboard.press("Escape")
    until(page, "explorer.map.root === explorer.tree.root")
    until(page, f"explorer.map.focus === {focused}")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator("#details").wait_for(state="visible")
    row = page.evaluate(
        f"""() => {{ const m = explorer.map, c = m.cells.find(c => c.node.id === {focused});
                     return m.tree.order[c.node.start + c.stride]; }}"""
    )
    assert page.locator("#facts dd").first.inner_text() == str(row)


@pytest.mark.browser
def test_a_selection_is_exported(page: Any, tmp_path: Path) -> None:
    inner = page.evaluate("explorer.map.cells.find(c => c.leaf).node.id")
    rows = sorted(page.evaluate(f"[...explorer.rowsOf(explorer.tree.get({inner}))]"))
    page.evaluate(f"explorer.map.zoomIn({inner})")
    until(page, f"explorer.map.root === {inner}")
    assert page.locator("#export").is_disabled()
    page.locator("#select-cluster").click()
    assert page.locator("#selected").inner_text() == str(len(rows))
    with page.expect_download() as download:
        page.locator("#export").click()
    download.value.save_as(tmp_path / "selection.parquet")
    assert sorted(read_selection(tmp_path / "selection.parquet").kept.tolist()) == rows
    with page.expect_download() as download:
        page.locator("#export-names").click()
    download.value.save_as(tmp_path / "names.json")
    names = json.loads((tmp_path / "names.json").read_text())
    assert [entry["row"] for entry in names] == rows
    row, x, y = first_image(page)
    page.keyboard.down("Shift")
    page.mouse.click(x, y)
    page.keyboard.up("Shift")
    assert page.evaluate(f"explorer.selected[{row}]") == 0
    page.locator("#select-none").click()
    assert page.locator("#selected").inner_text() == "0"


@pytest.mark.browser
def test_names_are_searched_and_selected(page: Any) -> None:
    page.locator("#search").fill("digits/12")
    until(page, "explorer.found?.size === 11")
    page.locator("#select-highlighted").click()
    assert page.locator("#selected").inner_text() == "11"
    page.locator("#search").fill("")
    until(page, "explorer.map.highlight === null")


@pytest.mark.browser
def test_another_network_is_chosen(page: Any, gallery: Gallery) -> None:
    page.locator("#view").select_option("view1")
    until(page, "explorer.map.tree === explorer.trees.get('view1/all')")
    order = page.evaluate("[...explorer.tree.order]")
    assert order == gallery.views["view1"].tree.order.tolist()
    assert page.locator("#table").is_hidden() and page.locator("#outline-wrong").is_hidden()
    assert page.evaluate("explorer.label(explorer.map.node)") == f"{COUNT} images"


@pytest.mark.browser
def test_names_are_text_and_never_markup(page: Any, gallery: Gallery) -> None:
    for row in (0, 1, 2):
        page.evaluate(f"explorer.details({row})")
        until(page, f"explorer.detailed === {row} && !document.getElementById('details').hidden")
        assert page.locator("#facts dd").nth(1).inner_text() == gallery.collection.names[row]
    page.locator("#table-search").fill("onerror")
    assert EVIL in page.locator("#table-body").inner_text()
    nine = int(np.flatnonzero(gallery.collection.labels == 9)[0])  # type: ignore[arg-type]
    page.evaluate(f"explorer.details({nine})")
    assert page.evaluate("document.title") == f"digits {EVIL} – explorer"
    assert page.locator("img").count() == 1 and page.locator("script").count() == 1
    assert page.locator("#title").inner_text() == f"digits {EVIL}"


@pytest.mark.browser
def test_events_of_the_component(page: Any) -> None:
    page.evaluate(
        """() => { window.seen = []; for (const name of ["imageclick", "imageenter", "imageleave",
             "clusterclick", "clusterenter", "clusterleave"])
             explorer.map.addEventListener(name, (e) => seen.push([name, e.detail.row ?? -1])); }"""
    )
    row, x, y = first_image(page)
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    page.mouse.move(3, 3)
    leaf = page.evaluate("explorer.map.cells.find(c => c.leaf).node.id")
    page.mouse.click(*center(page, leaf))
    seen = page.evaluate("seen")
    assert (
        ["imageclick", row] in seen and ["imageenter", row] in seen and ["imageleave", row] in seen
    )
    assert {name for name, _ in seen} >= {"clusterclick", "clusterenter", "clusterleave"}


@pytest.mark.browser
def test_a_narrow_screen_is_not_overflown(page: Any) -> None:
    for width in (360, 1000):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_a_written_gallery_works_on_any_web_server(
    gallery: Gallery, tmp_path: Path, browser: Any
) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    export(gallery, tmp_path / "site")
    with pytest.raises(InputError, match="not an empty folder"):
        export(gallery, tmp_path / "site")
    files = StaticFiles(directory=tmp_path / "site", html=True)
    served = Served(Starlette(routes=[Mount("/", files)]))
    context = browser.new_context(viewport={"width": 1000, "height": 700}, reduced_motion="reduce")
    tree = gallery.views["view0"].tree
    try:
        tab = context.new_page()
        errors: list[str] = []
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(served.address)
        until(tab, READY)
        tab.evaluate("explorer.map.loaded")
        root = tree.root
        for _ in range(5):
            root = tab.evaluate(
                """async () => { const m = explorer.map;
                     const c = m.cells.filter(c => c.leaf && c.node.count > 1)
                       .sort((a, b) => b.node.count - a.node.count)[0];
                     if (c) await m.zoomIn(c.node.id); return m.root; }"""
            )
        assert sorted(tab.evaluate("[...explorer.rowsOf(explorer.map.node)]")) == sorted(
            tree.members(root).tolist()
        )
        tab.evaluate("explorer.details(300)")
        tab.locator("#details").wait_for(state="visible")
        found = [float(text) for text in tab.locator("#similar li span").all_inner_texts()]
        assert found == pytest.approx(gallery.views["view0"].similar(300)[0], rel=6e-3)
        tab.locator("#class").fill("digit 2")
        until(tab, "explorer.which === '2'")
        assert errors == []
    finally:
        context.close()
        served.close()


def test_a_written_tree_needs_no_viewer(gallery: Gallery, tmp_path: Path) -> None:
    gallery.views["view0"].tree.to_json(tmp_path / "tree.json")
    again = Dendrogram.from_json(tmp_path / "tree.json")
    assert again.filenames == gallery.collection.names and again.classes[9] == EVIL


def test_selections_count_from_zero(gallery: Gallery) -> None:
    assert selection_of(gallery, [[0, 2]]).names[0] == f"{EVIL}.png"


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command."""
    import gossamer.cli  # noqa: F401 (registers the commands)
    from gossamer.cli.front import main

    monkeypatch.setattr("sys.argv", ["gossamer", "data", "explore", *arguments])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one's own: two classes, grey and colour, a broken file, an evil name."""
    root = tmp_path_factory.mktemp("data") / "photos"
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for number in range(12):
            shape = (24, 24, 3) if number % 2 else (30, 20)
            Image.fromarray(draw.integers(0, 255, shape, np.uint8)).save(
                root / label / f"{number}.png"
            )
    (root / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n")
    os.rename(root / "dog" / "3.png", root / "dog" / "<img src=x onerror=alert(1)>.png")
    return root


def test_the_command_writes_a_site_and_a_tree(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = run(
        monkeypatch,
        str(photos), "--export", str(tmp_path / "site"), "--tree", str(tmp_path / "tree.json"),
        "--json", "--cache", str(tmp_path / "cache"),
    )  # fmt: skip
    done = capsys.readouterr()
    assert code == 0, done.err
    record = json.loads(done.out)
    assert (record["images"], record["classes"]) == (24, 2)
    assert [skip["name"] for skip in record["skipped"]] == ["cat/broken.png"]
    assert record["views"][0]["route"] == "vectors" and record["views"][0]["name"] == "pixels"
    tree = Dendrogram.from_json(tmp_path / "tree.json")
    assert tree.size == 24 and tree.classes == ("cat", "dog")
    assert (tmp_path / "site" / "index.html").exists()
    meta = json.loads((tmp_path / "site" / "data" / "meta.json").read_text())
    assert meta["static"] and meta["count"] == 24 and meta["skipped"] == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["{empty}"], "holds no images"),
        (["{none}"], "no folder of images"),
        (["{photos}", "--model", "resnet18"], "untrained"),
        (["{photos}", "--features", "{none}"], "does not exist"),
        (["{photos}", "--features", "{short}"], "but there are 24 images"),
        (["{photos}", "--features", "{short}", "--model", "resnet18"], "not both"),
        (["{photos}", "--limit", "0"], "at least 1"),
        (["{photos}", "--port", "99999"], "0 to 65535"),
        (["{photos}", "--host", "203.0.113.7"], "cannot listen"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    sentence: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "short.npy", np.zeros((5, 2)))
    places = {
        "{empty}": str(tmp_path / "empty"), "{none}": str(tmp_path / "none"),
        "{photos}": str(photos), "{short}": str(tmp_path / "short.npy"),
    }  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert run(monkeypatch, *(places.get(word, word) for word in arguments)) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_network_shows_its_features_and_errors(tmp_path: Path, monkeypatch: Any) -> None:
    import gossamer.cli  # noqa: F401 (registers the commands)
    from gossamer.cli.explore import explore
    from gossamer.core.task import Classification
    from gossamer.data import explorer_server
    from gossamer.datasets import open_task
    from gossamer.models import build

    served: list[Gallery] = []
    monkeypatch.setattr(explorer_server, "serve", lambda gallery, **_: served.append(gallery))
    task = open_task("digits")
    assert isinstance(task, Classification)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build("gossamer_digits_resnet", classes=10, channels=1).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    explore(
        "digits",
        model=["gossamer_digits_resnet"],
        weights=[tmp_path / "weights.pt"],
        limit=200,
        cache=tmp_path / "cache",
        port=0,
    )
    (view,) = served[0].views.values()
    collection = served[0].collection
    with torch.inference_mode():
        logits = network(collection.preprocess()(collection.fetch(np.arange(200))))
    assert view.tree.y_pred is not None and view.tree.y_pred.tolist() == logits.argmax(1).tolist()
    assert view.features.shape[1] == network.get_classifier().in_features  # type: ignore[operator]
