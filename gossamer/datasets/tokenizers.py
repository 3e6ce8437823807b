"""From text to token ids: characters, words, and the byte-pair vocabulary of llama2.c.

Anything with ``encode(text) -> ids`` and a length will do in their place, as the tokenizers of
transformers.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from gossamer.core.errors import InputError
from gossamer.core.files import read_json

PADDING, UNKNOWN = 0, 1
_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


class Tokenizer(Protocol):
    """Text to token ids."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...


class Characters:
    """One token a character; those never seen share one token.

    Args:
        text: whose characters are known.
    """

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self._ids = {character: i + 1 for i, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(character, 0) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; "?" for the unknown one."""
        return "".join(self.characters[i - 1] if i else "?" for i in ids)


class Words:
    """One token a word or mark, in lower case: 0 pads, 1 is any unknown word.

    Args:
        texts: whose words are counted (the training texts alone).
        least: words seen less often are unknown.
        largest: the most frequent ones are kept, at most so many.
    """

    def __init__(self, texts: Iterable[str], *, least: int = 2, largest: int = 20_000) -> None:
        counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
        # Ties in alphabetical order, so that the ids are a function of the texts.
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        self.words = [word for word, count in ranked[:largest] if count >= least]
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + 2

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNKNOWN) for word in _WORD.findall(text.lower())]


class ScoredPieces:
    """The vocabulary of llama2.c: pieces with scores, of which the best pair is merged first.

    Token 0 is unknown, 1 begins and 2 ends a text, 3 to 258 are bytes; the rest are pieces.

    Args:
        vocabulary: ``[piece, score]`` of each token.
    """

    def __init__(self, vocabulary: Sequence[tuple[str, float]]) -> None:
        self.pieces = [piece for piece, _ in vocabulary]
        self._scores = [score for _, score in vocabulary]
        self._ids = {piece: i for i, piece in enumerate(self.pieces) if i > 258}

    @classmethod
    def read(cls, path: Path) -> ScoredPieces:
        """Reads a vocabulary written as JSON.

        Raises:
            InputError: if the file is none.
        """
        content = read_json(path)
        try:
            return cls([(str(piece), float(score)) for piece, score in content])
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} is not a list of pieces with scores") from error

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            text: a space is put before it.
            begin: put the token that begins a text first.
        """
        ids: list[int] = []
        for character in " " + text:
            own = self._ids.get(character)
            ids += [own] if own is not None else [3 + byte for byte in character.encode()]
        merged = self._merged(ids)
        return [1, *merged] if begin else merged

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens."""
        parts = [
            bytes([i - 3]) if 3 <= i <= 258 else b"" if i < 3 else self.pieces[i].encode()
            for i in ids
        ]
        return b"".join(parts).decode(errors="replace")

    def _merged(self, ids: list[int]) -> list[int]:
        # A linked list and a heap: n log n where looking for the best pair again is n^2.
        before = list(range(-1, len(ids) - 1))
        after = [*range(1, len(ids)), -1] if ids else []
        alive = [True] * len(ids)
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(left: int) -> None:
            right = after[left]
            if right < 0:
                return
            joined = self._ids.get(self.pieces[ids[left]] + self.pieces[ids[right]])
            if joined is not None:
                heapq.heappush(
                    heap, (-self._scores[joined], left, right, ids[left] << 32 | ids[right], joined)
                )

        for left in range(len(ids)):
            offer(left)
        while heap:
            _, left, right, pair, joined = heapq.heappop(heap)
            if not (alive[left] and alive[right]) or after[left] != right:
                continue
            if ids[left] << 32 | ids[right] != pair:
                continue
            ids[left] = joined
            alive[right] = False
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            if before[left] >= 0:
                offer(before[left])
            offer(left)
        return [token for token, there in zip(ids, alive, strict=True) if there]
