"""A few inputs of every component: of the task where there is one, drawn where there is none."""

from __future__ import annotations

import torch

from vlmopt.core.program import Component, Program
from vlmopt.core.workload import Feed
from vlmopt.tasks.binding import TaskWorkload

PARITY_BATCH = 4


def sample_feeds(program: Program, fit: TaskWorkload | None, *, seed: int) -> dict[str, Feed]:
    """A few samples of the workload for every component; random inputs of the right shapes where it has none."""
    feeds: dict[str, Feed] = {}
    for name, component in program.components.items():
        if fit is not None and name in fit.feeds:
            first = fit.feeds[name][0]
            feeds[name] = {key: value[:PARITY_BATCH] for key, value in first.items()}
        else:
            feeds[name] = random_feed(component, program, seed=seed)
    return feeds


def random_feed(component: Component, program: Program, *, seed: int) -> Feed:
    """Seeded inputs of the component's shapes: normal pixels, small token ids, a full mask."""
    generator = torch.Generator().manual_seed(seed)
    feed: dict[str, torch.Tensor] = {}
    for spec in component.inputs:
        shape = [
            dim if isinstance(dim, int) else PARITY_BATCH if dim == "batch" else program.dims[dim].typical
            for dim in spec.shape
        ]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            feed[spec.name] = torch.randn(shape, generator=generator).to(dtype)
        elif "mask" in spec.name:
            feed[spec.name] = torch.ones(shape, dtype=dtype)
        else:
            feed[spec.name] = torch.randint(1, 50, shape, generator=generator, dtype=dtype)
    return feed
