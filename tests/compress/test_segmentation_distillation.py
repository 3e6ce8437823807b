"""Losses at points worked out by hand, boxes that cancel, frozen teachers, and learning."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.compress.recipe import Recipe
from gossamer.compress.segmentation_distillation import (
    CPS,
    MGD,
    Imitated,
    Imitation,
    SemiSupervised,
    box_cutmix_mask,
    channel_imitation,
    flipped_boxes,
    hard_pixel_cross_entropy,
    image_level_loss,
    logit_imitation,
    mgd,
    mixed,
    region_level_loss,
    region_similarity,
    variation_imitation,
)
from gossamer.core.errors import InputError
from gossamer.core.fit import fit
from gossamer.core.network import Network
from gossamer.core.saved import save_network
from gossamer.core.segmentation import IGNORED, Segmentation, pixel_cross_entropy
from gossamer.core.task import Preprocess
from gossamer.models.segmentation import UNet

SIDE = 16


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unet(seed: int, width: int = 4, depth: int = 2, classes: int = 3) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(1, classes, width=width, depth=depth)


def quarters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Blocks of three noisy grey levels."""
    masks = torch.randint(0, 3, (count, 4, 4), generator=draws(seed))
    masks = masks.repeat_interleave(SIDE // 4, 1).repeat_interleave(SIDE // 4, 2)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=draws(seed + 1))
    return masks.unsqueeze(1) + 0.5 * noise, masks


def blocks() -> Segmentation:
    plain = Preprocess(channels=1, height=SIDE, width=SIDE, mean=(1.0,), std=(1.0,), scale=1.0)
    return Segmentation(
        {"train": quarters(24, 0), "validation": quarters(12, 5), "test": quarters(12, 9)},
        plain,
        ("a", "b", "c"),
        name="blocks",
    )


def batch(seed: int = 0) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    images, masks = quarters(2, seed)
    first, second = quarters(3, seed + 20)[0], quarters(3, seed + 40)[0]
    return (images, masks), first, second, box_cutmix_mask(3, SIDE, SIDE, generator=draws(seed))


def test_region_loss_is_that_worked_out_by_hand() -> None:
    student = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    # adaptive pooling to 2 x 2 repeats the row, which leaves the mean of the differences.
    ours = region_similarity(student, 2)[0, :2, :2]
    assert torch.allclose(ours, torch.tensor([[1.0, 0.70711], [0.70711, 1.0]]), atol=1e-5)
    assert torch.allclose(region_similarity(teacher, 2)[0, :2, :2], torch.eye(2))
    assert float(region_level_loss(student, teacher, region=2)) == pytest.approx(0.25)


def test_region_loss_ignores_scale_and_rotation_of_channels() -> None:
    teacher = torch.randn(2, 6, 14, 14, generator=draws())
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draws(1)))[0]
    rotated = torch.einsum("dc,bchw->bdhw", rotation, teacher)
    for student in (3.7 * teacher, rotated):
        assert float(region_level_loss(student, teacher)) == pytest.approx(0.0, abs=1e-10)
    other = torch.randn(2, 9, 28, 28, generator=draws(2))
    assert float(region_level_loss(other, teacher)) > 0.1


def test_image_loss_sees_a_constant() -> None:
    logits = torch.randn(4, 5, 6, 6, generator=draws())
    loss = image_level_loss(logits - 0.3, logits)
    assert float(loss) == pytest.approx(4 * 5 * 0.3, rel=1e-5)
    assert float(image_level_loss(logits - 0.3, logits, reduction="mean")) == pytest.approx(0.3)


def test_mixing_is_exact() -> None:
    _, first, second, mask = batch()
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mixed(first, first, mask), first)
    assert torch.equal(mixed(first, second, torch.zeros_like(mask)), first)
    a, b = torch.randn(2, 3, 5, SIDE, SIDE, generator=draws())
    decided = mixed(a.argmax(1, True).float(), b.argmax(1, True).float(), mask)
    assert torch.equal(mixed(a, b, mask).argmax(1), decided[:, 0].long())


def test_overlapping_boxes_flip_back() -> None:
    # Boxes of 4 x 4 at (0, 0), (2, 2) and (3, 3) in an image of 8 x 8.
    corner = torch.tensor([[0.0, 2.0, 3.0]])
    sides = torch.full((1, 3), 4.0)
    mask = flipped_boxes(corner, corner, sides, sides, (8, 8))[0, 0]
    for row in range(8):
        for column in range(8):
            inside = sum(c <= row < c + 4 and c <= column < c + 4 for c in (0, 2, 3))
            assert float(mask[row, column]) == inside % 2
    assert float(mask[2, 2]) == 0.0 and float(mask[0, 0]) == 1.0 and float(mask[3, 3]) == 1.0


