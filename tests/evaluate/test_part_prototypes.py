"""Part prototypes: known distances, heads, losses, scores, and training by stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.fit import fit
from gossamer.datasets.creatures import creatures
from gossamer.evaluate.part_prototypes import (
    FeatureMaps,
    LinearHead,
    PartPrototypeNet,
    ScoreAggregation,
    alignment,
    cluster_and_separation,
    cross_class_sparsity,
    fold,
    orthogonality,
    peaks,
    spatial_similarity,
    squared_distances,
    upsample,
)
from gossamer.evaluate.part_scores import (
    consistency_score,
    parts_in,
    regions,
    stability_score,
)
from gossamer.evaluate.prototype_training import (
    PrototypeTraining,
    Rates,
    Schedule,
    improved_schedule,
    protopnet_schedule,
    train_prototypes,
)


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip


def network(seed: int = 0, classes: int = 3, per_class: int = 2, **options) -> PartPrototypeNet:
    torch.manual_seed(seed)
    example = torch.zeros(1, 3, 32, 32)
    return PartPrototypeNet(convolutions(), classes, per_class, example_inputs=example, **options)


def base(**options) -> PartPrototypeNet:
    return network(similarity="log_l2", head="linear", align=False, dim=5, **options)


# Prototypes and heads


def test_distances_are_those_of_every_patch() -> None:
    z, p = torch.rand(2, 7, 4, 5), torch.rand(6, 7)
    brute = (z[:, None] - p[None, :, :, None, None]).square().sum(2)
    torch.testing.assert_close(squared_distances(z, p), brute, atol=1e-5, rtol=0.0)


def test_similarity_of_distance_zero() -> None:
    model = base()
    z = torch.rand(1, 5, 4, 4)
    with torch.no_grad():
        model.prototypes[3] = z[0, :, 2, 1]
    activations, scores, distances = model.compare(z)
    assert float(scores[0, 3].detach()) == pytest.approx(math.log(1e4), abs=0.05)
    assert float(distances[0, 3].detach()) == pytest.approx(0.0, abs=1e-6)
    assert peaks(activations[:, 3]).tolist() == [[2, 1]]
    assert math.log(1.0 / 1e-4) == pytest.approx(9.2103, abs=1e-4)
    zero = torch.zeros(1, 5, 4, 4)
    with torch.no_grad():
        model.prototypes.zero_()
    assert float(model.compare(zero)[1][0, 0].detach()) == pytest.approx(9.2103, abs=1e-4)


def test_cosine_activations_project_and_distances_do_not_depend_on_length() -> None:
    model = network()
    z = torch.rand(2, 64, 3, 3)
    activations, scores, distances = model.compare(z)
    p = model.prototypes[4] / model.prototypes[4].norm()
    torch.testing.assert_close(activations[:, 4], torch.einsum("bdhw,d->bhw", z, p))
    torch.testing.assert_close(scores, activations.amax((2, 3)))
    _, twice, same = model.compare(2 * z)
    torch.testing.assert_close(twice, 2 * scores)
    torch.testing.assert_close(same, distances)
    cosine = torch.cosine_similarity(z, p[None, :, None, None], dim=1).amax((1, 2))
    torch.testing.assert_close(-distances[:, 4], cosine)


def test_score_aggregation() -> None:
    head = ScoreAggregation(3, 4)
    assert torch.equal(head.importance(), torch.ones(3, 4))
    with torch.no_grad():
        head.a.copy_(torch.randn(3, 4))
    torch.testing.assert_close(head.importance().sum(1), torch.full((3,), 4.0))
    assert bool((head.importance() > 0).all())
    scores = torch.rand(5, 12)
    other = scores.clone()
    other[:, 4:] += 1.0
    assert torch.equal(head(scores)[:, 0], head(other)[:, 0])
    assert bool((head(scores)[:, 1] != head(other)[:, 1]).all())
    torch.testing.assert_close(scores @ head.weights().T, head(scores))


def test_linear_head_starts_with_its_own_prototypes() -> None:
    head = LinearHead(torch.tensor([0, 0, 1, 1]), 2)
    assert head.weight.tolist() == [[1.0, 1.0, -0.5, -0.5], [-0.5, -0.5, 1.0, 1.0]]
    assert float(cross_class_sparsity(head.weight, torch.tensor([0, 0, 1, 1])).detach()) == 2.0


@pytest.mark.parametrize("make", [network, base])
def test_contributions_add_up_to_the_logit(make) -> None:
    model = make().eval()
    images = torch.randn(4, 3, 32, 32)
    told = model.explain(images)
    logits = model(images)
    assert torch.equal(told.classes, logits.argmax(1))
    torch.testing.assert_close(told.contributions.sum(1), logits.amax(1))
    assert told.maps.shape == (4, 2, 32, 32)
    assert torch.equal(told.positions, peaks(told.maps))
    first = told.contributions.abs().amax(1)
    torch.testing.assert_close(first, told.contributions.abs().gather(1, told.prototypes)[:, 0])
    asked = model.explain(images, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(asked.contributions.sum(1), logits[:, 0])


# Losses


def test_cluster_and_separation_are_masked_minima() -> None:
    distances = torch.tensor([[-0.9, -0.2, -0.7, -0.1], [-0.3, -0.4, -0.6, -0.8]])
    owners = torch.tensor([0, 0, 1, 1])
    cluster, separation = cluster_and_separation(distances, torch.tensor([0, 0]), owners)
    assert float(cluster) == pytest.approx((-0.9 - 0.4) / 2)
    assert float(separation) == pytest.approx((-0.7 - 0.8) / 2)


def test_orthogonality() -> None:
    assert float(orthogonality(torch.eye(10, 12)[None])) == 0.0
    same = torch.nn.functional.normalize(torch.rand(1, 1, 12), dim=2).expand(3, 10, 12)
    assert float(orthogonality(same)) == pytest.approx(3 * 90, rel=1e-5)


def test_folding_keeps_cells_together() -> None:
    shallow = torch.arange(16.0).view(1, 1, 4, 4)
    folded = fold(shallow, (2, 2))
    assert folded[0, :, 0, 0].tolist() == [0.0, 1.0, 4.0, 5.0]
    assert folded[0, :, 1, 0].tolist() == [8.0, 9.0, 12.0, 13.0]
    mixed = torch.rand(2, 3, 6, 8)
    np.testing.assert_array_equal(
        fold(mixed, (3, 4))[1, :, 2, 1].sort().values, mixed[1, :, 4:6, 2:4].flatten().sort().values
    )
    with pytest.raises(InputError, match="cannot be cut"):
        fold(shallow, (3, 3))


def test_alignment() -> None:
    torch.manual_seed(0)
    shallow = torch.randn(2, 3, 8, 8, requires_grad=True)
    active = torch.rand(2, 5, 4, 4)
    deep = fold(shallow.detach(), (4, 4)).requires_grad_()
    assert float(alignment(deep, shallow, active).detach()) == 0.0
    other = torch.randn(2, 7, 4, 4, requires_grad=True)
    assert float(alignment(other, shallow, active, delta=2.0).detach()) == 0.0
    loss = alignment(other, shallow, active)
    loss.backward()
    assert float(loss.detach()) > 0.0 and shallow.grad is None
    assert other.grad is not None and float(other.grad.abs().sum()) > 0
    lengths = torch.rand(2, 1, 4, 4) + 0.5
    torch.testing.assert_close(alignment(other * lengths, shallow, active), loss)


def test_alignment_looks_at_the_rows_of_the_peaks() -> None:
    torch.manual_seed(1)
    deep, shallow = torch.randn(1, 6, 3, 3), torch.randn(1, 2, 6, 6)
    active = torch.zeros(1, 2, 3, 3)
    active[0, 0, 1, 2], active[0, 1, 2, 0] = 1.0, 1.0
    own, target = spatial_similarity(deep)[0], spatial_similarity(fold(shallow, (3, 3)))[0]
    expected = ((own - target)[[5, 6]].abs() - 0.1).clamp(min=0).mean()
    torch.testing.assert_close(alignment(deep, shallow, active), expected)


# Scores


def test_the_region_of_a_peak() -> None:
    boxes = regions(torch.tensor([[[100, 50], [10, 10]]]), (224, 224), 36)
    assert boxes.tolist() == [[[64, 14, 136, 86], [0, 0, 46, 46]]]
    points = torch.tensor([[[86, 64], [87, 64], [46, 46], [14, 136]]])
    seen = torch.tensor([[True, True, True, False]])
    assert parts_in(boxes, points, seen).tolist() == [
        [[True, False, False, False], [False, False, True, False]]
    ]


def test_the_first_of_equal_maxima_counts() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 3] = maps[0, 2, 0] = 1.0
    assert peaks(maps).tolist() == [[1, 3]]


class Fixed:
    """One prototype of one class whose peak is read from the image's brightest pixel."""

    prototype_classes = torch.tensor([0, 1])

    def prototype_maps(self, images: Tensor) -> Tensor:
        return images[:, :1].expand(-1, 2, -1, -1)


