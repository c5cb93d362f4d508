"""Numerical comparisons: a step with the program before it, an artifact with the program in its own runtime."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmopt.core.contract import Promise
from vlmopt.core.errors import ArtifactError
from vlmopt.core.formats import is_installed, remedy_for
from vlmopt.core.program import Assembly, Component, Dim, Program
from vlmopt.core.session_choice import Optimization
from vlmopt.core.sessions import opened
from vlmopt.core.workload import Feed
from vlmopt.graph.replay import run_outputs
from vlmopt.graph.similarity import class_embeddings, similarity_logits
from vlmopt.verify.edge_runtimes import Runner, open_executorch, open_openvino
from vlmopt.verify.rounding import in_float64
from vlmopt.verify.tolerances import ARTIFACT, OWN_ROUNDINGS, allowed


@dataclass(frozen=True)
class Gate:
    """One check: what was found, and what was allowed."""

    name: str
    passed: bool
    found: float
    allowed: float


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest wanted value; infinite where shapes, NaNs or infinities differ."""
    if found.shape != wanted.shape:
        return float("inf")
    a, b = found.double(), wanted.double()
    differs = (a != b) & ~(torch.isnan(a) & torch.isnan(b))  # infinities of one sign are equal, and so are NaNs
    if not bool(differs.any()):
        return 0.0
    finite = b[torch.isfinite(b)].abs()
    scale = max(float(finite.max()), 1e-6) if finite.numel() else 1.0
    worst = float((a - b)[differs].abs().max())
    return float("inf") if math.isnan(worst) else worst / scale


def check_step(name: str, promise: Promise, before: Program, after: Program, feeds: Mapping[str, Feed]) -> Gate | None:
    """Whether a pass kept its promise on these inputs; None for LOSSY passes, which the task judges.

    A program that multiplies its own roundings, as a head fitted on features that are nearly alike does, may be off by
    more than the table says. What is CLOSE to it then is at most four times as far from what it computes in float64.
    """
    dtype = next(iter(before.components.values())).outputs[0].dtype
    limit = allowed(promise, dtype)
    if limit is None:
        return None
    wanted, found = program_scores(before, feeds), program_scores(after, feeds)
    if wanted.keys() != found.keys():  # a pass may fold two embeddings into scores: compare scores then
        wanted, found = _joined(before, wanted), _joined(after, found)
    worst = _largest(found, wanted)
    if promise is Promise.CLOSE and limit < worst < math.inf:
        exact = _exact_scores(before, feeds)
        if exact.keys() == wanted.keys():
            worst, limit = _largest(found, exact), max(limit, OWN_ROUNDINGS * _largest(wanted, exact))
    return Gate(f"{name} is {promise.value}", worst <= limit, worst, limit)


