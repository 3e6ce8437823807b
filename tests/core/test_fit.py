"""Training: known answers, and runs that were killed end as those that were not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.files import load_state
from gossamer.core.fit import Log, Rule, Supervised, constant, cosine, fit, sgd, warm_cosine
from gossamer.core.task import Batch, Classification, Task, seed_of
from gossamer.datasets.augment import shift
from gossamer.datasets.digits import digits

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from gossamer.core import files
from test_fit import network, train

where, at, checkpoint, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
count = 0

def maybe_die():
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)

if where == "writing":  # between the whole temporary file and the rename
    fsync = os.fsync
    files.os.fsync = lambda handle: (fsync(handle), maybe_die())
trained = train(checkpoint, after_step=maybe_die if where == "step" else None)
files.save_state(out, trained.state_dict())
"""


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)
        )


def small_task() -> Classification:
    return digits(limit=70, augment=shift(1))


def train(checkpoint: Path | None, **options: Any) -> nn.Module:
    trained = network()
    rule = Supervised(trained, small_task(), **options)
    fit(
        rule,
        rule.task,
        epochs=4,
        batch_size=16,
        seed=11,
        validate="validation",
        checkpoint=checkpoint,
        checkpoint_every=3,
    )
    return trained


def same(left: nn.Module, right: nn.Module | dict[str, Tensor]) -> bool:
    other = right.state_dict() if isinstance(right, nn.Module) else right
    state = left.state_dict()
    return list(state) == list(other) and all(torch.equal(state[k], other[k]) for k in state)


def test_runs_are_functions_of_their_seed() -> None:
    torch.manual_seed(1)
    first = train(None)
    torch.manual_seed(2)
    assert same(first, train(None))
    assert not same(first, network())


@pytest.mark.slow
def test_killed_runs_end_as_unbroken_ones(tmp_path: Path) -> None:
    unbroken = train(None)
    drawn = random.Random(5)  # 20 steps a run, 9 checkpoints
    kills = [("step", drawn.randint(1, 19)), ("writing", drawn.randint(1, 4))]
    checkpoint, out = tmp_path / "run.safetensors", tmp_path / "trained"
    for where, at in [*kills, ("no", 0)]:
        arguments = [where, str(at), str(checkpoint), str(out)]
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, *arguments],
            cwd=Path(__file__).parent,  # where this module is found
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if where == "no" else -signal.SIGKILL), done.stderr
        if checkpoint.exists():
            load_state(checkpoint)  # whole at every moment
    assert same(unbroken, load_state(out))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 13, 20])
