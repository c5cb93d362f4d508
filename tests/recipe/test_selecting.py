"""Switches name steps by pass or by number, and a misspelled one is refused."""

from __future__ import annotations

import pytest

from vlmopt.core.errors import RecipeError
from vlmopt.recipe import PassStep, Recipe, chosen_steps, find_steps, recipe_digest, shorten

TWICE = ("canonicalize", "skip-branches", "fold-constants", "canonicalize")


def recipe_of(*names: str) -> Recipe:
    return Recipe(model="m", passes=tuple(PassStep(name=name) for name in names))


def names_of(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.passes]


def test_a_name_means_every_step_of_that_pass_and_a_number_one_step() -> None:
    recipe = recipe_of(*TWICE)
    assert find_steps(recipe, "canonicalize", option="--skip") == (1, 4)
    assert find_steps(recipe, "4", option="--skip") == (4,)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("skip-brnches", "did you mean 'skip-branches'?"),
        ("5", "expected a number from 1 to 4"),
        ("0", "expected a number from 1 to 4"),
        ("-1", "no step of that name"),
        ("all", "no step of that name"),
    ],
)
def test_what_names_no_step_is_refused_with_the_switch_and_the_closest_name(word: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        shorten(recipe_of(*TWICE), skip=[word])
    assert error.value.place == f"--skip {word}"
    assert expected in error.value.one_line()


def test_skipped_steps_leave_the_recipe_and_the_others_are_renumbered() -> None:
    short = shorten(recipe_of(*TWICE), skip=["canonicalize"])
    assert names_of(short.recipe) == ["skip-branches", "fold-constants"]
    assert short.numbers == {2: 1, 3: 2}
    assert short.left_out == ("--skip left out step 1 (canonicalize), step 4 (canonicalize)",)


def test_steps_behind_the_last_one_wanted_leave_the_recipe() -> None:
    short = shorten(recipe_of(*TWICE), skip=["1"], stop_after="fold-constants")
    assert names_of(short.recipe) == ["skip-branches", "fold-constants"]
    assert short.left_out == (
        "--skip left out step 1 (canonicalize)",
        "--stop-after left out step 4 (canonicalize)",
    )


def test_to_stop_after_a_pass_that_comes_twice_needs_a_number() -> None:
    with pytest.raises(RecipeError, match=r"--stop-after canonicalize: the recipe has 2 such steps; expected 1 or 4"):
        shorten(recipe_of(*TWICE), stop_after="canonicalize")
    assert names_of(shorten(recipe_of(*TWICE), stop_after="1").recipe) == ["canonicalize"]


def test_without_switches_the_recipe_stays_and_with_them_it_is_another_run() -> None:
    recipe = recipe_of(*TWICE)
    assert shorten(recipe).recipe == recipe
    assert shorten(recipe).left_out == ()
    digests = [recipe, shorten(recipe, skip=["2"]).recipe, recipe.model_copy(update={"max_sites": 3})]
    assert len({recipe_digest(one) for one in digests}) == 3


def test_watched_steps_are_counted_in_the_recipe_that_runs() -> None:
    recipe = recipe_of(*TWICE)
    short = shorten(recipe, skip=["2"])
    assert chosen_steps(recipe, short, ["canonicalize", "3"], option="--print-after") == {1, 2, 3}
    assert chosen_steps(recipe, short, ["4"], option="--print-after") == {3}
    assert chosen_steps(recipe, short, ["all"], option="--print-after") == {1, 2, 3}
    assert chosen_steps(recipe, short, [], option="--print-after") == frozenset()


def test_a_watched_step_that_is_left_out_is_refused() -> None:
    recipe = recipe_of(*TWICE)
    short = shorten(recipe, skip=["2"])
    with pytest.raises(RecipeError, match=r"--print-after 2: step 2 \(skip-branches\) is left out"):
        chosen_steps(recipe, short, ["2"], option="--print-after")