def _largest(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    return max(difference(found[key], wanted[key]) for key in wanted)


def _exact_scores(program: Program, feeds: Mapping[str, Feed]) -> dict[str, Tensor]:
    """The outputs in float64; none where the program cannot be run in it."""
    with in_float64(program, feeds) as made:
        return {} if made is None else program_scores(*made)


def program_scores(program: Program, feeds: Mapping[str, Feed]) -> dict[str, Tensor]:
    """Every component's outputs on one batch; fixed inputs take the place of a feed."""
    scores: dict[str, Tensor] = {}
    for name, component in program.components.items():
        values = run_outputs(component, program.fixed_inputs.get(name) or feeds[name])
        scores |= {spec.name: value for spec, value in zip(component.outputs, values, strict=True)}
    return scores


def _joined(program: Program, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    if program.assembly is not Assembly.DUAL or program.similarity is None:
        return {"logits": next(iter(scores.values()))}
    image, text = scores["image_embeds"], scores["text_embeds"]
    if program.labels:
        text = class_embeddings(text, len(program.labels))
    return {"logits": similarity_logits(image, text, program.similarity)}


Recorded = tuple[Feed, Sequence[Tensor]]  # a batch, and all outputs wanted


def open_onnx(path: Path, weights: Mapping[str, Tensor] | None = None, *, optimization: Optimization = "all") -> Runner:
    """An ONNX file in ONNX Runtime; inputs go by their names, with dots in them or without.

    Args:
        weights: what takes the place of weights of these names, which lie in the file's data file.
        optimization: how far ONNX Runtime rewrites the graph before it runs it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = getattr(levels, f"ORT_ENABLE_{optimization.upper()}")
    if weights:
        arrays = [np.ascontiguousarray(weight.detach().cpu().numpy()) for weight in weights.values()]
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        options.add_external_initializers(list(weights), values)
    try:
        session = opened(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
    except Exception as error:
        raise ArtifactError(str(path), f"ONNX Runtime cannot load it ({str(error).splitlines()[0][:200]})") from error
    names = {value.name.replace(".", "_"): value.name for value in session.get_inputs()}

    def run(feed: Feed) -> tuple[Tensor, ...]:
        named = ((names.get(key.replace(".", "_")), value) for key, value in feed.items())
        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in named if name is not None}
        return tuple(torch.from_numpy(np.asarray(value)) for value in session.run(None, arrays))

    return run


def open_torchscript(path: Path) -> Runner:
    """A TorchScript file; inputs go by their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(str(path), f"cannot be loaded ({str(error).splitlines()[0][:200]})") from error

    def run(feed: Feed) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _every(module(*feed.values()))

    return run


def open_pt2(path: Path) -> Runner:
    """A saved torch.export program; inputs go by their order."""
    try:
        module = torch.export.load(str(path)).module()
    except Exception as error:
        raise ArtifactError(str(path), f"cannot be loaded ({str(error).splitlines()[0][:200]})") from error

    def run(feed: Feed) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _every(module(*feed.values()))

    return run


def _every(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


OPENERS: dict[str, Callable[[Path], Runner]] = {
    "onnx": open_onnx,
    "torchscript": open_torchscript,
    "pt2": open_pt2,
    "openvino": open_openvino,
    "executorch": open_executorch,
}


def open_file(path: Path, kind: str) -> Runner:
    """A file in the runtime of its format.

    Raises:
        ArtifactError: it cannot be loaded, or the runtime is not installed.
    """
    if not is_installed(kind):
        raise ArtifactError(str(path), f"is a file for {kind}, which is not installed", remedy=remedy_for(kind))
    return OPENERS[kind](path)


def check_file(
    name: str,
    path: Path,
    kind: str,
    cases: Sequence[Recorded],
    *,
    dtype: str,
    limit: float | None = None,
    weights: Mapping[str, Tensor] | None = None,
    optimization: Optimization = "all",
) -> Gate:
    """Whether a graph file computes what was recorded for every case; of ONNX with these weights, so far optimized.

    Args:
        limit: the largest difference allowed, where that is not what the type allows.
    """
    run = open_onnx(path, weights, optimization=optimization) if kind == "onnx" else open_file(path, kind)
    worst = max(worst_difference(run(feed), wanted) for feed, wanted in cases)
    most = ARTIFACT[dtype] if limit is None else limit
    return Gate(name, worst <= most, worst, most)


def worst_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest over all outputs; infinite where their numbers differ."""
    if len(found) != len(wanted):
        return float("inf")
    return max(difference(one, other) for one, other in zip(found, wanted, strict=True))


def two_shapes(component: Component, feed: Feed, dims: Mapping[str, Dim]) -> list[Feed]:
    """Inputs at two shapes from one batch of the task: other batch, other text length."""
    ordered = {spec.name: feed[spec.name] for spec in component.inputs}
    small = {key: value[:1] for key, value in ordered.items()}
    large = {}
    for spec in component.inputs:
        value = ordered[spec.name]
        value = torch.cat([value, value])[:5] if len(value) < 5 else value[:5]
        if "text" in spec.shape:
            is_full = value.shape[1] >= dims["text"].maximum
            value = value[:, :-1] if is_full else torch.nn.functional.pad(value, (0, 1))
        large[spec.name] = value
    return [small, large]
