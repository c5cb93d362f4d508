"""A component as a `.pt2` file, which `torch.export.load` reads back as a program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vlmopt.core.program import Component, Dim
from vlmopt.emit.exported import export_component
from vlmopt.emit.written import EmittedFile, appearing


def emit_pt2(component: Component, dims: Mapping[str, Dim], path: Path) -> EmittedFile:
    """Writes the component as `path`; the program in it returns the tuple of outputs and keeps the named dimensions.

    Raises:
        EmitError: torch refuses the graph, or the file cannot be written.
    """
    exported = export_component(component, dims)
    with appearing(path) as temporary, temporary.open("wb") as stream:
        torch.export.save(exported, stream)
    return EmittedFile(path)
