"""Surgery against the silenced eager network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import surgery
from gossamer.core.dependency import Dependency, analyse
from gossamer.core.errors import InputError, UnsupportedError
from gossamer.core.saved import load_network, save_network
from tests.core.small_networks import NETWORKS, Attention, Residual, build


def random_removal(dependency: Dependency, seed: int, share: float = 0.5) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    removal = {}
    for family in dependency.families:
        order = torch.randperm(family.units, generator=generator)
        removal[family.index] = order < min(family.units - 1, round(family.units * share))
    return removal


def run(module: nn.Module, inputs: tuple[Tensor, ...], *, double: bool = True) -> list[Tensor]:
    if double:
        module = copy.deepcopy(module).double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        result = module.eval()(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_the_smaller_network_agrees_with_the_silenced_one(name, seed):
    module, inputs = build(name, seed)
    before = copy.deepcopy(module.state_dict())
    dependency = analyse(module, inputs)
    result = surgery.remove(module, dependency, random_removal(dependency, seed))
    assert result.verified and result.error < 1e-8
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert sum(p.numel() for p in result.module.parameters()) < dependency.graph.parameters


@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "padded shortcut", "several",
                                  "leftovers"])  # fmt: skip
def test_exact_surgery_agrees_with_the_eager_network_zeroed(name):
    """The oracle knows no graph: the user's modules with rows, biases and scales at zero."""
    module, inputs = build(name)
    dependency = analyse(module, inputs)
    removal = random_removal(dependency, 1)
    result = surgery.remove(module, dependency, removal)
    assert result.exactness in ("exact", "folded")
    zeroed = surgery.silence(module, dependency, removal)
    for member_family in dependency.families:
        gone = removal[member_family.index]
        for member in member_family.members:
            if member.role == "producer" and member.parameter:
                rows = zeroed.get_parameter(member.name).movedim(member.axis, 0)
                own = member.owner >= 0
                assert not rows[own & gone[member.owner.clamp(min=0)]].any()
    for a, b in zip(run(result.module, inputs), run(zeroed, inputs), strict=True):
        # Biases into which constants were folded are single precision.
        assert torch.allclose(a, b, atol=1e-12 if result.exactness == "exact" else 1e-6)


def test_zeroing_the_convolution_alone_is_not_enough():
    """Normalisation shifts a silent channel: surgery relies on its scale and shift being zero."""
    module, inputs = build("residual")
    dependency = analyse(module, inputs)
    removal = {1: torch.arange(8) < 4}
    result = surgery.remove(module, dependency, removal)
    half = copy.deepcopy(module)
    with torch.no_grad():
        half.conv1.weight[:4] = 0
    assert not torch.allclose(run(result.module, inputs)[0], run(half, inputs)[0], atol=1e-3)


def test_layer_norm_takes_its_statistics_over_the_survivors():
    """Against a network written by hand that has only the surviving width."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    nn.init.normal_(module[1].weight), nn.init.normal_(module[1].bias)
    inputs = (torch.randn(2, 6),)
    dependency = analyse(module, inputs)
    gone = torch.tensor([True, False, False, True, False, True, False, False])
    result = surgery.remove(module, dependency, {0: gone})
    assert result.exactness == "approximate"
    keep = ~gone
    y = inputs[0] @ module[0].weight[keep].T + module[0].bias[keep]
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-5)
    y = y * module[1].weight[keep] + module[1].bias[keep]
    expected = y @ module[2].weight[:, keep].T + module[2].bias
    assert torch.allclose(run(result.module, inputs, double=False)[0], expected, atol=1e-5)


def test_constants_fold_into_the_bias():
    """sigmoid(0) = 1/2 of a removed unit stays in the next layer's bias."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1, bias=False)).eval()
    with torch.no_grad():
        module[2].weight.copy_(torch.tensor([[1.0, 10.0, 100.0]]))
    dependency = analyse(module, (torch.randn(2, 2),))
    result = surgery.remove(module, dependency, {0: torch.tensor([False, True, True])})
    assert result.exactness == "folded"
    bias = [p for n, p in result.module.named_parameters() if n.endswith("2.bias")]
    assert bias[0].tolist() == pytest.approx([55.0])


