"""What the passes that insert and fold adapters do to a program, beyond the contract."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from vlmopt.core.contract import Context
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.graph.adapters import adapter_parameters, find_adapters
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import AttentionBlocks, program_of, without_branches
from vlmopt.graph.marks import marks_of
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, run_step

ALL = ("layers.0.attention", "layers.0.ffn", "layers.1.attention", "layers.1.ffn")


def blocks(*skipped: str, n: int = 2) -> Program:
    return without_branches(program_of(AttentionBlocks(blocks=n), torch.ones(2, 3, 8)), *skipped)


def step(program: Program, name: str, options: Mapping[str, object], *, fuel: int | None = None) -> StepResult:
    return run_step(program, make_pass(name, dict(options)), Context(), step=1, fuel=fuel)


def batch(*, seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(seed))


def run(program: Program, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = program.components["model"].graph(x)[0]
    return found


def sites(program: Program) -> list[str]:
    return [adapter.site for adapter in find_adapters(program.components["model"].graph)]


def train(program: Program) -> None:
    """Gives every adapter parameter other numbers, as training would."""
    generator = torch.Generator().manual_seed(7)
    for parameter in adapter_parameters(program).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.mark.parametrize("kind", ["bottleneck", "linear"])
@pytest.mark.parametrize("per", ["layer", "run"])
def test_adapters_for_skipped_layers_change_no_bit_until_they_are_trained(kind: str, per: str) -> None:
    before = blocks(*ALL)
    done = step(before, "insert-skip-adapter", {"kind": kind, "per": per, "rank": 2})
    assert len(done.applied) == {"layer": 2, "run": 1}[per]
    assert torch.equal(run(done.program, batch()), run(before, batch()))
    assert done.predicted == done.counted
    train(done.program)
    assert not torch.allclose(run(done.program, batch()), run(before, batch()))


def test_with_the_papers_beginning_the_function_changes_at_once() -> None:
    before = blocks(*ALL)
    done = step(before, "insert-skip-adapter", {"rank": 2, "init": "paper"})
    assert not torch.equal(run(done.program, batch()), run(before, batch()))


@pytest.mark.parametrize("order", [ALL, ALL[::-1], (ALL[2], ALL[0], ALL[3], ALL[1])])
def test_adapters_lie_in_the_order_of_the_stream_whatever_was_skipped_first(order: tuple[str, ...]) -> None:
    done = step(blocks(*order), "insert-skip-adapter", {"rank": 2})
    assert sites(done.program) == ["layers.0.skip", "layers.1.skip"]
    wanted = step(blocks(*ALL), "insert-skip-adapter", {"rank": 2})
    assert done.text_after == wanted.text_after


def test_sites_may_be_applied_in_any_order() -> None:
    options = {"rank": 2, "init": "paper"}
    both = step(blocks(*ALL), "insert-skip-adapter", options)
    second = step(blocks(*ALL), "insert-skip-adapter", {**options, "layers": ["layers.1"]})
    assert sites(second.program) == ["layers.1.skip"]
    first = step(second.program, "insert-skip-adapter", {**options, "layers": ["layers.0"]})
    assert first.text_after == both.text_after
    assert torch.equal(run(first.program, batch()), run(both.program, batch()))


def test_an_adapter_between_kept_branches_reads_what_they_leave() -> None:
    program = blocks("layers.1.attention", "layers.1.ffn", n=3)
    done = step(program, "insert-skip-adapter", {"rank": 2})
    graph = done.program.components["model"].graph
    names = [branch.name for branch in find_branches(graph)]
    assert names == [
        "layers.0.attention", "layers.0.ffn", "adapters.layers.1.skip", "layers.2.attention", "layers.2.ffn"
    ]  # fmt: skip
    assert not any(marks_of(node) for node in graph.graph.nodes)


def test_skipping_more_after_an_insertion_marks_what_is_new() -> None:
    done = step(blocks("layers.1.ffn"), "insert-skip-adapter", {"rank": 2})
    more = step(done.program, "skip-branches", {"branches": ["layers.1.attention"]})
    again = step(more.program, "insert-skip-adapter", {"rank": 2})
    assert [site.target for site in again.applied] == [("layers.1.attention",)]
    assert sites(again.program) == ["layers.1.skip_2", "layers.1.skip"]


def test_an_adapter_inside_the_ffn_folds_into_a_program_as_small_as_without_it() -> None:
    before = blocks("layers.0.attention")
    inserted = step(before, "insert-skip-adapter", {"kind": "eas", "rank": 2})
    assert torch.equal(run(inserted.program, batch()), run(before, batch()))
    train(inserted.program)
    trained = run(inserted.program, batch())
    folded = step(inserted.program, "fold-skip-adapter", {})
    assert [site.summary for site in folded.applied] == ["into layers.0.ffn.up"]
    assert folded.predicted == folded.counted
    assert folded.counted.parameters == 2 * 8 * 2 + 2 + 8 == -inserted.counted.parameters
    assert adapter_parameters(folded.program) == {}
    assert float((run(folded.program, batch()) - trained).abs().max()) < 1e-5 * float(trained.abs().max())
    assert torch.equal(run(inserted.program, batch()), trained)
    assert folded.text_after == step(before, "canonicalize", {}).text_after


def test_adapters_beside_kept_branches_are_added_once() -> None:
    before = blocks("layers.0.ffn")
    done = step(before, "insert-adaptation-adapter", {"rank": 2})
    assert sites(done.program) == [f"{name}.beside" for name in (ALL[0], ALL[2], ALL[3])]
    assert torch.equal(run(done.program, batch()), run(before, batch()))
    again = step(done.program, "insert-adaptation-adapter", {"rank": 2})
    assert again.applied == ()
    assert {refusal.reason for refusal in again.refusals} == {"has an adapter beside it already"}


def test_adapters_at_skipped_and_beside_kept_branches_go_together() -> None:
    first = step(blocks("layers.0.attention"), "insert-skip-adapter", {"kind": "eas", "rank": 2})
    both = step(first.program, "insert-adaptation-adapter", {"rank": 2})
    assert sorted(site.target[0] for site in both.applied) == [ALL[1], ALL[2], ALL[3]]
    train(both.program)
    trained = run(both.program, batch())
    folded = step(both.program, "fold-skip-adapter", {})
    assert len(folded.applied) == 1
    assert len(folded.refusals) == 3
    assert float((run(folded.program, batch()) - trained).abs().max()) < 1e-5 * float(trained.abs().max())


def test_a_layer_goes_with_the_adapters_beside_its_branches() -> None:
    done = step(blocks(), "insert-adaptation-adapter", {"rank": 2})
    cut = step(done.program, "skip-layers", {"layers": ["layers.1"]})
    assert sites(cut.program) == ["layers.0.attention.beside", "layers.0.ffn.beside"]
    assert torch.equal(run(cut.program, batch()), run(blocks(ALL[2], ALL[3]), batch()))


@pytest.mark.parametrize("option", ["branches", "layers"])
def test_a_misspelled_name_is_refused_with_the_closest_one(option: str) -> None:
    options = {option: ["layers.1.atention" if option == "branches" else "layer.1"]}
    with pytest.raises(PassError, match=f"insert-skip-adapter: {option}: .* matches nothing.*did you mean 'layers.1"):
        step(blocks(*ALL), "insert-skip-adapter", options)


def test_a_rank_below_one_is_refused_when_the_recipe_is_read() -> None:
    for name in ("insert-skip-adapter", "insert-adaptation-adapter"):
        with pytest.raises(PassError, match="refuses its options: rank is 0; expected at least 1"):
            make_pass(name, {"rank": 0})


def test_weights_follow_the_seed_of_the_run() -> None:
    program, pass_ = blocks(*ALL), make_pass("insert-skip-adapter", {"rank": 2, "init": "paper"})
    one, same, other = (run_step(program, pass_, Context(seed=seed), step=1).program for seed in (1, 1, 2))
    assert torch.equal(run(one, batch()), run(same, batch()))
    assert not torch.equal(run(one, batch()), run(other, batch()))
