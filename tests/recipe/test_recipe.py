from __future__ import annotations

from pathlib import Path

import pytest

from vlmopt.core.errors import PassError, RecipeError
from vlmopt.recipe import default_recipe, load_recipe, recipe_digest, save_recipe


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_that_names_only_a_model_has_the_default_passes(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "model: hub/model\n"))
    assert [step.name for step in recipe.passes] == [
        "canonicalize",
        "skip-branches",
        "fold-fixed-inputs",
        "hoist-token-reads",
        "fold-keys-values",
        "fold-constants",
    ]
    assert (recipe.emit, recipe.opset, recipe.dtype, recipe.device, recipe.seed) == (("onnx",), 20, "float32", "cpu", 0)
    assert recipe.budgets.max_drop is None


def test_passes_are_names_or_names_with_options(tmp_path: Path) -> None:
    text = "model: m\npasses:\n  - canonicalize\n  - skip-branches:\n      branches: ['*.ffn']\n  - fold-constants:\n"
    steps = load_recipe(write(tmp_path, text)).passes
    assert [(step.name, step.options) for step in steps] == [
        ("canonicalize", {}),
        ("skip-branches", {"branches": ["*.ffn"]}),
        ("fold-constants", {}),
    ]


def test_relative_paths_are_taken_from_the_folder_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "own").mkdir()
    text = "model: model\ntask: ./tasks/style\nprofile: {file: p.json}\npass_dirs: [own]\n"
    recipe = load_recipe(write(tmp_path / "a", text))
    base = tmp_path / "a"
    assert (recipe.model, recipe.task) == (str(base / "model"), str(base / "tasks/style"))
    assert (recipe.profile.file, recipe.pass_dirs) == (str(base / "p.json"), (str(base / "own"),))


def test_a_hub_id_stays_a_hub_id(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "model: openai/some-model\n")).model == "openai/some-model"


def test_a_saved_recipe_is_the_same_recipe_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = "model: model\nbudgets: {max_drop: 1}\nemit: [pt2, onnx]\n"
    text += "passes: [canonicalize, {skip-layers: {layers: ['3', 'no']}}]\n"
    recipe = load_recipe(write(tmp_path, text))
    (tmp_path / "elsewhere").mkdir()
    save_recipe(recipe, tmp_path / "elsewhere" / "saved.yaml")
    again = load_recipe(tmp_path / "elsewhere" / "saved.yaml")
    assert again == recipe
    assert recipe_digest(again) == recipe_digest(recipe)


def test_the_digest_changes_with_any_value(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\n")
    assert recipe_digest(load_recipe(path)) != recipe_digest(load_recipe(path, {"seed": 1}))


def test_changes_win_over_the_file_and_leave_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path, "model: m\nprofile: {estimator: block-influence}\nseed: 3\n")
    recipe = load_recipe(path, {"budgets.max_drop": 2.5, "profile.file": "x.json", "model": "mine"})
    assert (recipe.budgets.max_drop, recipe.seed, recipe.profile.estimator) == (2.5, 3, "block-influence")
    assert recipe.profile.file == str(tmp_path / "here" / "x.json")
    assert recipe.model == str(tmp_path / "here" / "mine")


def test_a_default_recipe_takes_changes_too() -> None:
    recipe = default_recipe("hub/model", changes={"emit": ["torchscript"], "budgets.max_drop": 1.0})
    assert (recipe.emit, recipe.budgets.max_drop, recipe.task) == (("torchscript",), 1.0, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\npases: []\n", "pases: is no key of a recipe; did you mean 'passes'?"),
        ("model: m\nbudgets: {max_dorp: 1}\n", "budgets.max_dorp: is no key of a recipe; did you mean 'max_drop'?"),
        ("model: m\npasses: [canonicalise]\n", "passes: there is no pass 'canonicalise'; did you mean 'canonicalize'?"),
        ("task: t\n", "model: is missing; expected a line `model: ...`"),
        (
            "model: m\nemit: [onxx]\n",
            "emit.0: found 'onxx'; expected 'onnx', 'torchscript', 'pt2', 'openvino' or 'executorch'",
        ),
        ("model: m\nemit: [onnx, onnx]\n", "names a format twice"),
        ("model: m\nemit: []\n", "emit: found [] (names no format)"),
        ("model: m\nbudgets: {max_drop: 1pt}\n", "budgets.max_drop: found '1pt' ('1pt' has the unknown unit 'pt')"),
        ("model: m\nbudgets: {max_drop: -1}\n", "budgets.max_drop: found -1 (-1 is no budget); expected points from 0"),
        ("model: m\nbudgets: {latency: 5}\n", "budgets.latency: found 5 ('5' has no unit); expected a time such as"),
        ("model: m\nbudgets: {size: 2x}\n", "budgets.size: found '2x' ('2x' is no share of the original's size)"),
        ("model: m\nbudgets: {macs: [1]}\n", "budgets.macs: found [1] ([1] is no budget); expected a number such as"),
        ("model: m\nseed: true\n", "seed: found True; expected a valid integer"),
        ("model: m\nopset: 9\n", "opset: found 9"),
        ("model: m\npasses: canonicalize\n", "passes: found 'canonicalize'; expected a valid list"),
        ("model: m\npasses: [{a: {}, b: {}}]\n", "a pass is written as `name` or as `name: {option: value}`"),
        ("model: m\npasses: [{fold-constants: 3}]\n", "passes.0.options: found 3; expected a valid mapping"),
        ("model: m\nversion: 2\n", "version: is 2; expected 1"),
        ("model: m\nmodel: n\n", "given twice"),
        ("- model\n", "expected `key: value` lines"),
        ("model: [\n", "line 2"),
    ],
)
def test_a_recipe_that_cannot_be_followed_gets_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_a_pass_folder_that_is_missing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="is not a folder"):
        load_recipe(write(tmp_path, "model: m\npass_dirs: [nowhere]\n"))