def test_broken_runs_resume_to_the_same_weights(tmp_path: Path, step: int) -> None:
    unbroken = train(None)
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == step:
            raise Stopped

    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        train(checkpoint, after_step=stop)
    seen = 0

    def look() -> None:
        nonlocal seen
        seen += 1

    resumed = train(checkpoint, after_step=look)
    assert same(unbroken, resumed)
    # Five steps an epoch; checkpoints every three steps and at each epoch's end.
    kept = max([k for k in (*range(0, 20, 3), *range(0, 20, 5)) if k < step], default=0)
    assert seen == 20 - kept


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    first = train(checkpoint)

    def never() -> None:
        raise AssertionError

    assert same(first, train(checkpoint, after_step=never))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    train(checkpoint)
    rule = Supervised(network(), small_task())
    with pytest.raises(InputError, match="belongs to a run with other settings or data"):
        fit(rule, rule.task, epochs=4, batch_size=16, seed=12, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated"):
        train(checkpoint)


def test_the_plain_rule_is_torch_s_own_loop() -> None:
    given = small_task()
    ours = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    theirs.load_state_dict(ours.state_dict())
    fit(Supervised(ours, given), given, epochs=3, batch_size=32, seed=4)
    optimizer = torch.optim.SGD(
        [
            {"params": [theirs[1].weight], "weight_decay": 5e-4},
            {"params": [theirs[1].bias], "weight_decay": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    total = 3 * given.steps_per_epoch("train", 32)
    step = 0
    for epoch in range(3):
        for images, labels in given.batches("train", batch_size=32, seed=4, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * cosine(step / total)
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(images), labels).backward()
            optimizer.step()
            step += 1
    assert same(ours, theirs)


def test_hooks_run_where_they_say() -> None:
    given = small_task()
    trained = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    calls: list[str] = []
    before = trained[1].weight.detach().clone()

    def after_backward() -> None:
        calls.append("backward")
        assert trained[1].weight.grad is not None
        trained[1].weight.grad.zero_()

    def after_step() -> None:
        calls.append("step")

    rule = Supervised(
        trained,
        given,
        optimizer=sgd(trained, weight_decay=0.0),
        penalty=lambda: 1e3 * trained[1].bias.square().sum(),
        after_backward=after_backward,
        after_step=after_step,
        clip=1.0,
    )
    fit(rule, given, epochs=1, batch_size=70, seed=0)
    assert calls == ["backward", "step"]
    assert torch.equal(trained[1].weight, before)


def test_schedules_by_hand() -> None:
    assert [cosine(x) for x in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    multiplier = warm_cosine(0.2)
    assert multiplier(0.2) == pytest.approx(1.0)
    assert multiplier(0.6) == pytest.approx(0.5)
    assert 0 < multiplier(0.0) < multiplier(0.1) < multiplier(0.2)
    assert constant(0.3) == 1.0


class Recording(Rule):
    """Trains nothing and notes what it was given."""

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)
        self.frozen = nn.Dropout(0.5).eval()
        self.seen: list[Any] = []
        self.ended = 0

    def step(self, batch: Batch) -> Log:
        self.seen.append((self.run.epoch, self.run.step, torch.rand(1).item(), batch))
        return {"loss": 1.0}

    def end_epoch(self) -> None:
        self.ended += 1


def test_draws_in_a_step_depend_on_the_step_alone() -> None:
    first, second = Recording(), Recording()
    fit(first, small_task(), epochs=2, batch_size=40, seed=1)
    torch.manual_seed(99)
    expected = torch.rand(2)
    torch.manual_seed(99)
    fit(second, small_task(), epochs=2, batch_size=40, seed=1)
    assert torch.equal(torch.rand(2), expected)  # the caller's generator is left alone
    assert [seen[:3] for seen in first.seen] == [seen[:3] for seen in second.seen]
    draws = [seen[2] for seen in first.seen]
    assert len(set(draws)) == len(draws) == 4
    assert [seen[:2] for seen in first.seen] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert first.ended == 2 and not first.frozen.training


def test_steps_are_seeded_on_the_run_s_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"a device that nobody uses was seeded with {seed}")

    recording = Recording()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", refuse)
        patch.setattr(torch.xpu, "manual_seed_all", refuse)
        fit(recording, small_task(), epochs=1, batch_size=40, seed=1, cpu=True)
    for step, seen in enumerate(recording.seen):
        with torch.random.fork_rng():
            torch.manual_seed(seed_of("step", 1, 0, step))
            assert seen[2] == float(torch.rand(()))


def test_several_tasks_give_batches_by_name() -> None:
    tasks: dict[str, Task] = {"labelled": digits(limit=40), "other": digits(limit=90, seed=3)}
    rule = Recording()
    fit(rule, tasks, epochs=3, batch_size={"labelled": 20, "other": 50}, seed=2)
    assert len(rule.seen) == 6
    sizes = [{name: len(b[1]) for name, b in seen[3].items()} for seen in rule.seen]
    assert [size["labelled"] for size in sizes] == [20] * 6
    assert [size["other"] for size in sizes] == [50, 40] * 3
    # The second task goes through epochs of its own, in an order of its own.
    own = seed_of("task", "other", 2)
    epochs = [torch.cat([rule.seen[2 * e + k][3]["other"][1] for k in (0, 1)]) for e in range(3)]
    expected = [
        torch.cat([y for _, y in tasks["other"].batches("train", batch_size=50, seed=own, epoch=e)])
        for e in range(3)
    ]
    assert all(torch.equal(a, b) for a, b in zip(epochs, expected, strict=True))


def test_patience_and_the_time_limit_stop_early() -> None:
    rule = Recording()
    given = small_task()
    rule.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    history = fit(rule, given, epochs=9, validate="validation", patience=2)
    assert history.stopped_early and history.epochs == 3  # the first score is never beaten
    history = fit(rule, given, epochs=9, seconds=0.0)
    assert history.stopped_early and history.epochs == 1 and history.score == [None]
    assert not fit(rule, given, epochs=1, patience=1).stopped_early


def test_a_loss_that_is_not_finite_is_one_sentence() -> None:
    given = small_task()
    broken = network()
    with torch.no_grad():
        broken[4].weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"the loss became nan at step 1"):
        fit(Supervised(broken, given), given, epochs=1)


def test_precision_may_change_between_runs() -> None:
    given = small_task()
    for precision in ("no", "bf16", "no"):
        trained = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        kinds: list[torch.dtype] = []
        trained.register_forward_hook(lambda m, i, o, kinds=kinds: kinds.append(o.dtype))
        fit(Supervised(trained, given), given, epochs=1, precision=precision)
        assert set(kinds) == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_the_default_optimizer_spares_vectors() -> None:
    groups = sgd(network()).param_groups
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])


@pytest.mark.gpu
def test_a_gpu_is_used_when_there_is_one() -> None:
    given = small_task()
    trained = network()
    fit(Supervised(trained, given), given, epochs=1)
    assert next(trained.parameters()).is_cuda
