"""Compiles CLIP ViT-B/32 (full size, random weights) in its own process; prints seconds and peak memory as JSON.

usage: python -m tests.benchmarks.compile_clip vlmopt|plain FOLDER
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel


def main() -> None:
    """Times one side; building the model is not counted."""
    side, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()  # the defaults are ViT-B/32
    start = time.perf_counter()
    (_vlmopt if side == "vlmopt" else _plain)(model, folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    print(json.dumps({"seconds": seconds, "peak_gb": peak}))


def _vlmopt(model: CLIPModel, folder: Path) -> None:
    from vlmopt.capture import capture_model
    from vlmopt.core.program import ModelSource
    from vlmopt.core.progress import Silent
    from vlmopt.emit import emit_program

    program = capture_model(model, ModelSource("random", "clip", "CLIPModel", ""))
    emit_program(program, ["onnx"], folder, progress=Silent())


def _plain(model: CLIPModel, folder: Path) -> None:
    batch, text = torch.export.Dim("batch", min=1, max=1024), torch.export.Dim("text", min=2, max=77)
    ids = torch.randint(1, 40000, (2, 16))
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 224, 224), "attention_mask": torch.ones_like(ids)}
    dynamic = {"input_ids": {0: batch, 1: text}, "pixel_values": {0: batch}, "attention_mask": {0: batch, 1: text}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (), folder / "model.onnx", kwargs=inputs, dynamic_shapes=dynamic, dynamo=True, opset_version=20
        )


if __name__ == "__main__":
    main()
