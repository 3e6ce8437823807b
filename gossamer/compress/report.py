"""The report of a run as one HTML page that needs nothing else: no network, no other file.

Everything is drawn here as HTML and SVG; the script in the page only shows values under the
pointer and copies the recipe. Names of classes, layers and files are the user's: all text is
escaped, and a content policy admits the page's own script alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CLASSES_SHOWN = 30
LAYERS_SHOWN = 80


def page(report: Mapping[str, Any]) -> str:
    """Draws a report.

    Args:
        report: as in ``report.json``.

    Returns:
        The page.
    """
    model = str(report["model"].get("model", "network"))
    title = f"{model} on {report['task']['name']}"
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{_digest(_SCRIPT)}'"
    )
    sections = (
        _summary(report),
        _before_after(report),
        _trials(report),
        _layers(report["layers"]),
        _roofline(report.get("roofline")),
        _classes(report),
        _recipe(report),
        _verification(report),
        _circumstances(report),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}: gossamer</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kind">gossamer shrink</p><h1>{escape(title)}</h1></header>\n'
        + "\n".join(sections)
        + '\n</main>\n<div id="tip" role="status" hidden></div>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# Numbers ---------------------------------------------------------------------------------------


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _ratio(before: float, after: float) -> str:
    return f"{after / before:.3f}" if before else "-"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _budget(budget: Mapping[str, Any]) -> str:
    said = []
    for name, limit in budget.items():
        if name == "max_drop":
            if limit is not None:
                said.append(f"at most {limit:g} points lost")
        elif limit["relative"]:
            said.append(f"{name} at most {limit['value']:g} of the original")
        else:
            unit = {"size": " bytes", "latency": " ms"}.get(name, "")
            said.append(f"{name} at most {limit['value']:,g}{unit}")
    return "; ".join(said) or "none"


# Sections --------------------------------------------------------------------------------------


def _summary(report: Mapping[str, Any]) -> str:
    before, after, speed = report["before"], report["after"], report["speedup"]
    noise = "" if speed["winner"] else '<span class="note">no winner inside the noise</span>'
    tiles = [
        (f"{after['score'] - before['score']:+.2f}", f"points of {report['task']['metric']}", ""),
        (f"{speed['ratio']:.2f}x", "as fast", noise),
        (_ratio(before["bytes"], after["bytes"]), "of the bytes", ""),
        (_ratio(before["macs"], after["macs"]), "of the MACs", ""),
    ]
    drawn = "".join(
        f"<li><strong>{escape(value)}</strong> {escape(what)}{note}</li>"
        for value, what, note in tiles
    )
    good = report["verified"]
    badge = (
        f'<p class="badge {"good" if good else "bad"}">'
        f"{'✓ verified' if good else '✗ not verified'}</p>"
    )
    return (
        f'<section aria-label="Summary"><ul class="tiles">{drawn}</ul>{badge}'
        f'<p class="note">Budget: {escape(_budget(report["budget"]))}.</p></section>'
    )


def _before_after(report: Mapping[str, Any]) -> str:
    before, after, speed = report["before"], report["after"], report["speedup"]
    old, new = before["latency_ms"], after["latency_ms"]
    threads = f"{new['threads']} thread{'s' if new['threads'] > 1 else ''}"
    rows: list[tuple[str, str, float | None, float | None, str]] = [
        ("macs", "MACs of one sample", before["macs"], after["macs"], "{:,.0f}"),
        *_effective(before, after),
        ("params", "parameters", before["params"], after["params"], "{:,.0f}"),
        ("bytes", "bytes of the ONNX file", before["bytes"], after["bytes"], "{:,.0f}"),
        ("p50", f"latency p50, ms a batch of {new['batch']}", old["p50"], new["p50"], "{:.3f}"),
        ("p95", f"latency p95, ms a batch of {new['batch']}", old["p95"], new["p95"], "{:.3f}"),
        (
            "memory", "peak memory, bytes", before["peak_memory_bytes"],
            after["peak_memory_bytes"], "{:,.0f}",
        ),
        (
            "energy", "energy of a batch, joules", before.get("energy_joules"),
            after.get("energy_joules"), "{:.4g}",
        ),
    ]  # fmt: skip
    split = "test" if report["task"]["samples"].get("test") else "validation"
    drawn = [
        f'<tr data-row="score"><th scope="row">{escape(report["task"]["metric"])}, {split} split'
        f"</th><td>{before['score']:.2f}</td><td>{after['score']:.2f}</td>"
        f"<td>{after['score'] - before['score']:+.2f}</td><td></td></tr>"
    ]
    for key, name, a, b, shape in rows:
        if a is None or b is None:
            continue
        said = _ratio(a, b)
        share = b / a if a else 1.0
        drawn.append(
            f'<tr data-row="{key}"><th scope="row">{escape(name)}</th><td>{shape.format(a)}</td>'
            f"<td>{shape.format(b)}</td><td>{said}</td>"
            f'<td class="bar"><span class="{"kept" if share <= 1 else "more"}" '
            f'style="width:{100 * min(1.0, share):.1f}%"></span></td></tr>'
        )
    said = (
        f"{speed['ratio']:.2f}x as fast ({speed['low']:.2f} to {speed['high']:.2f}), measured in "
        f"turns in ONNX Runtime on {threads}"
    )
    if not speed["winner"]:
        said += "; no winner inside the noise"
    return (
        '<section><h2>Before and after</h2><div class="scroll"><table id="before-after"><thead>'
        '<tr><th scope="col"></th><th scope="col">before</th><th scope="col">after</th>'
        '<th scope="col">ratio</th><th scope="col" aria-label="ratio as a bar"></th></tr></thead>'
        f"<tbody>{''.join(drawn)}</tbody></table></div>"
        f'<p class="note">{escape(said)}. The score\'s change is in points. Everything was '
        f"measured on the exported files after they were loaded again.</p>{_packed(report)}"
        "</section>"
    )


def _effective(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, str, float | None, float | None, str]]:
    """MACs without those of zero weights, where there are any."""
    a, b = before.get("macs_effective"), after.get("macs_effective")
    if (a, b) == (before["macs"], after["macs"]):
        return []
    return [("macs-effective", "MACs of one sample, zero weights skipped", a, b, "{:,.0f}")]


def _packed(report: Mapping[str, Any]) -> str:
    """The packed form beside the ONNX file, in words."""
    packed = report.get("packed")
    if not packed:
        return ""
    speed = packed["speedup"]
    noise = "" if speed["winner"] else ", no winner inside the noise"
    return (
        f'<p id="packed">Packed form: {_bytes(packed["bytes"])} of weights in '
        f"<code>{escape(packed['file'])}</code> (as float32: {_bytes(packed['float_bytes'])}), "
        f"score {packed['score']:.2f}; {speed['ratio']:.2f}x as fast as the original in torch "
        f"({speed['low']:.2f} to {speed['high']:.2f}{noise}).</p>"
    )


def _choices(trial: Mapping[str, Any]) -> str:
    words = []
    for entry in trial["recipe"]["steps"]:
        for name, options in entry.items():
            inner = ", ".join(f"{k} {v}" for k, v in (options or {}).items())
            words.append(f"{name}({inner})" if inner else str(name))
    return " → ".join(words)


def _trials(report: Mapping[str, Any]) -> str:
    trials = report["trials"]
    if not trials:
        said = "The recipe was given, so nothing was searched."
        return f"<section><h2>Search</h2><p>{said}</p></section>"
    scored = [t for t in trials if t["score"] is not None]
    failed = [t for t in trials if t["score"] is None]
    plot = _scatter(report, scored) if scored else ""
    rows = "".join(
        f"<tr><td>{t['number']}</td><td>{t['rung']}</td><td>{t['score']:.2f}</td>"
        + "".join(
            f"<td>{t['latency']:.3f}</td>" if _latency_is(t) == kind else "<td></td>"
            for kind in ("measured", "predicted")
        )
        + f"<td>{_count(t['size'])}</td>"
        f'<td>{_marks(t)}</td><td class="words">{escape(_choices(t))}</td></tr>'
        for t in scored
    )
    lost = "".join(
        f"<li>trial {t['number']}: {escape(str(t.get('failed') or 'not scored'))}</li>"
        for t in failed
    )
    table = (
        '<details><summary>All trials as a table</summary><div class="scroll"><table><thead><tr>'
        + "".join(
            f'<th scope="col">{name}</th>'
            for name in (
                "trial",
                "rung",
                "score",
                "ms, measured",
                "ms, predicted",
                "bytes",
                "",
                "recipe",
            )
        )
        + f"</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
    return (
        f"<section><h2>Search: {len(trials)} trials</h2>{plot}{table}"
        + (f"<p>Trials that failed:</p><ul>{lost}</ul>" if lost else "")
        + "</section>"
    )


def _latency_is(trial: Mapping[str, Any]) -> str:
    return str(trial.get("latency_is", "measured"))


def _marks(trial: Mapping[str, Any]) -> str:
    words = [
        w for w, has in (("front", trial.get("on_front")), ("chosen", trial.get("chosen"))) if has
    ]
    words += ["over budget"] if trial["broken"] else []
    return ", ".join(words)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers between two values."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / wanted))
    step *= next((m for m in (1, 2, 5, 10) if span / (step * m) <= wanted), 10)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _scatter(report: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> str:
    width, height, left, right, top, bottom = 760, 420, 64, 20, 16, 52
    marks: list[dict[str, Any]] = []
    for t in trials:
        kind = "chosen" if t.get("chosen") else "front" if t["on_front"] else "beaten"
        words = [w for w in (_marks(t), f"latency {_latency_is(t)}") if w]
        said = f"trial {t['number']}, rung {t['rung']} ({', '.join(words)})"
        marks.append(
            {
                "x": t["latency"], "y": t["score"], "size": t["size"], "kind": kind,
                "name": said, "recipe": _choices(t),
            }
        )  # fmt: skip
    # Latencies of trials are relative to the dense network's, so all share one scale.
    dense = next((t["latency"] * t["speedup"] for t in trials if t.get("speedup")), None)
    if dense is not None:
        ends = (
            ("dense", "the original", report["before"], dense),
            ("result", "the result, trained to its end", report["after"],
             dense / report["speedup"]["ratio"]),
        )  # fmt: skip
        for kind, name, row, latency in ends:
            marks.append(
                {
                    "x": latency, "y": row["validation_score"], "size": row["bytes"],
                    "kind": kind, "name": name, "recipe": "",
                }
            )  # fmt: skip
    x0, x1 = _range([m["x"] for m in marks])
    x0 = max(0.0, x0)
    y0, y1 = _range([m["y"] for m in marks])
    largest = max(m["size"] for m in marks)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    parts = []
    for x in _ticks(x0, x1, 7):
        px, _ = at(x, y0)
        parts.append(
            f'<line class="grid" x1="{px:.1f}" y1="{top}" x2="{px:.1f}" y2="{height - bottom}"/>'
            f'<text x="{px:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>'
        )
    for y in _ticks(y0, y1):
        _, py = at(x0, y)
        parts.append(
            f'<line class="grid" x1="{left}" y1="{py:.1f}" x2="{width - right}" y2="{py:.1f}"/>'
            f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    metric = escape(f"{report['task']['metric']}, validation")
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2}" y="{height - 10}" '
        'text-anchor="middle">latency, ms a batch (relative to the original measured beside it)'
        f'</text><text class="axis" transform="translate(16 {(top + height - bottom) / 2}) '
        f'rotate(-90)" text-anchor="middle">{metric}</text>'
    )
    # What matters most is drawn last, on top.
    order = ("beaten", "front", "chosen", "dense", "result")
    for mark in sorted(marks, key=lambda m: (order.index(m["kind"]), -m["size"])):
        px, py = at(mark["x"], mark["y"])
        radius = 4.0 + 10.0 * math.sqrt(mark["size"] / largest)
        lines = [
            mark["name"],
            f"score {mark['y']:.2f}",
            f"{mark['x']:.3f} ms",
            f"{_count(mark['size'])} bytes",
            *([mark["recipe"]] if mark["recipe"] else []),
        ]
        parts.append(
            f'<g class="mark {mark["kind"]}" tabindex="0" role="img" '
            f'data-tip="{escape(json.dumps(lines))}" aria-label="{escape(", ".join(lines))}">'
            f"{_shape(mark['kind'], px, py, radius)}</g>"
        )
    legend = "".join(
        f'<li><svg width="22" height="22" aria-hidden="true"><g class="mark {kind}">'
        f"{_shape(kind, 11, 11, 7)}</g></svg>{escape(words)}</li>"
        for kind, words in (
            (
                "front",
                "on the front: no other trial is better in score, latency and bytes together",
            ),
            ("beaten", "beaten by another trial"),
            ("chosen", "chosen for the final training"),
            ("dense", "the original"),
            ("result", "the result"),
        )
        if any(m["kind"] == kind for m in marks)
    )
    return (
        f'<figure><svg id="trials" viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="Trials: score against latency; a larger mark is a larger file">'
        f"{''.join(parts)}</svg>"
        f'<figcaption><ul class="legend">{legend}</ul>A larger mark is a larger file. Point at a '
        "mark, or reach it with the tabulator key, to see its values. Trials of a later rung were "
        "trained for longer.</figcaption></figure>"
    )


def _shape(kind: str, x: float, y: float, r: float) -> str:
    """Kinds differ in shape as well as in colour."""
    if kind == "dense":
        points = [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    elif kind == "result":
        points = [
            (
                x + (r + 2) * (1 if n % 2 == 0 else 0.45) * math.sin(math.pi * n / 5),
                y - (r + 2) * (1 if n % 2 == 0 else 0.45) * math.cos(math.pi * n / 5),
            )
            for n in range(10)
        ]
    elif kind == "chosen":
        points = [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    else:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    return f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    largest = {
        kind: max((row["before"][kind] for row in layers), default=0) or 1
        for kind in ("macs", "parameters")
    }
    counted = [row for row in layers if row["before"]["macs"]]
    small = [row for row in layers if not row["before"]["macs"]]
    shown, more = counted[:LAYERS_SHOWN], counted[LAYERS_SHOWN:] + small
    head = (
        '<thead><tr><th scope="col">layer</th><th scope="col" colspan="2">MACs</th>'
        '<th scope="col" colspan="2">parameters</th></tr></thead>'
    )
    table = '<div class="scroll"><table class="layers">'
    rest = (
        f"<details><summary>{len(more)} more layers (normalisation and others)</summary>{table}"
        f"{head}<tbody>{''.join(_layer(r, largest) for r in more)}</tbody></table></div></details>"
        if more
        else ""
    )
    return (
        '<section><h2>What was removed</h2><p class="legend-line"><span class="swatch kept">'
        '</span> kept <span class="swatch removed"></span> removed</p>'
        f'{table}{head}<tbody id="layers">{"".join(_layer(r, largest) for r in shown)}</tbody>'
        f"</table></div>{rest}</section>"
    )


def _layer(row: Mapping[str, Any], largest: Mapping[str, float]) -> str:
    cells = []
    for kind in ("macs", "parameters"):
        old = row["before"][kind]
        new = row["after"][kind] if row["after"] else 0
        kept = 100 * min(old, new) / largest[kind]
        gone = 100 * max(0, old - new) / largest[kind]
        share = f"{100 * new / old:.0f} %" if old else ""
        lines = [
            row["module"] or "(the network)",
            f"{_count(old)} {'MACs' if kind == 'macs' else kind} before",
            f"{_count(new)} after",
        ]
        cells.append(
            f'<td class="bar" tabindex="0" data-tip="{escape(json.dumps(lines))}" '
            f'aria-label="{escape(", ".join(lines))}">'
            f'<span class="kept" style="width:{kept:.2f}%"></span>'
            f'<span class="removed" style="width:{gone:.2f}%"></span></td>'
            f"<td>{_short(old)} → {_short(new)} <small>{share}</small></td>"
        )
    gone_word = "" if row["after"] else ' <small class="note">gone</small>'
    return (
        f'<tr><th scope="row">{escape(row["module"] or "(the network)")}{gone_word}</th>'
        f"{''.join(cells)}</tr>"
    )


def _roofline(roofline: Mapping[str, Any] | None) -> str:
    """Waterlines before and after: bars of operations by intensity, and what the memory admits."""
    if not roofline:
        return ""
    ends = ("before", "after")
    values = [
        layer[key] for end in ends for layer in roofline[end]["layers"]
        for key in ("intensity", "ridge")
    ]  # fmt: skip
    if not values or min(values) <= 0.0:
        return ""
    low, high = math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.1
    widest = max(roofline[end]["operations"] for end in ends)
    panels = "".join(_waterline(end, roofline[end], low, high, widest) for end in ends)
    rows = (
        ("operations of a call (two a MAC)", "operations", _short),
        ("at the peak rate, ms", "ideal_ms", "{:.3f}".format),
        ("best by the waterline, ms", "best_ms", "{:.3f}".format),
        ("best efficiency", "bound", "{:.3f}".format),
        ("measured in ONNX Runtime, ms", "latency_ms", "{:.3f}".format),
        ("measured efficiency", "efficiency", "{:.3f}".format),
        ("number format", "dtype", str),
    )
    table = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td>{escape(shape(roofline[end][key]))}</td>" for end in ends)
        + "</tr>"
        for name, key, shape in rows
    )
    return (
        '<section id="roofline"><h2>Efficiency</h2>'
        '<p class="note">Each layer is a bar as wide as its operations and as high as its '
        "operations a byte (logarithmic); a bar below the line of its memory is bound by the "
        f"memory. Ceilings of {escape(str(roofline['device']))}, peak rate "
        f"{escape(str(roofline['source']))}.</p>{panels}"
        '<div class="scroll"><table><thead><tr><th scope="col"></th><th scope="col">before</th>'
        f'<th scope="col">after</th></tr></thead><tbody>{table}</tbody></table></div></section>'
    )


def _waterline(
    end: str, record: Mapping[str, Any], low: float, high: float, widest: float
) -> str:  # fmt: skip
    """One panel; both have one scale, so that a smaller network is narrower."""
    width, height, left, top, bottom = 760, 150, 64, 8, 24
    across, up = (width - left - 8) / (widest or 1.0), (height - top - bottom) / (high - low)

    def y(value: float) -> float:
        return height - bottom - (math.log10(value) - low) * up

    parts = [
        f'<line class="grid" x1="{left}" y1="{y(10.0**n):.1f}" x2="{width - 8}" '
        f'y2="{y(10.0**n):.1f}"/><text x="{left - 8}" y="{y(10.0**n) + 4:.1f}" '
        f'text-anchor="end">{10.0**n:g}</text>'
        for n in range(math.ceil(low), math.floor(high) + 1)
    ]
    x, line = float(left), ""
    for layer in record["layers"]:
        wide = layer["operations"] * across
        edge = y(layer["intensity"])
        kind = " bound" if layer["intensity"] < layer["ridge"] else ""
        lines = [
            layer["module"] or "(the network)",
            f"{_short(layer['operations'])} operations",
            f"{layer['intensity']:.2f} operations a byte",
            f"{layer['memory']} admits all from {layer['ridge']:.2f} on",
        ]
        parts.append(
            f'<rect class="water{kind}" x="{x:.2f}" y="{edge:.1f}" width="{max(0.2, wide):.2f}" '
            f'height="{max(0.0, height - bottom - edge):.1f}" '
            f'data-tip="{escape(json.dumps(lines))}"/>'
        )
        ridge = y(layer["ridge"])
        line += f"{'L' if line else 'M'}{x:.2f} {ridge:.1f}L{x + wide:.2f} {ridge:.1f}"
        x += wide
    return (
        f'<figure><svg class="waterline" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Waterline {end}: best efficiency {record["bound"]:.3f}, measured '
        f'{record["efficiency"]:.3f}">{"".join(parts)}<path class="ridge" d="{line}"/>'
        f'<text class="axis" x="{left}" y="{height - 6}">{end}: best efficiency '
        f"{record['bound']:.3f}, measured {record['efficiency']:.3f}</text></svg></figure>"
    )


def _classes(report: Mapping[str, Any]) -> str:
    scores = report["classes"]
    if not scores:
        return ""
    before, after = scores["before"], scores["after"]
    names = list(before)

    def change(name: str) -> float:
        a, b = before[name], after.get(name)
        return 0.0 if a is None or b is None else b - a

    shown = names
    said = ""
    if len(names) > CLASSES_SHOWN:
        chosen = set(sorted(names, key=lambda n: -abs(change(n)))[:CLASSES_SHOWN])
        shown = [n for n in names if n in chosen]
        said = f'<p class="note">The {CLASSES_SHOWN} of {len(names)} classes that changed most.</p>'

    known = [v for row in (before, after) for v in row.values() if v is not None]
    floor = max(0.0, min(90.0, 10.0 * math.floor(min(known, default=0.0) / 10.0)))

    def at(value: float) -> float:
        return 100.0 * (value - floor) / (100.0 - floor)

    def row(name: str) -> str:
        a, b = before[name], after.get(name)
        if a is None or b is None:
            return (
                f'<tr><th scope="row">{escape(name)}</th><td colspan="4" class="note">no samples'
                "</td></tr>"
            )
        low, high = at(min(a, b)), at(max(a, b))
        return (
            f'<tr><th scope="row">{escape(name)}</th><td>{a:.1f}</td><td>{b:.1f}</td>'
            f'<td>{b - a:+.1f}</td><td class="bar"><i class="{"loss" if b < a else "gain"}" '
            f'style="left:{low:.1f}%;width:{high - low:.1f}%"></i>'
            f'<b class="old" style="left:{at(a):.1f}%"></b>'
            f'<b class="new" style="left:{at(b):.1f}%"></b>'
            "</td></tr>"
        )

    def table(some: Sequence[str]) -> str:
        return (
            '<div class="scroll"><table class="classes"><thead><tr><th scope="col">class</th>'
            '<th scope="col">before</th><th scope="col">after</th><th scope="col">change</th>'
            '<th scope="col">'
            f"{floor:g} to 100 %</th></tr></thead><tbody>"
            f"{''.join(map(row, some))}</tbody></table></div>"
        )

    everything = (
        f"<details><summary>All {len(names)} classes</summary>{table(names)}</details>"
        if said
        else ""
    )
    return (
        '<section><h2>Accuracy of each class</h2><p class="legend-line"><b class="old dot"></b> '
        f'before <b class="new dot"></b> after</p>{said}{table(shown)}{everything}</section>'
    )


def _recipe(report: Mapping[str, Any]) -> str:
    steps = []
    for step in report["steps"]:
        facts = "".join(
            f"<dt>{escape(str(k))}</dt><dd>{_value(v)}</dd>" for k, v in step["report"].items()
        )
        options = "".join(
            f"<dt>{escape(str(k))}</dt><dd>{_value(v)}</dd>" for k, v in step["options"].items()
        )
        steps.append(
            f"<li><details><summary>{escape(str(step['step']))}</summary>"
            f"<h3>what it did</h3><dl>{facts}</dl><h3>options</h3><dl>{options}</dl></details></li>"
        )
    return (
        '<section><h2>Recipe</h2><div class="recipe"><button type="button" id="copy">Copy</button>'
        f'<pre id="recipe" tabindex="0"><code>{escape(report["recipe_yaml"])}</code></pre></div>'
        '<p class="note">Saved as a file, it is applied again with '
        "<code>gossamer shrink … --recipe FILE</code>.</p>"
        f'<h3>Steps</h3><ol class="steps">{"".join(steps)}</ol></section>'
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        inner = "".join(f"<dt>{escape(str(k))}</dt><dd>{_value(v)}</dd>" for k, v in value.items())
        return f"<dl>{inner}</dl>"
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        return f"<ol>{''.join(f'<li>{_value(v)}</li>' for v in value)}</ol>"
    if isinstance(value, list):
        return escape(
            " → ".join(map(_plain, value)) if len(value) == 2 else ", ".join(map(_plain, value))
        )
    return escape(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value in (None, [], {}) else str(value)


def _verification(report: Mapping[str, Any]) -> str:
    checks = report["checks"]
    rows = []
    surgery = checks.get("surgery", [])
    if surgery:
        rows.append(
            f"{sum(surgery)} of {len(surgery)} removals computed the same as the original network "
            "with the removed units silenced"
        )
    if "largest_difference" in checks:
        rows.append(
            "the exported file differs from the network by at most "
            f"{checks['largest_difference']:.2g} of the outputs' scale"
        )
    if "agreement" in checks:
        rows.append(
            f"the exported integer file chooses the same class as the network on "
            f"{100 * checks['agreement']:.2f} % of the validation samples"
        )
    answer = "Verified" if report["verified"] else "Not verified"
    return (
        f'<section><h2>Verification</h2><p><strong>{answer}.</strong></p><ul id="checks">'
        f"{''.join(f'<li>{escape(r)}</li>' for r in rows)}</ul></section>"
    )


def _circumstances(report: Mapping[str, Any]) -> str:
    samples = report["task"]["samples"]
    facts = {
        "made from": ", ".join(f"{k} {_plain(v)}" for k, v in report["model"].items() if v),
        "data": f"{report['task']['name']} ("
        + ", ".join(f"{n:,} {split}" for split, n in samples.items())
        + ")",
        "runtime": report["runtime"],
        "device": report["device"],
        "threads": report["threads"],
        "seed": report["seed"],
        "date": report["date"],
        "time": f"{report['seconds']:.0f} s",
        "versions": ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
    }
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return f"<section><h2>Circumstances</h2><dl>{rows}</dl></section>"


_STYLE = """
:root{--bg:#fbfaf7;--card:#fff;--ink:#1d2328;--soft:#5b6670;--line:#dcdfe1;--kept:#0072b2;
--gone:#e69f00;--bad:#b3400a;--good:#00694e;--mark:#fff;--focus:#cc79a7}
@media(prefers-color-scheme:dark){:root{--bg:#14181b;--card:#1c2226;--ink:#e8ebed;--soft:#a3adb5;
--line:#353d43;--kept:#56b4e9;--gone:#e69f00;--bad:#f0803c;--good:#3fc79a;--mark:#14181b;
--focus:#f0a6cf}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
.kind{margin:0;color:var(--soft);letter-spacing:.06em}
h1{margin:0 0 1rem;font-size:1.9rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:0 0 .75rem;font-size:1.25rem}h3{font-size:1rem;margin:1rem 0 .35rem}
section{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:1.1rem 1.25rem;margin:0 0 1rem}
.note,small,figcaption{color:var(--soft)}.note,figcaption{font-size:.9rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;
list-style:none;margin:0;padding:0}
.tiles strong{display:block;font-size:1.9rem;line-height:1.15;font-variant-numeric:tabular-nums}
.tiles .note{display:block}
.badge{display:inline-block;margin:.9rem 0 0;padding:.1rem .7rem;border:1.5px solid;
border-radius:1rem;font-weight:600}.badge.good{color:var(--good)}.badge.bad{color:var(--bad)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{font-weight:600;color:var(--soft);font-size:.9rem}
th:first-child,td.words{text-align:left}tbody th{font-weight:500}
td.words{white-space:normal;min-width:22rem;font-size:.85rem}
td.bar{min-width:9rem;width:30%;position:relative}
td.bar span{display:inline-block;height:.85rem;vertical-align:middle}
td.bar{text-align:left;font-size:0}
.layers td.bar{width:26%}
.kept{background:var(--kept)}.more{background:var(--bad)}
.removed{background:repeating-linear-gradient(135deg,var(--gone) 0 3px,transparent 3px 6px);
outline:1px solid var(--gone);outline-offset:-1px}
.swatch{display:inline-block;width:1.4rem;height:.8rem;margin-left:.6rem}
.swatch:first-child{margin-left:0}
.legend-line{margin:0 0 .5rem;font-size:.9rem;color:var(--soft)}
.classes td.bar i{position:absolute;top:50%;height:3px;margin-top:-1.5px}
.classes td.bar{background:linear-gradient(var(--line),var(--line)) center/100% 1px no-repeat;
padding:0;border-left:8px solid transparent;border-right:8px solid transparent}
.loss{background:var(--bad)}.gain{background:var(--good)}
b.old,b.new{position:absolute;top:50%;width:10px;height:10px;margin:-5px 0 0 -5px}
b.old{border:2px solid var(--soft);border-radius:50%;background:var(--card)}
b.new{background:var(--kept);width:8px;height:8px;margin:-4px 0 0 -4px}
b.dot{position:static;display:inline-block;margin:0 .2rem 0 .6rem}
b.dot:first-child{margin-left:0}
figure{margin:0 0 .75rem}svg text{fill:var(--soft);font-size:12px}svg .axis{font-size:13px}
#trials,.waterline{width:100%;height:auto;display:block}.water{fill:var(--kept)}
.water.bound{fill:var(--bad)}.ridge{fill:none;stroke:var(--ink);stroke-width:1.5}.grid{stroke:var(--line)}
.mark{stroke-width:1.5;outline:none}.mark.beaten{fill:none;stroke:var(--soft);opacity:.75}
.mark.front{fill:var(--kept);stroke:var(--mark);fill-opacity:.85}
.mark.chosen{fill:var(--gone);stroke:var(--ink)}
.mark.dense{fill:var(--ink);stroke:var(--mark)}.mark.result{fill:var(--bad);stroke:var(--mark)}
.mark[tabindex]{cursor:pointer}.mark[tabindex]:hover{stroke:var(--ink);stroke-width:2.5}
.mark:focus-visible{stroke:var(--focus);stroke-width:4}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;list-style:none;
margin:.25rem 0 .4rem;padding:0}
.legend li{display:flex;align-items:center;gap:.3rem}
.recipe{position:relative}
pre{margin:0;padding:.9rem 1rem;overflow-x:auto;background:var(--bg);border:1px solid var(--line);
border-radius:.4rem;font:14px/1.5 ui-monospace,monospace}
button{position:absolute;top:.5rem;right:.5rem;font:inherit;font-size:.9rem;padding:.15rem .8rem;
color:var(--ink);background:var(--card);border:1px solid var(--soft);border-radius:.35rem;
cursor:pointer}
:focus-visible{outline:3px solid var(--focus);outline-offset:1px}
summary{cursor:pointer;padding:.15rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}ol,ul{padding-left:1.4rem}
@media(max-width:40rem){dl{grid-template-columns:1fr}dd{margin:0 0 .3rem 1rem}}
#tip{position:fixed;z-index:2;max-width:24rem;padding:.45rem .7rem;font-size:.88rem;
background:var(--ink);color:var(--bg);border-radius:.35rem;pointer-events:none;
white-space:pre-line;overflow-wrap:anywhere}
@media print{body{background:#fff}section{break-inside:avoid}button{display:none}}
"""

_SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
function show(owner) {
  tip.textContent = JSON.parse(owner.dataset.tip).join("\\n");
  tip.hidden = false;
  const box = owner.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const x = box.left + box.width / 2 - own.width / 2;
  const above = box.top - own.height - 8;
  tip.style.left = Math.max(4, Math.min(innerWidth - own.width - 4, x)) + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
}
function hide() { tip.hidden = true; }
for (const owner of document.querySelectorAll("[data-tip]")) {
  owner.addEventListener("pointerenter", () => show(owner));
  owner.addEventListener("pointerleave", hide);
  owner.addEventListener("focus", () => show(owner));
  owner.addEventListener("blur", hide);
}
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
addEventListener("scroll", hide, { passive: true });
const button = document.getElementById("copy"), recipe = document.getElementById("recipe");
button.addEventListener("click", async () => {
  let done = true;
  try {
    await navigator.clipboard.writeText(recipe.textContent);
  } catch {
    const range = document.createRange(), chosen = getSelection();
    range.selectNodeContents(recipe);
    chosen.removeAllRanges();
    chosen.addRange(range);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Press Ctrl+C";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});
"""
