"""Files are whole or absent; states come back as they were; nothing else is read."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gossamer.core.errors import InputError
from gossamer.core.files import (
    exclusive,
    load_state,
    read_json,
    save_state,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"no space left on device; nothing was left behind"),
        whole_file(tmp_path / "a") as partial,
    ):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_folder_replaces_another_at_once(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with whole_folder(target) as partial:
        (partial / "one").write_text("1")
        assert not target.exists()
    with whole_folder(target) as partial:
        (partial / "two").write_text("2")
        assert names(target) == ["one"]
    assert names(target) == ["two"]
    assert names(tmp_path) == ["out"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as partial:
        (partial / "one").write_text("1")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as partial:
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["one"]


def test_json_round_trip_and_its_errors(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ä"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "b.json")
    (tmp_path / "c.json").write_text('{"a": ')
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(tmp_path / "d.json")
    (tmp_path / "e.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_json(tmp_path / "e.json")
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path)


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gossamer.core.files import exclusive\n"
        "from gossamer.core.errors import InputError\n"
        "try:\n"
        "    with exclusive(Path(sys.argv[1])): print('held')\n"
        "except InputError as error: print(error)\n"
    )

    def other() -> str:
        command = [sys.executable, "-c", code, str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with exclusive(tmp_path / "out"):
        assert "is in use by another run" in other()
    assert other() == "held\n"


def test_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    state = {
        "tensor": torch.tensor([1.0, float("nan"), -0.0]),
        "shared": [shared, shared],
        "view": shared[1:],
        "empty": torch.zeros(0, 3),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "optimizer": {0: {"step": torch.tensor(3.0)}, 1: {"step": None}},
        "tuple": (1, "two", [True, 0.1]),
        "$tensor": "a key of the user's",
    }
    save_state(tmp_path / "s", state)
    back = load_state(tmp_path / "s")
    assert list(back) == list(state)
    assert torch.equal(back["tensor"].view(torch.int32), state["tensor"].view(torch.int32))
    assert [t.tolist() for t in back["shared"]] == [[0, 1, 2], [0, 1, 2]]
    assert back["view"].tolist() == [1, 2]
    assert back["empty"].shape == (0, 3)
    assert back["half"].dtype == torch.bfloat16 and back["half"].item() == 1.5
    assert set(back["optimizer"]) == {0, 1} and back["optimizer"][1] == {"step": None}
    assert back["tuple"] == (1, "two", [True, 0.1])
    assert back["$tensor"] == "a key of the user's"


def test_a_state_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"/rule holds a object"):
        save_state(tmp_path / "s", {"rule": object()})
    assert names(tmp_path) == []


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1, -100])
def test_truncated_states_are_refused(tmp_path: Path, kept: int) -> None:
    save_state(tmp_path / "s", {"a": torch.arange(100.0), "b": 1})
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole[:kept])
    with pytest.raises(InputError, match="is not a state file of gossamer, or it is truncated"):
        load_state(tmp_path / "s")


def test_other_safetensors_files_are_no_states(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "s")
    with pytest.raises(InputError, match="is not a state file"):
        load_state(tmp_path / "s")
    with pytest.raises(InputError, match="does not exist"):
        load_state(tmp_path / "missing")


@pytest.mark.parametrize(
    "tree",
    [{"$tensor": "gone"}, {"$call": "os.system"}, {"a": 1, "b": 2}, [1], "text", {"$list": 3}, 7],
)
def test_doctored_states_are_refused(tmp_path: Path, tree: object) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "s", metadata={"state": json.dumps(tree)})
    with pytest.raises(InputError, match="is not a state file"):
        load_state(tmp_path / "s")
