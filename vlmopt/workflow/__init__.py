"""The only room that knows the order of the stages.

Names are imported when they are asked for: `vlmopt plan` works on profiles alone, and torch takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmopt.workflow.artifact import bench_artifact, verify_artifact
    from vlmopt.workflow.bisecting.search import bisect, judge_again, scratch_path
    from vlmopt.workflow.confusing import make_triples
    from vlmopt.workflow.departures import worst_nodes
    from vlmopt.workflow.device_predicting import predict_model
    from vlmopt.workflow.device_profiling import export_operations, import_results, profile_device
    from vlmopt.workflow.evaluating import evaluate
    from vlmopt.workflow.explaining import Explanation, explain
    from vlmopt.workflow.inspecting import inspect_model
    from vlmopt.workflow.optimizing import optimize
    from vlmopt.workflow.profiling import profile_model
    from vlmopt.workflow.rechecking import recheck
    from vlmopt.workflow.session_tuning import tune_session
    from vlmopt.workflow.watching.observing import Watch

_MODULES = {
    "Explanation": "explaining",
    "Watch": "watching.observing",
    "bench_artifact": "artifact",
    "bisect": "bisecting.search",
    "evaluate": "evaluating",
    "explain": "explaining",
    "export_operations": "device_profiling",
    "import_results": "device_profiling",
    "inspect_model": "inspecting",
    "judge_again": "bisecting.search",
    "make_triples": "confusing",
    "optimize": "optimizing",
    "predict_model": "device_predicting",
    "profile_device": "device_profiling",
    "profile_model": "profiling",
    "recheck": "rechecking",
    "scratch_path": "bisecting.search",
    "tune_session": "session_tuning",
    "verify_artifact": "artifact",
    "worst_nodes": "departures",
}

__all__ = [
    "Explanation",
    "Watch",
    "bench_artifact",
    "bisect",
    "evaluate",
    "explain",
    "export_operations",
    "import_results",
    "inspect_model",
    "judge_again",
    "make_triples",
    "optimize",
    "predict_model",
    "profile_device",
    "profile_model",
    "recheck",
    "scratch_path",
    "tune_session",
    "verify_artifact",
    "worst_nodes",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
