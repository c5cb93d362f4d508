"""Re-fits a component's head in closed form from what a task offers: no gradient steps, and the same for every program.

After a cut the features that reach the head have changed; with the old head accuracy collapses although the features
still carry what the task needs. The comparison is fair only if the original's head is fitted in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.core.program import Component, Program
from vlmopt.core.workload import HeadBlock, Outputs, Workload, head_blocks_of
from vlmopt.graph.head import append_head, fitted_linear, head_module, replace_head
from vlmopt.graph.modules import output_values
from vlmopt.graph.ridge import fit_ridge

_TASK_HEAD = "task_head"

# The scale of a fitted head is free for the metric and matters for the loss; least squares leaves it too small.
_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


@dataclass(frozen=True)
class HeadFit:
    """`weight` [d_out, d] and `bias` [d_out]; `held_out` [n, d_out] are outputs for each row by a fit without it."""

    weight: Tensor
    bias: Tensor
    held_out: Tensor
    strength: float

    def outputs(self, features: Tensor) -> Tensor:
        """What the fitted head makes of features [n, d]."""
        return features.double() @ self.weight.T + self.bias


def fit_head(
    component: str,
    features: Tensor,
    workload: Workload,
    reference: Outputs,
    *,
    prior: Tensor | None = None,
    seed: int = 0,
) -> HeadFit | None:
    """The head for these features [n, d]; None where the task gives the component nothing to fit.

    Args:
        reference: outputs of the original program on the same samples, every component's.
        prior: weight that the fit is drawn towards.
    """
    targets = workload.head_targets(component, reference)
    if targets is None:
        return None
    blocks = head_blocks_of(workload)
    if blocks:
        return _fit_blocks(component, features, targets, workload, blocks, seed=seed)
    fit = fit_ridge(features, targets, workload.groups(component), prior=prior, seed=seed)
    scales = (1.0,) if prior is not None else _SCALES  # a model's own head has its scale already
    others = {name: reference[name] for name in reference if name != component}  # a lazy one runs what it is asked
    scale = min(scales, key=lambda s: float(workload.losses({**others, component: fit.held_out * s}).mean()))
    return HeadFit(fit.weight * scale, fit.bias * scale, fit.held_out * scale, fit.strength)


def _fit_blocks(
    component: str,
    features: Tensor,
    targets: Tensor,
    workload: Workload,
    blocks: Sequence[HeadBlock],
    *,
    seed: int,
) -> HeadFit:
    """A head of which every task's outputs are fitted on that task's rows alone."""
    n, width = targets.shape
    weight, bias = features.new_zeros(width, features.shape[1]).double(), features.new_zeros(width).double()
    held_out, strength, groups = targets.new_zeros(n, width), 0.0, workload.groups(component)
    for block in blocks:
        rows, columns = list(block.rows), list(block.columns)
        if len({groups[row] for row in rows}) < 2:
            continue  # nothing can be held out, so the task's outputs stay zero
        own = targets[rows][:, columns]
        fit = fit_ridge(features[rows], own, [groups[row] for row in rows], prior=None, seed=seed)
        here = torch.tensor(rows)[:, None], torch.tensor(columns)
        losses = {s: _loss_with(component, workload, held_out.index_put(here, fit.held_out * s)) for s in _SCALES}
        scale = min(losses, key=losses.__getitem__)
        weight[columns], bias[columns] = fit.weight * scale, fit.bias * scale
        held_out[here] = fit.held_out * scale
        strength = max(strength, fit.strength)
    return HeadFit(weight, bias, held_out, strength)


def _loss_with(component: str, workload: Workload, outputs: Tensor) -> float:
    return float(workload.losses({component: outputs}).mean())


def install_head(component: Component, path: str | None, fit: HeadFit) -> tuple[Component, str]:
    """The component with the fitted head in place of the Linear at `path` or behind its output, and the head's path."""
    like = next(iter(component.graph.parameters()), torch.empty(0))
    linear = fitted_linear(fit.weight, fit.bias, like=like)
    name = component.outputs[0].name
    if path is None:
        made = append_head(component, _TASK_HEAD, linear, name)
    else:
        made = replace_head(component, path, _TASK_HEAD, linear, name)
    return made, str(output_values(made.graph)[0].target)


def refit_heads(
    program: Program, features: Mapping[str, Tensor], workload: Workload, reference: Outputs, *, seed: int = 0
) -> Program:
    """The program with the heads of some components fitted to these features, one entry a component."""
    components, heads, fitted = dict(program.components), dict(program.heads), set(program.fitted_heads)
    for name, values in features.items():
        path = heads.get(name)
        prior = prior_weight(program, name)
        fit = fit_head(name, values, workload, reference, prior=prior, seed=seed)
        if fit is not None:
            components[name], heads[name] = install_head(components[name], path, fit)
            fitted.add(name)
    result = program.with_components(components)
    result.heads, result.fitted_heads = heads, frozenset(fitted)
    return result


def prior_weight(program: Program, component: str) -> Tensor | None:
    """The model's own head, which a re-fit is drawn towards: with little data the head stays what it was.

    A head that was fitted on the task's data is no prior: it has seen the rows that cross-fitting holds out.
    """
    path = program.heads.get(component)
    if path is None or component in program.fitted_heads:
        return None
    return head_module(program.components[component], path).weight.detach()
