"""The ONNX graphs of a program with one input each, as a device runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vlmopt.capture import capture
from vlmopt.capture.loading import resolve_folder
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.emit import DEFAULT_OPSET, emit_program
from vlmopt.graph.assembled import DECODER
from vlmopt.preprocess import Preprocessor
from vlmopt.recipe.schema import EXACT_PASSES
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.workflow.samples import sample_feeds, sample_shapes, single
from vlmopt.workflow.timing import NEXT_TOKEN


@dataclass(frozen=True)
class DeviceGraph:
    """A graph file and one sample for it. A decoder is there twice: for a prompt, and for the next token."""

    title: str
    path: Path
    feed: Mapping[str, NDArray[Any]]


def captured(source: str, image_size: tuple[int, int] | None, allow_pickle: bool, progress: Progress) -> Program:
    """The program of a model behind the exact passes of every run."""
    with progress.stage("capture"):
        folder = resolve_folder(source)
        size = image_size or Preprocessor.load(folder).image_size
        program = capture(source, image=size, allow_pickle=allow_pickle)
        for step, name in enumerate(EXACT_PASSES, 1):
            program = run_step(program, make_pass(name, {}), Context(), step=step).program
    return program


def graphs_of(
    program: Program, folder: Path, *, progress: Progress, opset: int = DEFAULT_OPSET, seed: int = 0
) -> list[DeviceGraph]:
    """The program's components, emitted, with inputs of typical sizes at batch 1."""
    files = emit_program(program, ("onnx",), folder, progress=progress, opset=opset)
    feeds = sample_feeds(program, None, seed=seed)
    calls = [(name, name, feeds[name]) for name in program.components]
    if program.generation is not None:
        calls.append((NEXT_TOKEN, DECODER, sample_shapes(program, None, seed=seed)[DECODER][1]))
    graphs = []
    for title, name, feed in calls:
        one = {key: value.numpy() for key, value in single(program.components[name], feed).items()}
        graphs.append(DeviceGraph(title, folder / files[name]["onnx"], one))
    return graphs
