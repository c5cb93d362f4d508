"""Publish a built folder in one rename, with a fingerprint of what it was built from.

A folder that is visible under its final name is complete: it is built beside the target and renamed, so a killed run
leaves only a hidden folder that no run reads. The fingerprint says whether a finished folder is the one wanted now.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

# hidden, so that a reader of image folders does not take it for data
_MARKER = ".built_from.json"


class Existing(Enum):
    """What to do with a finished folder: REFUSE or REFRESH one that was built from other inputs, REPLACE any."""

    REFUSE = "refuse"
    REFRESH = "refresh"
    REPLACE = "replace"


def built_from(target: Path) -> dict[str, str] | None:
    """What `target` was built from, or None if there is no finished folder."""
    marker = target / _MARKER
    return json.loads(marker.read_text()) if marker.is_file() else None


def publish(target: Path, build: Callable[[Path], None], *, fingerprint: Mapping[str, str], existing: Existing) -> bool:
    """Build `target` unless it is there already; returns whether it was built.

    Raises:
        FileExistsError: what is there was built from something else, and `existing` says to refuse that.
    """
    if built_from(target) == dict(fingerprint) and existing is not Existing.REPLACE:
        return False
    if target.exists() and existing is Existing.REFUSE:
        raise FileExistsError(f"{target} exists and was built from something else; add --force to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        build(fresh)
        (fresh / _MARKER).write_text(json.dumps(dict(fingerprint), indent=2, sort_keys=True) + "\n")
        if target.exists():
            target.rename(scratch / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True
