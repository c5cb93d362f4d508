"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlmopt.core.errors import EmitError
from vlmopt.rundir import disk_errors


@dataclass(frozen=True)
class EmittedFile:
    """A graph file, with the files beside it that it cannot be read without."""

    path: Path
    companions: tuple[Path, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in (self.path, *self.companions))


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the name `path` if the block ends well, and is removed otherwise.

    Raises:
        VlmoptError: the file cannot be written (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        except RuntimeError as problem:  # what torch's own writers raise for a full disk
            reason = " ".join(str(problem).split())[:200]
            raise EmitError(str(path), f"cannot be written ({reason})", remedy="free some space") from problem
        finally:
            temporary.unlink(missing_ok=True)
