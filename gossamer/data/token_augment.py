"""Augmentation for images that are stored as codes.

A code stands for a patch of pixels *as it is turned*: mirroring the map of codes mirrors where the
patches lie and leaves each as it was. So there is augmentation that never moves codes (noise,
statistics of another image, near codes in place of codes), and TokenAdapt, which maps codes to a
space where geometry is valid, moves them there, and maps back to codes.

Maps are ``[batch, channels, height, width]``, square where they are turned. Nothing here changes
what it is given.

Source: Lee et al., "SeiT++: Masked token modeling improves storage-efficient training", ECCV 2024,
arXiv:2312.10105 (section 3.3: TokenAdapt and ColorAdapt); Park et al., "SeiT", ICCV 2023,
arXiv:2303.11114 (section 3.3: Token-EDA and Emb-Noise); strengths as in the published code.

What differs from the published code, each on purpose: the geometric transformations are composed to
one affine map before they are applied, so that values are interpolated once; boxes of random crops
have real-valued corners and are clamped to the map where the published code draws again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, warm_cosine
from gossamer.core.task import Batch, Classification, seed_of
from gossamer.data.token_rates import adamw, set_rate
from gossamer.models.token_adapt import TokenAdaptNetwork
from gossamer.models.vqvae import nearest_codes

Interpolation = Literal["bilinear", "nearest", "bicubic"]


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _coin(probability: float, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < probability


# On codes


def synonyms(codebook: Tensor, count: int = 5) -> Tensor:
    """The nearest codes of every code by angle, without itself: int64 ``[codes, count]``.

    Raises:
        InputError: if there are not so many other codes.
    """
    if not 1 <= count < len(codebook):
        raise InputError(f"{len(codebook)} codes do not have {count} synonyms each")
    unit = F.normalize(codebook, dim=-1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-math.inf)
    return cosines.topk(count, dim=1).indices


def replace_synonyms(
    codes: Tensor,
    nearest: Tensor,
    generator: torch.Generator,
    *,
    images: float = 0.25,
    share: float = 0.25,
) -> Tensor:
    """Replaces codes by one of their synonyms at random.

    Args:
        codes: ``[batch, height, width]``.
        nearest: of :func:`synonyms`.
        generator: of the draws, on the CPU.
        images: probability that an image is changed at all.
        share: probability for each code of such an image.
    """
    changed = torch.rand(codes.shape, generator=generator) < share
    changed &= _coin(images, len(codes), generator).view(-1, 1, 1)
    which = torch.randint(nearest.shape[1], codes.shape, generator=generator)
    return torch.where(changed.to(codes.device), nearest[codes, which.to(codes.device)], codes)


def swap_patches(
    codes: Tensor,
    generator: torch.Generator,
    *,
    images: float = 0.25,
    largest: float = 0.25,
    tries: int = 10,
) -> Tensor:
    """Exchanges two square patches of a map.

    Their side is below ``largest`` of the map's; their corners are farther apart than the side
    along one axis, so they never overlap. A map on which ``tries`` draws find no such pair (or
    that is too small for any) stays as it is.

    Args:
        codes: ``[batch, height, width]``.
        generator: of the draws, on the CPU.
        images: probability that an image is changed.
        largest: bound on the side, as a share of the map's height.
        tries: pairs drawn, at most.
    """
    batch, height, width = codes.shape
    most = min(math.ceil(largest * height) - 1, height - 1, width - 1)
    if most < 1:
        return codes.clone()
    side = torch.randint(1, most + 1, (batch, 1, 1), generator=generator)
    draws = torch.rand(2, 2, batch, tries, generator=generator)
    room = torch.tensor([height, width]).view(1, 2, 1, 1) - side.view(1, 1, batch, 1) + 1
    corners = (draws * room).long()
    apart = (corners[0] - corners[1]).abs().amax(0) > side.view(batch, 1)
    # The first pair that is far enough apart.
    chosen = apart.int().argmax(1)
    wanted = apart.any(1) & _coin(images, batch, generator)
    corners = corners[:, :, torch.arange(batch), chosen].view(2, 2, batch, 1, 1)
    rows = torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).view(1, 1, -1)

    def inside(corner: Tensor) -> Tensor:
        top, left = corner
        return (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)

    shift = corners[1] - corners[0]
    sign = inside(corners[0]).long() - inside(corners[1]).long()
    sign = sign * wanted.view(-1, 1, 1)
    source = (rows + sign * shift[0]) * width + columns + sign * shift[1]
    return codes.flatten(1).gather(1, source.flatten(1).to(codes.device)).view_as(codes)


# On embeddings


def color_adapt(z: Tensor, partner: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Gives ``z`` the mean and deviation of ``partner``, for each image and channel.

    ``sigma(partner) (z - mu(z)) / sigma(z) + mu(partner)``, deviations unbiased over space and
    computed in float32. A channel that is constant (deviation below ``eps``) becomes the
    partner's mean.

    Args:
        z: ``[batch, channels, height, width]``, of more than one place.
        partner: of the same shape.
        eps: bound on the deviation that is divided by.
    """
    std, mean = torch.std_mean(z.float(), dim=(2, 3), keepdim=True)
    other_std, other_mean = torch.std_mean(partner.float(), dim=(2, 3), keepdim=True)
    scale = torch.where(std > eps, other_std / std.clamp(min=eps), torch.zeros_like(std))
    return (scale * (z.float() - mean) + other_mean).to(z.dtype)


