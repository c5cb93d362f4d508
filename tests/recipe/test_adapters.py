"""Adapters that a recipe or the command line names: how they are written, and which passes they bring."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlmopt.core.errors import RecipeError
from vlmopt.core.program import AdapterSource
from vlmopt.recipe import default_recipe, load_recipe, save_recipe
from vlmopt.recipe.schema import SHORTENING_PASSES


def written(folder: Path, adapters: object, **more: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "hub/model", "adapters": adapters, **more}))
    return path


@pytest.mark.parametrize(
    ("entry", "path", "weight"),
    [
        ("style=own", "own", 1.0),
        ("style=own:0.5", "own", 0.5),
        ("style=own:-2", "own", -2.0),
        ("style=own:part", "own:part", 1.0),
        ({"name": "style", "path": "own"}, "own", 1.0),
        ({"name": "style", "path": "own", "weight": 0.25}, "own", 0.25),
    ],
)
def test_an_adapter_is_named_with_its_folder_and_its_weight(
    entry: object, path: str, weight: float, tmp_path: Path
) -> None:
    recipe = load_recipe(written(tmp_path, [entry]))
    assert [one.source for one in recipe.adapters] == [AdapterSource("style", str(tmp_path / path), weight)]
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_adapters_are_folded_first_unless_the_recipe_names_its_passes(tmp_path: Path) -> None:
    changes = {"adapters": ["style=own"]}
    plain = default_recipe("hub/model", changes=changes)
    names = [step.name for step in plain.passes]
    assert names == ["canonicalize", "fold-adapters", *SHORTENING_PASSES, "fold-constants"]
    assert [one.path for one in plain.adapters] == [str(Path.cwd() / "own")]
    task = default_recipe("hub/model", task="tasks", changes=changes)
    first = ["canonicalize", "fold-adapters", "skip-branches"]
    assert [step.name for step in task.passes][:3] == first
    assert [step.name for step in load_recipe(written(tmp_path, ["style=own"])).passes][:3] == first
    named = load_recipe(written(tmp_path, ["style=own"], passes=["canonicalize"]))
    assert [step.name for step in named.passes] == ["canonicalize"]
    assert "fold-adapters" not in [step.name for step in default_recipe("hub/model").passes]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["style=a", "style=b"], "two adapters have the name 'style'"),
        (["folder"], "is no adapter); expected NAME=PATH or NAME=PATH:WEIGHT"),
        (["=folder"], "expected NAME=PATH or NAME=PATH:WEIGHT"),
        (["style="], "expected NAME=PATH or NAME=PATH:WEIGHT"),
        (["a.b=folder"], "adapters.0.name: found 'a.b'"),
        (["style=folder:nan"], "adapters.0.weight: found nan"),
        ([{"name": "style", "folder": "f"}], "adapters.0.folder: is no key of a recipe"),
        ("style=folder", "adapters: found 'style=folder'"),
    ],
)
def test_an_adapter_that_cannot_be_read_gets_one_clear_line(adapters: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, adapters))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
