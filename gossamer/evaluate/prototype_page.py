"""Explanations one can look at: image, prototype, activation map, contribution.

The page is one HTML file with everything inside; the picture is a PNG for documents. Each line of
either is one prototype: the training patch it looks most like, where the image looks like it, and
what that adds to the logit.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gossamer.core.files import whole_file, write_text
from gossamer.core.task import Classification
from gossamer.evaluate.part_prototypes import PartPrototypeNet, Patches

_SIDE = 160
_STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 62em; color: #222; padding: 0 1em }
section { border-top: 1px solid #ccc; padding: 1em 0 }
table { border-collapse: collapse } td, th { padding: .3em .8em; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { display: block; image-rendering: pixelated; width: 160px } .wrong { color: #b00 }
"""


@dataclass(frozen=True)
class Reason:
    """One prototype's part in a logit.

    Attributes:
        prototype: its number.
        owner: name of its class.
        contribution: to the logit.
        patch: the training image with the prototype's box, ``[height, width, 3]``, uint8; None if
            its class has no images.
        activation: the image under its activation map, with the peak's region, likewise.
    """

    prototype: int
    owner: str
    contribution: float
    patch: np.ndarray | None
    activation: np.ndarray


@dataclass(frozen=True)
class Told:
    """Why one image got its class.

    Attributes:
        name: of the image.
        image: ``[height, width, 3]``, uint8.
        label: its true class.
        predicted: the class that is explained.
        logit: of that class; the sum over all prototypes.
        reasons: the prototypes that contribute most.
    """

    name: str
    image: np.ndarray
    label: str
    predicted: str
    logit: float
    reasons: tuple[Reason, ...]


def tell(
    model: PartPrototypeNet,
    task: Classification,
    rows: Sequence[int],
    patches: Patches,
    *,
    split: str = "test",
    half_size: int | None = None,
    top: int | None = None,
) -> list[Told]:
    """Explains images of a task.

    Args:
        model: the network.
        task: its data.
        rows: of the split.
        patches: of the training split, from ``push`` or ``nearest_patches``.
        split: which images.
        half_size: of the region drawn around peaks, pixels. Default: 36 for 224, in proportion.
        top: prototypes shown. Default: as many as a class has.
    """
    at = np.asarray(list(rows), dtype=np.int64)
    raw = task.splits[split].fetch(at)
    told = model.explain(task.preprocess(raw), top=top)
    labels = task.splits[split].labels[torch.from_numpy(at)]
    pictures = _pictures(raw, task.preprocess.scale)
    half = half_size or max(1, round(36 * min(raw.shape[2:]) / 224))
    shown = torch.unique(told.prototypes)
    sources = patches.images[shown.cpu()]
    known = sources >= 0
    fetched = _pictures(
        task.splits["train"].fetch(sources.clamp(min=0).numpy()), task.preprocess.scale
    )
    examples: dict[int, np.ndarray | None] = {
        int(j): _boxed(fetched[n], patches.boxes[int(j)].tolist()) if bool(known[n]) else None
        for n, j in enumerate(shown)
    }
    result = []
    for n, row in enumerate(at):
        reasons = tuple(
            Reason(
                j,
                task.classes[int(model.prototype_classes[j])],
                float(told.contributions[n, j]),
                examples[j],
                _heated(pictures[n], told.maps[n, place], told.positions[n, place], half),
            )
            for place, j in enumerate(told.prototypes[n].tolist())
        )
        predicted = int(told.classes[n])
        name, label = f"{split} image {row}", task.classes[int(labels[n])]
        logit = float(told.logits[n, predicted])
        result.append(Told(name, pictures[n], label, task.classes[predicted], logit, reasons))
    return result