def test_areas_of_boxes_are_those_drawn() -> None:
    one = box_cutmix_mask(4000, 100, 60, boxes=1, generator=draws())
    share = one.mean((1, 2, 3))
    assert float(share.min()) >= 0.24 and float(share.max()) <= 0.51
    assert float(share.mean()) == pytest.approx(0.375, abs=0.005)
    # Shapes vary while the area is kept.
    heights = one.amax(3).sum((1, 2))
    assert float(heights.min()) < 30 and float(heights.max()) > 95
    with pytest.raises(InputError, match="CutMix"):
        box_cutmix_mask(1, 8, 8, boxes=0)


def test_teachers_stay_as_they_are_and_the_reverse_terms_teach_nobody() -> None:
    wide, deep = unet(1, 8), unet(2, 4, 3)
    before = copy.deepcopy((wide.state_dict(), deep.state_dict()))
    gradients = []
    for reverse in (False, True):
        rule = MGD(unet(0), wide, deep, reverse=reverse)
        rule.network.train()
        terms = rule.losses(*batch())
        assert ("reverse wide" in terms) == reverse
        total = torch.stack([torch.as_tensor(t) for t in terms.values()]).sum()
        total.backward()
        gradients.append([p.grad for p in rule.network.parameters()])
        assert rule.wide is not None and rule.deep is not None
        assert all(p.grad is None for t in (rule.wide, rule.deep) for p in t.parameters())
        assert not rule.wide.training and not rule.deep.training
    for plain, reversed_ in zip(*gradients, strict=True):
        assert plain is not None and reversed_ is not None and torch.equal(plain, reversed_)
    blocks_ = blocks()
    rule = MGD(unet(0), wide, deep)
    tasks = {"unlabelled": blocks_, "other": blocks_, "labelled": blocks_}
    fit(rule, tasks, epochs=1, batch_size=8)
    for kept, teacher in zip(before, (rule.wide, rule.deep), strict=True):
        assert teacher is not None
        assert all(torch.equal(v.cpu(), kept[k]) for k, v in teacher.state_dict().items())


def test_each_loss_is_zero_for_its_own_teacher_only() -> None:
    one, other = unet(1), unet(2)
    as_wide = MGD(copy.deepcopy(one).eval(), one, other).losses(*batch())
    as_deep = MGD(copy.deepcopy(one).eval(), other, one).losses(*batch())
    assert float(as_wide["region"]) == pytest.approx(0.0, abs=1e-8)
    assert float(as_wide["image"]) > 1e-5
    assert float(as_deep["image"]) == pytest.approx(0.0, abs=1e-8)
    assert float(as_deep["region"]) > 1e-3


def test_uniform_logits_cost_the_logarithm_of_the_classes() -> None:
    student = unet(0, classes=21)
    nn.init.zeros_(student.classifier.weight)
    assert student.classifier.bias is not None
    nn.init.zeros_(student.classifier.bias)
    terms = MGD(student, unet(1, classes=21), unet(2, classes=21)).losses(*batch())
    for name in ("labelled wide", "labelled deep", "unlabelled wide", "unlabelled deep"):
        assert float(terms[name]) == pytest.approx(3.04452, abs=1e-4)


def test_leaving_out_a_teacher_or_a_loss_leaves_out_its_terms() -> None:
    wide, deep = unet(1), unet(2)
    everything = {f"{t} {n}" for t in ("labelled", "unlabelled") for n in ("wide", "deep")}
    everything |= {"supervised", "image", "region"}
    assert set(MGD(unet(0), wide, deep).losses(*batch())) == everything
    assert set(MGD(unet(0), wide, None).losses(*batch())) == {
        "supervised", "labelled wide", "unlabelled wide", "region",
    }  # fmt: skip
    assert set(MGD(unet(0), wide, deep, terms=("image",)).losses(*batch())) == {
        "supervised", "image",
    }  # fmt: skip
    with pytest.raises(InputError, match="no loss 'pixel'"):
        MGD(unet(0), wide, deep, terms=("pixel",))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 or more"):
        MGD(unet(0), wide, deep, lambda_reg=-1.0)


def test_hard_pixels_are_those_below_the_threshold() -> None:
    # Probabilities of the right class: .9, .8, .6, .2; one pixel has no class.
    right = torch.tensor([0.9, 0.8, 0.6, 0.2, 0.5])
    logits = torch.stack((right.log(), (1 - right).log())).view(1, 2, 1, 5)
    masks = torch.tensor([0, 0, 0, 0, IGNORED]).view(1, 1, 5)
    hard = hard_pixel_cross_entropy(logits, masks, kept=1)
    assert float(hard) == pytest.approx(-(math.log(0.6) + math.log(0.2)) / 2, rel=1e-5)
    three = hard_pixel_cross_entropy(logits, masks, kept=3)
    assert float(three) == pytest.approx(-math.log(0.8 * 0.6 * 0.2) / 3, rel=1e-5)
    every = hard_pixel_cross_entropy(logits, masks, kept=50)
    assert float(every) == pytest.approx(float(pixel_cross_entropy(logits, masks)), rel=1e-5)


