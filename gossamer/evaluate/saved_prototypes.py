"""Part-prototype networks on disk: ``prototypes.json`` beside ``weights.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gossamer.core.errors import InputError
from gossamer.core.files import read_json, write_json, write_tensors
from gossamer.core.task import Preprocess
from gossamer.evaluate.part_prototypes import LinearHead, PartPrototypeNet
from gossamer.models.build import build, load_weights

ABOUT, WEIGHTS = "prototypes.json", "weights.safetensors"


@dataclass(frozen=True)
class SavedPrototypes:
    """A part-prototype network with what it was trained for.

    Attributes:
        network: in evaluation mode.
        classes: names, in label order.
        preprocess: of raw images.
        backbone: name under which the backbone was built.
    """

    network: PartPrototypeNet
    classes: tuple[str, ...]
    preprocess: Preprocess
    backbone: str


def save_prototypes(folder: Path, saved: SavedPrototypes) -> None:
    """Writes a network, each file in one rename.

    Args:
        folder: gets ``prototypes.json`` and ``weights.safetensors``.
        saved: what is written.
    """
    network = saved.network
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in network.state_dict().items()
    }
    write_tensors(folder / WEIGHTS, tensors)
    write_json(
        folder / ABOUT,
        {
            "format": 1,
            "backbone": saved.backbone,
            "classes": list(saved.classes),
            "preprocess": saved.preprocess.to_json(),
            "per_class": network.per_class,
            "dim": network.dim,
            "similarity": network.similarity,
            "head": "linear" if isinstance(network.head, LinearHead) else "sa",
            "align": network.align,
            "deep": network.features.deep,
            "shallow": network.features.shallow,
        },
    )


def load_prototypes(folder: Path, *, backbone: str | None = None) -> SavedPrototypes:
    """Reads what :func:`save_prototypes` wrote.

    Args:
        folder: holds the two files.
        backbone: ``package.module:factory`` of a backbone of one's own; the name in the file is
            trusted for timm and torchvision networks only, because a factory is code.

    Raises:
        InputError: if the files are missing, damaged or do not belong together.
    """
    about = read_json(folder / ABOUT)
    try:
        name = backbone or str(about["backbone"])
        if backbone is None and ":" in name and not name.startswith("torchvision:"):
            raise InputError(
                f"the backbone of {folder} is {name!r:.80}, which is code of your own; give it "
                "with --backbone"
            )
        preprocess = Preprocess.from_json(about["preprocess"])
        classes = tuple(map(str, about["classes"]))
        network = prototype_network(
            name, len(classes), preprocess,
            per_class=int(about["per_class"]), dim=int(about["dim"]),
            similarity=about["similarity"], head=about["head"], align=bool(about["align"]),
            deep=int(about["deep"]),
            shallow=None if about["shallow"] is None else int(about["shallow"]),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / ABOUT} describes no part-prototype network: {error!r}") from (
            error
        )
    load_weights(network, folder / WEIGHTS)
    return SavedPrototypes(network.eval(), classes, preprocess, name)


def prototype_network(
    backbone: str,
    classes: int,
    preprocess: Preprocess,
    *,
    weights: Path | None = None,
    seed: int = 0,
    **options: Any,
) -> PartPrototypeNet:
    """Builds a part-prototype network over a backbone by name.

    Args:
        backbone: a timm name, ``torchvision:NAME`` or ``package.module:factory``.
        classes: K.
        preprocess: says channels and size of the images.
        weights: of the backbone; a classifier among them is left out.
        seed: of everything that is drawn.
        **options: of :class:`~gossamer.evaluate.part_prototypes.PartPrototypeNet`.

    Raises:
        InputError: if there is no such network, or it shows no maps that fit.
    """
    size = (preprocess.height, preprocess.width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        known: Mapping[str, Any] = {"channels": preprocess.channels, "image_size": size}
        module: Any = build(backbone, classes=classes, **known)
        if weights is not None:
            try:
                load_weights(module, weights)
            except InputError:
                # Weights with the classifier of other classes, as ImageNet's.
                module = build(backbone, **known)
                load_weights(module, weights)
        if hasattr(module, "reset_classifier") and hasattr(module, "forward_intermediates"):
            module.reset_classifier(0)
        example = torch.zeros(1, preprocess.channels, *size)
        return PartPrototypeNet(module, classes, example_inputs=example, **options)
