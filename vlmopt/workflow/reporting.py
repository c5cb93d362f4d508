"""The report of a run, from what the run knows: plain data that follows the schema of `report.json`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from vlmopt import __version__
from vlmopt.core import machine
from vlmopt.graph.costing import program_cost
from vlmopt.graph.traversal import find_traversals
from vlmopt.rewrite.pipeline import StepResult
from vlmopt.rundir import RECIPE
from vlmopt.workflow.branch_fates import branch_section
from vlmopt.workflow.evidence import Evidence
from vlmopt.workflow.run_state import RunState


def report_of(state: RunState, steps: Sequence[StepResult], evidence: Evidence) -> dict[str, Any]:
    """Everything that `report.json` holds; the resolved recipe is saved already."""
    source = state.original.source
    recipe = state.run.path(RECIPE)
    return {
        "schema": 1,
        "vlmopt": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "path": source.path,
            "model_type": source.model_type,
            "architecture": source.architecture,
            "fingerprint": source.fingerprint,
        },
        "task": _task_section(state, evidence),
        "result": _result_section(state, evidence),
        "passes": [_pass_section(state, result) for result in steps],
        "branches": branch_section(state, steps),
        "gates": [{"name": g.name, "passed": g.passed, "found": g.found, "allowed": g.allowed} for g in evidence.gates],
        "stages": [
            {"name": entry["stage"], "seconds": entry["seconds"]}
            for entry in state.ledger.entries
            if "seconds" in entry
        ],
        "plan": _plan_section(state),
        "together": state.together,
        "recovery": _recovery_section(state),
        "traversals": _traversal_section(state),
        "mixtures": [asdict(one) for one in state.mixtures],
        "through": state.through,
        "machine": _machine_section(evidence),
        "recipe": recipe.read_text(encoding="utf-8"),
        "reproduce": f"vlmopt optimize --recipe {shlex.quote(str(state.run.final / RECIPE))} -o NEW_FOLDER",
        "warnings": state.warnings,
    }


def _task_section(state: RunState, evidence: Evidence) -> dict[str, Any] | None:
    if state.bound is None or state.fit is None:
        return None
    task = state.bound.task
    return {
        "name": task.specification.name,
        "kind": task.specification.kind.value,
        "metric": task.specification.headline,
        "fingerprint": task.fingerprint,
        "n_profile": state.fit.n_items,
        "n_validation": task.counts["validation"],
        "n_test": evidence.n_test,
    }


def _result_section(state: RunState, evidence: Evidence) -> dict[str, Any]:
    return {
        "metric": evidence.metric,
        "cost": {
            "original": program_cost(state.original).as_dict(),
            "optimized": program_cost(state.optimized).as_dict(),
        },
        "latency_ms": evidence.latency_ms,
        "energy": evidence.energy,
        "size_bytes": evidence.size_bytes or None,
    }


def _pass_section(state: RunState, result: StepResult) -> dict[str, Any]:
    is_predicted = result.predicted.macs == result.counted.macs
    return {
        "step": result.step,
        "name": result.name,
        "promise": result.promise.value,
        "n_sites": len(result.plan.sites),
        "n_applied": len(result.applied),
        "sites": [
            {"name": s.name, "component": s.component, "summary": s.summary, "predicted": s.saving.as_dict()}
            for s in result.applied
        ],
        "refusals": [{"name": r.name, "component": r.component, "reason": r.reason} for r in result.refusals],
        "predicted": result.predicted.as_dict(),
        "counted": result.counted.as_dict(),
        "verdict": "saves what it predicted" if is_predicted else "saves other than it predicted",
        "seconds": _seconds(state, result),
    }


def _seconds(state: RunState, result: StepResult) -> float | None:
    """How long the step took, planning and measuring included; the last time, where a cut was chosen again."""
    stage = f"20-passes/{result.step:02d}-{result.name}"
    return next((entry["seconds"] for entry in reversed(state.ledger.entries) if entry["stage"] == stage), None)


def _recovery_section(state: RunState) -> dict[str, Any] | None:
    if state.tuned is None:
        return None
    return {
        "level": state.recipe.recovery.level,
        "n_trainable": state.tuned.n_trainable,
        "best_epoch": state.tuned.best,
        "epochs": [
            {name: value for name, value in asdict(epoch).items() if name != "part_scores"}
            for epoch in state.tuned.history
        ],
    }


def _traversal_section(state: RunState) -> list[dict[str, Any]]:
    """What the gates of traversed layers let through on the profile split, and which traversals are in the artifact."""
    components = state.optimized.components
    kept = {
        (name, one.site, number)
        for name, part in components.items()
        for one in find_traversals(part.graph)
        for number in range(1, len(one.gates) + 1)
    }
    found = state.traversal_gates.values()
    return [{**asdict(one), "is_kept": (one.component, one.layer, one.number) in kept} for one in found]


def _plan_section(state: RunState) -> dict[str, Any] | None:
    """What the planner measured; None where the recipe names every site, as the resolved one does."""
    choice = state.choice
    if choice is None:
        return None
    kept_out = choice.kept_out
    return {
        "max_drop_points": state.choice_max_drop,
        "limits": [f"{limit.quantity.value} {limit.text}" for limit in state.recipe.budgets.limits.resources],
        "kept_out_drop_points": None if kept_out is None else kept_out.drop_points,
        "kept_out_stderr_points": None if kept_out is None else kept_out.standard_error,
        "notes": choice.notes,
        "drop_points": choice.measurement.drop_points,
        "stderr_points": _or_nothing(choice.measurement.standard_error),
        "n_items": state.choice_items,
        "trials": [
            {
                "n_cut": trial.n_cut,
                "saved_macs": trial.macs,
                "drop_points": trial.measurement.drop_points,
                "stderr_points": trial.measurement.standard_error,
                "is_accepted": trial.is_accepted,
                "order": trial.order,
                "saved_latency_us": trial.latency_us,
                "saved_bytes": trial.size_bytes,
                "fits": trial.fits,
                "is_chosen": trial.names == choice.names,
            }
            for trial in choice.trials
            if math.isfinite(trial.measurement.cautious_drop)  # items of one group alone have no standard error
        ],
    }


def _or_nothing(error: float) -> float:
    """Items of one group have no standard error; the planner's notes say so."""
    return error if math.isfinite(error) else 0.0


def _machine_section(evidence: Evidence) -> dict[str, Any]:
    versions = machine.versions()
    return {
        "processor": machine.processor_name(),
        "n_cores": machine.n_cores(),
        "n_threads": evidence.n_threads or machine.n_cores(),
        "memory_bytes": machine.memory_bytes(),
        "system": machine.operating_system(),
        "python": versions.pop("python"),
        "versions": {"vlmopt": __version__, **versions},
    }
