"""Masked token modelling: the masks' law, who sees what, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from gossamer.core.errors import InputError
from gossamer.data.masked_tokens import (
    MaskedTokenModel,
    MaskedTokens,
    draw_masks,
    mask_ratio,
    masked_loss,
)
from gossamer.models.token_vit import TokenViT, sine_cosine_positions
from gossamer.models.vqvae import nearest_codes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(codes: int = 11, side: int = 8) -> MaskedTokenModel:
    torch.manual_seed(0)
    vit = TokenViT(torch.randn(codes, 6), 3, side=side, width=16, depth=2, heads=2)
    return MaskedTokenModel(vit, width=8, depth=1, heads=2).eval()


@pytest.mark.parametrize(("mean", "low", "expected"), [(0.45, 0.4, 0.6072), (0.55, 0.5, 0.6936)])
def test_mean_share_of_masks(mean, low, expected) -> None:
    drawn = mask_ratio(seeded(), mean=mean, low=low, count=200_000)
    assert drawn.min() >= low and drawn.max() <= 1.0
    assert drawn.mean() == pytest.approx(expected, abs=1e-3)
    law = stats.truncnorm((low - mean) / 0.25, (1 - mean) / 0.25, mean, 0.25)
    assert law.mean() == pytest.approx(expected, abs=5e-5)
    assert stats.kstest(drawn[:5000].numpy(), law.cdf).pvalue > 0.01


def test_what_is_dropped_is_masked() -> None:
    for seed in range(20):
        masked, dropped = draw_masks(32, 196, seeded(seed))
        assert (dropped.sum(1) == 79).all()
        assert len(set(masked.sum(1).tolist())) == 1 and 79 <= int(masked[0].sum()) <= 196
        assert not (dropped & ~masked).any()
    assert len({tuple(row.tolist()) for row in masked}) == 32


def test_only_masked_targets_have_gradients() -> None:
    logits = torch.randn(5, 16, 4, 11, generator=seeded(), requires_grad=True)
    targets = torch.randint(11, (5, 16, 4), generator=seeded())
    masked, _ = draw_masks(5, 16, seeded())
    loss = masked_loss(logits, targets, masked)
    loss.backward()
    assert logits.grad is not None
    each = logits.grad.abs().sum((2, 3))
    assert (each[~masked] == 0).all() and (each[masked] > 0).all()
    by_hand = torch.stack(
        [
            -torch.log_softmax(logits[b, n].detach(), 1)[torch.arange(4), targets[b, n]].mean()
            for b, n in masked.nonzero().tolist()
        ]
    ).mean()
    torch.testing.assert_close(loss.detach(), by_hand)


def test_targets_are_the_codes_of_each_patch() -> None:
    codes = torch.arange(64).view(1, 8, 8)
    targets = model().targets(codes)[0]
    assert targets[0].tolist() == [0, 1, 8, 9]
    assert targets[5].tolist() == [18, 19, 26, 27]
    assert targets[15].tolist() == [54, 55, 62, 63]


def test_hidden_places_hold_the_class_token() -> None:
    made = model()
    masked = torch.tensor([[True, True, False, False]])
    dropped = torch.tensor([[True, False, False, False]])
    encoded = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 16)  # class token, patches 1, 2, 3
    sequence = made.decoder_input(encoded, masked, dropped)
    assert sequence[0, :, 0].tolist() == [0, 0, 0, 2, 3]


def test_hidden_codes_cannot_be_seen() -> None:
    """Changing hidden codes changes no answer; changing shown ones does."""
    made = model()
    codes = torch.randint(11, (4, 8, 8), generator=seeded())
    masked, dropped = draw_masks(4, 16, seeded())
    hidden = masked.view(4, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():
        answer = made(codes, masked, dropped)
        other = torch.where(hidden, (codes + 3) % 11, codes)
        torch.testing.assert_close(made(other, masked, dropped), answer)
        other = torch.where(hidden, codes, (codes + 3) % 11)
        assert (made(other, masked, dropped) - answer).abs().max() > 1e-3


def test_the_table_learns_as_input_only() -> None:
    made = model()
    codes = torch.randint(11, (4, 8, 8), generator=seeded())
    everything = torch.ones(4, 16, dtype=torch.bool)
    loss = masked_loss(
        made(codes, everything, torch.zeros_like(everything)), made.targets(codes), everything
    )
    loss.backward()
    # All is masked, so no embedding enters; the table as classifier is detached.
    grad = made.vit.table.weight.grad
    assert grad is None or (grad == 0).all()
    assert made.bias.grad.abs().sum() > 0


def test_crops_of_everything_are_the_stored_codes() -> None:
    made = model(codes=40)
    codebook = torch.randn(40, 6, generator=seeded())
    rule = MaskedTokens(made, codebook, scale=(0.999999, 1.0))
    flat = torch.randint(40, (6, 1, 1), generator=seeded()).expand(6, 8, 8)
    assert torch.equal(rule.augmented(flat, seeded()), flat)
    z = codebook[flat]
    assert torch.equal(nearest_codes(z, codebook), flat)


def test_published_rates() -> None:
    rule = MaskedTokens(model(), torch.randn(11, 6))
    assert max(g["lr"] for g in rule.optimizer.param_groups) == pytest.approx(2.4e-3)
    assert all(g["betas"] == (0.9, 0.95) for g in rule.optimizer.param_groups)
    assert {g["weight_decay"] for g in rule.optimizer.param_groups} == {0.0, 0.05}
    assert rule.schedule(0.1) == pytest.approx(1.0) and rule.schedule(1.0) == pytest.approx(0.0)


def test_first_logits_are_near_chance() -> None:
    torch.manual_seed(0)
    vit = TokenViT(torch.randn(128, 32), 3, side=8, width=32, depth=2, heads=4)
    made = MaskedTokenModel(vit, width=32, depth=1, heads=4).eval()
    codes = torch.randint(128, (64, 8, 8), generator=seeded())
    masked, dropped = draw_masks(64, 16, seeded())
    with torch.no_grad():
        loss = masked_loss(made(codes, masked, dropped), made.targets(codes), masked)
    # A logit is a mean of products of unit variance: its deviation is about 1 or less.
    assert math.log(128) - 0.1 < loss.item() < math.log(128) + 0.7


def test_the_classifier_keeps_the_encoder_and_only_its_head_is_new() -> None:
    made = model()
    network = made.classifier(7, drop_path=0.2)
    before, after = made.vit.state_dict(), network.state_dict()
    assert set(before) == set(after)
    for name, value in before.items():
        if not name.startswith("head."):
            assert torch.equal(after[name], value), name
    assert network.head.out_features == 7
    assert 0 < network.head.weight.abs().max() < 1e-4 and not network.head.bias.any()
    assert network.dropout.p == 0.0 and network.config["drop_path"] == 0.2


def test_overlapping_patches_are_refused() -> None:
    vit = TokenViT(torch.randn(4, 6), 3, side=4, width=16, depth=1, heads=2, stem="conv")
    with pytest.raises(InputError, match="patches that touch"):
        MaskedTokenModel(vit)


def test_positions_of_a_grid() -> None:
    at = sine_cosine_positions(16, 5).view(5, 5, 16)
    assert torch.equal(at[2, :, :8], at[2, :1, :8].expand(5, 8))
    assert torch.equal(at[:, 3, 8:], at[:1, 3, 8:].expand(5, 8))
    assert at[1, 4, 0] == pytest.approx(torch.sin(torch.tensor(1.0)).item())
    assert len({tuple(row.tolist()) for row in at.flatten(0, 1)}) == 25


def test_encoder_sees_nothing_but_the_middle_of_larger_maps() -> None:
    vit = model().vit
    codes = torch.randint(11, (2, 12, 12), generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(vit(codes), vit(codes[:, 2:10, 2:10]))
        torch.testing.assert_close(vit(codes), vit(vit.embed(codes)))
