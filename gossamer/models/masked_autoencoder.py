"""A small masked autoencoder: sees some patches of an image and draws the others.

He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022: the encoder reads the visible
patches alone, the decoder all places, with a learned vector where nothing was seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError


def patches_of(images: Tensor, side: int) -> Tensor:
    """Cuts images into patches: ``[n, c, h, w]`` to ``[n, patches, c * side * side]``, row by row.

    Raises:
        InputError: if the sides are no multiples of ``side``.
    """
    n, c, h, w = images.shape
    if h % side or w % side:
        raise InputError(f"images of {h} x {w} do not divide into patches of {side} x {side}")
    cut = images.reshape(n, c, h // side, side, w // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * side * side)


def image_of(patches: Tensor, channels: int, size: tuple[int, int], side: int) -> Tensor:
    """Puts patches together again: the inverse of :func:`patches_of`."""
    n, (h, w) = len(patches), size
    cut = patches.reshape(n, h // side, w // side, channels, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, h, w)


def places(rows: int, columns: int, width: int) -> Tensor:
    """Fixed sines and cosines of both coordinates, ``[rows * columns, width]``."""
    rates = 10_000.0 ** -torch.linspace(0, 1, width // 4)
    axes = [torch.arange(length)[:, None] * rates for length in (rows, columns)]
    down, right = (torch.cat([axis.sin(), axis.cos()], 1) for axis in axes)
    grid = torch.cat([down[:, None].expand(-1, columns, -1), right[None].expand(rows, -1, -1)], 2)
    return nn.functional.pad(grid.flatten(0, 1), (0, width - grid.shape[2]))


class MaskedAutoencoder(nn.Module):
    """Draws what is missing of an image.

    Args:
        size: height and width in pixels.
        channels: of the images.
        side: of a patch in pixels.
        width: of the encoder.
        depth: blocks of the encoder.
        decoder_width: of the decoder.
        decoder_depth: blocks of the decoder.
        heads: of each block.

    Raises:
        InputError: if the image does not divide into patches.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        side: int,
        *,
        width: int = 96,
        depth: int = 3,
        decoder_width: int = 64,
        decoder_depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        rows, columns = size[0] // side, size[1] // side
        if rows * side != size[0] or columns * side != size[1]:
            raise InputError(
                f"images of {size[0]} x {size[1]} do not divide into patches of {side} x {side}"
            )
        self.size, self.channels, self.side = size, channels, side
        values = channels * side * side
        self.embed = nn.Linear(values, width)
        self.encoder = _blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width)
        self.bridge = nn.Linear(width, decoder_width)
        self.unseen = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder = _blocks(decoder_width, decoder_depth, heads)
        self.head = nn.Sequential(nn.LayerNorm(decoder_width), nn.Linear(decoder_width, values))
        self.register_buffer("places", places(rows, columns, width), persistent=False)
        self.register_buffer(
            "decoder_places", places(rows, columns, decoder_width), persistent=False
        )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return len(self.get_buffer("places"))

    def forward(self, visible: Tensor, indices: Tensor) -> Tensor:
        """Draws all patches.

        Args:
            visible: the patches that are seen, ``[n, kept, values]``.
            indices: their places, ``[n, kept]``.

        Returns:
            ``[n, patches, values]``.
        """
        seen = self.embed(visible) + self.get_buffer("places")[indices]
        seen = self.bridge(self.norm(self.encoder(seen)))
        whole = self.unseen.expand(len(visible), self.patches, -1)
        whole = whole.scatter(1, indices[..., None].expand_as(seen), seen.to(whole.dtype))
        return self.head(self.decoder(whole + self.get_buffer("decoder_places")))


def _blocks(width: int, depth: int, heads: int) -> nn.Module:
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