def spots(places: list[tuple[int, int]], size: int = 56) -> Tensor:
    images = torch.zeros(len(places), 3, size, size)
    for row, (y, x) in enumerate(places):
        images[row, :, y, x] = 10.0
    return images


def one_batch(covered: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four images of class 0 whose part is visible in three, and is met in so many of these."""
    at = [(20, 20) if row < covered else (50, 50) for row in range(4)]
    points = torch.full((4, 1, 2), 20)
    visible = torch.tensor([[True], [True], [True], [False]])
    return spots(at), torch.zeros(4, dtype=torch.int64), points, visible


def test_consistency_counts_visible_parts_only() -> None:
    whole = consistency_score(Fixed(), [one_batch(3)], 4)
    assert whole.score == 100.0
    assert whole.table[0] == {
        "prototype": 0, "class": 0, "images": 4, "part": 0, "share": 1.0, "visible": 3,
        "consistent": True, "measured": True,
    }  # fmt: skip
    # The class without images is not measured, neither for nor against.
    assert whole.table[1]["measured"] is False and whole.table[1]["images"] == 0
    some = consistency_score(Fixed(), [one_batch(2)], 4)
    assert some.score == 0.0 and some.table[0]["share"] == pytest.approx(2 / 3)
    assert consistency_score(Fixed(), [one_batch(2)], 4, 0.6).score == 100.0
    assert consistency_score(Fixed(), [one_batch(3)], 4, minimum_visible=4).score == 0.0
    # Batches are added up, not averaged.
    x, y, at, seen = one_batch(2)
    parts = [(x[r], y[r], at[r], seen[r]) for r in (slice(0, 1), slice(1, 4))]
    assert consistency_score(Fixed(), parts, 4).table == some.table


def test_regions_scale_with_the_image() -> None:
    images, labels, points, visible = one_batch(4)
    nine = points + torch.tensor([9, 0])
    assert consistency_score(Fixed(), [(images, labels, nine, visible)]).score == 100.0
    ten = points + torch.tensor([10, 0])
    assert consistency_score(Fixed(), [(images, labels, ten, visible)]).score == 0.0


def test_stability_without_and_with_noise() -> None:
    batch = one_batch(4)
    assert stability_score(Fixed(), [batch], 4, eps=0.0).score == 100.0
    assert stability_score(Fixed(), [batch], 4).score == 100.0
    shaken = stability_score(Fixed(), [batch], 4, sigma=50.0, eps=100.0)
    # The part that is invisible counts as equal: one of four images stays for certain.
    assert 25.0 <= shaken.score < 100.0 and shaken.table[0]["stable"] == shaken.score
    with pytest.raises(InputError, match="std"):
        stability_score(Fixed(), [batch], 4, on="raw")
    weak = stability_score(Fixed(), [batch], 4, sigma=50.0, eps=100.0, on="raw", std=[1e3] * 3)
    assert weak.score == 100.0


def test_scores_refuse_what_they_cannot_measure() -> None:
    images, labels, points, visible = one_batch(3)
    with pytest.raises(InputError, match="no image of any class"):
        consistency_score(Fixed(), [(images, labels, points, torch.zeros_like(visible))])
    with pytest.raises(InputError, match="no image of any class"):
        consistency_score(Fixed(), [])
    with pytest.raises(InputError, match="no key-points"):
        consistency_score(Fixed(), [(images, labels)])  # type: ignore[list-item]
    with pytest.raises(InputError, match="label 2"):
        consistency_score(Fixed(), [(images, labels + 2, points, visible)])
    with pytest.raises(InputError, match="do not fit"):
        consistency_score(Fixed(), [(images, labels, points[:, :, :1], visible)])
    with pytest.raises(InputError, match="no prototypes"):
        consistency_score(nn.Linear(2, 2), [one_batch(3)])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mu"):
        consistency_score(Fixed(), [one_batch(3)], mu=0.0)


# Backbones


@pytest.mark.parametrize(
    ("name", "size", "deep", "shallow"),
    [
        ("resnet18", 128, (512, 4, 4), (64, 32, 32)),
        ("vgg11", 128, (512, 4, 4), (256, 32, 32)),
        ("densenet121", 128, (1024, 4, 4), (256, 32, 32)),
        ("vit_tiny_patch16_224", 224, (192, 14, 14), (192, 14, 14)),
        ("resnet18", 64, (256, 4, 4), (64, 16, 16)),
    ],
)
def test_maps_of_timm_networks(
    name: str, size: int, deep: tuple[int, ...], shallow: tuple[int, ...]
) -> None:
    import timm

    features = FeatureMaps(timm.create_model(name), torch.zeros(1, 3, size, size)).eval()
    assert features.shapes[features.deep] == deep
    assert features.shallow is not None and features.shapes[features.shallow] == shallow
    with torch.no_grad():
        low, high = features(torch.randn(1, 3, size, size))
    assert low is not None and (low.shape[1:], high.shape[1:]) == (shallow, deep)


def test_maps_of_any_network_are_its_last_of_each_size() -> None:
    backbone = convolutions().eval()
    features = FeatureMaps(backbone, torch.zeros(1, 3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    low, high = features(images)
    assert low is not None
    assert torch.equal(high, backbone(images)) and torch.equal(low, backbone[:3](images))


def test_backbones_that_do_not_fit() -> None:
    example = torch.zeros(1, 3, 32, 32)
    with pytest.raises(InputError, match="shows no maps"):
        FeatureMaps(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), example)
    with pytest.raises(InputError, match="does not accept images"):
        FeatureMaps(convolutions(), torch.zeros(1, 1, 32, 32))
    with pytest.raises(InputError, match="too coarse"):
        FeatureMaps(nn.Conv2d(3, 4, 3, stride=16, padding=1), example)
    with pytest.raises(InputError, match="none is shallow"):
        PartPrototypeNet(nn.Conv2d(3, 4, 4, stride=4), 3, example_inputs=example)
    with pytest.raises(InputError, match="no level 7"):
        FeatureMaps(convolutions(), example, deep=7)
    with pytest.raises(InputError, match="give example_inputs"):
        PartPrototypeNet(convolutions(), 3)
    with pytest.raises(InputError, match="2 classes or more"):
        network(classes=1)
    with pytest.raises(InputError, match="cosine or log_l2"):
        network(similarity="euclid")
    with pytest.raises(InputError, match="label 3"):
        network().explain(torch.zeros(1, 3, 32, 32), torch.tensor([3]))


# Push and training


def test_after_a_push_prototypes_are_patches() -> None:
    model = base().eval()
    images, labels = torch.randn(30, 3, 32, 32), torch.arange(30) % 3
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    patches = model.push(batches)
    with torch.no_grad():
        z = model.add_on(model.features(images)[1])
        answer = model.answer(images)
    for j in range(6):
        row, (y, x) = int(patches.images[j]), patches.positions[j].tolist()
        assert int(labels[row]) == j // 2
        torch.testing.assert_close(model.prototypes[j].detach(), z[row, :, y, x])
        assert float(answer.distances[row, j]) == pytest.approx(0.0, abs=1e-5)
        top, left, bottom, right = patches.boxes[j].tolist()
        peak = peaks(upsample(answer.activations[row : row + 1, j : j + 1], (32, 32)))[0, 0]
        assert top <= peak[0] <= bottom and left <= peak[1] <= right
    again = model.nearest_patches(batches)
    torch.testing.assert_close(again.distances, torch.zeros(6), atol=1e-5, rtol=0.0)


def test_a_push_finds_the_closest_patch_and_leaves_classes_without_images() -> None:
    model = network().eval()
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10) % 2
    before = model.prototypes.detach().clone()
    with torch.no_grad():
        z = torch.nn.functional.normalize(model.add_on(model.features(images)[1]), dim=1)
    unit = torch.nn.functional.normalize(before, dim=1)
    brute = -torch.einsum("bdhw,md->mbhw", z, unit).flatten(2)
    patches = model.push([(images, labels)])
    for j in range(4):
        own = brute[j][labels == j // 2]
        assert float(patches.distances[j]) == pytest.approx(float(own.min()), abs=1e-6)
    assert patches.images[4:].tolist() == [-1, -1]
    torch.testing.assert_close(model.prototypes[4:].detach(), unit[4:])
    with pytest.raises(InputError, match="no images"):
        model.push([])
    with pytest.raises(InputError, match="label 4"):
        model.push([(images, labels + 4)])


def test_schedules() -> None:
    plan = protopnet_schedule(13, last=2)
    stages = "".join(stage[0] for stage in plan.stages)
    assert stages == "wwwwwjjjjjj" + "ll" + "jj" + "ll"
    assert [epoch for epoch in range(len(stages)) if plan.pushes_after(epoch)] == [10, 14]
    assert plan.multiplier(9) == 1.0 and plan.multiplier(10) == pytest.approx(0.1)
    assert plan.multiplier(13) == pytest.approx(0.1)  # epochs of the last stage do not count
    better = improved_schedule()
    assert better.stages.count("warm") == 5 and len(better.stages) == 12
    assert [round(better.multiplier(e), 3) for e in (7, 8, 11)] == [1.0, 0.2, 0.04]
    assert len(improved_schedule(passes=30).stages) == 360
    with pytest.raises(InputError, match="schedule"):
        improved_schedule(3)


@pytest.fixture(scope="module")
def task():
    return creatures(train=64, validation=24, test=48, size=32, seed=0)


def model_of(task, **options) -> PartPrototypeNet:
    torch.manual_seed(0)
    return PartPrototypeNet(convolutions(), 8, 2, example_inputs=task.example_inputs[0], **options)


def trained_parts(model: PartPrototypeNet, task, schedule: Schedule) -> set[str]:
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    train_prototypes(model, task, schedule=schedule, batch_size=16, cpu=True)
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    return {name.partition(".")[0] for name in moved}


def test_each_stage_trains_its_own_parts(task) -> None:
    warm = Schedule(("warm",), 3, 0.2)
    assert trained_parts(model_of(task), task, warm) == {"add_on", "prototypes", "head"}
    plain = {"similarity": "log_l2", "head": "linear", "align": False}
    assert trained_parts(model_of(task, **plain), task, warm) == {"add_on", "prototypes"}
    joint = Schedule(("joint",), 3, 0.2)
    everything = {"add_on", "prototypes", "features"}
    assert trained_parts(model_of(task, **plain), task, joint) == everything
    last = Schedule(("last",), 3, 0.2)
    assert trained_parts(model_of(task, **plain), task, last) == {"head"}


def test_training_ends_in_patches_of_training_images(task) -> None:
    model = model_of(task, similarity="log_l2", head="linear", align=False)
    rule = PrototypeTraining(model, task, schedule=protopnet_schedule(2, warm=1, last=2))
    fit(rule, task, epochs=4, batch_size=16, cpu=True)
    assert rule.patches is not None
    images, labels = next(task.batches("train", batch_size=64, shuffle=False))
    with torch.no_grad():
        answer = model.answer(images)
        z = model.add_on(answer.deep)
    y, x = rule.patches.positions.unbind(1)
    patches = z[rule.patches.images, :, y, x]
    torch.testing.assert_close(model.prototypes.detach(), patches)
    own = answer.distances[rule.patches.images, torch.arange(16)]
    # |z|^2 - 2 z.p + |p|^2 of 128 channels, rounded
    torch.testing.assert_close(own, torch.zeros(16), atol=1e-4, rtol=0.0)
    assert torch.equal(labels[rule.patches.images], model.prototype_classes)


def test_cosine_prototypes_keep_unit_length_and_weights_their_sum(task) -> None:
    model = model_of(task)
    rates = Rates(importance=0.1)
    train_prototypes(model, task, schedule=improved_schedule(2, warm=1), rates=rates, cpu=True)
    torch.testing.assert_close(model.prototypes.norm(dim=1), torch.ones(16))
    assert isinstance(model.head, ScoreAggregation)
    weights = model.head.importance()
    torch.testing.assert_close(weights.sum(1), torch.full((8,), 2.0))
    assert float((weights - 1).abs().detach().max()) > 1e-3


def test_alignment_counts_after_the_warm_stage(task) -> None:
    model = model_of(task)
    rule = PrototypeTraining(model, task)
    images, labels = next(task.batches("train", batch_size=16))
    answer = model.answer(images)
    warm, joint = (rule.terms(answer, labels, aligned=a) for a in (False, True))
    assert "alignment" not in warm and float(joint["alignment"].detach()) > 0.0
    assert float(joint["separation"].detach()) > 0.0  # minus .08 times a negative distance
    names = {"cross_entropy", "cluster", "separation", "orthogonality"}
    assert set(warm) == names and set(joint) == names | {"alignment"}


def test_an_interrupted_run_goes_on(task, tmp_path, one_thread) -> None:
    options = {"similarity": "log_l2", "head": "linear", "align": False}
    schedule = protopnet_schedule(2, warm=1, last=1)

    class Killed(Exception):
        pass

    class Dying(PrototypeTraining):
        def step(self, batch):
            if self.run.step == 9:
                raise Killed
            return super().step(batch)

    whole, cut = model_of(task, **options), model_of(task, **options)
    train_prototypes(whole, task, schedule=schedule, batch_size=16, cpu=True)
    file = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        fit(
            Dying(cut, task, schedule=schedule), task, epochs=3, batch_size=16,
            checkpoint=file, checkpoint_every=1, cpu=True,
        )  # fmt: skip
    resumed = model_of(task, **options)
    train_prototypes(resumed, task, schedule=schedule, batch_size=16, checkpoint=file, cpu=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_training_refuses_what_does_not_fit(task) -> None:
    with pytest.raises(InputError, match="8 classes, the part-prototype network 3"):
        PrototypeTraining(network(), task)
    with pytest.raises(InputError, match="no last stage"):
        PrototypeTraining(model_of(task), task, schedule=protopnet_schedule())
    with pytest.raises(InputError, match="12 epochs, the run 1"):
        fit(PrototypeTraining(model_of(task), task), task, epochs=1, cpu=True)


def test_training_learns_the_creatures() -> None:
    task = creatures(train=320, validation=40, test=160, size=32, noise=0.0, seed=1)
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    )  # fmt: skip
    model = PartPrototypeNet(backbone, 8, 3, align=False, example_inputs=task.example_inputs[0])
    rates = Rates(backbone=3e-3, add_on=3e-3, prototypes=3e-3)
    schedule = improved_schedule(20, warm=1, decay_every=15)
    train_prototypes(model, task, schedule=schedule, rates=rates, batch_size=16, cpu=True)
    assert task.score(model, "test") > 35.0  # chance is 12.5
