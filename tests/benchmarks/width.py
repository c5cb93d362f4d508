"""Widths at equal MACs: what the task says is needed, with and without compensation, against magnitudes of weights.

Four layers of the real dual encoder's vision tower stay for `style`; of each a share of the hidden channels and of the
heads. All variants cut as much, fit the head anew on the same drawings, and are judged on the validation split.
`ours` compensates, `plain` is the same criterion without compensation, `magnitude` is Torch-Pruning's
`MagnitudeImportance` (L2, mean over the group), a head's importance that of its channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor

from tests.benchmarks import towers
from vlmopt.core.contract import Context
from vlmopt.core.program import Component, Program
from vlmopt.core.progress import Silent
from vlmopt.graph.branches import BranchKind, find_branches
from vlmopt.graph.costing import program_cost
from vlmopt.graph.modules import make_code
from vlmopt.graph.narrowing import narrowed
from vlmopt.graph.widths import Group, find_head_groups, find_hidden
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import clone_program, run_step
from vlmopt.tuning.closed_form import recover_heads
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.answering import program_outputs
from vlmopt.workflow.opening import OpenedTask, open_model, open_task
from vlmopt.workflow.requested import requested_statistics

TASK = "style"
CUT = {"branches": ["*.layer.[4-9].*", "*.layer.1[01].*"]}
SHARES = (0.75, 0.5, 0.25)
N_FIT, N_CHECK = 1200, 1276
FINDING = {BranchKind.FFN: find_hidden, BranchKind.ATTENTION: find_head_groups}


def parts() -> Mapping[str, Callable[[], Mapping[str, float | str]]]:
    """What can be measured on its own."""
    return {f"width-{TASK}": figures}


def figures() -> dict[str, float]:
    """Percent right on validation and multiply-accumulates, by variant and share."""
    folder = towers.cache() / "emoji"
    opened = open_model(str(folder / "model"), device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    bound = open_task(opened, str(folder / "tasks" / TASK), seed=0, progress=Silent())
    program = bound.program
    for name, options in (("canonicalize", {}), ("skip-branches", CUT)):
        program = run_step(program, make_pass(name, options), Context(), step=1).program
    whole = _scores("whole", program, bound)
    found = {"whole_percent": 100 * float(whole.mean()), "whole_gmacs": program_cost(program).macs / 1e9}
    for share in SHARES:
        variants = {
            "ours": partial(_ours, program, bound, share, compensate=True),
            "plain": partial(_ours, program, bound, share, compensate=False),
            "magnitude": partial(by_magnitude, program, share),
        }
        for name, made in variants.items():
            cut = made()
            scores = _scores(name, cut, bound)
            lost = paired_difference(whole, scores, seed=0)
            key = f"{name}_{share:g}"
            found |= {f"{key}_percent": 100 * float(scores.mean()), f"{key}_gmacs": program_cost(cut).macs / 1e9}
            found |= {
                f"{key}_drop": lost.drop_points,
                f"{key}_drop_low": lost.interval95[0],
                f"{key}_drop_high": lost.interval95[1],
            }
    return found


def _scores(name: str, program: Program, bound: OpenedTask) -> Tensor:
    """Which items of the validation split a program gets right, its head fitted."""
    fit = bound.source.workload(program, "profile", limit=N_FIT)
    check = bound.source.workload(program, "validation", limit=N_CHECK)
    parts = frozenset(program.components)
    fitted = recover_heads(program, fit, {}, components=parts, progress=Silent(), seed=0)
    return check.item_scores(program_outputs(fitted, check, what=name, progress=Silent()))


def _ours(program: Program, bound: OpenedTask, share: float, *, compensate: bool) -> Program:
    for step, name in enumerate(("prune-ffn", "prune-heads"), 1):
        pass_ = make_pass(name, {"keep": share, "compensate": compensate})
        known = requested_statistics(pass_, program, bound, Silent(), step=step, num_samples=None)
        program = run_step(program, pass_, Context(statistics=known), step=step).program
    return program


def by_magnitude(program: Program, share: float) -> Program:
    """Every width cut to this share by the magnitudes of weights; a unit at least stays."""

    def largest(component: Component, group: Group) -> list[int]:
        found: list[int] = _importance(component, group).topk(n_kept(share, group)).indices.sort().values.tolist()
        return found

    return with_widths(program, largest)


def with_widths(program: Program, keep: Callable[[Component, Group], list[int]], **how: Any) -> Program:
    """A clone with every width cut to the units that `keep` names; `how` as for `narrowed`."""
    made = clone_program(program)
    for name in list(made.components):
        for branch in find_branches(made.components[name].graph):
            component = made.components[name]
            group = FINDING[branch.kind](made, component, branch) if branch.kind in FINDING else None
            if isinstance(group, Group):
                made.components[name] = narrowed(component, group, keep(component, group), **how)
    return made


def n_kept(share: float, group: Group) -> int:
    """How many units of a group stay."""
    return max(1, round(share * group.n_units))


def _importance(component: Component, group: Group) -> Tensor:
    """Torch-Pruning's importance of every unit, [U]: the sum over its channels."""
    graph = copy.deepcopy(component.graph).requires_grad_(True)  # it follows gradients
    make_code(graph)
    (spec,) = component.inputs
    example = torch.zeros([size if isinstance(size, int) else 1 for size in spec.shape])
    dependencies = torch_pruning.DependencyGraph().build_dependency(graph, example_inputs=example)
    node = group.producers[0]
    root, units = graph.get_submodule(str(node.target)), group.layouts[node].units
    whole = dependencies.get_pruning_group(root, torch_pruning.prune_linear_out_channels, idxs=list(range(len(units))))
    channels = torch_pruning.importance.MagnitudeImportance(p=2)(whole)
    return torch.zeros(group.n_units).index_add(0, units, channels.float())
