"""What is kept takes over what was skipped behind it, as far as least squares can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlmopt.core.contract import Context
from vlmopt.core.program import Component, Program
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import program_of
from vlmopt.graph.replay import run_component
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step
from vlmopt.tuning.compensation import compensated

WIDTH, TOKENS = 6, 3


class Blocks(nn.Module):
    """Position-wise branches `x + scale * down(relu(up(x)))`; or post-norm. [B, N, d]."""

    def __init__(self, *, blocks: int = 3, scaled: bool = False, post_norm: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 16), "down": nn.Linear(16, WIDTH), "norm": nn.LayerNorm(WIDTH)})
            for _ in range(blocks)
        )
        self.first = nn.LayerNorm(WIDTH)
        self.scales = nn.ParameterList(nn.Parameter(torch.linspace(0.5, 2.0, WIDTH)) for _ in range(blocks))
        self.scaled, self.post_norm = scaled, post_norm
        for layer in self.layers:
            for name in ("up", "down"):
                for parameter in layer[name].parameters():
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if self.post_norm else x
        for layer, scale in zip(self.layers, self.scales, strict=True):
            term = layer["down"](torch.relu(layer["up"](x)))
            x = x + (term * scale if self.scaled else term)
            x = layer["norm"](x) if self.post_norm else x
        return x


def feeds(n: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, TOKENS, WIDTH, generator=generator)} for _ in range(n)]


def cut(program: Program, *branches: str) -> Component:
    step = run_step(program, make_pass("skip-branches", {"branches": list(branches)}), Context(), step=1)
    return step.program.components["model"]


def even(n: int) -> Sequence[Tensor]:
    return [torch.ones(1)] * n


def distance(a: Component, b: Component, batches: list[dict[str, Tensor]]) -> float:
    return float(((run_component(a, batches) - run_component(b, batches)) ** 2).mean())


def test_a_bias_that_the_skipped_branch_added_is_taken_over_exactly() -> None:
    module = Blocks(blocks=2)
    module.layers[1]["down"].weight.data.zero_()
    module.layers[1]["down"].bias.data = torch.arange(1.0, WIDTH + 1)
    program = program_of(module, torch.ones(2, TOKENS, WIDTH))
    made, found = compensated(cut(program, "layers.1*"), program.components["model"], feeds(), even(2))
    assert [one.branch for one in found] == ["layers.0.ffn"]
    assert found[0].before > 0.5
    assert found[0].after < 1e-6
    assert distance(made, program.components["model"], feeds()) < 1e-5


def test_a_nonlinear_branch_is_taken_over_in_part_and_every_fit_gets_closer() -> None:
    for scaled in (False, True):
        program = program_of(Blocks(scaled=scaled), torch.ones(2, TOKENS, WIDTH))
        original, skipped = program.components["model"], cut(program, "layers.1*")
        made, found = compensated(skipped, original, feeds(), even(3))
        assert [one.branch for one in found] == ["layers.0.ffn", "layers.2.ffn"]
        assert all(one.after < one.before for one in found)
        fresh = [{"x": torch.randn(64, TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))}]
        assert distance(made, original, fresh) < 0.6 * distance(skipped, original, fresh)


def test_the_solution_is_that_of_a_least_squares_solver() -> None:
    program = program_of(Blocks(blocks=2, scaled=True), torch.ones(2, TOKENS, WIDTH))
    original, skipped = program.components["model"], cut(program, "layers.1*")
    x = torch.cat([feed["x"] for feed in feeds(50)])
    made, _ = compensated(skipped, original, [{"x": x[:150]}, {"x": x[150:]}], even(2))
    fitted = torch.arange(len(x)) % 5 != 4  # each fifth sample is kept out of the fit
    with torch.no_grad():
        hidden = torch.relu(skipped.graph.get_submodule("layers.0.up")(x[fitted])).flatten(0, 1).double()
        wanted = (original.graph(x[fitted])[0] - x[fitted]) / torch.linspace(0.5, 2.0, WIDTH)
    target, rows = wanted.flatten(0, 1).double(), torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    solution = torch.linalg.lstsq(rows, target).solution
    best = float(((rows @ solution - target) ** 2).mean())
    down = made.graph.get_submodule("layers.0.down")
    own = float(((hidden @ down.weight.detach().double().T + down.bias.detach().double() - target) ** 2).mean())
    assert best <= own < 1.01 * best  # the weakest ridge that is tried is 1e-4 of the mean of the diagonal


def test_positions_that_do_not_matter_do_not_pull() -> None:
    module = Blocks(blocks=2)
    program = program_of(module, torch.ones(2, TOKENS, WIDTH))
    original, skipped = program.components["model"], cut(program, "layers.1*")
    first = torch.tensor([TOKENS, 0.0, 0.0])
    offset = torch.tensor([3.0, -1.0, -1.0])[None, :, None]  # the first position has values of its own
    batches = [{"x": feed["x"] + offset} for feed in feeds(60)]
    made, _ = compensated(skipped, original, batches, [first, first])
    flat, _ = compensated(skipped, original, batches, even(2))
    outputs = [run_component(one, batches) for one in (made, flat, original)]
    at_first = [float(((one - outputs[2])[:, 0] ** 2).mean()) for one in outputs[:2]]
    elsewhere = [float(((one - outputs[2])[:, 1:] ** 2).mean()) for one in outputs[:2]]
    assert at_first[0] < 0.9 * at_first[1]
    assert elsewhere[0] > 1.1 * elsewhere[1]


def test_without_a_gap_and_behind_post_norms_nothing_is_touched() -> None:
    program = program_of(Blocks(), torch.ones(2, TOKENS, WIDTH))
    whole = program.components["model"]
    assert compensated(whole, whole, feeds(), even(3)) == (whole, ())
    program = program_of(Blocks(post_norm=True), torch.ones(2, TOKENS, WIDTH))
    assert [branch.is_post_norm for branch in find_branches(program.components["model"].graph)] == [True] * 3
    made, found = compensated(cut(program, "layers.1*"), program.components["model"], feeds(), even(3))
    assert found == ()
    assert distance(made, cut(program, "layers.1*"), feeds()) == 0


def test_the_weights_of_the_program_given_stay() -> None:
    program = program_of(Blocks(), torch.ones(2, TOKENS, WIDTH))
    skipped = cut(program, "layers.1*")
    before = {name: weight.clone() for name, weight in skipped.graph.named_parameters()}
    compensated(skipped, program.components["model"], feeds(), even(3))
    assert all(torch.equal(weight, before[name]) for name, weight in skipped.graph.named_parameters())
