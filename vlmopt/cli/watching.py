"""Options of the commands that run passes: what to watch of them, and which steps to leave out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vlmopt.cli import options

if TYPE_CHECKING:
    from vlmopt.recipe import Recipe
    from vlmopt.workflow import Watch

F = TypeVar("F", bound=Callable[..., Any])
_STEP = "PASS|STEP"
_STEPS = "may be repeated; a number counts the steps of the recipe"


def _steps(name: str, help_text: str) -> Callable[[F], F]:
    return click.option(name, multiple=True, metavar=_STEP, help=help_text)


def switches(function: F) -> F:
    """What may be watched of the passes, from --print-before to --verify-each; and --stop-after, --skip and --limit."""
    made: list[Callable[[F], F]] = [
        _steps(
            "--print-before", f"Print the graph before this pass, on standard error; `all` for every pass; {_STEPS}."
        ),
        _steps("--print-after", "The same after the pass."),
        _steps("--print-diff", "Print what the pass changes, as a diff."),
        click.option(
            "--why",
            multiple=True,
            metavar="NAME",
            help="Tell about a node, branch or pattern: who made, removed or refused it; may be repeated.",
        ),
        click.option(
            "--dump-graph",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Write the graphs around every pass to this folder: text, Graphviz, SVG, HTML and an index.",
        ),
        click.option(
            "--verify-each", is_flag=True, help="Check the program after every site; stop at the first that breaks it."
        ),
        click.option("--stop-after", metavar=_STEP, help="Leave out the steps behind this one."),
        click.option("--skip", multiple=True, metavar=_STEP, help="Leave out this step; may be repeated."),
        click.option(
            "--limit",
            "max_sites",
            type=click.IntRange(min=0),
            metavar="N",
            help="Apply at most this many sites, over all passes together.",
        ),
        options.pass_timeout(),
    ]
    for option in reversed(made):
        function = option(function)
    return function


@dataclass(frozen=True)
class Switches:
    """The switches as typed. `max_sites` is not here: it is a value of the recipe."""

    print_before: tuple[str, ...]
    print_after: tuple[str, ...]
    print_diff: tuple[str, ...]
    why: tuple[str, ...]
    dump_graph: Path | None
    verify_each: bool
    pass_timeout_s: float
    stop_after: str | None
    skip: tuple[str, ...]


def split_switches(given: Mapping[str, Any]) -> tuple[Switches, dict[str, Any]]:
    """The switches among the options of a command, and the others, which change the recipe."""
    names = Switches.__dataclass_fields__
    others = {name: value for name, value in given.items() if name not in names}
    return Switches(**{name: given[name] for name in names}), others


@dataclass(frozen=True)
class Chosen:
    """The recipe that runs, and the steps of it that are watched; everything that was typed names something."""

    recipe: Recipe
    steps: Mapping[str, frozenset[int]]
    left_out: tuple[str, ...]


def choose_steps(recipe: Recipe, switches: Switches) -> Chosen:
    """Applies --skip and --stop-after, and looks up the other switches; imports no torch.

    Raises:
        RecipeError: a switch names no step, with the closest name.
    """
    from vlmopt.recipe import chosen_steps, shorten

    short = shorten(recipe, skip=switches.skip, stop_after=switches.stop_after)
    steps = {
        name: chosen_steps(recipe, short, getattr(switches, name), option=f"--{name.replace('_', '-')}")
        for name in ("print_before", "print_after", "print_diff")
    }
    return Chosen(short.recipe, steps, short.left_out)


def make_watch(switches: Switches, chosen: Chosen, *, force: bool) -> Watch:
    """What the workflow takes; lines for a person go to standard error, so that `--json` stays clean."""
    from vlmopt.workflow import Watch

    return Watch(
        **chosen.steps,
        why=switches.why,
        dump_graph=switches.dump_graph,
        force_dump=force,
        verify_each=switches.verify_each,
        left_out=chosen.left_out,
        pass_timeout_s=switches.pass_timeout_s,
        write=_on_standard_error,
    )


def _on_standard_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
