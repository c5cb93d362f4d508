"""Names of the importance estimators, for recipes and the command line."""

from __future__ import annotations

from typing import Literal, get_args

EstimatorName = Literal[
    "leave-one-out",
    "compensated-distortion",
    "logit-distortion",
    "feature-distortion",
    "gate-gradient",
    "fisher",
    "das-bandit",
    "subset-ridge",
    "block-influence",
]
Arms = Literal["branch", "layer"]

ESTIMATORS: tuple[str, ...] = get_args(EstimatorName)
# Those that may be scored with the head as it is or after a re-fit; the others look at the head in one way only.
SCORED_BOTH_WAYS = frozenset({"leave-one-out", "das-bandit", "subset-ridge"})
DEFAULT_UPDATES = 200
DEFAULT_SAMPLE = 64
