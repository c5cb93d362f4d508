"""`vlmopt recheck`: does the plan still hold on new data?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json


@click.command("recheck", short_help="Check on new data whether what was cut still holds.")
@click.argument("path", type=click.Path(path_type=Path), metavar="OUT")
@options.task(is_required=True)
@click.option("--max-drop", metavar="DROP", help="Allowed drop: points, or percent as in 2%.  [default: the recipe's]")
@options.num_samples("the recipe's")
@options.threads()
@options.as_json()
@options.common
@click.pass_context
def command(
    ctx: click.Context,
    /,
    path: Path,
    task: str,
    max_drop: str | None,
    num_samples: int | None,
    *,
    threads: int | None,
    is_json: bool,
) -> None:
    """Check on new data whether what was cut still holds.

    \b
    Example: vlmopt recheck out -t tasks/style-november

    Compares artifact and original on the new test split, measures importance on the new profile split, and says what
    would be cut today. Exits with 3 when the drop exceeds what is allowed: the sign to compile again.
    """
    options.set_threads(threads)
    from vlmopt import workflow
    from vlmopt.core.errors import GateError

    found = workflow.recheck(
        path, task, max_drop=max_drop, num_samples=num_samples, progress=make_progress(options.settings_of(ctx))
    )
    if is_json:
        show_json(found)
    elif options.settings_of(ctx).verbosity >= 0:
        _show(found)
    if found["holds"] is False:
        metric = found["metric"]
        raise GateError(
            str(path),
            f"drops by {metric['drop_points']:.2f} points on the new data",
            expected=f"at most {metric['allowed_points']:.2f}",
            remedy=f"compile again: vlmopt optimize --recipe {path / 'recipe.yaml'} -t {task} -o NEW_FOLDER",
        )


def _show(found: Mapping[str, Any]) -> None:
    from vlmopt.report import Table, table_renderables

    metric, plan = found["metric"], found["plan"]
    low, high = metric["drop_interval95"]
    made = metric["drop_points_when_made"]
    note = f"Drop {metric['drop_points']:.2f} points (95 % interval {low:.1f} to {high:.1f}), n = {metric['n']}"
    note += "." if made is None else f"; when it was made {made:.2f}."
    row = (metric["name"], f"{100 * metric['original']:.1f}", f"{100 * metric['artifact']:.1f}")
    show(*table_renderables(Table("On the new data", ("metric", "original (%)", "artifact (%)"), (row,), note=note)))
    if plan is None:
        return
    agreement = "" if plan["spearman"] is None else f" The rankings agree by {plan['spearman']:.2f} (Spearman)."
    rows = tuple(
        (one["name"], one["today"], _number(one["score_when_made"]), _number(one["score_today"]))
        for one in plan["differences"]
    )
    columns = ("branch", "today", "importance when made", "importance today")
    n_same = plan["n_cut"] - sum(one["today"] == "kept" for one in plan["differences"])
    said = f"{n_same} of the {plan['n_cut']} branches cut would be cut today as well.{agreement}"
    if rows:
        show(*table_renderables(Table("What would be cut differently", columns, rows, n_text_columns=2, note=said)))
    else:
        show(said)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
