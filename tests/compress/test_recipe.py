"""Recipes: what they say is what they do, and what they cannot say is refused by name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.compress.recipe import STEPS, Recipe, Step, step_function
from gossamer.core.errors import GossamerError, InputError
from gossamer.core.network import Network

TEXT = """\
steps:
- prune: {criterion: taylor, macs: 0.5, round_to: 8, epochs: 0}
- distil:
    epochs: 10
    lr: 1
- int8:
- finetune
"""


def test_yaml_is_read() -> None:
    recipe = Recipe.from_yaml(TEXT)
    assert [step.name for step in recipe.steps] == ["prune", "distil", "int8", "finetune"]
    assert recipe.steps[0].options == {
        "criterion": "taylor", "macs": 0.5, "round_to": 8, "epochs": 0,
    }  # fmt: skip
    assert recipe.steps[1].options == {"epochs": 10, "lr": 1}
    assert recipe.steps[2].options == recipe.steps[3].options == {}


def test_what_is_written_is_read_back() -> None:
    recipe = Recipe.of(("prune", {"macs": 0.5, "criterion": "l1"}), "int8", ("distil", {"lr": 0.1}))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_every_step_exists_and_takes_network_and_task() -> None:
    for name in STEPS:
        assert list(step_function(name).__code__.co_varnames[:2]) == ["network", "task"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps:\n- prun: {macs: 0.5}", "no step 'prun'; did you mean prune"),
        ("steps:\n- prune: {criterium: l2}", "prune has no option 'criterium'; did you mean crit"),
        ("steps:\n- prune: {macs: half}", "option macs of prune cannot be 'half'; it takes a num"),
        ("steps:\n- finetune: {epochs: 2.5}", "epochs of finetune cannot be 2.5; it takes a whole"),
        ("steps:\n- finetune: {epochs: true}", "epochs of finetune cannot be True"),
        ("steps:\n- finetune: {lr: .inf}", "lr of finetune cannot be inf"),
        ("steps:\n- finetune: {lr: .nan}", "lr of finetune cannot be nan"),
        ("steps:\n- finetune: {lr: 2020-01-01}", "lr of finetune cannot be datetime"),
        ("steps:\n- int8: {calibration: best}", "'minmax' or 'entropy' or 'percentile'"),
        ("steps:\n- int8: {skip_operators: [2020-01-01]}", "skip_operators of int8 cannot be"),
        ("steps:\n- distil: {teacher: x}", "distil has no option 'teacher'"),
        ("steps:\n- finetune: {checkpoint: /etc/passwd}", "has no option 'checkpoint'"),
        ("steps:\n- finetune: [1]", "step 1 of the recipe: the options of finetune are no mapping"),
        ("steps:\n- {finetune: , int8: }", "step 1 of the recipe is not a name with options"),
        ("steps:\n- delta:", "the step delta needs the option base"),
        ("steps:\n- merge:", "the step merge needs the option base and others"),
        ("steps: prune", "needs a list called steps"),
        ("- prune", "needs a list called steps"),
        ("", "needs a list called steps"),
        ("steps: []\nbudget: 3", "has an entry 'budget'"),
        ("steps: [", "is not valid YAML"),
        ("steps: !!python/object/apply:os.system ['exit']", "is not valid YAML"),
        ("steps: &a [*a]", "is not a name with options"),
    ],
)
def test_what_is_no_recipe_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_yaml(text)
    assert said in str(caught.value)


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    with pytest.raises(InputError):
        Recipe.from_yaml("\n".join([*lines, "steps: [{finetune: {epochs: *a39}}]"]))
    with pytest.raises(InputError, match="epochs of finetune cannot be"):
        Step("finetune", {"epochs": _nested(60)})


def _nested(depth: int) -> Any:
    value: Any = ["x"]
    for _ in range(depth):
        value = [value] * 9
    return value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.yaml: no such file"):
        Recipe.read(tmp_path / "no.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"steps: \xff")
    with pytest.raises(InputError, match=r"cannot read the recipe .*latin\.yaml"):
        Recipe.read(tmp_path / "latin.yaml")


def test_equal_steps_draw_different_numbers() -> None:
    recipe = Recipe.of("finetune", "finetune")
    assert len(set(recipe.seeds(0)) | set(recipe.seeds(1))) == 4
    assert recipe.seeds(3) == recipe.seeds(3)


def test_a_step_gets_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, Any] = {}

    def step(network: Network, task: Any, *, epochs: int = 3, teacher: Any = None) -> Network:
        got.update(epochs=epochs, teacher=teacher, task=task)
        return network

    monkeypatch.setattr("gossamer.compress.recipe.step_function", lambda name: step)
    network = Network(nn.Identity(), (torch.zeros(2, 1),))
    applied = Step("finetune", {"epochs": 7}).apply(network, "task", teacher=network, seed=5)  # type: ignore[arg-type]
    assert applied is network
    assert got == {"epochs": 7, "teacher": network, "task": "task"}


VALID = TEXT.encode()
WORDS = ["prune", "int8", "macs", ".inf", "~", "[]", "{}", "&a", "*a", "!!set", "0x1", ": ", "- "]


@given(st.integers(0, 2**63))
def test_any_file_is_a_recipe_or_refused(seed: int) -> None:
    drawn = random.Random(seed)
    content = bytearray(VALID)
    for _ in range(drawn.randint(1, 5)):
        at, length = drawn.randrange(len(content) + 1), drawn.randint(1, 12)
        match drawn.randrange(4):
            case 0:
                content[at : at + length] = drawn.randbytes(length)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = drawn.choice(WORDS).encode()
            case _:
                content[at : at + length] = drawn.choice(WORDS).encode()
    try:
        recipe = Recipe.from_yaml(content.decode("utf-8", "replace"))
    except GossamerError:
        return
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_every_step_is_in_the_guide() -> None:
    guide = Path(__file__).resolve().parents[2] / "docs" / "shrink.md"
    text = guide.read_text("utf-8")
    assert [name for name in STEPS if f"`{name}`" not in text] == []
