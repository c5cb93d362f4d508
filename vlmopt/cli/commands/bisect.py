"""`vlmopt bisect`: the one site after which something is wrong."""

from __future__ import annotations

from pathlib import Path

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show_json
from vlmopt.cli.recipes import recipe_of
from vlmopt.core.errors import EXIT_DIFFERENT, EXIT_OK


@click.command("bisect", short_help="Find the one edit of a recipe after which something is wrong.")
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")
@options.model(is_required=False)
@options.task(is_required=False)
@options.output("Folder of the failing case to create.  [default: bisect-PASS]", is_required=False)
@click.option(
    "--check",
    metavar="CMD",
    help="Shell command that says whether a state is good: exit code 0 is good, 125 cannot say, others are bad. "
    "{} stands for the folder of the state's artifact, which VLMOPT_ARTIFACT holds as well.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Points of the metric that may be lost on the validation split.  [default: as the recipe says]",
)
@options.device()
@options.dtype()
@options.seed()
@options.num_samples("all", what="the profile and validation splits each")
@options.threads()
@options.pass_dir()
@options.pass_timeout()
@options.allow_pickle()
@options.force("Replace the folder of the failing case.")
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    recipe: Path,
    output: Path | None,
    check: str | None,
    *,
    threads: int | None,
    pass_timeout_s: float,
    force: bool,
    is_json: bool,
    **overrides: object,
) -> int:
    """Find the one edit of a recipe after which something is wrong.

    \b
    Example: vlmopt bisect recipe.yaml --check 'vlmopt eval {} -t tasks/style --json | python at_least.py 0.8'

    The sites of all passes are numbered in the order in which a run applies them, and the first bad one is found by
    halving: 7 checks do for 64 sites. Without --check a state is bad when a step breaks its promise, an output is not
    finite, an emitted file computes something else, or the metric drops by more than the recipe allows.

    What was found is written as a folder with the program before the site, inputs, and a script that fails while the
    fault is there. Exits with 3 when something is bad, with 0 when nothing is.
    """
    resolved = recipe_of(recipe, overrides)
    options.set_threads(threads)
    from vlmopt import workflow

    options.settings_of(ctx).output = workflow.scratch_path(output)  # an interruption says what is kept there
    progress = make_progress(options.settings_of(ctx))
    found = workflow.bisect(resolved, output, check=check, force=force, time_limit_s=pass_timeout_s, progress=progress)
    if is_json:
        show_json(found)
    else:
        click.echo(found["line"])  # one line, however long
        if found["case"] is not None:
            needs = ", and needs the model and the task" if found["needs_model"] else ""
            click.echo(f"written to {found['case']}; `python case.py` there fails while the fault is there{needs}")
    return EXIT_OK if found["outcome"] == "nothing" else EXIT_DIFFERENT
