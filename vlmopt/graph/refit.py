"""Re-fits a component's head in closed form from what a task offers: no gradient steps, and the same for every program.

After a cut the features that reach the head have changed; with the old head accuracy collapses although the features
still carry what the task needs. The comparison is fair only if the original's head is fitted in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.core.program import Component, Program
from vlmopt.core.workload import Outputs, Workload
from vlmopt.graph.head import append_head, fitted_linear, head_module, replace_head
from vlmopt.graph.ridge import fit_ridge

# The scale of a fitted head is free for the metric and matters for the loss; least squares leaves it too small.
_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


@dataclass(frozen=True)
class HeadFit:
    """`weight` [d_out, d] and `bias` [d_out]; `held_out` [n, d_out] are outputs for rows by fits that have not seen them."""

    weight: Tensor
    bias: Tensor
    held_out: Tensor
    strength: float

    def outputs(self, features: Tensor) -> Tensor:
        """What the fitted head makes of features [n, d]."""
        return features.double() @ self.weight.T + self.bias


def fit_head(
    component: str, features: Tensor, workload: Workload, reference: Outputs, *, prior: Tensor | None = None, seed: int = 0
) -> HeadFit | None:
    """The head for these features [n, d]; None where the task gives the component nothing to fit.

    Args:
        reference: outputs of the original program on the same samples, every component's.
        prior: weight that the fit is drawn towards.
    """
    targets = workload.head_targets(component, reference)
    if targets is None:
        return None
    fit = fit_ridge(features, targets, workload.groups(component), prior=prior, seed=seed)
    scale = min(_SCALES, key=lambda s: float(workload.losses({**reference, component: fit.held_out * s}).mean()))
    return HeadFit(fit.weight * scale, fit.bias * scale, fit.held_out * scale, fit.strength)


def install_head(component: Component, path: str | None, fit: HeadFit) -> tuple[Component, str]:
    """The component with the fitted head in place of the Linear at `path`, or behind its output; and the head's path."""
    like = next(iter(component.graph.parameters()), torch.empty(0))
    linear = fitted_linear(fit.weight, fit.bias, like=like)
    name = component.outputs[0].name
    if path is None:
        return append_head(component, "task_head", linear, name), "task_head"
    return replace_head(component, path, "task_head", linear, name), "task_head"


def refit_heads(program: Program, features: Mapping[str, Tensor], workload: Workload, reference: Outputs, *, seed: int = 0) -> Program:
    """The program with every component's head fitted to these features (one entry a component that is to be fitted)."""
    components, heads = dict(program.components), dict(program.heads)
    for name, values in features.items():
        path = heads.get(name)
        prior = prior_weight(program, name)
        fit = fit_head(name, values, workload, reference, prior=prior, seed=seed)
        if fit is not None:
            components[name], heads[name] = install_head(components[name], path, fit)
    result = program.with_components(components)
    result.heads = heads
    return result


def prior_weight(program: Program, component: str) -> Tensor | None:
    """The present head's weight, which a re-fit is drawn towards: with little data the head stays what it was."""
    path = program.heads.get(component)
    return None if path is None else head_module(program.components[component], path).weight.detach()
