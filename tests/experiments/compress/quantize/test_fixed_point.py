from dataclasses import replace

import pytest
import torch

from gossamer.core.experiment import Result
from gossamer.experiments.compress.quantize.fixed_point import DIGITS, EXPERIMENT, contend, draw


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_claims_are_judged_from_what_is_measured(tmp_path):
    rows = list(contend(replace(DIGITS, epochs=2, rates=(0.05,)), 0))
    result = Result("adapt-precision", "quick", tuple(rows), EXPERIMENT.claims)
    assert all(e.holds is not None for e in result.evidence())
    by_name = {row["contender"]: row for row in rows}
    # What float has in the model is what everything else is measured against.
    reference = by_name["float32"]
    assert reference["inference_speedup"] == reference["size_ratio"] == 1.0
    fixed = by_name["fixed <6,3>"]
    assert fixed["word_length"] == 6 and fixed["inference_speedup"] > 32 / 6
    ours, rounded = by_name["AdaPT"], by_name["rounded after training, AdaPT's mean word"]
    assert abs(ours["word_length"] - rounded["word_length"]) <= 0.5
    assert ours["formats"] == by_name["AdaPT in integers"]["formats"]
    draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