@dataclass(frozen=True)
class ColorAdapt:
    """Applies :func:`color_adapt` with the batch in reversed order as partners.

    Attributes:
        p: probability of each image.
    """

    p: float = 0.5

    def __call__(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Maps of embeddings ``[batch, dims, height, width]``; returns new ones."""
        chosen = _coin(self.p, len(z), generator).view(-1, 1, 1, 1).to(z.device)
        return torch.where(chosen, color_adapt(z, z.flip(0)), z)


@dataclass(frozen=True)
class EmbNoise:
    """Adds noise to embeddings: one value for each channel, and one for each element.

    Attributes:
        p: probability of each image.
        channel_std: of what a whole channel gets.
        element_std: of what every element gets.
    """

    p: float = 0.5
    channel_std: float = 1.0
    element_std: float = 1.0

    def __call__(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Maps of embeddings ``[batch, dims, height, width]``; returns new ones."""
        chosen = _coin(self.p, len(z), generator).view(-1, 1, 1, 1)
        channel = torch.randn(*z.shape[:2], 1, 1, generator=generator)
        element = torch.randn(z.shape, generator=generator)
        noise = chosen * (self.channel_std * channel + self.element_std * element)
        return z + noise.to(z)


# Geometry


@dataclass(frozen=True)
class Geometry:
    """Random affine maps: a mirror, then a group of four, then a random crop.

    Attributes:
        flip: probability of the mirror.
        group: probability that the group is applied at all.
        member: probability of each member then.
        degrees: rotation is uniform in plus or minus this.
        translate: shifts along either axis, as a share of the side.
        shear: horizontal shear, in degrees.
        scale: area of the crop, as a share of the map's.
        ratio: of the crop's width to its height, uniform in the logarithm.
    """

    flip: float = 0.5
    group: float = 0.5
    member: float = 0.5
    degrees: float = 30.0
    translate: float = 0.2
    shear: float = 15.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws ``count`` maps from output to input places, ``[count, 2, 3]``.

        Places run from -1 to 1 along each axis, so the same map turns images, maps of codes and
        maps of any other resolution.
        """
        group = _coin(self.group, count, generator)

        def member(bound: float) -> Tensor:
            on = group & _coin(self.member, count, generator)
            return on * _uniform(-bound, bound, count, generator)

        angle = torch.deg2rad(member(self.degrees))
        right, down = 2 * member(self.translate), 2 * member(self.translate)
        shear = torch.tan(torch.deg2rad(member(self.shear)))
        mirror = 1.0 - 2.0 * _coin(self.flip, count, generator).float()
        crop = random_boxes(count, generator, scale=self.scale, ratio=self.ratio)
        one, zero = torch.ones(count), torch.zeros(count)
        cos, sin = angle.cos(), angle.sin()
        turned = _matrix(cos, sin, zero, -sin, cos, zero)
        moved = _matrix(one, zero, right, zero, one, down)
        sheared = _matrix(one, shear, zero, zero, one, zero)
        mirrored = _matrix(mirror, zero, zero, zero, one, zero)
        # Applied to a place of the output from right to left: the crop is undone first.
        return (mirrored @ turned @ moved @ sheared @ crop)[:, :2]


GEOMETRY = Geometry()


def _matrix(*entries: Tensor) -> Tensor:
    zero = torch.zeros_like(entries[0])
    return torch.stack([*entries, zero, zero, zero + 1], dim=1).view(-1, 3, 3)


def random_boxes(
    count: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes of random area and proportions at random places, as maps ``[count, 3, 3]``.

    Args:
        count: boxes.
        generator: of the draws, on the CPU.
        scale: area as a share of the whole.
        ratio: of width to height, uniform in the logarithm.

    Raises:
        InputError: if a bound is not positive, or the lower is above the upper.
    """
    for low, high in (scale, ratio):
        if not 0.0 < low <= high:
            raise InputError(f"crops need bounds 0 < low <= high, not {low:g} and {high:g}")
    area = _uniform(*scale, count, generator)
    shape = _uniform(math.log(ratio[0]), math.log(ratio[1]), count, generator).exp()
    width = (area * shape).sqrt().clamp(max=1.0)
    height = (area / shape).sqrt().clamp(max=1.0)
    x = (1.0 - width) * _uniform(-1.0, 1.0, count, generator)
    y = (1.0 - height) * _uniform(-1.0, 1.0, count, generator)
    zero = torch.zeros(count)
    return _matrix(width, zero, x, zero, height, y)


def warp(x: Tensor, theta: Tensor, side: int, mode: Interpolation = "bilinear") -> Tensor:
    """Maps ``[batch, channels, side, side]`` taken from ``x`` at the places that ``theta`` names.

    What lies outside of ``x`` is zero; bicubic sampling, used for crops, and nearest places, used
    for codes, repeat the border.

    Args:
        x: ``[batch, channels, height, width]``.
        theta: of :meth:`Geometry.draw`, ``[batch, 2, 3]``.
        side: of the output.
        mode: of interpolation.
    """
    grid = F.affine_grid(theta.to(x), [len(x), x.shape[1], side, side], align_corners=False)
    padding = "zeros" if mode == "bilinear" else "border"
    return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=False)


