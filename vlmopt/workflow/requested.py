"""What a pass wants to know of the task before it plans, collected on the profile split."""

from __future__ import annotations

from collections.abc import Mapping

from vlmopt.core.contract import Pass, StatRequest
from vlmopt.core.errors import PassError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S, Owner, guarded_call
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.profiling.node_statistics import node_statistics
from vlmopt.rewrite.pipeline import clone_program
from vlmopt.tasks.binding import TaskWorkload


def requested_statistics(
    pass_: Pass,
    program: Program,
    fit: TaskWorkload | None,
    progress: Progress,
    *,
    step: int,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> Mapping[StatRequest, object]:
    """The statistics that the pass asks for; none without a task.

    Raises:
        PassError: `wants` failed, or asks for what is not there.
    """
    if fit is None:
        return {}
    place = f"step {step} {pass_.name}, wants"
    owner = Owner.of(type(pass_), pass_.name)
    asked = guarded_call(
        lambda: tuple(pass_.wants(clone_program(program))), place=place, owner=owner, time_limit_s=time_limit_s
    )
    try:
        return node_statistics(program, asked, fit, progress)
    except ValueError as error:
        raise PassError(place, str(error), expected="a node of the program and a statistic that is collected") from None
