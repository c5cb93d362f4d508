"""The graphs of an artifact as they lie there, or of a model as a run without cuts would emit them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vlmopt.core.errors import ArtifactError, VlmoptError
from vlmopt.core.manifest import MANIFEST, TensorEntry, read_manifest
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress, Silent
from vlmopt.graph.assembled import DECODER
from vlmopt.workflow.artifact import recorded_cases
from vlmopt.workflow.device_edits import edited_programs
from vlmopt.workflow.device_graphs import DeviceGraph, captured, graphs_of
from vlmopt.workflow.publishing import CASES
from vlmopt.workflow.timing import NEXT_TOKEN


@dataclass
class DeviceSource:
    """A model, captured at most once, or an artifact.

    Args:
        image_size: height and width that a model is captured at; by default its processor's.
        components: only graphs of these titles; all where there are none.
    """

    source: str
    image_size: tuple[int, int] | None = None
    components: Sequence[str] = ()
    allow_pickle: bool = False
    progress: Progress = field(default_factory=Silent)

    @property
    def is_artifact(self) -> bool:
        return (Path(self.source) / MANIFEST).is_file()

    @cached_property
    def _program(self) -> Program:
        return captured(self.source, self.image_size, self.allow_pickle, self.progress)

    def graphs(self, folder: Path) -> list[DeviceGraph]:
        """The graphs of an artifact as they lie there, or those of a model, emitted into the folder as a run without
        cuts would emit them.

        Raises:
            VlmoptError: neither, or it has no such component.
        """
        if not self.is_artifact:
            return self._asked_for(graphs_of(self._program, folder, progress=self.progress))
        if self.image_size is not None:
            raise VlmoptError("--image-size", "an artifact has the size it was made for", remedy="leave it out")
        return self._asked_for(_of_artifact(Path(self.source)))

    def edited(self, *, together: bool) -> Iterator[DeviceGraph]:
        """The graphs of a model behind what spares it products, and with `together` behind the edits that one plan may
        make; a file is there until the next one is asked for.

        Raises:
            VlmoptError: it is an artifact, or has no such component.
        """
        if self.is_artifact and not together:
            return
        if self.is_artifact:
            remedy = "pass the model that it was made from"
            raise VlmoptError("--together", "an artifact holds its plan already", remedy=remedy)
        for program in edited_programs(self._program, self.progress, together=together):
            named = {name: part for name, part in program.components.items() if name in self.components}
            if named and program.generation is None:  # the graphs of one that writes are run to make inputs for others
                program = program.with_components(named)
            with tempfile.TemporaryDirectory(prefix="vlmopt-edited-") as place:
                yield from self._asked_for(graphs_of(program, Path(place), progress=self.progress))

    def _asked_for(self, graphs: list[DeviceGraph]) -> list[DeviceGraph]:
        titles = [graph.title for graph in graphs]
        unknown = [name for name in self.components if name not in titles]
        if unknown:
            raise VlmoptError("--component", f"{unknown[0]!r} is not there", expected=f"one of {', '.join(titles)}")
        return [graph for graph in graphs if not self.components or graph.title in self.components]


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
