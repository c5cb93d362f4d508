"""The precision of measurements that compare one model with itself, some branches skipped.

Such differences are small beside the error of the sample, so where a processor multiplies bfloat16 quicker they are
measured in it: matrix products only, sums and norms stay float32. On the example of a real tower (ViT-S/14,
`tests/benchmarks/precision.py`) leave-one-out ranks alike, and drops shift by a sixth of their standard error, by half
of it at most; among cuts that are all but equal it may choose another one, as another sample of items would. What is
fitted, trained, emitted and judged in the end is float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vlmopt.core.program import Component
from vlmopt.graph.replay import device_of

LEAST_WEIGHTS = 4_000_000  # a smaller component spends its time elsewhere


def measuring_precision(component: Component) -> torch.dtype | None:
    """bfloat16 for a large component in float32 on a device that is made for it; None, its own, for any other."""
    weights = [weight for weight in component.graph.parameters() if weight.is_floating_point()]
    is_large = sum(weight.numel() for weight in weights) >= LEAST_WEIGHTS
    is_plain = all(weight.dtype is torch.float32 for weight in weights)
    is_faster = is_large and is_plain and _multiplies_bfloat16_fast(device_of(component.graph))
    return torch.bfloat16 if is_faster else None


def lowered_precision(components: Iterable[Component]) -> str | None:
    """The name of the precision that some of the components are measured in; None where all keep their own."""
    found = {measuring_precision(component) for component in components} - {None}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found)) or None


def _multiplies_bfloat16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    is_made_for_it = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and bool(is_made_for_it)
