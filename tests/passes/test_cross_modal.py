"""Cross-modal adapters: bit-equal until trained, formula, count, one projection for both, folded and detached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.adapter_counts import counted, vicuna_7b
from tests.capture.test_generative import captured_toy, prompts
from tests.graph.test_joined import taught
from vlmopt.core.contract import Context, StatRequest
from vlmopt.core.errors import PassError, VlmoptError
from vlmopt.core.program import Assembly, Program
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION, greedy
from vlmopt.graph.cross_modal import CROSS_MODAL, adapted_program, gated_value
from vlmopt.graph.detaching import detach_adapters
from vlmopt.graph.example import component_of, eyes_and_words, program_from, two_towers
from vlmopt.graph.frozen_gate import freeze_gate
from vlmopt.graph.joined import joined
from vlmopt.graph.modules import get_at
from vlmopt.graph.replay import run_outputs
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, clone_program, program_text, run_step
from vlmopt.rewrite.snapshot import checksum
from vlmopt.tuning.trainable import trainable_copy
from vlmopt.workflow.samples import sample_shapes

INSERT, FOLD = "insert-cross-modal-adapter", "fold-cross-modal-adapter"


def step(program: Program, name: str, **options: Any) -> StepResult:
    return run_step(program, make_pass(name, options), Context(), step=1)


def adapted(program: Program, *, rank: int = 4, seed: int = 7) -> Program:
    """The program with adapters that were trained, as far as numbers tell."""
    done = step(program, INSERT, rank=rank).program
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_parameters(done).values():
        weight.data = torch.randn(weight.shape, generator=generator).to(weight) * 0.2
    return done


def outputs_of(program: Program) -> dict[str, list[Tensor]]:
    """Every output of every component, at two shapes."""
    shapes = sample_shapes(program, None, seed=0)
    return {
        name: [value for feed in feeds for value in run_outputs(program.components[name], feed)]
        for name, feeds in shapes.items()
    }


def are_equal(first: Mapping[str, list[Tensor]], second: Mapping[str, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def written(program: Program) -> Tensor:
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=2)
    return greedy(program, ids, mask, pixels, 5, frozenset())


@pytest.mark.parametrize("family", ["llava_llama", "llava_tied"])
def test_an_inserted_adapter_changes_no_bit_and_detached_leaves_the_graph_of_before(family: str) -> None:
    _, before = captured_toy(family)
    done = step(before, INSERT, rank=4)
    assert [site.name for site in done.applied] == [f"{VISION}/visual", f"{EMBEDDING}/text"]
    assert done.predicted == done.counted
    assert done.counted.parameters == -5 * int(before.components[DECODER].inputs[0].shape[2]) * 4
    assert are_equal(outputs_of(done.program), outputs_of(before))
    assert torch.equal(written(done.program), written(before))
    trained = adapted(before)
    assert not are_equal(outputs_of(trained), outputs_of(before))
    assert [detach_adapters(part.graph) for part in trained.components.values()] == [1, 1, 0]
    assert program_text(trained) == program_text(before)
    assert are_equal(outputs_of(trained), outputs_of(before))


def test_it_adds_its_formula_with_one_projection_for_both() -> None:
    before = eyes_and_words()
    done = adapted(before)
    up = get_at(done.components[VISION].graph, f"{CROSS_MODAL}.visual.up")
    assert up is get_at(done.components[EMBEDDING].graph, f"{CROSS_MODAL}.text.up")
    assert isinstance(up, nn.Linear)
    feeds = {
        VISION: torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)),
        EMBEDDING: torch.arange(9).view(3, 3),
    }
    for name, modality in ((VISION, "visual"), (EMBEDDING, "text")):
        with torch.no_grad():
            (x,), (found,) = (p.components[name].graph(feeds[name]) for p in (before, done))
            gate, down = (
                get_at(done.components[name].graph, f"{CROSS_MODAL}.{modality}.{w}") for w in ("gate", "down")
            )
            assert isinstance(gate, nn.Linear)
            assert isinstance(down, nn.Linear)
            hidden = nn.functional.silu(x @ gate.weight.T) * (x @ down.weight.T)
            assert float((found - x - hidden @ up.weight.T).abs().max()) < 1e-6


def test_at_real_size_there_are_five_million_parameters() -> None:
    assert counted(vicuna_7b(), INSERT, rank=256) == (2, 5 * 4096 * 256)


def test_both_modalities_train_one_projection_and_nothing_else_changes() -> None:
    _, program = captured_toy("llava_tied")
    done = step(program, INSERT, rank=4).program
    before = {f"{n}/{k}": checksum(v) for n, p in done.components.items() for k, v in p.graph.named_parameters()}
    whole = joined(done)
    trained, weights = trainable_copy(whole.program, lambda key: key.partition("/")[2].startswith("adapters."))
    assert set(weights) == {
        f"model/{CROSS_MODAL}.{name}.weight"
        for name in ("visual.gate", "visual.down", "visual.up", "text.gate", "text.down")
    }
    feed = taught("llava_tied")
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1)
    for _ in range(2):  # behind the first step U is no longer zero, and the others learn too
        optimizer.zero_grad()
        (scores,) = trained.components["model"].graph(*(feed[s.name] for s in trained.components["model"].inputs))
        (-scores[..., 0].sum()).backward()
        optimizer.step()
    assert all(weight.grad is not None and float(weight.grad.abs().sum()) > 0 for weight in weights.values())
    back = whole.separated(done, trained)
    after = {f"{n}/{k}": checksum(v) for n, p in back.components.items() for k, v in p.graph.named_parameters()}
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {key for key in after if "/adapters." in key}
    assert get_at(back.components[VISION].graph, f"{CROSS_MODAL}.visual.up") is get_at(
        back.components[EMBEDDING].graph, f"{CROSS_MODAL}.text.up"
    )


@pytest.mark.parametrize("family", ["llava_llama", "llava_tied"])
def test_the_text_part_folds_into_the_table_and_answers_stay(family: str) -> None:
    _, plain = captured_toy(family)
    before = adapted(plain)
    done = step(before, FOLD)
    assert [site.name for site in done.applied] == [f"{EMBEDDING}/text"]
    assert done.predicted == done.counted
    assert [refusal.name for refusal in done.refusals] == [f"{VISION}/visual"]
    assert [n for n in done.program.components[EMBEDDING].graph.graph.nodes if n.op == "call_function"] == []
    n_words, width = get_at(plain.components[EMBEDDING].graph, _table(plain)).weight.shape  # type: ignore[misc, union-attr]
    is_tied = family != "llava_llama"
    assert done.counted.parameters == 2 * width * 4 - (n_words * width if is_tied else 0)
    words = torch.arange(n_words)[None]
    with torch.no_grad():
        (wanted,), (found,) = (p.components[EMBEDDING].graph(words) for p in (before, done.program))
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())
    assert torch.equal(written(done.program), written(before))
    heads = [dict(p.components[DECODER].graph.named_parameters()) for p in (plain, done.program)]
    assert heads[0].keys() == heads[1].keys()
    assert all(heads[0][name] is heads[1][name] for name in heads[0])


def _table(program: Program) -> str:
    nodes = program.components[EMBEDDING].graph.graph.nodes
    return next(str(node.target) for node in nodes if node.op == "call_module")


def test_a_tied_head_is_said_to_keep_its_table() -> None:
    (site,) = make_pass(FOLD, {}).plan(adapted(eyes_and_words(is_tied=True)), Context()).sites
    assert site.summary == f"into the embedding; {DECODER} keeps the table that it shared, 512 bytes more"


def test_a_table_that_something_else_reads_stays_beside_the_new_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(16, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            found = self.words(x) * 2.0
            return found, torch.relu(found)

    parts = dict(eyes_and_words().components)
    parts[EMBEDDING] = component_of(Twice(), torch.arange(6).view(2, 3), name=EMBEDDING)
    before = adapted(program_from(parts, Assembly.GENERATIVE))
    done = step(before, FOLD)
    assert done.predicted == done.counted
    with torch.no_grad():
        wanted, found = (
            p.components[EMBEDDING].graph(torch.arange(15).view(3, 5)[:, :3]) for p in (before, done.program)
        )
    assert all(float((a - b).abs().max()) < 1e-6 for a, b in zip(wanted, found, strict=True))


def test_two_towers_share_it_in_front_of_their_projections() -> None:
    before = two_towers()
    done = step(before, INSERT, rank=2)
    assert done.counted.parameters == -5 * 8 * 2
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for name in ("image_encoder", "text_encoder"):
        first, second = (p.components[name].graph(x)[0] for p in (before, done.program))
        assert torch.equal(first, second)
    assert {refusal.reason.split(";")[0] for refusal in step(adapted(before), FOLD).refusals} == {
        "it is made of no embedding"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"modalities": ["sound"]}, "modalities holds 'sound'"),
        ({"init": "one"}, "init"),
    ],
)
def test_options_of_which_no_adapter_can_be_made_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        make_pass(INSERT, options)


def test_a_second_one_is_refused() -> None:
    refused = step(adapted(eyes_and_words()), INSERT, rank=2).refusals
    assert {refusal.reason for refusal in refused} == {"has a cross-modal adapter already"}


def test_what_is_no_sum_cannot_be_detached() -> None:
    program = clone_program(adapted(eyes_and_words()))
    graph = program.components[EMBEDDING].graph
    total = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    total.target = torch.ops.aten.mul.Tensor
    with pytest.raises(VlmoptError, match="is a value of an adapter alone"):
        detach_adapters(graph)


def test_a_gate_that_hardly_varies_gives_way_and_the_rest_folds_into_the_projector() -> None:
    before = adapted_program(eyes_and_words)
    graph = before.components[VISION].graph
    for name, factor in (("gate", 8.0), ("down", 40.0)):
        leaf = get_at(graph, f"{CROSS_MODAL}.visual.{name}")
        assert isinstance(leaf, nn.Linear)
        leaf.weight.data *= factor
    patches = 3.0 + 0.1 * torch.randn(64, 4, 6, generator=torch.Generator().manual_seed(0))
    value = gated_value(graph, "visual")
    assert value is not None
    with torch.no_grad():
        (rows,) = clone_program(eyes_and_words()).components[VISION].graph(patches)
    request = StatRequest(VISION, value.name, "rows")
    assert request in list(make_pass("replace-adapter-gate", {}).wants(before))
    context = Context(statistics={request: rows.reshape(-1, 8)})
    done = run_step(before, make_pass("replace-adapter-gate", {"tolerance": 0.05}), context, step=1)
    (site,) = done.applied
    assert done.predicted == done.counted
    assert "frozen, its gate changes the adapted value by" in site.summary
    folded = step(done.program, "fold-adapters")
    assert [found.component for found in folded.applied] == [VISION]
    assert program_text(folded.program)[VISION] == program_text(eyes_and_words())[VISION]
    with torch.no_grad():
        (x,), (wanted,), (frozen,), (found,) = (
            p.components[VISION].graph(patches) for p in (eyes_and_words(), before, done.program, folded.program)
        )
    assert float((found - frozen).abs().max()) < 1e-5 * float(frozen.abs().max())
    off, change = (float((a - b).norm() / wanted.norm()) for a, b in ((frozen, wanted), (x, wanted)))
    assert off < 0.05
    assert off < 0.5 * change  # better than to leave the adapter out
    certified = freeze_gate(graph, "visual", rows.reshape(-1, 8))
    assert off == pytest.approx(certified.deviation, rel=0.2)
    strict = run_step(before, make_pass("replace-adapter-gate", {"tolerance": 0.0}), context, step=1)
    assert strict.applied == ()
    assert "which is above the tolerance of 0 %" in strict.refusals[0].reason


@pytest.mark.parametrize("tolerance", [-0.1, 1.0])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: float) -> None:
    with pytest.raises(PassError, match="expected a share of the adapted value"):
        make_pass("replace-adapter-gate", {"tolerance": tolerance})
