"""The plots of the page: metric and drop with their intervals, times, and what the planner tried."""

from __future__ import annotations

import math
import re

from markupsafe import Markup

from vlmopt.report import naming, plots
from vlmopt.report.quantities import drop_text, points
from vlmopt.report.schema import MixtureSection, Report, TrialSection

_CEILING = 4.0  # the plot of what was tried ends at so many times the allowed drop


def metric_plots(report: Report) -> tuple[Markup, Markup] | None:
    """The metric before and after, and its drop beside zero and the bound; None without a task."""
    metric = report.result.metric
    if metric is None:
        return None
    rows = [
        _whisker("original", metric.original, metric.original_interval95, "before"),
        _whisker("compiled", metric.optimized, metric.optimized_interval95, "after"),
    ]
    levels = plots.whisker_plot(rows, title=f"{metric.name} before and after, with 95 % intervals", unit=" %")
    low, high = metric.drop_interval95
    text = f"{drop_text(metric.drop_points)} [{drop_text(low)} to {drop_text(high)}] points".replace("-", "−")
    drop = plots.Whisker("drop", metric.drop_points, low, high, text, "after")
    lines = [plots.Line(0.0, "no change")]
    allowed = naming.allowed_drop(report)
    if allowed is not None:
        lines.append(plots.Line(allowed, f"allowed {allowed:g}", "limit"))
    title = f"drop of {metric.name} in points, with its 95 % interval"
    return levels, plots.whisker_plot([drop], title=title, unit="", lines=lines)


def latency_plots(report: Report) -> list[tuple[str, Markup]]:
    """A distribution for every component, with the name of the component."""
    shown = []
    for name, pair in report.result.latency_ms.items():
        sides = [("original", pair.original, "before")]
        if pair.optimized is not None:
            sides.append(("compiled", pair.optimized, "after"))
        rows = [
            plots.Distribution(label, side.samples_ms, side.p10_ms, side.median_ms, side.p90_ms, kind)
            for label, side, kind in sides
        ]
        shown.append((name, plots.latency_plot(rows, title=f"latency of {name} in milliseconds")))
    return shown


def traversal_plot(report: Report) -> Markup | None:
    """The gate of every pass through a traversed layer, mean and one standard deviation to both sides."""
    if not report.traversals:
        return None
    rows = []
    for one in report.traversals:
        again = f", pass {one.number + 1}" if one.number > 1 else ""
        text = f"{one.mean:.3f} ± {one.spread:.3f}" + ("" if one.is_kept else ", dropped")
        bounds = one.mean - one.spread, one.mean + one.spread
        kind = "after" if one.is_kept else "before"
        rows.append(plots.Whisker(f"{one.component}/{one.layer}{again}", one.mean, *bounds, text, kind))
    title = "gate of every traversed layer: mean and standard deviation over the tokens of the task"
    return plots.whisker_plot(rows, title=title, unit="", lines=[plots.Line(0.0, "closed")])


def mixture_plots(report: Report) -> list[tuple[str, Markup]]:
    """For every family of layers that share their experts a row of tiles an expert, a column a layer."""
    families: dict[tuple[str, int], list[MixtureSection]] = {}
    for one in report.mixtures:
        words = re.sub(r"\.\d+(?=\.|$)", ".N", one.layer)
        families.setdefault((f"{one.component}/{words}", len(one.shares)), []).append(one)
    shown = []
    for (name, n_experts), layers in families.items():
        values = [one.shares[expert] for expert in range(n_experts) for one in layers]
        labels = [f"{one.layer}, expert {expert + 1}" for expert in range(n_experts) for one in layers]
        text = (
            f"{name}: {len(layers)} layers, {n_experts} experts, {100 * min(values):.3g} to {100 * max(values):.3g} %"
        )
        shown.append((text, plots.tile_plot(values, n_columns=len(layers), title=text, labels=labels)))
    return shown