def test_a_head_that_leaves_takes_its_share_of_the_projection_along():
    """Attention with heads 1 and 3 removed equals the sum over heads 0 and 2 alone."""
    module, inputs = build("attention by hand")
    assert isinstance(module, Attention)
    dependency = analyse(module, inputs)
    (heads,) = [
        f for f in dependency.families
        if any(m.name == "proj.weight" and m.owner.tolist() == [i // 4 for i in range(16)]
               for m in f.members)
    ]  # fmt: skip
    gone = torch.tensor([False, True, False, True])
    result = surgery.remove(module, dependency, {heads.index: gone})
    assert result.exactness == "exact"
    with torch.no_grad():
        muted = copy.deepcopy(module)
        muted.proj.weight.view(16, 4, 4)[:, gone] = 0
    assert torch.allclose(run(result.module, inputs)[0], run(muted, inputs)[0], atol=1e-12)


def test_own_modules_where_they_admit_the_sizes_else_the_graph():
    module, inputs = build("residual")
    dependency = analyse(module, inputs)
    own = surgery.remove(module, dependency, random_removal(dependency, 0))
    assert own.way == "modules" and isinstance(own.module, Residual)
    assert own.module.conv1.out_channels == 4 and own.module.bn1.num_features == 4
    module, inputs = build("attention")
    dependency = analyse(module, inputs)
    graph = surgery.remove(module, dependency, random_removal(dependency, 0))
    assert graph.way == "graph"


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smaller_network_trains_saves_and_is_pruned_again(name, tmp_path):
    module, inputs = build(name)
    dependency = analyse(module, inputs)
    small = surgery.remove(module, dependency, random_removal(dependency, 2, 0.3)).module
    small.train()
    outputs = small(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.square().sum() for o in outputs).backward()
    moved = [p for p in small.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved
    save_network(tmp_path, small, inputs)
    loaded, _, _ = load_network(tmp_path)
    for a, b in zip(run(loaded, inputs, double=False), run(small, inputs, double=False),
                    strict=True):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-6)
    again = analyse(loaded, inputs)
    smaller = surgery.remove(loaded, again, random_removal(again, 3, 0.3))
    assert smaller.verified
    assert analyse(smaller.module, inputs).graph.macs < again.graph.macs


@pytest.mark.parametrize("name", ["residual", "attention", "several", "grouped query"])
def test_the_smaller_network_exports_with_a_free_batch(name, tmp_path):
    from gossamer.core.export import OnnxRunner, largest_difference, write_onnx, write_pt2
    from gossamer.core.network import Network

    module, inputs = build(name)
    dependency = analyse(module, inputs)
    small = surgery.remove(module, dependency, random_removal(dependency, 4)).module
    network = Network(small, inputs)
    write_onnx(network, tmp_path / "small.onnx")
    write_pt2(network, tmp_path / "small.pt2")
    runner = OnnxRunner(tmp_path / "small.onnx")
    assert largest_difference(small, runner, inputs) < 1e-4
    batch = tuple(torch.cat([x, x, x[:1]]) for x in inputs)
    for a, b in zip(run(small, batch, double=False), pack(runner(*batch)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def pack(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_units_changes_nothing(name):
    module, inputs = build(name)
    dependency = analyse(module, inputs)
    generator = torch.Generator().manual_seed(0)
    orders = {f.index: torch.randperm(f.units, generator=generator) for f in dependency.families}
    moved = surgery.permute(module, dependency, orders)
    changed = [
        k for k, v in moved.state_dict().items() if not torch.equal(v, module.state_dict()[k])
    ]
    assert changed
    for a, b in zip(run(moved, inputs), run(module, inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "shuffle", "padded shortcut"])
def test_widening_keeps_the_function(name):
    module, inputs = build(name)
    dependency = analyse(module, inputs)
    generator = torch.Generator().manual_seed(0)
    copies = {
        f.index: torch.randint(1, 4, (f.units,), generator=generator)
        for f in dependency.families
        if f.exactness == "exact"
    }
    wide = surgery.widen(module, dependency, copies)
    assert sum(p.numel() for p in wide.parameters()) > dependency.graph.parameters
    for a, b in zip(run(wide, inputs, double=False), run(module, inputs, double=False),
                    strict=True):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-4)


def test_widening_that_changes_the_function_is_refused():
    module, inputs = build("attention")
    dependency = analyse(module, inputs)
    stream = next(f for f in dependency.families if f.exactness == "approximate")
    with pytest.raises(UnsupportedError, match="statistics run over it"):
        surgery.widen(module, dependency, {stream.index: torch.full((stream.units,), 2)})
    with pytest.raises(InputError, match="at least 1"):
        surgery.widen(module, dependency, {stream.index: torch.zeros(stream.units)})


def test_a_wrong_rule_never_makes_a_network(monkeypatch):
    """If the labels are wrong the check refuses the result: nothing wrong is returned."""
    from gossamer.core import label_rules

    def flipped(p, node):  # type: ignore[no-untyped-def]
        return [None if v is None else v[::-1] for v in p.of(node.args[0])]

    monkeypatch.setitem(label_rules.RULES, "relu", flipped)
    module, inputs = build("residual")
    dependency = analyse(module, inputs)
    with pytest.raises(UnsupportedError, match="differs from the silenced original"):
        surgery.remove(module, dependency, {f.index: torch.arange(f.units) < f.units // 3
                                            for f in dependency.families})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small",
                                  "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
                                  "vit_b_16", "swin_t"])  # fmt: skip
def test_torchvision_networks_at_a_third_less(name):
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None).eval()
    size = 224 if name == "vit_b_16" else 64
    inputs = (torch.randn(2, 3, size, size),)
    dependency = analyse(module, inputs)
    result = surgery.remove(module, dependency, random_removal(dependency, 0, 0.3))
    assert result.verified
    assert analyse(result.module, inputs).graph.macs < 0.75 * dependency.graph.macs
