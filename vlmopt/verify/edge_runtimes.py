"""Files in the runtimes of OpenVINO and ExecuTorch, computed as exactly as these can."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmopt.core.errors import ArtifactError
from vlmopt.core.formats import BATCH_AXES
from vlmopt.core.workload import Feed
from vlmopt.verify.descriptors import led_into

Runner = Callable[[Feed], tuple[Tensor, ...]]  # a batch in, all outputs out
# In float32, and rounding nothing but what the file rounds; by itself it takes bfloat16 where the processor has it.
EXACTLY = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@cache
def _openvino_core() -> Any:
    """OpenVINO's runtime, never let go of.

    Its plugin gives the thread that it is loaded in a stack for signals, and frees that with the last model, in
    whatever thread that is collected: the next signal, a time limit's too, would end the process.
    """
    import openvino

    return openvino.Core()


def open_openvino(path: Path) -> Runner:
    """An `.xml` (or ONNX) file in OpenVINO on the CPU; inputs go by their names, with dots in them or without."""
    try:
        model = _openvino_core().compile_model(path, "CPU", EXACTLY)
    except RuntimeError as error:
        raise ArtifactError(str(path), f"OpenVINO cannot load it ({_last_line(error)})") from error
    names = {name.replace(".", "_"): name for value in model.inputs for name in value.names}

    def run(feed: Feed) -> tuple[Tensor, ...]:
        named = ((names.get(key.replace(".", "_")), value) for key, value in feed.items())
        found = model({name: value.numpy() for name, value in named if name is not None})
        return tuple(torch.from_numpy(np.array(found[output])) for output in model.outputs)

    return run


def open_executorch(path: Path) -> Runner:
    """A `.pte` file in ExecuTorch; inputs go by their order, and one sample after another."""
    from executorch.runtime import Runtime, Verification

    with tempfile.TemporaryFile() as said, led_into(said):  # it tells what it cannot read of the processor
        try:
            program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
            forward, axes = program.load_method("forward"), program.load_method(BATCH_AXES)
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(str(path), f"ExecuTorch cannot load it ({_last_line(error)})") from error
    if forward is None or axes is None:
        raise ArtifactError(str(path), "has no forward or no batch_axes", expected="a file that vlmopt wrote")
    every = [int(axis) for axis in axes.execute([])]

    def run(feed: Feed) -> tuple[Tensor, ...]:
        values = [value.contiguous() for value in feed.values()]
        ins, outs = every[: len(values)], every[len(values) :]
        n = next((value.shape[axis] for value, axis in zip(values, ins, strict=True) if axis >= 0), 1)
        rows = [_copied(forward.execute(_sample(values, ins, i))) for i in range(n)]
        parts = zip(*rows, strict=True)
        return tuple(torch.cat(part, axis) if axis >= 0 else part[0] for part, axis in zip(parts, outs, strict=True))

    return run


def _sample(values: Sequence[Tensor], axes: Sequence[int], i: int) -> list[Tensor]:
    pairs = zip(values, axes, strict=True)
    return [value.narrow(axis, i, 1).contiguous() if axis >= 0 else value for value, axis in pairs]


def _copied(values: Sequence[Any]) -> list[Tensor]:
    """Out of the memory that the next call writes to."""
    return [value.clone() for value in values]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
