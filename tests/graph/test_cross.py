"""Decoders that attend across, and prompts behind an image: the joined view, cuts, and the numbers of a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.capture.test_generative import answer, captured_toy, prompts
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import Component, Program
from vlmopt.graph.assembled import DECODER, VISION, embedded, opened, step
from vlmopt.graph.branches import BranchKind, by_component, find_branches
from vlmopt.graph.costing import program_cost
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.numbering import with_numbered_cache
from vlmopt.graph.replay import run_outputs
from vlmopt.graph.skipping import skip
from vlmopt.rewrite.pipeline import clone_program

FAMILIES = ("git", "blip_caption", "blip_vqa", pytest.param("florence2", marks=pytest.mark.slow))
ACROSS = FAMILIES[1:]
N_ANSWER = 3


def named(program: Program, kind: BranchKind) -> list[str]:
    return [branch.name for branch in find_branches(program.components[DECODER].graph) if branch.kind is kind]


def cut(family: str, *names: str) -> Program:
    program = clone_program(captured_toy(family)[1])
    skip(program, DECODER, names)
    return program


def taught(program: Program) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor], Tensor]:
    """Rows of prompts and answers, one padded, for the joined program; the prompts alone, and the answers."""
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=0)
    assert pixels is not None
    ids = torch.stack([torch.cat([torch.tensor([5]), ids[0]]), torch.cat([ids[1], torch.tensor([7])])])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    answers = torch.tensor([[11, 12, 13], [21, 22, 23]])
    labels = torch.cat([torch.full_like(ids, -100), answers], 1)
    feed = {
        "input_ids": torch.cat([ids, answers], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(answers)], 1),
        "labels": labels,
        "pixel_values": pixels,
    }
    return feed, (ids, mask, pixels), answers


def told(program: Program, given: tuple[Tensor, Tensor, Tensor], answers: Tensor) -> Tensor:
    """Log-probabilities of the answers [B, N_ANSWER], token by token with the cache."""
    found = []
    with torch.no_grad():
        first = opened(program, *given)
        ids, mask, embeds, cache = first.input_ids, first.attention_mask, first.inputs_embeds, first.cache
        for token in answers.split(1, 1):
            logits, cache = step(program, embeds, mask, cache, input_ids=ids)
            found.append(logits[:, -1].log_softmax(-1).gather(-1, token))
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            embeds = embedded(program, token)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_joined_view_tells_what_is_told_token_by_token(family: str) -> None:
    _, program = captured_toy(family)
    feed, given, answers = taught(program)
    (scores,) = run_outputs(joined(program).program.components[MODEL], feed)
    assert torch.allclose(scores[:, -N_ANSWER:, 0], told(program, given, answers), atol=1e-4)
    assert not scores[:, :-N_ANSWER].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_of_the_joined_view_is_one_of_the_parts(family: str) -> None:
    _, program = captured_toy(family)
    whole = joined(program)
    feed, given, answers = taught(program)
    names = sorted(branch.name for branch in find_branches(whole.program.components[MODEL].graph))[::2]
    one, parts = clone_program(whole.program), clone_program(program)
    skip(one, MODEL, names)
    for name, branches in by_component(whole.own_sites(f"{MODEL}/{name}" for name in names)).items():
        skip(parts, name, branches)
    (found,) = run_outputs(one.components[MODEL], feed)
    wanted = told(parts, given, answers)
    assert torch.allclose(found[:, -N_ANSWER:, 0], wanted, atol=1e-4)
    assert not torch.allclose(wanted, told(program, given, answers), atol=1e-2)


@pytest.mark.parametrize("family", ["blip_caption", "blip_vqa"])
@pytest.mark.parametrize(
    ("own", "across"), [((), (0,)), ((1,), ()), ((0,), (1, 2)), ((0, 1, 2), (2,)), ((), (0, 1, 2))]
)
def test_each_attention_goes_with_its_own_entry(family: str, own: tuple[int, ...], across: tuple[int, ...]) -> None:
    _, program = captured_toy(family)
    kinds = {BranchKind.ATTENTION: own, BranchKind.CROSS_ATTENTION: across}
    names = [named(program, kind)[layer] for kind, layers in kinds.items() for layer in layers]
    found = cut(family, *names)
    kept = [layer for layer in range(3) if layer not in own], [layer for layer in range(3) if layer not in across]
    assert entries(found.components[DECODER], is_cross=False) == kept[0]
    assert entries(found.components[DECODER], is_cross=True) == kept[1]
    assert found.generation is not None
    source = found.components[str(found.generation.cross_source)]
    made = [spec.name for spec in source.outputs]
    assert made == [f"present_{n}_encoder_{side}" for n in (kept[1] or [0]) for side in ("key", "value")]
    given = prompts(found, n_images=(1, 1), n_padding=2)
    with torch.no_grad():
        (tokens, logits), (again, whole) = (answer(found, *given, is_cached=is_cached) for is_cached in (True, False))
    assert torch.equal(tokens, again)
    assert torch.allclose(logits, whole, atol=1e-4)
    numbered = with_numbered_cache(found)
    assert numbered.generation is not None
    assert numbered.generation.cache_layers == tuple(kept[0])
    assert numbered.generation.cross_layers == tuple(kept[1] or [0])
    assert entries(numbered.components[DECODER], is_cross=False) == list(range(len(kept[0])))
    assert entries(numbered.components[DECODER], is_cross=True) == list(range(len(kept[1])))
    with torch.no_grad():
        assert torch.equal(answer(numbered, *given, is_cached=True)[1], logits)


def entries(decoder: Component, *, is_cross: bool) -> list[int]:
    layers = (spec.cache_layer for spec in decoder.inputs if spec.is_cross is is_cross)
    return [layer for layer in dict.fromkeys(layers) if layer is not None]


@pytest.mark.parametrize("family", ["blip_caption"])
def test_keys_of_an_image_are_no_bytes_of_a_token(family: str) -> None:
    _, program = captured_toy(family)
    of_a_layer = 2 * 4 * 8 * 4  # keys and values, heads, width of a head, bytes
    assert program_cost(program).kv_cache_bytes_per_token == 3 * of_a_layer
    first = named(program, BranchKind.CROSS_ATTENTION)[0]
    less = program_cost(program).parameters - program_cost(cut(family, first)).parameters
    assert less == 4 * (32 * 32 + 32) + 2 * 32  # queries, keys, values and output, and the norm behind them


def test_one_image_belongs_to_every_prompt() -> None:
    _, program = captured_toy("blip_caption")
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=0)
    assert pixels is not None
    for images, n in ((None, 0), (pixels[:1], 1)):
        with pytest.raises(VlmoptError, match=f"the prompts: {n} images for 2; expected one image for every prompt"):
            opened(program, ids, mask, images)


def test_padding_of_a_longer_question_changes_no_answer() -> None:
    _, program = captured_toy("blip_vqa")
    _, (ids, mask, pixels), answers = taught(program)
    together = told(program, (ids, mask, pixels), answers)
    lone = told(program, (ids[:1, 1:], mask[:1, 1:], pixels[:1]), answers[:1])
    assert torch.allclose(together[:1], lone, atol=1e-5)
    deaf = replace(program, components={**program.components, DECODER: without_mask(program.components[DECODER])})
    assert not torch.allclose(told(deaf, (ids, mask, pixels), answers)[:1], lone, atol=1e-3)


def without_mask(decoder: Component) -> Component:
    """The decoder with all of what it attends to taken for filled."""

    class Deaf(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            place = [spec.name for spec in decoder.inputs].index("encoder_attention_mask")
            seen = [torch.ones_like(value) if i == place else value for i, value in enumerate(inputs)]
            found: tuple[Tensor, ...] = decoder.graph(*seen)
            return found

    return replace(decoder, graph=Deaf())  # type: ignore[arg-type]


def test_an_image_in_front_is_seen_whole_and_its_text_only_backwards() -> None:
    _, program = captured_toy("git")
    ids, mask, pixels = prompts(program, n_images=(1,), n_padding=0)
    other = ids.clone()
    other[:, -1] = 9
    with torch.no_grad():
        found = []
        for tokens in (ids, other):
            first = opened(program, tokens, mask, pixels)
            found.append(step(program, first.inputs_embeds, mask, first.cache, input_ids=tokens)[0])
    assert torch.equal(found[0][:, :-1], found[1][:, :-1])
    assert not torch.equal(found[0][:, -1], found[1][:, -1])
    first = opened(program, ids, mask, pixels)
    assert first.inputs_embeds[:, :17].equal(program.components[VISION].graph(pixels)[0])
