"""Tasks and trainings on token stores: recipes, mixing, files, and a run from pixels to tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.core.fit import fit
from gossamer.data.masked_tokens import draw_masks, masked_loss
from gossamer.data.token_augment import Geometry
from gossamer.data.token_store import TokenStore, write_store
from gossamer.data.tokens import (
    FINETUNE,
    SEIT,
    SEIT_PLUS_PLUS,
    Tokenizer,
    TokenRecipe,
    TokenTask,
    TokenTraining,
    TokenViT,
    cropped,
    draw_mix,
    load_token_adapt,
    load_token_vit,
    mixed_labels,
    pretrain,
    save_token_adapt,
    save_token_vit,
    smooth,
    tokenize,
    train_token_adapt,
    train_tokenizer,
)
from gossamer.datasets.digits import digits
from tests.resuming import whole_and_resumed


@pytest.fixture(scope="module")
def images():
    return digits(seed=0, image_size=(16, 16), augment=lambda x, generator: x)


@pytest.fixture(scope="module")
def tokenizer(images):
    return train_tokenizer(images, patch=2, codes=48, width=16, epochs=4, lr=3e-3, cpu=True)


@pytest.fixture(scope="module")
def store(images, tokenizer, tmp_path_factory):
    return tokenize(images, tmp_path_factory.mktemp("tokens") / "store", tokenizer)


def vit(store: TokenStore, seed: int = 0, **options) -> TokenViT:
    torch.manual_seed(seed)
    sizes = {"side": 8, "width": 32, "depth": 2, "heads": 4} | options
    return TokenViT(store.codebook, len(store.classes), **sizes)


# From pixels to codes and back


def test_codes_keep_what_the_images_show(images, tokenizer, store) -> None:
    """Decoded images are far nearer to the originals than the mean image is."""
    part = store.splits["test"]
    rows = np.arange(200)
    again = tokenizer.decode(part.fetch(rows))
    raw = images.splits["test"].fetch(rows).float() / images.preprocess.scale
    error = (again - raw).square().mean()
    assert error < 0.25 * (raw - raw.mean(0)).square().mean()
    assert (part.labels == images.splits["test"].labels).all()


def test_codes_in_the_store_are_the_tokenizers(images, tokenizer, store) -> None:
    x, _ = next(images.batches("validation", batch_size=50, shuffle=False))
    stored = store.splits["validation"].fetch(np.arange(50))
    assert torch.equal(tokenizer.encode(x), stored)
    own = Tokenizer.load(store.tokenizer)
    assert torch.equal(own.encode(x), stored)
    assert own.preprocess == tokenizer.preprocess


def test_the_codebook_does_not_collapse(store) -> None:
    used = store.verify()
    assert (used > 0).sum() > len(used) // 2


def test_a_tokenizer_of_another_size_is_refused(tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match="the tokenizer was made for 1 of 16 x 16"):
        tokenize(digits(), tmp_path / "store", tokenizer)
    with pytest.raises(InputError, match="open them at 8 x 8"):
        train_tokenizer(digits(image_size=(9, 9)), patch=4, epochs=1)
    assert not list(tmp_path.iterdir())


# Tasks


def test_batches_are_the_stored_codes(store) -> None:
    task = TokenTask(store)
    codes, labels = next(task.batches("test", batch_size=16))
    assert torch.equal(codes, store.splits["test"].fetch(np.arange(16)))
    assert torch.equal(labels, store.splits["test"].labels[:16])
    first = [batch[1] for batch in task.batches("train", seed=1, epoch=0)]
    again = [batch[1] for batch in task.batches("train", seed=1, epoch=0)]
    other = [batch[1] for batch in task.batches("train", seed=1, epoch=1)]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))


def test_a_share_keeps_the_classes_in_proportion(store) -> None:
    task = TokenTask(store)
    part = task.take(0.2, seed=3)
    assert part.size("train") == round(0.2 * task.size("train"))
    assert part.size("test") == task.size("test")
    counts = torch.bincount(torch.cat([labels for _, labels in part.batches("train")]))
    assert counts.max() - counts.min() <= 3
    assert part.fingerprint() != task.fingerprint()


def test_a_store_without_validation_gets_one(tmp_path) -> None:
    codes = torch.arange(40 * 4).view(40, 2, 2) % 7
    labels = torch.arange(40) % 2
    store = write_store(
        tmp_path / "s", {"train": [(codes, labels)]}, codebook=torch.randn(7, 4),
        classes=["a", "b"], name="few",
    )  # fmt: skip
    task = TokenTask(store)
    assert (task.size("train"), task.size("validation")) == (36, 4)
    every = torch.cat([b[0] for s in ("train", "validation") for b in task.batches(s)])
    assert sorted(map(tuple, every.flatten(1).tolist())) == sorted(
        map(tuple, codes.flatten(1).tolist())
    )


def test_grids_that_are_not_square_are_refused(tmp_path) -> None:
    codes = torch.zeros(4, 2, 3, dtype=torch.long)
    store = write_store(
        tmp_path / "s", {"train": [(codes, torch.tensor([0, 1, 0, 1]))]},
        codebook=torch.randn(3, 4), classes=["a", "b"], name="wide",
    )  # fmt: skip
    with pytest.raises(InputError, match="grid of 2 x 3"):
        TokenTask(store)


# Recipes


def test_published_settings() -> None:
    assert (SEIT.noise, SEIT.color, SEIT.eda, SEIT.ema) == (0.5, 0.0, True, 0.99996)
    assert (SEIT_PLUS_PLUS.noise, SEIT_PLUS_PLUS.color, SEIT_PLUS_PLUS.lr) == (0.5, 0.25, 7.5e-4)
    assert (FINETUNE.noise, FINETUNE.color, FINETUNE.lr) == (0.75, 0.25, 1e-3 * 1024**0.5 / 8)
    assert (FINETUNE.layer_decay, FINETUNE.weight_decay, FINETUNE.floor) == (0.65, 0.1, 1e-6)
    assert cropped(32) == 28


def test_mixing_shares() -> None:
    """Labels stay in the share that a box leaves; both halves of a pair sum to whole images."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack([torch.zeros(1, 400, 400), torch.ones(1, 400, 400)])
    for cutmix, mixup in ((1.0, 0.0), (0.0, 0.8), (1.0, 0.8)):
        for _ in range(20):
            mix, share = draw_mix(generator, cutmix=cutmix, mixup=mixup)
            mixed = mix(maps)
            assert 1.0 - mixed[0].mean() == pytest.approx(share, abs=0.01)
            torch.testing.assert_close(mixed.sum(0), torch.ones(1, 400, 400))
    assert maps[0].max() == 0.0
    mix, share = draw_mix(generator)
    assert share == 1.0 and mix(maps) is maps
    targets = mixed_labels(smooth(torch.tensor([0, 1]), 2, 0.1), 0.75)
    torch.testing.assert_close(targets[0], torch.tensor([0.95 * 0.75 + 0.05 * 0.25, 0.275]))


