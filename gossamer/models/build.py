"""Networks by name, and weights into networks.

A name is that of a timm model, ``torchvision:NAME``, or ``package.module:factory``. Nothing is
downloaded: without a file of weights a network starts from its initialisation.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, InputError, first_line
from gossamer.core.task import evaluating, logits_of

CLASS_KEYWORDS = ("classes", "num_classes", "n_classes", "num_labels")
CHANNEL_KEYWORDS = ("in_channels", "in_chans", "channels", "num_channels")
WRAPPERS = ("state_dict", "model_state_dict", "model", "network")
"""Keys under which checkpoints keep the weights among other things."""


def build(
    model: str,
    *,
    classes: int | None = None,
    channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    example_inputs: Sequence[Tensor] | None = None,
) -> nn.Module:
    """Builds a network with fresh weights.

    Args:
        model: a timm name, ``torchvision:NAME``, or ``package.module:factory``. A factory is
            imported, so it must be the user's own; it is given the number of classes and of
            channels if it has keywords for them.
        classes: logits. Default: the model's own.
        channels: of the input. Default: the model's own.
        image_size: height and width in pixels, for networks that are made for one size.
        example_inputs: if given, one forward pass checks that the network accepts them and
            answers ``[batch, classes]``.

    Raises:
        InputError: if there is no such model (the nearest names are offered), it cannot be built
            like that, or it does not fit the example.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    try:
        if model.startswith("torchvision:"):
            module = _torchvision(model.removeprefix("torchvision:"), classes, channels)
        elif ":" in model and not model.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            module = _factory(model, classes, channels)
        else:
            module = _timm(model, classes, channels, size)
    except GossamerError:
        raise
    # A builder may raise anything: timm and torchvision assert, a factory is the user's.
    except Exception as error:
        raise InputError(
            f"{model} cannot be built with {_wishes(classes, channels, size)}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if example_inputs is not None:
        _check_outputs(model, module, example_inputs, classes)
    return module


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Loads weights into a network, all or none.

    Args:
        module: takes the weights, in place.
        path: a safetensors file, or a state dict written by ``torch.save`` (read with
            ``weights_only=True``, so it can hold tensors and plain values only). A dict around
            the state dict and a prefix ``module.`` are taken off.

    Raises:
        InputError: if the file cannot be read, a tensor is missing, left over, of another shape
            (the first is named) or holds NaN or infinities.
    """
    path = Path(path)
    given = read_weights(path)
    wanted = module.state_dict()
    for name, tensor in wanted.items():
        if name not in given:
            if name.endswith("num_batches_tracked"):
                continue  # a counter that many published files leave out, and no weight
            raise InputError(
                f"{path} does not fit the network: {name} {list(tensor.shape)} is missing"
                + _offer(name, [other for other in given if other not in wanted])
            )
        if given[name].shape != tensor.shape:
            raise InputError(
                f"{path} does not fit the network: {name} is {list(given[name].shape)} in the "
                f"file and {list(tensor.shape)} in the network"
            )
    for name, tensor in given.items():
        if name not in wanted:
            raise InputError(
                f"{path} does not fit the network: it has {name} {list(tensor.shape)}, "
                "which the network has not"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise InputError(f"{path} holds NaN or infinity in {name}; such weights are refused")
    try:
        module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit the network: {first_line(error)}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a file of weights, see :func:`load_weights`.

    Raises:
        InputError: if it is missing, corrupt, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file of weights {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise InputError(
                f"{path} is not a safetensors file, or it is truncated: {first_line(error)}"
            ) from error
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    # The unpickler meets arbitrary bytes and raises nearly anything.
    except Exception as error:
        raise InputError(
            f"{path} is not a state dict that can be read safely (torch.load with "
            f"weights_only=True): {first_line(error)}"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(wrapper), Mapping):
            value = value[wrapper]
            break
    if not isinstance(value, Mapping) or not value:
        raise InputError(f"{path} holds a {type(value).__name__}, not a state dict")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path} is not a state dict: {name!r} is a {type(tensor).__name__}")
    names = list(value)
    prefix = "module." if all(name.startswith("module.") for name in names) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in value.items()}


def _timm(
    name: str, classes: int | None, channels: int | None, size: tuple[int, int] | None
) -> nn.Module:
    import timm

    from gossamer.models import resnet as _registers  # noqa: F401

    if not timm.is_model(name):
        known = timm.list_models()
        raise InputError(
            f"there is no timm model {name!r}{_offer(name, known)}; "
            "networks of your own are named package.module:factory"
        )
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    config = timm.get_pretrained_cfg(name)
    if size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size
    return timm.create_model(name, pretrained=False, **options)


def _torchvision(name: str, classes: int | None, channels: int | None) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(f"torchvision has no classifier {name!r}{_offer(name, known)}")
    options: dict[str, Any] = {"weights": None}
    if classes is not None:
        options["num_classes"] = classes
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    module = torchvision.models.get_model(name, **options)
    if channels not in (None, 3):
        _replace_stem(module, channels)
    return module


def _replace_stem(module: nn.Module, channels: int) -> None:
    """Gives the first convolution another number of input channels (and fresh weights)."""
    for path, stem in module.named_modules():
        if isinstance(stem, nn.Conv2d):
            fresh = nn.Conv2d(
                channels,
                stem.out_channels,
                stem.kernel_size,  # type: ignore[arg-type] (declared for any number of axes)
                stride=stem.stride,  # type: ignore[arg-type]
                padding=stem.padding,  # type: ignore[arg-type]
                dilation=stem.dilation,  # type: ignore[arg-type]
                bias=stem.bias is not None,
            )
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, fresh)
            return
    raise InputError("the network has no convolution whose input channels could be changed")


def _factory(name: str, classes: int | None, channels: int | None) -> nn.Module:
    where, _, what = name.partition(":")
    here = os.getcwd()
    # As with `python -m`: a module beside the user's files is found.
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        package = importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{where} of {name} cannot be imported: {first_line(error)}; "
            "run from the folder that holds it, or install it"
        ) from error
    factory = getattr(package, what, None)
    if not callable(factory):
        offered = [key for key, value in vars(package).items() if callable(value)]
        raise InputError(f"{where} has no function {what!r}{_offer(what, offered)}")
    module = factory(**_accepted(factory, classes, channels))
    if not isinstance(module, nn.Module):
        raise InputError(f"{name} returned a {type(module).__name__}, not a torch.nn.Module")
    return module


def _accepted(factory: Any, classes: int | None, channels: int | None) -> dict[str, int]:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a function of C has no signature to look at
        return {}
    options: dict[str, int] = {}
    for value, keywords in ((classes, CLASS_KEYWORDS), (channels, CHANNEL_KEYWORDS)):
        keyword = next((k for k in keywords if k in parameters), None)
        if value is not None and keyword is not None:
            options[keyword] = value
    return options


def _check_outputs(
    name: str, module: nn.Module, example_inputs: Sequence[Tensor], classes: int | None
) -> None:
    shape = "x".join(map(str, example_inputs[0].shape[1:]))
    try:
        with evaluating(module):
            logits = logits_of(module(*example_inputs))
    except GossamerError as error:
        raise InputError(f"{name}: {error}") from error
    # Whatever the network raises on an input of the wrong kind.
    except Exception as error:
        raise InputError(
            f"{name} does not accept inputs of {shape}: {type(error).__name__}: "
            f"{first_line(error)}; another image size or channel count may help"
        ) from error
    expected = [len(example_inputs[0]), logits.shape[-1] if classes is None else classes]
    if list(logits.shape) != expected:
        raise InputError(
            f"{name} answers {list(logits.shape)} for a batch of {len(example_inputs[0])}, "
            f"where {expected} is needed"
        )


def _wishes(classes: int | None, channels: int | None, size: tuple[int, int] | None) -> str:
    wishes = []
    if classes is not None:
        wishes.append(f"{classes} classes")
    if channels is not None:
        wishes.append(f"{channels} input channels")
    if size is not None:
        wishes.append(f"images of {size[0]} x {size[1]}")
    return ", ".join(wishes) or "its own defaults"


def _offer(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; the nearest names are {', '.join(near)}" if near else ""
