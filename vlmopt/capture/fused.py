"""Assembly `fused`: image and text enter one graph that ends in scores (ViLT, BLIP image-text matching and others)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from vlmopt.capture.export import capture_component, run_eager
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.wrappers import Fused
from vlmopt.core.program import Assembly, ModelSource, Program
from vlmopt.graph.head import find_head

_SCORES = ("logits", "itm_score", "last_hidden_state")  # what a fused model's output may be called, best first


def is_fused(model: nn.Module) -> bool:
    """The forward method takes pixels and tokens."""
    parameters = inspect.signature(model.forward).parameters
    return "pixel_values" in parameters and "input_ids" in parameters


def capture_fused(model: nn.Module, source: ModelSource, plan: CapturePlan) -> Program:
    """One component `model` from pixels and tokens to the scores."""
    shapes: Mapping[str, tuple[int | str, ...]] = {
        "pixel_values": ("batch", plan.channels, *plan.image),
        "input_ids": ("batch", "text"),
        "attention_mask": ("batch", "text"),
    }
    samples = plan.samples(Fused.inputs)
    component = capture_component(
        "model",
        Fused(model, _score_name(model, samples[0], plan)).eval(),
        samples,
        dims=plan.dims,
        shapes=shapes,
        image=plan.image,
        rewrite=plan.rewrite(model),
        is_checked=plan.with_weights,
    )
    head = find_head(component)
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    classes = component.outputs[0].shape[-1]
    names = tuple(str(labels[key]) for key in sorted(labels)) if len(labels) == classes else ()
    heads = {} if head is None else {"model": head}
    return Program(Assembly.FUSED, {"model": component}, plan.dims, source, heads=heads, labels=names)


def _score_name(model: nn.Module, sample: Mapping[str, Tensor], plan: CapturePlan) -> str:
    """The first of the known output names that the model really returns."""
    with plan.rewrite(model):
        result = run_eager("model", Fused(model, ""), sample)
    for name in _SCORES:
        if name in result:
            return name
    return str(next(iter(result)))
