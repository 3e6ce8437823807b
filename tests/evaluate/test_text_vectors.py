"""Texts as vectors: by words, and by a real encoder with weights made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gossamer.core.errors import InputError
from gossamer.evaluate.text_vectors import encoder_of


def test_texts_that_share_words_are_near() -> None:
    first, second, third = encoder_of("words")(
        ["the chest X-ray shows a fracture", "a fracture in the X-ray of a chest", "contract law"]
    )
    assert first @ second > 0.4 > 0.05 > first @ third
    alone = encoder_of("words")(["contract law"])[0]
    np.testing.assert_array_equal(alone, third)  # no text depends on the others


def test_an_encoder_ignores_padding(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "heart", "scan", "law"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "net")
    tokenizer.save_pretrained(tmp_path / "net")
    encode = encoder_of(str(tmp_path / "net"))
    short, long = "heart scan", "heart scan law law law law"
    together, alone = encode([short, long]), encode([short])
    assert together.shape == (2, 16)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)


def test_an_encoder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no encoder"):
        encoder_of(str(tmp_path / "none"))
