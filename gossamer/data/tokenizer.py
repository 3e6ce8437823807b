"""Training a tokenizer of one's own, and keeping it as a file.

The codes start at the centres of a k-means over what the untrained encoder says of some images,
follow a moving average, and are placed anew when nothing is assigned to them any more: without
this most of a small codebook dies.

Source: van den Oord et al., arXiv:1711.00937; Yu et al., arXiv:2110.04627. The published SeiT++
uses a ViT-VQGAN that was trained on ImageNet; this one is small, convolutional and trained without
a discriminator, so its codes keep less of an image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.core.files import write_tensors
from gossamer.core.fit import Log, Rule, fit
from gossamer.core.task import Batch, Classification, Preprocess, device_of, evaluating, seed_of
from gossamer.data.token_rates import adamw, set_rate, warm_cosine_to
from gossamer.models.vqvae import VqVae

N = TypeVar("N", bound=nn.Module)
FIRST_VECTORS = 16_384
"""Directions from which the first codes are found."""


@dataclass(frozen=True)
class Tokenizer:
    """A trained tokenizer and what it expects.

    Attributes:
        network: frozen, in evaluation mode.
        preprocess: how raw images become its inputs.
        about: what it was trained on, as JSON values.
    """

    network: VqVae
    preprocess: Preprocess
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def codebook(self) -> Tensor:
        """``[codes, dims]``."""
        return self.network.codebook

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes an image."""
        patch = self.network.patch
        return self.preprocess.height // patch, self.preprocess.width // patch

    def encode(self, images: Tensor) -> Tensor:
        """Codes ``[n, rows, columns]`` of normalised images ``[n, channels, height, width]``."""
        with evaluating(self.network):
            codes = self.network.encode(images.to(device_of(self.network))).to(images.device)
        return codes.clone()  # outside of inference mode, so that they can be trained on

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes ``[n, rows, columns]``, on the scale 0..1."""
        with evaluating(self.network):
            images = self.network.decode(codes.to(device_of(self.network))).cpu()
        mean = torch.tensor(self.preprocess.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.preprocess.std).view(1, -1, 1, 1)
        return (images * std + mean).clamp(0.0, 1.0)

    def save(self, path: Path) -> None:
        """Writes one safetensors file in one rename."""
        extra = {"preprocess": self.preprocess.to_json(), "about": dict(self.about)}
        save_configured(path, self.network, "tokenizer", self.network.config, extra)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: if it is missing, truncated or no tokenizer.
        """
        network, extra = load_configured(
            Path(path), "tokenizer", lambda config: VqVae(config.pop("channels"), **config)
        )
        preprocess, about = extra.get("preprocess"), extra.get("about")
        if not isinstance(preprocess, dict) or not isinstance(about, dict):
            raise InputError(f"{path} is no tokenizer: it does not say how images are prepared")
        prepared = Preprocess.from_json(preprocess)
        if prepared.channels != network.config["channels"]:
            raise InputError(f"{path} is no tokenizer: its channels contradict each other")
        return cls(network.eval().requires_grad_(False), prepared, about)


class TokenizerTraining(Rule):
    """Trains a :class:`~gossamer.models.vqvae.VqVae` to give images back.

    Args:
        network: what is trained.
        task: gives the images.
        lr: of AdamW.
        commitment: weight of the distance between what is looked up and what is found.
        dead: a code whose moving average of assignments falls below this share of an even split
            is placed anew, on a direction of the current batch.
    """

    def __init__(
        self,
        network: VqVae,
        task: Classification,
        *,
        lr: float = 2e-3,
        commitment: float = 0.25,
        dead: float = 0.03,
    ) -> None:
        self.network = self.tokenizer = network
        self.task = task
        self.optimizer = adamw(network, lr=lr, weight_decay=1e-4)
        self.schedule = warm_cosine_to(0.05)
        self.commitment = commitment
        self.dead = dead

    def begin(self) -> None:
        from sklearn.cluster import KMeans

        directions: list[Tensor] = []
        with evaluating(self.tokenizer):
            for batch in self.task.batches("train", shuffle=False):
                images = self.task.inputs(batch)[0].to(self.run.device)
                directions.append(self.tokenizer.directions(images).flatten(0, 2).cpu())
                if sum(map(len, directions)) >= FIRST_VECTORS:
                    break
        found = torch.cat(directions)[:FIRST_VECTORS]
        codes = len(self.tokenizer.codebook)
        if len(found) < codes:
            raise InputError(
                f"{self.task.name} has {len(found)} patches in its first images, too few to place "
                f"{codes} codes; use fewer codes or more images"
            )
        seed = seed_of("codes", self.run.seed) % (1 << 32)
        first = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]
        # From drawn vectors: k-means++ would take longer than the training of a small tokenizer.
        start: Any = first[:codes].numpy()
        means = KMeans(codes, init=start, n_init="auto", max_iter=20).fit(found.numpy())
        self.tokenizer.place(torch.from_numpy(means.cluster_centers_).to(self.run.device))

    def step(self, batch: Batch) -> Log:
        images = self.task.inputs(batch)[0]
        set_rate(self.optimizer, self.schedule(self.run.fraction))
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            again, codes, found, entries = self.tokenizer(images)
            loss = F.mse_loss(again.float(), images)
            commitment = (found.float() - entries.detach()).square().sum(-1).mean()
            total = loss + self.commitment * commitment
        self.backward(total)
        nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0)
        self.optimizer.step()
        flat = found.detach().flatten(0, 2).float()
        count = len(self.tokenizer.codebook)
        draw = torch.randint(len(flat), (count,)).to(flat.device)
        self.tokenizer.follow(flat, codes.flatten(), self.dead * len(flat) / count, draw)
        return {"loss": loss.detach()}


