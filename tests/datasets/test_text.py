"""Texts as tasks: every token counted once, splits that do not overlap, real checkpoints exact."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.language import LanguageModelling, TextClassification
from gossamer.datasets.text import language_modelling, text_classification
from gossamer.datasets.tokenizers import Characters, ScoredPieces, Words
from gossamer.models.language import causal_llama, llama2c

TEXT = "the cat sat on the mat. " * 200 + "a dog ran! " * 100


def _csv(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    path = folder / "texts.csv"
    path.write_text("split,label,text\n" + "".join(f'{s},{y},"{t}"\n' for s, y, t in rows))
    return path


class _Uniform(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.tokens)


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    task = language_modelling(tmp_path / "t.txt", length=16)
    assert task.score(_Uniform(task.tokens)) == pytest.approx(-math.log(task.tokens), rel=1e-6)
    assert task.perplexity(_Uniform(task.tokens)) == pytest.approx(task.tokens, rel=1e-5)


def test_blocks_go_through_the_stream_at_another_phase_each_epoch() -> None:
    stream = torch.arange(1003)
    task = LanguageModelling(
        {"train": stream, "validation": stream}, name="count", tokens=1003, length=10
    )
    phases = set()
    for epoch in range(6):
        blocks = torch.cat(list(task.batches("train", batch_size=7, seed=1, epoch=epoch)))
        assert blocks.shape == (99, 10)
        # Each block is consecutive, none overlaps another.
        assert torch.equal(blocks, blocks[:, :1] + torch.arange(10))
        assert len(blocks.flatten().unique()) == 990
        phases.add(int(blocks.min()))
    assert len(phases) > 1 and max(phases) < 10
    plain = torch.cat(list(task.batches("validation", batch_size=8)))
    assert torch.equal(plain.flatten(), stream[:1000])
    # Resuming inside an epoch gives the same batches.
    whole = list(task.batches("train", batch_size=7, seed=1, epoch=2))
    rest = list(task.batches("train", batch_size=7, seed=1, epoch=2, start=5))
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_splits_of_one_text_are_consecutive(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    task = language_modelling(tmp_path / "t.txt", length=8)
    tokenizer = Characters(TEXT[: round(0.9 * len(TEXT))])
    joined = torch.cat([task.splits[s] for s in ("train", "validation", "test")])
    assert joined.tolist() == tokenizer.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_words_are_counted_in_the_training_texts_alone(tmp_path: Path) -> None:
    rows = [("train", "good", "fine film")] * 8 + [("train", "bad", "dull film")] * 8
    rows += [("dev", "bad", "dull plot")] * 2 + [("test", "good", "fine novelty")] * 2
    task = text_classification(_csv(tmp_path, rows), length=4)
    assert task.classes == ("bad", "good")
    assert [task.size(s) for s in ("train", "validation", "test")] == [16, 2, 2]
    words = Words(["fine film"] * 8 + ["dull film"] * 8)
    assert (len(words), words.encode("Film fine, novelty")) == (5, [2, 4, 1, 1])
    assert task.tokens == 5
    ids, labels = next(task.batches("test", batch_size=2))
    assert ids.tolist() == [[4, 1, 0, 0]] * 2 and labels.tolist() == [1, 1]
    assert task.inputs((ids, labels))[1].tolist() == [[1, 1, 0, 0]] * 2


def test_missing_splits_are_carved_without_overlap(tmp_path: Path) -> None:
    rows = [("all", str(i % 2), f"text number {i}") for i in range(100)]
    task = text_classification(
        _csv(tmp_path, rows), tokenizer=Words([t for *_, t in rows], least=1)
    )
    sizes = [task.size(s) for s in ("train", "validation", "test")]
    assert sum(sizes) == 100 and sizes[1] == 8 and sizes[2] == 20
    seen = torch.cat([task.splits[s][0] for s in ("train", "validation", "test")])
    assert len(seen.unique(dim=0)) == 100


def test_matthews_correlation_is_not_accuracy(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    ids = torch.arange(1, 11)[:, None]
    splits = {s: (ids, labels) for s in ("train", "validation")}
    answers = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 0, 0])

    def model(x: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.one_hot(answers[x[:, 0] - 1], 2).float()

    def task(score: str) -> TextClassification:
        return TextClassification(splits, ("a", "b"), name="t", tokens=11, score=score)  # type: ignore[arg-type]

    assert task("accuracy").score(model) == pytest.approx(70.0)
    # tp 1, tn 6, fp 1, fn 2.
    expected = 100 * (1 * 6 - 1 * 2) / math.sqrt(2 * 3 * 7 * 8)
    assert task("matthews").score(model) == pytest.approx(expected)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        text_classification(tmp_path / "none.csv")
    with pytest.raises(InputError, match="neither Parquet"):
        (tmp_path / "t.doc").write_text("x")
        text_classification(tmp_path / "t.doc")
    with pytest.raises(InputError, match="no column 'words'"):
        text_classification(_csv(tmp_path, [("train", "a", "b")]), text="words")
    with pytest.raises(InputError, match="all have the same label"):
        text_classification(_csv(tmp_path, [("train", "a", "b")] * 4))
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(InputError, match="too few for two blocks"):
        language_modelling(tmp_path / "short.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        language_modelling(tmp_path / "bad.txt")
    with pytest.raises(InputError, match="outside of 0 to 4"):
        LanguageModelling(
            {"train": torch.arange(9), "validation": torch.arange(9)}, name="t", tokens=5, length=4
        )


def test_a_llama_learns_nothing_from_the_future() -> None:
    torch.manual_seed(0)
    model = causal_llama(11, width=16, layers=2, heads=2, key_value_heads=1).eval()
    ids = torch.randint(0, 11, (2, 9))
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 11
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_a_real_checkpoint_continues_as_its_author_published(
    real_data: Callable[[str], Path],
) -> None:
    folder = real_data("weights_stories260k")
    golden = json.loads((folder / "golden.json").read_text())
    model = llama2c(folder)
    ids = golden["greedy_ids_from_bos_64"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    # Every greedy choice at once: the model is causal.
    assert logits.argmax(1)[:-1].tolist() == ids[1:]
    tokenizer = ScoredPieces.read(folder / "vocab.json")
    text = golden["greedy_text_200_tokens"]
    assert text.startswith(tokenizer.decode(ids))
    # llama2.c puts a space before a text; the continuation begins with it.
    assert tokenizer.encode(tokenizer.decode(ids).removeprefix(" "), begin=True) == ids


def test_real_text_sets_have_their_published_sizes(real_data: Callable[[str], Path]) -> None:
    folder = real_data("text_cls")
    sst2 = text_classification(folder / "sst2.parquet")
    assert [sst2.size(s) for s in ("train", "validation", "test")] == [6920, 872, 1821]
    cola = text_classification(folder / "cola.parquet", score="matthews")
    assert cola.size("test") == 527 + 516
    assert cola.size("train") + cola.size("validation") == 8551
    trec = text_classification(folder / "trec6.parquet")
    assert (len(trec.classes), trec.size("test")) == (6, 500)
