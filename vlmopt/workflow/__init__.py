"""The only room that knows the order of the stages."""

from vlmopt.workflow.artifact import bench_artifact, verify_artifact
from vlmopt.workflow.bisecting.search import bisect, judge_again, scratch_path
from vlmopt.workflow.departures import worst_nodes
from vlmopt.workflow.evaluating import evaluate
from vlmopt.workflow.explaining import Explanation, explain
from vlmopt.workflow.inspecting import inspect_model
from vlmopt.workflow.optimizing import optimize
from vlmopt.workflow.profiling import profile_model
from vlmopt.workflow.watching.observing import Watch

__all__ = [
    "Explanation",
    "Watch",
    "bench_artifact",
    "bisect",
    "evaluate",
    "explain",
    "inspect_model",
    "judge_again",
    "optimize",
    "profile_model",
    "scratch_path",
    "verify_artifact",
    "worst_nodes",
]
