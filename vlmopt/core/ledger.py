"""The ledger: lasting facts of a run, one JSON object a line, written as they happen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Ledger:
    """What happened in a run, in order. With a path every entry is also appended to that file at once."""

    path: Path | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)

    def note(self, stage: str, event: str, **facts: Any) -> None:
        entry = {"stage": stage, "event": event, **facts}
        self.entries.append(entry)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry, sort_keys=True, default=str) + "\n")

    @contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Notes the stage's duration, and what the caller puts into the yielded dictionary, once it is done."""
        facts: dict[str, Any] = {}
        start = time.perf_counter()
        yield facts
        self.note(stage, "done", seconds=round(time.perf_counter() - start, 3), **facts)
