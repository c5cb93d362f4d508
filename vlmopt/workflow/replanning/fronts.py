"""The Pareto front of predicted loss against MACs or latency, as plain data and as a drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmopt.core.budgets import Quantity
from vlmopt.core.errors import OutputExistsError, VlmoptError
from vlmopt.planning.front import pareto_front
from vlmopt.workflow.replanning.profiles import drops_of, needs_of
from vlmopt.workflow.replanning.solving import Request, combined, is_known, open_request, savings

FORMS = {".html": "html", ".svg": "svg", ".json": "json"}


def plan_front(request: Request) -> dict[str, Any]:
    """The front of the profiles: against latency where the profile has times, else against MACs.

    A budget of a resource beside it must be met by every cut of the front. With several profiles the losses are
    weighed; the worst of several is no sum, so it has no front.
    """
    tasks = open_request(request)
    if len(tasks) > 1 and request.combine != "weighted":
        raise VlmoptError("--front", "is drawn of one loss", expected="one profile, or --combine weighted")
    if request.budgets.drop is not None:
        raise VlmoptError("--front", "shows every drop, so --max-drop has no place", remedy="leave --max-drop out")
    one = tasks[0]
    resource = Quantity.LATENCY if is_known(one, Quantity.LATENCY) else Quantity.MACS
    (problem,) = combined([task.losses for task in tasks], request)
    needs = needs_of(one, request.budgets)
    points = []
    for point in pareto_front(problem, resource.value, needs=needs):
        drop = None if one.drops is None or len(tasks) > 1 else drops_of(one).loss(frozenset(point.names))
        points.append(
            {
                "n_cut": len(point.names),
                "loss": point.loss,
                "loss_error": one.loss_error(point.names) if len(tasks) == 1 else None,
                "drop_points": drop,
                "saves": savings(one, point.names),
                "sites": list(point.names),
            }
        )
    return {
        "model": one.profile.model.path,
        "tasks": [task.task for task in tasks],
        "unit": one.profile.unit,
        "resource": resource.value,
        "points": points,
    }


def refuse_output(path: Path, *, force: bool, forms: tuple[str, ...]) -> None:
    """Refuses an output that cannot be written, before anything is computed.

    Raises:
        VlmoptError: the ending is unknown.
        OutputExistsError: the file is there already.
    """
    if path.suffix.lower() not in forms:
        raise VlmoptError(str(path), "its ending says no format", expected=" or ".join(forms))
    if path.is_dir():
        raise OutputExistsError(str(path), "is a folder", expected="a path for a file")
    if path.exists() and not force:
        raise OutputExistsError(str(path), "exists already", remedy="choose another path, or --force replaces it")
