import argparse
import inspect
from dataclasses import replace

import pytest
import torch

from gossamer.compress.quantize.distilled import UniformlyQuantized, UniformOptions
from gossamer.core.errors import InputError
from gossamer.core.experiment import Result
from gossamer.core.fit import Supervised, fit
from gossamer.experiments.compress.quantize.distilled import (
    DIGITS,
    EXPERIMENT,
    CharacterLstm,
    CharacterText,
    cifar_student,
    cifar_teacher,
    contend,
    digits_student,
    digits_teacher,
    full,
    text_work,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text_folder(tmp_path):
    # Text that every Python brings along.
    (tmp_path / "a.txt").write_text(inspect.getsource(argparse)[:40_000], encoding="utf-8")
    return tmp_path


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_networks_have_the_published_sizes():
    assert parameters(cifar_teacher()) == pytest.approx(5.3e6, rel=0.02)
    assert parameters(cifar_student()) == pytest.approx(1.0e6, rel=0.02)
    convolutions = 32 * 9 + 32 + 64 * 32 * 9 + 64 + 2 * (32 + 64)
    assert parameters(digits_teacher()) == convolutions + 256 * 128 + 128 + 128 * 10 + 10
    convolutions = 8 * 9 + 8 + 16 * 8 * 9 + 16 + 2 * (8 + 16)
    assert parameters(digits_student()) == convolutions + 64 * 32 + 32 + 32 * 10 + 10
    assert cifar_teacher()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_contenders_on_digits_in_small():
    work = replace(
        DIGITS, bits=(2,), teacher_epochs=4, student_epochs=4, levels_epochs=1,
        rates=(0.05,), levels_rates=(3e-4,),
    )  # fmt: skip
    rows = {(row["contender"], row["bits"]): row for row in contend(work, 0)}
    assert [name for name, _ in rows] == [
        "teacher", "student", "distilled student", "PM without buckets", "PM", "QD",
        "QD without teacher", "DQ", "DQ redistributed",
    ]  # fmt: skip
    assert rows["teacher", None]["accuracy"] > 85
    student = rows["student", None]["bytes"]
    assert student == 4 * parameters(digits_student())
    for name in ("PM", "QD", "DQ"):
        row = rows[name, 2]
        # codes and scales by the formula, then a header and the batch-norm statistics
        assert row["bytes"] < student / 10 and row["bytes"] < row["file_bytes"] < student
    tensors = [p.numel() for p in digits_student().parameters()]
    formula = sum(-(-n * 2 // 8) + 8 * -(-n // min(256, n)) for n in tensors)
    assert rows["PM", 2]["bytes"] == rows["QD", 2]["bytes"] == formula
    assert rows["DQ", 2]["bytes"] == formula + 4 * 4 * len(tensors)
    again = next(iter(contend(work, 0)))
    assert again == rows["teacher", None]  # a function of the seed


def test_text_is_cut_in_order_without_overlap(text_folder):
    task = CharacterText(text_folder, length=50)
    assert task.size("train") == 35_999 // 50
    inputs, targets = next(iter(task.batches("train", batch_size=4, shuffle=False)))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = (text_folder / "a.txt").read_text()
    alphabet = sorted(set(text[:36_000]))
    assert "".join(alphabet[i] for i in inputs[0]) == text[:50]
    held_out = next(iter(task.batches("test", shuffle=False)))[0]
    assert "".join(alphabet[min(i, len(alphabet) - 1)] for i in held_out[0]) == text[38_000:38_050]
    first = [b[0] for b in task.batches("train", seed=1, epoch=0)]
    resumed = [b[0] for b in task.batches("train", seed=1, epoch=0, start=2)]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], resumed, strict=True))


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="no text files"):
        CharacterText(tmp_path)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="are needed"):
        CharacterText(tmp_path)
    with pytest.raises(InputError, match="are needed"):
        next(iter(full([0], images=tmp_path, text=tmp_path)))


def test_lstm_learns_text_and_computes_with_quantized_weights(text_folder):
    task = CharacterText(text_folder)
    torch.manual_seed(0)
    network = CharacterLstm(task.characters, 48)
    commonest = torch.bincount(torch.cat([b[1].flatten() for b in task.batches("train")])).argmax()
    answers = torch.cat([b[1].flatten() for b in task.batches("validation")])
    baseline = 100 * (answers == commonest).float().mean().item()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    fit(Supervised(network, task, optimizer=optimizer), task, epochs=4, batch_size=32, seed=0)
    score = task.score(network)
    assert score > baseline + 10
    eight = task.score(UniformlyQuantized(network, UniformOptions(8)))
    one = task.score(UniformlyQuantized(network, UniformOptions(1)))
    assert abs(eight - score) < 1 and one < score - 5


def test_contenders_on_text_in_small(text_folder):
    work = text_work(
        text_folder, teacher_width=32, student_width=16, epochs=2, bits=(4,), rates=(1.0,)
    )
    rows = {row["contender"]: row for row in contend(work, 0)}
    assert len(rows) == 9
    assert all("accuracy" not in row for row in rows.values())  # never mixed with the claims
    assert rows["QD"]["next_character_accuracy"] > 5


def test_committed_result_is_drawn_and_judged(tmp_path):
    rows = []
    for seed in range(3):
        for name, bits, accuracy in (
            ("teacher", None, 99), ("student", None, 95), ("distilled student", None, 96),
            ("PM", 2, 60), ("QD", 2, 90), ("DQ", 2, 64), ("PM", 4, 95), ("QD", 4, 94.6),
        ):  # fmt: skip
            rows.append(
                {"contender": name, "bits": bits, "seed": seed, "accuracy": accuracy + seed / 10,
                 "bytes": 1000 * (bits or 32)}
            )  # fmt: skip
    result = Result("quantized-distillation", "quick", tuple(rows), EXPERIMENT.claims)
    assert [e.holds for e in result.evidence()] == [True, False, True, True]
    assert result.verdict() == "does not hold (3 of 4)"
    EXPERIMENT.draw(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
