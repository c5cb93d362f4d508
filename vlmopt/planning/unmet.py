"""What to tell where no plan meets the budgets: the closest that can be reached for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmopt.core.errors import PlanError
from vlmopt.planning.cuts import Candidate, Measurement, fits, saved_by, without_overlaps
from vlmopt.planning.search import Search


def refuse_unreachable(candidates: Sequence[Candidate], needs: Mapping[str, float]) -> None:
    """Looks at what cutting everything would save.

    Raises:
        PlanError: it is not enough, with the share of what must go that it saves.
    """
    everything = without_overlaps(sorted(candidates, key=lambda c: -len(c.branches)))
    for resource, need in needs.items():
        if not fits(everything, {resource: need}):
            share = 100 * saved_by(everything, resource) / need
            raise PlanError(
                f"--{resource}",
                f"cannot be met: cutting all {len(everything)} candidates saves {share:.0f} % of what must go",
                remedy=f"allow more {resource}",
            )


def unmet(search: Search, within: Search) -> PlanError:
    """The error of a search in which no cut met both the drop and the resources.

    Args:
        within: a search under the drop alone.
    """
    fitting = search.least_losing()
    least = search.found(fitting[0]) if fitting else Measurement(float("nan"), float("nan"))
    best = next(iter(within.best_first()), ())
    reached = ", ".join(
        f"{100 * saved_by(best, resource) / need:.0f} % of what --{resource} asks to save"
        for resource, need in search.needs.items()
    )
    spread = f"{least.drop_points:.2f} ± {least.standard_error:.2f} points"
    return PlanError(
        "the budgets",
        f"cannot be met together: the cut that loses least of those that fit drops {spread}, "
        f"{least.sort_key:.2f} with its margin, where {search.max_drop:g} are allowed; "
        f"the best within the drop saves {reached}",
        remedy="allow a larger drop, or relax the other budgets",
    )
