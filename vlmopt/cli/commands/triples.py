"""`vlmopt triples`: wrong answers that a model finds likely, for tuning by preference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json


@click.command("triples", short_help="Make triples (question, answer, wrong answer) for tuning by preference.")
@options.model(is_required=True)
@options.task(is_required=True)
@options.output("Task folder to create.", is_required=True)
@click.option("--question", metavar="TEXT", help="What is asked of an image, for a task of labels without questions.")
@click.option(
    "--candidates",
    "n_candidates",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Wrong answers of an item that the model is asked about, the most frequent ones.",
)
@options.num_samples("all")
@options.seed()
@click.option("--device", default="cpu", show_default=True, help="Where torch computes: cpu, cuda, cuda:1.")
@click.option("--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True, help="Number format.")
@options.threads()
@options.allow_pickle()
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    task: str,
    output: Path,
    *,
    seed: int | None,
    threads: int | None,
    is_json: bool,
    **settings: Any,
) -> None:
    """Make triples (question, answer, wrong answer) for tuning by preference.

    \b
    Example: vlmopt triples -m model -t tasks/style -o tasks/style-triples

    The wrong answer is the one that the model finds likeliest of the answers to the same question. The folder
    is a task; `recovery: {level: adapters, preference: 1}` in a recipe trains on it.
    """
    options.set_threads(threads)
    from vlmopt import workflow

    progress = make_progress(options.settings_of(ctx))
    found = workflow.make_triples(model, task, output, seed=seed or 0, **settings, progress=progress)
    if is_json:
        show_json(found)
    elif options.settings_of(ctx).verbosity >= 0:
        likelier = f"the model finds {found['n_preferred_wrong']} wrong answers likelier than the right one"
        show(f"written to {found['folder']}: {found['n']} triples; {likelier}")
