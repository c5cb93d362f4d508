"""The recipe of a command: a file, or the defaults around a model; options that were typed win over both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmopt.recipe import Recipe

_KEYS = {
    **{name: f"budgets.{name}" for name in ("max_drop", "latency", "size", "macs")},
    "profile_file": "profile.file",
    "recover": "recovery.level",
}


def recipe_of(
    file: Path | None, given: Mapping[str, object], *, quantize: str | None = None, is_together: bool = False
) -> Recipe:
    """The recipe with what was typed put in; without a file, `given` must hold a model.

    Args:
        quantize: the kind of quantization that was asked for beside.
        is_together: one plan is made for all passes.
    """
    from vlmopt.recipe import default_recipe, load_recipe, with_one_plan, with_quantization

    changes: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            value = [str(item) if isinstance(item, Path) else item for item in value] or None
        if value is not None and value is not False:  # what was not typed does not override the recipe
            changes[_KEYS.get(name, name)] = value
    if file is not None:
        recipe = load_recipe(file, changes)
    else:
        recipe = default_recipe(str(changes.pop("model")), changes=changes)
    recipe = recipe if quantize is None else with_quantization(recipe, quantize)
    return with_one_plan(recipe) if is_together else recipe
