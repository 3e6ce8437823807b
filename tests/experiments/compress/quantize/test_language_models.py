"""The experiment itself, on a network small enough for a test."""

import pytest
import torch

from gossamer.core.experiment import Result
from gossamer.core.language import LanguageModelling
from gossamer.experiments.compress.quantize.language_models import (
    CONTENDERS,
    EXPERIMENT,
    Work,
    contend,
    draw,
    serve,
    text_of,
    with_outliers,
)
from gossamer.models.language import causal_llama


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _network():
    torch.manual_seed(0)
    return causal_llama(12, width=32, layers=1, heads=4, hidden=64, length=64).eval()


def test_outliers_keep_the_function():
    model = _network()
    ids = torch.randint(0, 12, (2, 16))
    loud = with_outliers(model, ids, factor=32.0, seed=0)
    layer, before = loud.model.layers[0], model.model.layers[0]
    for name in ("input_layernorm", "post_attention_layernorm"):
        ratio = getattr(layer, name).weight / getattr(before, name).weight
        assert sorted(ratio.tolist())[-2:] == [32.0, 32.0] and (ratio != 1).sum() == 2
    assert torch.equal(loud.lm_head.weight, model.lm_head.weight.bfloat16().float())
    with torch.no_grad():
        found, expected = loud(ids).logits, model(ids).logits
    assert (found - expected).abs().max() < 0.05 * expected.std()  # numbers of bfloat16


def test_all_claims_are_judged_from_what_is_measured(tmp_path):
    generator = torch.Generator().manual_seed(0)
    splits = {
        split: torch.randint(0, 12, (count,), generator=generator)
        for split, count in (("train", 800), ("validation", 100), ("test", 400))
    }
    task = LanguageModelling(splits, name="noise", tokens=12, length=32)
    work = Work("characters", _network(), task, text_of(task, samples=16, seed=0))
    assert len(work.calibration) == 2 and work.calibration[0].shape == (8, 32)
    rows = [*contend(work, group_size=16, factor=30.0, seed=0)]
    assert len(rows) == 2 * (1 + len(CONTENDERS))
    plain = [row for row in rows if row["contender"] == "BF16"]
    assert all(row["increase"] == 0 and row["agreement"] == 100 for row in plain)
    rows += serve(width=256, layers=1, prompt=8, batches=(1, 32), rounds=1, seed=0)
    result = Result("llm-quantization", "quick", tuple(rows), EXPERIMENT.claims)
    assert all(evidence.holds is not None for evidence in result.evidence())
    for scenario in {row["scenario"] for row in rows if "scenario" in row}:
        own = [row for row in rows if row.get("scenario") == scenario]
        assert sum(row["best_alone"] for row in own) == 1
        best = max(own, key=lambda row: row["queries_per_usd"])
        assert best["best_alone"]
    draw(result, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