def through_plots(report: Report) -> list[tuple[str, Markup]]:
    """What a cross-modal adapter adds to places of an image, in rows as they lie there, and to words."""
    found = report.through
    if found is None:
        return []
    shown = []
    if found.places:
        side = math.isqrt(len(found.places))
        columns = side if side * side == len(found.places) else min(len(found.places), 16)
        text = f"from {100 * min(found.places):.3g} to {100 * max(found.places):.3g} % of an image's feature"
        shown.append((text, plots.tile_plot(found.places, n_columns=columns, title=f"what is added, {text}")))
    rows = [
        plots.Whisker(word.text, share := 100 * word.share, share, share, f"{share:.3g} %, {word.n} times", "after")
        for word in found.words
    ]
    if rows:
        text = "of the commonest words"
        shown.append((text, plots.whisker_plot(rows, title=f"what is added, in percent {text}", unit=" %")))
    return shown


def trial_plot(report: Report) -> Markup | None:
    """What the planner tried: saved computation against the measured drop, its choice marked."""
    plan = report.plan
    if plan is None or not plan.trials:
        return None
    what, total = _resource(report)
    chosen = chosen_trial(report)
    # One cut that ruins the model would press all others onto the axis, so large drops lie on the upper edge.
    ceiling = _CEILING * max(plan.max_drop_points or 0.0, plan.drop_points, 0.25)
    dots = []
    for i, trial in enumerate(plan.trials):
        state = "accepted" if trial.is_accepted else "rejected"
        saved = 100 * _saved(report, trial) / total
        spread = f"{drop_text(trial.drop_points)} ± {drop_text(trial.stderr_points)} points"
        sites = f"{trial.n_cut} {'cut' if report.together is None else 'sites'}"
        title = f"{sites}, saves {saved:.0f} % of the {what}, drop {spread}, {state}"
        shown = min(trial.drop_points, ceiling)
        kind = "chosen" if i == chosen else plots.BEYOND if shown < trial.drop_points else state
        dots.append(plots.Dot(saved, shown, title, kind))
    dots.sort(key=lambda dot: dot.kind == "chosen")  # the chosen one is drawn over the others
    allowed = plan.max_drop_points
    title = "every cut that was tried: saved computation and measured drop, with the front"
    shown_front = [plan.trials[i] for i in trial_front(report) if plan.trials[i].drop_points <= ceiling]
    return plots.scatter_plot(
        dots,
        title=title,
        x_label=f"saved {what}",
        y_label="drop in points",
        y_line=None if allowed is None else plots.Line(allowed, f"allowed {allowed:g}", "limit"),
        x_unit=" %",
        front=[(100 * _saved(report, trial) / total, trial.drop_points) for trial in shown_front],
    )


def _resource(report: Report) -> tuple[str, float]:
    """What the planner saved of, and all of it: the time of one plan for several passes, MACs of cuts."""
    if report.together is not None:
        return "time", report.together.whole_us or 1.0
    trials = () if report.plan is None else report.plan.trials
    return "MACs", report.result.cost.original.macs or max(trial.saved_macs for trial in trials) or 1


def _saved(report: Report, trial: TrialSection) -> float:
    return trial.saved_macs if report.together is None else trial.saved_latency_us


def trial_front(report: Report) -> list[int]:
    """The trials that no other beats in both what they save and the measured drop, the one that saves least first."""
    if report.plan is None:
        return []
    trials = report.plan.trials
    front: list[int] = []
    for i in sorted(range(len(trials)), key=lambda i: (-_saved(report, trials[i]), trials[i].drop_points)):
        if not front or trials[i].drop_points < trials[front[-1]].drop_points:
            front.append(i)
    return front[::-1]


def chosen_trial(report: Report) -> int | None:
    """Which trial the planner chose; in older reports the first of the accepted ones that saves most."""
    if report.plan is None:
        return None
    marked = [i for i, trial in enumerate(report.plan.trials) if trial.is_chosen]
    if marked:
        return marked[0]
    accepted = [(trial.saved_macs, -i) for i, trial in enumerate(report.plan.trials) if trial.is_accepted]
    return -max(accepted)[1] if accepted else None


def _whisker(label: str, value: float, bounds: tuple[float, float], kind: str) -> plots.Whisker:
    low, high = bounds
    text = f"{points(value)} % [{points(low)} to {points(high)}]"
    return plots.Whisker(label, 100 * value, 100 * low, 100 * high, text, kind)
