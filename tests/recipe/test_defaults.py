"""What a run does that names only a model, or a model and a task."""

from __future__ import annotations

from vlmopt.recipe.loading import default_recipe
from vlmopt.recipe.schema import SHORTENING_PASSES


def test_with_a_task_one_point_may_be_lost() -> None:
    recipe = default_recipe("owner/model", "/tasks/style")
    assert recipe.budgets.max_drop == 1.0
    assert "skip-branches" in [step.name for step in recipe.passes]


def test_a_given_budget_wins_over_the_default() -> None:
    assert default_recipe("owner/model", "/tasks/style", {"budgets.max_drop": 3.0}).budgets.max_drop == 3.0


def test_a_task_among_the_changes_counts_as_one() -> None:
    recipe = default_recipe("owner/model", changes={"task": "/tasks/style"})
    assert recipe.budgets.max_drop == 1.0
    assert "skip-branches" in [step.name for step in recipe.passes]


def test_without_a_task_nothing_is_cut() -> None:
    recipe = default_recipe("owner/model")
    assert recipe.budgets.max_drop is None
    assert [step.name for step in recipe.passes] == ["canonicalize", *SHORTENING_PASSES, "fold-constants"]
