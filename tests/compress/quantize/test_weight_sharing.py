import copy
import math

import pytest
import torch
from torch import nn

from gossamer.compress.quantize.codebooks import cluster_weights
from gossamer.compress.quantize.weight_sharing import (
    SharedWeights,
    SoftClusters,
    product_quantize,
    uniform_codebook,
)
from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit
from gossamer.datasets.digits import digits
from gossamer.models.plain import mlp


@pytest.mark.parametrize("entries", [3, 4, 8])
@pytest.mark.parametrize("per_row", [False, True])
def test_uniform_grids_have_the_best_width(entries, per_row):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=g) * torch.logspace(-2, 1, 6)[:, None]
    decoded = uniform_codebook(weight, entries, per_row=per_row).decode()
    parts = weight if per_row else weight.reshape(1, -1)
    for part, ours in zip(parts, decoded.reshape(parts.shape), strict=True):
        best = math.inf
        for share in torch.linspace(0.05, 1.2, 400):
            levels = torch.linspace(-1, 1, entries) * share * part.abs().max()
            best = min(best, float((part[:, None] - levels).square().amin(1).sum()))
        assert float((part - ours).square().sum()) <= 1.02 * best


def test_centroids_follow_the_sum_of_their_weights_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    stored = cluster_weights(layer.weight, 4, sizes=(2, 3))
    network = SharedWeights(copy.deepcopy(layer), {"weight": stored})
    x, y = torch.randn(20, 6), torch.randn(20, 5)
    (network(x) - y).square().sum().backward()
    plain = copy.deepcopy(layer)
    plain.weight.data.copy_(stored.decode())
    (plain(x) - y).square().sum().backward()
    scales = stored.scales.float()[stored.group_of_row][:, None]
    expected = [float((plain.weight.grad * scales)[stored.indices == k].sum()) for k in range(4)]
    torch.testing.assert_close(network.tables[0].grad[0], torch.tensor(expected))
    torch.testing.assert_close(network.network.bias.grad, plain.bias.grad)
    assert network.network.weight.grad is None


def test_centroids_and_soft_clusters_train():
    task = digits(seed=0)
    torch.manual_seed(0)
    dense = mlp((64, 32, 10))
    fit(Supervised(dense, task), task, epochs=8, batch_size=64, seed=0)
    names = ["1.weight", "3.weight"]
    tensors = {n: cluster_weights(dense.get_parameter(n), 3) for n in names}
    shared = SharedWeights(copy.deepcopy(dense), tensors)
    soft = SoftClusters(copy.deepcopy(dense), names, 3)
    rounded = task.score(SharedWeights(copy.deepcopy(dense), tensors), "validation")
    for network in (shared, soft):
        trained = [p for p in network.parameters() if p.requires_grad]
        rule = Supervised(network, task, optimizer=torch.optim.Adam(trained, lr=3e-3))
        fit(rule, task, epochs=6, batch_size=64, seed=0)
        assert task.score(network, "validation") > rounded
        # What is scored is what is stored: three values a tensor.
        x = next(iter(task.batches("validation")))[0]
        packed = copy.deepcopy(network.network)
        for name, stored in network.tensors().items():
            packed.get_parameter(name).data.copy_(stored.decode())
            assert len(stored.decode().unique()) <= 3
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(x), packed.eval()(x), rtol=1e-2, atol=2e-2)
    for name, tensor in shared.tensors().items():
        assert torch.equal(tensor.indices, tensors[name].indices)


def test_soft_clusters_are_hard_when_cold():
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    cold = SoftClusters(layer, ["weight"], 4, temperature=1e-4)
    torch.testing.assert_close(cold.soft(0), cold.tensors()["weight"].decode(), atol=2e-3, rtol=0)
    warm = SoftClusters(layer, ["weight"], 4, temperature=0.5)
    before = warm.centers.clone()
    warm.soft(0).sum().backward()
    assert not torch.equal(warm.centers, before)
    assert float(layer.weight.grad.abs().sum()) > 0
    with pytest.raises(InputError, match="temperature above 0"):
        SoftClusters(layer, ["weight"], 4, temperature=0.0)


def test_product_quantization():
    g = torch.Generator().manual_seed(0)
    # Columns of two kinds, mixed: vectors of four weights that take 16 values in all.
    patterns = torch.randn(16, 4, generator=g)
    codes = torch.randint(0, 16, (64, 8), generator=g)
    weight = patterns[codes].reshape(64, 32)
    found = product_quantize(weight, length=4, entries=16, sweeps=0)
    assert found.bits == 64 * 8 * 4 + 16 * 16 * 4
    noise = 0.1 * torch.randn(64, 32, generator=g)
    many = product_quantize(weight + noise, length=4, entries=256)
    error = float((many.decoded - weight - noise).square().mean() / weight.square().mean())
    assert error < 0.35
    one = product_quantize(torch.randn(40, 7, generator=g), length=1, entries=4)
    assert len(one.decoded.unique()) <= 4


def test_the_permutation_of_vectors_helps():
    g = torch.Generator().manual_seed(1)
    # Pairs of equal columns, kept apart: side by side they make vectors on a line.
    base = torch.randn(256, 8, generator=g)
    weight = torch.cat([base, base], 1)
    errors = [
        float((product_quantize(weight, length=2, entries=32, sweeps=s).decoded - weight).norm())
        for s in (0, 20)
    ]
    assert errors[1] < 0.6 * errors[0]
