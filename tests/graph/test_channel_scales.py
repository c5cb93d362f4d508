"""Scales of channels: nothing changes to the bit, and one grid for all channels loses less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlmopt.core.contract import Context, StatRequest
from vlmopt.core.program import Program
from vlmopt.graph.example import program_of
from vlmopt.graph.replay import run_outputs
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import run_step


class Tower(nn.Module):
    """A norm with one channel that is a hundred times the others, as a vision tower has, and two readers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.side = nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.norm.weight.data[3] = 100.0
        self.up.weight.data[:, 3] *= 0.01
        self.side.weight.data[:, 3] *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.relu(self.up(y)) + self.side(y)


X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))


def scaled(program: Program) -> Program:
    with torch.no_grad():
        largest = Tower().norm(X).abs().amax((0, 1)).double()
    known = Context(statistics={StatRequest("model", "norm", "absmax"): largest})
    return run_step(program, make_pass("fold-channel-scales", {}), known, step=1).program


def run(program: Program) -> Tensor:
    return run_outputs(program.components["model"], {"x": X})[0]


def quantized(program: Program) -> Program:
    program.heads.clear()
    return run_step(program, make_pass("quantize-int8", {}), Context(), step=2).program


def test_not_a_bit_changes_and_rounding_loses_a_tenth() -> None:
    program = program_of(Tower(), X)
    found = scaled(program)
    wanted = run(program)
    assert torch.equal(run(found), wanted)
    errors = [float((run(quantized(one)) - wanted).norm() / wanted.norm()) for one in (program, found)]
    assert errors[1] < 0.1 * errors[0]


def test_weights_of_the_program_before_are_not_written() -> None:
    program = program_of(Tower(), X)
    before = {name: tensor.clone() for name, tensor in program.components["model"].graph.named_parameters()}
    scaled(program)
    for name, tensor in program.components["model"].graph.named_parameters():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_outside_of_its_range_is_refused(share: float) -> None:
    with pytest.raises(Exception, match="share is"):
        make_pass("fold-channel-scales", {"share": share})
