from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from tests.emit.toy import DIMS, cases, image_component, text_component, wanted
from vlmopt.core.errors import EmitError, VlmoptError
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.emit import EmittedFile, emit_onnx
from vlmopt.emit.exported import export_component
from vlmopt.emit.onnx_translation import DIRECT, TRANSLATIONS, LoweredProgram, as_lowered

Files = dict[str, EmittedFile]
BOTH = pytest.mark.parametrize("component", [image_component(), text_component()], ids=lambda c: c.name)


def run(path: Path, component: Component, inputs: tuple[Tensor, ...]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {spec.name: value.numpy() for spec, value in zip(component.inputs, inputs, strict=True)}
    return session.run([component.outputs[0].name], feed)[0]


def graph_of(module: nn.Module, args: tuple[Tensor, ...], shapes: tuple[dict[int, object], ...]) -> fx.GraphModule:
    return torch.export.export(module, args, dynamic_shapes=shapes).module(check_guards=False)


def single(module: nn.Module, shape: tuple[int, ...], *, name: str = "model") -> Component:
    """A component of one input [batch, *shape] and one output."""
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    graph = graph_of(_Tupled(module), (example,), ({0: batch},))
    output = ("batch", *module(example).shape[1:])
    return Component(
        name, graph, (TensorSpec("x", ("batch", *shape), "float32"),), (TensorSpec("y", output, "float32"),)
    )


class _Tupled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Both encoders, the text encoder in the oldest opset, which keeps more operations apart."""
    folder = tmp_path_factory.mktemp("written")
    return {
        "image_encoder": emit_onnx(image_component(), DIMS, folder / "image_encoder.onnx"),
        "text_encoder": emit_onnx(text_component(), DIMS, folder / "text_encoder.onnx", opset=18),
    }


@BOTH
def test_the_file_computes_the_graph_at_two_other_shapes(component: Component, written: Files) -> None:
    emitted = written[component.name]
    for inputs in cases(component):
        expected = wanted(component, inputs).double().numpy()
        found = run(emitted.path, component, inputs).astype(np.float64)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@BOTH
def test_names_dims_ir_and_opset_are_what_was_asked_for(component: Component, written: Files) -> None:
    model = onnx.load(written[component.name].path)
    onnx.checker.check_model(model, full_check=True)
    opset, ir_version = {"image_encoder": (20, 9), "text_encoder": (18, 8)}[component.name]
    assert model.ir_version == ir_version
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    found = {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    assert found == {spec.name: spec.shape_in_files for spec in (*component.inputs, *component.outputs)}


def test_an_image_encoder_holds_no_shape_arithmetic_but_for_its_class_token(written: Files) -> None:
    model = onnx.load(written["image_encoder"].path)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["Shape"] == 1
    assert counts["LayerNormalization"] == 6
    assert counts["Softmax"] == 2
    assert counts["Slice"] == counts["Cast"] == counts["Identity"] == counts["Constant"] == 0


def test_weights_are_stored_once_and_as_matmul_reads_them(written: Files) -> None:
    component = image_component()
    model = onnx.load(written[component.name].path)
    weights = {tensor.name for tensor in model.graph.initializer}
    assert not [node.name for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    stored = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert stored - sum(p.numel() for p in component.graph.parameters()) < 8  # attention's scale


def test_a_weight_that_is_read_both_ways_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight) + x @ self.weight

    component = single(Tied(), (5, 4))
    path = emit_onnx(component, DIMS, tmp_path / "graph.onnx").path
    tensors = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert [tuple(t.dims) for t in tensors] == [(4, 4)]
    inputs = (torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)),)
    assert np.abs(run(path, component, inputs) - wanted(component, inputs).detach().numpy()).max() <= 1e-5


def test_the_file_names_nothing_of_the_machine_that_wrote_it(written: Files) -> None:
    content = written["text_encoder"].path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path.home()).encode() + b"/" not in content


def test_the_same_component_gives_the_same_bytes(tmp_path: Path, written: Files) -> None:
    again = emit_onnx(image_component(), DIMS, tmp_path / "again.onnx")
    assert again.path.read_bytes() == written["image_encoder"].path.read_bytes()


def test_weights_above_the_threshold_go_to_a_data_file(tmp_path: Path, written: Files) -> None:
    component = image_component()
    emitted = emit_onnx(component, DIMS, tmp_path / "graph.onnx", external_from_bytes=1000)
    assert emitted.companions == (tmp_path / "graph.onnx_data",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.onnx", "graph.onnx_data"]
    onnx.checker.check_model(str(emitted.path))
    inputs = cases(component)[1]
    within = written[component.name]
    assert within.companions == ()
    assert np.array_equal(run(emitted.path, component, inputs), run(within.path, component, inputs))
    assert emitted.path.stat().st_size < within.path.stat().st_size


class _Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.GELU(), (7,)),
        (nn.GELU(approximate="tanh"), (7,)),
        (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(2), nn.SiLU()), (3, 9, 9)),
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)), (3, 8, 8)),
        (nn.MultiheadAttention(8, 2, batch_first=True), (5, 8)),
        (nn.Upsample(scale_factor=2, mode="bicubic"), (2, 4, 4)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 4, 4)),
        (_Of(lambda x: x.reciprocal() + x.new_zeros(3, 1) - x.new_full((5,), 2)), (3, 5)),
        (_Of(lambda x: nn.functional.pad(x, (1, 2)) * torch.arange(1, 9, 1)), (3, 5)),
        (_Of(lambda x: torch.where((x > 1) | (x < 0), x, 2)), (3, 5)),
        (_Of(lambda x: torch.slice_scatter(torch.select_scatter(x, x[:, 1], 1, 0), x[:, 1:], 1, 0, 2)), (3, 5)),
        (_Of(lambda x: (x > 0) + x * torch.ones(5, dtype=torch.int64)), (3, 5)),
        (_Of(lambda x: x * torch.bucketize(x.round(), torch.arange(-1.0, 2), right=True)), (3, 5)),
        (_Of(lambda x: x * torch.bucketize(x.round(), torch.arange(-1.0, 2), out_int32=True)), (3, 5)),
    ],
    ids=[
        "gelu",
        "gelu-tanh",
        "convolution",
        "batch-norm",
        "packed-attention",
        "bicubic",
        "bilinear",
        "new",
        "pad",
        "or",
        "scatter",
        "mixed-types",
        "bucketize-right",
        "bucketize",
    ],
)
def test_operations_of_other_families_keep_their_meaning(
    module: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    module = module.eval() if not isinstance(module, nn.MultiheadAttention) else _SelfAttention(module).eval()
    component = single(module, shape)
    path = emit_onnx(component, DIMS, tmp_path / "graph.onnx").path
    for batch in (1, 4):
        inputs = (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)),)
        with torch.no_grad():
            expected = component.graph(*inputs)[0].numpy()
        assert np.abs(run(path, component, inputs) - expected).max() <= 2e-6 * max(1.0, np.abs(expected).max())


class _SelfAttention(nn.Module):
    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class _Attention(nn.Module):
    """Attention of [batch, 2, 4, 6] under one kind of mask."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("allowed", torch.rand(4, 4, generator=generator) > 0.3)
        self.register_buffer("added", torch.randn(4, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        if self.kind == "causal":
            return attend(x, x, x, is_causal=True)
        if self.kind == "grouped":
            return attend(x, x[:, :1], x[:, :1], enable_gqa=True)
        mask = {"none": None, "scaled": None, "boolean": self.allowed, "added": self.added}[self.kind]
        return attend(x, x, x, attn_mask=mask, scale=0.3 if self.kind == "scaled" else None)


@pytest.mark.parametrize("kind", ["none", "scaled", "boolean", "added", "causal", "grouped"])
def test_attention_keeps_its_meaning_under_every_mask(kind: str, tmp_path: Path) -> None:
    component = single(_Attention(kind), (2, 4, 6))
    path = emit_onnx(component, DIMS, tmp_path / "graph.onnx").path
    inputs = (torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(1)),)
    assert np.abs(run(path, component, inputs) - wanted(component, inputs).numpy()).max() <= 1e-6


@BOTH
def test_known_graphs_skip_the_decomposition_and_others_do_not(component: Component) -> None:
    exported = export_component(component, DIMS)
    assert isinstance(as_lowered(exported), LoweredProgram)
    other = export_component(single(nn.AdaptiveAvgPool2d(1), (2, 4, 4)), DIMS)
    assert type(as_lowered(other)) is torch.export.ExportedProgram


def test_every_operation_that_skips_it_is_translated_by_torch_or_by_us() -> None:
    # The one look at a private table: after an upgrade of torch this tells what left it.
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry().from_torchlib(opset_version=18)
    known = {*_decomp.get_onnx_implemented_overloads(registry), *TRANSLATIONS}
    dropped = {torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default}
    assert {str(target) for target in DIRECT - known - dropped if not registry.is_registered(target)} == set()


def test_a_dim_of_one_size_becomes_that_size(tmp_path: Path) -> None:
    component = single(nn.Linear(4, 2), (4,))
    fixed = replace(component, inputs=(TensorSpec("x", (3, 4), "float32"),))
    model = onnx.load(emit_onnx(fixed, DIMS, tmp_path / "graph.onnx").path)
    assert [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim] == [3, 4]


def test_a_named_dim_that_the_graph_fixes_is_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x.reshape(2, -1) * 2,)

    graph = torch.export.export(Fixed(), (torch.ones(2, 4),)).module(check_guards=False)
    spec = TensorSpec("x", ("batch", 4), "float32")
    component = Component("model", graph, (spec,), (TensorSpec("y", ("batch", 4), "float32"),))
    with pytest.raises(EmitError, match=r"model: "):
        emit_onnx(component, {"batch": Dim("batch", 1, 8, 1)}, tmp_path / "graph.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [9, 17, 99])
def test_an_opset_that_cannot_be_written_is_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(EmitError, match=f"opset: {opset}; expected 18 to 26"):
        emit_onnx(image_component(), DIMS, tmp_path / "graph.onnx", opset=opset)


def test_a_folder_that_is_not_there_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(VlmoptError, match=r"missing.*cannot be written"):
        emit_onnx(image_component(), DIMS, tmp_path / "missing" / "graph.onnx")
    assert list(tmp_path.iterdir()) == []
