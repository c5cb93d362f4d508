"""Converts `plain.onnx` with NNCF, OpenVINO and Olive: a script for their own environment, one row a process.

`peer_making_apart.py ROW FOLDER` reads `plain.onnx` and the arrays of the folder and writes the row's file there; it
prints the seconds, without imports, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
N_CALIBRATED = 300  # NNCF's own default
MAX_DROP = 0.01  # of the metric, absolute
SATURATES = os.environ.get("PRODUCTS_SATURATE") == "1"  # where it does, weights are unsigned or of half the range


def openvino_model(folder: Path, target: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(folder / "plain.onnx"), target, compress_to_fp16=False)


def nncf_int8(folder: Path, target: Path) -> None:
    """`nncf.quantize` as documented for transformers: mixed preset, SmoothQuant by the model's type."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "plain.onnx")
    openvino.save_model(nncf.quantize(model, _calibration(folder), **_options()), target)


def nncf_accuracy(folder: Path, target: Path) -> None:
    """`nncf.quantize_with_accuracy_control`, the task's metric on its validation split."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "plain.onnx")
    facts, inputs = np.load(folder / "validation.npz"), np.load(folder / "validation.npy", mmap_mode="r")
    data = nncf.Dataset(range(len(inputs)), lambda item: _one(inputs, item))

    def validated(compiled: Any, items: Iterable[Any]) -> tuple[float, list[float]]:
        """The metric of what a model makes of these inputs, and what every one of them scores."""
        rows, found = list[int](), list[Array]()
        for item in items:
            found.append(compiled(_one(inputs, item) if np.isscalar(item) else item)[0])
            rows.append(len(rows) if not np.isscalar(item) else int(item))
        scores = item_scores(np.concatenate(found), np.asarray(rows), facts)
        return float(scores.mean()), scores.tolist()

    options = _options()
    options["advanced_quantization_parameters"] = options.pop("advanced_parameters")  # as it is called there
    made = nncf.quantize_with_accuracy_control(
        model, _calibration(folder), data, validated, max_drop=MAX_DROP, drop_type=nncf.DropType.ABSOLUTE, **options
    )
    openvino.save_model(made, target)


def _options() -> dict[str, Any]:
    import nncf

    fix = {"overflow_fix": nncf.OverflowFix.ENABLE} if SATURATES else {}
    return {
        "advanced_parameters": nncf.AdvancedQuantizationParameters(**fix),
        "preset": nncf.QuantizationPreset.MIXED,
        "model_type": nncf.ModelType.TRANSFORMER,
        "subset_size": N_CALIBRATED,
    }


def _calibration(folder: Path) -> Any:
    import nncf

    inputs = np.load(folder / "calibration.npy", mmap_mode="r")
    return nncf.Dataset(range(len(inputs)), lambda item: _one(inputs, item))


def _one(inputs: Array, item: Any) -> Array:
    return np.ascontiguousarray(inputs[int(item) : int(item) + 1])


def item_scores(found: Array, rows: Array, facts: Any) -> Array:
    """What each input scores, in [0, 1]: whether its label is right, or of a picture with its name the mean of whether
    the name is the nearest of all names and the picture the nearest of these pictures.

    Args:
        found: logits or embeddings, [n, d].
        rows: which inputs of the split they belong to.
        facts: `labels`, or `texts` [m, d] with `text_of` for every picture.
    """
    if "labels" in facts:
        hits: Array = (found.argmax(1) == facts["labels"][rows]).astype(float)
        return hits
    texts, own = facts["texts"], facts["text_of"][rows]
    alike = _unit(found) @ _unit(texts).T
    by_text = alike.argmax(0)
    hits = (alike.argmax(1) == own) / 2 + (own[by_text[own]] == own) / 2
    return hits


def _unit(rows: Array) -> Array:
    scaled: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def olive_int8(folder: Path, target: Path) -> None:
    """Olive's flow for transformers on a CPU: ONNX Runtime's transformer fusions, then dynamic quantization."""
    from olive.workflows import run

    passes = {
        "fusions": {"type": "OrtTransformersOptimization", "model_type": "vit", "num_heads": 6, "hidden_size": 384},
        "quantization": {"type": "OnnxDynamicQuantization", "weight_type": "QUInt8" if SATURATES else "QInt8"},
    }
    system = {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
    work = folder / "olive"
    run(
        {
            "input_model": {"type": "ONNXModel", "model_path": str(folder / "plain.onnx")},
            "systems": {"here": system},
            "passes": passes,
            "target": "here",
            "host": "here",
            "cache_dir": str(work / "cache"),
            "output_dir": str(work / "out"),
        }
    )
    (made,) = sorted((work / "out").rglob("*.onnx"))
    shutil.copy(made, target)
    shutil.rmtree(work)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "openvino.xml": openvino_model,
    "nncf-int8.xml": nncf_int8,
    "nncf-accuracy.xml": nncf_accuracy,
    "olive-int8.onnx": olive_int8,
}


def main(arguments: Sequence[str]) -> int:
    name, place = arguments
    folder = Path(place)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    start = time.perf_counter()
    MAKERS[name](folder, folder / name)
    print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
