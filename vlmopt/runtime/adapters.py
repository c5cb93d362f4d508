"""An artifact's adapters: which there are, and the weights that one puts into each graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vlmopt.core.adapter_file import is_adapter_file, read_arrays, read_header, steps_text
from vlmopt.core.errors import ArtifactError
from vlmopt.core.manifest import Manifest

Weights = Mapping[str, Mapping[str, NDArray[Any]]]  # component -> name in its graph -> numbers


def adapter_weights(folder: Path, manifest: Manifest, adapter: str | Path) -> Weights:
    """What the adapter puts into the artifact's graphs: one of its own by name, or that of a file.

    Raises:
        ArtifactError: the artifact has no such adapter, or none can be switched in it.
        ModelError: the file is corrupt, or belongs to another model or another kind of adapter.
    """
    known = {name: item for name, item in manifest.adapters.items() if item.is_switchable}
    active = next((item for item in known.values() if item.is_active), None)
    if active is None:
        held = ", ".join(manifest.adapters) or "none"
        raise ArtifactError(
            str(folder),
            f"has no adapter that can be switched (it was made with: {held})",
            expected="an artifact whose passes left an adapter in the graphs, emitted as ONNX",
        )
    if str(adapter) in known:
        file = folder / known[str(adapter)].file
    elif is_adapter_file(adapter):
        file = Path(adapter)
    else:
        names = ", ".join(sorted(known))
        raise ArtifactError(str(folder), f"has no adapter {adapter}", expected=f"{names}, or a file of one")
    place = f"adapter {adapter}"
    header, own = read_header(file, place), read_header(folder / active.file, f"{folder}/{active.file}")
    if (header.base, steps_text(header)) != (own.base, steps_text(own)):
        what = "another model" if header.base != own.base else "this model by other passes"
        raise ArtifactError(place, f"was trained on {what}", expected=f"one like {', '.join(sorted(known))}")
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in read_arrays(file, header, place).items():
        component, _, path = key.partition("/")
        found.setdefault(component, {})[path] = array
    return found
