import torch

from gossamer.parts.straight_through import (
    gate_through,
    round_through,
    sign_through,
    straight_through,
    top_k_through,
)


def both(function, x):
    x = torch.tensor(x, requires_grad=True)
    y = function(x)
    y.backward(torch.arange(1.0, 1.0 + x.numel()))
    return y.tolist(), x.grad.tolist()


def test_value_is_exact_and_gradient_passes():
    x = torch.full((1000,), 1e8, requires_grad=True)
    value = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    y = straight_through(x, value)
    assert torch.equal(y, value)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(1000))


def test_known_answers():
    assert both(round_through, [0.5, 1.5, -0.4]) == ([0, 2, 0], [1, 2, 3])
    assert both(sign_through, [0.0, -0.3, 2.0]) == ([1, -1, 1], [1, 2, 0])
    assert both(gate_through, [0.0, 0.1, -1.0]) == ([0, 1, 0], [1, 2, 3])
    assert both(lambda x: top_k_through(x, 2), [3.0, 1.0, 2.0]) == ([1, 0, 1], [1, 2, 3])
