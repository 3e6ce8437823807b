"""Plots of results: what most experiments draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.experiment import Row


def lines(
    rows: Iterable[Row],
    path: Path,
    *,
    panels: Sequence[tuple[str, str]],
    x: str,
    x_label: str,
    by: str = "contender",
    logarithmic: bool = False,
    invert: bool = False,
) -> None:
    """Means over seeds with the range of the seeds, one line a contender, one panel a metric.

    Args:
        rows: measurements; those without ``x`` or the metric are left out.
        path: of the PNG.
        panels: metric and label of each panel.
        x: field along the horizontal axis.
        x_label: what it says.
        by: field that makes a line.
        logarithmic: horizontal axis.
        invert: horizontal axis from high to low.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_rows = list(rows)
    for number, (metric, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        points: dict[Any, dict[float, list[float]]] = {}
        for row in all_rows:
            if row.get(x) is not None and row.get(metric) is not None:
                found = points.setdefault(row[by], {}).setdefault(float(row[x]), [])
                found.append(float(row[metric]))
        for name, places in points.items():
            at = sorted(places)
            mean = [float(np.mean(places[p])) for p in at]
            (line,) = axes.plot(at, mean, marker="o", markersize=3, label=str(name))
            axes.fill_between(
                at, [min(places[p]) for p in at], [max(places[p]) for p in at],
                color=line.get_color(), alpha=0.12, linewidth=0,
            )  # fmt: skip
        if logarithmic:
            axes.set_xscale("log")
        if invert:
            axes.invert_xaxis()
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")
