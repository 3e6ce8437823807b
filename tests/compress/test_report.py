"""The report: its numbers are the JSON's, nothing in it can run, and a browser shows it offline."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gossamer.compress.report import _ticks, page

EVIL = "<img src=x onerror=\"document.title='owned'\">'&\u2028</script><script>alert(1)</script>"


def trial(number: int, score: float | None, latency: float, **other: Any) -> dict[str, Any]:
    return {
        "number": number, "rung": 0, "score": score, "latency": latency, "size": 1e5 + number,
        "speedup": 2.0 / latency, "broken": [], "failed": None, "on_front": False, "chosen": False,
        "recipe": {"steps": [{"prune": {"macs": 0.5}}, {"finetune": {"epochs": 2}}]},
    } | other  # fmt: skip


def layer(name: str, before: int, after: int | None) -> dict[str, Any]:
    def costs(n: int) -> dict[str, Any]:
        return {"macs": 10 * n, "parameters": n, "output": [1, n, 8, 8]}

    return {
        "module": name,
        "before": costs(before),
        "after": None if after is None else costs(after),
    }


REPORT: dict[str, Any] = {
    "model": {"model": "some_net"},
    "task": {
        "name": "pets", "metric": "top-1 accuracy (%)", "classes": ["cat", "dog"],
        "samples": {"train": 100, "validation": 20, "test": 50},
    },
    "budget": {"macs": {"value": 0.5, "relative": True}, "max_drop": 1.0},
    "before": {
        "score": 97.5, "validation_score": 98.0, "macs": 1_648_256, "params": 174_970,
        "bytes": 704_837, "peak_memory_bytes": 13_578_240, "energy_joules": None,
        "latency_ms": {"p50": 2.0, "p95": 6.125, "batch": 64, "threads": 1, "spread": 0.2},
    },
    "after": {
        "score": 97.25, "validation_score": 97.0, "macs": 802_960, "params": 81_002,
        "bytes": 96_959, "peak_memory_bytes": 12_460_032, "energy_joules": None,
        "latency_ms": {"p50": 0.875, "p95": 5.0, "batch": 64, "threads": 1, "spread": 0.4},
    },
    "speedup": {"ratio": 2.21, "low": 1.6, "high": 6.3, "winner": "after"},
    "recipe": {"steps": [{"prune": {"macs": 0.5}}]},
    "recipe_yaml": "steps:\n- prune:\n    macs: 0.5\n- finetune:\n    epochs: 9\n",
    "steps": [
        {
            "step": "prune",
            "options": {"macs": 0.5, "criterion": "l2"},
            "report": {"macs": [10, 5], "rounds": [{"removed": {"conv": "8 of 16"}}]},
        }
    ],
    "runtime": "onnxruntime",
    "layers": [layer("stem", 100, 50), layer("body.0", 400, 100), layer("body.1", 400, None)],
    "classes": {"before": {"cat": 98.0, "dog": 97.0}, "after": {"cat": 97.0, "dog": 97.5}},
    "trials": [
        trial(0, 90.0, 1.0, on_front=True),
        trial(1, 95.0, 1.5, on_front=True, chosen=True),
        trial(2, 80.0, 1.75),
        trial(3, None, 1.0, failed="the loss became nan", speedup=None),
    ],
    "verified": True,
    "checks": {"surgery": [True, True], "agreement": 0.9875},
    "seconds": 12.0, "date": "2026-01-01", "device": "a machine", "threads": 1, "seed": 7,
    "versions": {"python": "3.11", "torch": "2.11"},
}  # fmt: skip


def changed(**parts: Any) -> dict[str, Any]:
    return copy.deepcopy(REPORT) | parts


def row(text: str, key: str) -> list[str]:
    (found,) = re.findall(rf'<tr data-row="{key}">(.*?)</tr>', text)
    return re.findall(r"<td[^>]*>([^<]*)</td>", found)


def test_the_table_holds_the_numbers() -> None:
    text = page(REPORT)
    assert row(text, "score")[:3] == ["97.50", "97.25", "-0.25"]
    assert row(text, "macs")[:3] == ["1,648,256", "802,960", "0.487"]
    assert row(text, "params")[:3] == ["174,970", "81,002", "0.463"]
    assert row(text, "bytes")[:3] == ["704,837", "96,959", "0.138"]
    assert row(text, "p50")[:3] == ["2.000", "0.875", "0.438"]
    assert row(text, "p95")[:3] == ["6.125", "5.000", "0.816"]
    assert row(text, "memory")[:3] == ["13,578,240", "12,460,032", "0.918"]
    assert 'data-row="energy"' not in text, "what was not read is not shown"


def test_energy_is_shown_where_it_was_read() -> None:
    before, after = REPORT["before"], REPORT["after"]
    text = page(
        changed(before=before | {"energy_joules": 0.5}, after=after | {"energy_joules": 0.125})
    )
    assert row(text, "energy")[:3] == ["0.5", "0.125", "0.250"]


def test_noise_is_called_noise() -> None:
    assert "no winner inside the noise" not in page(REPORT)
    assert "no winner inside the noise" in page(
        changed(speedup=REPORT["speedup"] | {"winner": None})
    )


def waterlined(*layers: tuple[str, float, float, float]) -> dict[str, Any]:
    return {
        "dtype": "float32", "batch": 1, "operations": sum(n for _, n, _, _ in layers),
        "ideal_ms": 1.0, "best_ms": 1.25, "bound": 0.8, "latency_ms": 4.0, "efficiency": 0.25,
        "layers": [
            {"module": m, "operations": n, "intensity": i, "ridge": r, "memory": "L2"}
            for m, n, i, r in layers
        ],
    }  # fmt: skip


def test_the_roofline_is_drawn_before_and_after() -> None:
    assert 'id="roofline"' not in page(REPORT), "a report without one has no hole"
    assert 'id="roofline"' not in page(changed(roofline=None))
    before = waterlined(("stem", 300.0, 10.0, 4.0), (EVIL, 100.0, 1.0, 4.0))
    after = waterlined(("stem", 200.0, 8.0, 4.0))
    text = page(
        changed(
            roofline={"device": "a machine", "source": "measured", "before": before, "after": after}
        )
    )
    section = text[text.index('id="roofline"') : text.index("</section>", text.index('"roofline"'))]
    bars = re.findall(
        r'<rect class="water( bound)?" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', section
    )
    # 688 units wide for the 400 operations before; both panels on one scale.
    assert [(kind, float(width)) for kind, _, _, width in bars] == [
        ("", 516.0), (" bound", 172.0), ("", 344.0),
    ]  # fmt: skip
    assert float(bars[1][1]) == float(bars[0][1]) + 516.0
    assert float(bars[0][2]) < float(bars[2][2]) < float(bars[1][2]), "higher is more intense"
    assert section.count("best efficiency 0.800, measured 0.250") == 4  # drawn, and read aloud
    assert EVIL not in section and "<script>" not in section


def test_what_is_not_verified_says_so() -> None:
    assert "not verified" not in page(REPORT).lower()
    assert "✗ not verified" in page(changed(verified=False))


def test_a_given_recipe_was_not_searched() -> None:
    text = page(changed(trials=[]))
    assert "nothing was searched" in text and 'id="trials"' not in text


def test_missing_parts_leave_no_hole() -> None:
    text = page(changed(classes={}, layers=[], trials=[trial(0, None, 1.0, failed="no")]))
    assert "Accuracy of each class" not in text
    assert "trial 0: no" in text


def test_removed_layers_keep_their_proportions() -> None:
    text = page(REPORT)
    stem, first, second = re.findall(r'<tr><th scope="row">(?:stem|body\.\d).*?</tr>', text)
    widths = [re.findall(r'width:([\d.]+)%"', part)[:2] for part in (stem, first, second)]
    assert widths == [["12.50", "12.50"], ["25.00", "75.00"], ["0.00", "100.00"]]
    assert "gone" in second and "gone" not in first


def test_many_classes_show_those_that_changed_most() -> None:
    before = {f"class {n}": 90.0 for n in range(100)}
    after = {f"class {n}": 90.0 - n / 10 for n in range(100)}
    text = page(changed(classes={"before": before, "after": after}))
    shown = text[text.index("Accuracy of each class") : text.index("All 100 classes")]
    names = re.findall(r'scope="row">(class \d+)', shown)
    assert names == [f"class {n}" for n in range(70, 100)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (97.2, 99.1, [97.5, 98.0, 98.5, 99.0]),
        (0.031, 0.049, [0.035, 0.04, 0.045]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(expected)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def everywhere(value: Any) -> Any:
    """The value with all its texts, keys too, replaced by markup; what code looks up is kept."""
    keys = set(REPORT) | set(REPORT["before"]) | set(REPORT["before"]["latency_ms"])
    keys |= (
        set(REPORT["task"]) | set(REPORT["speedup"]) | set(REPORT["checks"]) | {"step", "options"}
    )
    keys |= {"report", "module", "output", "parameters", "relative", "value", "max_drop", "name"}
    keys |= set(trial(0, 1.0, 1.0)) | set(REPORT["task"]["samples"])
    if isinstance(value, dict):
        return {k if k in keys else f"{k}{EVIL}": everywhere(v) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v) for v in value]
    return f"{value}{EVIL}" if isinstance(value, str) else value


def test_no_text_becomes_markup() -> None:
    evil = everywhere(REPORT)
    text = page(evil)
    assert EVIL not in text
    tags = Tags()
    tags.feed(text)
    plain = Tags()
    plain.feed(page(REPORT))
    assert [tag for tag, _ in tags.tags] == [tag for tag, _ in plain.tags]
    for tag, attributes in tags.tags:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        assert tag == "link" or not {"src", "href"} & set(attributes)
    assert len([tag for tag, _ in tags.tags if tag == "script"]) == 1


def test_the_page_needs_nothing_else() -> None:
    text = page(REPORT)
    assert len(text) < 60_000
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert "default-src 'none'" in text


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


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a report from disk; at the end there were no errors and no requests."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    tab = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))

    def show(report: dict[str, Any]) -> Any:
        path = tmp_path / "report.html"
        path.write_text(page(report), encoding="utf-8")
        tab.goto(path.as_uri())
        return tab

    yield show
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == 1
    context.close()


@pytest.mark.browser
def test_a_browser_shows_the_numbers(opened: Any) -> None:
    tab = opened(json.loads(json.dumps(REPORT)))
    cells = tab.locator("#before-after tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    )
    shown = {line[0]: line[1:3] for line in cells}
    assert shown["MACs of one sample"] == ["1,648,256", "802,960"]
    assert shown["latency p50, ms a batch of 64"] == ["2.000", "0.875"]
    assert shown["top-1 accuracy (%), test split"] == ["97.50", "97.25"]


@pytest.mark.browser
def test_a_trial_shows_its_values_under_the_pointer_and_the_keyboard(opened: Any) -> None:
    tab = opened(REPORT)
    tip = tab.locator("#tip")
    assert tip.is_hidden()
    tab.locator("#trials .mark.chosen").hover()
    said = tip.inner_text().splitlines()
    assert said[:4] == [
        "trial 1, rung 0 (front, chosen, latency measured)",
        "score 95.00",
        "1.500 ms",
        "100,001 bytes",
    ]
    assert said[4] == "prune(macs 0.5) → finetune(epochs 2)"
    tab.keyboard.press("Escape")
    assert tip.is_hidden()
    marks = tab.locator("#trials .mark")
    assert marks.count() == 5, "three scored trials, the original and the result"
    marks.last.focus()
    assert tip.inner_text().startswith("the result, trained to its end\nscore 97.00")
    tab.keyboard.press("Shift+Tab")
    assert tip.inner_text().startswith("the original\nscore 98.00\n2.000 ms")
    boxes = [marks.nth(n).bounding_box() for n in range(5)]
    assert all(box["width"] > 6 and box["x"] >= 0 for box in boxes)


@pytest.mark.browser
def test_the_recipe_is_copied(opened: Any) -> None:
    tab = opened(REPORT)
    from playwright.sync_api import expect

    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for script in (
        # The second time without the clipboard's new interface: copied the old way.
        "void 0",
        "void (navigator.clipboard.writeText = async () => { throw new Error('refused'); })",
    ):
        tab.evaluate("navigator.clipboard.write([])")
        tab.evaluate(script)
        tab.locator("#copy").click()
        expect(tab.locator("#copy")).to_have_text("Copied")
        assert (
            tab.evaluate("navigator.clipboard.readText()").strip() == REPORT["recipe_yaml"].strip()
        )
        expect(tab.locator("#copy")).to_have_text("Copy")


@pytest.mark.browser
def test_injected_markup_does_not_run(opened: Any) -> None:
    tab = opened(everywhere(REPORT))
    assert "owned" not in tab.evaluate("document.title").replace(EVIL, "")
    assert tab.locator("img, iframe").count() == 0
    assert tab.locator("script").count() == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1000])
def test_the_page_is_not_wider_than_the_screen(opened: Any, width: int) -> None:
    tab = opened(REPORT)
    tab.set_viewport_size({"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
