"""A plan of a scratchpad as a picture: which tensor lies where, and when."""

from __future__ import annotations

from pathlib import Path

from gossamer.core.files import whole_file
from gossamer.hardware.memory_graph import MemoryGraph
from gossamer.hardware.scratchpad_plan import Plan

_MOST_NAMES = 60


def draw_map(graph: MemoryGraph, plan: Plan, path: Path) -> None:
    """Draws time to the right, addresses upwards, one rectangle a stay, as PNG.

    Spilled stays end in a red edge, retrieved ones begin with a blue one. Names are written where
    there are few.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    unit, label = _unit(plan.budget)
    spilled = {(tensor, step) for step, tensor in plan.spills}
    steps = len(plan.order)
    figure = Figure(figsize=(min(24.0, 7.0 + steps / 25), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    boxes, tones = [], []
    for number, stay in enumerate(sorted(plan.stays, key=lambda s: (s.first, s.address))):
        low, high = stay.address / unit, (stay.address + graph.sizes[stay.tensor]) / unit
        boxes.append(Rectangle((stay.first, low), stay.last + 1 - stay.first, high - low))
        tones.append(number % 10)
        if stay.retrieved:
            axes.plot([stay.first] * 2, [low, high], color="tab:blue", linewidth=2.5, zorder=3)
        if (stay.tensor, stay.last + 1) in spilled:
            axes.plot([stay.last + 1] * 2, [low, high], color="tab:red", linewidth=2.5, zorder=3)
        if len(plan.stays) <= _MOST_NAMES:
            middle = ((stay.first + stay.last + 1) / 2, (low + high) / 2)
            axes.annotate(stay.tensor, middle, ha="center", va="center", fontsize=6)
    patches = PatchCollection(boxes, cmap="Pastel1", edgecolor="0.35", linewidth=0.4)
    patches.set_array(tones)
    axes.add_collection(patches)
    axes.axhline(plan.budget / unit, color="black", linewidth=1)
    axes.plot([], [], color="tab:red", linewidth=2.5, label="spilled")
    axes.plot([], [], color="tab:blue", linewidth=2.5, label="retrieved")
    axes.set_xlim(0, steps)
    axes.set_ylim(0, 1.02 * plan.budget / unit)
    axes.set_xlabel("step (one operator each)")
    axes.set_ylabel(f"address ({label})")
    axes.set_title(
        f"{plan.budget:,} bytes: {plan.extra_bytes:,} extra bytes moved ({plan.status})", fontsize=9
    )
    axes.legend(fontsize=7, loc="upper right")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _unit(budget: int) -> tuple[int, str]:
    return (1024, "KiB") if budget >= 8192 else (1, "bytes")
