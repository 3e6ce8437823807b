"""Deployable formats for language models: FP8, INT8 and INT4, tuned, evaluated and priced.

Formats look bad when they are tuned badly. With one activation scale a token found at run time,
GPTQ weights, clipped ranges, good calibration text and smoothing where activations have outliers,
8-bit floats lose nothing, 8-bit integers little, and 4-bit weights about as little; latency,
throughput and the price of a machine then decide. This file holds the three formats, the walk
through a network that quantizes it, the report of what was lost, and the price of serving it.

The layers of a network are quantized in order, each calibrated with the outputs of those already
quantized; inside a decoder layer all linear layers are calibrated at once. While it is calibrated
activations are not rounded (as in llm-compressor). Embeddings, normalisations and the head stay.

Source: Kurtic, Marques, Pandit, Kurtz and Alistarh, "Give Me BF16 or Give Me Death?
Accuracy-Performance Trade-Offs in LLM Quantization", ACL 2025, arXiv:2411.02355.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.compress.quantize.gptq import (
    Clipping,
    Order,
    SecondMoment,
    gptq,
    round_to_nearest,
)
from gossamer.compress.quantize.smoothing import (
    Channels,
    activation_aware,
    find_shared,
    smooth,
    unchanged,
    watching,
)
from gossamer.core.errors import InputError
from gossamer.core.language import LanguageModelling
from gossamer.core.network import Network
from gossamer.core.progress import progress
from gossamer.core.task import Task, device_of, evaluating, logits_of, to_device
from gossamer.parts.packed import PackedNetwork
from gossamer.parts.scaled import ActivationFormat, NumberFormat, ScaledTensor, WeightFormat

log = logging.getLogger(__name__)

SchemeName = Literal["W8A8-FP", "W8A8-INT", "W4A16-INT"]
Algorithm = Literal["rtn", "gptq", "awq"]
Calibration = Tensor | tuple[Tensor, ...]
"""Token ids ``[batch, length]``, or these and the mask of those that are no padding; for networks
of another kind, their inputs."""


@dataclass(frozen=True)
class Scheme:
    """What weights and activations become.

    Attributes:
        name: in reports.
        weights: format of the weights.
        activations: format of the inputs of linear layers; None leaves them.
        algorithm: what is used for the weights unless something else is asked for.
        clip: whether ranges are clipped unless something else is asked for.
    """

    name: str
    weights: WeightFormat
    activations: ActivationFormat | None
    algorithm: Algorithm
    clip: bool


SCHEMES: dict[str, Scheme] = {
    "W8A8-FP": Scheme(
        "W8A8-FP",
        WeightFormat(NumberFormat("float")),
        ActivationFormat(NumberFormat("float")),
        "rtn",
        False,
    ),
    "W8A8-INT": Scheme("W8A8-INT", WeightFormat(), ActivationFormat(), "gptq", False),
    "W4A16-INT": Scheme("W4A16-INT", WeightFormat(NumberFormat("int", 4), 128), None, "gptq", True),
}
"""The paper's three formats."""


class RoundedInputs(nn.Linear):
    """A linear layer whose inputs are rounded: what an integer layer computes, in float.

    Args:
        layer: its weight and bias are shared.
        activations: how inputs are rounded.
    """

    def __init__(self, layer: nn.Linear, activations: ActivationFormat) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.activations = activations
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.activations.round(input), self.weight, self.bias)


