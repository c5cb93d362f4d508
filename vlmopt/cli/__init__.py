"""The command line: the only place that prints, prompts or exits. Nothing is imported before it is needed."""

from __future__ import annotations

from vlmopt.cli.entry import main

__all__ = ["main"]
