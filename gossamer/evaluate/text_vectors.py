"""Texts as vectors, to find samples by what they are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gossamer.core.errors import InputError, MissingExtra, first_line
from gossamer.evaluate.evaluation_pool import Encode

WORDS = "words"
WIDTH = 1024
BATCH = 32


def encoder_of(name: str) -> Encode:
    """What makes vectors of texts.

    Args:
        name: "words" hashes words and pairs of words, so that texts are near that share them; any
            other name is that (or the folder) of a transformers encoder, whose last hidden states
            are averaged over the tokens.

    Raises:
        MissingExtra: if transformers is needed and not installed.
        InputError: if there is no such encoder.
    """
    return _words if name == WORDS else _transformer(name)


def _words(texts: Sequence[str]) -> np.ndarray:
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=WIDTH, ngram_range=(1, 2), stop_words="english")
    hashed: Any = hashing.transform(texts)
    return np.asarray(hashed.todense(), np.float32)


def _transformer(name: str) -> Encode:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "llm") from error
    import torch

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"there is no encoder {name}: {first_line(error)}") from error
    model.eval()

    def encode(texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), BATCH):
            tokens = tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                states = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            found.append(((states * mask).sum(1) / mask.sum(1)).float().numpy())
        return np.concatenate(found)

    return encode
