"""A plan on the terminal: what is cut, what that is predicted to lose and save, what each task alone would cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

_UNITS = {"macs": "MACs", "latency": "us", "size": "B"}


def plan_renderables(plan: Mapping[str, Any]) -> Sequence[RenderableType]:
    """Tables and lines for `show`."""
    from vlmopt.report import table_renderables

    lines = [f"{plan['model']} within {plan['budgets']}:", *_savings(plan["saves"])]
    made: list[RenderableType] = []
    if plan["sites"]:
        made += [*table_renderables(_sites(plan)), ""]
    else:
        made += ["Nothing is cut: the budgets are met without it.\n"]
    made += ["\n".join(lines), ""]
    made += table_renderables(_tasks(plan))
    return made


def _sites(plan: Mapping[str, Any]) -> Any:
    from vlmopt.report import Table
    from vlmopt.report.tables import count

    tasks = [task["task"] for task in plan["tasks"]]
    rows = []
    for site in plan["sites"]:
        scores = [_with_error(site["scores"][task], site["stderrs"][task], digits=4) for task in tasks]
        time = "" if site["latency_us"] is None else f"{site['latency_us']:.0f}"
        rows.append((site["name"], site["kind"], count(site["macs"]), time, *scores))
    columns = ("cut", "kind", "MACs", "us", *(f"importance for {task}" for task in tasks))
    return Table("What to cut", columns, tuple(rows), n_text_columns=2)


def _savings(saves: Mapping[str, Any]) -> list[str]:
    from vlmopt.report.tables import count

    lines = []
    for resource, found in saves.items():
        share = "" if found["share"] is None else f" ({100 * found['share']:.0f} % of {count(found['total'])})"
        lines.append(f"  saves {count(found['saved'])} {_UNITS[resource]}{share}")
    return lines


def _tasks(plan: Mapping[str, Any]) -> Any:
    from vlmopt.report import Table

    rows = []
    for task in plan["tasks"]:
        rows.append((task["task"], "this cut", *_predicted(task), ""))
        alone = task.get("alone")
        if alone is not None:
            macs = alone["saves"]["macs"]["saved"]
            shared = f"{alone['n_shared']} of {alone['n_cut']}, {_more(macs, plan['saves']['macs']['saved'])}"
            rows.append((task["task"], "a cut of its own", *_predicted(alone), shared))
        elif "why_not" in task:
            rows.append((task["task"], "a cut of its own", "", "", "", "none meets the budgets"))
    unit = plan["tasks"][0]["unit"]
    columns = ("task", "", "sites", f"predicted {unit}", "predicted drop (points)", "shared with this cut")
    note = (
        "Predicted by adding up single scores and interactions; ± is one standard error, as if scores were independent."
    )
    return Table("What it costs", columns, tuple(rows), n_text_columns=2, note=note)


def _predicted(found: Mapping[str, Any]) -> tuple[str, str, str]:
    drop = "not in the profile"
    if found["drop_points"] is not None:
        drop = _with_error(found["drop_points"], found["drop_error"], digits=2)
    return str(found["n_cut"]), _with_error(found["loss"], found["loss_error"], digits=4), drop


def _more(alone: float, together: float) -> str:
    from vlmopt.report.tables import count

    if alone == together:
        return "saves as much"
    return f"saves {count(abs(alone - together))} MACs {'more' if alone > together else 'less'}"


def _with_error(value: float, error: float | None, *, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
