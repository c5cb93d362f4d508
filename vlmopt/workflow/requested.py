"""What a pass wants to know of the task before it plans, collected on the profile split."""

from __future__ import annotations

from collections.abc import Mapping

from vlmopt.core.contract import Pass, StatRequest
from vlmopt.core.errors import PassError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S, Owner, guarded_call
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.profiling.node_statistics import SAMPLE, node_statistics
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.workflow.opening import OpenedTask


def requested_statistics(
    pass_: Pass,
    program: Program,
    bound: OpenedTask | None,
    progress: Progress,
    *,
    step: int,
    num_samples: int | None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> Mapping[StatRequest, object]:
    """The statistics that the pass asks for.

    Args:
        num_samples: of the profile split, at most; statistics look at fewer anyway.

    Raises:
        PassError: `wants` failed, or asks for what is not there, as anything of a task is where there is none.
    """
    place = f"step {step} {pass_.name}, wants"
    owner = Owner.of(type(pass_), pass_.name)
    asked = guarded_call(
        lambda: tuple(pass_.wants(clone_program(program))), place=place, owner=owner, time_limit_s=time_limit_s
    )
    if not asked:
        return {}
    if bound is None:
        remedy = "give the recipe a task, or leave out the pass or the option that looks at it"
        raise PassError(f"step {step} {pass_.name}", "wants statistics of a task, and there is none", remedy=remedy)
    fit = bound.source.workload(program, "profile", limit=min(SAMPLE, num_samples or SAMPLE))
    try:
        return node_statistics(program, asked, fit, progress)
    except ValueError as error:
        raise PassError(place, str(error), expected="a node of the program and a statistic that is collected") from None
