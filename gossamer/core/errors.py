"""What goes wrong, in one sentence each.

Every error that a user can cause is a :class:`GossamerError` whose text says what was wrong,
where, and what to do. The command line prints that sentence and exits with code 2; anything else
that escapes is a defect of gossamer.
"""

from __future__ import annotations


class GossamerError(Exception):
    """A problem the user can understand and mend; ``str(error)`` is one line.

    Names that come out of files may hold anything; line ends, terminal codes and halves of
    characters are shown escaped.

    Args:
        sentence: what was wrong, where, and what to do.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(
            "".join(
                c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(sentence)
            )
        )


class InputError(GossamerError):
    """Data, weights, a file or an option that cannot be used as it is."""


class UnsupportedError(GossamerError):
    """A network or operator that gossamer cannot trace, cut or export."""


class BudgetError(GossamerError):
    """A budget that cannot be met; the sentence names the nearest that can."""


class MissingExtra(GossamerError):
    """An optional dependency that is not installed; the sentence names the extra."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; install it with: pip install 'gossamer[{extra}]'"
        )


def first_line(error: BaseException) -> str:
    """The first line of what a library says went wrong, to go into one sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