def test_imitations_vanish_at_the_teacher_and_have_their_symmetries() -> None:
    teacher = torch.randn(2, 3, 8, 8, generator=draws())
    other = torch.randn(2, 3, 8, 8, generator=draws(1))
    classes = torch.randint(0, 3, (2, 8, 8), generator=draws(2))
    # Logits: a constant a pixel changes nothing. Channels: a constant a channel changes nothing.
    assert float(logit_imitation(teacher + other[:, :1], teacher)) == pytest.approx(0, abs=1e-6)
    shifted = teacher + torch.randn(2, 3, 1, 1, generator=draws(3))
    assert float(channel_imitation(shifted, teacher)) == pytest.approx(0, abs=1e-5)
    assert float(logit_imitation(shifted, teacher)) > 1e-2
    assert float(variation_imitation(2 * teacher, teacher, classes, 3)) == pytest.approx(
        0, abs=1e-9
    )
    assert float(variation_imitation(other, teacher, classes, 3)) > 1e-3
    # Known: two pixels of one class, features (1, 0) and (0, 1): each has cosine sqrt(1/2).
    known = torch.eye(2).view(1, 2, 1, 2)
    same = torch.ones(1, 2, 1, 2)
    together = torch.zeros(1, 1, 2, dtype=torch.int64)
    expected = (1 - math.sqrt(0.5)) ** 2
    assert float(variation_imitation(known, same, together, 1)) == pytest.approx(expected, rel=1e-5)


def tasks() -> dict[str, Segmentation]:
    import numpy as np

    given = blocks()
    few = given.subset("train", np.arange(4))
    hidden = given.subset("train", np.arange(4, 24), labelled=False)
    return {"unlabelled": hidden, "other": hidden, "labelled": few}


def trained(rule: SemiSupervised, given: dict[str, Segmentation], epochs: int = 16) -> float:
    """Mean IoU on the test split after training."""
    sizes = dict.fromkeys(given, 4)
    fit(rule, given, epochs=epochs, batch_size=sizes, seed=1)
    return blocks().score(rule.network, "test")


def test_students_follow_their_teacher_without_any_label() -> None:
    wide = unet(1, 8)
    teacher = trained(CPS(wide, unet(2, 8), lr=0.05), tasks())
    assert teacher > 80.0
    hidden = tasks()
    hidden["labelled"] = hidden["unlabelled"]
    # Hidden labels give no gradient: nothing is learnt without a teacher.
    assert trained(SemiSupervised(unet(0), lr=0.05), hidden, 4) < 40.0
    rules = [
        MGD(unet(0), wide, wide, lambda_reg=1.0, lr=0.05),
        MGD(unet(0), wide, None, terms=("labelled",), lr=0.05),
        MGD(unet(0), None, wide, terms=("unlabelled",), lr=0.05),
        Imitation(unet(0), wide, kind="logits", classes=3, lr=0.05),
    ]
    for rule in rules:
        assert trained(rule, hidden) > 70.0


@pytest.mark.parametrize("kind", ["structure", "channels", "variation"])
def test_imitations_bring_student_and_teacher_together(kind: Imitated) -> None:
    wide = unet(1, 8)
    trained(CPS(wide, unet(2, 8), lr=0.05), tasks(), 4)
    rule = Imitation(unet(0), wide, kind=kind, classes=3, weight=1.0)
    rule.network.train()
    optimizer = torch.optim.Adam(rule.network.parameters(), lr=0.01)
    given = batch(3)
    apart = []
    for _ in range(60):
        terms = rule.losses(*given)
        loss = torch.as_tensor(terms["labelled"]) + torch.as_tensor(terms["mixed"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apart.append(loss.item())
    assert apart[-1] < 0.5 * apart[0]


def test_the_step_works_inside_shrink(tmp_path: Path) -> None:
    given = blocks()
    student = unet(0)
    before = copy.deepcopy(student.state_dict())
    save_network(tmp_path / "wide", unet(7, 8).eval(), given.example_inputs)
    options = {
        "wide": str(tmp_path / "wide"),
        "deep": "unet:4x2",
        "labelled": 0.25,
        "teacher_epochs": 1,
        "epochs": 2,
        "batch_size": 8,
    }
    shrunk = gossamer.shrink(
        student, given, recipe=Recipe.of(("mgd", options)), out=tmp_path / "out", cpu=True
    )
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    (record,) = shrunk.network.steps
    assert record["step"] == "mgd" and record["report"]["labelled images"] == 6
    assert record["report"]["region features"] == {"student": "decoder", "wide": "logits"}
    images = given.example_inputs[0]
    with torch.no_grad():
        change = shrunk.network.module.eval()(images) - student.eval()(images)
    assert float(change.abs().max()) > 1e-3


def test_bad_options_are_refused_in_a_sentence() -> None:
    given = blocks()
    network = Network(unet(0), given.example_inputs)
    with pytest.raises(InputError, match="both parts need some"):
        mgd(network, given, labelled=1.0)
    with pytest.raises(InputError, match="learning rates above 0"):
        mgd(network, given, lr=0.0)
    with pytest.raises(InputError, match="is no segmentation network"):
        mgd(network, given, wide="resnet")
