"""The catalogue: all systems, joined with code and results, without importing either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.core.catalog import NOT_MEASURED, PROVENANCES, ROOMS, Catalog
from gossamer.core.errors import InputError
from gossamer.core.experiment import Claim, Pick, Result


def result(spec: str, mode: str = "quick", bound: float = 1.0) -> Result:
    rows = ({"seed": 0, "x": 1.5}, {"seed": 1, "x": 2.5})
    claim = Claim("x is large", Pick("x"), ">=", bound, paper="x = 3")
    return Result(spec, mode, rows, (claim,))


def test_all_85_are_there() -> None:
    catalog = Catalog.load()
    systems = catalog.systems
    assert [system.number for system in systems] == list(range(1, 86))
    assert len({system.spec for system in systems}) == 85
    assert len({system.module for system in systems}) == 85
    for system in systems:
        assert system.room in ROOMS
        assert system.module.split("/")[0] == system.room
        assert system.provenance.startswith(PROVENANCES)
        assert system.title and system.title == system.title.strip()
        assert system.module.replace("/", "").isidentifier()
        # "reconstruct" is said wherever a reconstruction is part of it, and nowhere else.
        reconstructed = "reconstruct" in system.provenance
        assert reconstructed == (system.provenance not in PROVENANCES[:2]) or (
            "from the paper" in system.provenance
        )


def test_rows_say_what_the_command_promises() -> None:
    for row in Catalog.load().as_json():
        assert {
            "spec",
            "title",
            "room",
            "module",
            "provenance",
            "verdict",
            "claims",
            "figures",
        } <= set(row)
        assert row["verdict"] == NOT_MEASURED or row["verdict"].startswith(
            ("holds", "does not hold (")
        )


def test_code_is_found_by_its_file(tmp_path: Path) -> None:
    module = tmp_path / "compress" / "prune"
    module.mkdir(parents=True)
    (module / "half_space.py").touch()
    experiments = tmp_path / "experiments" / "serve" / "server"
    experiments.mkdir(parents=True)
    (experiments / "__init__.py").touch()
    catalog = Catalog.load(package=tmp_path, results=tmp_path)
    assert [system.spec for system in catalog.systems if system.here] == ["otov3"]
    measurable = [system.spec for system in catalog.systems if system.measurable]
    assert measurable == ["server-overheads"]


def test_results_give_verdicts_and_figures(tmp_path: Path) -> None:
    result("otov3").write(tmp_path / "otov3.json")
    result("otov3", "full", bound=5.0).write(tmp_path / "otov3.full.json")
    result("bip", bound=5.0).write(tmp_path / "bip.json")
    result("mugs", "full").write(tmp_path / "mugs.full.json")
    catalog = Catalog.load(results=tmp_path)
    assert catalog["otov3"].verdict == "holds"
    assert catalog["bip"].verdict == "does not hold (0 of 1)"
    assert catalog["mugs"].verdict == "holds"
    assert catalog["cosma"].verdict == NOT_MEASURED
    row = catalog["otov3"].as_json()
    assert row["mode"] == "quick" and row["full_verdict"] == "does not hold (0 of 1)"
    assert row["claims"] == [{"text": "x is large", "holds": True, "paper": "x = 3"}]
    (figures,) = row["figures"]
    assert (figures["left"], figures["right"], figures["seeds"]) == (2.0, 1.0, 2)
    assert catalog["mugs"].as_json()["mode"] == "full"


def test_a_result_under_another_name_is_refused(tmp_path: Path) -> None:
    result("bip").write(tmp_path / "otov3.json")
    with pytest.raises(InputError, match="is the result of 'bip', not of 'otov3'"):
        Catalog.load(results=tmp_path)


def test_unknown_systems_get_the_nearest_names() -> None:
    with pytest.raises(InputError, match=r"no system 'otov4'; the nearest names are otov3"):
        Catalog.load()["otov4"]


def test_rooms_hold_every_system_once() -> None:
    catalog = Catalog.load()
    rooms = catalog.by_room()
    assert sum(map(len, rooms.values())) == len(catalog) == 85
    assert all(rooms.values())


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    result("otov3").write(tmp_path / "otov3.json")
    code = (
        "import sys; from pathlib import Path; from gossamer.core.catalog import Catalog\n"
        "assert Catalog.load(results=Path(sys.argv[1]))['otov3'].verdict == 'holds'\n"
        "Catalog.load().as_json()\n"
        "heavy = {'torch', 'timm', 'torchvision', 'onnxruntime', 'sklearn', 'optuna'}\n"
        "rooms = {m for m in sys.modules if m.startswith('gossamer.')"
        " and not m.startswith('gossamer.core')}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not rooms, rooms\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
