"""Outputs of programs, and how far those before and after a pass are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.core.contract import Promise
from vlmopt.core.program import Program
from vlmopt.graph.replay import inputs_of
from vlmopt.graph.similarity import similarity_logits
from vlmopt.testing.inputs import Feeds
from vlmopt.verify.parity import check_step, difference
from vlmopt.verify.tolerances import allowed


@dataclass(frozen=True)
class Gap:
    """The largest difference between two programs, where it is, and how much is allowed."""

    output: str
    found: float
    allowed: float

    @property
    def is_too_wide(self) -> bool:
        return not self.found <= self.allowed


def outputs_of(program: Program, feeds: Feeds) -> dict[str, Tensor]:
    """Every output of every component, as `component/output`; fixed inputs take the place of a feed."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, component in program.components.items():
            feed = program.fixed_inputs.get(name) or feeds[name]
            values = component.graph(*inputs_of(component, feed))
            for spec, value in zip(component.outputs, values, strict=True):
                found[f"{name}/{spec.name}"] = value
    return found


def widest_gap(promise: Promise, before: Program, after: Program, feeds: Feeds) -> Gap | None:
    """The output that differs most, measured against what the promise allows; None for a LOSSY pass."""
    if promise is Promise.LOSSY:
        return None
    wanted, found = outputs_of(before, feeds), outputs_of(after, feeds)
    if wanted.keys() != found.keys():  # the signature changed: embeddings may have become scores
        gate = check_step("scores", promise, before, after, feeds)
        assert gate is not None
        return Gap("scores", gate.found, gate.allowed)
    gaps = [_gap(name, promise, found[name], wanted[name]) for name in wanted]
    return max(gaps, key=lambda gap: gap.found - gap.allowed)


def _gap(name: str, promise: Promise, found: Tensor, wanted: Tensor) -> Gap:
    is_rounded = wanted.is_floating_point()  # whole numbers and truth values have nothing to round
    limit = allowed(promise, str(wanted.dtype).removeprefix("torch.")) if is_rounded else None
    return Gap(name, difference(found, wanted), 0.0 if limit is None else limit)


def first_not_finite(program: Program, feeds: Feeds) -> str | None:
    """The first output, or the comparison of the two encoders, that holds an infinity or a NaN."""
    outputs = outputs_of(program, feeds)
    if program.similarity is not None and {"image_encoder", "text_encoder"} <= program.components.keys():
        images, texts = (_first(outputs, name) for name in ("image_encoder", "text_encoder"))
        outputs["scores"] = similarity_logits(images, texts, program.similarity)
    return next((name for name, value in outputs.items() if not bool(torch.isfinite(value).all())), None)


def _first(outputs: Mapping[str, Tensor], component: str) -> Tensor:
    return next(value for name, value in outputs.items() if name.startswith(f"{component}/"))
