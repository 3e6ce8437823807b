"""In CI a test may be skipped for the reasons that are listed, and for no other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("body", "ci", "code", "workers"),
    [
        ("pytest.skip('no data: cifar10')", True, 0, "2"),
        ("pytest.skip('too lazy')", True, 1, "2"),
        ("pytest.skip('no GPU')", True, 0, "0"),
        ("pytest.skip('too lazy')", False, 0, "0"),
        ("pytest.importorskip('no_such_package')", True, 1, "0"),
        ("pytest.skip('no GPU, and too lazy')", True, 1, "0"),
    ],
)
def test_unexpected_skips_fail(
    tmp_path: Path, body: str, ci: bool, code: int, workers: str
) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    {body}\n")
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    command = [sys.executable, "-m", "pytest", "-n", workers, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        env=environment | ({"CI": "true"} if ci else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout
    assert ("unexpected skip of" in done.stdout) == (code == 1)
