"""Heads are found, replaced and fitted without touching the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from tests.graph.blocks import WIDTH, seeded
from vlmopt.core.program import Component, Program
from vlmopt.core.workload import Feed, Outputs
from vlmopt.graph.example import ResidualBlocks, component_of, program_of
from vlmopt.graph.head import append_head, find_head, fitted_linear, head_features, head_module, head_node, replace_head
from vlmopt.graph.modules import has_path
from vlmopt.graph.refit import HeadFit, fit_head, install_head, prior_weight, refit_heads
from vlmopt.graph.replay import run_component

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(9))


def blocks() -> Component:
    return component_of(ResidualBlocks(), ROWS)


def linear(d_in: int, d_out: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(d_out, d_in, generator=generator)
    return fitted_linear(weight, torch.randn(d_out, generator=generator), like=weight)


def test_the_last_linear_is_the_head_and_its_operand_the_features() -> None:
    component = blocks()
    assert find_head(component) == "head"
    assert head_module(component, "head").out_features == 3
    assert head_features(component, "head") is head_node(component, "head").args[0]
    features = run_component(component, [{"x": ROWS}], head_features(component, "head"))
    with torch.no_grad():
        assert torch.equal(head_module(component, "head")(features), component.graph(ROWS)[0])
    with pytest.raises(KeyError, match="nowhere"):
        head_node(component, "nowhere")


def test_an_output_that_is_no_linear_or_a_shared_one_is_no_head() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))

    assert find_head(component_of(Shared(), ROWS)) is None
    assert find_head(component_of(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), ROWS)) is None


@pytest.mark.parametrize("path", ["head", "task_head"])
def test_a_replaced_head_leaves_the_original_untouched(path: str) -> None:
    component, made = blocks(), linear(8, 5)
    with torch.no_grad():
        before = component.graph(ROWS)[0]
        replaced = replace_head(component, "head", path, made, "logits")
        features = run_component(component, [{"x": ROWS}], head_features(component, "head"))
        assert torch.equal(replaced.graph(ROWS)[0], made(features))
        assert torch.equal(component.graph(ROWS)[0], before)
    assert replaced.outputs[0].shape == ("batch", 5)
    assert replaced.outputs[0].name == "logits"
    assert find_head(replaced) == path
    assert head_module(component, "head").out_features == 3
    assert has_path(replaced.graph, "head") is (path == "head")
    assert tuple(head_node(replaced, path).meta["val"].shape)[1] == 5


def test_an_appended_head_reads_the_first_output() -> None:
    component, made = component_of(seeded(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), ROWS), linear(8, 2)
    appended = append_head(component, "task_head", made, "logits")
    with torch.no_grad():
        assert torch.equal(appended.graph(ROWS)[0], made(component.graph(ROWS)[0]))
        assert tuple(component.graph(ROWS)[0].shape) == (4, 8)
    assert find_head(appended) == "task_head"
    assert find_head(component) is None


def test_a_head_beside_a_module_of_its_name_is_found_under_the_name_it_got() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task_head, self.act = nn.Linear(8, 8), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.task_head(x))

    fit = HeadFit(torch.ones(2, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), torch.zeros(0, 2), 1.0)
    made, path = install_head(component_of(Taken(), ROWS), None, fit)
    assert path == "task_head_2"
    assert find_head(made) == path


@dataclass(frozen=True)
class Rows:
    """A workload of rows with a target each: the smallest thing that offers a head something to fit."""

    x: Tensor
    targets: Tensor | None
    fingerprint: str = "rows"
    item_groups: Sequence[str] = ()
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def n_items(self) -> int:
        return len(self.x)

    @property
    def feeds(self) -> Mapping[str, Sequence[Feed]]:
        return {"model": [{"x": self.x}]}

    def losses(self, outputs: Outputs) -> Tensor:
        assert self.targets is not None
        return torch.nn.functional.cross_entropy(outputs["model"].double(), self.targets.argmax(1), reduction="none")

    def item_scores(self, outputs: Outputs) -> Tensor:
        assert self.targets is not None
        return (outputs["model"].argmax(1) == self.targets.argmax(1)).double()

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        return self.targets

    def groups(self, component: str) -> Sequence[str]:
        return [str(i // 2) for i in range(len(self.x))]


def separable(program: Program, *, n: int = 60) -> tuple[Rows, Tensor]:
    """Rows whose class is what a fixed linear map of the program's features says; and those features."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, 8, generator=generator)
    component = program.components["model"]
    features = run_component(component, [{"x": x}], head_features(component, "head"))
    scores = features @ torch.randn(3, 8, generator=generator).T
    return Rows(x, nn.functional.one_hot(scores.argmax(1), 3).double()), features


def test_a_refit_learns_what_the_features_say_and_is_drawn_towards_the_models_own_head() -> None:
    program = program_of(ResidualBlocks(), ROWS)
    work, features = separable(program)
    reference = {"model": run_component(program.components["model"], work.feeds["model"])}
    refitted = refit_heads(program, {"model": features}, work, reference)
    outputs = {"model": run_component(refitted.components["model"], work.feeds["model"])}
    assert float(work.item_scores(reference).mean()) < 0.6
    assert float(work.item_scores(outputs).mean()) > 0.9
    assert float(work.losses(outputs).mean()) < float(work.losses(reference).mean())
    assert refitted.heads == {"model": "task_head"}
    assert refitted.fitted_heads == {"model"}
    assert program.heads == {"model": "head"}
    assert program.fitted_heads == frozenset()
    assert torch.equal(run_component(program.components["model"], work.feeds["model"]), reference["model"])


def test_a_head_fitted_on_the_task_is_no_prior_for_the_next_fit() -> None:
    program = program_of(ResidualBlocks(), ROWS)
    work, features = separable(program)
    prior = prior_weight(program, "model")
    assert prior is not None
    assert torch.equal(prior, head_module(program.components["model"], "head").weight)
    reference = {"model": run_component(program.components["model"], work.feeds["model"])}
    refitted = refit_heads(program, {"model": features}, work, reference)
    assert prior_weight(refitted, "model") is None
    again = refit_heads(refitted, {"model": features}, work, reference)
    assert again.heads == {"model": "task_head"}
    fresh = fit_head("model", features, work, reference)
    assert fresh is not None
    weight = head_module(again.components["model"], "task_head").weight.double()
    assert torch.allclose(weight, fresh.weight, atol=1e-5)


def test_the_scale_of_a_fitted_head_is_the_one_with_the_least_loss() -> None:
    program = program_of(ResidualBlocks(), ROWS)
    work, features = separable(program)
    fit = fit_head("model", features, work, {})
    assert fit is not None
    loss = float(work.losses({"model": fit.held_out}).mean())
    assert loss < float(work.losses({"model": fit.held_out / 2}).mean())
    assert loss <= float(work.losses({"model": fit.held_out / 1.25}).mean())
    assert fit.outputs(features).shape == (60, 3)
    assert float((fit.outputs(features).argmax(1) == work.targets.argmax(1)).double().mean()) > 0.9  # type: ignore[union-attr]


def test_where_there_is_nothing_to_fit_the_program_stays() -> None:
    program = program_of(ResidualBlocks(), ROWS)
    refitted = refit_heads(program, {"model": torch.ones(4, 8)}, Rows(ROWS, None), {})
    assert refitted.heads == {"model": "head"}
    assert refitted.fitted_heads == frozenset()
    assert refitted.components["model"] is program.components["model"]
