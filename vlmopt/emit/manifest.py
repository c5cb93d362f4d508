"""Builds manifest.json from a program and what was emitted and verified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from vlmopt import __version__
from vlmopt.core.machine import n_cores, operating_system, processor_name, versions
from vlmopt.core.manifest import (
    MANIFEST,
    AdapterItem,
    ComponentEntry,
    DimEntry,
    FileEntry,
    GateEntry,
    GenerationEntry,
    MachineEntry,
    Manifest,
    SimilarityEntry,
    SourceEntry,
    TensorEntry,
    file_entries,
)
from vlmopt.core.program import Component, Dim, ModelSource, Program, TensorSpec
from vlmopt.rundir import write_json


def build_manifest(
    program: Program,
    emitted: Mapping[str, Mapping[str, str]],
    folder: Path,
    *,
    files: Iterable[Path],
    task: str | None = None,
    metric: str | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    gates: Sequence[GateEntry] = (),
    adapters: Mapping[str, AdapterItem] | None = None,
    tolerances: Mapping[str, float] | None = None,
) -> Manifest:
    """The manifest of an artifact that lies complete in `folder`, but for the manifest itself.

    Args:
        emitted: what `emit_program` returned.
        files: every file whose change must be noticed; hashed here.
        prompts: the texts that stand for the labels, label by label, for an artifact that keeps its text encoder.
        tolerances: by component, what its ONNX file was held to, where that is not what its type allows.
    """
    similarity = program.similarity
    return Manifest(
        vlmopt=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        assembly=program.assembly.value,
        task=task,
        metric=metric,
        labels=program.labels,
        similarity=None if similarity is None else SimilarityEntry(scale=similarity.scale, bias=similarity.bias),
        generation=generation_entry(program),
        prompts=tuple(prompts),
        dims={name: dim_entry(dim) for name, dim in program.dims.items()},
        components={
            name: component_entry(part, emitted.get(name, {}), (tolerances or {}).get(name))
            for name, part in program.components.items()
        },
        source=_source(program.source),
        versions=versions(),
        machine=_machine(),
        seed=seed,
        files=_files(folder, files),
        gates=tuple(gates),
        adapters=dict(adapters or {}),
    )


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Writes manifest.json into the folder, whole or not at all.

    Raises:
        VlmoptError: the disk is full or the folder cannot be written.
    """
    path = folder / MANIFEST
    write_json(path, manifest.model_dump(mode="json", by_alias=True))
    return path


def _machine() -> MachineEntry:
    return MachineEntry(cpu=processor_name(), cores=n_cores(), os=operating_system())


def dim_entry(dim: Dim) -> DimEntry:
    return DimEntry(minimum=dim.minimum, maximum=dim.maximum, typical=dim.typical)


def generation_entry(program: Program) -> GenerationEntry | None:
    """How the components make one model that writes text; None where they make another."""
    return None if program.generation is None else GenerationEntry(**asdict(program.generation))


def _source(source: ModelSource) -> SourceEntry:
    return SourceEntry(
        path=source.path,
        model_type=source.model_type,
        architecture=source.architecture,
        fingerprint=source.fingerprint,
    )


def component_entry(component: Component, files: Mapping[str, str], tolerance: float | None = None) -> ComponentEntry:
    return ComponentEntry(
        files=dict(files),
        inputs=tuple(_tensor(spec) for spec in component.inputs),
        outputs=tuple(_tensor(spec) for spec in component.outputs),
        onnx_tolerance=tolerance,
    )


def _tensor(spec: TensorSpec) -> TensorEntry:
    return TensorEntry(name=spec.name_in_files, shape=spec.shape, dtype=spec.dtype)


def _files(folder: Path, paths: Iterable[Path]) -> dict[str, FileEntry]:
    return file_entries(folder, [path for path in paths if path.name != MANIFEST])
