"""A head that is fitted again finds what a cut has left."""

from __future__ import annotations

import pytest
import torch

from tests.profiling.workloads import Classification, planted_program, planted_workload, with_head
from vlmopt.core.contract import Context
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.modules import get_at
from vlmopt.graph.replay import run_component
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import program_text, run_step
from vlmopt.tuning.closed_form import has_unfitted_head, recover_closed_form, recover_heads

FIT, CHECK = planted_workload(seed=1), planted_workload(seed=2)


def accuracy(program: Program, workload: Classification = CHECK) -> float:
    return 100 * float(workload.item_scores(outputs(program, workload)).mean())


def outputs(program: Program, workload: Classification) -> dict[str, torch.Tensor]:
    return {"model": run_component(program.components["model"], workload.feeds["model"])}


def shifted(program: Program) -> Program:
    """The program whose third block moves the feature that decides: skipping it loses no information."""
    down = get_at(program.components["model"].graph, "layers.2.down")
    assert isinstance(down, torch.nn.Linear)
    down.bias.data[7] += 20.0
    return program


def test_after_a_cut_the_fitted_head_gets_the_accuracy_back() -> None:
    program = with_head(shifted(planted_program()), FIT)
    before = accuracy(program)
    step = make_pass("skip-branches", {"branches": ["layers.2.ffn"]})
    cut = run_step(program, step, Context(), step=1).program
    recovered = recover_heads(cut, FIT, {}, components=frozenset({"model"}), progress=Silent(), seed=0)
    assert before > 85
    assert accuracy(cut) < before - 10
    assert accuracy(recovered) > before - 3
    assert recovered.fitted_heads == {"model"}


def test_only_the_heads_asked_for_change_and_the_program_given_stays() -> None:
    program = with_head(planted_program(), FIT)
    text = program_text(program)
    same = recover_heads(program, FIT, {}, components=frozenset({"other"}), progress=Silent(), seed=0)
    assert same.components["model"].graph is program.components["model"].graph
    weight = program.components["model"].graph.get_parameter("task_head.weight").clone()
    recover_heads(program, CHECK, {}, components=frozenset({"model"}), progress=Silent(), seed=0)
    assert torch.equal(program.components["model"].graph.get_parameter("task_head.weight"), weight)
    assert program_text(program) == text


def test_a_head_of_zeros_counts_as_unfitted() -> None:
    program = planted_program()
    assert has_unfitted_head(program)
    assert not has_unfitted_head(with_head(program, FIT))


def test_fitting_twice_gives_the_same_weights() -> None:
    once, again = (with_head(planted_program(), FIT) for _ in range(2))
    for name in ("task_head.weight", "task_head.bias"):
        found = [p.components["model"].graph.get_parameter(name) for p in (once, again)]
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("n", [5, 12])
def test_few_samples_are_enough_to_fit_something_finite(n: int) -> None:
    small = Classification(FIT.x[:n], FIT.targets[:n], [str(i) for i in range(n)])
    assert accuracy(with_head(planted_program(), small)) > 40


def test_compensation_is_taken_where_items_that_no_fit_has_seen_lose_less() -> None:
    original = with_head(shifted(planted_program()), FIT)
    step = make_pass("skip-branches", {"branches": ["layers.2.ffn"]})
    cut = run_step(original, step, Context(), step=1).program
    reference = tuple(
        {"model": run_component(original.components["model"], one.feeds["model"])} for one in (FIT, CHECK)
    )
    found = recover_closed_form(
        cut, original, FIT, CHECK, reference, components=frozenset({"model"}), progress=Silent(), seed=0
    )
    alone, compensated = found.losses["model"]
    assert (compensated < alone) == ("model" in found.compensations)
    assert accuracy(found.program) > accuracy(original) - 3
    for one in found.compensations.get("model", ()):
        assert one.after <= one.before


def test_a_compensation_that_is_no_better_is_left_out() -> None:
    original = with_head(planted_program(), FIT)
    step = make_pass("skip-branches", {"branches": ["layers.3.ffn"]})  # adds nothing, so nothing can be gained
    cut = run_step(original, step, Context(), step=1).program
    reference = tuple(
        {"model": run_component(original.components["model"], one.feeds["model"])} for one in (FIT, CHECK)
    )
    part = frozenset({"model"})
    found = recover_closed_form(cut, original, FIT, CHECK, reference, components=part, progress=Silent(), seed=0)
    plain = recover_heads(cut, FIT, reference[0], components=part, progress=Silent(), seed=0)
    alone, compensated = found.losses["model"]
    if compensated >= alone:
        assert found.compensations == {}
    assert accuracy(found.program) == pytest.approx(accuracy(plain), abs=2)
