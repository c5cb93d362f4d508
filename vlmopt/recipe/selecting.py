"""Steps of a recipe as the switches of the command line name them: by number or by the name of the pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlmopt.core.errors import RecipeError
from vlmopt.recipe.schema import Recipe
from vlmopt.registry import suggest

ALL = "all"


@dataclass(frozen=True)
class Shortened:
    """A recipe without the steps that were left out.

    `numbers` maps the numbers of the steps that stay, as the recipe was written, to their new ones; `left_out` says in
    one sentence a switch what is missing.
    """

    recipe: Recipe
    numbers: Mapping[int, int]
    left_out: tuple[str, ...] = ()


def shorten(recipe: Recipe, *, skip: Sequence[str] = (), stop_after: str | None = None) -> Shortened:
    """The recipe without the skipped steps and without those behind the last one that is wanted.

    Raises:
        RecipeError: a switch names no step, or `stop_after` means several.
    """
    names = [step.name for step in recipe.passes]
    skipped = sorted({number for word in skip for number in find_steps(recipe, word, option="--skip")})
    last = len(names) if stop_after is None else _only(recipe, stop_after, option="--stop-after")
    kept = [number for number in range(1, last + 1) if number not in skipped]
    left_out = []
    if skipped:
        left_out.append(f"--skip left out {_spelled(names, skipped)}")
    if last < len(names):
        left_out.append(f"--stop-after left out {_spelled(names, range(last + 1, len(names) + 1))}")
    passes = tuple(recipe.passes[number - 1] for number in kept)
    return Shortened(
        recipe.model_copy(update={"passes": passes}), {old: new for new, old in enumerate(kept, 1)}, tuple(left_out)
    )


def chosen_steps(recipe: Recipe, short: Shortened, words: Iterable[str], *, option: str) -> frozenset[int]:
    """The numbers, in the shortened recipe, of the steps that the words name; "all" names every one.

    Args:
        recipe: as it was written, which is what numbers are counted in.

    Raises:
        RecipeError: a word names no step, or only steps that were left out.
    """
    chosen: set[int] = set()
    for word in words:
        if word == ALL:
            chosen.update(short.numbers.values())
            continue
        found = find_steps(recipe, word, option=option)
        kept = {short.numbers[number] for number in found if number in short.numbers}
        if not kept:
            names = [step.name for step in recipe.passes]
            raise RecipeError(f"{option} {word}", f"{_spelled(names, found)} is left out by --skip or --stop-after")
        chosen |= kept
    return frozenset(chosen)


def find_steps(recipe: Recipe, word: str, *, option: str) -> tuple[int, ...]:
    """The numbers of the steps that a word names: a number ("2"), or every step of a pass ("skip-branches").

    Raises:
        RecipeError: there is no such step, with the closest name.
    """
    names = [step.name for step in recipe.passes]
    place = f"{option} {word}"
    if word.isdecimal():
        number = int(word)
        if not 1 <= number <= len(names):
            raise RecipeError(place, "the recipe has no step of that number", expected=_range(len(names)))
        return (number,)
    if word not in names:
        found = "the recipe has no step of that name"
        raise RecipeError(place, found, expected="a pass of the recipe or a number", remedy=suggest(word, set(names)))
    return tuple(number for number, name in enumerate(names, 1) if name == word)


def _only(recipe: Recipe, word: str, *, option: str) -> int:
    found = find_steps(recipe, word, option=option)
    if len(found) > 1:
        numbers = " or ".join(str(number) for number in found)
        raise RecipeError(f"{option} {word}", f"the recipe has {len(found)} such steps", expected=numbers)
    return found[0]


def _range(n_steps: int) -> str:
    return f"a number from 1 to {n_steps}" if n_steps else "a recipe with passes"


def _spelled(names: Sequence[str], numbers: Iterable[int]) -> str:
    return ", ".join(f"step {number} ({names[number - 1]})" for number in numbers)
