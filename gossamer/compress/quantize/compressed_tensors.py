"""The compressed-tensors layout: quantized checkpoints as transformers and vLLM load them.

A folder holds ``model.safetensors`` and a ``config.json`` whose ``quantization_config`` says how
weights and inputs were rounded. For a layer ``X`` in four bits there are ``X.weight_packed``
(int32, eight codes each, the first in the lowest bits), ``X.weight_scale`` ``[outputs, groups]``
and ``X.weight_shape``; with eight bits ``X.weight`` holds the codes (int8 or float8_e4m3fn) and
``X.weight_scale`` is ``[outputs, 1]``. Zero points and the groups of inputs are there where a
format has them.

Source: the published layout of the compressed-tensors library (formats "pack-quantized",
"int-quantized" and "float-quantized").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.compress.quantize.language_models import (
    SCHEMES,
    QuantizedModel,
    RoundedInputs,
    Scheme,
    blocks,
)
from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.core.files import read_json, whole_folder, write_json
from gossamer.parts.scaled import (
    ActivationFormat,
    NumberFormat,
    ScaledTensor,
    WeightFormat,
    checked,
    pack_nibbles,
    unpack_nibbles,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def save_compressed(
    model: QuantizedModel, folder: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Writes a quantized model as a checkpoint, in one rename.

    Args:
        model: what ``quantize`` made.
        folder: is created, or replaced.
        dtype: type of the tensors that are not quantized. Default: as they are. Scales keep the
            type in which they were found (``scale_dtype``), so that codes stay right.

    Raises:
        InputError: if a layer's inputs are no multiple of the group (which the loaders refuse), or
            the place cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, stored in model.tensors.items():
        layer = name.removesuffix(".weight")
        group = stored.format.group
        if group is not None and stored.shape[1] % group:
            raise InputError(
                f"{layer} has {stored.shape[1]} inputs, no multiple of its groups of {group}; "
                "choose another group_size"
            )
        tensors |= {f"{layer}.{key}": array for key, array in _layer(stored).items()}
    first = {id(p): name for name, p in model.module.named_parameters()}
    ties = {
        name
        for name, p in model.module.named_parameters(remove_duplicate=False)
        if first[id(p)] != name
    }
    # A head that shares the embedding is not written, as transformers does.
    for name, tensor in model.module.state_dict().items():
        if name not in model.tensors and name not in ties:
            plain = tensor.detach().cpu()
            if dtype is not None and plain.is_floating_point():
                plain = plain.to(dtype)
            tensors[name] = plain.contiguous().clone()
    config = _config_of(model.module)
    kinds = [t.dtype for t in tensors.values() if t.dtype in _DTYPES]
    if "dtype" in config or "torch_dtype" in config:
        config.pop("torch_dtype", None)
        config["dtype"] = _DTYPES[dtype or (kinds[-1] if kinds else torch.float32)]
    config["quantization_config"] = quantization_config(model)
    with whole_folder(Path(folder)) as partial:
        write_json(partial / CONFIG, config)
        try:
            save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"cannot write {folder}: {first_line(error)}") from error


def _config_of(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    # Through JSON: a configuration may hold types of torch that only its own writer names.
    found = json.loads(config.to_json_string(use_diff=False))
    # As a model's own writer does: the loaders choose the class by it.
    found["architectures"] = [type(module).__name__]
    return found


def _layer(stored: ScaledTensor) -> dict[str, Tensor]:
    four = stored.format.number.bits == 4
    arrays = {"weight_scale": stored.scale.contiguous()}
    if four:
        arrays["weight_packed"] = pack_nibbles(stored.codes)
        arrays["weight_shape"] = torch.tensor(stored.shape, dtype=torch.int64)
    else:
        arrays["weight"] = stored.codes.contiguous()
    if stored.zero is not None:
        # Packed along the outputs, unlike the weight.
        zero = stored.zero
        arrays["weight_zero_point"] = (
            pack_nibbles(zero.T.contiguous()).T.contiguous() if four else zero.contiguous()
        )
    if stored.order is not None:
        arrays["weight_g_idx"] = stored.order.contiguous()
    if stored.activations is not None and stored.activations.scale is not None:
        arrays["input_scale"] = torch.tensor([stored.activations.scale], dtype=stored.scale.dtype)
    return arrays


def quantization_config(model: QuantizedModel) -> dict[str, Any]:
    """What ``config.json`` says of the quantization."""
    weights, activations = model.scheme.weights, model.scheme.activations
    static = any(
        t.activations is not None and t.activations.scale is not None
        for t in model.tensors.values()
    )
    number = weights.number
    ignored = sorted(
        name
        for name, module in model.module.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in model.tensors
    )
    inputs = None
    if activations is not None:
        inputs = {
            "num_bits": activations.number.bits,
            "type": activations.number.kind,
            "symmetric": True,
            "strategy": "tensor" if static else "token",
            "dynamic": not static,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": _format_name(number),
        "quantization_status": "compressed",
        "ignore": ignored,
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": number.bits,
                    "type": number.kind,
                    "symmetric": weights.symmetric,
                    "strategy": "channel" if weights.group is None else "group",
                    "group_size": weights.group,
                    "dynamic": False,
                    "actorder": None if model.order == "none" else _actorder(model),
                },
                "input_activations": inputs,
                "output_activations": None,
            }
        },
    }


def _actorder(model: QuantizedModel) -> str | None:
    if model.scheme.weights.group is None:
        return None
    return "static" if model.order == "static" else "group"


def _format_name(number: NumberFormat) -> str:
    if number.kind == "float":
        return "float-quantized"
    return "pack-quantized" if number.bits == 4 else "int-quantized"


def load_compressed(folder: Path, module: nn.Module | None = None) -> QuantizedModel:
    """Reads a checkpoint in this layout.

    Args:
        folder: what :func:`save_compressed` wrote, or a checkpoint of llm-compressor in one file
            with one group of layers in one of the three formats.
        module: a network of the same structure, which is changed. Default: made by transformers
            from ``config.json``, without running any code of the folder.

    Raises:
        InputError: if a file is missing, damaged or of another kind.
        MissingExtra: if transformers is needed and not installed.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    try:
        held = _read(folder / WEIGHTS)
        scheme, static = _scheme_of(config["quantization_config"])
        actorder = config["quantization_config"]["config_groups"]["group_0"]["weights"].get(
            "actorder"
        )
        tensors, plain = _split(held, scheme, static)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        OverflowError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"{folder} is not a checkpoint in the compressed-tensors layout, or it is damaged"
        ) from error
    if module is None:
        module = _from_config(config, folder)
    state = plain | {name: stored.decode() for name, stored in tensors.items()}
    own = module.state_dict()
    first = {id(p): name for name, p in module.named_parameters()}
    ties = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    for name in own:
        if name not in state and ties.get(name, name) in state:
            state[name] = state[ties[name]]
        if name not in state:
            raise InputError(f"{folder} has no tensor {name}")
        if state[name].shape != own[name].shape:
            raise InputError(
                f"{name} has shape {tuple(state[name].shape)} in {folder} and "
                f"{tuple(own[name].shape)} in the network"
            )
    if unknown := [name for name in state if name not in own]:
        raise InputError(f"the network has no tensor {unknown[0]}, which {folder} holds")
    module.load_state_dict(state)
    for name, stored in tensors.items():
        path, _, child = name.removesuffix(".weight").rpartition(".")
        parent = module.get_submodule(path)
        layer = getattr(parent, child)
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{name} is quantized, but its layer is not linear")
        if stored.activations is not None:
            setattr(parent, child, RoundedInputs(layer, stored.activations))
    order = "group" if actorder == "group" else "static" if actorder else "none"
    return QuantizedModel(module.eval(), tensors, scheme, order)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise ValueError(str(error)) from error