def test_with_nothing_switched_on_maps_are_crops_of_the_embeddings(store) -> None:
    task = TokenTask(store)
    recipe = TokenRecipe(scale=(1.0, 1.0), cutmix=0.0, label_smoothing=0.0)
    rule = TokenTraining(vit(store), task, recipe)
    codes, labels = next(task.batches("test", batch_size=8))
    # A crop of everything with the proportions of the map is the map.
    recipe_ratio = Geometry(flip=0, group=0, scale=(1, 1), ratio=(1, 1))
    theta = recipe_ratio.draw(8, torch.Generator())
    torch.testing.assert_close(theta, torch.eye(2, 3).expand(8, 2, 3))
    z, targets = rule.augmented(codes, labels, torch.Generator().manual_seed(0))
    assert z.shape == (8, 32, 8, 8)
    assert torch.equal(targets.argmax(1), labels)


def test_layers_near_the_input_learn_slower(store) -> None:
    network = vit(store)
    rule = TokenTraining(network, TokenTask(store), dataclasses.replace(FINETUNE, lr=1.0))
    rates = {id(p): g["lr"] for g in rule.optimizer.param_groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in rule.optimizer.param_groups for p in g["params"]}
    assert rates[id(network.head.weight)] == 1.0
    assert rates[id(network.blocks[1].attn.qkv.weight)] == pytest.approx(0.65)
    assert rates[id(network.blocks[0].attn.qkv.weight)] == pytest.approx(0.65**2)
    assert rates[id(network.cut.weight)] == pytest.approx(0.65**3)
    assert decays[id(network.head.bias)] == 0.0 and decays[id(network.head.weight)] == 0.1
    assert len(rates) == len(list(network.parameters()))


