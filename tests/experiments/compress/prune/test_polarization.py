from dataclasses import replace

import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.core.experiment import Result
from gossamer.core.graph import Graph
from gossamer.experiments.compress.prune.polarization import (
    DIGITS,
    EXPERIMENT,
    Trial,
    _Contest,
    cifar_work,
    contend,
    full,
    residual_perceptron,
)

SMALL = replace(
    DIGITS, epochs=3, network=lambda: residual_perceptron(width=16, blocks=4), rates=(3e-3,),
    polars=(4.0,), acts=(1.0,), drops=(0.5,), slims=(1e-4,), channel_polars=(8.0,),
    channel_acts=(4.0,),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_network_is_the_one_described():
    graph = Graph.trace(residual_perceptron(), (torch.randn(2, 1, 8, 8),))
    assert graph.macs == 64 * 48 + 8 * 2 * 48 * 48 + 48 * 10


def test_contenders_on_digits_in_small():
    rows = list(contend(SMALL, 0))
    names = [(row["mode"], row["contender"]) for row in rows]
    assert names == [
        *(
            ("layer", name)
            for name in ("dense", "consensus", "no polarization", "Gumbel gates", "magnitude",
                         "random blocks", "polarization without a ramp")
        ),
        *(
            ("channel", name)
            for name in ("consensus", "no polarization", "network slimming", "polarized scales",
                         "magnitude")
        ),
    ]  # fmt: skip
    by_name = dict(zip(names, rows, strict=True))
    ours = by_name["layer", "consensus"]
    # cut to as many blocks, or to as few MACs
    for name in ("magnitude", "random blocks"):
        assert by_name["layer", name]["macs"] == ours["macs"]
    channels = by_name["channel", "consensus"]["macs"]
    for name in ("network slimming", "polarized scales", "magnitude"):
        assert channels - 2 * 16 < by_name["channel", name]["macs"] <= channels
    for row in rows:
        if "dynamic" in row:
            assert row["difference"] == abs(row["dynamic"] - row["static"])
            assert row["removed"] == 1 - row["kept"] / row["gates"]
            assert 0 <= row["gap"] <= 0.5
    assert rows[0] == next(iter(contend(SMALL, 0)))  # a function of the seed


def test_of_the_trials_those_that_are_half_gone_come_first():
    contest = _Contest(SMALL, 0)
    dense = contest.dense(3e-3).module
    fresh = contest.fresh()

    def made(setting: float) -> Trial:
        if setting == 0.0:
            raise InputError("the loss became nan")
        kept = 4 if setting == 1.0 else 2
        return Trial(dense if setting != 2.0 else fresh, {"s": setting}, {"kept": kept, "gates": 4})

    assert contest.best(made, [0.0, 1.0]).setting["s"] == 1.0
    assert contest.best(made, [1.0, 2.0]).setting["s"] == 2.0
    assert contest.best(made, [2.0, 3.0]).setting["s"] == 3.0
    with pytest.raises(InputError, match="every trial"):
        contest.best(made, [0.0])


def test_magnitude_keeps_the_largest_blocks():
    contest = _Contest(replace(SMALL, epochs=0), 0)
    module = contest.fresh()
    with torch.no_grad():
        module[3].inner.weight.mul_(9)
        module[4].outer.weight.mul_(5)
        module[4].inner.bias.add_(100)
        module[2].norm.weight.mul_(100)
    contest.fresh = lambda: module
    small = contest.magnitude_blocks(2, 3e-3).module
    kept = [i for i in range(2, 6) if not isinstance(small[i], torch.nn.Identity)]
    assert kept == [3, 4]


def test_full_needs_the_images(tmp_path):
    with pytest.raises(InputError, match="no train_jpeg"):
        next(iter(full([0], images=tmp_path)))
    assert sum(p.numel() for p in cifar_work(tmp_path, 56).network().parameters()) == 853_018


def test_result_is_drawn_and_judged(tmp_path):
    rows = []
    for seed in range(2):
        for name, static, gap in (
            ("dense", 97.0, None), ("consensus", 96.5, 0.001 + seed / 100),
            ("no polarization", 80.0, 0.3), ("magnitude", 97.0, None),
        ):  # fmt: skip
            row = {"contender": name, "mode": "layer", "seed": seed, "static": static,
                   "macs_share": 0.5}  # fmt: skip
            if gap is not None:
                row |= {"gap": gap, "dynamic": static + 0.1, "difference": 0.1, "removed": 0.5}
            rows.append(row)
    result = Result("consensus-subnetwork", "quick", tuple(rows), EXPERIMENT.claims, True)
    assert [e.holds for e in result.evidence()] == [False, True, True, True, True, False]
    EXPERIMENT.draw(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
