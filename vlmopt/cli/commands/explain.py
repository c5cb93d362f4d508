"""`vlmopt explain`: what a recipe would do, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.explained import run_explain
from vlmopt.cli.recipes import recipe_of
from vlmopt.cli.watching import choose_steps, split_switches, switches


@click.command("explain", short_help="Show what a recipe would do: facts, plans, predicted savings and refusals.")
@click.argument("recipe", type=click.Path(path_type=Path), metavar="[RECIPE]", required=False)
@options.model(is_required=False)
@options.task(is_required=False)
@click.option("--profile", "profile_file", metavar="FILE", help="Show the importance of candidates by this profile.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Points of the metric that may be lost.  [default: 1 with a task and no recipe]",
)
@options.device()
@options.dtype()
@options.seed()
@options.num_samples("all", what="the profile and validation splits each")
@options.threads()
@options.pass_dir()
@options.allow_pickle()
@options.adapters()
@switches
@options.force("Replace the graphs that --dump-graph wrote before.")
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    recipe: Path | None,
    model: str | None,
    task: str | None,
    *,
    threads: int | None,
    force: bool,
    is_json: bool,
    **given: Any,
) -> None:
    """Show what a recipe would do: facts, plans, predicted savings and refusals.

    \b
    Example: vlmopt explain out/recipe.yaml --why 'image_encoder/*layers.2*'

    A dry run, which measures nothing: every pass plans on what the passes before it leave. Exact and close passes and
    sites that the recipe names are applied on clones; where the planner would choose, its candidates are shown. RECIPE
    is a YAML file or an artifact; without one -m names the model.
    """
    if recipe is None and model is None:
        raise click.UsageError("Missing argument 'RECIPE' (or option '-m' / '--model').", ctx)
    asked, overrides = split_switches(given)
    chosen = choose_steps(recipe_of(recipe, {"model": model, "task": task, **overrides}), asked)
    options.set_threads(threads)
    run_explain(ctx, chosen, asked, force=force, is_json=is_json)
