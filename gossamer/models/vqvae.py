"""A small image tokenizer: convolutions around a codebook of unit directions.

An image becomes a grid of codes, one for each patch; the codes become an image again. The codebook
is compared by angle only (both sides are L2-normalised), has few dimensions, and is not trained by
gradients but follows the moving average of what is assigned to it, so that few codes die.

Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", NeurIPS
2017, arXiv:1711.00937 (the network and the moving average of appendix A.1); Yu et al.,
"Vector-quantized image modeling with improved VQGAN", ICLR 2022, arXiv:2110.04627 (section 3.2:
L2-normalised codes of 32 dimensions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import InputError


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The code whose direction is nearest, for each vector.

    Args:
        vectors: ``[..., d]``, of any length.
        codebook: ``[codes, d]``, of any length.

    Returns:
        int64 ``[...]``. Among unit vectors the least squared distance is the largest cosine.
    """
    cosines = F.normalize(vectors, dim=-1) @ F.normalize(codebook, dim=-1).T
    return cosines.argmax(-1)


class VqVae(nn.Module):
    """Encoder, codebook and decoder.

    Args:
        channels: of the images.
        patch: pixels along each side of what one code stands for, a power of two of at least 2.
        codes: entries of the codebook.
        dims: dimensions of a code.
        width: channels after the first halving; each further halving doubles them up to
            ``4 * width``.
        decay: of the codebook's moving average.

    Raises:
        InputError: if the sizes make no network.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        channels: int,
        *,
        patch: int = 8,
        codes: int = 391,
        dims: int = 32,
        width: int = 64,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        levels = patch.bit_length() - 1
        if patch != 1 << levels or not 1 <= levels <= 6:
            raise InputError(f"a code stands for 2, 4, 8, 16, 32 or 64 pixels a side, not {patch}")
        if channels not in (1, 3):
            raise InputError(f"images have 1 or 3 channels, not {channels}")
        if not (
            2 <= codes <= 1 << 16 and 1 <= dims <= 1024 and 8 <= width <= 1024 and not width % 8
        ):
            raise InputError(
                "a tokenizer has 2 to 65536 codes of 1 to 1024 dimensions and a width of 8 to 1024 "
                f"in steps of 8, not {codes}, {dims} and {width}"
            )
        self.config = {
            "channels": channels, "patch": patch, "codes": codes, "dims": dims, "width": width,
        }  # fmt: skip
        self.decay = decay
        self.patch = patch
        self.dims = dims
        sizes = [min(width << level, 4 * width) for level in range(levels)]
        down: list[nn.Module] = []
        before = channels
        for size in sizes:
            down += [nn.Conv2d(before, size, 4, 2, 1), nn.GroupNorm(8, size), nn.GELU()]
            before = size
        self.encoder = nn.Sequential(
            *down, nn.Conv2d(before, before, 3, 1, 1), nn.GELU(), nn.Conv2d(before, dims, 1)
        )
        up: list[nn.Module] = [nn.Conv2d(dims, before, 3, 1, 1), nn.GELU()]
        for size in [*reversed(sizes[:-1]), width]:
            up += [nn.ConvTranspose2d(before, size, 4, 2, 1), nn.GroupNorm(8, size), nn.GELU()]
            before = size
        self.decoder = nn.Sequential(*up, nn.Conv2d(before, channels, 3, 1, 1))
        self.register_buffer("codebook", self._scaled(torch.randn(codes, dims)))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", F.normalize(self.codebook, dim=-1))

    def _scaled(self, vectors: Tensor) -> Tensor:
        # Unit variance an element: the strength of noise on embeddings is stated in these units.
        return F.normalize(vectors, dim=-1) * math.sqrt(self.dims)

    def directions(self, images: Tensor) -> Tensor:
        """What is looked up in the codebook, ``[batch, height, width, dims]``, of length 1."""
        return F.normalize(self.encoder(images).permute(0, 2, 3, 1), dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        """Codes of images.

        Args:
            images: normalised, ``[batch, channels, height, width]``.

        Returns:
            int64 ``[batch, height / patch, width / patch]``.
        """
        return nearest_codes(self.directions(images), self.codebook)

    def decode(self, codes: Tensor) -> Tensor:
        """Normalised images of codes ``[batch, height, width]``."""
        return self.decoder(self.codebook[codes].permute(0, 3, 1, 2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Through the codes and back, with gradients straight through the lookup.

        Returns:
            Images, codes, the directions that were looked up, and the directions found.
        """
        found = self.directions(images)
        codes = nearest_codes(found, self.codebook)
        entries = F.normalize(self.codebook, dim=-1)[codes]
        straight = found + (entries - found).detach()
        images = self.decoder(straight.permute(0, 3, 1, 2) * math.sqrt(self.dims))
        return images, codes, found, entries

    @torch.no_grad()
    def place(self, directions: Tensor) -> None:
        """Puts the codes at these directions ``[codes, dims]``, each with weight 1."""
        self.sums.copy_(F.normalize(directions, dim=-1))
        self.counts.fill_(1.0)
        self.codebook.copy_(self._scaled(self.sums))

    @torch.no_grad()
    def follow(self, directions: Tensor, codes: Tensor, dead: float, draw: Tensor) -> None:
        """Moves every code towards the mean of what was assigned to it.

        Args:
            directions: ``[n, dims]``, of length 1.
            codes: assigned, ``[n]``.
            dead: codes with a moving average of fewer assignments than this are placed anew.
            draw: rows of ``directions`` for them, ``[codes]``.
        """
        count = torch.zeros_like(self.counts).index_add_(
            0, codes, torch.ones_like(codes, dtype=self.counts.dtype)
        )
        total = torch.zeros_like(self.sums).index_add_(0, codes, directions.to(self.sums.dtype))
        self.counts.lerp_(count, 1.0 - self.decay)
        self.sums.lerp_(total, 1.0 - self.decay)
        idle = self.counts < dead
        self.sums[idle] = directions[draw[idle]].to(self.sums.dtype)
        self.counts[idle] = max(1.0, dead)
        self.codebook.copy_(self._scaled(self.sums))
