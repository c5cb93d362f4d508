"""A component as OpenVINO's own files, which its runtimes read without converting anything."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vlmopt.core.errors import EmitError
from vlmopt.core.formats import OPENVINO_WEIGHTS
from vlmopt.core.program import Component, Dim
from vlmopt.emit.onnx_file import emit_onnx
from vlmopt.emit.written import EmittedFile, appearing


def emit_openvino(component: Component, dims: Mapping[str, Dim], path: Path, *, opset: int) -> EmittedFile:
    """Writes the component as `path` (`.xml`) and its weights beside it (`.bin`), in the types that they have.

    OpenVINO converts the component's ONNX graph, so inputs have the same names, and quantized layers stay quantized.

    Raises:
        EmitError: OpenVINO refuses the graph.
        VlmoptError: the files cannot be written.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / path.name
        emit_onnx(component, dims, source, opset=opset)
        try:
            # `convert_model` would fold weights of fewer bits into float32.
            openvino.save_model(openvino.Core().read_model(source), target, compress_to_fp16=False)
        except RuntimeError as problem:
            reason = " ".join(str(problem).split())[:300]
            raise EmitError(
                component.name, f"OpenVINO refuses it ({reason})", remedy="leave openvino out of --emit"
            ) from problem
        weights = path.with_suffix(OPENVINO_WEIGHTS)
        with appearing(weights) as beside, appearing(path) as temporary:
            shutil.copyfile(target.with_suffix(OPENVINO_WEIGHTS), beside)
            shutil.copyfile(target, temporary)
    return EmittedFile(path, (weights,))
