"""What operations cost on a device (`vlmopt device`): measured here, or by a runner on another machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmopt.core.energy import energy_meter
from vlmopt.core.errors import OutputExistsError, ProfileError
from vlmopt.core.machine import n_cores
from vlmopt.core.progress import Progress, Silent
from vlmopt.devices import measure
from vlmopt.devices.alone import write_folder
from vlmopt.devices.document import (
    DeviceProfile,
    GraphCheck,
    described,
    profile_of_results,
    read_device_profile,
    read_results,
)
from vlmopt.devices.inside import times_inside
from vlmopt.devices.operations import GraphOperations, Level, Operation, operations_of
from vlmopt.devices.predicting import predict
from vlmopt.devices.whole import CallCost, call_costs
from vlmopt.rundir import RunFile, disk_errors
from vlmopt.workflow.device_graphs import DeviceGraph
from vlmopt.workflow.device_opening import DeviceSource
from vlmopt.workflow.profiling import digest


def profile_device(
    source: str,
    output: Path,
    *,
    threads: int | None = None,
    image_size: tuple[int, int] | None = None,
    components: Sequence[str] = (),
    allow_pickle: bool = False,
    together: bool = False,
    rounds: int = measure.ROUNDS,
    update: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures every distinct operation of a model's or an artifact's graphs in ONNX Runtime and writes the profile.

    Args:
        image_size: height and width that a model is captured at; by default its processor's.
        components: only these; by default all.
        together: operations of the edits that one plan may make as well, but for those with graphs inside.
        rounds: turns of every operation; the quietest counts.
        update: an existing file keeps its times and gets those that it lacks.

    Raises:
        ProfileError: the file to update is of another runtime, machine or number of threads.
        OutputExistsError: the file exists, and is neither to be updated nor replaced.
    """
    show = progress or Silent()
    with RunFile(output, key=digest([source]), force=force or update) as run:
        known = read_device_profile(output) if update and output.exists() else None
        asked = threads or (known.runtime.threads if known is not None else n_cores())
        graphs = DeviceSource(source, image_size, components, allow_pickle, show)
        more = _of_edits(graphs, together=together)
        with _found_operations(graphs) as found:
            profile = _measured(found, known, more, threads=asked, rounds=rounds, progress=show)
        run.publish(profile.to_json())
    return described(profile)


