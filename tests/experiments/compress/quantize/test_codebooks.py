from dataclasses import replace

import pytest
import torch

from gossamer.core.experiment import Result
from gossamer.experiments.compress.quantize.codebooks import (
    DIGITS,
    EXPERIMENT,
    draw,
    file_rows,
    heavy_layer,
    layer_rows,
    network_rows,
)


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_layer_has_heavy_tails_and_correlated_inputs():
    weight, source = heavy_layer(0, side=64)
    kurtosis = (weight / weight.std()).pow(4).mean()
    assert kurtosis > 6  # a normal distribution has 3
    x = source(4000)
    values = torch.linalg.eigvalsh(x.T @ x / len(x))
    assert values[-1] > 30 * values[32]  # white ones would have about 1.3
    again, source = heavy_layer(0, side=64)
    assert torch.equal(again, weight) and torch.equal(source(4000), x)


def test_all_claims_are_judged_from_what_is_measured(tmp_path):
    work = replace(DIGITS, samples=64, steps=8, tuning_epochs=1, network=DIGITS.network)
    rows = [*layer_rows(0, steps=110), *file_rows(0, side=256), *network_rows(work, 0)]
    result = Result("jlcm", "quick", tuple(rows), EXPERIMENT.claims, True)
    assert all(e.holds is not None for e in result.evidence())
    by_name = {row["contender"]: row for row in rows if row["work"] == "network"}
    assert by_name["float32"]["accuracy"] > 95
    # The same table and indices, 2 bits each: the same bytes, whoever learned them.
    same = ("k-means", "tables learned", "joint, proximal", "Deep Compression")
    assert len({by_name[name]["formula_bytes"] for name in same}) == 1
    draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
