"""The commands on group widths and systolic arrays."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli import main

NETWORK = ("gossamer_small_mobilenet", "--image-size", "8", "--channels", "1")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gossamer", "hardware", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def answer(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run(monkeypatch, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_group_sizes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    found = answer(
        monkeypatch, capsys, "group-size", *NETWORK, "--device", "a100-sxm-80gb",
        "--widths", 1, "--widths", 8, "--measure",
    )  # fmt: skip
    assert found["layers"][0]["layer"] == "blocks.0.0.conv_dw"
    assert [(point["group_width"], point["macs"]) for point in found["curve"]] == [
        (1, 59_904), (8, 8 * 59_904)
    ]  # fmt: skip
    assert found["curve"][1]["equal_groups"] == 16
    # 9.75e12 MACs and 2.039e12 bytes a second, four bytes a value
    assert found["choices"]["machine_balance"] == pytest.approx(4 * 9.75 / 2.039, rel=1e-3)
    assert found["choices"]["machine"] is None and found["choices"]["balance"] == 8
    assert [point["group_width"] for point in found["measured"]] == [1, 8]
    assert found["choices"]["measured"] in (1, 8)
    assert run(monkeypatch, "group-size", *NETWORK) == 0
    assert "balance of arithmetic and movement: 16 channels" in capsys.readouterr().out


def test_systolic_array(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    array = ("--rows", 16, "--columns", 16, "--dataflow", "ws")
    csv = tmp_path / "layers.csv"
    found = answer(monkeypatch, capsys, "systolic", *NETWORK, *array, "--search", "--topology", csv)
    assert found["cycles"] == sum(layer["cycles"] for layer in found["layers"]) == 61_628
    assert found["search"]["fastest"] == 16 and len(found["search"]["flagged"]) == 5
    again = answer(monkeypatch, capsys, "systolic", csv, *array)
    assert again["cycles"] == found["cycles"] and again["macs"] == found["macs"]
    wide = answer(monkeypatch, capsys, "systolic", *NETWORK, *array, "--group-width", 16)
    candidates = {c["group_width"]: c for c in found["search"]["candidates"]}
    assert wide["cycles"] == candidates[16]["cycles"]
    assert run(monkeypatch, "systolic", *NETWORK, *array, "--search", "--bandwidth", 2) == 0
    out = capsys.readouterr().out
    assert "waiting for the DRAM" in out and "fewest cycles: groups of" in out


def test_what_cannot_be_done_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    csv = tmp_path / "one.csv"
    csv.write_text("header,\nconv, 8, 8, 3, 3, 4, 4, 1,\n")
    for words, sentence in (
        (("group-size", "gossamer_digits_resnet", "--image-size", 8, "--channels", 1),
         "no grouped convolution; --select spatial"),
        (("group-size", *NETWORK, "--movement", 0), "more than 0"),
        (("group-size", *NETWORK, "--device", "abacus"), "no device file abacus"),
        (("systolic", *NETWORK, "--rows", 0), "at least one row"),
        (("systolic", tmp_path / "none.csv"), "cannot read the topology"),
        (("systolic", csv, "--search"), "--search needs a network"),
        (("systolic", "gossamer_digits_resnet", "--image-size", 8, "--channels", 1, "--search"),
         "no grouped convolution that uses less than 50 %"),
    ):  # fmt: skip
        assert run(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
