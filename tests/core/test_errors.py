"""Errors are one printable line, whatever is named in them."""

from __future__ import annotations

import pytest

from gossamer.core.errors import (
    BudgetError,
    GossamerError,
    InputError,
    MissingExtra,
    UnsupportedError,
    first_line,
)


@pytest.mark.parametrize("kind", [GossamerError, InputError, UnsupportedError, BudgetError])
def test_what_cannot_be_printed_is_escaped(kind: type[GossamerError]) -> None:
    error = kind("a\nb\t\x1b[31m \udcff ä “q”")
    assert str(error) == "a\\nb\\t\\x1b[31m \\udcff ä “q”"
    str(error).encode("utf-8")
    assert isinstance(error, GossamerError)


def test_a_missing_extra_says_how_to_get_it() -> None:
    expected = "datasets is not installed; install it with: pip install 'gossamer[hub]'"
    assert str(MissingExtra("datasets", "hub")) == expected


def test_first_lines() -> None:
    assert first_line(ValueError("  one \n two")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(KeyError("k")) == "'k'"