def train_tokenizer(
    task: Classification,
    *,
    patch: int = 8,
    codes: int = 391,
    dims: int = 32,
    width: int = 64,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> Tokenizer:
    """Trains a tokenizer on the training images of a task.

    Args:
        task: its images, whose sides are multiples of ``patch``.
        patch: pixels along each side of what a code stands for.
        codes: entries of the codebook.
        dims: of a code.
        width: channels after the first halving.
        epochs: passes over the training split.
        batch_size: images a batch.
        lr: of AdamW.
        seed: of weights, order and draws.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if the images cannot be cut into patches, or there are too few.
    """
    preprocess = task.preprocess
    check_patches(preprocess, patch)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("tokenizer", seed))
        network = VqVae(preprocess.channels, patch=patch, codes=codes, dims=dims, width=width)
    rule = TokenizerTraining(network, task, lr=lr)
    history = fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        cpu=cpu, title="tokenizer",
    )  # fmt: skip
    about = {
        "data": task.name,
        "images": task.size("train"),
        "epochs": epochs,
        "loss": history.loss[-1] if history.loss else None,
    }
    return Tokenizer(network.cpu().eval().requires_grad_(False), preprocess, about)


def check_patches(preprocess: Preprocess, patch: int) -> None:
    """Refuses images that are not cut into whole patches.

    Raises:
        InputError: naming a size that would do.
    """
    height, width = preprocess.height, preprocess.width
    if height % patch or width % patch:
        side = max(patch, patch * round(max(height, width) / patch))
        raise InputError(
            f"images of {height} x {width} pixels are not cut into patches of {patch} x {patch}; "
            f"open them at {side} x {side}"
        )


# Networks with what they were built from, as one file


def save_configured(
    path: Path,
    network: nn.Module,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network's weights with its sizes in the header, in one rename."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    header = {"kind": kind, "config": dict(config), **(extra or {})}
    write_tensors(path, tensors, {"gossamer": json.dumps(header)})


def load_configured(
    path: Path, kind: str, build: Callable[[dict[str, Any]], N]
) -> tuple[N, dict[str, Any]]:
    """Reads what :func:`save_configured` wrote.

    Raises:
        InputError: if it is missing, truncated or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["gossamer"])
            if header["kind"] != kind:
                raise ValueError(f"it holds a {header['kind']}")
            config = {str(key): value for key, value in header["config"].items()}
            sizes = [v for v in config.values() if isinstance(v, int)]
            if any(not 0 < value <= 1 << 16 for value in sizes):
                raise ValueError("its sizes are out of range")
            # The network is first built without memory: a small file can claim any size.
            with torch.device("meta"):
                wanted = sum(t.numel() for t in build(dict(config)).state_dict().values())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if wanted != sum(tensor.numel() for tensor in tensors.values()):
            raise ValueError("its weights are not those of its sizes")
        network = build(config)
        network.load_state_dict(tensors)
    except (
        AttributeError, InputError, KeyError, OSError, RecursionError, RuntimeError,
        SafetensorError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise InputError(f"{path} is truncated or no {kind} of gossamer: {error}") from error
    if any(not t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
        raise InputError(f"{path} is damaged: it holds NaN or infinity")
    return network, {key: value for key, value in header.items() if key not in ("kind", "config")}


def perplexity(used: np.ndarray) -> float:
    """The number of equally likely codes with the entropy of these counts ``[codes]``."""
    share = used[used > 0] / max(1, used.sum())
    return math.exp(-float((share * np.log(share)).sum()))
