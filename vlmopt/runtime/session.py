"""One graph of an artifact in ONNX Runtime, with its inputs checked before they reach the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmopt.core.errors import ArtifactError
from vlmopt.core.manifest import ComponentEntry, DimEntry, TensorEntry, content_problems, read_manifest
from vlmopt.core.session_choice import Optimization
from vlmopt.core.sessions import opened

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Session:
    """A loaded graph: named arrays in, named arrays out."""

    name: str
    entry: ComponentEntry
    dims: Mapping[str, DimEntry]
    session: InferenceSession

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name; entries of `feed` that the graph does not read are left aside.

        Raises:
            ArtifactError: an input is missing, or has another type or shape than the graph takes.
        """
        checked = {spec.name: self._checked(spec, feed) for spec in self.entry.inputs}
        self._check_agreement(checked)
        values = self.session.run([spec.name for spec in self.entry.outputs], checked)
        return {spec.name: np.asarray(value) for spec, value in zip(self.entry.outputs, values, strict=True)}

    def _checked(self, spec: TensorEntry, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        place = f"input {spec.name} of {self.name}"
        if spec.name not in feed:
            given = ", ".join(feed) or "nothing"
            raise ArtifactError(place, f"is missing (given: {given})", expected=f"{spec.dtype} {list(spec.shape)}")
        array = feed[spec.name]
        if str(array.dtype) != spec.dtype:
            raise ArtifactError(place, f"is {array.dtype}", expected=spec.dtype)
        fits = len(array.shape) == len(spec.shape) and all(
            self._fits(found, size) for found, size in zip(array.shape, spec.shape, strict=True)
        )
        if not fits:
            raise ArtifactError(place, f"has shape {list(array.shape)}", expected=self._described(spec))
        return np.ascontiguousarray(array)

    def _fits(self, found: int, size: int | str) -> bool:
        if isinstance(size, int):
            return found == size
        return self.dims[size].minimum <= found <= self.dims[size].maximum

    def _described(self, spec: TensorEntry) -> str:
        names = {size for size in spec.shape if isinstance(size, str)}
        bounds = [f"{name} from {self.dims[name].minimum} to {self.dims[name].maximum}" for name in sorted(names)]
        return f"[{', '.join(map(str, spec.shape))}]" + (f" with {', '.join(bounds)}" if bounds else "")

    def _check_agreement(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """A dimension of one name has one size in all inputs."""
        seen: dict[str, tuple[int, str]] = {}
        for spec in self.entry.inputs:
            for found, size in zip(arrays[spec.name].shape, spec.shape, strict=True):
                if not isinstance(size, str):
                    continue
                known, owner = seen.setdefault(size, (found, spec.name))
                if known != found:
                    raise ArtifactError(
                        f"input {spec.name} of {self.name}",
                        f"has {found} as its {size}",
                        expected=f"{known}, as {owner}",
                    )


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
    optimization: Optimization = "all",
) -> InferenceSession:
    """ONNX Runtime on one file.

    Args:
        optimization: how far it rewrites the graph before it runs it.
        weights: what takes the place of weights of these names, which lie in the file's data file.

    Raises:
        ArtifactError: the file is missing, is damaged, or holds what this ONNX Runtime cannot run.
    """
    import onnxruntime

    if not path.is_file():
        raise ArtifactError(str(path), "is missing", remedy="emit the artifact again")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about the runtime's own rewrites
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{optimization.upper()}")
    if threads is not None:
        options.intra_op_num_threads = threads
    chosen = list(providers or CPU)
    unknown = [name for name in chosen if name not in onnxruntime.get_available_providers()]
    if unknown:
        available = ", ".join(onnxruntime.get_available_providers())
        raise ArtifactError("providers", f"{', '.join(unknown)} is not available", expected=f"one of {available}")
    if weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(one)) for one in weights.values()]
        options.add_external_initializers(list(weights), values)
    try:
        return opened(onnxruntime.InferenceSession(str(path), options, providers=chosen))
    except Exception as problem:  # ONNX Runtime's own exceptions share no public base class
        reason = " ".join(str(problem).split())[:200]
        raise ArtifactError(
            str(path), f"ONNX Runtime cannot load it ({reason})", remedy="`vlmopt verify` tells what was changed"
        ) from problem


def check_files(folder: str | Path) -> list[str]:
    """One line for every file of the artifact that is missing or was changed in any byte; reads all of them.

    Raises:
        ArtifactError: the manifest cannot be read.
    """
    place = Path(folder)
    return content_problems(place, read_manifest(place).files)
