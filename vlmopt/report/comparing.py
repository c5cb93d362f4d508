"""Several runs beside each other, and what forbids to compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vlmopt.report import naming, plots
from vlmopt.report.quantities import count, milliseconds, percent, points, signed
from vlmopt.report.schema import Report
from vlmopt.report.summary_cost import total_latency
from vlmopt.report.table import Table


@dataclass(frozen=True)
class Run:
    """A report and what to call it."""

    label: str
    report: Report


@dataclass(frozen=True)
class Matrix:
    """Which branches of one model each run keeps; `rows` are (component, branch, kept or None where it has none)."""

    model: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[bool | None, ...]], ...]

    @property
    def differing(self) -> tuple[tuple[str, str, tuple[bool | None, ...]], ...]:
        """The rows in which the runs are not of one opinion."""
        return tuple(row for row in self.rows if len(set(row[2])) > 1)


@dataclass(frozen=True)
class Comparison:
    runs: tuple[Run, ...]
    warnings: tuple[str, ...]
    matrices: tuple[Matrix, ...]
    is_one_machine: bool
    is_one_task: bool


def compare(reports: Sequence[Report], labels: Sequence[str] = ()) -> Comparison:
    """Runs beside each other. Without labels they are called by their tasks; equal names get a number."""
    names = _distinct(list(labels) or [report.task.name if report.task else "(no task)" for report in reports])
    runs = tuple(Run(name, report) for name, report in zip(names, reports, strict=True))
    tests = {
        (r.task.kind, r.task.name, r.task.fingerprint, r.task.metric, r.task.n_test) if r.task else None
        for r in reports
    }
    machines = {(m.processor, m.n_cores, m.n_threads) if (m := report.machine) else None for report in reports}
    is_one_machine = len(machines) == 1 and None not in machines
    return Comparison(
        runs, tuple(_warnings(runs)), tuple(_matrices(runs)), is_one_machine, len(tests) == 1 and None not in tests
    )


def comparison_tables(comparison: Comparison) -> list[Table]:
    """One row a run, then the branches on which runs of one model differ."""
    rows = tuple(_row(comparison, run) for run in comparison.runs)
    quality = ("run", "task", "metric", "original", "optimized", "drop (points)", "checks")
    cost = ("branches kept", "parameters", "MACs", "speed-up", *(("latency",) if comparison.is_one_machine else ()))
    tables = [Table("Comparison", (*quality, *cost), rows, n_text_columns=3)]
    words = {True: "kept", False: "cut", None: ""}
    for matrix in comparison.matrices:
        cells = tuple((component, name, *(words[kept] for kept in row)) for component, name, row in matrix.differing)
        note = f"{len(cells)} of {len(matrix.rows)} branches of {matrix.model}; on all others the runs agree."
        if cells:
            tables.append(Table("Branches that differ", ("component", "branch", *matrix.labels), cells, 99, note))
    return tables


def comparison_plot(comparison: Comparison) -> Markup | None:
    """Quality against time where it was measured on one machine, else against computation; None below two points."""
    dots = [dot for run in comparison.runs if (dot := _dot(comparison, run)) is not None]
    if len(dots) < 2:
        return None
    x_label = "median latency, ms" if comparison.is_one_machine else "MACs for one sample, millions"
    y_label = "metric, %" if comparison.is_one_task else "change of the metric in points"
    title = f"{y_label} against {x_label}, a point for every run, with 95 % intervals"
    line = None if comparison.is_one_task else plots.Line(0.0, "no change", "zero")
    return plots.scatter_plot(dots, title=title, x_label=x_label, y_label=y_label, y_line=line)


def _dot(comparison: Comparison, run: Run) -> plots.Dot | None:
    metric, cost = run.report.result.metric, run.report.result.cost.optimized
    x = total_latency(run.report)[1] if comparison.is_one_machine else cost.macs / 1e6
    if metric is None or not x:
        return None
    if comparison.is_one_task:
        y, low, high = (100 * v for v in (metric.optimized, *metric.optimized_interval95))
    else:
        y, low, high = -metric.drop_points, -metric.drop_interval95[1], -metric.drop_interval95[0]
    where = milliseconds(x) if comparison.is_one_machine else f"{count(cost.macs)} MACs"
    title = f"{run.label}: {metric.name} {percent(metric.optimized)}, {signed(-metric.drop_points)} points, {where}"
    return plots.Dot(x, y, title, "after", low, high, run.label)


def _row(comparison: Comparison, run: Run) -> tuple[str, ...]:
    report = run.report
    metric, cost = report.result.metric, report.result.cost
    quality: tuple[str, ...] = ("", "", "", "")
    if metric is not None:
        quality = (metric.name, points(metric.original), points(metric.optimized), f"{metric.drop_points:.1f}")
    failed = sum(not gate.passed for gate in report.gates)
    checks = f"{failed} FAILED" if failed else f"{len(report.gates)} passed"
    n_kept = sum(branch.kept for branch in report.branches)
    kept = f"{n_kept} of {len(report.branches)}" if report.branches else ""
    ratios = [f"{name} {pair.ratio:.2f}" for name, pair in report.result.latency_ms.items() if pair.ratio]
    sizes = (
        f"{count(cost.original.parameters)} → {count(cost.optimized.parameters)}",
        f"{count(cost.original.macs)} → {count(cost.optimized.macs)}",
    )
    latency = total_latency(report)[1]
    shown = (milliseconds(latency) if latency else "",) if comparison.is_one_machine else ()
    task = report.task.name if report.task else "(none)"
    return (run.label, task, *quality, checks, kept, *sizes, ", ".join(ratios), *shown)


def _warnings(runs: Sequence[Run]) -> list[str]:
    reports = [run.report for run in runs]
    found = []
    if len({report.model.fingerprint for report in reports}) > 1:
        found.append("The runs start from different models: their originals differ, so only their results compare.")
    tasks = [report.task for report in reports]
    if any(task is None for task in tasks) and any(tasks):
        found.append("A run without a task has no quality to compare.")
    known = [task for task in tasks if task is not None]
    if len({(task.kind, task.name) for task in known}) > 1:
        found.append("The runs are for different tasks: their metrics do not compare, only their drops.")
    elif len({task.fingerprint for task in known}) > 1 or len({task.n_test for task in known}) > 1:
        found.append("The runs were measured on different data of the task: their metrics do not compare.")
    if len({task.metric for task in known}) > 1:
        found.append("The runs are judged by different metrics.")
    found += _machine_warnings(reports)
    found += [f"{run.label} failed a check: do not deploy it." for run in runs
              if not all(gate.passed for gate in run.report.gates)]  # fmt: skip
    return found


def _machine_warnings(reports: Sequence[Report]) -> list[str]:
    machines = [report.machine for report in reports]
    if any(machine is None for machine in machines):
        return ["Some runs do not say on which machine they were timed: latencies are not put side by side."]
    if len({(m.processor, m.n_cores, m.n_threads) for m in machines if m is not None}) > 1:
        return ["The runs were timed on different machines: latencies are not put side by side, only speed-ups."]
    return []


def _matrices(runs: Sequence[Run]) -> list[Matrix]:
    matrices = []
    for fingerprint in dict.fromkeys(run.report.model.fingerprint for run in runs):
        group = [run for run in runs if run.report.model.fingerprint == fingerprint and run.report.branches]
        if len(group) < 2:
            continue
        kept = [{(b.component, b.name): b.kept for b in run.report.branches} for run in group]
        keys = dict.fromkeys(key for column in kept for key in column)
        rows = tuple((*key, tuple(column.get(key) for column in kept)) for key in keys)
        matrices.append(Matrix(naming.model_name(group[0].report), tuple(run.label for run in group), rows))
    return matrices


def _distinct(labels: list[str]) -> list[str]:
    return [label if labels.count(label) == 1 else f"{label} ({labels[: i + 1].count(label)})"
            for i, label in enumerate(labels)]  # fmt: skip
