"""Vision transformers on maps: of code embeddings, or of pixels.

The networks of SeiT++ (Lee et al., ECCV 2024, arXiv:2312.10105) and SeiT (Park et al., ICCV 2023,
arXiv:2303.11114): code embeddings are normalised, cut into patches by one convolution, get fixed
sine-cosine positions and pass through plain transformer blocks; patches are averaged before the
head.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gossamer.core.errors import InputError

Stem = Literal["patch", "conv"]


def sine_cosine_positions(width: int, side: int) -> Tensor:
    """Fixed positions of a square grid, ``[side * side, width]``: half for rows, half for columns.

    Raises:
        InputError: if ``width`` is no multiple of 4.
    """
    if width % 4:
        raise InputError(f"sine-cosine positions need a width in steps of 4, not {width}")
    rates = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width).float()


def start_linear(network: nn.Module) -> None:
    """First weights of all linear layers as in ViT: truncated normal (.02), biases of zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class MapViT(nn.Module):
    """A vision transformer whose input is any square map, and whose answer the mean of patches.

    Args:
        channels: of the map.
        classes: logits.
        side: of the map that is cut into patches; larger maps are cropped at their centre.
        patch: side of a patch.
        width: of the transformer.
        depth: blocks.
        heads: of attention.
        drop_path: stochastic depth of the last block; grows linearly.
        stem: "patch" cuts patches that touch; "conv" lets them overlap by half of their side
            (SeiT's 4 x 4 kernel, stride 2, for patches of 2).

    Raises:
        InputError: if the sizes do not fit together.
    """

    positions: Tensor

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        side: int = 28,
        patch: int = 2,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_path: float = 0.1,
        stem: Stem = "patch",
    ) -> None:
        super().__init__()
        if side % patch or (stem == "conv" and patch % 2) or width % heads:
            raise InputError(
                f"a map of {side} is not cut into patches of {patch} ({stem}), or a width of "
                f"{width} not into {heads} heads"
            )
        self.side = side
        self.patch = patch
        self.width = width
        self.cut = (
            nn.Conv2d(channels, width, patch, patch)
            if stem == "patch"
            else nn.Conv2d(channels, width, 2 * patch, patch, patch // 2)
        )
        self.register_buffer(
            "positions", sine_cosine_positions(width, side // patch), persistent=False
        )
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, drop_path=drop_path * at / max(1, depth - 1))
            for at in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        start_linear(self)
        # A kernel that cuts patches is a linear layer on them.
        nn.init.xavier_uniform_(self.cut.weight.data.flatten(1))
        nn.init.zeros_(cast("nn.Parameter", self.cut.bias))

    def reset_head(self, std: float = 2e-5) -> None:
        """A new head of nearly zero weights, as fine-tuning starts from."""
        nn.init.trunc_normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)

    def centre(self, x: Tensor) -> Tensor:
        """The middle of a map ``[..., height, width]``."""
        top, left = (x.shape[-2] - self.side) // 2, (x.shape[-1] - self.side) // 2
        return x[..., top : top + self.side, left : left + self.side]

    def patches(self, x: Tensor) -> Tensor:
        """Patches without positions, ``[batch, patches, width]``, of a map of the right side."""
        return self.cut(x).flatten(2).transpose(1, 2)

    def encode(self, patches: Tensor) -> Tensor:
        """The class token and patches after all blocks, ``[batch, 1 + patches, width]``.

        Args:
            patches: with their positions already added; any subset of them.
        """
        x = torch.cat([self.cls.expand(len(patches), -1, -1), patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of maps ``[batch, channels, height, width]``."""
        encoded = self.encode(self.patches(self.centre(x)) + self.positions)
        return self.head(encoded[:, 1:].mean(1))


class TokenViT(MapViT):
    """A :class:`MapViT` on codes, or on (augmented) maps of their embeddings.

    Args:
        codebook: where the table of embeddings starts, ``[codes, dims]``.
        classes: logits.
        dropout: on embeddings (.1 in pretraining, none in the training of classifiers).
        **options: of :class:`MapViT`.
    """

    def __init__(
        self, codebook: Tensor, classes: int, *, dropout: float = 0.0, **options: Any
    ) -> None:
        super().__init__(codebook.shape[1], classes, **options)
        self.config = {
            "codes": codebook.shape[0], "dims": codebook.shape[1], "classes": classes,
            "dropout": dropout, **options,
        }  # fmt: skip
        self.table = nn.Embedding.from_pretrained(codebook.detach().clone(), freeze=False)
        self.embedding_norm = nn.LayerNorm(codebook.shape[1])
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> TokenViT:
        """An untrained network of the sizes that ``config`` names."""
        options = dict(config)
        codes, dims, classes = (int(options.pop(key)) for key in ("codes", "dims", "classes"))
        return cls(torch.zeros(codes, dims), classes, **options)

    def embed(self, codes: Tensor) -> Tensor:
        """Embeddings ``[batch, dims, height, width]`` of codes ``[batch, height, width]``."""
        return self.table(codes).permute(0, 3, 1, 2)

    def patches(self, x: Tensor) -> Tensor:
        """Patches of a map of embeddings; each embedding is normalised first."""
        x = self.dropout(self.embedding_norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return super().patches(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]``.

        Args:
            x: codes, integer ``[batch, height, width]``; or a map of embeddings, floating point
                ``[batch, dims, height, width]``.
        """
        return super().forward(x if x.is_floating_point() else self.embed(x))
