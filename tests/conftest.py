"""What all tests share: one thread, real data where it is, and skips that are expected."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: tests run beside each other, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

EXPECTED_SKIPS = (
    r"no GPU",
    r"no Chromium",
    r"no Java",
    r"no data: \w+",
    r"no peer: [\w-]+",
)
"""The only reasons for which a test may be skipped in CI (where the variable CI is set)."""

_lenient = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "quick", max_examples=40, deadline=None, derandomize=True, suppress_health_check=_lenient
)
# pytest tests/datasets/test_fuzz.py --hypothesis-profile=fuzz
settings.register_profile(
    "fuzz", max_examples=10_000, deadline=None, database=None, suppress_health_check=_lenient
)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips by name what this machine cannot run."""
    missing = {}
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            missing["gpu"] = pytest.mark.skip(reason="no GPU")
    if not shutil.which("chromium"):
        missing["browser"] = pytest.mark.skip(reason="no Chromium")
    for item in items:
        for marker, skip in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run of CI in which a test was skipped for a reason that is not expected."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("CI"):
        return
    for report in reporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not any(re.fullmatch(expected, reason) for expected in EXPECTED_SKIPS):
            reporter.write_line(f"unexpected skip of {report.nodeid}: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """``real_data("cifar10")`` is the folder of a real data set; skips where it is not."""
    root = Path(os.environ.get("GOSSAMER_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"no data: {name}")
        return root / name

    return find


@pytest.fixture
def one_thread() -> None:
    """Sums are reproducible to the bit only in one order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``exit_code("evaluate", "rank", folder)`` runs a command here and says how it ended."""
    from gossamer.cli import main

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run
