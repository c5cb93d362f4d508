"""What the user asked of the command line itself, gathered while options are parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Settings:
    """Shared by the commands and `main`, which must know it when a command fails."""

    verbosity: int = 0  # -1 with --quiet
    is_debugging: bool = False
    output: Path | None = None  # where the command writes, so that an interruption can say what is kept
