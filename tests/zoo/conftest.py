"""One capture of every toy family, shared by all tests of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from tests import toys
from vlmopt.capture import capture_model
from vlmopt.core.program import Component, ModelSource, Program


@dataclass(frozen=True)
class Captured:
    """A toy in eager form and its program."""

    family: str
    model: torch.nn.Module
    program: Program

    def feed(self, component: Component, *, batch: int, text: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs of the component at a size that the capture has not seen; every second text is padded."""
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, torch.Tensor] = {}
        for spec in component.inputs:
            shape = [{"batch": batch, "text": text}.get(str(size), size) for size in spec.shape]
            if spec.name == "pixel_values":
                made[spec.name] = torch.randn(*map(int, shape), generator=generator)
            elif spec.name == "input_ids":
                made[spec.name] = torch.randint(1, 60, (batch, text), generator=generator)
            else:
                made[spec.name] = torch.ones(batch, text, dtype=torch.int64)
                made[spec.name][1::2, -2:] = 0
        return made


@cache
def captured_toy(family: str) -> Captured:
    model = toys.make(family)
    source = ModelSource("toy", str(model.config.model_type), type(model).__name__, "")
    return Captured(family, model, capture_model(model, source))


@pytest.fixture(scope="session", params=list(toys.FAMILIES))
def captured(request: pytest.FixtureRequest) -> Captured:
    return captured_toy(request.param)
