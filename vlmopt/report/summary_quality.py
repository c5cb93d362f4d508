"""The sentences of the summary about quality: what the task loses, where, and how sure that is."""

from __future__ import annotations

from vlmopt.report import naming
from vlmopt.report.quantities import drop_text, p_text, percent, plural
from vlmopt.report.schema import GateSection, GroupSection, MetricSection, Report

_N_GROUPS = 3
_N_LETTERS = 60
_SIGNIFICANT = 0.05
_FEW = 100


def is_clear_loss(metric: MetricSection) -> bool:
    """Whether both the interval and the test say that the compiled model is worse."""
    return metric.drop_interval95[0] > 0 and (metric.p_value is None or metric.p_value < _SIGNIFICANT)


def is_clear_gain(metric: MetricSection) -> bool:
    """Whether both the interval and the test say that the compiled model is better."""
    return metric.drop_interval95[1] < 0 and (metric.p_value is None or metric.p_value < _SIGNIFICANT)


def change_of(metric: MetricSection) -> str:
    """`0.5 points less`, `0.5 points more`, `unchanged`."""
    if metric.drop_points == 0:
        return "unchanged"
    return f"{drop_text(abs(metric.drop_points))} points {'less' if metric.drop_points > 0 else 'more'}"


def costs(report: Report) -> list[str]:
    """How far the metric falls or rises."""
    metric = report.result.metric
    if metric is None:
        return ["Not measured, since no task was given."] if report.task is None else ["Not measured."]
    name = metric.name[:1].upper() + metric.name[1:]
    low, high = metric.drop_interval95
    if metric.drop_points == 0:
        spread = "" if low == high == 0 else f" (95 % interval of the change: {_range(-high, -low)} points)"
        return [f"{name} stays at {percent(metric.optimized)}{spread}.", *_removed(metric), *_simulated(metric)]
    falls = metric.drop_points > 0
    bounds = _range(low, high) if falls else _range(-high, -low)
    verb, noun = ("falls", "fall") if falls else ("rises", "rise")
    change = f"{name} {verb} by {drop_text(abs(metric.drop_points))} points"
    levels = f"from {percent(metric.original)} to {percent(metric.optimized)}"
    said = f"{change}, {levels} (95 % interval of the {noun}: {bounds} points)."
    return [said, *_removed(metric), *_simulated(metric)]


def _simulated(metric: MetricSection) -> list[str]:
    if metric.simulated is None:
        return []
    return [f"The quantized program as it was simulated has {percent(metric.simulated)}."]


def _removed(metric: MetricSection) -> list[str]:
    """The control: how the artifact does without the modules that were put into it."""
    removed = metric.removed
    if removed is None:
        return []
    points = drop_text(abs(removed.drop_points))
    change = "the same" if removed.drop_points == 0 else f"{points} points {_less(removed.drop_points)}"
    spread = f"95 % interval of the loss: {_range(*removed.drop_interval95)} points"
    return [f"With the {removed.what} removed it is {percent(removed.value)}, {change} ({spread})."]


def _less(drop: float) -> str:
    return "less" if drop > 0 else "more"


def worse(report: Report) -> list[str]:
    """Lost items and the groups that fall most."""
    metric = report.result.metric
    if metric is None:
        return []
    sentences = []
    changes = metric.changes
    if changes is not None:
        lost = f"{changes.n_lost} of {plural(changes.n, 'test item')} were right before and are wrong now"
        sentences.append(f"{lost}; {changes.n_gained} were wrong and are right now."
                         if changes.n_lost else "No test item that was right is wrong now.")  # fmt: skip
    fallen = sorted((group for group in metric.groups if group.drop_points > 0), key=lambda g: -g.drop_points)
    if fallen:
        shown = "; ".join(_group(group) for group in fallen[:_N_GROUPS])
        more = f" ({plural(len(fallen), 'group falls', 'groups fall')}, of {len(metric.groups)})"
        sentences.append(f"Largest falls by group{more}: {shown}.")
    elif metric.groups:
        sentences.append(f"None of the {plural(len(metric.groups), 'group')} of test items falls.")
    elif changes is None:
        sentences.append("Which items and groups get worse was not recorded.")
    return sentences


def sureness(report: Report) -> list[str]:
    """How many items, what the interval includes, what was unseen."""
    metric, task = report.result.metric, report.task
    if metric is None or task is None:
        return []
    used = f"{plural(task.n_profile, 'item')} for profiling and fitting, {task.n_validation} for planning"
    unseen = f"Both models answered the same {plural(metric.n, 'test item')}; no earlier step saw them ({used})."
    sentences = [unseen, _chance(metric)]
    allowed, gate = naming.allowed_drop(report), naming.drop_gate(report)
    if gate is not None and gate.name.endswith(")"):
        sentences.append(_worst_task(gate))
    elif allowed is not None:
        sentences.append(_against_bound(metric, allowed))
    low, high = metric.drop_interval95
    if metric.n < _FEW:
        half = drop_text((high - low) / 2)
        sentences.append(f"With only {plural(metric.n, 'item')}, changes below about {half} points cannot be seen.")
    return sentences


def _chance(metric: MetricSection) -> str:
    low, high = metric.drop_interval95
    p_value = "" if metric.p_value is None else f" ({p_text(metric.p_value)})"
    if is_clear_loss(metric):
        return f"The fall is more than chance: its interval is above zero{p_value}."
    if is_clear_gain(metric):
        return f"The rise is more than chance: its interval is above zero{p_value}."
    if low == high == 0:
        return "Every item scores as before."
    if low <= 0 <= high:
        return f"The change may be chance: its interval includes zero{p_value}."
    return f"The change is on the border of chance: interval and test do not agree{p_value}."


def _worst_task(gate: GateSection) -> str:
    """Of several tasks, each with a gate of its own, the one that fares worst."""
    task, verdict = gate.name.rpartition(" (")[2].removesuffix(")"), "within" if gate.passed else "more than"
    lost = drop_text(float(gate.found or 0))
    return f"The task that fares worst, {task}, loses {lost} points: {verdict} what is allowed."


def _against_bound(metric: MetricSection, allowed: float) -> str:
    upper, bound = metric.drop_interval95[1], naming.points_words(allowed)
    if metric.drop_points > allowed:
        return f"The fall is larger than the {bound} allowed."
    if upper > allowed:
        return (
            f"What was measured is within the {bound} allowed, but the interval reaches "
            f"{drop_text(upper)}: more test items would tell."
        )
    reach = f", {drop_text(upper)} points," if upper > 0 else ""
    return f"Even the worst end of the interval{reach} is within the {bound} allowed."


def _group(group: GroupSection) -> str:
    interval = group.drop_interval95
    spread = f", 95 % interval {_range(*interval)}" if interval else ", too few for an interval"
    levels = f"{percent(group.original)} → {percent(group.optimized)}"
    name = group.name if len(group.name) <= _N_LETTERS else f"{group.name[: _N_LETTERS - 1]}…"
    return f"“{name}” {levels} ({plural(group.n, 'item')}{spread})"


def _range(low: float, high: float) -> str:
    return f"{_minus(low)} to {_minus(high)}"


def _minus(value: float) -> str:
    return drop_text(value).replace("-", "−")
