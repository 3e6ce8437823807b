"""Images stored as their most informative patches, and drawn whole again by a masked autoencoder.

Zhou et al., "Dataset Quantization", ICCV 2023, section 3.3: the patches that a classifier looks at
(GradCAM++, Chattopadhyay et al. 2018) are stored, the others are predicted while training. What is
stored, the decoder included, is counted in bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.files import write_tensors
from gossamer.core.fit import Log, Rule, cosine, fit
from gossamer.core.task import Classification, device_of, evaluating, logits_of
from gossamer.models.masked_autoencoder import MaskedAutoencoder, image_of, patches_of
from gossamer.parts.taps import layer_of


def kept_patches(patches: int, drop: float) -> int:
    """How many of an image's patches stay: ``int(patches * (1 - drop))``.

    Raises:
        InputError: if none would, or the share is out of range.
    """
    if not 0.0 <= drop < 1.0 or int(patches * (1.0 - drop) + 1e-9) < 1:
        raise InputError(f"the share of patches to drop lies in [0, 1), not {drop:g}")
    return int(patches * (1.0 - drop) + 1e-9)


def grad_cam(network: nn.Module, inputs: Tensor, layer: str) -> Tensor:
    """GradCAM++ of each image for its own most likely class, ``[n, height, width]`` >= 0.

    Args:
        network: answers logits.
        inputs: ``[n, channels, height, width]``, as the network reads them.
        layer: a convolutional layer, by name; usually the last.

    Raises:
        InputError: if there is no such layer, or it gives no maps.
    """
    seen: list[Tensor] = []
    modes = [module.training for module in network.modules()]
    handle = layer_of(network, layer).register_forward_hook(lambda *call: seen.append(call[2]))
    network.eval()
    try:
        with torch.enable_grad():
            scores = logits_of(network(inputs.to(device_of(network)))).amax(1)
            if not seen or seen[-1].ndim != 4:
                raise InputError(f"the layer {layer} gives no maps, so nothing can be drawn on it")
            maps = seen[-1]
            (gradient,) = torch.autograd.grad(scores.sum(), maps)
    finally:
        handle.remove()
        for module, mode in zip(network.modules(), modes, strict=True):
            module.training = mode
    maps, squares, cubes = maps.detach(), gradient**2, gradient**3
    below = 2.0 * squares + maps.sum((2, 3), keepdim=True) * cubes
    alpha = torch.where(below != 0.0, squares / torch.where(below == 0.0, 1.0, below), 0.0)
    weights = (alpha * gradient.relu()).sum((2, 3), keepdim=True)
    found = (weights * maps).sum(1, keepdim=True).relu()
    return nn.functional.interpolate(
        found, size=tuple(inputs.shape[2:]), mode="bilinear", align_corners=False
    )[:, 0]


def most_important(importance: Tensor, side: int, keep: int) -> Tensor:
    """The places of the patches with the largest mean importance, ascending, ``[n, keep]``.

    Args:
        importance: ``[n, height, width]``.
        side: of a patch in pixels.
        keep: how many; ties go to the earlier place.
    """
    score = patches_of(importance[:, None], side).mean(2)
    return torch.argsort(-score, dim=1, stable=True)[:, :keep].sort(1).values


@dataclass(frozen=True)
class PatchStore:
    """Some patches of many images.

    Attributes:
        patches: raw values ``[n, kept, channels * side * side]``, uint8.
        indices: places of the patches, ascending, ``[n, kept]``.
        labels: class indices ``[n]``.
        size: height and width of the images in pixels.
        channels: of the images.
        side: of a patch in pixels.
    """

    patches: Tensor
    indices: Tensor
    labels: Tensor
    size: tuple[int, int]
    channels: int
    side: int

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, indices: Tensor, side: int) -> PatchStore:
        """Stores these patches of raw images ``[n, channels, height, width]`` uint8."""
        if images.dtype != torch.uint8:
            raise InputError(f"raw images of bytes are stored, not {images.dtype}")
        cut = patches_of(images, side)
        kept = cut.gather(1, indices[..., None].expand(-1, -1, cut.shape[2]))
        height, width = int(images.shape[2]), int(images.shape[3])
        return cls(kept, indices, labels, (height, width), int(images.shape[1]), side)

    def __len__(self) -> int:
        return len(self.patches)

    def whole(self, decoder: MaskedAutoencoder | None, *, scale: float = 255.0) -> Tensor:
        """The images: stored pixels where they are stored, drawn ones elsewhere.

        Args:
            decoder: draws what is missing; None leaves the mean of the stored pixels there.
            scale: raw values are divided by this for the decoder.

        Returns:
            ``[n, channels, height, width]`` uint8; stored pixels to the bit.
        """
        total = (self.size[0] // self.side) * (self.size[1] // self.side)
        values = self.patches.shape[2]
        parts = []
        for start in range(0, len(self), 512):
            kept, at = self.patches[start : start + 512], self.indices[start : start + 512]
            if decoder is None:
                mean = kept.float().reshape(len(kept), -1, self.channels, self.side**2)
                mean = mean.mean((1, 3)).repeat_interleave(self.side**2, 1)
                drawn = mean[:, None].expand(-1, total, -1)
            else:
                with evaluating(decoder):
                    device = device_of(decoder)
                    drawn = scale * decoder((kept.float() / scale).to(device), at.to(device)).cpu()
            drawn = drawn.round().clamp(0, 255).to(torch.uint8)
            drawn = drawn.scatter(1, at[..., None].expand(-1, -1, values), kept)
            parts.append(image_of(drawn, self.channels, self.size, self.side))
        return torch.cat(parts)

    def write(self, path: Path) -> None:
        """Writes one safetensors file; places take a bit for each patch."""
        total = (self.size[0] // self.side) * (self.size[1] // self.side)
        mask = torch.zeros(len(self), total, dtype=torch.uint8)
        mask.scatter_(1, self.indices, 1)
        bits = torch.from_numpy(np.packbits(mask.numpy(), axis=1))
        shape = {"size": self.size, "channels": self.channels, "side": self.side}
        write_tensors(
            path,
            {
                "patches": self.patches.contiguous(),
                "mask": bits,
                "labels": self.labels.to(torch.int32),
            },
            {"patches": json.dumps(shape)},
        )

    @classmethod
    def read(cls, path: Path) -> PatchStore:
        """Reads what :meth:`write` wrote.

        Raises:
            InputError: if it is missing, truncated or no patch store.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                shape: dict[str, Any] = json.loads((file.metadata() or {})["patches"])
                found = {name: file.get_tensor(name) for name in ("patches", "mask", "labels")}
            (height, width), side = map(int, shape["size"]), int(shape["side"])
            total = (height // side) * (width // side)
            mask = np.unpackbits(found["mask"].numpy(), axis=1, count=total)
            kept = found["patches"].shape[1]
            if (mask.sum(1) != kept).any() or len(mask) != len(found["patches"]):
                raise ValueError("the mask does not fit the patches")
            indices = torch.from_numpy(np.nonzero(mask)[1].reshape(len(mask), kept))
            return cls(
                found["patches"], indices, found["labels"].long(), (height, width),
                int(shape["channels"]), side,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is no store of patches, or it is truncated") from error


class Redraw(Rule):
    """Trains a masked autoencoder: the mean squared error of the patches it did not see.

    Args:
        network: the autoencoder.
        task: gives images.
        drop: share of the patches that are hidden, at random.
        lr: of AdamW, along half a cosine.
    """

    def __init__(
        self, network: MaskedAutoencoder, task: Classification, *, drop: float, lr: float = 1e-3
    ) -> None:
        self.network = network
        self.side = network.side
        self.task = task
        self.keep = kept_patches(network.patches, drop)
        self.lr = lr
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)

    def step(self, batch: Any) -> Log:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * cosine(self.run.fraction)
        images = _unit(batch[0], self.task)
        cut = patches_of(images, self.side)
        order = torch.rand(cut.shape[:2], device=cut.device).argsort(1)
        seen, hidden = order[:, : self.keep], order[:, self.keep :]
        values = cut.shape[2]
        with self.run.accelerator.autocast():
            drawn = self.network(cut.gather(1, seen[..., None].expand(-1, -1, values)), seen)
            at = hidden[..., None].expand(-1, -1, values)
            loss = (drawn.gather(1, at) - cut.gather(1, at)).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(loss)
        self.optimizer.step()
        return {"loss": loss.detach()}


def train_decoder(
    task: Classification,
    side: int,
    *,
    drop: float,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> MaskedAutoencoder:
    """Trains a small masked autoencoder on the images that are stored.

    (The paper takes a large published one, whose training data and bytes are not counted there.)

    Args:
        task: its training split.
        side: of a patch in pixels.
        drop: share of the patches that will be missing.
        epochs: passes over the data.
        batch_size: images a batch.
        seed: of weights, order and masks.
        checkpoint: file that holds the run's state.
        cpu: stay on the CPU although there is a GPU.
    """
    shape = task.preprocess
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MaskedAutoencoder((shape.height, shape.width), shape.channels, side)
    fit(
        Redraw(network, task, drop=drop), task, epochs=epochs, batch_size=batch_size, seed=seed,
        checkpoint=checkpoint, cpu=cpu, title="training the decoder of patches",
    )  # fmt: skip
    return network


def _unit(inputs: Tensor, task: Classification) -> Tensor:
    """Normalised inputs back on the scale 0..1."""
    shape = task.preprocess
    mean, std = (
        torch.tensor(values, device=inputs.device).view(1, -1, 1, 1)
        for values in (shape.mean, shape.std)
    )
    return inputs * std + mean