def export_operations(
    source: str,
    folder: Path,
    *,
    image_size: tuple[int, int] | None = None,
    components: Sequence[str] = (),
    allow_pickle: bool = False,
    together: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the operations of a model's graphs as a folder that `measure.py` in it measures on another device.

    Graphs are optimized as far as any processor runs the result; operations with graphs inside are left out.

    Raises:
        OutputExistsError: the folder exists.
    """
    show = progress or Silent()
    if folder.exists():
        raise OutputExistsError(str(folder), "exists already", remedy="choose another path")
    graphs = DeviceSource(source, image_size, components, allow_pickle, show)
    more = _of_edits(graphs, together=together, level="extended")
    with _found_operations(graphs, level="extended") as found:
        examples = {**more, **_examples([graph for _, graph in found])}
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".vlmopt-", dir=folder.parent) as place:
                n_models = write_folder(examples.values(), Path(place) / "made", level="extended")
                (Path(place) / "made").rename(folder)
    left_out = [name for name, operation in examples.items() if not operation.stands_alone]
    return {"folder": str(folder), "operations": n_models, "left_out": left_out}


def import_results(
    results: Path, output: Path, *, allow_other_runtime: bool = False, force: bool = False
) -> dict[str, Any]:
    """Makes a device profile of what the runner measured on a device."""
    with RunFile(output, key=digest([str(results)]), force=force) as run:
        profile = read_results(results, allow_other_runtime=allow_other_runtime)
        run.publish(profile.to_json())
    return described(profile)


Found = list[tuple[DeviceGraph, GraphOperations]]


@contextmanager
def _found_operations(source: DeviceSource, *, level: Level = "all") -> Iterator[Found]:
    """The emitted graphs, which are there until this is left, with what ONNX Runtime makes of each."""
    with tempfile.TemporaryDirectory(prefix="vlmopt-device-") as place:
        graphs = source.graphs(Path(place))
        tracked = source.progress.track(graphs, "reading what ONNX Runtime makes of", total=len(graphs))
        yield [(graph, operations_of(graph.path, graph.feed, level=level)) for graph in tracked]


def _of_edits(source: DeviceSource, *, together: bool, level: Level = "all") -> dict[str, Operation]:
    """Operations that stand alone of the graphs that a run may leave, with `together` those of edits of one plan."""
    found = [operations_of(graph.path, graph.feed, level=level) for graph in source.edited(together=together)]
    return {name: one for name, one in _examples(found).items() if one.stands_alone}


def _examples(graphs: Sequence[GraphOperations]) -> dict[str, Operation]:
    return {name: one for graph in graphs for name, one in graph.examples.items()}


def _measured(
    found: Found,
    known: DeviceProfile | None,
    more: Mapping[str, Operation],
    *,
    threads: int,
    rounds: int,
    progress: Progress,
) -> DeviceProfile:
    """Times of what is not known yet, joined with what is, and every whole graph beside its sum."""
    if known is not None:
        _require_here(known, threads)
    examples = {**more, **_examples([graph for _, graph in found])}
    missing = {name: one for name, one in examples.items() if known is None or name not in known.operations}
    # Before and after: a machine slows down and speeds up, and the sum is held against the quieter of the two.
    before = _call_costs(found, threads=threads, rounds=rounds, progress=progress)
    profile = measure_operations(missing, threads=threads, rounds=rounds, progress=progress)
    inside = {name for name, one in missing.items() if not one.stands_alone} | set(profile.failed)
    for graph, operations in found:
        if inside & operations.counts.keys():
            times = times_inside(graph.path, graph.feed, operations, threads=threads)
            added = {name: time for name, time in times.items() if name in inside}
            profile = profile.model_copy(update={"operations": {**profile.operations, **added}})
            inside -= added.keys()
    after = _call_costs(found, threads=threads, rounds=rounds, progress=progress)
    if known is not None:
        profile = known.with_more(profile)
    checks = {check.component: check for check in profile.checks}
    for graph, operations in found:
        predicted = predict(operations, profile, place="device profile").sum_us
        quieter = min(before[graph.title], after[graph.title], key=lambda cost: cost.us)
        checks[graph.title] = GraphCheck(
            component=graph.title,
            n_operations=operations.counts.total(),
            predicted_us=predicted,
            measured_us=quieter.us,
            joules=quieter.joules,
        )
    return profile.model_copy(update={"checks": tuple(checks.values()), "energy": energy_meter().note}).fitted()


def _require_here(known: DeviceProfile, threads: int) -> None:
    """Refuses to mix times of two machines or numbers of threads, before anything is measured."""
    if known.runtime.graph != "all" or known.machine.cpu != measure.processor():
        raise ProfileError("--update", "the file is of another device", remedy="measure it there again")
    if known.runtime.threads != threads:
        raise ProfileError(
            "--update", f"the file was measured on {known.runtime.threads} threads", remedy="use another file"
        )


def measure_operations(
    operations: Mapping[str, Operation], *, threads: int, progress: Progress, rounds: int = measure.ROUNDS
) -> DeviceProfile:
    """Times of operations on this machine, each as a model of its own; those with graphs inside are left out."""
    with tempfile.TemporaryDirectory(prefix="vlmopt-operations-") as place:
        n_models = write_folder(operations.values(), Path(place) / "made", level="all")
        with progress.stage(f"measuring {n_models} operations"):
            found = measure.measure(
                Path(place) / "made",
                threads=threads,
                rounds=rounds,
                track=lambda items, what: progress.track(items, what, total=len(items)),
            )
    return profile_of_results(found)


def _call_costs(found: Found, *, threads: int, rounds: int, progress: Progress) -> dict[str, CallCost]:
    """Time and energy of a call of every graph."""
    calls = {one.title: (one.path, one.feed) for one, _ in found}
    return call_costs(calls, threads=threads, rounds=rounds, progress=progress)
