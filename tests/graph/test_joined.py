"""A generative program joined to one graph: losses, margins and branches are those of the parts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from tests.capture.test_generative import captured_toy, prompts, quick
from vlmopt.core.program import Program
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION
from vlmopt.graph.branches import by_component, find_branches
from vlmopt.graph.joined import MODEL, N_KEPT, joined
from vlmopt.graph.modules import get_at, set_at
from vlmopt.graph.replay import Replay, run_outputs
from vlmopt.graph.skipping import skip
from vlmopt.rewrite.pipeline import clone_program

N_ANSWER = 3
HEAD = "lm_head"


def taught(family: str) -> dict[str, Tensor]:
    """Two prompts with an image each, one padded, and answers of three tokens behind them."""
    _, program = captured_toy(family)
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=2)
    assert pixels is not None
    ids[1, -2] = 7  # so that both differ behind their images as well
    labels = torch.full_like(ids, -100)
    labels[:, -N_ANSWER:] = ids[:, -N_ANSWER:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


@pytest.mark.parametrize("family", ["llava_llama", "llava_tied", "internvl"])
def test_scores_of_the_answer_are_those_of_the_model(family: str) -> None:
    model, program = captured_toy(family)
    feed = taught(family)
    (scores,) = run_outputs(joined(program).program.components[MODEL], feed)
    with torch.no_grad():
        given = {name: value for name, value in feed.items() if name != "labels"}
        logits = model(**given).logits.double()[:, -N_ANSWER - 1 : -1]
    wanted = feed["input_ids"][:, -N_ANSWER:, None]
    own = logits.gather(-1, wanted)
    assert torch.allclose(scores[:, -N_ANSWER:, :1].double(), own - logits.logsumexp(-1, keepdim=True), atol=1e-4)
    others = logits.scatter(-1, wanted, -torch.inf).amax(-1, keepdim=True)
    assert torch.allclose(scores[:, -N_ANSWER:, 1:].double(), own - others, atol=1e-4)
    assert not scores[:, :-N_ANSWER].any()


@pytest.mark.parametrize("family", quick("llava_llama", "gemma3", "blip_vqa"))
def test_branches_keep_their_names_and_their_owners(family: str) -> None:
    _, program = captured_toy(family)
    whole = joined(program)
    assert list(whole.program.components) == [MODEL]
    found = {f"{MODEL}/{branch.name}" for branch in find_branches(whole.program.components[MODEL].graph)}
    parts = program.components.items()
    own = {f"{name}/{branch.name}" for name, part in parts for branch in find_branches(part.graph)}
    assert own
    assert whole.joined_sites(own) == found
    assert whole.own_sites(found) == own


@pytest.mark.parametrize("family", ["llava_llama", "internvl"])
def test_skipping_in_the_joined_graph_is_skipping_in_the_parts(family: str) -> None:
    _, program = captured_toy(family)
    whole, feed = joined(program), taught(family)
    model = whole.program.components[MODEL]
    replay = Replay(model, find_branches(model.graph), next(iter(model.graph.graph.find_nodes(op="output"))).args[0][0])
    names = sorted(replay.branches)
    for chosen in ([names[0]], [names[-1]], names[::3]):
        cut = clone_program(program)
        for name, branches in by_component(whole.own_sites(f"{MODEL}/{one}" for one in chosen)).items():
            skip(cut, name, branches)
        (wanted,) = run_outputs(joined(cut).program.components[MODEL], feed)
        assert torch.allclose(replay.variants(feed, [frozenset(chosen)])[0], wanted, atol=1e-4)


def test_what_is_trained_in_the_joined_graph_comes_back_to_the_parts() -> None:
    from vlmopt.tuning.trainable import frozen, trainable_copy

    _, program = captured_toy("llava_llama")
    whole, feed = joined(program), taught("llava_llama")
    student, weights = trainable_copy(whole.program, lambda key: "multi_modal_projector" in key)
    assert weights
    scores: Tensor = student.components[MODEL].graph(*feed_in_order(student.components[MODEL], feed))[0]
    (-scores[..., 0].sum()).backward()
    with torch.no_grad():
        for weight in weights.values():
            assert weight.grad is not None
            assert weight.grad.abs().sum() > 0
            weight -= 0.1 * weight.grad
    back = whole.separated(program, frozen(student))
    (found,) = run_outputs(joined(back).program.components[MODEL], feed)
    (wanted,) = run_outputs(student.components[MODEL], feed)
    (before,) = run_outputs(whole.program.components[MODEL], feed)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, before, atol=1e-3)
    changed, old = (one.components[VISION].graph.state_dict() for one in (back, program))
    assert {key for key, value in changed.items() if not torch.equal(value, old[key])} == {
        key for key in old if "multi_modal_projector" in key
    }


def test_a_tied_embedding_stays_one_weight_when_it_is_trained() -> None:
    from vlmopt.tuning.trainable import frozen, trainable_copy

    _, program = captured_toy("llava_tied")
    whole = joined(program)
    student, weights = trainable_copy(whole.program, lambda key: True)
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.01
    back = whole.separated(program, frozen(student))
    (embedding,) = back.components[EMBEDDING].graph.parameters()
    assert any(weight is embedding for weight in back.components[DECODER].graph.parameters())
    (before,) = program.components[EMBEDDING].graph.parameters()
    assert torch.equal(embedding, before + 0.01)


def feed_in_order(component: object, feed: dict[str, Tensor]) -> list[Tensor]:
    from vlmopt.graph.replay import inputs_of

    return inputs_of(component, feed)  # type: ignore[arg-type]


def test_a_program_of_one_pass_stays_as_it_is() -> None:
    from vlmopt.graph.example import ResidualBlocks, program_of

    program = program_of(ResidualBlocks(), torch.ones(2, 8))
    whole = joined(program)
    assert whole.program is program
    assert whole.joined_sites(["model/a"]) == whole.own_sites(["model/a"]) == {"model/a"}


@pytest.mark.parametrize("family", ["llava_llama", "llava_tied", "gemma3"])
def test_the_head_reads_nothing_but_what_answers_are_read_from(family: str) -> None:
    _, program = captured_toy(family)
    whole, feed = joined(program).program.components[MODEL], taught(family)
    rows = list[int]()
    head = whole.graph.get_submodule([str(n.target) for n in whole.graph.graph.nodes if n.op == "call_module"][-1])
    with head.register_forward_hook(lambda _, __, out: rows.append(out[..., 0].numel())):
        run_outputs(whole, feed)
    assert rows == [2 * N_ANSWER]


def model_of(program: Program) -> GraphModule:
    return joined(program).program.components[MODEL].graph


def test_a_program_is_joined_once_and_anew_after_an_edit() -> None:
    program = clone_program(captured_toy("llava_llama")[1])
    first = model_of(program)
    assert model_of(program) is first
    renamed = replace(program.with_components(program.components), labels=("red", "blue"))
    assert model_of(renamed) is first
    assert joined(renamed).program.labels == ("red", "blue")
    decoder = program.components[DECODER].graph
    skip(program, DECODER, [find_branches(decoder)[0].name])
    cut = model_of(program)
    assert cut is not first
    assert len(cut.graph.nodes) < len(first.graph.nodes)
    set_at(program.components[DECODER].graph, HEAD, copy.deepcopy(get_at(decoder, HEAD)))
    assert model_of(program) is not cut


def test_only_the_last_few_joined_programs_are_kept() -> None:
    programs = [clone_program(captured_toy("llava_llama")[1]) for _ in range(N_KEPT + 1)]
    found = [model_of(program) for program in programs]
    assert model_of(programs[-1]) is found[-1]
    assert model_of(programs[0]) is not found[0]