def _scheme_of(config: Mapping[str, Any]) -> tuple[Scheme, bool]:
    if config["quant_method"] != "compressed-tensors" or len(config["config_groups"]) != 1:
        raise ValueError("another layout")
    group = config["config_groups"]["group_0"]
    own, inputs = group["weights"], group.get("input_activations")
    try:
        number = NumberFormat(own["type"], own["num_bits"])
        size = own.get("group_size") if own["strategy"] == "group" else None
        weights = WeightFormat(number, None if size is None else int(size), bool(own["symmetric"]))
        activations = None
        if inputs is not None:
            activations = ActivationFormat(NumberFormat(inputs["type"], inputs["num_bits"]))
            if not inputs.get("symmetric", True) or inputs["strategy"] not in ("token", "tensor"):
                raise ValueError("inputs are rounded in an unknown way")
    except InputError as error:
        raise ValueError(str(error)) from error
    if config["format"] != _format_name(number) or own["strategy"] not in ("channel", "group"):
        raise ValueError("the format does not fit the weights")
    static = inputs is not None and not inputs["dynamic"]
    names = [n for n, s in SCHEMES.items() if (s.weights.number, s.activations) == (
        number, activations
    )]  # fmt: skip
    known = SCHEMES[names[0]] if names else SCHEMES["W8A8-INT"]
    name = names[0] if names else f"W{number.bits}{number.kind}"
    return replace(known, name=name, weights=weights, activations=activations), static


