"""The files of the model's folder that an artifact carries: its processor, and a configuration that fits the graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmopt.core.program import Program
from vlmopt.rundir import write_json

CONFIGURATION = "config.json"


def copy_processor(files: Sequence[Path], program: Program, folder: Path) -> None:
    """Copies the files; in config.json the decoder gets as many layers as its cache has entries.

    Runtimes make the empty cache from that number (transformers.js, onnxruntime-genai), so it follows the graphs.
    """
    for source in files:
        target = folder / source.name
        if source.name == CONFIGURATION and program.generation is not None and program.generation.cache_layers:
            content = json.loads(source.read_text(encoding="utf-8"))
            write_json(target, _with_layers(content, len(program.generation.cache_layers)))
        else:
            shutil.copyfile(source, target)


def _with_layers(content: dict[str, Any], n_layers: int) -> dict[str, Any]:
    text = content.get("text_config")
    if isinstance(text, dict):
        return {**content, "text_config": {**text, "num_hidden_layers": n_layers}}
    return {**content, "num_hidden_layers": n_layers}
