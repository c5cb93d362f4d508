"""The only room that knows the order of the stages."""

from vlmopt.workflow.artifact import bench_artifact, verify_artifact
from vlmopt.workflow.evaluating import evaluate
from vlmopt.workflow.inspecting import inspect_model
from vlmopt.workflow.optimizing import optimize
from vlmopt.workflow.profiling import profile_model

__all__ = ["bench_artifact", "evaluate", "inspect_model", "optimize", "profile_model", "verify_artifact"]
