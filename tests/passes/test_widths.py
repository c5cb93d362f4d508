"""Widths are found by structure and cut exactly: what nobody reads goes without a trace, what is cut lives on in the
Linear behind it, and a decoder with fewer heads decodes with its cache as without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from vlmopt_passes.prune_ffn import PruneFfn
from vlmopt_passes.prune_heads import PruneHeads

from tests import toys
from tests.passes.test_low_rank import run, train
from tests.passes.test_phantom import logits, prompts
from vlmopt.capture import capture
from vlmopt.core.contract import Context, Pass, StatRequest
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import GroupedHeads, ResidualBlocks, program_of
from vlmopt.graph.folding import linear_of
from vlmopt.graph.modules import clone_graph, set_at
from vlmopt.graph.replay import inputs_of, run_outputs
from vlmopt.graph.widths import Group, find_head_groups, find_hidden
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, run_step
from vlmopt.verify.parity import check_file
from vlmopt.workflow.samples import sample_shapes

TOWERS = ("clip", "dual_encoder", "vilt", "blip")
DECODERS = ("llava_llama", "gemma3")
Captured = Callable[[str], Program]
SAMPLE = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Canonical programs of toy families, each captured once."""
    known: dict[str, Program] = {}

    def of(family: str) -> Program:
        if family not in known:
            program = capture(str(toys.write_model(family, tmp_path_factory.mktemp(family))))
            known[family] = run_step(program, make_pass("canonicalize", {}), Context(), step=1).program
        return known[family]

    return of


def measured(pass_: Pass, program: Program, *, n: int = 300) -> Context:
    """As if rows of normal numbers had been collected."""
    rows: dict[StatRequest, object] = {}
    for request in pass_.wants(program):
        nodes = program.components[request.component].graph.graph.nodes
        width = next(node for node in nodes if node.name == request.node).meta["val"].shape[-1]
        rows[request] = torch.randn(n, width, generator=torch.Generator().manual_seed(1))
    return Context(statistics=rows)


def cut(pass_: Pass, program: Program, context: Context | None = None) -> StepResult:
    done = run_step(program, pass_, measured(pass_, program) if context is None else context, step=1)
    assert done.applied
    assert done.predicted == done.counted
    return done


def groups_of(program: Program) -> list[tuple[str, fx.GraphModule, Group]]:
    """Name, graph and group of every branch that has one."""
    return [
        (f"{name}/{branch.name}", part.graph, group)
        for name, part in program.components.items()
        for branch in find_branches(part.graph)
        for find in (find_hidden, find_head_groups)
        if not isinstance(group := find(program, part, branch), str)
    ]


def with_idle_units(program: Program) -> Program:
    """The program in which nobody reads every second unit of any width."""
    parts = {name: replace(part, graph=clone_graph(part.graph)) for name, part in program.components.items()}
    made = program.with_components(parts)
    for _, graph, group in groups_of(made):
        for node in group.consumers:
            leaf = linear_of(graph, node)
            idle = nn.Linear(leaf.in_features, leaf.out_features, bias=leaf.bias is not None, dtype=leaf.weight.dtype)
            idle.weight.data = leaf.weight.detach().clone()
            idle.weight.data[:, group.columns[1::2].flatten()] = 0
            if leaf.bias is not None:
                idle.bias = leaf.bias
            set_at(graph, str(node.target), idle.requires_grad_(False).eval())
    return made


def worst(before: Program, after: Program) -> float:
    """The largest difference of any output, at two shapes."""
    found = 0.0
    with torch.no_grad():
        for name, feeds in sample_shapes(before, None, seed=3).items():
            for feed in feeds:
                one, other = (
                    part.graph(*inputs_of(part, feed)) for part in (before.components[name], after.components[name])
                )
                pairs = zip(one, other, strict=True)
                found = max([found, *(float((a - b).abs().max()) for a, b in pairs if a.is_floating_point())])
    return found


@pytest.mark.parametrize(("family", "compensate"), [*((family, True) for family in TOWERS), ("clip", False)])
def test_units_that_nobody_reads_go_without_a_trace(captured: Captured, family: str, *, compensate: bool) -> None:
    before = with_idle_units(captured(family))
    narrow = cut(PruneFfn(keep=0.5, compensate=compensate), before).program
    assert worst(before, narrow) < 2e-5
    few = cut(PruneHeads(keep=0.5, compensate=compensate), narrow)
    assert worst(before, few.program) < 2e-5
    assert not few.refusals
    assert worst(before, captured(family)) > 1e-2  # the idle ones are no matter of course


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_with_fewer_heads_decodes_with_its_cache_as_without(captured: Captured, family: str) -> None:
    before = with_idle_units(captured(family))
    only = (f"{DECODER}/*",)
    context = measured(PruneHeads(), before)
    done = cut(PruneHeads(keep=0.5, branches=only), cut(PruneFfn(keep=0.5, branches=only), before).program, context)
    old, new = before.components[DECODER], done.program.components[DECODER]
    shapes = {spec.name: spec.shape for spec in new.inputs}
    assert shapes["past_key_values_0_key"] == ("batch", 1, "past", 8)
    assert {spec.name: spec.shape for spec in old.inputs}["past_key_values_0_key"] == ("batch", 2, "past", 8)
    assert done.counted.kv_cache_bytes_per_token * 2 == sum(4 * 2 * 8 for spec in old.inputs if len(spec.shape) == 4)
    given = prompts(before, has_image=True, n_rows=2)
    wanted, tokens = logits(before, given, is_cached=True)
    for is_cached in (True, False):
        found, others = logits(done.program, given, is_cached=is_cached)
        assert torch.equal(tokens, others)
        assert float((found - wanted).abs().max()) < 2e-5