def random_resized_crop(
    z: Tensor,
    side: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random box of each map, resized to ``side`` (bicubic), ``[batch, dims, side, side]``."""
    theta = random_boxes(len(z), generator, scale=scale, ratio=ratio)[:, :2]
    return warp(z, theta, side, "bicubic")


Mix = Callable[[Tensor], Tensor]
"""What is done to the maps of a batch between geometry and codes (mixing images, for example)."""


@dataclass(frozen=True)
class TokenAdapt:
    """Geometric augmentation of codes by way of a space in which geometry is valid.

    Attributes:
        network: trained by :class:`TokenAdaptTraining`; frozen while anything else is trained.
        geometry: what is done there.
    """

    network: TokenAdaptNetwork
    geometry: Geometry = GEOMETRY

    @torch.no_grad()
    def __call__(self, codes: Tensor, generator: torch.Generator, mix: Mix | None = None) -> Tensor:
        """New codes ``[batch, crop, crop]`` of codes ``[batch, grid, grid]``."""
        self.network.to(codes.device).eval()
        return self.turned(codes, self.geometry.draw(len(codes), generator), mix)

    @torch.no_grad()
    def turned(self, codes: Tensor, theta: Tensor, mix: Mix | None = None) -> Tensor:
        """New codes, with the affine maps given."""
        x = warp(self.network.unfold(codes), theta, 2 * self.network.crop)
        return self.network.codes_of(x if mix is None else mix(x))


@dataclass(frozen=True)
class NaiveAdapt:
    """The same geometry on the map of codes itself: what TokenAdapt is measured against.

    Each code moves to the nearest place and stays the patch it was; places outside of the map
    repeat its border.

    Attributes:
        codebook: of the tokenizer, ``[codes, dims]`` (images are mixed as its vectors).
        crop: side of the maps that go out.
        geometry: what is done.
    """

    codebook: Tensor
    crop: int
    geometry: Geometry = GEOMETRY

    def __call__(self, codes: Tensor, generator: torch.Generator, mix: Mix | None = None) -> Tensor:
        """New codes ``[batch, crop, crop]`` of codes ``[batch, grid, grid]``."""
        return self.turned(codes, self.geometry.draw(len(codes), generator), mix)

    def turned(self, codes: Tensor, theta: Tensor, mix: Mix | None = None) -> Tensor:
        """New codes, with the affine maps given."""
        moved = warp(codes.unsqueeze(1).float(), theta, self.crop, "nearest").squeeze(1).long()
        if mix is None:
            return moved
        codebook = self.codebook.to(codes.device)
        z = mix(codebook[moved].permute(0, 3, 1, 2))
        return nearest_codes(z.permute(0, 2, 3, 1), codebook)


class TokenAdaptTraining(Rule):
    """Trains TokenAdapt's networks on pairs of an image and the image turned.

    Each step draws an affine map A, tokenises ``x`` and ``A(x)`` with the frozen tokenizer, and
    lowers the cross-entropy between ``fold(A(unfold(codes of x)))`` and the codes of ``A(x)``.
    The published code does not contain this training; it follows the paper's text, and optimizer,
    schedule and clipping are ours.

    Args:
        network: what is trained.
        encode: normalised images to codes (a tokenizer's ``encode``).
        task: gives the images.
        patch: pixels along each side of what a code stands for.
        geometry: of the pairs.
        lr: of AdamW.
        weight_decay: of matrices.
        schedule: learning-rate multiplier as a function of the fraction of training done.
        clip: largest gradient norm.
    """

    def __init__(
        self,
        network: TokenAdaptNetwork,
        encode: Callable[[Tensor], Tensor],
        task: Classification,
        *,
        patch: int,
        geometry: Geometry = GEOMETRY,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        schedule: Callable[[float], float] | None = None,
        clip: float = 3.0,
    ) -> None:
        self.network = self.adapt = network
        self.task = task
        self.optimizer = adamw(network, lr=lr, weight_decay=weight_decay)
        self.encode = encode
        self.patch = patch
        self.geometry = geometry
        self.schedule = schedule or warm_cosine(0.1)
        self.clip = clip

    def step(self, batch: Batch) -> Log:
        images = self.task.inputs(batch)[0]
        seed = seed_of("pairs", self.run.seed, self.run.epoch, self.run.step)
        theta = self.geometry.draw(len(images), torch.Generator().manual_seed(seed))
        with torch.no_grad():
            codes = self.encode(images)
            wanted = self.encode(warp(images, theta, self.adapt.crop * self.patch))
        set_rate(self.optimizer, self.schedule(self.run.fraction))
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            x = warp(self.adapt.unfold(codes), theta, 2 * self.adapt.crop)
            logits = self.adapt.fold(x)
            loss = F.cross_entropy(logits.flatten(0, 2).float(), wanted.flatten())
        self.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.adapt.parameters(), self.clip)
        self.optimizer.step()
        return {"loss": loss.detach()}