def write_page(
    path: Path, told: Sequence[Told], *, title: str, remarks: Sequence[str] = ()
) -> None:
    """Writes explanations as one HTML file, in one rename.

    Args:
        path: of the file.
        told: what is shown.
        title: of the page.
        remarks: sentences under the title.
    """
    escape = html.escape
    sections = []
    for one in told:
        lines = "".join(
            f"<tr><td>{_tag(r.patch, f'prototype {r.prototype}')}</td>"
            f"<td>{_tag(r.activation, 'activation')}</td>"
            f'<td>{r.prototype} of {escape(r.owner)}</td><td class="number">'
            f"{r.contribution:+.3f}</td></tr>"
            for r in one.reasons
        )
        rest = one.logit - sum(r.contribution for r in one.reasons)
        wrong = "" if one.label == one.predicted else ' class="wrong"'
        sections.append(
            f"<section><h2{wrong}>{escape(one.name)}: {escape(one.predicted)}</h2>"
            f"<p>True class: {escape(one.label)}. Logit {one.logit:.3f}; the other prototypes add "
            f"{rest:+.3f}.</p>{_tag(one.image, one.name)}<table><tr><th>looks like</th>"
            f"<th>here</th><th>prototype</th><th>adds</th></tr>{lines}</table></section>"
        )
    notes = "".join(f"<p>{escape(remark)}</p>" for remark in remarks)
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{notes}{''.join(sections)}</html>\n",
    )


def write_picture(path: Path, told: Sequence[Told]) -> None:
    """Draws explanations as a PNG, a line for each image, in one rename.

    Args:
        path: of the file.
        told: what is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + 2 * max(len(one.reasons) for one in told)
    figure = Figure(figsize=(1.7 * columns, 2.1 * len(told)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, one in enumerate(told):
        panels: list[tuple[np.ndarray | None, str]] = [
            (one.image, f"{one.label} taken for {one.predicted}\nlogit {one.logit:.2f}")
        ]
        for reason in one.reasons:
            panels.append((reason.patch, f"prototype {reason.prototype}\nof {reason.owner}"))
            panels.append((reason.activation, f"adds {reason.contribution:+.2f}"))
        for number, (picture, text) in enumerate(panels):
            axes = figure.add_subplot(len(told), columns, line * columns + number + 1)
            axes.set_axis_off()
            axes.set_title(text, fontsize=8)
            if picture is not None:
                axes.imshow(picture)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=90, format="png")


def _pictures(raw: Tensor, scale: float) -> list[np.ndarray]:
    pixels = (255.0 * raw.float() / scale).round().clamp(0, 255).to(torch.uint8)
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    return [picture.permute(1, 2, 0).numpy() for picture in pixels]


def _enlarged(picture: np.ndarray) -> tuple[Image.Image, float]:
    scale = max(1.0, _SIDE / picture.shape[1])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.NEAREST), (
        scale
    )


def _boxed(picture: np.ndarray, box: Sequence[float], colour: str = "yellow") -> np.ndarray:
    image, scale = _enlarged(picture)
    top, left, bottom, right = box
    corners = (left * scale, top * scale, (right + 1) * scale - 1, (bottom + 1) * scale - 1)
    ImageDraw.Draw(image).rectangle(corners, outline=colour, width=3)
    return np.array(image)


def _heated(picture: np.ndarray, heat: Tensor, peak: Tensor, half: int) -> np.ndarray:
    from matplotlib import colormaps

    level = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    colours = 255.0 * colormaps["turbo"](level.cpu().numpy())[..., :3]
    mixed = (0.55 * picture + 0.45 * colours).round().astype(np.uint8)
    y, x = peak.tolist()
    limit = (picture.shape[0] - 1, picture.shape[1] - 1)
    box = (max(0, y - half), max(0, x - half), min(limit[0], y + half), min(limit[1], x + half))
    return _boxed(mixed, box, "white")


def _tag(picture: np.ndarray | None, text: str) -> str:
    if picture is None:
        return "no image"
    stream = io.BytesIO()
    _enlarged(picture)[0].save(stream, "PNG")
    content = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{content}">'