@pytest.mark.slow
def test_a_decoder_whose_layers_differ_in_heads_is_right_in_onnx(captured: Captured, tmp_path: Path) -> None:
    program = cut(PruneHeads(keep=0.5, branches=(f"{DECODER}/*layers.1.*",)), captured("llava_llama")).program
    alone = replace(program, components={DECODER: program.components[DECODER]})
    files = emit_program(alone, ("onnx",), tmp_path, progress=Silent())
    feeds = sample_shapes(program, None, seed=0)[DECODER]
    cases = [(feed, run_outputs(alone.components[DECODER], feed)) for feed in feeds]
    assert check_file("decoder", tmp_path / files[DECODER]["onnx"], "onnx", cases, dtype="float32").passed


def rows_of(n: int, weights: Tensor) -> Tensor:
    return torch.randn(n, len(weights), generator=torch.Generator().manual_seed(5), dtype=torch.float64) @ weights


def test_twins_are_taken_over_without_loss() -> None:
    """Of channels that come in equal pairs one half is enough."""
    pairs = torch.eye(8, dtype=torch.float64).repeat(1, 2)
    before = program_of(ResidualBlocks(blocks=1).double(), torch.ones(2, 8, dtype=torch.float64))
    graph = before.components["model"].graph
    ((_, _, group),) = groups_of(before)
    up = linear_of(graph, group.producers[0])
    up.weight.data, up.bias.data = up.weight.data[:8].repeat(2, 1), up.bias.data[:8].repeat(2)
    request = next(iter(PruneFfn().wants(before)))
    context = Context(statistics={request: rows_of(200, pairs).relu()})
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = run(before, x)
    with_help = run(cut(PruneFfn(keep=0.5), before, context).program, x)
    without = run(cut(PruneFfn(keep=0.5, compensate=False), before, context).program, x)
    assert float((with_help - wanted).abs().max()) < 1e-3
    assert float((without - wanted).abs().max()) > 1e-2


def test_two_widths_of_one_branch_are_two_candidates_of_which_the_first_is_taken() -> None:
    program = program_of(ResidualBlocks(blocks=1), torch.ones(2, 8))
    wide, thin = (PruneFfn(keep=keep, multiple=4) for keep in (0.75, 0.5))
    context = measured(wide, program)
    sites = [pass_.plan(program, context).sites[0] for pass_ in (wide, thin)]
    assert [site.name for site in sites] == ["model/layers.0.ffn@12", "model/layers.0.ffn@8"]
    done = cut(wide, program, context).program
    thin.apply(done, sites[1], context)
    ((_, graph, group),) = groups_of(done)
    assert group.n_units == 12
    assert linear_of(graph, group.consumers[0]).in_features == 12


@pytest.mark.parametrize("pass_", [PruneFfn(keep=0.5, multiple=4), PruneHeads(keep=0.5)])
def test_adapters_beside_a_layer_are_cut_with_it_and_fold_as_before(pass_: Pass) -> None:
    made = program_of((ResidualBlocks() if isinstance(pass_, PruneFfn) else GroupedHeads()).double(), SAMPLE)
    options = {"rank": 2}
    adapted = run_step(made, make_pass("insert-low-rank-adapter", options), Context(), step=1).program
    train(adapted)
    done = cut(pass_, with_idle_units(adapted)).program
    assert float((run(done, SAMPLE) - run(with_idle_units(adapted), SAMPLE)).abs().max()) < 1e-12
    folded = run_step(done, make_pass("fold-adapters", {}), Context(), step=1)
    assert folded.applied
    assert float((run(folded.program, SAMPLE) - run(done, SAMPLE)).abs().max()) < 1e-12
    assert float((run(done, SAMPLE) - run(made, SAMPLE)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("make", "options"), [(PruneFfn, {"keep": 1.0}), (PruneHeads, {"keep": 0.0}), (PruneFfn, {"multiple": 0})]
)
def test_shares_that_are_none_are_refused(make: Callable[..., Pass], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected (a share|1 or more)"):
        make(**options)
