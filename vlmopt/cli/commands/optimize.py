"""`vlmopt optimize`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json
from vlmopt.cli.explained import run_explain
from vlmopt.cli.recipes import recipe_of
from vlmopt.cli.watching import choose_steps, make_watch, split_switches, switches


@click.command("optimize", short_help="Compile a model for one task into a smaller, faster, verified artifact.")
@options.model(is_required=False)
@options.task(is_required=False)
@options.output("Folder to create.", is_required=False)
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Start from this recipe (YAML).")
@click.option("--profile", "profile_file", metavar="FILE", help="Use this profile instead of measuring one.")
@options.budgets(default_drop="  [default: 1 with a task, no recipe and no other budget]")
@click.option(
    "--recover",
    type=click.Choice(("head", "closed-form", "adapters", "weights")),
    help="After the cut: fit heads anew; kept branches too; or train adapters, or all kept weights.  [default: head]",
)
@options.quantize()
@options.together()
@options.device_profile()
@options.emit()
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="ONNX operator set.  [default: 20]")
@options.device()
@options.dtype()
@options.seed()
@options.num_samples("all", what="the profile and validation splits each")
@options.threads()
@options.pass_dir()
@options.allow_pickle()
@options.adapters()
@switches
@click.option("--tune", "is_tuned", is_flag=True, help="At last time fusions and threads, like `vlmopt device tune`.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and write nothing; as `vlmopt explain` does.")
@options.force("Replace the output, once the new one is complete; and the graphs of --dump-graph.")
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str | None,
    task: str | None,
    output: Path | None,
    recipe: Path | None,
    *,
    quantize: str | None,
    is_together: bool,
    threads: int | None,
    is_tuned: bool,
    dry_run: bool,
    force: bool,
    is_json: bool,
    **given: Any,
) -> None:
    """Compile a model for one task into a smaller, faster, verified artifact.

    \b
    Example: vlmopt optimize -m openai/clip-vit-base-patch32 -t tasks/style -o out --max-drop 1

    With --max-drop as much computation is cut as the metric allows; with --latency, --size or --macs no more than they
    ask for, and what loses least; with both, both must hold. --quantize then takes as many layers as the drop allows;
    --together plans cuts, tokens, widths and bits as one.

    Options given here win over those of the recipe; the defaults hold where neither says anything. A failed gate exits
    with 3 and leaves nothing under the output's name. --skip, --stop-after and --limit change the recipe, and so the
    artifact; --print-*, --why, --dump-graph and --verify-each only watch.
    """
    _refuse_early(ctx, model or recipe, output, dry_run=dry_run, force=force)
    asked, overrides = split_switches(given)
    given = {"model": model, "task": task, **overrides}
    chosen = choose_steps(recipe_of(recipe, given, quantize=quantize, is_together=is_together), asked)
    if is_tuned and "onnx" not in chosen.recipe.emit:
        raise click.UsageError("--tune times ONNX files: add onnx to --emit.", ctx)
    options.set_threads(threads)
    if dry_run:
        run_explain(ctx, chosen, asked, force=force, is_json=is_json)
        return
    from vlmopt import workflow

    settings, watch = options.settings_of(ctx), make_watch(asked, chosen, force=force)
    place = output or Path("out")
    progress = make_progress(settings)
    report = workflow.optimize(chosen.recipe, place, force=force, watch=watch, progress=progress)
    tuned = workflow.tune_session(place, progress=progress) if is_tuned else None
    if is_json:
        show_json(report)
    elif settings.verbosity >= 0:
        from vlmopt.report import render_terminal

        if tuned is not None:
            show(f"session: {tuned['chosen']} is the fastest here, and what vlmopt.load takes")
        show(render_terminal(report), f"\nwritten to {output}")


def _refuse_early(
    ctx: click.Context, source: str | Path | None, output: Path | None, *, dry_run: bool, force: bool
) -> None:
    """Refuses what cannot work before torch is imported."""
    from vlmopt.rundir import refuse_existing

    if source is None:
        raise click.UsageError("Missing option '-m' / '--model' (or '--recipe').", ctx)
    if dry_run:
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.", ctx)
    refuse_existing(output, force=force)
