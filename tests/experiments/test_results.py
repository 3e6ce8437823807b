"""Committed results are of the experiments that are here: same claims, all of them measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from gossamer.core.catalog import Catalog, System

MEASURABLE = [system for system in Catalog.load().systems if system.measurable]


@pytest.mark.parametrize("system", MEASURABLE, ids=lambda s: s.spec)
def test_a_result_is_of_the_experiment_as_it_is(system: System) -> None:
    experiment = importlib.import_module(system.experiment).EXPERIMENT
    assert experiment.spec == system.spec
    assert experiment.reconstruction == ("reconstruction" in system.provenance)
    for result in (system.result, system.full_result):
        if result is None:
            continue
        assert result.spec == system.spec
        assert result.reconstruction == experiment.reconstruction
        # Through JSON, as the committed claims went.
        own = [json.loads(json.dumps(claim.to_json())) for claim in experiment.claims]
        assert [claim.to_json() for claim in result.claims] == own
        assert all(evidence.holds is not None for evidence in result.evidence())
        assert {row["seed"] for row in result.rows if "seed" in row}


def test_every_experiment_has_a_result_and_a_page() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "systems"
    for system in MEASURABLE:
        assert system.here and system.shown is not None, f"{system.spec} has no committed result"
        assert (docs / f"{system.module}.md").is_file(), f"{system.spec} has no page"
