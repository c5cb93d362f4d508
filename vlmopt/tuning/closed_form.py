"""Closed-form recovery: the task head is re-fitted by least squares, without a gradient step."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Outputs, Workload
from vlmopt.graph.head import head_features, head_module
from vlmopt.graph.refit import refit_heads
from vlmopt.graph.replay import run_component


def has_unfitted_head(program: Program) -> bool:
    """Whether a head is still all zeros: a task that brings its own head gives it no values."""
    heads = program.heads.items()
    return any(not bool(head_module(program.components[name], path).weight.any()) for name, path in heads)


def recover_heads(
    program: Program,
    workload: Workload,
    reference: Outputs,
    *,
    components: frozenset[str],
    progress: Progress,
    seed: int,
) -> Program:
    """The program with the heads of these components fitted on the workload; the others stay as they are.

    Args:
        reference: the original program's outputs on the same samples, which heads without labels reproduce.
    """
    features: dict[str, Tensor] = {}
    for name in sorted(components & program.components.keys()):
        component, feeds = program.components[name], workload.feeds[name]
        target = head_features(component, program.heads.get(name))
        tracked = progress.track(feeds, f"fitting the head of {name}", total=len(feeds))
        features[name] = run_component(component, tracked, target)
    with torch.no_grad():
        return refit_heads(program, features, workload, reference, seed=seed)
