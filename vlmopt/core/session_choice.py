"""session.json: which options of ONNX Runtime were fastest for an artifact on one machine.

It lies beside the manifest and is no part of what was verified when the artifact was made: it belongs to the machine
that runs it. On another machine, or under another version of the runtime, it counts for nothing.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmopt.core.errors import ArtifactError
from vlmopt.core.machine import n_cores, processor_name

SESSION = "session.json"
Optimization = Literal["all", "extended", "basic"]


class SessionChoice(BaseModel):
    """How far the runtime optimizes graphs, on how many threads; and what every variant took, in microseconds of a call
    of all graphs in its quietest round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    cpu: str
    cores: int
    runtime: str
    optimization: Optimization
    threads: int
    times_us: dict[str, float]

    @property
    def is_of_here(self) -> bool:
        """Whether it was measured on this machine, with the runtime that is installed."""
        return (self.cpu, self.cores, self.runtime) == (processor_name(), n_cores(), metadata.version("onnxruntime"))


def choice_for_here(folder: Path) -> SessionChoice | None:
    """The choice that lies in an artifact, where there is one and it is of this machine.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / SESSION
    if not path.is_file():
        return None
    try:
        found = SessionChoice.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        remedy = "delete it, or make it again with `vlmopt device tune`"
        raise ArtifactError(str(path), f"cannot be read ({where}: {first['msg']})", remedy=remedy) from error
    return found if found.is_of_here else None
