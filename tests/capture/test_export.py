"""What cannot be captured is refused, naming the module and line; what can is compared with eager."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import toys
from tests.capture import models
from vlmopt.capture import capture, capture_model
from vlmopt.capture.export import TOLERANCE, capture_component
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.rewrites import rewrite_for
from vlmopt.capture.samples import image_size, longest_text, sample_inputs
from vlmopt.capture.wrappers import Fused
from vlmopt.core.errors import CaptureError, ModelError
from vlmopt.core.program import Assembly, Component, Dim, ModelSource, Program
from vlmopt.graph.branches import find_branches

SHAPES: dict[str, tuple[int | str, ...]] = {
    "pixel_values": ("batch", 3, 4, 4),
    "input_ids": ("batch", "text"),
    "attention_mask": ("batch", "text"),
}
DIMS = {"batch": Dim("batch", 1, 64, 1), "text": Dim("text", 2, 16, 15)}


def taken(model: nn.Module, **options: object) -> Program:
    source = ModelSource("toy", "tiny", type(model).__name__, "")
    return capture_model(model, source, **options)  # type: ignore[arg-type]


def refused(model: nn.Module) -> str:
    with pytest.raises(CaptureError) as caught:
        taken(model)
    line = caught.value.one_line()
    assert "\n" not in line
    assert "Traceback" not in line
    return line


def component(model: nn.Module, rewrite: object = None) -> Component:
    """One capture with samples of batch 2 and 3, text 15 and 12."""
    plan = CapturePlan(model.config, (4, 4))  # type: ignore[arg-type]
    samples = plan.samples(Fused.inputs)
    wrapped = Fused(model, "logits").eval()
    return capture_component("model", wrapped, samples, dims=DIMS, shapes=SHAPES, image=(8, 8), rewrite=rewrite)  # type: ignore[arg-type]


def test_the_smallest_fused_model_is_captured() -> None:
    program = taken(models.Tiny(id2label={0: "a", 1: "b", 2: "c"}))
    assert program.assembly is Assembly.FUSED
    assert program.heads == {"model": "out"}
    assert program.labels == ("a", "b", "c")
    assert {name: (dim.minimum, dim.maximum, dim.typical) for name, dim in program.dims.items()} == {
        "batch": (1, 1024, 1),
        "text": (2, 16, 15),
    }
    outputs = program.components["model"].outputs
    assert [(spec.name, spec.shape, spec.dtype) for spec in outputs] == [("logits", ("batch", 3), "float32")]


def test_data_dependent_control_flow_is_refused_with_module_file_and_line() -> None:
    lines, start = inspect.getsourcelines(models.Branching)
    number = start + next(i for i, text in enumerate(lines) if "the line that the error must name" in text)
    line = refused(models.DataDependent())
    assert line.startswith("model of DataDependent: torch.export stopped at module inner (Branching), ")
    assert f"models.py:{number} in forward" in line
    assert "expected a model whose control flow and sizes do not depend on the data" in line
    assert "rewrite of that module" in line


@pytest.mark.parametrize("made", [models.AddsTable, models.ReadsSizeAsNumber])
def test_a_size_that_the_model_fixes_is_refused(made: type[models.Tiny]) -> None:
    wanted = f"model of {made.__name__}: the model fixes text to 15; expected free dimensions ['text']"
    assert refused(made()) == wanted


def test_a_size_that_came_out_as_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may fix a free size without a word: here the request is dropped on its way."""
    original = torch.export.export

    def forgets(module: nn.Module, *args: object, dynamic_shapes: dict[str, dict[int, object]], **options: object):  # type: ignore[no-untyped-def]
        dynamic_shapes = {key: {a: d for a, d in axes.items() if a == 0} for key, axes in dynamic_shapes.items()}
        return original(module, *args, dynamic_shapes=dynamic_shapes, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", forgets)
    with pytest.raises(
        CaptureError, match="model input input_ids axis 1: was fixed to 15 by the model; expected the free"
    ):
        component(models.Tiny())


@contextmanager
def wrong(model: models.Tiny, *, factor: float) -> Iterator[None]:
    def tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return models.Tiny.tokens(model, input_ids, attention_mask) * factor

    model.tokens = tokens  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.tokens  # type: ignore[method-assign]


def test_a_graph_that_differs_from_eager_is_refused() -> None:
    model = models.Tiny()
    with pytest.raises(CaptureError) as caught:
        component(model, wrong(model, factor=1.001))
    line = caught.value.one_line()
    assert line.startswith("model: the graph differs from eager by ")
    assert "expected at most 1e-05" in line
    component(model, wrong(model, factor=1.0))


def test_a_rewrite_that_forgets_the_mask_is_noticed() -> None:
    model = models.Tiny()

    @contextmanager
    def forgetful() -> Iterator[None]:
        model.tokens = lambda input_ids, attention_mask: model.embed(input_ids).mean(1)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del model.tokens  # type: ignore[method-assign]

    with pytest.raises(CaptureError, match="differs from eager"):
        component(model, forgetful())


def test_a_difference_at_the_second_size_alone_is_noticed() -> None:
    """The divisor is right for the 15 tokens of the exported sample only."""
    model = models.Tiny()

    @contextmanager
    def frozen() -> Iterator[None]:
        def tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            weights = attention_mask[..., None].float()
            return (model.embed(input_ids) * weights).sum(1) / (weights.sum(1) + 15 - input_ids.shape[1])

        model.tokens = tokens  # type: ignore[method-assign]
        try:
            yield
        finally:
            del model.tokens  # type: ignore[method-assign]

    with pytest.raises(CaptureError, match=r"differs from eager .*\(3, 12\)"):
        component(model, frozen())


def test_a_model_that_cannot_be_called_is_refused_with_its_line() -> None:
    line = refused(models.Fails())
    assert line.startswith("model of Fails: stopped at module ")
    assert "models.py:" in line
    assert "when called with {'pixel_values': (2, 3, 4, 4)" in line


def test_a_model_that_is_neither_dual_nor_fused_is_refused() -> None:
    line = refused(models.TextOnly())
    assert line == (
        "toy: TextOnly is no pair of encoders, no encoder with a decoder, and no graph over pixels and tokens; "
        "expected get_image_features and get_text_features, or forward(pixel_values, input_ids, ...)"
    )


def test_a_model_without_image_size_asks_for_one() -> None:
    with pytest.raises(ModelError, match=r"toy: no image_size .*preprocessor_config\.json"):
        taken(models.Tiny(image_size=None))
    assert image_size(models.configuration(image_size=[4, 6]), "toy") == (4, 6)
    assert taken(models.Tiny(image_size=None), image=(4, 4)).components["model"].inputs[0].shape == ("batch", 3, 4, 4)


def test_samples_are_repeatable_padded_and_leave_the_generator_alone() -> None:
    config = models.configuration()
    state = torch.get_rng_state()
    first, second = (sample_inputs(config, Fused.inputs, batch=3, text=12, image=(4, 6)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in Fused.inputs)
    assert tuple(first["pixel_values"].shape) == (3, 3, 4, 6)
    assert int(first["input_ids"].max()) < 11
    assert first["attention_mask"].sum(1).tolist() == [12, 9, 12]
    assert longest_text(config) == 16


def test_a_bfloat16_model_is_captured_in_bfloat16() -> None:
    model = toys.make("clip").to(torch.bfloat16)
    program = capture_model(model, ModelSource("toy", "clip", "CLIPModel", ""), dtype="bfloat16")  # type: ignore[arg-type]
    image = program.components["image_encoder"]
    assert (image.inputs[0].dtype, image.outputs[0].dtype) == ("bfloat16", "bfloat16")
    assert {p.dtype for p in image.graph.parameters()} == {torch.bfloat16}
    assert len(find_branches(image.graph)) == 6
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=pixels).pooler_output.double()  # type: ignore[operator]
        found = image.graph(pixels)[0].double()
    assert float((found - wanted).abs().max()) <= TOLERANCE[torch.bfloat16] * float(wanted.abs().max())


def test_other_image_sizes_than_the_configured_one_are_captured() -> None:
    model = toys.make("dual_encoder")
    source = ModelSource("toy", "vision-text-dual-encoder", "VisionTextDualEncoderModel", "")
    program = capture_model(model, source, image=(42, 28))  # type: ignore[arg-type]
    assert program.components["image_encoder"].inputs[0].shape == ("batch", 3, 42, 28)


def test_a_model_without_a_rewrite_is_left_as_it_is() -> None:
    model = models.Tiny()
    with rewrite_for("tiny", model, (4, 4)):
        assert "tokens" not in vars(model)


@pytest.mark.slow
def test_a_full_size_clip_is_captured_without_weights_in_seconds_and_little_memory(tmp_path: Path) -> None:
    import resource

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": 768,
        "vision_config": {**vision, "image_size": 224, "patch_size": 14, "projection_dim": 768},
        "text_config": {**text, "projection_dim": 768},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = capture(str(tmp_path), with_weights=False)
    assert time.process_time() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5e6  # KiB; the weights alone are 1.7 GB
    counts = {name: len(find_branches(part.graph)) for name, part in program.components.items()}
    assert counts == {"image_encoder": 48, "text_encoder": 24}
    assert sum(p.numel() for part in program.components.values() for p in part.graph.parameters()) > 4.2e8
