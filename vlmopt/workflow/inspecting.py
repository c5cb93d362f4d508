"""What a model is made of: its components and their branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmopt.capture import capture
from vlmopt.capture.loading import resolve_folder
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import AdapterSource, Component, Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import component_cost, nodes_cost, peak_activation_bytes
from vlmopt.preprocess import Preprocessor
from vlmopt.workflow.opening import check_device, open_model, open_task
from vlmopt.workflow.picturing import Picture, check_picture, write_picture


def inspect_model(
    model: str,
    *,
    task: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    allow_pickle: bool = False,
    with_weights: bool = True,
    adapters: Sequence[AdapterSource] = (),
    picture: Picture | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Components, branches and their cost, as plain data; with `picture`, drawn into a file too.

    Without weights only config.json is read. With a task the program is the one bound to it. Adapters are put on the
    model first, which then is read with its weights.
    """
    show = progress or Silent()
    if picture is not None:
        check_picture(picture)
    check_device(device)
    if task is not None or adapters:
        opened = open_model(
            model, device=device, dtype=dtype, allow_pickle=allow_pickle, adapters=adapters, progress=show
        )
        program = opened.program if task is None else open_task(opened, task, seed=0, progress=show).program
    else:
        with show.stage("capture"):
            program = capture(
                model,
                image=_processor_size(model),
                device=device,
                dtype=dtype,
                allow_pickle=allow_pickle,
                with_weights=with_weights,
            )
    found = describe(program)
    if picture is not None:
        rows = {name: part["branches"] for name, part in found["components"].items()}
        with show.stage("drawing"):
            write_picture(program, rows, picture, has_weights=with_weights or task is not None or bool(adapters))
    return found


def _processor_size(model: str) -> tuple[int, int] | None:
    """The size of images after preprocessing; a model without a processor is inspected at its configuration's size."""
    try:
        return Preprocessor.load(resolve_folder(model)).image_size
    except VlmoptError:
        return None


def describe(program: Program) -> dict[str, Any]:
    """The program as plain data; the shape that `vlmopt inspect --json` prints."""
    return {
        "assembly": program.assembly.value,
        "model": {
            "path": program.source.path,
            "model_type": program.source.model_type,
            "architecture": program.source.architecture,
        },
        "components": {name: _component(program, part) for name, part in program.components.items()},
    }


def _component(program: Program, component: Component) -> dict[str, Any]:
    cost = component_cost(component, program.dims)
    return {
        "params": cost.parameters,
        "params_bytes": cost.parameters_bytes,
        "macs": cost.macs,
        "activation_bytes": peak_activation_bytes(component, program.dims),
        "inputs": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in component.inputs],
        "outputs": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in component.outputs],
        "branches": branch_rows(program, component),
    }


def branch_rows(program: Program, component: Component) -> list[dict[str, Any]]:
    rows = []
    for branch in find_branches(component.graph):
        cost = nodes_cost(component, branch.region, program.dims)
        rows.append(
            {
                "name": branch.name,
                "kind": branch.kind.value,
                "layer": branch.layer,
                "layer_name": branch.layer_name,
                "params": cost.parameters,
                "macs": cost.macs,
                "activation_bytes": cost.activation_bytes,
            }
        )
    return rows
