"""The two networks of TokenAdapt: into a space where geometry is valid, and back to codes.

Source: Lee et al., "SeiT++: Masked token modeling improves storage-efficient training", ECCV 2024,
arXiv:2312.10105 (section 3.3), with the sizes of the published code.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.models.token_vit import sine_cosine_positions


class TokenAdaptNetwork(nn.Module):
    """``unfold`` makes a map of twice the side from codes; ``fold`` makes logits of codes from it.

    Args:
        codebook: of the tokenizer, ``[codes, dims]``; frozen.
        grid: side of the code maps that come in.
        crop: side of the code maps that go out.
        width: of both transformers.
        heads: of their attention.

    Raises:
        InputError: if the width is not cut into heads.
    """

    codebook: Tensor
    positions_in: Tensor
    positions_out: Tensor

    def __init__(
        self, codebook: Tensor, *, grid: int = 32, crop: int = 28, width: int = 384, heads: int = 6
    ) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"a width of {width} is not cut into {heads} heads")
        codes, dims = codebook.shape
        self.config = {
            "codes": codes, "dims": dims, "grid": grid, "crop": crop, "width": width,
            "heads": heads,
        }  # fmt: skip
        self.grid = grid
        self.crop = crop
        self.register_buffer("codebook", codebook.detach().clone())
        self.register_buffer("positions_in", sine_cosine_positions(width, grid), persistent=False)
        self.register_buffer("positions_out", sine_cosine_positions(width, crop), persistent=False)

        def layer() -> nn.Sequential:
            # The published layer has a hyperbolic tangent in its MLP.
            block = Block(width, heads, qkv_bias=True, act_layer=cast("type[nn.Module]", nn.Tanh))
            return nn.Sequential(block, nn.LayerNorm(width))

        self.enter = nn.Linear(dims, width)
        self.first = layer()
        self.enlarge = nn.ConvTranspose2d(width, dims, 2, 2)
        self.reduce = nn.Conv2d(dims, width, 2, 2)
        self.second = layer()
        self.leave = nn.Linear(width, codes)

    def unfold(self, codes: Tensor) -> Tensor:
        """The map ``[batch, dims, 2 grid, 2 grid]`` of codes ``[batch, grid, grid]``."""
        x = self.enter(self.codebook[codes]).flatten(1, 2) + self.positions_in
        x = self.first(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.enlarge(x)

    def fold(self, x: Tensor) -> Tensor:
        """Logits ``[batch, crop, crop, codes]`` of a map ``[batch, dims, 2 crop, 2 crop]``."""
        x = self.reduce(x).flatten(2).transpose(1, 2) + self.positions_out
        return self.leave(self.second(x)).unflatten(1, (self.crop, self.crop))

    def forward(self, codes: Tensor) -> Tensor:
        """Logits with nothing done in between (maps are cropped at their centre)."""
        x = self.unfold(codes)
        at = self.grid - self.crop
        return self.fold(x[..., at : at + 2 * self.crop, at : at + 2 * self.crop])

    @torch.no_grad()
    def codes_of(self, x: Tensor) -> Tensor:
        """Codes ``[batch, crop, crop]`` of a map."""
        return self.fold(x).argmax(-1)
