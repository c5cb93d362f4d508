"""What things are called in a report: the model, the run, its components, the allowed drop."""

from __future__ import annotations

from collections.abc import Sequence

from vlmopt.report.schema import BranchSection, GateSection, LatencyPair, Report

_KINDS = {"attention": "attention", "cross_attention": "cross-attention", "ffn": "feed-forward", "other": "other"}


def model_name(report: Report) -> str:
    """The last part of the model's path."""
    return report.model.path.rstrip("/").rsplit("/", 1)[-1] or report.model.architecture


def heading(report: Report) -> str:
    """The title of a report."""
    name = model_name(report)
    return f"{name} for {report.task.name}" if report.task else name


def component_words(name: str) -> str:
    """image_encoder -> the image encoder."""
    return f"the {name.replace('_', ' ')}"


def kind_words(kind: str) -> str:
    return _KINDS.get(kind, kind.replace("_", " "))


def by_component(branches: Sequence[BranchSection]) -> dict[str, list[BranchSection]]:
    """Branches of every component, in the order of the model."""
    grouped: dict[str, list[BranchSection]] = {}
    for branch in branches:
        grouped.setdefault(branch.component, []).append(branch)
    return grouped


def is_gone(report: Report, component: str, pair: LatencyPair) -> bool:
    """Whether a component has no second latency because it is not there any more, rather than not timed."""
    return pair.optimized is None and all(branch.component != component for branch in report.branches)


def drop_gate(report: Report) -> GateSection | None:
    """The gate on the metric of the test split, where the recipe has one; of several tasks the one that fares worst."""
    metric = report.result.metric
    if metric is None:
        return None
    gates = [gate for gate in report.gates if gate.name.startswith(f"drop of {metric.name}")]
    return max(gates, key=_excess, default=None)


def _excess(gate: GateSection) -> float:
    """By how much the gate is missed; below zero where it is not."""
    found, allowed = gate.found, gate.allowed
    return found - allowed if isinstance(found, float | int) and isinstance(allowed, float | int) else 0.0


def allowed_drop(report: Report) -> float | None:
    """The drop in points that the run was allowed; None where nobody set a bound."""
    gate = drop_gate(report)
    if gate is not None and isinstance(gate.allowed, float | int):
        return float(gate.allowed)
    return report.plan.max_drop_points if report.plan else None


def points_words(bound: float) -> str:
    """`1 point`, `2.5 points`."""
    return f"{bound:g} point" if bound == 1 else f"{bound:g} points"
