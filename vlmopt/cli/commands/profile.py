"""`vlmopt profile`: importance of every branch for a task; and where two profiles differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json
from vlmopt.core.estimators import DEFAULT_SAMPLE, DEFAULT_UPDATES, ESTIMATORS


@click.group(
    "profile", invoke_without_command=True, short_help="Measure how much every branch of a model matters for a task."
)
@options.model(is_required=False)
@options.task(is_required=False)
@options.output("JSON file to create.", is_required=False)
@click.option(
    "--estimator",
    type=click.Choice(ESTIMATORS),
    default="leave-one-out",
    show_default=True,
    help="How importance is measured.",
)
@click.option(
    "--scoring",
    type=click.Choice(("refit", "raw")),
    default="refit",
    show_default=True,
    help="Loss after the task head is fitted again, or with the head as it is; of leave-one-out and of subsets.",
)
@click.option(
    "--num-samples", type=click.IntRange(min=2), default=512, show_default=True, help="Samples to measure on."
)
@click.option(
    "--sample-size",
    type=click.IntRange(min=3),
    default=DEFAULT_SAMPLE,
    show_default=True,
    help="Images that the distortions look at.",
)
@click.option(
    "--updates",
    "n_updates",
    type=click.IntRange(min=1),
    default=DEFAULT_UPDATES,
    show_default=True,
    help="Turns of das-bandit and subset-ridge, each of three subsets on one batch.",
)
@click.option(
    "--subset-size", type=click.IntRange(min=1), help="How many they skip at a time.  [default: a third of them]"
)
@click.option(
    "--arms", type=click.Choice(("branch", "layer")), default="branch", show_default=True, help="What they skip."
)
@click.option(
    "--stability/--no-stability",
    default=None,
    help="Try a leave-one-out ranking on other items and wrong labels.  [default: where the head is fitted again]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of everything random."
)
@click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, cuda:1.")
@click.option("--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True, help="Number format.")
@click.option("--latency", is_flag=True, help="Measure what every branch costs in ONNX Runtime, too.")
@options.threads()
@options.allow_pickle()
@options.adapters()
@options.force("Replace the file.")
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str | None,
    task: str | None,
    output: Path | None,
    *,
    threads: int | None,
    adapters: tuple[str, ...],
    is_json: bool,
    **settings: Any,
) -> None:
    """Measure how much every branch of a model matters for a task.

    \b
    Example: vlmopt profile -m openai/clip-vit-base-patch32 -t tasks/style -o style.json

    A run that was killed resumes from what it had measured.
    """
    if ctx.invoked_subcommand is not None:
        return
    if model is None or task is None or output is None:
        spelled = {"'-m' / '--model'": model, "'-t' / '--task'": task, "'-o' / '--output'": output}
        missing = next(name for name, value in spelled.items() if value is None)
        raise click.UsageError(f"Missing option {missing}.", ctx)
    options.set_threads(threads)
    from vlmopt import workflow

    progress = make_progress(options.settings_of(ctx))
    sources = options.adapter_sources(adapters)
    found = workflow.profile_model(model, task, output, **settings, adapters=sources, progress=progress)
    if is_json:
        show_json(found)
    elif options.settings_of(ctx).verbosity >= 0:
        show(f"written to {output}")


@command.command("diff", short_help="Show where two profiles differ.")
@click.argument("first", type=click.Path(path_type=Path), metavar="A")
@click.argument("second", type=click.Path(path_type=Path), metavar="B")
@options.as_json()
@options.common
def diff(first: Path, second: Path, *, is_json: bool) -> None:
    """Show where two profiles differ.

    \b
    Example: vlmopt profile diff style.json meaning.json
    """
    from vlmopt.profiling.document import diff_profiles, read_profile

    found = diff_profiles(*(read_profile(path).model_dump(mode="json") for path in (first, second)))
    if is_json:
        show_json(found)
    else:
        _show_difference(found)


def _show_difference(found: dict[str, Any]) -> None:
    from vlmopt.report import Table, table_renderables

    rows = tuple(
        (row["component"], row["scope"], row["name"], *(_number(row[key]) for key in ("a", "b", "difference", "z")))
        for row in found["rows"]
    )
    columns = ("component", "scope", "name", found["a"]["task"], found["b"]["task"], "difference", "z")
    note = "z is the difference over its standard error."
    if found["spearman"] is not None:
        note += f" Rank agreement of the branches (Spearman): {found['spearman']:.2f}."
    if not found["same_model"]:
        note += " The profiles are of different models."
    show(*table_renderables(Table("Where the tasks differ", columns, rows, n_text_columns=3, note=note)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
