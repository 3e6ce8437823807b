"""From what a user writes to a task."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.core.errors import InputError
from gossamer.datasets import open_task


def test_the_embedded_digits() -> None:
    task = open_task("digits", image_size=16, channels=3, limit=30, seed=2)
    assert task.example_inputs[0].shape == (2, 3, 16, 16)
    assert task.size("train") == 30 and task.name == "digits"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 0}, "images of 0 x 0 pixels are not made"),
        ({"image_size": (8, -1)}, "images of 8 x -1 pixels"),
        ({"image_size": 5000}, "1 to 4096 are"),
        ({"channels": 4}, "images have 1 or 3 channels, not 4"),
        ({"limit": 0}, "must be at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        open_task("digits", **options)  # type: ignore[arg-type]


def test_what_was_looked_for_is_listed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for data in (tmp_path, tmp_path / "missing", "diggits", tmp_path / "notes.txt", "a\0b"):
        with pytest.raises(InputError) as caught:
            open_task(data)
        sentence = str(caught.value)
        assert sentence.startswith(str(data).replace("\0", "\\x00"))
        assert '"digits"' in sentence and "train-images-idx3-ubyte" in sentence
