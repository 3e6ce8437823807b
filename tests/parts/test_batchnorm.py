import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.datasets.digits import digits
from gossamer.parts.batchnorm import recalibrate_batchnorm, recalibrate_on


def test_statistics_are_the_averages_over_batches():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=0.3))
    network[0].weight.data *= 5  # what pruning would do
    network.train()
    inputs = [(torch.randn(16, 3),) for _ in range(5)]
    assert recalibrate_batchnorm(network, inputs) == 5
    h = torch.stack([network[0](x) for (x,) in inputs]).detach()
    torch.testing.assert_close(network[2].running_mean, h.mean(1).mean(0))
    torch.testing.assert_close(network[2].running_var, h.var(1).mean(0))
    assert network.training and network[1].training and network[2].momentum == 0.3


def test_without_batches_nothing_changes():
    network = nn.Sequential(nn.BatchNorm1d(2))
    network[0].running_mean += 3
    with pytest.raises(InputError, match="no batches"):
        recalibrate_batchnorm(network, [])
    assert network[0].running_mean.tolist() == [3, 3]
    assert recalibrate_batchnorm(nn.Linear(2, 2), []) == 0


def test_statistics_of_training_batches():
    task = digits(limit=200)
    network = nn.Sequential(nn.BatchNorm2d(1))
    assert recalibrate_on(network, task, batch_size=64, seed=3) == 3
    batches = [b[0] for b in task.batches("train", batch_size=64, seed=3)]
    means = torch.stack([x.mean((0, 2, 3)) for x in batches[:3]])
    torch.testing.assert_close(network[0].running_mean, means.mean(0))
