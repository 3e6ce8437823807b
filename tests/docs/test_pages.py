"""Every Python example of the documentation runs, and its assertions hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "docs").rglob("*.md")
    if "```python" in page.read_text()
)


def test_there_are_examples() -> None:
    assert {"docs/data.md", "docs/words.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    names: dict[str, object] = {"__name__": "example"}
    with torch.random.fork_rng():
        for number, block in enumerate(blocks):
            # One page is one session: later examples use the names of earlier ones.
            exec(compile(block, f"{page}, example {number + 1}", "exec"), names)
