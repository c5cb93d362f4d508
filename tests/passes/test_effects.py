"""What the first-party passes do to the numbers, beyond the contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vlmopt.core.contract import Context
from vlmopt.core.errors import PassError
from vlmopt.core.program import Assembly, Program, Similarity
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import ResidualBlocks, component_of, program_from, program_of
from vlmopt.graph.replay import run_component
from vlmopt.graph.similarity import class_embeddings, similarity_logits
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step


def names_of(program: Program) -> list[str]:
    return [f"{name}/{b.name}" for name, part in program.components.items() for b in find_branches(part.graph)]


def batch_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(program: Program, x: Tensor) -> Tensor:
    (component,) = program.components.values()
    return run_component(component, [{component.inputs[0].name: x}])


def test_a_skipped_branch_is_the_model_written_without_it() -> None:
    model = ResidualBlocks(blocks=3).eval()
    step = make_pass("skip-branches", {"branches": ["layers.1.ffn"]})
    result = run_step(program_of(model, batch_of(2, 8)), step, Context(), step=1)
    del model.layers[1]
    x = batch_of(4, 8, seed=1)
    assert torch.equal(run(result.program, x), model(x))
    assert result.counted.parameters == 8 * 16 + 16 + 16 * 8 + 8 + 2 * 8
    assert result.counted.macs == 2 * 8 * 16


def test_skipping_all_branches_in_any_order_leaves_norm_and_head() -> None:
    model = ResidualBlocks(blocks=3).eval()
    program = program_of(model, batch_of(2, 8))
    plan_order = make_pass("skip-branches", {"branches": ["layers.*"]})
    for choose in (list, lambda sites: list(sites)[::-1]):
        sites = plan_order.plan(program, Context()).sites
        free = make_pass("skip-branches", {})
        result = run_step(program, free, Context(), step=1, choose=lambda _, plan, order=choose: order(plan.sites))
        assert len(result.applied) == len(sites) == 3
        x = batch_of(4, 8, seed=1)
        assert torch.equal(run(result.program, x), model.head(model.norm(x)))


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("layers.0.ffn", ["layers.0.ffn"]),
        ("model/layers.0.ffn", ["layers.0.ffn"]),
        ("layers.[01].ffn", ["layers.0.ffn", "layers.1.ffn"]),
        ("*", ["layers.0.ffn", "layers.1.ffn", "layers.2.ffn"]),
    ],
)
def test_branches_are_named_or_matched_by_patterns(pattern: str, wanted: list[str]) -> None:
    program = program_of(ResidualBlocks(blocks=3), batch_of(2, 8))
    plan = make_pass("skip-branches", {"branches": [pattern]}).plan(program, Context())
    assert [site.name for site in plan.sites] == [f"model/{name}" for name in wanted]
    assert plan.is_chosen


def test_a_misspelled_branch_is_refused_with_the_closest_name() -> None:
    program = program_of(ResidualBlocks(), batch_of(2, 8))
    with pytest.raises(PassError, match=r"'layers.1.fnn' matches nothing.*did you mean 'layers.1.ffn'\?"):
        run_step(program, make_pass("skip-branches", {"branches": ["layers.1.fnn"]}), Context(), step=1)
    assert names_of(program) == ["model/layers.0.ffn", "model/layers.1.ffn"]


class _TwoBranches(nn.Module):
    """Layers of two branches each, the first layer's inside returned when asked for."""

    def __init__(self, *, is_read: bool) -> None:
        super().__init__()
        self.is_read = is_read
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inside = x
        for i, layer in enumerate(self.layers):
            hidden = torch.tanh(layer["a"](x))
            inside = hidden if i == 0 else inside
            x = x + hidden
            x = x + torch.relu(layer["b"](x))
        return (x * 2.0, inside) if self.is_read else (x * 2.0,)


def test_a_layer_goes_as_a_whole_or_not_at_all() -> None:
    free = program_of(_TwoBranches(is_read=False), batch_of(2, 4))
    result = run_step(free, make_pass("skip-layers", {"layers": ["layers.0"]}), Context(), step=1)
    assert [site.target for site in result.applied] == [("layers.0.a.ffn", "layers.0.b.ffn")]
    assert names_of(result.program) == ["model/layers.1.a.ffn", "model/layers.1.b.ffn"]
    read = program_of(_TwoBranches(is_read=True), batch_of(2, 4))
    result = run_step(read, make_pass("skip-layers", {}), Context(), step=1)
    assert [site.name for site in result.applied] == ["model/layers.1"]
    assert [(r.name, r.reason) for r in result.refusals] == [
        ("model/layers.0", "a value computed inside is read behind it")
    ]


class _Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(torch.tanh(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [0.0, -3.0])
@pytest.mark.parametrize("n_prompts", [1, 3])
def test_folded_prompts_give_the_logits_of_the_two_encoders(bias: float, n_prompts: int) -> None:
    torch.manual_seed(0)
    image = component_of(_Encoder(6), batch_of(2, 6), name="image_encoder", output="image_embeds")
    text = component_of(_Encoder(4), batch_of(2, 4), name="text_encoder", output="text_embeds")
    program = replace(
        program_from({"image_encoder": image, "text_encoder": text}, Assembly.DUAL),
        similarity=Similarity(20.0, bias),
        fixed_inputs={"text_encoder": {"x": batch_of(3 * n_prompts, 4, seed=5)}},
        labels=("a", "b", "c"),
    )
    result = run_step(program, make_pass("fold-fixed-inputs", {}), Context(), step=1)
    pixels = batch_of(7, 6, seed=9)
    texts = run_component(text, [program.fixed_inputs["text_encoder"]])
    wanted = similarity_logits(run_component(image, [{"x": pixels}]), class_embeddings(texts, 3), program.similarity)
    found = run_component(result.program.components["image_encoder"], [{"x": pixels}])
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert list(result.program.components) == ["image_encoder"]
    assert result.program.assembly is Assembly.FUSED
    assert result.program.components["image_encoder"].outputs[0].name == "logits"
    assert program.assembly is Assembly.DUAL
    assert list(program.components) == ["image_encoder", "text_encoder"]
