"""A report as a few tables of text, which the terminal and Markdown both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmopt.report.quantities import count as count
from vlmopt.report.quantities import energy, other_metrics, percents, points, value_text
from vlmopt.report.savings import following, savings
from vlmopt.report.schema import BranchSection, CostSection, PassSection, Report, ResultSection
from vlmopt.report.table import Table

_N_GROUPS = 10


def report_tables(report: Report) -> list[Table]:
    """Before and after, groups, what was cut, passes, gates and stages; a table without rows is left out."""
    makers = (
        *(_before_after, _groups, _branches, savings, following, _recovery, _traversals, _mixtures),
        *(_passes, _refusals, _gates, _stages),
    )
    return [table for table in (make(report) for make in makers) if table.rows]


def _before_after(report: Report) -> Table:
    result = report.result
    rows: list[tuple[str, ...]] = []
    note = ""
    if result.metric is not None:
        metric = result.metric
        before = f"{points(metric.original)} {_interval(metric.original_interval95)}"
        after = f"{points(metric.optimized)} {_interval(metric.optimized_interval95)}"
        rows.append((f"{metric.name} (%)", before, after, f"{0 - metric.drop_points:+.1f} points"))
        for name, (original, optimized) in other_metrics(metric).items():
            change = f"{100 * (optimized - original):+.1f} points"
            rows.append((f"{name} (%)", points(original), points(optimized), change))
        if metric.removed is not None:
            removed, label = metric.removed, f"{metric.name} without {metric.removed.what} (%)"
            change = f"{100 * (removed.value - metric.original):+.1f} points"
            rows.append((label, points(metric.original), points(removed.value), change))
        low, high = metric.drop_interval95
        p_value = f", p = {metric.p_value:.2g}" if metric.p_value is not None else ""
        note = f"Drop {metric.drop_points:.1f} points (95 % interval {low:.1f} to {high:.1f}{p_value}), n = {metric.n}."
        if metric.changes is not None:
            lost, gained = metric.changes.n_lost, metric.changes.n_gained
            note += f" {lost} right answers became wrong, {gained} wrong ones right."
    rows += _cost_rows(result.cost.original, result.cost.optimized)
    if result.size_bytes is not None:
        size = result.size_bytes
        change = _factor(size.original, size.optimized)
        rows.append(("size on disk (B)", count(size.original), count(size.optimized), change))
    for name, pair in result.latency_ms.items():
        after = f"{pair.optimized.median_ms:.2f}" if pair.optimized else "gone"
        ratio = f"{pair.ratio:.2f} times faster" if pair.ratio else ""
        rows.append((f"{name} latency (ms)", f"{pair.original.median_ms:.2f}", after, ratio))
    rows += _energy_rows(result)
    if result.energy:
        note = f"{note} {result.energy[0].upper()}{result.energy[1:]}.".strip()
    return Table("Before and after", ("", "original", "optimized", "change"), tuple(rows), note=note)


def _energy_rows(result: ResultSection) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, pair in result.latency_ms.items():
        before = pair.original.joules
        after = pair.optimized.joules if pair.optimized else None
        if before is not None:
            shown = "gone" if pair.optimized is None else "" if after is None else energy(after)
            rows.append((f"{name} energy", energy(before), shown, _factor(before, after or 0.0)))
    return rows


def _cost_rows(original: CostSection, optimized: CostSection) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for label, field in (
        ("parameters", "parameters"),
        ("parameters (B)", "parameters_bytes"),
        ("MACs for one sample", "macs"),
        ("activations (B)", "activation_bytes"),
        ("KV cache of a token (B)", "kv_cache_bytes_per_token"),
    ):
        before, after = getattr(original, field), getattr(optimized, field)
        if before or after:
            rows.append((label, count(before), count(after), _factor(before, after)))
    return rows


def _factor(before: float, after: float) -> str:
    if not before or not after or before == after:
        return ""
    return f"{before / after:.2f} times smaller" if before > after else f"{after / before:.2f} times larger"


def _interval(bounds: tuple[float, float]) -> str:
    return f"[{points(bounds[0])}, {points(bounds[1])}]"


def _groups(report: Report) -> Table:
    groups = report.result.metric.groups if report.result.metric else ()
    worst = sorted(groups, key=lambda group: -group.drop_points)[:_N_GROUPS]
    rows = []
    for group in worst:
        spread = group.drop_interval95
        interval = f"{spread[0]:.1f} to {spread[1]:.1f}" if spread else ""
        levels = (points(group.original), points(group.optimized))
        rows.append((group.name, str(group.n), *levels, f"{group.drop_points:.1f}", interval))
    note = f"{len(worst)} of {len(groups)} groups, largest drop first; the intervals hold for each group alone."
    columns = ("group", "items", "original (%)", "optimized (%)", "drop (points)", "95 % interval")
    return Table("By group", columns, tuple(rows), note=note)


def _branches(report: Report) -> Table:
    has_cut = any(not branch.kept for branch in report.branches)
    rows = tuple(_branch_row(branch) for branch in report.branches) if has_cut else ()
    n_kept = sum(branch.kept for branch in report.branches)
    note = f"{n_kept} of {len(report.branches)} branches are kept. Importance: how much the loss grows without it."
    if report.plan is not None:
        plan = report.plan
        found = f"{plan.drop_points:.1f} ± {plan.stderr_points:.1f} points on {plan.n_items} items"
        bounds = [] if plan.max_drop_points is None else [f"{plan.max_drop_points:g} allowed"]
        bounds += [f"within {', '.join(plan.limits)}"] if plan.limits else []
        note += f" Of {len(plan.trials)} cuts tried, the chosen one dropped {found} ({'; '.join(bounds)})."
        if plan.kept_out_drop_points is not None:
            kept_out = f"{plan.kept_out_drop_points:.1f} ± {plan.kept_out_stderr_points or 0.0:.1f} points"
            note += f" On items that no search looked at it dropped {kept_out}."
        note += "".join(f" Note: {text}." for text in plan.notes)
    columns = ("component", "branch", "kind", "", "parameters", "MACs", "importance")
    return Table("What was cut", columns, rows, n_text_columns=4, note=note)


def _branch_row(branch: BranchSection) -> tuple[str, ...]:
    score = "" if branch.score is None else f"{branch.score:.4f}"
    if branch.score is not None and branch.stderr is not None:
        score += f" ± {branch.stderr:.4f}"
    sure = f" ({branch.certainty})" if branch.certainty else ""
    kept = "kept" if branch.kept else f"cut{sure}"
    return branch.component, branch.name, branch.kind, kept, count(branch.params), count(branch.macs), score


def _recovery(report: Report) -> Table:
    columns = ("epoch", "training loss", "validation loss", "validation metric (%)", "seconds")
    if report.recovery is None:
        return Table("Recovery", columns, ())
    found = report.recovery
    rows = []
    for epoch in found.epochs:
        loss = "" if epoch.train_loss is None else f"{epoch.train_loss:.4f}"
        is_best = " (kept)" if epoch.number == found.best_epoch else ""
        numbers = (loss, f"{epoch.validation_loss:.4f}", points(epoch.validation_score), f"{epoch.seconds:.1f}")
        rows.append((f"{epoch.number}{is_best}", *numbers))
    note = f"{count(found.n_trainable)} {found.level} were trained; epoch 0 is the program before."
    return Table("Recovery", columns, tuple(rows), note=note)


def _traversals(report: Report) -> Table:
    columns = ("component", "layer", "pass", "in the artifact", "mean gate", "spread")
    rows = tuple(
        (one.component, one.layer, str(one.number + 1), "yes" if one.is_kept else "no", f"{one.mean:.4f}",
         f"{one.spread:.4f}")
        for one in report.traversals
    )  # fmt: skip
    note = "What the gate lets through on the tokens of the task; spread is the standard deviation."
    return Table("Traversed layers", columns, rows, n_text_columns=4, note=note)


def _mixtures(report: Report) -> Table:
    columns = ("component", "layer", "mixture", "shares (%)", "spread (%)")
    rows = tuple(
        (one.component, one.layer, "of the data" if one.is_routed else "learned", percents(one.shares),
         percents(one.spread) if one.is_routed else "")
        for one in report.mixtures
    )  # fmt: skip
    note = "How much each expert counts beside a layer; spread is the standard deviation over samples of the task."
    return Table("Mixtures of experts", columns, rows, n_text_columns=3, note=note)


def _passes(report: Report) -> Table:
    columns = ("pass", "promise", "verdict", "sites", "applied", "refused", "predicted MACs", "counted MACs",
               "predicted parameters", "counted parameters")  # fmt: skip
    note = "Predicted by the plan and counted on the graph afterwards; both are savings."
    return Table("Passes", columns, tuple(_pass_row(step) for step in report.passes), n_text_columns=3, note=note)


def _pass_row(step: PassSection) -> tuple[str, ...]:
    numbers = (str(step.n_sites), str(step.n_applied), str(len(step.refusals)))
    macs = (count(step.predicted.macs), count(step.counted.macs))
    parameters = (count(step.predicted.parameters), count(step.counted.parameters))
    return (f"{step.step} {step.name}", step.promise, step.verdict, *numbers, *macs, *parameters)


def _refusals(report: Report) -> Table:
    """Refusals grouped by reason: a pass may refuse a hundred candidates for one reason."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for step in report.passes:
        for refusal in step.refusals:
            grouped.setdefault((step.name, refusal.reason), []).append(refusal.name)
    rows = tuple((name, reason, names[0], str(len(names))) for (name, reason), names in grouped.items())
    return Table("Left alone", ("pass", "reason", "first of them", "number"), rows, n_text_columns=3)


def _gates(report: Report) -> Table:
    return gates_table([gate.model_dump() for gate in report.gates])


def gates_table(gates: Sequence[Mapping[str, Any]]) -> Table:
    """Gates as JSON holds them: name, passed, found, allowed."""
    verdicts = {True: "passed", False: "FAILED"}
    rows = tuple((g["name"], verdicts[g["passed"]], value_text(g["found"]), value_text(g["allowed"])) for g in gates)
    return Table("Gates", ("gate", "verdict", "found", "allowed"), rows, n_text_columns=2)


def _stages(report: Report) -> Table:
    rows = tuple((stage.name, f"{stage.seconds:.1f}") for stage in report.stages)
    total = sum(stage.seconds for stage in report.stages)
    return Table("Stages", ("stage", "seconds"), rows, note=f"{total:.1f} s in all.")
