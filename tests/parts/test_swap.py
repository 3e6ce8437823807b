import pytest
import torch
from torch import nn

from gossamer.core.errors import InputError
from gossamer.parts.swap import swapped


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def test_tied_weights_buffers_and_optimizer_references_survive():
    torch.manual_seed(0)
    network = Tied()
    shadow = network.first.weight
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    x = torch.randn(8, 3)
    double = shadow * 2  # part of the graph: the gradient goes on to the shadow
    with swapped(network, {"first.weight": double}):
        assert network.first.weight is double and network.second.weight is double
        out = network(x)
        h = x @ double.T
        expected = nn.functional.batch_norm(h, None, None, training=True) @ double.T
        torch.testing.assert_close(out, expected)
        out.sum().backward()
    assert network.first.weight is shadow and network.second.weight is shadow
    assert network.norm.num_batches_tracked == 1
    torch.testing.assert_close(network.norm.running_mean, 0.1 * h.mean(0).detach())
    before = shadow.detach().clone()
    optimizer.step()
    torch.testing.assert_close(shadow.detach(), before - shadow.grad)
    assert shadow.grad.abs().sum() > 0


def test_restored_after_an_error():
    network = nn.Linear(2, 2)
    weight = network.weight
    with pytest.raises(ZeroDivisionError), swapped(network, {"weight": torch.zeros(2, 2)}):
        raise ZeroDivisionError
    assert network.weight is weight


def test_lstm_sees_the_substitute():
    torch.manual_seed(0)
    network = nn.LSTM(4, 5, batch_first=True)
    x = torch.randn(2, 3, 4)
    before = network(x)[0]
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    with swapped(network, zeros):
        assert network(x)[0].abs().max() == 0
    assert torch.equal(network(x)[0], before)


def test_bad_names_and_shapes():
    network = Tied()
    w = torch.zeros(3, 3)
    with pytest.raises(InputError, match="no parameter"), swapped(network, {"third": w}):
        pass
    with pytest.raises(InputError, match="shape"), swapped(network, {"first.weight": w[:1]}):
        pass
    both = {"first.weight": w, "second.weight": w}
    with pytest.raises(InputError, match="tied"), swapped(network, both):
        pass
