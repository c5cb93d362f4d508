"""Gate statistics: one forward and one backward pass score all branches at once.

Every branch's term is multiplied by a gate of 1 for each sample, `y = x + g f(x)`. With g_n the gradient of a sample's
loss by its gate:

    gate-gradient: |mean of g_n|, the first-order change of the loss when the gate closes (which is -mean g_n)
    fisher:        mean of g_n^2, half of which is the second-order change of a model at its optimum

Both need labels and keep the head. The sign is dropped in the first: near an optimum it is noise, and a branch that
pulls hard in either direction is in use. A gate at 0 is not quite a skip for a post-norm branch, which loses its norm
too.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), equations 7 and 8, with
a whole branch in place of a filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Component, Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.branches import Branch, find_branches
from vlmopt.graph.clusters import clustered
from vlmopt.graph.modules import clone_graph, output_values
from vlmopt.graph.replay import inputs_of, run_component
from vlmopt.profiling.estimator import Checkpoint, Estimate, Score, refuse_not_finite, units_of
from vlmopt.profiling.part import WorkloadPart, empty_outputs, items_that_read, rows_of
from vlmopt.profiling.passes import BACKWARD_PASSES, PassCounter

_GATES = "branch_gates"


@dataclass(frozen=True)
class GateGradient:
    """First order, or with `is_fisher` the mean square."""

    is_fisher: bool = False
    with_layers: bool = True

    @property
    def name(self) -> str:
        return "fisher" if self.is_fisher else "gate-gradient"

    @property
    def unit(self) -> str:
        return "squared loss" if self.is_fisher else "loss"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        counter, passes = PassCounter(program, workload.feeds), 0.0
        base, n_base = _base(program, workload, counter, progress)
        scores: list[Score] = []
        for name in workload.feeds:
            branches = find_branches(program.components[name].graph)
            gradients = gate_gradients(program, name, workload, base, progress=progress, checkpoint=checkpoint)
            position = {branch.name: i for i, branch in enumerate(branches)}
            for unit in units_of(name, branches, with_layers=self.with_layers):
                # Closing the gates of a layer together: their first-order effects add up.
                own = gradients[:, [position[branch] for branch in unit.branches]].sum(dim=1)
                mean, error = clustered(own**2 if self.is_fisher else own, workload.groups(name))
                scores.append(Score(unit, abs(mean), error))
            passes += len(gradients) * counter.whole(name) * (1 + BACKWARD_PASSES)
        return Estimate(tuple(scores), float("nan"), passes + n_base)


def _base(
    program: Program, workload: Workload, counter: PassCounter, progress: Progress
) -> tuple[dict[str, Tensor], float]:
    """Outputs that rows outside a batch keep, and what they cost: nothing, where items look at rows of their own."""
    empty = empty_outputs(program, workload)
    if empty is not None and len(empty) == 1:
        (name,) = empty
        first = torch.arange(min(1, len(empty[name])))
        if int(items_that_read(workload, empty, name, first).sum()) <= 1:
            return empty, 0.0
    made, cost = {}, 0.0
    for name, feeds in workload.feeds.items():
        tracked = progress.track(feeds, f"outputs of {name}", total=len(feeds))
        made[name] = run_component(program.components[name], tracked)
        refuse_not_finite(made[name], place=f"outputs of {name}", skipped=())
        cost += len(made[name]) * counter.whole(name)
    return made, cost


def gate_gradients(
    program: Program,
    name: str,
    workload: Workload,
    base: dict[str, Tensor],
    *,
    progress: Progress,
    checkpoint: Checkpoint,
) -> Tensor:
    """For every row and branch of a component the gradient of the loss by the gate, [n_rows, n_branches], float64.

    It is scaled so that the mean over rows is the derivative of the mean loss over items.
    """
    component = program.components[name]
    branches = find_branches(component.graph)
    gated = with_gates(component)
    feeds, start, parts = workload.feeds[name], 0, []
    n_rows = len(workload.groups(name))
    for i, feed in enumerate(progress.track(feeds, f"gate gradients {name}", total=len(feeds))):
        rows = torch.arange(start, start + rows_of(feed))
        start += len(rows)
        part = WorkloadPart(workload, {name: rows}, torch.arange(workload.n_items), base)
        values = inputs_of(component, feed)
        compute = partial(_batch_gradients, gated, name, values, part, len(branches))
        found = checkpoint(f"{name}-{i:05d}", compute)["gradients"]
        for branch, column in zip(branches, found.T, strict=True):
            refuse_not_finite(column, place=f"gate of {branch.name}, batch {i}", skipped=())
        parts.append(found)
    return torch.cat(parts) * (n_rows / workload.n_items)


def _batch_gradients(
    gated: fx.GraphModule, name: str, values: list[Tensor], part: WorkloadPart, n_branches: int
) -> dict[str, Tensor]:
    n_rows = len(part.rows[name])
    gates = torch.ones(n_branches, n_rows, device=values[0].device, requires_grad=True)
    if n_branches == 0:
        return {"gradients": torch.zeros(n_rows, 0, dtype=torch.float64)}
    with torch.enable_grad():
        losses = part.losses({name: gated(*values, gates)[0].cpu()})
        refuse_not_finite(losses, place=f"loss of {name}", skipped=())
        (gradient,) = torch.autograd.grad(losses.sum(), gates, materialize_grads=True)
    return {"gradients": gradient.T.double().cpu().contiguous()}


def with_gates(component: Component) -> fx.GraphModule:
    """A clone that takes one input more, the gates [n_branches, B], and multiplies every branch's term by its gate."""
    module = clone_graph(component.graph)
    branches = find_branches(module)
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    with module.graph.inserting_after(last):
        gates = module.graph.placeholder(_GATES)
    for number, branch in enumerate(branches):
        readers = _sum_readers(branch)
        with module.graph.inserting_after(branch.term):
            gated = module.graph.call_function(gate, (branch.term, gates, number))
        for reader in readers:
            reader.replace_input_with(branch.term, gated)
    module.graph.lint()
    module.recompile()
    assert output_values(module)
    return module


def _sum_readers(branch: Branch) -> list[fx.Node]:
    """The additions of the branch's own sum that read its term; other readers of the term are left alone."""
    total = branch.exit.all_input_nodes[0] if branch.is_post_norm else branch.exit
    pending, readers = [total], list[fx.Node]()
    while pending:
        node = pending.pop()
        if branch.term in node.all_input_nodes:
            readers.append(node)
        pending.extend(
            operand for operand in node.all_input_nodes if operand not in branch.terms and operand.target is node.target
        )
    return readers


def gate(value: Tensor, gates: Tensor, number: int) -> Tensor:
    """The value [B, ...] (or [B * n, ...], samples in order) times one gate a sample, gates [n_branches, B]."""
    own = gates[number]
    if len(value) % len(own):
        raise ProfileError(
            f"gate {number}",
            f"a branch has {len(value)} rows for {len(own)} samples",
            expected="a multiple of the samples",
            remedy="use another estimator",
        )
    own = own.repeat_interleave(len(value) // len(own))
    return value * own.reshape(-1, *(1,) * (value.ndim - 1)).to(value.dtype)
