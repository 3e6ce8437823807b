"""What a command was given, as a network and a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from gossamer.core.task import Task


def both_or_embedded(model: str | None, data: str | None) -> tuple[str, str]:
    """What was given, or the example that is embedded where nothing was."""
    if model is None and data is None:
        return "gossamer_digits_resnet", "digits"
    if model is None or data is None:
        raise InputError(
            f"{'--data' if data is None else 'MODEL'} is missing; give both a MODEL and --data, or "
            "neither for the embedded example"
        )
    return model, data


def task_of(
    data: str,
    model: str,
    *,
    image_size: int | None,
    seed: int,
    limit: int | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Task:
    """The data, at the size, with the channels and normalised as the network is made for."""
    from gossamer.datasets import open_task

    channels = None
    if is_folder(model):
        from gossamer.core.files import read_json
        from gossamer.core.task import Preprocess

        record = read_json(Path(model) / "network.json")
        for name in ("about", "task", "preprocess"):
            record = record.get(name) if isinstance(record, dict) else None
        if record is not None:
            preprocess = Preprocess.from_json(record)
            channels, mean, std = (
                preprocess.channels,
                mean or preprocess.mean,
                std or preprocess.std,
            )
            image_size = image_size or preprocess.height
    elif image_size is None and data != "digits" and ":" not in model:
        image_size = _default_size(model)
    return open_task(
        data, image_size=image_size, channels=channels, seed=seed, limit=limit, mean=mean, std=std
    )


def is_folder(model: str) -> bool:
    """Whether a model's name is that of a folder written by gossamer.

    Raises:
        InputError: if it is another folder and cannot be the name of a network.
    """
    if (Path(model) / "network.json").is_file():
        return True
    if ("/" in model or model in (".", "..")) and Path(model).is_dir():
        raise InputError(f"{model} holds no network.json; give a folder written by gossamer shrink")
    return False


def _default_size(model: str) -> int | None:
    """The image size a timm model that admits only one was made for."""
    import timm

    import gossamer.models  # noqa: F401 (registers our own)

    if not timm.is_model(model):
        return None
    config = timm.get_pretrained_cfg(model)
    if config is None or not getattr(config, "fixed_input_size", False):
        return None
    return int(config.input_size[-1])


def network_of(
    model: str, task: Task, weights: Path | None, *, seed: int
) -> tuple[nn.Module, bool, dict[str, Any]]:
    """Builds or loads a network: the module, whether it is trained, and its origin."""
    import torch

    from gossamer.core.task import Classification
    from gossamer.models import build, load_weights

    assert isinstance(task, Classification)
    if is_folder(model):
        from gossamer.core.saved import load_network

        module, _, about = load_network(Path(model))
        if weights is not None:
            load_weights(module, weights)
        _fits(model, module, task)
        return module, True, {"model": str(model), "from": about.get("origin", {})}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build(
            model,
            classes=len(task.classes),
            channels=task.preprocess.channels,
            image_size=(task.preprocess.height, task.preprocess.width),
            example_inputs=task.example_inputs,
        )
    if weights is not None:
        load_weights(module, weights)
    return module, weights is not None, {"model": model}


def module_of(
    model: str,
    weights: Path | None = None,
    *,
    image_size: int | None = None,
    channels: int = 3,
    classes: int | None = None,
) -> tuple[nn.Module, tuple[Any, ...]]:
    """Builds or loads a network that needs no data: the module and example inputs, batch 2."""
    import torch

    from gossamer.models import build, load_weights

    if is_folder(model):
        from gossamer.core.saved import load_network

        module, inputs, _ = load_network(Path(model))
    else:
        module = build(model, classes=classes, channels=channels, image_size=image_size)
        config = getattr(module, "default_cfg", None) or {}
        side = image_size or config.get("input_size", (3, 224, 224))[-1]
        inputs = (torch.randn(2, channels, side, side),)
    if weights is not None:
        load_weights(module, weights)
    return module, inputs


def _fits(model: str, module: nn.Module, task: Any) -> None:
    import torch

    try:
        with torch.inference_mode():
            outputs = module.eval()(*task.example_inputs)
        fits = outputs.shape[-1] == len(task.classes)
    except Exception as error:  # the graph was made for other sizes
        raise InputError(
            f"the network in {model} does not accept images of "
            f"{tuple(task.example_inputs[0].shape[1:])}"
        ) from error
    if not fits:
        raise InputError(
            f"the network in {model} has {outputs.shape[-1]} classes, the data has "
            f"{len(task.classes)}"
        )
