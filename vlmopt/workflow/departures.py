"""`vlmopt verify --worst-nodes`: where the emitted files depart from the program, and the program from the original."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import fx

from vlmopt.core.errors import ArtifactError, VlmoptError
from vlmopt.core.ledger import Ledger
from vlmopt.core.manifest import ComponentEntry, read_manifest
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.core.workload import Feed
from vlmopt.emit.exported import export_component
from vlmopt.graph.modules import output_values
from vlmopt.recipe.loading import load_recipe
from vlmopt.rundir import RECIPE, RunDirectory
from vlmopt.verify.worst_nodes import Departure, departure, graph_values, onnx_values
from vlmopt.workflow.artifact import recorded_cases
from vlmopt.workflow.bisecting.states import SiteLine
from vlmopt.workflow.opening import open_recipe, open_task
from vlmopt.workflow.optimizing import load_passes, set_up
from vlmopt.workflow.publishing import CASES
from vlmopt.workflow.run_state import RunState


def worst_nodes(path: Path, *, n: int = 10, progress: Progress | None = None) -> dict[str, Any]:
    """The nodes that depart most, ONNX file against program, and program against original by the nodes both have.

    The program is made again from the artifact's recipe. Where the model or the task is not there any more, an artifact
    with .pt2 files is compared with those, and the original with nothing.

    Raises:
        ArtifactError: there is no program to compare with.
    """
    show = progress or Silent()
    manifest = read_manifest(path)
    if not (path / CASES).is_file():
        raise ArtifactError(str(path), f"has no {CASES}", expected="an artifact with the cases it was verified on")
    original, optimized, note = _programs(path, show)
    recorded = load_file(path / CASES)
    files: dict[str, Any] = {}
    for name, entry in manifest.components.items():
        if "onnx" not in entry.files:
            continue
        with show.stage(f"nodes of {name}"):
            feed, _ = recorded_cases(recorded, name, entry)[0]
            graph = _graph(path, name, entry, optimized, note)
            files[name] = {"file": entry.files["onnx"], **_rows(_against_file(path, entry, graph, feed), n)}
    if not files:
        raise ArtifactError(str(path), "has no ONNX file", remedy="make the artifact with --emit onnx")
    return {
        "files": files,
        "original": _against_original(original, optimized, recorded, manifest.components, n),
        "note": note,
    }


def _programs(path: Path, show: Progress) -> tuple[Program | None, Program | None, str]:
    """The original and the optimized program made again; or why that cannot be."""
    try:
        recipe = load_recipe(path / RECIPE)
        passes = load_passes(recipe)
        opened = open_recipe(recipe, progress=show)
        bound = None if recipe.task is None else open_task(opened, recipe.task, seed=recipe.seed, progress=show)
        with tempfile.TemporaryDirectory() as folder, RunDirectory(Path(folder) / "again", key="") as run:
            state = RunState(recipe, run, opened, bound, Ledger(), show)
            set_up(state)
            line = SiteLine(state, passes)
            return state.original, line.reach(len(line.sites)).program, ""
    except VlmoptError as error:
        return None, None, f"the program cannot be made again from {path / RECIPE}: {error.one_line()}"


def _graph(path: Path, name: str, entry: ComponentEntry, program: Program | None, note: str) -> fx.GraphModule:
    """The component as it was exported: its nodes have the names that values of the ONNX file have."""
    if program is not None and name in program.components:
        exported = export_component(program.components[name], program.dims)
    elif "pt2" in entry.files:
        try:
            exported = torch.export.load(str(path / entry.files["pt2"]))
        except Exception as error:
            reason = str(error).splitlines()[0][:200]
            raise ArtifactError(str(path / entry.files["pt2"]), f"cannot be loaded ({reason})") from error
    else:
        found = note or f"its recipe makes no {name}"
        raise ArtifactError(
            str(path), found, remedy="make the artifact with --emit onnx,pt2 to compare without the model"
        )
    graph = exported.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def _against_file(path: Path, entry: ComponentEntry, graph: fx.GraphModule, feed: Feed) -> Departure:
    wanted = graph_values(graph, feed)
    found = onnx_values(path / entry.files["onnx"], feed, wanted)
    for spec, node in zip(entry.outputs, output_values(graph), strict=True):
        found[node.name] = found[spec.name]  # the file calls its outputs as the component does
    return departure(graph, found, wanted)


def _against_original(
    original: Program | None,
    optimized: Program | None,
    recorded: Mapping[str, torch.Tensor],
    entries: Mapping[str, ComponentEntry],
    n: int,
) -> dict[str, Any]:
    """By the names of the nodes that no pass has touched; components that are gone are left out."""
    rows: dict[str, Any] = {}
    if original is None or optimized is None:
        return rows
    for name, part in optimized.components.items():
        before = original.components.get(name)
        if before is None or name not in entries or before.inputs != part.inputs:
            continue
        feed, _ = recorded_cases(dict(recorded), name, entries[name])[0]
        found = departure(part.graph, graph_values(part.graph, feed), graph_values(before.graph, feed))
        rows[name] = _rows(found, n)
    return rows


def _rows(found: Departure, n: int) -> dict[str, Any]:
    return {
        "n_compared": len(found.nodes),
        "nodes": [asdict(node) for node in found.worst(n)],
        "first_jump": None if found.first_jump is None else asdict(found.first_jump),
    }
