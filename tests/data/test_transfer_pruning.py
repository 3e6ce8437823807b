"""Label and feature mapping, by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.data.selection import subset
from gossamer.data.transfer_pruning import (
    Votes,
    add_up,
    class_distances,
    class_influence,
    clusters_of,
    feature_mapping,
    keep_classes,
    label_mapping,
    prototypes_of,
    ranking,
)
from gossamer.datasets.arrays import ArraySource
from gossamer.datasets.idx import idx_folder
from gossamer.datasets.splits import assemble
from gossamer.experiments.data.transfer_pruning import Work, _large, _small, _transferred
from gossamer.parts.embedding import embed

PROTOTYPES = np.array([[0.0, 0], [4, 0], [0, 3]])
TARGETS = np.array([[1.0, 0], [3, 0], [0, 2], [0, 3], [2, 0]])
RANDOM = np.random.default_rng(0)


def test_feature_mapping_by_hand() -> None:
    votes = feature_mapping(TARGETS, PROTOTYPES)
    assert votes.counts.tolist() == [2, 1, 2]  # (2, 0) is as near to 0 as to 1
    apart = np.linalg.norm(TARGETS[:, None] - PROTOTYPES[None], axis=2).mean(0)
    np.testing.assert_allclose(votes.closeness, -apart, rtol=1e-5)
    # Equal votes, and class 0 is nearer on average: 2.2 against 2.4.
    assert ranking(votes).tolist() == [0, 2, 1]


def test_votes_add_up_to_the_target() -> None:
    logits = RANDOM.normal(size=(57, 9))
    assert label_mapping(logits).counts.sum() == 57
    assert (
        feature_mapping(RANDOM.normal(size=(57, 4)), RANDOM.normal(size=(9, 4))).counts.sum() == 57
    )


def test_what_does_not_matter() -> None:
    logits = RANDOM.normal(size=(40, 6))
    shifted = logits + RANDOM.normal(size=(40, 1))
    np.testing.assert_array_equal(label_mapping(logits).counts, label_mapping(shifted).counts)
    turn = RANDOM.permutation(40)
    np.testing.assert_array_equal(label_mapping(logits).counts, label_mapping(logits[turn]).counts)
    features, prototypes = RANDOM.normal(size=(40, 5)), RANDOM.normal(size=(6, 5))
    plain = feature_mapping(features, prototypes).counts
    rotation = np.linalg.qr(RANDOM.normal(size=(5, 5)))[0]
    moved = feature_mapping(3 * features @ rotation, 3 * prototypes @ rotation).counts
    np.testing.assert_array_equal(plain, moved)


def test_a_copy_of_a_source_class_is_kept_first() -> None:
    labels = np.repeat(np.arange(5), 30)
    source = RANDOM.normal(size=(150, 8)) + 6 * np.eye(8)[labels]
    target = source[labels == 3]
    votes = feature_mapping(target, prototypes_of(source, labels))
    assert votes.counts[3] == 30
    for count in range(1, 6):
        assert set(np.flatnonzero(labels == 3)) <= set(keep_classes(votes, labels, count))


def test_kept_classes_are_nested_and_whole() -> None:
    labels = RANDOM.integers(0, 7, 200)
    votes = label_mapping(RANDOM.normal(size=(50, 7)))
    kept = [keep_classes(votes, labels, count) for count in range(1, 8)]
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(kept))
    np.testing.assert_array_equal(kept[-1], np.arange(200))
    for count in range(1, 7):
        worst = keep_classes(votes, labels, 7 - count, reverse=True)
        assert sorted([*kept[count - 1], *worst]) == list(range(200))
    with pytest.raises(InputError, match="8 of 7 source classes"):
        keep_classes(votes, labels, 8)


def test_ties_are_broken_by_closeness_then_number() -> None:
    votes = Votes(np.array([0.0, 2, 0, 0]), np.array([0.1, 0.0, 0.5, 0.1]))
    assert ranking(votes).tolist() == [1, 2, 0, 3]
    assert ranking(votes, reverse=True).tolist() == [3, 0, 2, 1]
    assert votes.without_votes == 3


def test_small_target_classes_can_count_as_much() -> None:
    logits = np.eye(3)[[0] * 9 + [1]]
    labels = np.array([0] * 9 + [1])
    assert label_mapping(logits).counts.tolist() == [9, 1, 0]
    even = label_mapping(logits, target_labels=labels).counts
    np.testing.assert_allclose(even, [5, 5, 0])


def test_several_targets() -> None:
    small, large = Votes(np.array([1.0, 0]), np.zeros(2)), Votes(np.array([0.0, 99]), np.ones(2))
    assert add_up([small, large]).counts.tolist() == [1, 1]
    with pytest.raises(InputError, match="same source"):
        add_up([small, Votes(np.zeros(3), np.zeros(3))])


def test_clusters_stand_for_classes() -> None:
    labels = np.repeat(np.arange(4), 25)
    source = RANDOM.normal(size=(100, 4)) + 20 * np.eye(4)[labels]
    clusters = clusters_of(source, 4, seed=1)
    pairs = {(int(a), int(b)) for a, b in zip(labels, clusters, strict=True)}
    assert len(pairs) == 4 and set(clusters) == set(range(4))
    votes = feature_mapping(source[labels == 2], prototypes_of(source, clusters))
    assert set(keep_classes(votes, clusters, 1)) == set(np.flatnonzero(labels == 2))


def test_distances_of_classes() -> None:
    source, labels = np.array([[0.0], [2], [10], [12]]), np.array([0, 0, 1, 1])
    target, own = np.array([[1.0], [1], [31]]), np.array([0, 0, 1])
    votes = class_distances(source, labels, target, own)
    np.testing.assert_allclose(votes.closeness, [-15.0, -15.0])
    near = class_distances(source, labels, target[:2], own[:2], median=True)
    assert ranking(near).tolist() == [0, 1]
    far = np.array([[1.0], [1], [1], [1], [99]])
    middle = class_distances(source, labels, far, np.zeros(5, dtype=int), middle=(0.0, 0.8))
    np.testing.assert_allclose(middle.closeness, [0.0, -10.0])


def test_influence_of_classes_by_hand() -> None:
    members = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], dtype=bool)
    votes = class_influence(members, np.array([80.0, 90, 60, 50]))
    np.testing.assert_allclose(votes.closeness, [30.0, 10.0])
    with pytest.raises(InputError, match="in some subsets and not in all"):
        class_influence(np.ones((3, 2), dtype=bool), np.zeros(3))


def test_identity_features_are_nearest_class_means() -> None:
    labels = np.repeat(np.arange(4), 20)
    source = RANDOM.normal(size=(80, 6)) + 2 * RANDOM.normal(size=(4, 6))[labels]
    target = RANDOM.normal(size=(50, 6))
    said = NearestCentroid().fit(source, labels).predict(target)
    votes = feature_mapping(target, prototypes_of(source, labels))
    np.testing.assert_array_equal(votes.counts, np.bincount(said, minlength=4))


def test_ankle_boots_vote_for_shoes(real_data: Callable[[str], Path]) -> None:
    clothes = idx_folder(real_data("fashion_mnist"), image_size=(14, 14), limit=6000)
    labels = clothes.splits["train"].labels.numpy()
    source = subset(clothes, np.flatnonzero(labels < 8))
    source.augment = None
    network = _small(0)
    fit(
        Supervised(network, source, optimizer=sgd(network, lr=0.05)), source, epochs=4,
        batch_size=32,
    )  # fmt: skip
    boots = clothes.splits["train"].fetch(np.flatnonzero(labels == 9))
    assert len(boots) > 100
    found = ArraySource(boots, torch.zeros(len(boots), dtype=torch.int64))
    votes = [
        label_mapping(embed(found, network, clothes.preprocess, batch_size=size).logits)
        for size in (7, 256)
    ]
    np.testing.assert_array_equal(votes[0].counts, votes[1].counts)
    # Sneakers (7) and sandals (5), of eight classes.
    assert votes[0].counts[[5, 7]].sum() > 0.9 * len(boots)


def test_the_probe_leaves_the_network_alone() -> None:
    network = _large(0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randint(256, (60, 1, 14, 14), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    part = ArraySource(images, labels)
    task = assemble(part, ["a", "b", "c"], name="noise", validation=part, test=part)
    work = Work(
        _small, _large, 1, 1, 32, probe_epochs=40, tune_epochs=1,
    )  # fmt: skip
    found = _transferred(network, task, work, seed=0)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    # Features of random filters and twenty images a class: a linear layer learns them by heart.
    assert found["probe"] > 60.0


def test_nothing_to_vote_with() -> None:
    with pytest.raises(InputError, match="no training images"):
        label_mapping(np.zeros((0, 3)))
    with pytest.raises(InputError, match="not finite"):
        feature_mapping(np.full((2, 2), np.nan), np.zeros((1, 2)))
    with pytest.raises(InputError, match="class 1 of the source has no sample"):
        prototypes_of(np.zeros((2, 2)), np.array([0, 2]))
