"""The graphs of an artifact as they lie there, or of a model as a run without cuts would emit them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vlmopt.core.errors import ArtifactError, VlmoptError
from vlmopt.core.manifest import MANIFEST, TensorEntry, read_manifest
from vlmopt.core.progress import Progress
from vlmopt.graph.assembled import DECODER
from vlmopt.workflow.artifact import recorded_cases
from vlmopt.workflow.device_graphs import DeviceGraph, captured, graphs_of
from vlmopt.workflow.publishing import CASES
from vlmopt.workflow.timing import NEXT_TOKEN


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
