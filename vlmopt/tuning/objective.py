"""What tuning minimises: the loss of the task, and the distance to what the original program computes.

`(1 - a) * task + a * (distance of the outputs) + f * (distance of the features)`. Distillation needs no labels: at
a = 1 the task's loss is left out. The features of a cut program lie elsewhere than the original's, and a head that was
fitted to them breaks while they are drawn over, so f is 0 unless it is asked for.

Phantom Optimization (arXiv 2409.14713) adds a preference for the expected answer over a wrong one that is likely:

    - log sigmoid( beta / |y+| log pi(y+ | x) - beta / |y-| log pi(y- | x) - gamma )

which is SimPO (arXiv 2405.14734, eq. 6), with no reference model; beta 2 and gamma 0.5. What differs here: the loss
of the task, which it is added to, is the mean over a batch of each answer's mean over its tokens.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2, for logits. What
differs: outputs that are embeddings are compared by their angle, and so are the features that the head reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.core.workload import Outputs, Workload


@dataclass(frozen=True)
class Teacher:
    """What the original computes for every row of the fitting split, by component: outputs [n, d_out] and features of
    the head [n, d]. `are_logits`: the outputs are classes, not embeddings.
    """

    outputs: Mapping[str, Tensor]
    features: Mapping[str, Tensor]
    are_logits: bool

    def of_rows(self, rows: Mapping[str, list[int]]) -> Teacher:
        """The same for some rows of every component, in this order."""
        outputs = {name: value[rows[name]] for name, value in self.outputs.items()}
        features = {name: value[rows[name]] for name, value in self.features.items()}
        return Teacher(outputs, features, self.are_logits)


def objective(
    workload: Workload,
    outputs: Outputs,
    features: Mapping[str, Tensor],
    teacher: Teacher | None,
    *,
    distillation: float,
    feature_distillation: float = 0.0,
    temperature: float = 2.0,
) -> Tensor:
    """The loss of one batch, a scalar in float64.

    Args:
        teacher: the original on the same rows; None where nothing is distilled.
        outputs, features: of the program that is tuned, rows as the workload feeds them.
        distillation: share of the distance to the teacher's outputs, in [0, 1].
        feature_distillation: weight of the distance to the features that its head reads.
    """
    total = torch.zeros((), dtype=torch.float64)
    if distillation < 1.0:
        total = total + (1.0 - distillation) * workload.losses(outputs).mean()
    if distillation > 0.0 and teacher is not None:
        for name, wanted in teacher.outputs.items():
            found = outputs[name].double()
            distance = _divergence(found, wanted, temperature) if teacher.are_logits else _angle(found, wanted)
            total = total + distillation * distance
    if feature_distillation > 0.0 and teacher is not None:
        for name, wanted in teacher.features.items():
            total = total + feature_distillation * _angle(features[name].double(), wanted)
    return total


def preference(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """How much the rejected answers are preferred still, one number an item in float64.

    Args:
        chosen, rejected: mean negative log-probability of the tokens of either answer, [n].
    """
    margin = beta * (rejected.double() - chosen.double()) - gamma
    return -F.logsigmoid(margin)


def _divergence(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened classes, scaled so that its gradient does not shrink with temperature."""
    soft = F.softmax(wanted.double() / temperature, dim=-1)
    log_found = F.log_softmax(found / temperature, dim=-1)
    return F.kl_div(log_found, soft, reduction="batchmean") * temperature**2


def _angle(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean of 1 - cos over the rows."""
    return (1.0 - F.cosine_similarity(found, wanted.double(), dim=-1)).mean()
