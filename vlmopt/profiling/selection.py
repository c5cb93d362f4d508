"""From the name of an estimator and its options to the estimator."""

from __future__ import annotations

from vlmopt.core.errors import ProfileError
from vlmopt.core.estimators import DEFAULT_SAMPLE, DEFAULT_UPDATES, ESTIMATORS, SCORED_BOTH_WAYS
from vlmopt.profiling.block_influence import BlockInfluence
from vlmopt.profiling.compensated import CompensatedDistortion
from vlmopt.profiling.das_bandit import DasBandit
from vlmopt.profiling.distortion import Distortion
from vlmopt.profiling.estimator import Estimator
from vlmopt.profiling.gates import GateGradient
from vlmopt.profiling.leave_one_out import LeaveOneOut
from vlmopt.profiling.subset_ridge import SubsetRidge


def make_estimator(
    name: str,
    scoring: str,
    *,
    with_layers: bool = True,
    n_updates: int = DEFAULT_UPDATES,
    subset_size: int | None = None,
    arms: str = "branch",
    sample_size: int = DEFAULT_SAMPLE,
    with_stability: bool | None = None,
) -> Estimator:
    """The estimator of this name.

    Args:
        n_updates, subset_size, arms: of the bandit, and of the ridge on its evaluations.
        sample_size: rows that the distortions look at.
        with_stability: of leave-one-out; None measures it where the head is re-fitted.

    Raises:
        ProfileError: there is none of this name, or it does not measure stability.
    """
    is_refit = scoring == "refit"
    bandit = DasBandit(
        n_updates, subset_size, has_layer_arms=arms == "layer", is_refit=is_refit, with_layers=with_layers
    )
    stability = is_refit if with_stability is None else with_stability
    made: dict[str, Estimator] = {
        "leave-one-out": LeaveOneOut(is_refit, with_layers, stability),
        "block-influence": BlockInfluence(with_layers),
        "gate-gradient": GateGradient(is_fisher=False, with_layers=with_layers),
        "fisher": GateGradient(is_fisher=True, with_layers=with_layers),
        "feature-distortion": Distortion(of_features=True, n_samples=sample_size, with_layers=with_layers),
        "logit-distortion": Distortion(of_features=False, n_samples=sample_size, with_layers=with_layers),
        "compensated-distortion": CompensatedDistortion(sample_size, with_layers=with_layers),
        "das-bandit": bandit,
        "subset-ridge": SubsetRidge(bandit),
    }
    if with_stability and name != "leave-one-out":
        raise ProfileError("stability", f"is not measured by {name}", expected="estimator leave-one-out")
    if name not in made:
        raise ProfileError("estimator", f"there is no {name!r}", expected=f"one of {', '.join(ESTIMATORS)}")
    return made[name]


def scoring_of(estimator: str, scoring: str) -> str:
    """How an estimator really scores: as was asked where it can do both; `raw` with the head as it is, `refit` where a
    re-fit is anticipated, `none` where the head is not looked at."""
    if estimator in SCORED_BOTH_WAYS:
        return scoring
    own = {"gate-gradient": "raw", "fisher": "raw", "logit-distortion": "raw", "compensated-distortion": "refit"}
    return own.get(estimator, "none")
