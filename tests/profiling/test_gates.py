"""Gate gradients are derivatives of the loss by gates, one for each sample and branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.profiling.workloads import Classification, planted_program, planted_workload, with_head
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.head import head_features
from vlmopt.profiling.estimator import no_checkpoint
from vlmopt.profiling.gates import GateGradient, gate, gate_gradients, with_gates


@pytest.fixture(scope="module")
def program() -> Program:
    return in_double(with_head(planted_program(), planted_workload()))


def in_double(program: Program) -> Program:
    program.components["model"].graph.double()
    return program


def workload() -> Classification:
    found = planted_workload(n=40)
    return Classification(found.x.double(), found.targets, found.group_names)


def by_hand(program: Program, work: Classification, gates: Tensor) -> Tensor:
    """Loss of every row [n] with gates [n_branches], computed from the leaves and not from the graph."""
    module = program.components["model"].graph
    x = work.x
    for i, value in enumerate(gates):
        layer = module.get_submodule(f"layers.{i}")
        x = x + value * layer.down(torch.relu(layer.up(x)))
    head = module.get_submodule(program.heads["model"])
    return work.losses({"model": head(x).detach()})


def test_gradients_are_finite_differences_of_the_gates(program: Program) -> None:
    work = workload()
    found = gate_gradients(
        program, "model", work, {"model": torch.zeros(40, 2)}, progress=Silent(), checkpoint=no_checkpoint
    )
    assert found.shape == (40, 4)
    step = 1e-5
    for branch in range(4):
        up, down = torch.ones(4), torch.ones(4)
        up, down = up.double(), down.double()
        up[branch] += step
        down[branch] -= step
        slope = (by_hand(program, work, up) - by_hand(program, work, down)) / (2 * step)
        assert found[:, branch].numpy() == pytest.approx(slope.numpy(), abs=1e-6)  # gates are float32
    assert float(found[:, 1].abs().mean()) > 0.05
    assert found[:, 3].abs().max() == 0.0  # writes nothing


def test_first_order_is_the_mean_and_fisher_the_mean_square_of_the_samples(program: Program) -> None:
    work = workload()
    sums, squares = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i in range(40):
        one = Classification(work.x[i : i + 1], work.targets[i : i + 1], ["g"])
        gates = torch.ones(4, 1, requires_grad=True)
        logits = with_gates(program.components["model"])(one.x, gates)[0]
        (gradient,) = torch.autograd.grad(one.losses({"model": logits}).sum(), gates)
        sums += gradient[:, 0]
        squares += gradient[:, 0].double() ** 2
    for is_fisher, wanted in ((False, (sums / 40).abs()), (True, squares / 40)):
        estimator = GateGradient(is_fisher=is_fisher)
        found = estimator.estimate(program, work, progress=Silent(), checkpoint=no_checkpoint, seed=0)
        assert [score.mean for score in found.scores] == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-12)
        assert found.forward_passes == pytest.approx(3 * 40)


def test_a_graph_with_open_gates_computes_what_it_did(program: Program) -> None:
    component, x = program.components["model"], workload().x
    gated = with_gates(component)
    assert torch.equal(gated(x, torch.ones(4, 40))[0], component.graph(x)[0])
    assert head_features(component, program.heads["model"]).graph is component.graph.graph  # the original is untouched


def test_closing_a_gate_closes_it_for_that_sample_alone(program: Program) -> None:
    component, x = program.components["model"], workload().x
    gates = torch.ones(4, 40)
    gates[1, 7] = 0.0
    changed = (with_gates(component)(x, gates)[0] != component.graph(x)[0]).any(dim=1)
    assert torch.nonzero(changed).flatten().tolist() == [7]


def test_rows_that_are_several_to_a_sample_share_its_gate() -> None:
    value, gates = torch.ones(6, 2), torch.tensor([[1.0, 0.0, 3.0]])
    assert gate(value, gates, 0)[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 3.0, 3.0]
