"""A Hugging Face model and sample inputs -> a verified `Program`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlmopt.capture.adapters import name_adapters, put_adapters
from vlmopt.capture.dual import capture_dual, is_dual
from vlmopt.capture.fused import capture_fused, is_fused
from vlmopt.capture.generative import capture_generative, is_generative
from vlmopt.capture.loading import load_model
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.samples import image_size
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import AdapterSource, ModelSource, Program

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["capture", "capture_model"]


def capture(
    model: str,
    *,
    image: tuple[int, int] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    allow_pickle: bool = False,
    with_weights: bool = True,
    adapters: Sequence[AdapterSource] = (),
) -> Program:
    """The program of a model folder or hub id, compared with eager at two shapes.

    Args:
        image: (height, width) of the task's images after preprocessing; by default what the configuration says.
        with_weights: without them only config.json is read and the structure is captured under fake tensors.
        adapters: put on the model first; what they brought lies under `adapters` in the graphs.

    Raises:
        ModelError: the model cannot be loaded.
        CaptureError: it cannot be captured.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with nullcontext() if with_weights else FakeTensorMode(allow_non_fake_inputs=True):
        loaded, source, _ = load_model(
            model, device=device, dtype=dtype, allow_pickle=allow_pickle, with_weights=with_weights
        )
        if adapters:
            digest = put_adapters(loaded, adapters, device=device, allow_pickle=allow_pickle)
            together = hashlib.sha256(f"{source.fingerprint} {digest}".encode()).hexdigest()
            source = replace(source, fingerprint=together)
        program = capture_model(loaded, source, image=image, device=device, dtype=dtype, with_weights=with_weights)
        if adapters:
            name_adapters(program)
        return program


def capture_model(
    model: PreTrainedModel,
    source: ModelSource,
    *,
    image: tuple[int, int] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    with_weights: bool = True,
) -> Program:
    """The program of a model in memory, in evaluation mode.

    Raises:
        CaptureError: it cannot be captured.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    size = image or image_size(model.config, source.path)
    plan = CapturePlan(model.config, size, device=device, dtype=dtype, with_weights=with_weights)
    with torch.no_grad():
        if is_dual(model):
            return capture_dual(model, source, plan)
        if is_generative(model):
            return capture_generative(model, source, plan)
        if is_fused(model):
            return capture_fused(model, source, plan)
    raise CaptureError(
        source.path,
        f"{source.architecture} is no pair of encoders, no encoder with a decoder, and no graph over pixels and tokens",
        expected="get_image_features and get_text_features, or forward(pixel_values, input_ids, ...)",
    )