def test_impossible_probabilities_are_refused(store) -> None:
    with pytest.raises(InputError, match="sum to at most 1"):
        TokenTraining(vit(store), TokenTask(store), TokenRecipe(noise=0.8, color=0.3))


# Trainings


@pytest.fixture(scope="module")
def adapt(images, tokenizer):
    return train_token_adapt(
        images, tokenizer, crop=8, width=32, heads=4, epochs=6, batch_size=32, lr=5e-3,
        geometry=Geometry(scale=(0.5, 1.0)), cpu=True,
    )  # fmt: skip


def test_adapt_gives_codes_back_and_turns_them(images, tokenizer, store, adapt) -> None:
    """With nothing done between, codes come back far above chance; mirrored ones fit better than
    the mirrored map of codes does."""
    codes = store.splits["test"].fetch(np.arange(200))
    still = torch.eye(2, 3).expand(200, 2, 3)
    used = store.verify()
    commonest = used.max() / used.sum()
    agreement = (adapt.turned(codes, still) == codes).float().mean()
    assert agreement > commonest + 0.1
    x, _ = next(images.batches("test", batch_size=200, shuffle=False))
    wanted = tokenizer.encode(x.flip(3))
    mirror = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).expand(200, 2, 3)
    turned = (adapt.turned(codes, mirror) == wanted).float().mean()
    naive = (codes.flip(2) == wanted).float().mean()
    assert turned > naive


def test_a_classifier_learns_and_survives_its_file(store, adapt, tmp_path) -> None:
    task = TokenTask(store)
    recipe = TokenRecipe(color=0.25, scale=(0.7, 1.0), cutmix=0, mixup=0, lr=3e-3, ema=0.9)
    rule = TokenTraining(vit(store, stem="conv"), task, recipe, adapt=adapt)
    fit(rule, task, epochs=10, batch_size=32, cpu=True)
    score = task.score(rule.network, "test")
    assert score > 50.0
    assert rule.network is not rule.trained
    save_token_vit(tmp_path / "net.safetensors", rule.network, task.classes)
    again, classes = load_token_vit(tmp_path / "net.safetensors")
    assert classes == task.classes
    assert task.score(again, "test") == score
    save_token_adapt(tmp_path / "adapt.safetensors", adapt)
    codes = store.splits["test"].fetch(np.arange(20))
    theta = adapt.geometry.draw(20, torch.Generator().manual_seed(0))
    loaded = load_token_adapt(tmp_path / "adapt.safetensors")
    assert torch.equal(loaded.turned(codes, theta), adapt.turned(codes, theta))
    with pytest.raises(InputError, match="no TokenAdapt"):
        load_token_adapt(tmp_path / "net.safetensors")


def test_pretraining_helps_a_frozen_encoder_name_hidden_codes(store) -> None:
    """The loss on hidden codes falls well below that of always saying how common each code is."""
    task = TokenTask(store)
    first = vit(store)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    model = pretrain(
        task, first, width=32, depth=1, heads=4, epochs=12, batch_size=64, lr=3e-3,
        scale=(0.8, 1.0), cpu=True,
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    codes = store.splits["test"].fetch(np.arange(256))
    masked, dropped = draw_masks(256, 16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = masked_loss(model.eval()(codes, masked, dropped), model.targets(codes), masked)
    share = torch.bincount(codes.flatten(), minlength=48).float() / codes.numel()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert loss < 0.9 * entropy
    network = model.classifier(10)
    assert torch.equal(network.cut.weight, model.vit.cut.weight)
    assert torch.equal(network.table.weight, model.vit.table.weight)
    assert network.head.weight.abs().max() < 1e-4


def test_a_resumed_run_is_the_unbroken_one(store, adapt, tmp_path) -> None:
    task = TokenTask(store)
    whole, resumed = whole_and_resumed(
        lambda: TokenTraining(vit(store), task, TokenRecipe(noise=0.5, color=0.5), adapt=adapt),
        task, dies_at=9, file=tmp_path / "run", epochs=2, batch_size=128, cpu=True,
    )  # fmt: skip
    for name, value in whole.trained.state_dict().items():
        assert torch.equal(value, resumed.trained.state_dict()[name]), name
