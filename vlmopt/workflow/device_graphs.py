"""The ONNX graphs of a model or an artifact with one input each, as a device runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from vlmopt.capture import capture
from vlmopt.capture.loading import resolve_folder
from vlmopt.core.contract import Context
from vlmopt.core.errors import ArtifactError, VlmoptError
from vlmopt.core.manifest import MANIFEST, TensorEntry, read_manifest
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.emit import DEFAULT_OPSET, emit_program
from vlmopt.graph.assembled import DECODER
from vlmopt.preprocess import Preprocessor
from vlmopt.recipe.schema import EXACT_PASSES
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.workflow.artifact import recorded_cases
from vlmopt.workflow.publishing import CASES
from vlmopt.workflow.samples import sample_feeds, sample_shapes, single
from vlmopt.workflow.timing import NEXT_TOKEN


@dataclass(frozen=True)
class DeviceGraph:
    """A graph file and one sample for it. A decoder is there twice: for a prompt, and for the next token."""

    title: str
    path: Path
    feed: Mapping[str, NDArray[Any]]


def open_graphs(
    source: str,
    folder: Path,
    *,
    image_size: tuple[int, int] | None,
    components: Sequence[str],
    allow_pickle: bool,
    progress: Progress,
) -> list[DeviceGraph]:
    """The graphs of an artifact as they lie there, or those of a model, emitted into the folder as a run without cuts
    would emit them.

    Raises:
        VlmoptError: neither, or it has no such component.
    """
    if (Path(source) / MANIFEST).is_file():
        if image_size is not None:
            raise VlmoptError("--image-size", "an artifact has the size it was made for", remedy="leave it out")
        graphs = _of_artifact(Path(source))
    else:
        graphs = graphs_of(captured(source, image_size, allow_pickle, progress), folder, progress=progress)
    titles = [graph.title for graph in graphs]
    unknown = [name for name in components if name not in titles]
    if unknown:
        raise VlmoptError("--component", f"{unknown[0]!r} is not there", expected=f"one of {', '.join(titles)}")
    return [graph for graph in graphs if not components or graph.title in components]


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


def _of_artifact(path: Path) -> list[DeviceGraph]:
    manifest = read_manifest(path)
    recorded = load_file(path / CASES)
    graphs = []
    for name, entry in manifest.components.items():
        if "onnx" not in entry.files:
            raise ArtifactError(str(path), f"{name} has no ONNX file", remedy="make the artifact with --emit onnx")
        for number, (feed, _) in enumerate(recorded_cases(recorded, name, entry)):
            is_step = number == 1 and name == DECODER and manifest.generation is not None
            if number == 0 or is_step:
                arrays = {spec.name: _first(spec, feed[spec.name]).numpy() for spec in entry.inputs}
                graphs.append(DeviceGraph(NEXT_TOKEN if is_step else name, path / entry.files["onnx"], arrays))
    return graphs


def _first(spec: TensorEntry, value: Tensor) -> Tensor:
    """The first sample of a recorded input; the batch need not be the first axis."""
    axis = next((i for i, size in enumerate(spec.shape) if size in ("batch", "images")), 0)
    return value.narrow(axis, 0, 1).contiguous()
