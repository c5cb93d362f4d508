"""The rewrite of ViLT: the same scores as the original, whatever order that draws its patches in."""

from __future__ import annotations

import pytest
import torch

from tests import toys
from vlmopt.capture import capture_model
from vlmopt.capture.rewrites import rewrite_for
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import ModelSource, Program

SOURCE = ModelSource("toy", "vilt", "ViltForQuestionAnswering", "")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return toys.make("vilt")


@pytest.fixture(scope="module", params=[(32, 32), (32, 48)], ids=["configured", "wider"])
def program(request: pytest.FixtureRequest, model: torch.nn.Module) -> Program:
    return capture_model(model, SOURCE, image=request.param)  # type: ignore[arg-type]


def sample(program: Program, *, batch: int, text: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = [int(side) for side in program.components["model"].inputs[0].shape[2:]]
    mask = torch.ones(batch, text, dtype=torch.int64)
    mask[1:, -2:] = 0
    return {
        "pixel_values": torch.randn(batch, 3, *size, generator=generator),
        "input_ids": torch.randint(1, 60, (batch, text), generator=generator),
        "attention_mask": mask,
    }


@pytest.mark.parametrize(("batch", "text"), [(1, 4), (3, 11)])
def test_the_captured_graph_equals_the_original_in_any_order_of_patches(
    model: torch.nn.Module, program: Program, batch: int, text: int
) -> None:
    feed = sample(program, batch=batch, text=text)
    with torch.no_grad(), torch.random.fork_rng():
        found = program.components["model"].graph(*feed.values())[0]
        drawn = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            drawn.append(model(**feed).logits)
    for wanted in drawn:
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert "visual_embed" not in vars(model.vilt.embeddings)  # type: ignore[arg-type]


def test_the_rewrite_is_gone_afterwards_also_when_something_fails(model: torch.nn.Module) -> None:
    embeddings = model.vilt.embeddings  # type: ignore[union-attr]
    original = embeddings.visual_embed
    with pytest.raises(RuntimeError, match="stop"), rewrite_for("vilt", model, (32, 32)):
        assert "visual_embed" in vars(embeddings)
        raise RuntimeError("stop")
    assert "visual_embed" not in vars(embeddings)
    assert embeddings.visual_embed == original


def test_a_configuration_that_keeps_a_random_part_of_the_patches_is_refused() -> None:
    model = toys.make("vilt")
    model.config.max_image_length = 15  # type: ignore[union-attr]
    with pytest.raises(CaptureError) as caught:
        capture_model(model, SOURCE)  # type: ignore[arg-type]
    assert caught.value.one_line() == (
        "config.json max_image_length: 15 of 16 patches are drawn at random in every call; expected -1 or at least 16"
    )
    assert "visual_embed" not in vars(model.vilt.embeddings)  # type: ignore[union-attr, arg-type]
    model.config.max_image_length = 16  # type: ignore[union-attr]
    assert capture_model(model, SOURCE).components["model"].outputs[0].shape == ("batch", 4)  # type: ignore[arg-type]
