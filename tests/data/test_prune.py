"""The metrics of data pruning, by hand and by brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.data import prune
from gossamer.data.methods import Candidates, Effort, choose, methods
from gossamer.data.prune import SubsetModels
from gossamer.data.selection import subset
from gossamer.datasets import open_task


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def small_task(count: int = 120):
    return subset(open_task("digits"), np.arange(count))


def test_prototype_distances_by_hand() -> None:
    features = np.array([[1.0, 0], [2, 0], [0, 1], [0, 3], [-1, 0]])
    scores = prune.prototype_distance(features, 2, seed=0)
    labels = np.array([0, 0, 1, 1, 0])
    own = prune.class_prototype_distance(features, labels)
    np.testing.assert_allclose(own, [0, 0, 0, 0, 2], atol=1e-6)
    assert scores.argmax() == 4 or scores[4] == pytest.approx(0.0, abs=1e-6)
    everyone = prune.prototype_distance(features[[0, 2, 4]], 3)
    np.testing.assert_allclose(everyone, 0.0, atol=1e-6)


def test_prototypes_do_not_see_rotation_or_scale() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(200, 5)) + 3 * random.integers(0, 2, (200, 1))
    turn = np.linalg.qr(random.normal(size=(5, 5)))[0]
    scale = random.uniform(0.5, 2, (200, 1))
    plain = prune.prototype_distance(features, 4, seed=1)
    np.testing.assert_allclose(
        prune.prototype_distance(scale * features @ turn, 4, seed=1), plain, atol=1e-4
    )
    labels = random.integers(0, 3, 200)
    np.testing.assert_allclose(
        prune.class_prototype_distance(scale * features @ turn, labels),
        prune.class_prototype_distance(features, labels),
        atol=1e-5,
    )


def test_memorization_by_hand() -> None:
    member = np.array([[1, 1, 1, 0, 0]], dtype=bool).T
    correct = np.array([[1, 1, 0, 0, 1]], dtype=bool).T
    models = SubsetModels(member, correct, correct)
    assert prune.memorization(models)[0] == pytest.approx(2 / 3 - 1 / 2)
    # The influence of a sample on itself is its memorisation.
    assert prune.influence_max(models)[0] == pytest.approx(1 / 6)
    always = SubsetModels(np.ones((3, 1), dtype=bool), np.ones((3, 1), dtype=bool), correct[:3])
    assert prune.memorization(always)[0] == 1.0  # a mean over no model counts as 0


def test_influence_by_brute_force() -> None:
    random = np.random.default_rng(0)
    member, correct = random.random((30, 7)) < 0.7, random.random((30, 7)) < 0.5
    test = random.random((30, 4)) < 0.5
    models = SubsetModels(member, correct, test)
    expected = np.array(
        [
            [test[member[:, i], j].mean() - test[~member[:, i], j].mean() for j in range(4)]
            for i in range(7)
        ]
    )
    found = np.concatenate([part for _, part in prune.influence(models, block=3)])
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(prune.influence_max(models), expected.max(1))
    np.testing.assert_allclose(prune.influence_sum_abs(models), np.abs(expected).sum(1))


def test_committees() -> None:
    certain = np.array([[[1.0, 0], [1, 0]], [[1.0, 0], [0, 1]]])  # [members, n, classes]
    np.testing.assert_allclose(prune.mutual_information(certain), [0.0, math.log(2)])
    np.testing.assert_allclose(prune.variation_ratio(certain), [0.0, 0.5])
    alike = np.full((3, 1, 4), 0.25)
    np.testing.assert_allclose(prune.mutual_information(alike), 0.0, atol=1e-12)


def test_dichotomous_difficulty() -> None:
    correct = np.array([[1, 0, 0], [1, 1, 0]], dtype=bool)
    assert prune.dichotomous_difficulty(correct).tolist() == [0, 1, 2]


def test_gradient_norms_one_sample_at_a_time() -> None:
    task = small_task(10)
    found = prune.gradient_norms(task, network, seeds=(0, 1), batch_size=4)
    expected = np.zeros(10)
    for seed in (0, 1):
        model = network(seed)
        images, labels = next(iter(task.batches("train", batch_size=10, shuffle=False)))
        for row in range(10):
            loss = nn.functional.cross_entropy(model(images[row : row + 1]), labels[row : row + 1])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            expected[row] += math.sqrt(sum(float(g.square().sum()) for g in gradients)) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_method_keeps_what_was_asked() -> None:
    task = small_task()
    features = np.random.default_rng(0).normal(size=(120, 5))
    effort = Effort(epochs=1, subset_models=4, committee=2, batch_size=32)
    candidates = Candidates(
        features=lambda: features, task=task, make_network=network, effort=effort
    )
    for name in methods():
        chosen = choose(name, candidates, 0.25)
        assert len(set(chosen.rows.tolist())) == 30, name
        again = choose(name, Candidates(
            features=lambda: features, task=task, make_network=network, effort=effort
        ), 0.25)  # fmt: skip
        np.testing.assert_array_equal(chosen.rows, again.rows, err_msg=name)


def test_subset_models_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task()
    whole = prune.train_on_subsets(task, network, models=3, epochs=1, checkpoint=tmp_path)
    assert whole.member.sum(1).tolist() == [84, 84, 84]
    monkeypatch.setattr(prune, "_trained", None)  # nothing is trained a second time
    again = prune.train_on_subsets(task, network, models=3, epochs=1, checkpoint=tmp_path)
    np.testing.assert_array_equal(whole.correct, again.correct)
    with pytest.raises(InputError, match="two models or more"):
        prune.train_on_subsets(task, network, models=1)


def test_what_a_method_lacks() -> None:
    with pytest.raises(InputError, match="needs features"):
        choose("prototypes", Candidates(size=5), 0.5)
    with pytest.raises(InputError, match="needs labels"):
        choose("class-prototypes", Candidates(size=5, features=lambda: np.zeros((5, 2))), 0.5)
    with pytest.raises(InputError, match="not one row for each of 5 samples"):
        choose("prototypes", Candidates(size=5, features=lambda: np.zeros((4, 2))), 0.5)
    with pytest.raises(InputError, match="trains a network"):
        choose("el2n", Candidates(np.zeros(5, dtype=int)), 0.5)
    with pytest.raises(InputError, match="there is no method 'x'"):
        choose("x", Candidates(size=5), 0.5)
    with pytest.raises(InputError, match="selects and does not rank"):
        choose("committee", Candidates(size=5), 0.5, order="easy")
