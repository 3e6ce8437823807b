"""Masked token modelling: pretraining on stored codes without labels.

Part of the patches of a map of codes is hidden, part of the hidden ones is not even shown to the
encoder, and a small decoder names the codes of what was hidden.

Source: Lee et al., "SeiT++: Masked token modeling improves storage-efficient training", ECCV 2024,
arXiv:2312.10105 (section 3.2), with the sizes and rates of the published code, which builds on Li
et al., "MAGE", CVPR 2023, arXiv:2211.09117.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule
from gossamer.core.task import Batch, seed_of
from gossamer.data.token_augment import NaiveAdapt, TokenAdapt, random_resized_crop
from gossamer.data.token_rates import adamw, set_rate, warm_cosine_to
from gossamer.models.token_vit import TokenViT, start_linear
from gossamer.models.vqvae import nearest_codes


def mask_ratio(
    generator: torch.Generator,
    *,
    mean: float = 0.45,
    std: float = 0.25,
    low: float = 0.4,
    high: float = 1.0,
    count: int = 1,
) -> Tensor:
    """Draws shares of masked patches from a truncated normal distribution, float64 ``[count]``.

    Args:
        generator: of the draws, on the CPU.
        mean: of the normal distribution.
        std: of the normal distribution.
        low: smallest share.
        high: largest share.
        count: draws.
    """
    bounds = torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64)
    below, above = torch.special.ndtr(bounds)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    drawn = mean + std * torch.special.ndtri(below + share * (above - below))
    return drawn.clamp(low, high)


def draw_masks(
    batch: int,
    patches: int,
    generator: torch.Generator,
    *,
    mean: float = 0.45,
    std: float = 0.25,
    drop: float = 0.4,
) -> tuple[Tensor, Tensor]:
    """Which patches are masked, and which of these the encoder does not see at all.

    The share that is masked is drawn once for the batch and is at least ``drop``.

    Args:
        batch: images.
        patches: of an image.
        generator: of the draws, on the CPU.
        mean: of the share before truncation.
        std: of the share before truncation.
        drop: share that is dropped.

    Returns:
        ``masked`` and ``dropped``, bool ``[batch, patches]``; all that is dropped is masked.
    """
    dropped = math.ceil(patches * drop)
    share = float(mask_ratio(generator, mean=mean, std=std, low=drop))
    masked = min(patches, max(dropped, math.ceil(patches * share)))
    rank = torch.rand(batch, patches, generator=generator).argsort(1).argsort(1)
    return rank < masked, rank < dropped


class MaskedTokenModel(nn.Module):
    """The encoder, and a decoder that names hidden codes.

    Every place that was dropped or masked enters the decoder as the encoder's class token (not as
    a learnt vector).

    Args:
        vit: the encoder, with a "patch" stem; its table of embeddings is shared.
        width: of the decoder.
        depth: of the decoder.
        heads: of the decoder.
        dropout: in the decoder.

    Raises:
        InputError: if the encoder's patches overlap.
    """

    def __init__(
        self,
        vit: TokenViT,
        *,
        width: int = 512,
        depth: int = 4,
        heads: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if vit.cut.stride != vit.cut.kernel_size:
            raise InputError("masked token modelling needs patches that touch (the patch stem)")
        self.vit = vit
        codes, dims = vit.table.weight.shape
        count = (vit.side // vit.patch) ** 2
        self.mask_token = nn.Parameter(0.02 * torch.randn(vit.width))
        self.enter = nn.Linear(vit.width, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + count, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, proj_drop=dropout, attn_drop=dropout)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, dims * vit.patch**2)
        self.leave_norm = nn.LayerNorm(dims)
        self.bias = nn.Parameter(torch.zeros(codes))
        for part in (self.enter, self.blocks, self.leave):
            start_linear(part)
        # Embeddings begin at the codebook, of unit variance: without this the first logits would
        # have a deviation of the root of `dims`, and the first loss be far above that of chance.
        nn.init.constant_(self.leave_norm.weight, dims**-0.5)

    def classifier(self, classes: int, *, drop_path: float = 0.1, seed: int = 0) -> TokenViT:
        """A network to fine-tune: the encoder, with a new head of nearly zero weights.

        Args:
            classes: logits.
            drop_path: stochastic depth of the last block (the encoder's own is not kept).
            seed: of the head.
        """
        config = self.vit.config | {"classes": classes, "drop_path": drop_path, "dropout": 0.0}
        state = {k: v for k, v in self.vit.state_dict().items() if not k.startswith("head.")}
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("head", seed))
            network = TokenViT.of_config(config)
            network.load_state_dict(state, strict=False)
            network.reset_head()
        return network

    def targets(self, codes: Tensor) -> Tensor:
        """Codes ``[batch, side, side]`` by patch, ``[batch, patches, patch * patch]``."""
        p = self.vit.patch
        x = codes.unflatten(2, (-1, p)).unflatten(1, (-1, p))
        return x.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2)

    def decoder_input(self, encoded: Tensor, masked: Tensor, dropped: Tensor) -> Tensor:
        """The full sequence, ``[batch, 1 + patches, width of the encoder]``.

        Args:
            encoded: class token and the patches that were not dropped, in order.
            masked: bool ``[batch, patches]``.
            dropped: bool ``[batch, patches]``.
        """
        cls = encoded[:, :1]
        place = (~dropped).cumsum(1) - 1
        kept = encoded[:, 1:].gather(
            1, place.clamp(min=0).unsqueeze(2).expand(-1, -1, encoded.shape[2])
        )
        return torch.cat([cls, torch.where(masked.unsqueeze(2), cls, kept)], dim=1)

    def forward(self, codes: Tensor, masked: Tensor, dropped: Tensor) -> Tensor:
        """Logits of all codes, ``[batch, patches, patch * patch, codes]``.

        Args:
            codes: ``[batch, side, side]``.
            masked: bool ``[batch, patches]``.
            dropped: bool ``[batch, patches]``, a subset, as many in every row.
        """
        x = self.vit.patches(self.vit.embed(codes))
        x = torch.where(masked.unsqueeze(2), self.mask_token, x) + self.vit.positions
        x = x[~dropped].view(len(codes), -1, self.vit.width)
        x = self.decoder_input(self.vit.encode(x), masked, dropped)
        x = self.enter(x) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.leave(self.norm(x)[:, 1:]).unflatten(2, (self.vit.patch**2, -1))
        # The table learns as the input's embedding only, never as the classifier's weight.
        return self.leave_norm(F.gelu(x)) @ self.vit.table.weight.detach().T + self.bias


def masked_loss(logits: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Cross-entropy of the codes of masked patches.

    Args:
        logits: ``[batch, patches, n, codes]``.
        targets: ``[batch, patches, n]``.
        masked: bool ``[batch, patches]``.

    Returns:
        The mean over a patch's codes, averaged over masked patches only.
    """
    each = F.cross_entropy(logits.movedim(3, 1).float(), targets, reduction="none").mean(2)
    return (each * masked).sum() / masked.sum().clamp(min=1)


class MaskedTokens(Rule):
    """Pretrains a :class:`~gossamer.models.token_vit.TokenViT` on codes.

    Codes are cropped at random on their embeddings and looked up again; with TokenAdapt the second
    half of every batch goes through that instead.

    Args:
        model: encoder and decoder.
        codebook: of the tokenizer, ``[codes, dims]``: crops are made in its space.
        adapt: TokenAdapt, or None.
        scale: area of random crops.
        lr: at its highest. Default: the published 1.5e-4 for each 256 images of a batch.
        batch_size: that ``fit`` is given, for the default of ``lr``.
        weight_decay: of matrices.
        warm: share of the training that warms up (published: 40 of 400 epochs).
        mean: of the masked share before truncation (the published launcher's; the class
            defaults of the published code are .55, with ``drop`` .5).
        std: of the masked share before truncation.
        drop: share that the encoder does not see.
        clip: largest gradient norm, or None (the published code parses 3.0 and does not use it).
    """

    def __init__(
        self,
        model: MaskedTokenModel,
        codebook: Tensor,
        *,
        adapt: TokenAdapt | NaiveAdapt | None = None,
        scale: tuple[float, float] = (0.2, 1.0),
        lr: float | None = None,
        batch_size: int = 4096,
        weight_decay: float = 0.05,
        warm: float = 0.1,
        mean: float = 0.45,
        std: float = 0.25,
        drop: float = 0.4,
        clip: float | None = None,
    ) -> None:
        self.network = self.model = model
        self.codebook = codebook
        self.adapt = adapt
        self.scale = scale
        rate = 1.5e-4 * batch_size / 256 if lr is None else lr
        self.optimizer = adamw(model, lr=rate, weight_decay=weight_decay, betas=(0.9, 0.95))
        self.schedule = warm_cosine_to(warm)
        self.share: dict[str, Any] = {"mean": mean, "std": std, "drop": drop}
        self.clip = clip

    def augmented(self, codes: Tensor, generator: torch.Generator) -> Tensor:
        """Codes ``[batch, side, side]`` to learn from, of stored codes ``[batch, grid, grid]``."""
        half = len(codes) if self.adapt is None else (len(codes) + 1) // 2
        codebook = self.codebook.to(codes.device)
        z = codebook[codes[:half]].permute(0, 3, 1, 2)
        z = random_resized_crop(z, self.model.vit.side, generator, scale=self.scale)
        cropped = nearest_codes(z.permute(0, 2, 3, 1), codebook)
        if self.adapt is None or half == len(codes):
            return cropped
        return torch.cat([cropped, self.adapt(codes[half:], generator)])

    def step(self, batch: Batch) -> Log:
        seed = seed_of("masks", self.run.seed, self.run.epoch, self.run.step)
        generator = torch.Generator().manual_seed(seed)
        codes = self.augmented(batch[0], generator)
        patches = (self.model.vit.side // self.model.vit.patch) ** 2
        masked, dropped = draw_masks(len(codes), patches, generator, **self.share)
        masked, dropped = masked.to(codes.device), dropped.to(codes.device)
        set_rate(self.optimizer, self.schedule(self.run.fraction))
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            logits = self.model(codes, masked, dropped)
            loss = masked_loss(logits, self.model.targets(codes), masked)
        self.backward(loss)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return {"loss": loss.detach()}
