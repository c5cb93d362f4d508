"""`vlmopt plan`: what to cut under budgets, from profiles alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import show, show_json
from vlmopt.core.budgets import Quantity, parse_budgets

if TYPE_CHECKING:
    from vlmopt.workflow.replanning.solving import Request

_FRONT_FORMS = (".html", ".svg", ".json")
_PLAN_FORMS = (".yaml", ".yml", ".json")


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 2,1.", param, ctx)


@click.command("plan", short_help="Choose what to cut under budgets, from profiles alone; draw the Pareto front.")
@click.argument("profiles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PROFILE...")
@options.budgets()
@click.option(
    "--sites",
    "scope",
    type=click.Choice(("branches", "layers", "both")),
    default="branches",
    show_default=True,
    help="What may be cut.",
)
@click.option("--keep", multiple=True, metavar="PATTERN", help="Keep the sites that match; may be repeated.")
@click.option(
    "--combine",
    type=click.Choice(("worst", "weighted")),
    help="One cut for several tasks: the task that loses most decides, or the weighted sum of losses.",
)
@click.option("--weights", type=Numbers(), default=(), metavar="W,W,...", help="Weights of the profiles, in order.")
@click.option("--front", is_flag=True, help="Show the Pareto front of predicted loss and latency (or MACs).")
@click.option(
    "--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Write this recipe with the cut put in."
)
@options.output("File to create: a recipe (.yaml) or .json; of a front .html, .svg or .json.", is_required=False)
@options.force("Replace the file.")
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    profiles: tuple[Path, ...],
    scope: str,
    keep: tuple[str, ...],
    combine: str | None,
    weights: tuple[float, ...],
    *,
    front: bool,
    recipe: Path | None,
    output: Path | None,
    force: bool,
    is_json: bool,
    **budgets: str | None,
) -> None:
    """Choose what to cut under budgets, from profiles alone; draw the Pareto front.

    \b
    Example: vlmopt plan style.json --macs 0.5x -o plan.yaml
             vlmopt optimize --recipe plan.yaml -t tasks/style -o out
             vlmopt plan style.json meaning.json --combine worst --macs 0.6x
             vlmopt plan style.json --front -o front.html

    No model and no data are needed. Losses are predicted: single scores and their interactions, added up. `vlmopt
    optimize` measures every cut instead.
    """
    from vlmopt.workflow.replanning.fronts import refuse_output
    from vlmopt.workflow.replanning.solving import Request

    if front and recipe is not None:
        raise click.UsageError("--front makes no recipe: leave out --recipe or --front.", ctx)
    if recipe is not None and output is None:
        raise click.UsageError("--recipe is changed and written elsewhere: add -o NEW.yaml.", ctx)
    forms = _FRONT_FORMS if front else _PLAN_FORMS
    if output is not None:
        refuse_output(output, force=force, forms=forms)
    limits = parse_budgets({quantity: budgets[quantity.value] for quantity in Quantity})
    request = Request(profiles, limits, scope, keep, combine, weights)
    is_quiet = options.settings_of(ctx).verbosity < 0
    if front:
        _front(request, output, is_json=is_json, is_quiet=is_quiet)
    else:
        _plan(request, budgets, recipe, output, is_json=is_json, is_quiet=is_quiet)


def _plan(
    request: Request,
    budgets: Mapping[str, str | None],
    recipe: Path | None,
    output: Path | None,
    *,
    is_json: bool,
    is_quiet: bool,
) -> None:
    from vlmopt.workflow.replanning.solving import replan
    from vlmopt.workflow.replanning.writing import planned_recipe, write_plan

    plan = replan(request)
    if output is not None and output.suffix.lower() == ".json":
        _write(output, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
    elif output is not None:
        write_plan(planned_recipe(plan, budgets, recipe), output)
    if is_json:
        show_json(plan)
    elif not is_quiet:
        from vlmopt.cli.planned import plan_renderables

        show(*plan_renderables(plan))
        _say_written(output)


def _front(request: Request, output: Path | None, *, is_json: bool, is_quiet: bool) -> None:
    from vlmopt.workflow.replanning.fronts import plan_front

    found = plan_front(request)
    if output is not None:
        _write(output, _drawn(found, output.suffix.lower()))
    if is_json:
        show_json(found)
    elif not is_quiet:
        from vlmopt.report import table_renderables
        from vlmopt.report.front import front_table

        show(*table_renderables(front_table(found)))
        _say_written(output)


def _drawn(front: Mapping[str, Any], form: str) -> str:
    if form == ".json":
        return json.dumps(front, indent=2, ensure_ascii=False) + "\n"
    if form == ".svg":
        from vlmopt.report.front import front_svg

        return front_svg(front)
    from vlmopt.report.html import front_html

    return front_html(front)


def _write(path: Path, text: str) -> None:
    from vlmopt.rundir import atomic_write, disk_errors

    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text)


def _say_written(output: Path | None) -> None:
    if output is not None:
        show(f"\nwritten to {output}")
