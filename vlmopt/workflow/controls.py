"""Controls: what the test split says of the same program without modules whose gain is easily somebody else's."""

from __future__ import annotations

from typing import Any

from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Outputs
from vlmopt.graph.phantom_removal import find_phantoms, without_phantoms
from vlmopt.tasks.binding import TaskSource, TaskWorkload
from vlmopt.verify.statistics import paired_difference
from vlmopt.workflow.answering import program_outputs


def modules_removed(
    source: TaskSource, program: Program, workload: TaskWorkload, outputs: Outputs, *, seed: int, progress: Progress
) -> dict[str, Any] | None:
    """The metric without the phantom dimensions that the program has; None where it has none.

    The gain of training is not theirs as long as the program does as well without them: at an eta near zero they are
    next to nothing.

    Args:
        workload, outputs: the test split, and what the program with its modules says of it.
    """
    if not any(find_phantoms(part.graph) for part in program.components.values()):
        return None
    bare = without_phantoms(program)
    own = source.open_test(bare)
    found = program_outputs(bare, own, what="the modules removed", progress=progress)
    items = [w.item_scores(o).numpy() for w, o in ((workload, outputs), (own, found))]
    paired = paired_difference(items[0], items[1], list(workload.item_groups), seed=seed)
    return {
        "what": "phantom modules",
        "value": float(items[1].mean()),
        "drop_points": paired.drop_points,
        "drop_interval95": paired.interval95,
    }
