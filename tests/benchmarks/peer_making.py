"""Converts the plain tower with what lies in the project's own environment, one row a process.

`python -m tests.benchmarks.peer_making ROW FOLDER` reads `tower.pt`, `sample.npy` and `plain.onnx` of the folder and
writes the row's file there; it prints the seconds, without imports, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmopt.core.integer_products import saturates

OPSET = 20  # the newest that ONNX Runtime and OpenVINO both read without conversion


def plain_onnx(folder: Path, target: Path) -> None:
    """`torch.onnx.export` with its optimizer, sizes fixed."""
    torch.onnx.export(
        _tower(folder),
        (_sample(folder),),
        target,
        dynamo=True,
        opset_version=OPSET,
        external_data=False,
        input_names=["pixel_values"],
        output_names=["output"],
        verbose=False,
    )


def fused(folder: Path, target: Path) -> None:
    """`transformers.exporters` with its fusions for ONNX Runtime on a CPU."""
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(ort_fusions="cpu", opset_version=OPSET)
    exported = OnnxExporter().export(_tower(folder), {"pixel_values": _sample(folder)}, config=config)
    onnx_ir.save(exported.program, target)


def scripted(folder: Path, target: Path) -> None:
    """Traced; frozen and optimized for inference where it is opened, since what that makes cannot be saved."""
    tower, sample = _tower(folder), _sample(folder)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript says of itself that it is deprecated
        torch.jit.trace(tower, sample).save(target)


def dynamic_int8(folder: Path, target: Path, source: str = "plain.onnx") -> None:
    """`quantize_dynamic` behind the pre-processing that its documentation asks for, all its operations, by channel;
    weights unsigned where products with signed ones saturate. Without the symbolic shapes the shapes of the graph's
    transposed weights contradict each other."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kind = QuantType.QUInt8 if saturates() else QuantType.QInt8
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(folder / source), str(prepared))
    quantize_dynamic(str(prepared), str(target), per_channel=True, weight_type=kind)
    prepared.unlink()


def _tower(folder: Path) -> Any:
    return torch.load(folder / "tower.pt", weights_only=False).eval()


def _sample(folder: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / "sample.npy"))


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "plain.onnx": plain_onnx,
    "fused.onnx": fused,
    "scripted.ts": scripted,
    "dynamic-int8.onnx": dynamic_int8,
    "pruned-int8.onnx": partial(dynamic_int8, source="pruned.onnx"),
}


def main(arguments: Sequence[str]) -> int:
    name, place = arguments
    folder = Path(place)
    start = time.perf_counter()
    MAKERS[name](folder, folder / name)
    print(json.dumps({"seconds": time.perf_counter() - start}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
