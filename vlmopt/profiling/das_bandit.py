"""The k-armed bandit of Dynamic Architecture Skipping: learns preferences for skipping from random subsets of arms.

Every turn draws n distinct subsets S_j of m arms without replacement with weights p = sigmoid(s), measures their losses
on one batch, and moves the preferences of the arms in S_j:

    r_j = exp(-loss(S_j)),   s_i += lr (r_j - mean r) p_i (1 - p_i)   for i in S_j

A score is -s: an arm whose absence costs reward is needed. All n subsets of a turn share p, as in the released code.

Source: Wu et al., "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models"
(arXiv 2309.01479), section 3.2, and its code. What differs: the batch rotates from turn to turn (the released METER and
ViLT searches look at one and the same batch), the model is in eval mode, no adapters are trained meanwhile, and an arm
may be a branch as well as a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vlmopt.core.errors import ProfileError
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Workload
from vlmopt.graph.precision import lowered_precision
from vlmopt.profiling.estimator import Checkpoint, Estimate, Evaluation, Score, Unit, program_units
from vlmopt.profiling.subset_losses import SubsetLosses

Subset = tuple[int, ...]  # numbers of arms, ascending


@dataclass(frozen=True)
class Search:
    """What a search saw and came to: preferences [k] for skipping every arm, and all evaluations in order."""

    arms: tuple[Unit, ...]
    preferences: Tensor
    log: tuple[Evaluation, ...]
    forward_passes: float


@dataclass(frozen=True)
class DasBandit:
    """`n_updates` turns with `n_subsets` subsets of `subset_size` arms each (a third of the arms by default)."""

    n_updates: int = 200
    subset_size: int | None = None
    n_subsets: int = 3
    learning_rate: float = 0.1
    has_layer_arms: bool = False
    is_refit: bool = False
    with_layers: bool = True
    name: str = "das-bandit"
    unit: str = "preference"

    def estimate(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Estimate:
        found = self.search(program, workload, progress=progress, checkpoint=checkpoint, seed=seed)
        nothing = [float("nan")] * len(found.arms)  # a single run says nothing about its own spread
        scores = scores_of_arms(
            found.arms,
            (-found.preferences).tolist(),
            nothing,
            units=program_units(program, workload, with_layers=self.with_layers),
        )
        precision = lowered_precision(program.components[name] for name in workload.feeds)
        return Estimate(scores, float("nan"), found.forward_passes, subsets=found.log, precision=precision)

    def search(
        self, program: Program, workload: Workload, *, progress: Progress, checkpoint: Checkpoint, seed: int
    ) -> Search:
        """Runs the bandit; turns that an earlier run evaluated are taken from the checkpoint.

        Raises:
            ProfileError: there are no arms, or as many are to be skipped as there are; a loss is not finite.
        """
        arms = arms_of(program, workload, has_layer_arms=self.has_layer_arms)
        size = self._size(len(arms))
        meter = SubsetLosses(program, workload, is_refit=self.is_refit, progress=progress, seed=seed)
        generator, batches = torch.Generator().manual_seed(seed), meter.batches()
        preferences, log, passes = torch.zeros(len(arms), dtype=torch.float64), list[Evaluation](), 0.0
        for turn in progress.track(range(self.n_updates), "bandit", total=self.n_updates):
            subsets = draw_subsets(preferences, size, self.n_subsets, generator=generator)
            skipped = [frozenset[str]().union(*(arms[i].sites for i in subset)) for subset in subsets]
            batch = batches[turn % len(batches)]
            losses = checkpoint(f"turn-{turn:05d}", partial(_measured, meter, batch, skipped))["losses"]
            preferences = updated(preferences, subsets, losses, learning_rate=self.learning_rate)
            log += [Evaluation(*pair, batch) for pair in zip(skipped, losses.tolist(), strict=True)]
            passes += meter.cost(batch, skipped)
        return Search(tuple(arms), preferences, tuple(log), passes + meter.forward_passes)

    def _size(self, n_arms: int) -> int:
        size = max(1, n_arms // 3) if self.subset_size is None else self.subset_size
        if not 0 < size < n_arms:
            kind = "layers" if self.has_layer_arms else "branches"
            raise ProfileError(
                "subset size", f"{size} of {n_arms} {kind} are to be skipped at a time", expected=f"1 to {n_arms - 1}"
            )
        return size


def _measured(meter: SubsetLosses, batch: int, skipped: Sequence[frozenset[str]]) -> dict[str, Tensor]:
    return {"losses": meter.losses(batch, skipped)}


def draw_subsets(preferences: Tensor, size: int, n_subsets: int, *, generator: torch.Generator) -> list[Subset]:
    """Distinct subsets of so many arms, drawn without replacement with weights sigmoid(preferences)."""
    wanted = min(n_subsets, math.comb(len(preferences), size))
    drawn: dict[Subset, None] = {}
    while len(drawn) < wanted:
        picked = torch.multinomial(torch.sigmoid(preferences), size, replacement=False, generator=generator)
        drawn[tuple(sorted(picked.tolist()))] = None
    return list(drawn)


def updated(preferences: Tensor, subsets: Sequence[Subset], losses: Tensor, *, learning_rate: float) -> Tensor:
    """The preferences [k] after one turn with these losses [n_subsets]."""
    weights = torch.sigmoid(preferences)
    rewards = torch.exp(-losses.double())
    advantages = rewards - rewards.mean()
    result = preferences.clone()
    for subset, advantage in zip(subsets, advantages, strict=True):
        arms = list(subset)
        result[arms] += learning_rate * advantage * weights[arms] * (1 - weights[arms])
    return result


def arms_of(program: Program, workload: Workload, *, has_layer_arms: bool) -> list[Unit]:
    """What a search may skip: all branches, or all layers (a layer of one branch is that branch)."""
    units = program_units(program, workload, with_layers=has_layer_arms)
    layers = [unit for unit in units if unit.is_layer]
    covered = frozenset[str]().union(*(unit.sites for unit in layers))
    return [*layers, *(unit for unit in units if not unit.is_layer and unit.site not in covered)]


def scores_of_arms(
    arms: Sequence[Unit], values: Sequence[float], errors: Sequence[float], *, units: Sequence[Unit]
) -> tuple[Score, ...]:
    """A score for every arm, and for every other unit that is made of arms their sum."""
    known = {arm.site: Score(arm, value, error) for arm, value, error in zip(arms, values, errors, strict=True)}
    scores = list(known.values())
    for unit in units:
        if unit.site not in known and unit.sites <= known.keys():
            parts = [known[site] for site in unit.sites]
            error = math.sqrt(sum(part.standard_error**2 for part in parts))
            scores.append(Score(unit, sum(part.mean for part in parts), error))
    return tuple(scores)
