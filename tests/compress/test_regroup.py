"""The step that changes groups: exact before training, trained after, inside a recipe."""

from pathlib import Path

import pytest
import torch

import gossamer
from gossamer.compress.recipe import Recipe
from gossamer.compress.regroup import regroup
from gossamer.core.errors import InputError
from gossamer.core.fit import Supervised, fit, sgd
from gossamer.core.network import Network
from gossamer.datasets.digits import digits
from gossamer.models.mobilenet import MobileNet


@pytest.fixture(scope="module")
def task():
    return digits(limit=400)


@pytest.fixture(scope="module")
def network(task) -> Network:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MobileNet(
            ((16, 1, 1), (32, 1, 2)), stem=16, stem_stride=1, in_channels=1, classes=10
        )
    fit(Supervised(module, task, optimizer=sgd(module, lr=0.1)), task, epochs=6, batch_size=64)
    return Network(module, task.example_inputs)


def test_the_step_starts_from_the_same_answers_and_learns(task, network: Network) -> None:
    same = regroup(network, task, group_width=4, epochs=0)
    assert task.score(same.module) == task.score(network.module)
    record = same.steps[-1]
    assert record["step"] == "regroup" and record["options"]["group_width"] == 4
    assert record["report"]["kept"]
    assert record["report"]["layers"]["blocks.0.0.conv_dw"] == {"before": 16, "groups": 4}
    assert len(same.steps) == 1 and same.runtime == "onnxruntime"
    trained = regroup(network, task, epochs=6, batch_size=64, lr=0.05)
    assert trained.steps[-1]["options"]["group_width"] == 8
    with torch.no_grad():
        losses = [
            float(task.loss(m.module.eval(), next(task.batches("train", batch_size=400))))
            for m in (same, trained)
        ]
    assert losses[1] < losses[0] - 0.05
    with pytest.raises(InputError, match="not both"):
        regroup(network, task, group_width=4, groups=2)


def test_inside_shrink_after_pruning(task, network: Network, tmp_path: Path) -> None:
    recipe = Recipe.of(
        ("prune", {"macs": 0.6, "epochs": 1}),
        ("regroup", {"group_width": 4, "epochs": 1}),
        ("sparsify", {"sparsity": 0.5, "epochs": 1}),
        ("regroup", {"groups": 1, "select": "grouped", "epochs": 1}),
    )
    made = gossamer.shrink(network.module, task, recipe=recipe, out=tmp_path / "out", cpu=True)
    names = [step["step"] for step in made.network.steps]
    assert names == ["prune", "regroup", "sparsify", "regroup"]
    kernels = dict(made.network.module.named_parameters())
    assert all(p.shape[1] == p.shape[0] for n, p in kernels.items() if "conv_dw" in n)
    # layers that were not converted keep the zeros that were pruned
    pointwise = next(p for n, p in kernels.items() if n.endswith("blocks.1.0.conv_pw.weight"))
    assert float((pointwise == 0).float().mean()) > 0.2
