"""How well times of single operations predict whole graphs: 20 random plans of the real dual encoder's image tower.

`latency-model`: operations are taken from the whole tower at 112 pixels and measured each alone, on one thread, as
`vlmopt device profile` does. Then the tower and 20 plans, each without a random subset of its branches, are timed in
turns, by the same clock. Errors are those of the predictions, in percent of what was measured:

- `mae_percent`, `worst_percent`: the prediction of the graph of the plan, `node_us` fitted to the whole tower alone;
- `mae_sum_percent`: the plain sum, nothing fitted;
- `mae_by_branch_percent`: the whole tower's prediction less what each skipped branch costs, no plan emitted;
- `mae_runtime_clock_percent`: the sum of what ONNX Runtime's own clock says of each operation inside of the tower.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.benchmarks import towers
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.devices.document import DeviceProfile, GraphCheck
from vlmopt.devices.inside import times_inside
from vlmopt.devices.operations import GraphOperations, operations_of
from vlmopt.devices.predicting import predict
from vlmopt.devices.whole import call_costs
from vlmopt.graph.branches import find_branches
from vlmopt.workflow.cutting import cut_program
from vlmopt.workflow.device_graphs import DeviceGraph, captured, graphs_of
from vlmopt.workflow.device_predicting import branch_costs
from vlmopt.workflow.device_profiling import measure_operations

TOWER, PIXELS, N_PLANS, SEED = "image_encoder", 112, 20, 0
FEWEST, MOST = 0.1, 0.9  # of the branches, skipped; the number is drawn first, so small cuts are as frequent as large


def parts() -> Mapping[str, Callable[[], Mapping[str, float | str]]]:
    """What can be measured on its own."""
    return {"latency-model": _latency_model}


def random_plans(branches: Sequence[str], *, n: int, seed: int) -> list[list[str]]:
    """Subsets of the branches, in order."""
    generator = random.Random(seed)
    sizes = [round(generator.uniform(FEWEST, MOST) * len(branches)) for _ in range(n)]
    drawn = [set(generator.sample(branches, size)) for size in sizes]
    return [[name for name in branches if name in skipped] for skipped in drawn]


def _latency_model() -> dict[str, float | str]:
    program = captured(str(towers.places("style")[0]), (PIXELS, PIXELS), False, Silent())
    tower = program.with_components({TOWER: program.components[TOWER]})
    plans = random_plans([branch.name for branch in find_branches(tower.components[TOWER].graph)], n=N_PLANS, seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        graphs = [_emitted(tower, plan, Path(folder) / str(i)) for i, plan in enumerate([[], *plans])]
        found = [operations_of(graph.path, graph.feed) for graph in graphs]
        whole = found[0]
        alone = measure_operations(whole.examples, threads=1, progress=Silent())
        lacking = {name: one for each in found for name, one in each.examples.items() if name not in whole.examples}
        if lacking:
            alone = alone.with_more(measure_operations(lacking, threads=1, progress=Silent()))
        calls = {str(i): (graph.path, graph.feed) for i, graph in enumerate(graphs)}
        times = call_costs(calls, threads=1, progress=Silent())
        clock = times_inside(graphs[0].path, graphs[0].feed, whole, threads=1)
    measured = [times[str(i)].us for i in range(len(graphs))]
    fitted = _fitted(alone, whole, measured[0])
    costs = branch_costs(tower, TOWER, fitted, place="here", progress=Silent())
    inside = alone.model_copy(update={"operations": {**alone.operations, **clock}})
    sums = [predict(each, alone, place="here").sum_us for each in found]
    errors = {
        "": [predict(each, fitted, place="here").us for each in found[1:]],
        "sum_": sums[1:],
        "by_branch_": [costs.without(plan) for plan in plans],
        "runtime_clock_": [predict(each, inside, place="here").sum_us for each in found[1:]],
    }
    result: dict[str, float | str] = {
        "latency_plans": float(len(plans)),
        "latency_operations": float(len(whole.counts)),
        "latency_operations_only_in_plans": float(len(lacking)),
        "latency_whole_us": measured[0],
        "latency_fastest_plan_us": min(measured[1:]),
        "latency_whole_error_percent": 100 * (sums[0] / measured[0] - 1),
        "latency_node_us": fitted.node_us,
    }
    for name, predicted in errors.items():
        off = [100 * (p / m - 1) for p, m in zip(predicted, measured[1:], strict=True)]
        result[f"latency_mae_{name}percent"] = statistics.fmean(abs(value) for value in off)
        result[f"latency_worst_{name}percent"] = max(off, key=abs)
    return result


def _emitted(tower: Program, plan: Sequence[str], folder: Path) -> DeviceGraph:
    folder.mkdir()
    (graph,) = graphs_of(cut_program(tower, {TOWER: plan}), folder, progress=Silent())
    return graph


def _fitted(profile: DeviceProfile, whole: GraphOperations, measured_us: float) -> DeviceProfile:
    check = GraphCheck(
        component=TOWER,
        n_operations=whole.counts.total(),
        predicted_us=predict(whole, profile, place="here").sum_us,
        measured_us=measured_us,
    )
    return profile.model_copy(update={"checks": (check,)}).fitted()
