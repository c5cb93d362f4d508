"""Closed-form recovery: kept branches are fitted to what the original does, heads to the task; no gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.core.program import Component, Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed, Outputs, Workload
from vlmopt.graph.alike import run_both
from vlmopt.graph.head import head_features, head_module
from vlmopt.graph.refit import fit_head, prior_weight, refit_heads
from vlmopt.graph.relevance import token_relevance
from vlmopt.graph.replay import run_component
from vlmopt.tuning.compensation import Compensation, compensated


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
    names = sorted(components & program.components.keys())
    features = {name: _features(program, program.components[name], name, workload, progress) for name in names}
    with torch.no_grad():
        return refit_heads(program, features, workload, reference, seed=seed)


def _features(program: Program, component: Component, name: str, workload: Workload, progress: Progress) -> Tensor:
    """What the head of the component reads, for every sample."""
    feeds = progress.track(workload.feeds[name], f"features of {name}", total=len(workload.feeds[name]))
    return run_component(component, feeds, head_features(component, program.heads.get(name)))


def _features_of_both(
    program: Program, versions: tuple[Component, Component], name: str, workload: Workload, progress: Progress
) -> tuple[Tensor, Tensor]:
    first, second = versions
    head = program.heads.get(name)
    feeds = progress.track(workload.feeds[name], f"features of {name}", total=len(workload.feeds[name]))
    return run_both(first, second, feeds, (head_features(first, head), head_features(second, head)))


# Compensation looks at so many rows at once: their streams and one layer's hidden values are in memory together.
COMPENSATION_ROWS = 1024


@dataclass(frozen=True)
class Recovered:
    """The program with heads fitted; `compensations` by component, where they were better and so are taken over."""

    program: Program
    compensations: Mapping[str, tuple[Compensation, ...]]
    losses: Mapping[str, tuple[float, float]]  # by component: loss on `check` with heads alone, and compensated


def recover_closed_form(
    program: Program,
    original: Program,
    workload: Workload,
    check: Workload,
    reference: tuple[Outputs, Outputs],
    *,
    components: frozenset[str],
    progress: Progress,
    seed: int,
) -> Recovered:
    """Compensates the cut components and fits their heads; a component stays as it was cut where that is better.

    Better is the smaller task loss on `check`, which neither the fit of kept branches nor that of the head has seen.

    Args:
        original: the program before the cut, whose streams the kept branches are fitted to.
        reference: the original's outputs on the samples of both workloads.
    """
    sides = (workload, check)
    parts, features = dict(program.components), dict[str, Tensor]()
    taken, losses = dict[str, tuple[Compensation, ...]](), dict[str, tuple[float, float]]()
    for name in sorted(components & program.components.keys()):
        made, found = _compensated(program, original, name, workload, progress)
        if not found:
            features[name] = _features(program, parts[name], name, workload, progress)
            continue
        versions = (parts[name], made)
        fitting, checking = (_features_of_both(program, versions, name, side, progress) for side in sides)
        before, after = (
            _unseen_loss(program, name, pair, sides, reference, seed) for pair in zip(fitting, checking, strict=True)
        )
        losses[name], is_better = (before, after), after < before
        features[name] = fitting[is_better]
        if is_better:
            parts[name], taken[name] = made, found
    with torch.no_grad():
        better = refit_heads(program.with_components(parts), features, workload, reference[0], seed=seed)
    return Recovered(better, taken, losses)


def _compensated(
    program: Program, original: Program, name: str, workload: Workload, progress: Progress
) -> tuple[Component, tuple[Compensation, ...]]:
    if name not in original.components:
        return program.components[name], ()
    feeds: list[Feed] = []
    n_rows = 0
    for feed in workload.feeds[name]:
        feeds.append(feed)
        n_rows += len(next(iter(feed.values())))
        if n_rows >= COMPENSATION_ROWS:
            break
    component = original.components[name]
    features = head_features(component, original.heads.get(name))
    with progress.stage(f"compensation {name}"):
        relevance = token_relevance(component, features, feeds[0])
        return compensated(program.components[name], component, feeds, relevance)


def _unseen_loss(
    program: Program,
    name: str,
    features: tuple[Tensor, Tensor],
    workloads: tuple[Workload, Workload],
    references: tuple[Outputs, Outputs],
    seed: int,
) -> float:
    """Task loss on the second workload with these features, the head fitted on the first; all else is the reference.

    Args:
        features: what the component's head reads on either workload.
    """
    fitting, checking = features
    fit = fit_head(name, fitting, workloads[0], references[0], prior=prior_weight(program, name), seed=seed)
    outputs = {other: references[1][other] for other in references[1] if other != name}  # a lazy one runs what is asked
    outputs[name] = checking if fit is None else fit.outputs(checking)
    return float(workloads[1].losses(outputs).mean())