class StoredLinear(nn.Module):
    """A linear layer that multiplies with its stored weight.

    Args:
        tensor: the weight.
        bias: or None.
    """

    def __init__(self, tensor: ScaledTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.kernel = tensor.kernel()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., inputs]`` to ``[..., outputs]``."""
        return self.kernel.linear(x, self.bias)


@dataclass(frozen=True)
class QuantizedModel:
    """A quantized language model (or another network).

    Attributes:
        module: computes in float what the format computes, with rounded weights and inputs.
        tensors: the weights as they are stored, by the names of the module's parameters.
        scheme: the format.
        order: in which GPTQ took the inputs of layers.
        report: losses of GPTQ by layer, layers rounded to nearest because nothing else worked,
            seconds, and options.
    """

    module: nn.Module
    tensors: Mapping[str, ScaledTensor]
    scheme: Scheme
    order: Order = "none"
    report: Mapping[str, Any] = field(default_factory=dict)

    def packed(self) -> PackedNetwork:
        """Its packed form, which ``PackedNetwork.save`` writes as one file."""
        return PackedNetwork.of(self.module, self.tensors)

    def running(self) -> nn.Module:
        """A copy that multiplies with stored weights: integers where the format has them."""
        module = copy.deepcopy(self.module)
        for name, tensor in self.tensors.items():
            layer = name.removesuffix(".weight")
            bias = module.get_submodule(layer).bias
            _put(module, layer, StoredLinear(tensor, bias if isinstance(bias, Tensor) else None))
        return module.eval()

    def nbytes(self, element: int = 2) -> int:
        """Bytes of weights and scales, other tensors counted at ``element`` bytes a number."""
        packed = self.packed()
        return packed.nbytes() + element * sum(t.numel() for t in packed.plain.values())


def quantize(
    model: nn.Module,
    calibration: Iterable[Calibration] = (),
    *,
    scheme: SchemeName | Scheme = "W4A16-INT",
    algorithm: Algorithm | None = None,
    smoothing: float | None = None,
    clip: bool | None = None,
    group_size: int | None = None,
    order: Order = "static",
    static_groups: bool = True,
    static_activations: bool = False,
    dampening: float = 0.01,
    block_size: int = 128,
    skip: Collection[str] = (),
    scale_dtype: torch.dtype | None = None,
) -> QuantizedModel:
    """Quantizes the linear layers of a network's blocks.

    Args:
        model: any causal language model of transformers, or another network with linear layers (of
            which all are quantized if it has no list of blocks); unchanged.
        calibration: text like that which the network will see, as the paper's 512 sequences of up
            to 2048 tokens. Rounding to nearest without smoothing needs none.
        scheme: one of :data:`SCHEMES`, or one of your own.
        algorithm: "rtn" (to nearest), "gptq", or "awq" (activation-aware scales, then to nearest).
            Default: the scheme's.
        smoothing: share of activation outliers that moves into the weights, 0.5 to 0.9; None does
            nothing.
        clip: clip ranges for the least error. Default: the scheme's.
        group_size: inputs that share a scale. Default: the scheme's.
        order: in which GPTQ takes the inputs of a layer, see ``gptq``.
        static_groups: take GPTQ's scales from the original weights, see ``gptq``.
        static_activations: one fixed scale for all tokens of a layer (a baseline).
        dampening: of GPTQ.
        block_size: of GPTQ.
        skip: modules that stay as they are, with everything below them.
        scale_dtype: type of the stored scales. Default: that of the weights.

    Returns:
        The quantized copy.

    Raises:
        InputError: if there is nothing to quantize, calibration is needed and missing or of the
            wrong shape, or an option cannot be used.
        UnsupportedError: if channels cannot be scaled without changing the network.
    """
    chosen = _scheme(scheme, group_size, static_activations)
    algorithm = algorithm or chosen.algorithm
    if algorithm not in ("rtn", "gptq", "awq"):
        raise InputError(f"the algorithm is rtn, gptq or awq, not {algorithm!r:.40}")
    if smoothing is not None and not 0.0 <= smoothing <= 1.0:
        raise InputError(f"the share of smoothing lies between 0 and 1, not at {smoothing}")
    clipping = Clipping() if (chosen.clip if clip is None else clip) else None
    began = time.monotonic()
    module = copy.deepcopy(model).eval()
    layers = _layers(module, skip)
    samples = [_sample(s) for s in calibration]
    needed = algorithm != "rtn" or smoothing is not None or static_activations
    if needed and not samples:
        raise InputError("there is no calibration text; give some, or round to nearest (rtn)")
    report: dict[str, Any] = {
        "scheme": chosen.name, "algorithm": algorithm, "smoothing": smoothing,
        "clip": clipping is not None, "losses": {}, "rounded_to_nearest": [],
    }  # fmt: skip
    with _without_cache(module), torch.no_grad():
        if smoothing is not None or algorithm == "awq":
            _scale_channels(module, samples, layers, chosen.weights, algorithm, smoothing)
        scales: dict[str, float] = {}
        if static_activations:
            channels = Channels.of(module, layers, _runs(module, samples))
            for name in layers:
                if name not in channels.largest:
                    raise InputError(f"calibration never reaches the layer {name}")
                reach = float(channels.reach(name, "absmax").max())
                assert chosen.activations is not None
                scales[name] = float(chosen.activations.number.scale(torch.tensor(reach)))
        tensors: dict[str, ScaledTensor] = {}

        def put(name: str, tensor: ScaledTensor) -> None:
            layer = module.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(tensor.decode())
            activations = chosen.activations
            if activations is not None and name in scales:
                activations = replace(activations, scale=scales[name])
            tensors[f"{name}.weight"] = tensor.running_on(activations)

        if algorithm == "gptq":
            for name, moment in _moments(module, samples, layers):
                weight = module.get_parameter(f"{name}.weight")
                made = gptq(
                    weight, moment.total, chosen.weights, clipping=clipping, order=order,
                    static_groups=static_groups, block_size=block_size, dampening=dampening,
                    dtype=scale_dtype or weight.dtype,
                )  # fmt: skip
                put(name, made.tensor)
                report["losses"][name] = made.loss
                if made.loss is None:
                    report["rounded_to_nearest"].append(name)
        else:
            for name in layers:
                weight = module.get_parameter(f"{name}.weight")
                dtype = scale_dtype or weight.dtype
                put(
                    name,
                    round_to_nearest(weight, chosen.weights, clipping=clipping, dtype=dtype),
                )
        for name in layers:
            activations = tensors[f"{name}.weight"].activations
            if activations is not None:
                layer = module.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                _put(module, name, RoundedInputs(layer, activations))
    report["seconds"] = time.monotonic() - began
    kept = order if algorithm == "gptq" else "none"
    for name, layer in model.named_modules():
        module.get_submodule(name).training = layer.training
    return QuantizedModel(module, tensors, chosen, kept, report)


def _scheme(scheme: str | Scheme, group_size: int | None, static: bool) -> Scheme:
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise InputError(f"there is no scheme {scheme!r:.40}; there are {', '.join(SCHEMES)}")
        scheme = SCHEMES[scheme]
    if group_size is not None:
        scheme = replace(scheme, weights=replace(scheme.weights, group=group_size))
    if static and scheme.activations is None:
        raise InputError(f"{scheme.name} leaves activations as they are; they get no scale")
    return scheme


def _sample(sample: Any) -> tuple[Tensor, ...]:
    parts = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    if not parts or not all(isinstance(p, Tensor) for p in parts) or parts[0].ndim < 2:
        raise InputError("calibration is a series of batches: tensors [batch, ...], or tuples")
    if not parts[0].is_floating_point() and len(parts) > 1 and parts[1].shape != parts[0].shape:
        raise InputError(
            f"calibration has tokens of shape {tuple(parts[0].shape)} and a mask of shape "
            f"{tuple(parts[1].shape)}; they have to be equal"
        )
    return parts


def blocks(model: nn.Module) -> list[str]:
    """Names of the network's repeated blocks, in order; empty where it has none.

    They are the entries of the list with the most parameters of which each holds linear layers.
    """
    best, found = 0, []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if not all(any(isinstance(m, nn.Linear) for m in entry.modules()) for entry in module):
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > best:
            best, found = size, [f"{name}.{i}" for i in range(len(module))]
    return found


def _layers(model: nn.Module, skip: Collection[str]) -> list[str]:
    known = {name for name, _ in model.named_modules()}
    for name in skip:
        if name not in known:
            raise InputError(f"the network has no module {name} to skip")
    inside = blocks(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (not inside or any(name.startswith(f"{block}.") for block in inside))
        and not any(name == part or name.startswith(f"{part}.") for part in skip)
    ]
    if not names:
        raise InputError("the network has no linear layers that could be quantized")
    return names


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class _without_cache:
    """A causal model that is not asked for its cache: blocks are run more than once."""

    def __init__(self, model: nn.Module) -> None:
        self.config = getattr(model, "config", None)
        self.before = getattr(self.config, "use_cache", None)

    def __enter__(self) -> None:
        if self.before is not None:
            assert self.config is not None
            self.config.use_cache = False

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            assert self.config is not None
            self.config.use_cache = self.before


# Calibration


def _call(model: nn.Module, sample: tuple[Tensor, ...]) -> Any:
    sample = to_device(sample, device_of(model))
    if len(sample) == 2 and not sample[0].is_floating_point():
        return model(sample[0], attention_mask=sample[1])
    return model(*sample)


def _text_only(sample: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """Drops the inputs that belong to padding: they would poison the second moments."""
    if len(sample) != 2 or sample[0].is_floating_point():
        return lambda x: x
    mask = sample[1].bool()
    return lambda x: x[mask.to(x.device)] if x.shape[:2] == mask.shape else x


def _runs(
    model: nn.Module, samples: Sequence[tuple[Tensor, ...]]
) -> Iterator[Callable[[Tensor], Tensor]]:
    for sample in samples:
        try:
            _call(model, sample)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            shape = tuple(sample[0].shape)
            raise InputError(f"the network does not take calibration of shape {shape}") from error
        yield _text_only(sample)


def _scale_channels(
    model: nn.Module,
    samples: Sequence[tuple[Tensor, ...]],
    layers: Sequence[str],
    format: WeightFormat,
    algorithm: Algorithm,
    smoothing: float | None,
) -> None:
    def outputs() -> Tensor:
        return logits_of(_call(model, samples[0]))

    shared = find_shared(model, outputs, layers, gated=algorithm == "awq")
    if not shared:
        raise InputError(
            "the network has no normalisation that only linear layers read; quantize it without "
            "smoothing or AWQ"
        )
    firsts = [group.readers[0] for group in shared]
    channels = Channels.of(model, firsts, _runs(model, samples))
    with unchanged(model, outputs):
        if smoothing is not None:
            norms = [g for g in shared if model.get_submodule(g.producer).weight.ndim == 1]  # type: ignore[union-attr]
            smooth(model, norms, channels, alpha=smoothing)
            channels = Channels.of(model, firsts, _runs(model, samples))
        if algorithm == "awq":
            activation_aware(model, shared, channels, format)


def _moments(
    model: nn.Module, samples: Sequence[tuple[Tensor, ...]], layers: Sequence[str]
) -> Iterator[tuple[str, SecondMoment]]:
    """Second moments of each layer's inputs, in order.

    What is calibrated next sees the outputs of what was changed before: the caller changes a layer
    before it asks for the next one.
    """
    names = blocks(model)
    if not names:
        # Without a list of blocks every layer is one; those that come first are run first.
        seen: list[str] = []
        with watching(model, layers, lambda name, _: seen.append(name)):
            next(_runs(model, samples[:1]))
        with progress() as bar:
            for name in bar.track(list(dict.fromkeys(seen)), description="calibrating"):
                yield from _gather(model, [name], _runs(model, samples))
        if missing := [name for name in layers if name not in seen]:
            raise InputError(f"calibration never reaches the layer {missing[0]}")
        return
    calls = _Calls(model, names, samples)
    with progress() as bar:
        for name in bar.track(names, description="calibrating"):
            block = model.get_submodule(name)
            inside = [layer for layer in layers if layer.startswith(f"{name}.")]
            yield from _gather(model, inside, calls.run(name, block))
            for _ in calls.run(name, block, keep=True):
                pass


def _gather(
    model: nn.Module, layers: Sequence[str], runs: Iterator[Callable[[Tensor], Tensor]]
) -> Iterator[tuple[str, SecondMoment]]:
    moments: dict[str, SecondMoment] = {}
    inputs: dict[str, list[Tensor]] = {}
    shared: dict[str, str] = {}
    with watching(model, layers, lambda name, x: inputs.setdefault(name, []).append(x)):
        for drop in runs:
            taken: dict[int, str] = {}
            for name, parts in inputs.items():
                # Layers that read the same tensor (q, k and v) share one sum.
                first = taken.setdefault(id(parts[0]), name) if len(parts) == 1 else name
                if shared.setdefault(name, first) != name:
                    continue
                for x in parts:
                    kept = drop(x)
                    if name not in moments:
                        moments[name] = SecondMoment(kept.shape[-1], kept.device)
                    moments[name].add(kept)
            inputs.clear()
    for name in layers:
        if name not in shared:
            raise InputError(f"calibration never reaches the layer {name}")
        yield name, moments[shared[name]]


class _Calls:
    """What each block is called with: the first one's inputs, and what all of them get beside.

    Memory holds one hidden state a calibration token, not one for each block.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], samples: Sequence[tuple[Tensor, ...]]
    ) -> None:
        self.samples = samples
        self.beside: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
            name: [] for name in names
        }
        self.hidden: list[Tensor] = []
        handles = []

        def hook(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                if not args:
                    raise InputError("the blocks of this network take no positional input")
                if name == names[0]:
                    self.hidden.append(args[0])
                self.beside[name].append((tuple(args[1:]), kwargs))

            return keep

        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        try:
            for _ in _runs(model, samples):
                pass
        finally:
            for handle in handles:
                handle.remove()
        if any(len(found) != len(samples) for found in self.beside.values()):
            raise InputError("a block of the network is run more than once, or not at all")

    def run(
        self, name: str, block: nn.Module, *, keep: bool = False
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Runs a block on every batch; with ``keep`` its outputs are the next one's inputs."""
        for i, (args, kwargs) in enumerate(self.beside[name]):
            outputs = block(self.hidden[i], *args, **kwargs)
            if keep:
                self.hidden[i] = outputs if isinstance(outputs, Tensor) else outputs[0]
            yield _text_only(self.samples[i])


# A step of a recipe


def quantize_lm(
    network: Network,
    task: Task,
    *,
    scheme: SchemeName = "W4A16-INT",
    algorithm: Algorithm | None = None,
    smoothing: float | None = None,
    clip: bool | None = None,
    group_size: int | None = None,
    order: Order = "static",
    static_groups: bool = True,
    static_activations: bool = False,
    dampening: float = 0.01,
    block_size: int = 128,
    samples: int = 512,
    batch_size: int = 8,
    skip: Sequence[str] = (),
    seed: int = 0,
    cpu: bool = False,
) -> Network:
    """Quantizes linear layers to FP8, INT8 or INT4 after training (a step of a recipe).

    Options as in :func:`quantize`, and:

    Args:
        network: unchanged.
        task: its training split gives the calibration samples.
        scheme: the format.
        algorithm: for the weights.
        smoothing: of activation outliers.
        clip: ranges.
        group_size: inputs that share a scale.
        order: of GPTQ.
        static_groups: of GPTQ.
        static_activations: one scale a layer.
        dampening: of GPTQ.
        block_size: of GPTQ.
        samples: calibration samples (blocks of text, or images).
        batch_size: samples a batch.
        skip: modules that stay as they are.
        seed: of the choice of samples.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        The network with rounded weights (and inputs), and its packed form, in which its cost is
        real.

    Raises:
        InputError: if there is nothing to quantize, or an option cannot be used.
    """
    if samples < 1 or batch_size < 1:
        raise InputError("calibration needs at least one sample and a batch size of at least 1")
    batches = task.batches("train", batch_size=batch_size, seed=seed, shuffle=True)
    count = math.ceil(min(samples, task.size("train")) / batch_size)
    calibration = [task.inputs(batch) for batch, _ in zip(batches, range(count), strict=False)]
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    # The step is asked for its options again in reports; keep what it was given.
    options: dict[str, Any] = {
        "scheme": scheme, "algorithm": algorithm, "smoothing": smoothing, "clip": clip,
        "group_size": group_size, "order": order, "static_groups": static_groups,
        "static_activations": static_activations, "dampening": dampening,
        "block_size": block_size, "samples": samples, "batch_size": batch_size,
        "skip": list(skip), "seed": seed,
    }  # fmt: skip
    made = quantize(
        copy.deepcopy(network.module).to(device), calibration, scheme=scheme,
        algorithm=algorithm, smoothing=smoothing, clip=clip, group_size=group_size, order=order,
        static_groups=static_groups, static_activations=static_activations,
        dampening=dampening, block_size=block_size, skip=skip,
    )  # fmt: skip
    made = replace(made, module=made.module.cpu())
    packed = made.packed()
    report = dict(made.report) | {
        "packed_bytes": packed.nbytes(), "plain_bytes": packed.plain_nbytes()
    }  # fmt: skip
    return network.after(
        "quantize-lm",
        options,
        report,
        module=made.module,
        storage={name: made.scheme.name for name in packed.tensors},
        runtime="packed",
        packed=packed,
    )


# What was lost


def greedy(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """The likeliest continuation of each prompt, ``[batch, new_tokens]``.

    Args:
        model: a causal model; the whole text is read again for each token.
        prompts: token ids ``[batch, length]``.
        new_tokens: how many.
    """
    ids = prompts.to(device_of(model))
    with evaluating(model):
        for _ in range(new_tokens):
            ids = torch.cat([ids, logits_of(model(ids))[:, -1:].argmax(-1)], 1)
    return ids[:, prompts.shape[1] :].cpu()


def rouge(reference: Sequence[int], text: Sequence[int]) -> tuple[float, float]:
    """ROUGE-1 and ROUGE-L (F1, 0 to 1) of two token sequences.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    if not reference or not text:
        same = float(list(reference) == list(text))
        return same, same
    counts: dict[int, int] = {}
    for token in reference:
        counts[token] = counts.get(token, 0) + 1
    common = 0
    row = [0] * (len(text) + 1)
    for token in text:
        if counts.get(token, 0):
            counts[token] -= 1
            common += 1
    for token in reference:
        before = 0
        for j, other in enumerate(text):
            before, row[j + 1] = row[j + 1], (
                before + 1 if token == other else max(row[j + 1], row[j])
            )  # fmt: skip
    total = len(reference) + len(text)
    return 2 * common / total, 2 * row[-1] / total


def recovery_report(
    reference: nn.Module,
    models: Mapping[str, nn.Module],
    task: LanguageModelling,
    *,
    split: str = "test",
    prompts: Tensor | None = None,
    new_tokens: int = 48,
) -> list[dict[str, Any]]:
    """How much of a language model is left in others made from it.

    Perplexity alone hides damage, so there is also a task with exact answers (the next token) and
    the likeness of generated texts.

    Args:
        reference: the network before.
        models: what it became, by name.
        task: its text.
        split: on which they are compared.
        prompts: token ids ``[batch, length]`` to be continued greedily. Default: the first eight
            blocks of the split, each cut to half.
        new_tokens: length of a continuation.

    Returns:
        One row a model: ``perplexity``, ``accuracy`` (next token, percent), ``recovery`` (accuracy
        as percent of the reference's), ``agreement`` (same next token as the reference, percent),
        ``divergence`` (Kullback-Leibler from the reference, nats a token), ``rouge_1`` and
        ``rouge_l`` (of greedy texts to the reference's, percent).
    """
    if prompts is None:
        first = next(iter(task.batches(split, batch_size=8, shuffle=False)))
        prompts = first[:, : max(1, task.length // 2)]
    expected = greedy(reference, prompts, new_tokens).tolist()
    totals = {
        name: dict.fromkeys(("loss", "right", "same", "divergence"), 0.0) for name in models
    }  # fmt: skip
    own = 0.0
    count = 0
    with torch.no_grad(), evaluating(reference):
        for batch in task.batches(split, batch_size=task.evaluation_batch_size, shuffle=False):
            targets = batch[:, 1:]
            count += targets.numel()
            known = _log_likelihoods(reference, batch)
            choice = known.argmax(-1)
            own += float((choice == targets).sum())
            for name, model in models.items():
                found = _log_likelihoods(model, batch)
                total = totals[name]
                total["loss"] -= float(found.gather(-1, targets[..., None]).sum())
                total["right"] += float((found.argmax(-1) == targets).sum())
                total["same"] += float((found.argmax(-1) == choice).sum())
                total["divergence"] += float((known.exp() * (known - found)).sum())
    rows = []
    for name, model in models.items():
        total = totals[name]
        texts = greedy(model, prompts, new_tokens).tolist()
        likeness = [rouge(a, b) for a, b in zip(expected, texts, strict=True)]
        rows.append(
            {
                "model": name,
                "perplexity": math.exp(total["loss"] / count),
                "accuracy": 100.0 * total["right"] / count,
                "recovery": 100.0 * total["right"] / own if own else math.nan,
                "agreement": 100.0 * total["same"] / count,
                "divergence": total["divergence"] / count,
                "rouge_1": 100.0 * sum(one for one, _ in likeness) / len(likeness),
                "rouge_l": 100.0 * sum(longest for _, longest in likeness) / len(likeness),
            }
        )
    return rows


def _log_likelihoods(model: nn.Module, batch: Tensor) -> Tensor:
    with evaluating(model):
        logits = logits_of(model(batch.to(device_of(model))))
    return logits[:, :-1].float().log_softmax(-1).cpu()


# What serving costs


@dataclass(frozen=True)
class Scenario:
    """One kind of request.

    Attributes:
        name: what users do.
        prompt: tokens read.
        generated: tokens written.
    """

    name: str
    prompt: int
    generated: int


SCENARIOS = (
    Scenario("code completion", 256, 1024),
    Scenario("docstring generation", 768, 128),
    Scenario("code fixing", 1024, 1024),
    Scenario("retrieval-augmented generation", 1024, 128),
    Scenario("instruction following", 256, 128),
    Scenario("multi-turn chat", 512, 256),
    Scenario("summarisation", 4096, 512),
)
"""The paper's seven scenarios (the token counts as they are known second-hand)."""


@dataclass(frozen=True)
class ServingTimes:
    """Measured times of a model.

    Attributes:
        prompt: tokens of the measured prompts.
        prefill_ms: to read one batch of prompts, by batch size.
        decode_ms: for one token of each text of a batch, by batch size.
    """

    prompt: int
    prefill_ms: Mapping[int, float]
    decode_ms: Mapping[int, float]


def measure_serving(
    models: Mapping[str, nn.Module],
    tokens: int,
    *,
    prompt: int = 128,
    batches: Sequence[int] = (1, 8, 32),
    decode_steps: int = 4,
    rounds: int = 3,
    seed: int = 0,
) -> dict[str, ServingTimes]:
    """Times models of transformers, in turns.

    Args:
        models: by name; what is timed of them is what they really compute.
        tokens: size of the vocabulary.
        prompt: tokens of a prompt.
        batches: texts at a time.
        decode_steps: tokens written for one timing.
        rounds: turns; medians of them are returned.
        seed: of the prompts.

    Returns:
        Times by name.
    """
    if not batches or min(batches) < 1 or prompt < 1 or decode_steps < 1 or rounds < 1:
        raise InputError("serving is measured with positive batch sizes, tokens, steps and rounds")
    generator = torch.Generator().manual_seed(seed)
    prefill: dict[str, dict[int, list[float]]] = {n: {b: [] for b in batches} for n in models}
    decode: dict[str, dict[int, list[float]]] = {n: {b: [] for b in batches} for n in models}
    with torch.inference_mode():
        for batch in batches:
            ids = torch.randint(0, tokens, (batch, prompt), generator=generator)
            for turn in range(rounds + 1):
                for name, model in models.items():
                    here = ids.to(device_of(model))
                    reading, outputs = _timed(
                        lambda m=model, i=here: m(i, use_cache=True, logits_to_keep=1)
                    )
                    cache, last = outputs.past_key_values, here[:, -1:]

                    def write(m: Any = model, c: Any = cache, t: Tensor = last) -> None:
                        for _ in range(decode_steps):
                            t = m(t, past_key_values=c, use_cache=True).logits[:, -1:].argmax(-1)

                    writing, _ = _timed(write)
                    if turn:  # the first one warms up
                        prefill[name][batch].append(reading)
                        decode[name][batch].append(writing / decode_steps)
    return {
        name: ServingTimes(
            prompt,
            {batch: _median(prefill[name][batch]) for batch in batches},
            {batch: _median(decode[name][batch]) for batch in batches},
        )
        for name in models
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began), result


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


@dataclass(frozen=True)
class ServingCost:
    """The price of a scenario.

    Attributes:
        latency_s: of one request that has the machine for itself.
        queries_per_usd: of such requests, one after the other.
        best_batch: batch size with the most throughput.
        max_qps: requests a second with that many texts at a time.
        max_queries_per_usd: with that throughput.
    """

    latency_s: float
    queries_per_usd: float
    best_batch: int
    max_qps: float
    max_queries_per_usd: float


def queries_per_usd(
    usd_per_hour: float, *, latency_s: float | None = None, qps: float = 0.0
) -> float:
    """Requests for a dollar: one after the other (by latency), or at a rate.

    Raises:
        InputError: if the price or what is given is not positive.
    """
    rate = qps if latency_s is None else (1.0 / latency_s if latency_s > 0 else 0.0)
    if usd_per_hour <= 0 or rate <= 0:
        raise InputError("queries for a dollar need a positive price and a latency or rate")
    return 3600.0 * rate / usd_per_hour


def serving_cost(times: ServingTimes, scenario: Scenario, *, usd_per_hour: float) -> ServingCost:
    """Prices a scenario from measured times.

    Reading is taken as linear in the prompt and writing as constant a token. With many texts at a
    time (continuous batching) each token costs its share of the batch's step, so a request takes
    ``prefill / batch + generated * decode / batch`` of the machine; the best of the measured batch
    sizes counts. That is a model of a full queue, not a measured server.

    Args:
        times: of one model.
        scenario: tokens read and written.
        usd_per_hour: price of the machine.

    Raises:
        InputError: if the price is not positive or a single text was not measured.
    """
    if 1 not in times.decode_ms:
        raise InputError("the latency of one request needs times at a batch size of 1")
    share = scenario.prompt / times.prompt

    def seconds(batch: int) -> float:
        reading = times.prefill_ms[batch] * share
        return (reading + scenario.generated * times.decode_ms[batch]) / 1e3 / batch

    latency = seconds(1)
    best = min(times.decode_ms, key=seconds)
    qps = 1.0 / seconds(best)
    return ServingCost(
        latency_s=latency,
        queries_per_usd=queries_per_usd(usd_per_hour, latency_s=latency),
        best_batch=best,
        max_qps=qps,
        max_queries_per_usd=queries_per_usd(usd_per_hour, qps=qps),
    )


def machines_needed(nbytes: int, memory: int, *, reserve: float = 0.1) -> int:
    """Machines (GPUs) that hold a model's weights.

    Args:
        nbytes: of the weights.
        memory: bytes of one machine.
        reserve: share of the memory for activations and caches.

    Raises:
        InputError: if a number is out of range.
    """
    if nbytes < 1 or memory < 1 or not 0.0 <= reserve < 1.0:
        raise InputError("weights and memory are positive, and the reserve is a share below 1")
    return math.ceil(nbytes / (memory * (1.0 - reserve)))


def recommend(costs: Mapping[str, ServingCost], *, asynchronous: bool) -> str:
    """The name of what serves most queries for a dollar.

    Args:
        costs: of each model, in one scenario.
        asynchronous: many requests at a time, in place of one after the other.
    """
    if not costs:
        raise InputError("there is nothing to choose from")

    def worth(name: str) -> float:
        cost = costs[name]
        return cost.max_queries_per_usd if asynchronous else cost.queries_per_usd

    return max(costs, key=worth)
