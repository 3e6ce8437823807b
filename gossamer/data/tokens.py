"""Training from token stores: images as short sequences of codes, at about 1 % of the bytes.

A tokenizer turns every image into a small grid of codes once; the store of codes
(:mod:`gossamer.data.token_store`) replaces the pixels, and a vision transformer trains on the codes
directly. SeiT++ adds pretraining by masked token modelling (:mod:`gossamer.data.masked_tokens`) and
augmentation in the space of tokens: TokenAdapt and ColorAdapt
(:mod:`gossamer.data.token_augment`).

Source: Lee et al., "SeiT++: Masked token modeling improves storage-efficient training", ECCV 2024,
arXiv:2312.10105; Park et al., "SeiT", ICCV 2023, arXiv:2303.11114; orders, sizes and rates as in
their published code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gossamer.core.errors import InputError
from gossamer.core.fit import Log, Rule, fit
from gossamer.core.progress import progress
from gossamer.core.task import Batch, Classification, Labelled, logits_of, seed_of
from gossamer.data.masked_tokens import MaskedTokenModel, MaskedTokens
from gossamer.data.token_augment import (
    GEOMETRY,
    ColorAdapt,
    EmbNoise,
    Geometry,
    Mix,
    NaiveAdapt,
    TokenAdapt,
    TokenAdaptTraining,
    random_resized_crop,
    replace_synonyms,
    swap_patches,
    synonyms,
)
from gossamer.data.token_rates import adamw, set_rate, warm_cosine_to
from gossamer.data.token_store import TokenStore, write_store
from gossamer.data.tokenizer import (
    Tokenizer,
    check_patches,
    load_configured,
    save_configured,
    train_tokenizer,
)
from gossamer.datasets.splits import carve
from gossamer.models.token_adapt import TokenAdaptNetwork
from gossamer.models.token_vit import TokenViT

__all__ = [
    "FINETUNE",
    "SEIT",
    "SEIT_PLUS_PLUS",
    "ColorAdapt",
    "EmbNoise",
    "Geometry",
    "MaskedTokenModel",
    "MaskedTokens",
    "NaiveAdapt",
    "TokenAdapt",
    "TokenAdaptTraining",
    "TokenRecipe",
    "TokenStore",
    "TokenTask",
    "TokenTraining",
    "TokenViT",
    "Tokenizer",
    "load_token_adapt",
    "load_token_vit",
    "pretrain",
    "save_token_adapt",
    "save_token_vit",
    "tokenize",
    "train_token_adapt",
    "train_tokenizer",
]


# Stores as tasks


class TokenTask(Labelled):
    """Labelled images of a store; a batch is codes ``[batch, height, width]`` and labels.

    Args:
        store: where the codes are; its grid is square.
        seed: of the validation split, where the store has none (10 % of the training images).
        rows: images of a split, in place of all.

    Raises:
        InputError: if there is no training split, the grid is not square, or there is one class.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seed: int = 0,
        rows: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if "train" not in store.splits:
            raise InputError(f"{store.path} has no train split")
        if store.grid[0] != store.grid[1]:
            raise InputError(
                f"{store.path} has a grid of {store.grid[0]} x {store.grid[1]}; networks on tokens "
                "need a square one: tokenise square images"
            )
        if len(store.classes) < 2:
            raise InputError(f"{store.path} has only one class; a classifier needs at least two")
        self.store = store
        self.name = f"tokens of {store.name}"
        self.classes = store.classes
        self._of = {split: split for split in store.splits}
        self._rows = {split: np.arange(len(part)) for split, part in store.splits.items()}
        if "validation" not in store.splits:
            labels = store.splits["train"].labels
            kept, carved = carve(labels, round(0.1 * len(labels)), seed=seed, purpose="validation")
            self._rows |= {"train": kept, "validation": carved}
            self._of["validation"] = "train"
        self._rows |= dict(rows or {})
        self.example_inputs = (store.splits["train"].fetch(self._rows["train"][:2]),)

    def take(self, share: float, *, seed: int = 0) -> TokenTask:
        """The task with a share of the training images, classes in proportion."""
        if not 0.0 < share <= 1.0:
            raise InputError(f"the share of the images is in (0, 1], not {share:g}")
        rows = self._rows["train"]
        if share < 1.0:
            labels = self.store.splits["train"].labels[torch.from_numpy(rows)]
            kept = carve(labels, round(share * len(rows)), seed=seed, purpose="share")[1]
            rows = rows[kept]
        return TokenTask(self.store, rows=self._rows | {"train": rows})

    def size(self, split: str) -> int:
        return len(self._rows.get(split, ()))

    def batches(
        self,
        split: str,
        *,
        batch_size: int = 128,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for _, _, order in self.rows_of(split, batch_size, seed, epoch, start, shuffle):
            part = self.store.splits[self._of[split]]
            rows = self._rows[split][order]
            yield part.fetch(rows), part.labels[torch.from_numpy(rows)]

    def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (batch[0],)

    def fingerprint(self) -> str:
        splits = self.store.splits
        tensors = [torch.from_numpy(rows) for _, rows in sorted(self._rows.items())]
        tensors += [splits[split].labels for split in sorted(splits)]
        tensors += [torch.from_numpy(splits[split].offsets) for split in sorted(splits)]
        return self.digest_of([*tensors, self.store.codebook])


def tokenize(
    task: Classification,
    path: Path,
    tokenizer: Tokenizer,
    *,
    compress: bool = True,
    batch_size: int = 256,
) -> TokenStore:
    """Writes the store of a task's images.

    Images are read in stored order, a batch at a time, and only their codes are kept.

    Args:
        task: its splits are kept as they are.
        path: the folder; it appears in one rename.
        tokenizer: makes the codes; copied into the store.
        compress: with gzip.
        batch_size: images at a time.

    Raises:
        InputError: if the images do not suit the tokenizer, or the place cannot be written.
    """
    wanted = tokenizer.preprocess
    check_patches(task.preprocess, tokenizer.network.patch)
    sizes = [(p.channels, p.height, p.width) for p in (task.preprocess, wanted)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{task.name} has {sizes[0][0]} channels of {sizes[0][1]} x {sizes[0][2]} pixels; the "
            f"tokenizer was made for {sizes[1][0]} of {sizes[1][1]} x {sizes[1][2]}"
        )
    if task.preprocess != wanted:
        # The same normalisation for all images that one tokenizer sees.
        task = copy.copy(task)
        task.preprocess = wanted
    path = Path(path)
    file = path.with_name(f".{path.name}.tokenizer")
    total = sum(-(-task.size(split) // batch_size) for split in task.splits)

    def blocks(split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in task.batches(split, batch_size=batch_size, shuffle=False):
            bar.advance(shown)
            yield tokenizer.encode(images), labels

    try:
        tokenizer.save(file)
        with progress() as bar:
            shown = bar.add_task("tokenising", total=total)
            return write_store(
                path,
                {split: blocks(split) for split in task.splits if task.size(split)},
                codebook=tokenizer.codebook,
                classes=task.classes,
                name=task.name,
                compress=compress,
                tokenizer=file,
                about={
                    "pixels": [wanted.channels, wanted.height, wanted.width],
                    "tokenizer": dict(tokenizer.about),
                },
            )
    finally:
        file.unlink(missing_ok=True)


# Training a classifier


@dataclass(frozen=True)
class TokenRecipe:
    """How a classifier is trained on codes.

    Attributes:
        eda: Token-EDA (synonyms and exchanged patches) on codes.
        noise: probability that a batch gets Emb-Noise.
        color: probability that a batch gets ColorAdapt; at most one of both is drawn.
        scale: area of random crops.
        cutmix: parameter of CutMix's beta distribution (0: off).
        mixup: the same of Mixup, on the half of the batch that goes through TokenAdapt.
        label_smoothing: of the cross-entropy.
        lr: at its highest.
        weight_decay: of matrices.
        layer_decay: each layer's rate is this times that of the layer after it.
        warm: share of the training that warms up.
        floor: smallest learning rate.
        ema: decay of the averaged weights that are kept, or None.
    """

    eda: bool = False
    noise: float = 0.0
    color: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    cutmix: float = 1.0
    mixup: float = 0.8
    label_smoothing: float = 0.1
    lr: float = 7.5e-4
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warm: float = 0.05
    floor: float = 1e-6
    ema: float | None = None


SEIT = TokenRecipe(eda=True, noise=0.5, ema=0.99996)
"""SeiT: Token-EDA and Emb-Noise, from scratch (300 epochs, the "conv" stem)."""

SEIT_PLUS_PLUS = TokenRecipe(noise=0.5, color=0.25, ema=0.99996)
"""SeiT++ without pretraining (300 epochs from scratch, the "conv" stem; with TokenAdapt)."""

FINETUNE = TokenRecipe(noise=0.75, color=0.25, lr=4e-3, weight_decay=0.1, layer_decay=0.65)
"""SeiT++ after pretraining: 100 epochs in batches of 1024 (lr = 1e-3 sqrt(batch) / 8)."""


class TokenTraining(Rule):
    """Trains a classifier on codes with augmentation in the space of tokens.

    With TokenAdapt the first half of every batch gets random crops of its embeddings and CutMix;
    the second half goes through TokenAdapt, where images are mixed before they become codes again.

    Args:
        network: what is trained.
        task: gives codes and labels.
        recipe: how.
        adapt: TokenAdapt (or its naive counterpart), or None.
    """

    def __init__(
        self,
        network: TokenViT,
        task: TokenTask,
        recipe: TokenRecipe,
        *,
        adapt: TokenAdapt | NaiveAdapt | None = None,
    ) -> None:
        if recipe.noise + recipe.color > 1.0 or min(recipe.noise, recipe.color) < 0.0:
            raise InputError(
                f"the probabilities of noise and colour are 0 or more and sum to at most 1, not "
                f"{recipe.noise:g} and {recipe.color:g}"
            )
        self.network = self.trained = network
        self.classes = len(task.classes)
        self.recipe = recipe
        self.adapt = adapt
        self.nearest = synonyms(task.store.codebook) if recipe.eda else None
        self.optimizer = adamw(
            network,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
        )
        self.schedule = warm_cosine_to(recipe.warm, recipe.floor / recipe.lr)
        if recipe.ema is not None:
            average = get_ema_multi_avg_fn(recipe.ema)
            self.averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
            self.network = self.averaged.module

    def step(self, batch: Batch) -> Log:
        seed = seed_of("tokens", self.run.seed, self.run.epoch, self.run.step)
        codes, labels = batch
        z, targets = self.augmented(codes, labels, torch.Generator().manual_seed(seed))
        set_rate(self.optimizer, self.schedule(self.run.fraction))
        self.optimizer.zero_grad(set_to_none=True)
        with self.run.accelerator.autocast():
            loss = nn.functional.cross_entropy(logits_of(self.trained(z)).float(), targets)
        self.backward(loss)
        self.optimizer.step()
        if self.recipe.ema is not None:
            self.averaged.update_parameters(self.trained)
        return {"loss": loss.detach()}

    def augmented(
        self, codes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Maps of embeddings ``[batch, dims, side, side]`` and soft labels ``[batch, classes]``."""
        recipe, side = self.recipe, self.trained.side
        targets = smooth(labels, self.classes, recipe.label_smoothing)
        half = len(codes) if self.adapt is None else (len(codes) + 1) // 2
        first = codes[:half]
        if self.nearest is not None:
            first = replace_synonyms(first, self.nearest.to(first.device), generator)
            first = swap_patches(first, generator)
        z = random_resized_crop(self.trained.embed(first), side, generator, scale=recipe.scale)
        mix, share = draw_mix(generator, cutmix=recipe.cutmix)
        z, first_targets = mix(z), mixed_labels(targets[:half], share)
        if self.adapt is not None and half < len(codes):
            mix, share = draw_mix(generator, cutmix=recipe.cutmix, mixup=recipe.mixup)
            adapted = self.adapt(codes[half:], generator, mix)
            z = torch.cat([z, self.trained.embed(adapted)])
            first_targets = torch.cat([first_targets, mixed_labels(targets[half:], share)])
        draw = float(torch.rand((), generator=generator))
        if draw < recipe.noise:
            z = EmbNoise()(z, generator)
        elif draw < recipe.noise + recipe.color:
            z = ColorAdapt()(z, generator)
        return z, first_targets


def smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Soft labels ``[batch, classes]``."""
    hot = nn.functional.one_hot(labels, classes).float()
    return hot * (1.0 - smoothing) + smoothing / classes


def mixed_labels(targets: Tensor, share: float) -> Tensor:
    """Soft labels of images mixed with the batch in reversed order."""
    return share * targets + (1.0 - share) * targets.flip(0)


def draw_mix(
    generator: torch.Generator, *, cutmix: float = 0.0, mixup: float = 0.0
) -> tuple[Mix, float]:
    """Draws how a batch is mixed with itself in reversed order.

    Args:
        generator: of the draws, on the CPU.
        cutmix: parameter of the beta distribution for a box of the partner (0: never).
        mixup: the same for the weighted sum. With both, one of them is drawn.

    Returns:
        What is done to maps of any side, and the share of the labels that stays. A box has its
        corners on eighths of the side or finer only after rounding, so its label share is that of
        the box before rounding.
    """
    which = float(torch.rand((), generator=generator))
    rng = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
    if cutmix > 0.0 and (mixup <= 0.0 or which < 0.5):
        stay = float(rng.beta(cutmix, cutmix))
        y, x = rng.uniform(size=2)
        reach = np.sqrt(1.0 - stay) / 2
        top, bottom = max(0.0, y - reach), min(1.0, y + reach)
        left, right = max(0.0, x - reach), min(1.0, x + reach)

        def cut(maps: Tensor) -> Tensor:
            height, width = maps.shape[-2:]
            rows = slice(round(top * height), round(bottom * height))
            columns = slice(round(left * width), round(right * width))
            mixed = maps.clone()
            mixed[..., rows, columns] = maps.flip(0)[..., rows, columns]
            return mixed

        return cut, 1.0 - (bottom - top) * (right - left)
    if mixup > 0.0:
        stay = float(rng.beta(mixup, mixup))
        return lambda maps: stay * maps + (1.0 - stay) * maps.flip(0), stay
    return lambda maps: maps, 1.0


# The two trainings that come before


def train_token_adapt(
    task: Classification,
    tokenizer: Tokenizer,
    *,
    crop: int | None = None,
    width: int = 384,
    heads: int = 6,
    geometry: Geometry = GEOMETRY,
    epochs: int = 1,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> TokenAdapt:
    """Trains TokenAdapt on a task's images (before they are deleted, or on any others).

    Args:
        task: its images.
        tokenizer: frozen.
        crop: side of the maps that come out. Default: 7/8 of the grid, in whole patches of 2.
        width: of both transformers.
        heads: of their attention.
        geometry: of the pairs, and of the result.
        epochs: passes over the training split.
        batch_size: images a batch.
        lr: of AdamW.
        seed: of weights, order and draws.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Raises:
        InputError: if the grid is not square.
    """
    grid, columns = tokenizer.grid
    if grid != columns:
        raise InputError(f"TokenAdapt needs a square grid of codes, not {grid} x {columns}")
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("token adapt", seed))
        network = TokenAdaptNetwork(
            tokenizer.codebook, grid=grid, crop=crop or cropped(grid), width=width, heads=heads
        )
    patch = tokenizer.network.patch
    rule = TokenAdaptTraining(
        network, tokenizer.encode, task, patch=patch, geometry=geometry, lr=lr
    )
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        cpu=cpu, title="TokenAdapt",
    )  # fmt: skip
    return TokenAdapt(network.cpu().eval().requires_grad_(False), geometry)


def cropped(grid: int) -> int:
    """The side of maps to train on: 7/8 of the grid (28 of 32), in whole patches of 2."""
    return max(2, 2 * round(grid * 7 / 16))


def pretrain(
    task: TokenTask,
    network: TokenViT,
    *,
    adapt: TokenAdapt | NaiveAdapt | None = None,
    width: int = 512,
    depth: int = 4,
    heads: int = 16,
    epochs: int = 400,
    batch_size: int = 4096,
    lr: float | None = None,
    scale: tuple[float, float] = (0.2, 1.0),
    warm: float = 0.1,
    dropout: float = 0.1,
    seed: int = 0,
    checkpoint: Path | None = None,
    cpu: bool = False,
) -> MaskedTokenModel:
    """Pretrains a copy of ``network`` by masked token modelling; labels are not looked at.

    Args:
        task: its codes.
        network: sizes and first weights of the encoder; unchanged.
        adapt: TokenAdapt for half of each batch, or None.
        width: of the decoder.
        depth: of the decoder.
        heads: of the decoder.
        epochs: passes over the training split.
        batch_size: images a batch.
        lr: at its highest. Default: 1.5e-4 for each 256 images of a batch.
        scale: area of random crops.
        warm: share of the training that warms up.
        dropout: on the encoder's embeddings.
        seed: of the decoder's weights, order and masks.
        checkpoint: file that holds the run's state; an interrupted run resumes from it.
        cpu: stay on the CPU although there is a GPU.

    Returns:
        Encoder and decoder; ``.classifier(classes)`` makes the network to fine-tune.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("decoder", seed))
        # No stochastic depth here: patches that are hidden are regularisation enough.
        vit = TokenViT.of_config(network.config | {"drop_path": 0.0, "dropout": dropout})
        vit.load_state_dict(network.state_dict())
        model = MaskedTokenModel(vit, width=width, depth=depth, heads=heads)
    rule = MaskedTokens(
        model, task.store.codebook, adapt=adapt, scale=scale, lr=lr, warm=warm,
        batch_size=min(batch_size, task.size("train")),
    )  # fmt: skip
    fit(
        rule, task, epochs=epochs, batch_size=batch_size, seed=seed, checkpoint=checkpoint,
        cpu=cpu, title="masked tokens",
    )  # fmt: skip
    return model


# Files


def save_token_vit(path: Path, network: TokenViT, classes: tuple[str, ...]) -> None:
    """Writes a classifier as one safetensors file."""
    save_configured(path, network, "token classifier", network.config, {"classes": list(classes)})


def load_token_vit(path: str | Path) -> tuple[TokenViT, tuple[str, ...]]:
    """Reads what :func:`save_token_vit` wrote: the network and the names of its classes.

    Raises:
        InputError: if it is missing, truncated or something else.
    """
    network, extra = load_configured(Path(path), "token classifier", TokenViT.of_config)
    names = extra.get("classes")
    if not isinstance(names, list) or len(names) != network.head.out_features:
        raise InputError(f"{path} does not name the classes of its network")
    return network.eval(), tuple(map(str, names))


def save_token_adapt(path: Path, adapt: TokenAdapt) -> None:
    """Writes TokenAdapt's networks as one safetensors file."""
    save_configured(path, adapt.network, "TokenAdapt", adapt.network.config)


def load_token_adapt(path: str | Path, geometry: Geometry = GEOMETRY) -> TokenAdapt:
    """Reads what :func:`save_token_adapt` wrote.

    Raises:
        InputError: if it is missing, truncated or something else.
    """

    def build(config: dict[str, Any]) -> TokenAdaptNetwork:
        codebook = torch.zeros(config.pop("codes"), config.pop("dims"))
        return TokenAdaptNetwork(codebook, **config)

    network, _ = load_configured(Path(path), "TokenAdapt", build)
    return TokenAdapt(network.eval().requires_grad_(False), geometry)
