"""One part of a model that writes text, captured: its free dimensions, and inputs at two sizes to compare it at."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmopt.capture.export import capture_component
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.samples import longest_text, text_config
from vlmopt.capture.wrappers import Wrapper
from vlmopt.core.program import Component, Dim
from vlmopt.graph.assembled import ENCODER_MASK, positions

BATCH, SEQUENCE, PAST, READ = (2, 3), (5, 7), (4, 3), (6, 8)  # two sizes of each, none of them 0 or 1
TYPICAL_SEQUENCE = 64  # tokens of a prompt without its images


def dims_of(plan: CapturePlan, *, has_encoder: bool = False) -> dict[str, Dim]:
    """The free dimensions; `encoder` is the length of a prompt that a decoder attends to across."""
    longest = longest_text(plan.config)
    batch = plan.dims["batch"]
    typical = min(TYPICAL_SEQUENCE, longest)
    across = {"encoder": Dim("encoder", 1, longest, typical)} if has_encoder else {}
    return {
        "images": Dim("images", batch.minimum, batch.maximum, batch.typical),
        "batch": batch,
        "sequence": Dim("sequence", 1, longest, typical),
        "past": Dim("past", 0, longest, 0),
        **across,
        "total": Dim("total", 1, 2 * longest, typical, sum_of=("sequence", "past")),
    }


def part(
    name: str,
    wrapper: Wrapper,
    shapes: Mapping[str, tuple[int | str, ...]],
    dims: Mapping[str, Dim],
    plan: CapturePlan,
) -> Component:
    """The component, compared with eager at two sizes.

    Raises:
        CaptureError: see `capture_component`.
    """
    sizes = [
        {"images": b, "batch": b, "sequence": s, "past": p, "total": s + p, "encoder": e}
        for b, s, p, e in zip(BATCH, SEQUENCE, PAST, READ, strict=True)
    ]
    used = {size for shape in shapes.values() for size in shape}
    return capture_component(
        name,
        wrapper.eval(),
        [sample(plan, shapes, size) for size in sizes],
        dims={key: dim for key, dim in dims.items() if key in used},
        shapes=shapes,
        image=plan.image,
        rewrite=plan.rewrite(wrapper.model),
        is_checked=plan.with_weights,
    )


def sample(
    plan: CapturePlan, shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Inputs of these shapes; in every other row the first token is padding."""
    made: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(sizes["total"])
    for name, named in shapes.items():
        shape = [size if isinstance(size, int) else sizes[size] for size in named]
        if name == "input_ids":
            made[name] = torch.randint(0, int(text_config(plan.config).vocab_size), shape, generator=generator)
        elif name == "attention_mask":
            made[name] = torch.ones(shape, dtype=torch.int64)
            made[name][1::2, 0] = 0
        elif name == ENCODER_MASK:
            made[name] = torch.ones(shape, dtype=torch.int64)
            made[name][1::2, -1] = 0
        elif name == "token_type_ids":
            made[name] = torch.randint(0, 2, shape, generator=generator)
        elif name == "position_ids":
            # contiguous, for torch.export takes the strides of a slice for sizes
            made[name] = positions(made["attention_mask"])[:, -sizes["sequence"] :].expand(shape).contiguous()
            if len(shape) > 2:  # rows that are told apart
                made[name] += torch.arange(shape[0])[:, None, None]
        else:
            made[name] = torch.randn(shape, generator=generator, dtype=getattr(torch, plan.dtype))
    return {name: value.to(plan.device) for name, value in made.items()}