def _split(
    held: Mapping[str, Tensor], scheme: Scheme, static: bool
) -> tuple[dict[str, ScaledTensor], dict[str, Tensor]]:
    """Stored weights, and everything that is not quantized."""
    four = scheme.weights.number.bits == 4
    tensors, used = {}, set()
    for name, scale in held.items():
        if not name.endswith(".weight_scale"):
            continue
        layer = name.removesuffix(".weight_scale")
        keys = {
            key: f"{layer}.{key}"
            for key in (
                "weight", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point",
                "weight_g_idx", "input_scale",
            )
        }  # fmt: skip
        codes = held[keys["weight_packed" if four else "weight"]]
        shape = held[keys["weight_shape"]].tolist() if four else list(codes.shape)
        rows, columns = (int(size) for size in shape)
        zero = held.get(keys["weight_zero_point"])
        if zero is not None and four:
            groups = -(-columns // (scheme.weights.group or columns))
            if zero.dtype != torch.int32 or zero.shape != (-(-rows // 8), groups):
                raise ValueError("the zero points do not fit the weight")
            zero = pack_nibbles(unpack_nibbles(zero.T.contiguous(), rows).T.contiguous())
        order = held.get(keys["weight_g_idx"])
        if order is not None and (
            order.shape != (columns,) or int(order.min()) < 0 or int(order.max()) >= scale.shape[1]
        ):
            raise ValueError("the groups of inputs do not fit the weight")
        fitted = checked(scheme.weights, (rows, columns), codes, scale, zero)
        activations = scheme.activations
        if activations is not None and static:
            activations = replace(activations, scale=float(held[keys["input_scale"]].reshape(())))
        tensors[f"{layer}.weight"] = ScaledTensor(
            *fitted, None if order is None else order.to(torch.int32), activations
        )
        used |= set(keys.values())
    if not tensors:
        raise ValueError("nothing is quantized")
    return tensors, {name: t for name, t in held.items() if name not in used}


def _from_config(config: Mapping[str, Any], folder: Path) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "llm") from error
    try:
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        made = AutoConfig.for_model(**plain)
        module = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except Exception as error:  # transformers raises every kind there is
        raise InputError(f"{folder} describes no network: {first_line(error)}") from error
    assert isinstance(module, nn.Module)
    if not blocks(module):
        raise InputError(f"{folder} describes a network without blocks")
    return module.float()
