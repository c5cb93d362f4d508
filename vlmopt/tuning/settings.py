"""How a program is tuned: plain numbers that a recipe holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TuningSettings:
    """Settings of gradient recovery.

    Args:
        epochs: passes over the fitting split; the best epoch on validation is kept, epoch 0 (untuned) included.
        batch_items: items a step.
        learning_rate: of adapters and kept weights; the head's is `head_factor` times as large.
        warm_up: share of the steps in which the rate rises from zero; it falls along a cosine to zero afterwards.
        weight_decay: of matrices; vectors (norms, biases, scales) do not decay.
        distillation: share of the distance to the original's outputs in the loss; 1 needs no labels.
        feature_distillation: weight of the distance to the features that the original's head reads.
        preference: weight of the preference for expected answers over rejected ones (Phantom Optimization has 1).
        preference_beta: what the mean log-probability of an answer's tokens is multiplied by there.
        preference_gamma: by how much the expected answer is to lead.
        patience: epochs without a better metric on validation after which tuning stops.
        precision: "float32", or "bfloat16" for the matrix products.
        gradient_norm: gradients are scaled down to this norm.
    """

    epochs: int = 8
    batch_items: int = 32
    learning_rate: float = 3e-5
    head_factor: float = 1.0
    warm_up: float = 0.1
    weight_decay: float = 0.05
    distillation: float = 0.0
    feature_distillation: float = 0.0
    preference: float = 0.0
    preference_beta: float = 2.0
    preference_gamma: float = 0.5
    patience: int = 3
    precision: str = "float32"
    gradient_norm: float = 1.0
    seed: int = 0

    @property
    def distils(self) -> bool:
        """Whether the loss looks at the original, which then has to be run on every row."""
        return self.distillation > 0 or self.feature_distillation > 0
