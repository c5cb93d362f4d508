"""`vlmopt eval`: a model or an artifact on a task."""

from __future__ import annotations

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json
from vlmopt.cli.generic import lines_of


@click.command("eval", short_help="Evaluate a model or an artifact on a task.")
@click.argument("target", metavar="TARGET")
@options.task(is_required=True)
@options.num_samples("all")
@options.seed()
@click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, cuda:1.")
@click.option("--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True, help="Number format.")
@options.threads()
@options.allow_pickle()
@options.adapters()
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    target: str,
    task: str,
    num_samples: int | None,
    seed: int | None,
    *,
    device: str,
    dtype: str,
    threads: int | None,
    allow_pickle: bool,
    adapters: tuple[str, ...],
    is_json: bool,
) -> None:
    """Evaluate a model or an artifact on a task.

    \b
    Example: vlmopt eval out -t tasks/style

    TARGET is a model folder, a hub id, or an artifact that `vlmopt optimize` wrote. The metric is that of
    the test split.
    """
    options.set_threads(threads)
    from vlmopt import workflow

    found = workflow.evaluate(
        target,
        task,
        num_samples=num_samples,
        seed=seed or 0,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        adapters=options.adapter_sources(adapters),
        progress=make_progress(options.settings_of(ctx)),
    )
    if is_json:
        show_json(found)
    else:
        show(*lines_of(found))
