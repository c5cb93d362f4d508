"""A dry run on the terminal: what `vlmopt explain` and `vlmopt optimize --dry-run` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vlmopt.cli import options
from vlmopt.cli.display import make_progress, show, show_json
from vlmopt.cli.watching import Chosen, Switches, make_watch

if TYPE_CHECKING:
    from vlmopt.report.table import Table

_SITES_SHOWN = 12
_EXAMPLES_SHOWN = 3


def run_explain(ctx: click.Context, chosen: Chosen, switches: Switches, *, force: bool, is_json: bool) -> None:
    """Explains the recipe and prints what was found; what stopped it is raised after that."""
    from vlmopt import workflow

    settings = options.settings_of(ctx)
    watch = make_watch(switches, chosen, force=force)
    found = workflow.explain(chosen.recipe, watch=watch, progress=make_progress(settings))
    if is_json:
        show_json(found.data)
    else:
        _show(found.data, is_verbose=settings.verbosity > 0)
    if found.error is not None:
        raise found.error


def _show(data: Mapping[str, Any], *, is_verbose: bool) -> None:
    from vlmopt.report import table_renderables

    task = f" for {data['task']}" if data["task"] else ""
    show(f"{data['model']}{task}: {len(data['plan'])} steps, nothing is measured or written\n")
    tables = [_facts(data["plan"]), _steps(data), _sites(data["plan"], is_verbose=is_verbose), _refusals(data["plan"])]
    for table in tables:
        if table.rows:
            show(*table_renderables(table), "")
    if "why" in data:
        from vlmopt.workflow.watching.tracing import why_lines

        show(*why_lines(data["why"]), "")
    for warning in data["warnings"]:
        show(f"note: {warning}")


def _facts(plan: Sequence[Mapping[str, Any]]) -> Table:
    from vlmopt.report import Table

    keys = ("requires", "produces", "breaks", "facts_after")
    rows = tuple((_step(row), *(", ".join(row[key]) for key in keys)) for row in plan)
    before = ", ".join(plan[0]["facts_before"]) if plan else ""
    columns = ("step", "requires", "produces", "breaks", "holds afterwards")
    return Table("Facts", columns, rows, n_text_columns=5, note=f"Before the first step holds: {before}.")


def _steps(data: Mapping[str, Any]) -> Table:
    from vlmopt.report import Table
    from vlmopt.report.quantities import count

    rows = tuple(
        (
            _step(row),
            row["promise"],
            row["decision"],
            *(str(number) for number in (len(row["sites"]), row["n_applied"], len(row["refusals"]))),
            *(count(row["predicted"][key]) for key in ("parameters", "macs")),
        )
        for row in data["plan"]
    )
    before, after = data["cost"]["before"], data["cost"]["after"]
    sizes = [
        f"{count(before[k])} → {count(after[k])} {label}"
        for k, label in (("parameters", "parameters"), ("macs", "MACs"))
    ]
    note = f"Predicted savings, for all candidates where the planner chooses. Applied here: {', '.join(sizes)}."
    columns = ("step", "promise", "decision", "sites", "applied", "refused", "parameters", "MACs")
    return Table("Steps", columns, rows, n_text_columns=3, note=note)


def _sites(plan: Sequence[Mapping[str, Any]], *, is_verbose: bool) -> Table:
    from vlmopt.report import Table
    from vlmopt.report.quantities import count

    rows: list[tuple[str, ...]] = []
    n_hidden = 0
    has_importance = any("importance" in site for row in plan for site in row["sites"])
    for row in plan:
        shown = row["sites"] if is_verbose else row["sites"][:_SITES_SHOWN]
        n_hidden += len(row["sites"]) - len(shown)
        for site in shown:
            importance = [f"{site['importance']:.4f}" if "importance" in site else ""] if has_importance else []
            saving = [count(site["saving"][key]) for key in ("parameters", "macs")]
            rows.append((_step(row), site["name"], site["summary"], *saving, *importance))
    columns = ("step", "site", "what", "parameters", "MACs", *(["importance"] if has_importance else []))
    note = f"{n_hidden} more sites; -v or --json lists them all." if n_hidden else ""
    return Table("Sites", columns, tuple(rows), n_text_columns=3, note=note)


def _refusals(plan: Sequence[Mapping[str, Any]]) -> Table:
    """Grouped by reason: a pass may refuse a hundred candidates for one."""
    from vlmopt.report import Table

    grouped: dict[tuple[str, str], list[str]] = {}
    for row in plan:
        for refusal in row["refusals"]:
            grouped.setdefault((_step(row), refusal["reason"]), []).append(refusal["name"])
    rows = tuple((step, reason, _examples(names), str(len(names))) for (step, reason), names in grouped.items())
    return Table("Left alone", ("step", "reason", "which", "number"), rows, n_text_columns=3)


def _examples(names: Sequence[str]) -> str:
    more = f", and {len(names) - _EXAMPLES_SHOWN} more" if len(names) > _EXAMPLES_SHOWN else ""
    return ", ".join(names[:_EXAMPLES_SHOWN]) + more


def _step(row: Mapping[str, Any]) -> str:
    return f"{row['step']} {row['name']}"
