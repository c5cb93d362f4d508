"""Traversed layers: bit-equal until trained, their formula and counts, cached decoding, and gone without a trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.adapter_counts import GATES, counted, traversed
from tests.capture.test_generative import answer, captured_toy, prompts
from tests.passes.test_low_rank import batch, run, train
from vlmopt.core.contract import Context, StatRequest
from vlmopt.core.errors import PassError
from vlmopt.core.program import NO_WORD, Program
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.assembled import DECODER, opened, step
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import AttentionBlocks, program_of, without_branches
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.marks import marks_of
from vlmopt.graph.replay import run_outputs
from vlmopt.graph.traversal import find_traversals
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, program_text, run_step

Options = dict[str, Any]
FORMS: list[Options] = [{}, {"with_bias": False}, {"times": 3}, {"rank": 2}, {"rank": 2, "times": 2}]


def blocks(n: int = 2) -> Program:
    return program_of(AttentionBlocks(blocks=n).double(), torch.ones(2, 3, 8).double())


def applied(program: Program, name: str, options: Options, *, context: Context | None = None) -> StepResult:
    return run_step(program, make_pass(name, options), context or Context(), step=1)


def inserted(program: Program, **options: Any) -> StepResult:
    return applied(program, "insert-traversal", options)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_closed_gates_change_no_bit_and_dropped_ones_leave_no_trace(options: Options) -> None:
    before = blocks()
    done = inserted(before, **options)
    assert [site.name for site in done.applied] == ["model/layers.0", "model/layers.1"]
    assert done.predicted == done.counted
    assert torch.equal(run(done.program, batch()), run(before, batch()))
    train(done.program)
    assert float((run(done.program, batch()) - run(before, batch())).abs().max()) > 1e-3
    dropped = applied(done.program, "drop-traversal", {})
    assert len(dropped.applied) == 2
    assert dropped.predicted == dropped.counted
    assert dropped.text_after == program_text(before)
    assert adapter_parameters(dropped.program) == {}
    assert torch.equal(run(dropped.program, batch()), run(before, batch()))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("start", ["closed", "paper"])
def test_a_traversed_layer_computes_its_formula(times: int, start: str) -> None:
    done = inserted(blocks(1), times=times, start=start)
    weights = train(done.program)
    model = AttentionBlocks(blocks=1).double()
    with torch.no_grad():
        value = model.layers[0](batch())
        for number in range(1, times + 1):
            site = f"layers.0.traversal_{number}"
            w = 0.5 * torch.tanh(value @ weights[f"{site}.gate.weight"].T + weights[f"{site}.gate.bias"]) + 0.5
            w = w * weights.get(f"{site}.scale", torch.ones(1).double())
            value = (1 - w) * value + w * model.layers[0](value)
        wanted = model.head(value)
    assert float((run(done.program, batch()) - wanted).abs().max()) < 1e-12


def test_the_second_pass_has_its_low_rank_adapters_for_itself() -> None:
    done = inserted(blocks(1), start="paper", rank=2, alpha=4.0)
    weights = train(done.program)
    first, again = AttentionBlocks(blocks=1).double(), AttentionBlocks(blocks=1).double()
    site = "layers.0.traversal_1"
    with torch.no_grad():
        for path in [name for name, leaf in again.layers[0].named_modules() if isinstance(leaf, nn.Linear)]:
            down, up = (weights[f"{site}.low_rank.layers.0.{path}.{side}.weight"] for side in ("down", "up"))
            again.layers[0].get_submodule(path).weight += 2.0 * up @ down  # type: ignore[operator]
        h = first.layers[0](batch())
        w = 0.5 * torch.tanh(h @ weights[f"{site}.gate.weight"].T + weights[f"{site}.gate.bias"]) + 0.5
        wanted = first.head((1 - w) * h + w * again.layers[0](h))
    assert float((run(done.program, batch()) - wanted).abs().max()) < 1e-12


def test_the_papers_beginning_is_open_at_once() -> None:
    before = blocks()
    done = inserted(before, start="paper")
    assert float((run(done.program, batch()) - run(before, batch())).abs().max()) > 1e-3
    assert not any("scale" in name for name in adapter_parameters(done.program))


def test_a_closed_gate_can_be_trained_open() -> None:
    program = inserted(blocks()).program
    weights = adapter_parameters(program)
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    for n_steps in range(2):
        optimizer.zero_grad()
        program.components["model"].graph(batch())[0].square().mean().backward()
        scales = [weight for name, weight in weights.items() if name.endswith("scale")]
        gates = [weight for name, weight in weights.items() if name.endswith("gate.weight")]
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in scales)
        assert all(bool(weight.grad is not None and weight.grad.abs().sum() > 0) is (n_steps > 0) for weight in gates)
        optimizer.step()


def test_gates_of_two_layers_are_two_modules() -> None:
    program = inserted(blocks(), start="paper").program
    weights = adapter_parameters(program)
    first, second = (weights[f"model/adapters.layers.{i}.traversal_1.gate.weight"] for i in range(2))
    assert first is not second
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", ["1_8b", *(pytest.param(one, marks=pytest.mark.slow) for one in ("3_8b", "7b"))])
def test_gates_at_real_size_have_the_papers_count(size: str) -> None:
    count = {"1_8b": 49_152, "3_8b": 98_304, "7b": 131_072}[size]
    program, n_layers = traversed(size), GATES[size][0]
    assert counted(program, "insert-traversal", start="paper", with_bias=False) == (n_layers, count)
    assert counted(program, "insert-traversal", start="paper") == (n_layers, count + n_layers)


def test_layers_are_chosen_by_depth_by_name_and_by_importance() -> None:
    program = blocks(3)
    assert [site.name for site in inserted(program, n_layers=2).applied] == ["model/layers.0", "model/layers.1"]
    assert [site.name for site in inserted(program, layers=["*.2"]).applied] == ["model/layers.2"]
    importance = {"model/layers.1.attention": 0.2, "model/layers.1.ffn": 0.3, "model/layers.2.ffn": 0.4}
    done = applied(
        program, "insert-traversal", {"n_layers": 1, "by": "importance"}, context=Context(importance=importance)
    )
    assert [site.name for site in done.applied] == ["model/layers.1"]
    assert {refusal.reason for refusal in done.refusals} == {"not one of the most important 1"}
    with pytest.raises(PassError, match="there is no profile"):
        inserted(program, by="importance")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": 0}, "times is 0; expected 1 to 3"),
        ({"times": 4}, "times is 4; expected 1 to 3"),
        ({"rank": -1}, "rank is -1"),
        ({"alpha": float("nan")}, "expected a finite number"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"start": "opened"}, "start"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: Options, message: str) -> None:
    with pytest.raises(PassError, match=message):
        make_pass("insert-traversal", options)


def test_a_misspelled_layer_is_refused_with_the_closest_one() -> None:
    with pytest.raises(PassError, match=r"'layer.0' matches nothing.*did you mean 'layers.0'"):
        inserted(blocks(), layers=["layer.0"])


def test_a_layer_is_traversed_once() -> None:
    once = inserted(blocks(), n_layers=1).program
    again = inserted(once)
    assert [site.name for site in again.applied] == ["model/layers.1"]
    assert [refusal.reason for refusal in again.refusals] == ["is traversed already"]


def test_a_region_with_side_effects_is_refused_with_the_reason() -> None:
    program = blocks(1)
    graph = program.components["model"].graph
    relu = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.relu_.default
    plan = make_pass("insert-traversal", {}).plan(program, Context())
    assert plan.sites == ()
    assert "writes a value in place" in plan.refusals[0].reason
    relu.target = torch.tanh
    plan = make_pass("insert-traversal", {}).plan(program, Context())
    assert "which may have side effects" in plan.refusals[0].reason


def test_a_leaf_with_hooks_is_refused() -> None:
    program = blocks(1)
    leaf = program.components["model"].graph.get_submodule("layers.0.ffn.up")
    handle = leaf.register_forward_hook(lambda *_: None)
    (refusal,) = make_pass("insert-traversal", {}).plan(program, Context()).refusals
    handle.remove()
    assert "has hooks" in refusal.reason
    assert make_pass("insert-traversal", {}).plan(program, Context()).refusals == ()


def test_what_is_left_after_a_skip_is_traversed_and_its_marks_stay_in_order() -> None:
    before = without_branches(blocks(), "layers.0.attention", "layers.1.attention", "layers.1.ffn")
    done = inserted(before)
    assert [site.name for site in done.applied] == ["model/layers.0"]
    graph = done.program.components["model"].graph
    (traversal,) = find_traversals(graph)
    assert [mark.branch for mark in marks_of(traversal.result)] == ["layers.1.attention", "layers.1.ffn"]
    adapted = applied(done.program, "insert-skip-adapter", {"rank": 2, "layers": ["layers.1"]})
    assert len(adapted.applied) == 1
    dropped = applied(done.program, "drop-traversal", {})
    assert dropped.text_after == program_text(before)
    original = dropped.program.components["model"].graph
    marks = [mark.branch for node in original.graph.nodes for mark in marks_of(node)]
    assert marks == ["layers.0.attention", "layers.1.attention", "layers.1.ffn"]


@pytest.mark.parametrize("n_apart", [0, 1])
def test_adapters_beside_layers_that_are_traversed_fold_into_both_passes(n_apart: int) -> None:
    _, program = captured_toy("llava_llama")
    program = applied(program, "canonicalize", {}).program
    adapted = applied(program, "insert-low-rank-adapter", {"rank": 2, "modules": (f"{DECODER}/*proj",)}).program
    both = inserted(adapted, start="paper").program
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapter_parameters(both).items():
        if "low_rank" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    graph = both.components[DECODER].graph
    again = next(n for n in graph.graph.nodes if n.name == "model_language_model_layers_1_self_attn_q_proj_1")
    if n_apart:  # of the second pass alone
        change = next(user for user in again.users if user.target is torch.ops.aten.add.Tensor).all_input_nodes[1]
        change.args = (change.args[0], 3.0)
        graph.recompile()
    done = applied(both, "fold-adapters", {})
    assert done.predicted == done.counted
    assert len(done.applied) == 21 - n_apart
    assert sum(site.summary == "chains beside it: 1, 2 calls" for site in done.applied) == 21 - n_apart
    assert len([one for one in done.refusals if "would have to stay" in one.reason]) == 2 * n_apart
    given = prompts(program, n_images=(1,), n_padding=0)
    with torch.no_grad():
        found, wanted = (opened(each, *given) for each in (done.program, both))
        logits = [
            step(each, o.inputs_embeds, given[1], o.cache, input_ids=given[0])[0]
            for each, o in ((done.program, found), (both, wanted))
        ]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5
    if not n_apart:
        assert done.text_after == program_text(inserted(program, start="paper").program)
        assert program_text(applied(both, "drop-traversal", {}).program) == program_text(adapted)


@pytest.mark.parametrize("n_kept", [1, 2])
def test_passes_behind_the_last_open_gate_go_and_the_rest_is_a_layer_traversed_less_often(n_kept: int) -> None:
    _, program = captured_toy("llava_llama")
    program = applied(program, "canonicalize", {}).program
    layers = (f"{DECODER}/*layers.1",)
    often = inserted(program, times=3, layers=layers).program
    pass_ = make_pass("drop-traversal", {"below": 0.2})
    means = [0.3 if number <= n_kept else 0.1 for number in (1, 2, 3)]
    known = {one: torch.tensor([mean]) for one, mean in zip(pass_.wants(often), means, strict=True)}
    done = run_step(often, pass_, Context(statistics=known), step=2)
    assert [site.summary for site in done.applied] == [f"passes dropped: {3 - n_kept}"]
    assert done.predicted == done.counted
    less = inserted(program, times=n_kept, layers=layers).program
    assert done.text_after == program_text(less)
    last = run_step(often, pass_, Context(statistics={**known, list(known)[-1]: torch.tensor([0.9])}), step=2)
    assert [refusal.reason for refusal in last.refusals] == ["its mean gate is 0.9, and `below` is 0.2"]


def test_gates_below_the_threshold_are_dropped() -> None:
    program = inserted(blocks(), times=2).program
    pass_ = make_pass("drop-traversal", {"below": 0.1})
    requests = list(pass_.wants(program))
    assert len(requests) == 4
    measured = Context(statistics=dict(zip(requests, torch.tensor([[0.05], [-0.02], [0.05], [-0.2]]), strict=True)))
    done = run_step(program, pass_, measured, step=2)
    assert [site.name for site in done.applied] == ["model/layers.0"]
    assert [refusal.reason for refusal in done.refusals] == ["its mean gate is -0.2, and `below` is 0.1"]
    unmeasured = run_step(program, pass_, Context(), step=2)
    assert unmeasured.applied == ()
    assert "was not yet" in unmeasured.refusals[0].reason
    assert list(make_pass("drop-traversal", {}).wants(program)) == []
    assert all(isinstance(request, StatRequest) for request in requests)


def asked(program: Program) -> tuple[Tensor, Tensor, Tensor | None]:
    """A prompt with an image and one without, where the model takes such, the first one padded."""
    assert program.generation is not None
    n_images = (1, 1) if program.generation.image_token == NO_WORD else (1, 0)
    return prompts(program, n_images=n_images, n_padding=2)


FAMILIES = ("llava_llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("blip_vqa", "gemma3")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_traversed_decoder_answers_from_its_cache_as_it_does_without(family: str) -> None:
    _, before = captured_toy(family)
    before = applied(before, "canonicalize", {}).program
    ids, mask, pixels = asked(before)
    closed = inserted(before).program
    with torch.no_grad():
        found, wanted = (answer(one, ids, mask, pixels, is_cached=True) for one in (closed, before))
    assert torch.equal(found[1], wanted[1])
    opened_ = inserted(before, start="paper", times=2).program
    assert all(name.startswith(f"{DECODER}/") for name in adapter_parameters(opened_))
    ids, mask, pixels = prompts(before, n_images=(1, 1), n_padding=2)
    with torch.no_grad():
        tokens, logits = answer(opened_, ids, mask, pixels, is_cached=True)
    wanted_scores = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    n_new = tokens.shape[1]
    whole, seen = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    labels = torch.full_like(whole, -100)
    labels[:, -n_new:] = tokens
    assert pixels is not None
    feed = {"input_ids": whole, "attention_mask": seen, "labels": labels, "pixel_values": pixels}
    (scores,) = run_outputs(joined(opened_).program.components[MODEL], feed)
    (untraversed,) = run_outputs(joined(before).program.components[MODEL], feed)
    assert torch.allclose(scores[:, -n_new:, 0], wanted_scores, atol=1e-4)
    assert bool((scores[:, -n_new:, 1] > 0).all())  # greedy decoding writes these tokens
    assert not torch.allclose(untraversed[:, -n_new:, 0], wanted_scores, atol=1e-2)


def test_the_cache_keeps_the_first_pass_and_a_step_is_one_plain_pass() -> None:
    _, before = captured_toy("llava_llama")
    after = inserted(applied(before, "canonicalize", {}).program, start="paper", n_layers=1).program
    ids, mask, pixels = asked(before)
    with torch.no_grad():
        first = opened(before, ids, mask, pixels)
        runs = [step(one, first.inputs_embeds, mask, first.cache, input_ids=ids) for one in (before, after)]
        for side in ("key", "value"):
            kept = [cache[f"past_key_values_0_{side}"] for _, cache in runs]
            assert torch.equal(*kept)
        assert not torch.allclose(runs[0][0], runs[1][0], atol=1e-3)
        cache = runs[0][1]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        embeds = first.inputs_embeds[:, :1]
        ids = torch.cat([ids, ids[:, :1]], 1)
        plain, same = (step(one, embeds, mask, cache, input_ids=ids)[0] for one in (before, after))
    assert torch.equal(plain, same)


def test_a_first_pass_may_lose_its_attention_with_its_cache() -> None:
    _, before = captured_toy("llava_llama")
    traversed = inserted(applied(before, "canonicalize", {}).program, start="paper").program
    attention = "model.language_model.layers.0.self_attn"
    done = applied(traversed, "skip-branches", {"branches": [f"{DECODER}/{attention}"]})
    assert len(done.applied) == 1
    names = [spec.name for spec in done.program.components[DECODER].inputs]
    assert "past_key_values_0_key" not in names
    ids, mask, pixels = asked(before)
    with torch.no_grad():
        _, logits = answer(done.program, ids, mask, pixels, is_cached=True)
    assert bool(torch.isfinite(logits).all())


def test_an_encoder_is_traversed_where_it_is_named() -> None:
    _, before = captured_toy("llava_llama")
    done = inserted(applied(before, "canonicalize", {}).program, layers=["vision_encoder/*.0"], start="paper")
    assert [site.component for site in done.applied] == ["vision_encoder"]
    (traversal,) = find_traversals(done.program.components["vision_encoder"].graph)
    assert traversal.choice is None
    whole = joined(done.program)
    names = {branch.name for branch in find_branches(whole.program.components[MODEL].graph)}
    assert any(name.endswith(".2") for name in names)


def test_a_traversal_may_be_trained_in_the_joined_program() -> None:
    program = inserted(applied(captured_toy("llava_llama")[1], "canonicalize", {}).program).program
    whole = joined(program)
    assert whole.own_path(f"{MODEL}/adapters.model.language_model.layers.0.traversal_1.gate.weight") == (
        f"{DECODER}/adapters.model.language_model.layers.0.traversal_1.gate.weight"
    )
    component = whole.program.components[MODEL]
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=0)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    feed = partial(dict, input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels)()
    values = [feed[spec.name] for spec in component.inputs]
    component.graph(*values)[0][..., 0].sum().backward()
    scales = {path: weight for path, weight in component.graph.named_parameters() if path.endswith(".scale")}
    assert len(scales) == 3
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in scales.values())
