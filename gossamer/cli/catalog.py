"""Commands that show what gossamer holds, and run its experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from gossamer.cli.front import Json, app, out_console, print_json
from gossamer.core.errors import InputError

_METHODS = Group("Methods of pruning that have")


@app.command
def systems(
    *,
    when: Annotated[str | None, Parameter(group=_METHODS)] = None,
    structured: Annotated[bool | None, Parameter(group=_METHODS, negative="--unstructured")] = None,
    granularity: Annotated[str | None, Parameter(group=_METHODS)] = None,
    criterion: Annotated[str | None, Parameter(group=_METHODS)] = None,
    learned: Annotated[str | None, Parameter(group=_METHODS)] = None,
    data: Annotated[str | None, Parameter(group=_METHODS)] = None,
    scope: Annotated[str | None, Parameter(group=_METHODS)] = None,
    schedule: Annotated[str | None, Parameter(group=_METHODS)] = None,
    architecture: Annotated[str | None, Parameter(group=_METHODS)] = None,
    here: Annotated[bool | None, Parameter(group=_METHODS, negative="")] = None,
    json_: Json = False,
) -> None:
    """List the 85 systems and what was measured of them, or ask for methods of pruning.

    Example: gossamer systems --when before-training --unstructured --data none

    Parameters
    ----------
    when
        before-training, during-training, after-training or run-time.
    structured
        Methods that leave smaller dense layers, or zeros only.
    granularity
        What goes as a whole: weight, filter, channel, neuron, head, layer, block ...
    criterion
        magnitude, norm, saliency, loss-change, reconstruction, similarity, activation ...
    learned
        How masks are learned: none, mask, score, gating, dynamic-sparse, bi-level ...
    data
        What is needed to decide: none, unlabelled, labelled or few-shot.
    scope
        local, global or both.
    schedule
        one-shot, iterative, gradual or learned.
    architecture
        cnn, vit, bert, llm, rnn, gnn ...
    here
        Only those that gossamer has.
    json_
        Print JSON.
    """
    wanted = {
        "when": when, "granularity": granularity, "criterion": criterion, "learned": learned,
        "data": data, "scope": scope, "schedule": schedule, "architectures": architecture,
    }  # fmt: skip
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if wanted or structured is not None or here:
        _show_methods(wanted, structured, here, json_)
        return
    from gossamer.core.catalog import Catalog

    catalog = Catalog.load()
    if json_:
        print_json(catalog.as_json())
        return
    from rich.table import Table

    table = Table(title=f"{len(catalog)} systems")
    for column in ("system", "room", "title", "provenance", "verdict"):
        table.add_column(column, no_wrap=column in ("system", "room"))
    for system in catalog.systems:
        table.add_row(system.spec, system.room, system.title, system.provenance, system.verdict)
    out_console().print(table)


def _show_methods(
    wanted: dict[str, str], structured: bool | None, here: bool | None, json_: bool
) -> None:
    from gossamer.compress.prune.taxonomy import find

    found = find(structured=structured, implemented=here or None, **wanted)
    if json_:
        print_json([method.to_json() for method in found])
        return
    from rich.table import Table

    table = Table(title=f"{len(found)} methods of pruning")
    for column in ("method", "year", "goes", "when", "criterion", "learned", "data", "here"):
        table.add_column(column)
    for method in found:
        step = (method.implemented_by or "").rpartition(":")[2].replace("_", "-")
        options = ", ".join(f"{k}: {v}" for k, v in method.options.items())
        table.add_row(
            method.name, str(method.year), ", ".join(method.granularity), method.when,
            method.criterion, method.learned, method.data,
            f"{step} ({options})" if options else step,
        )  # fmt: skip
    out_console().print(table)


@app.command
def reproduce(
    system: str,
    *,
    full: Annotated[bool, Parameter(negative="--quick")] = False,
    seeds: tuple[int, ...] | None = None,
    out: Path | None = None,
    json_: Json = False,
) -> None:
    """Measure what a system's paper claims, and say which claims hold.

    Example: gossamer reproduce otov3 --quick

    Parameters
    ----------
    system
        A name from gossamer systems.
    full
        The sizes of the paper instead of a few minutes on two cores.
    seeds
        Seeds in place of the experiment's own.
    out
        Write the result (JSON) here, and its plot beside it.
    json_
        Print the result as JSON.
    """
    import importlib

    from gossamer.core.catalog import Catalog

    entry = Catalog.load()[system]
    if not entry.measurable:
        raise InputError(f"{system} has no experiment yet; `gossamer systems` shows what is here")
    experiment = importlib.import_module(entry.experiment).EXPERIMENT
    result = experiment.run("full" if full else "quick", seeds)
    if out is not None:
        result.write(out)
        if experiment.draw is not None:
            experiment.draw(result, out.with_suffix(".png"))
    if json_:
        print_json(
            {
                "spec": result.spec, "mode": result.mode, "verdict": result.verdict(),
                "evidence": [vars(e) for e in result.evidence()],
                "rows": [dict(r) for r in result.rows], "about": dict(result.about),
            }
        )  # fmt: skip
        return
    from rich.table import Table

    table = Table(title=f"{system}: {result.verdict()}")
    for column in ("claim", "left", "right", "difference (95 %)", "holds", "paper"):
        table.add_column(column)
    for claim, found in zip(result.claims, result.evidence(), strict=True):
        if found.holds is None:
            table.add_row(claim.text, "-", "-", "-", "not measured", claim.paper)
            continue
        width = "" if found.half_width is None else f" ± {found.half_width:.3g}"
        table.add_row(
            claim.text, f"{found.left:.4g}", f"{found.right:.4g}", f"{found.difference:.3g}{width}",
            "yes" if found.holds else "no", claim.paper,
        )  # fmt: skip
    out_console().print(table)
