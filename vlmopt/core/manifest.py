"""manifest.json: what an artifact holds, where it came from, and what was verified about it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from vlmopt.core.errors import ArtifactError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorEntry(_Entry):
    """A graph's input or output; a size is a number or the name of a dim."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class DimEntry(_Entry):
    """A size that may vary from call to call, with its inclusive bounds."""

    minimum: int
    maximum: int
    typical: int


class ComponentEntry(_Entry):
    """One graph: its file in every emitted format, its inputs and outputs in order."""

    files: dict[str, str]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    onnx_tolerance: float | None = None  # what its ONNX file was held to, where that is not what its type allows


class SimilarityEntry(_Entry):
    """`logits = scale * normalize(image) @ normalize(text).T + bias`."""

    scale: float
    bias: float = 0.0


class GenerationEntry(_Entry):
    """How the graphs of a generative artifact make one model: what `Generation` says of the program."""

    image_token: int
    image_tokens: int
    stop_tokens: tuple[int, ...] = ()
    start_tokens: tuple[int, ...] = ()
    first_token: int | None = None
    first_position: int = 0
    token_types: tuple[int, int, int] | None = None
    image_grid: tuple[int, int] | None = None
    cross_source: str | None = None
    cache_layers: tuple[int, ...] = ()
    cross_layers: tuple[int, ...] = ()
    processor_tokens: int = 0

    @property
    def reads_across(self) -> bool:
        """Whether an encoder reads the prompt, and the decoder attends to it."""
        return self.cross_source == "encoder_model"

    @property
    def writes_unasked(self) -> bool:
        """Whether it describes an image without a prompt: text begins with tokens of its own."""
        return bool(self.start_tokens) and not self.reads_across


class AdapterItem(_Entry):
    """An adapter that was trained, and its file. Those that can be switched have their place in the graphs, and one of
    them is there.
    """

    file: str
    is_switchable: bool
    is_active: bool


class SourceEntry(_Entry):
    """The original model."""

    path: str
    model_type: str
    architecture: str
    fingerprint: str


class MachineEntry(_Entry):
    """Where the artifact was made."""

    cpu: str
    cores: int
    os: str


class FileEntry(_Entry):
    """What a file must be, byte for byte."""

    sha256: str
    bytes: int


class GateEntry(_Entry):
    """One thing that was verified before the artifact got its name."""

    name: str
    passed: bool
    found: float | str | None = None
    allowed: float | str | None = None


MULTI_TASK = "multi-task"  # the kind of task whose labels are of several tasks, side by side


class Manifest(_Entry):
    """The content of manifest.json."""

    schema_version: Literal[1] = Field(default=1, validation_alias="schema", serialization_alias="schema")
    vlmopt: str
    created: str  # UTC, ISO 8601
    assembly: Literal["dual", "fused", "generative"]
    task: str | None = None  # kind of the task, as task.yaml spells it
    metric: str | None = None
    labels: tuple[str, ...] = ()
    similarity: SimilarityEntry | None = None
    generation: GenerationEntry | None = None
    prompts: tuple[str, ...] = ()
    dims: dict[str, DimEntry]
    components: dict[str, ComponentEntry]
    source: SourceEntry
    versions: dict[str, str]
    machine: MachineEntry
    seed: int = 0
    files: dict[str, FileEntry]
    gates: tuple[GateEntry, ...] = ()
    adapters: dict[str, AdapterItem] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact directory.

    Raises:
        ArtifactError: there is none, it is no JSON, or an entry is missing, unknown or of the wrong kind.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(str(folder), "is no directory", expected="a directory written by `vlmopt optimize`")
    if not path.is_file():
        raise ArtifactError(str(folder), f"has no {MANIFEST}", expected="a directory written by `vlmopt optimize`")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"{path}: {where}" if where else str(path), first["msg"], remedy="emit the artifact again"
        ) from problem
    except OSError as problem:
        raise ArtifactError(str(path), f"cannot be read ({problem.strerror or problem})") from problem


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_entries(folder: Path, paths: Iterable[Path]) -> dict[str, FileEntry]:
    """Size and hash of every file, by its path relative to the artifact directory (with forward slashes)."""
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)
        for path in sorted(paths)
    }


def size_problems(folder: Path, files: dict[str, FileEntry]) -> list[str]:
    """One line for every file that is missing or has another size; quick, since nothing is read."""
    problems = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{name}: has {path.stat().st_size} bytes, not {entry.bytes}")
    return problems


def content_problems(folder: Path, files: dict[str, FileEntry]) -> list[str]:
    """One line for every file that is missing or changed in any byte."""
    problems = size_problems(folder, files)
    broken = {line.split(": ", 1)[0] for line in problems}
    for name, entry in files.items():
        if name not in broken and (found := sha256_of(folder / name)) != entry.sha256:
            problems.append(f"{name}: was changed (sha256 {found[:12]}..., not {entry.sha256[:12]}...)")
    return problems
