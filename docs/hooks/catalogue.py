"""Builds the parts of the pages that are data: tables of systems and results, and the menu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.core.catalog import Catalog, System
from gossamer.core.experiment import Evidence

DOCS = Path(__file__).resolve().parent.parent


def on_config(config: Any) -> Any:
    """Adds every page below docs/systems to the menu, so that a system needs no entry there."""
    pages = sorted(path.relative_to(DOCS) for path in (DOCS / "systems").rglob("*.md"))
    systems = [str(page) for page in pages if page.name != "index.md"]
    for entry in config["nav"]:
        if "Systems" in entry:
            entry["Systems"] = ["systems/index.md", *systems]
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Puts the tables in the places of their marks."""
    catalog = Catalog.load(results=DOCS / "results")
    if "<!-- systems -->" in markdown:
        markdown = markdown.replace("<!-- systems -->", _systems(catalog))
    if "<!-- results -->" in markdown:
        markdown = markdown.replace("<!-- results -->", _results(catalog))
    return markdown


def _systems(catalog: Catalog) -> str:
    parts = []
    for room, systems in catalog.by_room().items():
        parts += [
            f"## {room}",
            "",
            "| # | System | Paper | Rests on | Verdict |",
            "| --- | --- | --- | --- | --- |",
        ]
        for system in systems:
            page = DOCS / "systems" / f"{system.module}.md"
            name = f"[{system.spec}]({system.module}.md)" if page.is_file() else system.spec
            parts.append(
                f"| {system.number} | {name} | {system.title} | {system.provenance} | "
                f"{system.verdict} |"
            )
        parts.append("")
    return "\n".join(parts)


def _results(catalog: Catalog) -> str:
    measured = [system for system in catalog.systems if system.shown]
    if not measured:
        return "No result has been committed yet."
    return "\n".join(line for system in measured for line in _result(system))


def _result(system: System) -> list[str]:
    shown = system.shown
    assert shown is not None
    about = shown.about
    stem = system.spec if shown is system.result else f"{system.spec}.full"
    lines = [
        f"## {system.spec}",
        "",
        f"{system.title}. **{system.verdict}** ({shown.mode}, {about.get('date', 'no date')}, "
        f"{about.get('device', 'device not recorded')}; [all rows]({stem}.json)).",
        "",
        "| Claim | Left | Right | Difference | Seeds | Paper | Holds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for claim, found in zip(shown.claims, system.evidence(), strict=True):
        lines.append(
            f"| {claim.text} | {_number(found.left)} | {_number(found.right)} | "
            f"{_difference(found)} | {found.seeds} | {claim.paper or '–'} | {_word(found.holds)} |"
        )
    picture = DOCS / "results" / f"{stem}.png"
    if picture.is_file():
        lines += ["", f"![What was measured for {system.spec}]({picture.name})"]
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _difference(found: Evidence) -> str:
    if found.half_width is None:
        return _number(found.difference)
    return f"{_number(found.difference)} ± {found.half_width:.2g}"


def _word(holds: bool | None) -> str:
    return "not measured" if holds is None else "yes" if holds else "no"
