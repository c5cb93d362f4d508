"""Branches out of a decoder: the cache loses the entry of every attention that goes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.capture.test_generative import CASES, answer, captured_toy, prompts
from vlmopt.core.program import Program
from vlmopt.graph.assembled import DECODER
from vlmopt.graph.branches import find_branches
from vlmopt.graph.costing import component_cost
from vlmopt.graph.regions import is_read_behind
from vlmopt.graph.skipping import skip
from vlmopt.graph.stored import read_program, write_program
from vlmopt.rewrite.pipeline import clone_program

ATTENTION, FFN = "model.language_model.layers.{}.self_attn", "model.language_model.layers.{}.mlp"
CUTS = {
    "the first attention": (ATTENTION.format(0),),
    "an attention and an FFN": (ATTENTION.format(1), FFN.format(0)),
    "every attention": tuple(ATTENTION.format(layer) for layer in range(3)),
}


def cut(family: str, names: tuple[str, ...]) -> Program:
    program = clone_program(captured_toy(family)[1])
    skip(program, DECODER, names)
    return program


@pytest.mark.parametrize("names", CUTS.values(), ids=CUTS)
def test_an_attention_goes_with_its_entry_in_the_cache(names: tuple[str, ...]) -> None:
    decoder = cut("llava_llama", names).components[DECODER]
    kept = [layer for layer in range(3) if ATTENTION.format(layer) not in names]
    sides = [f"{layer}_{side}" for layer in kept for side in ("key", "value")]
    assert [spec.name for spec in decoder.outputs] == ["logits", *(f"present_{side}" for side in sides)]
    assert [spec.name for spec in decoder.inputs[3:]] == [f"past_key_values_{side}" for side in sides]
    assert not {branch.name for branch in find_branches(decoder.graph)} & set(names)


@pytest.mark.parametrize("family", ["llava_llama", "internvl"])
@pytest.mark.parametrize("names", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("case", CASES)
def test_answers_with_and_without_the_cache_are_the_same(family: str, names: tuple[str, ...], case: str) -> None:
    program = cut(family, names)
    n_images, n_padding = CASES[case]
    ids, mask, pixels = prompts(program, n_images=n_images, n_padding=n_padding)
    with torch.no_grad():
        cached, whole = (answer(program, ids, mask, pixels, is_cached=is_cached) for is_cached in (True, False))
        before, _ = answer(captured_toy(family)[1], ids, mask, pixels, is_cached=True)
    assert torch.equal(cached[0], whole[0])
    assert torch.allclose(cached[1], whole[1], atol=1e-4)
    assert not torch.equal(cached[0], before)  # else nothing was cut


def test_every_branch_of_a_decoder_can_be_skipped_and_costs_what_it_saves() -> None:
    _, program = captured_toy("llava_llama")
    whole = component_cost(program.components[DECODER], program.dims)
    branches = find_branches(program.components[DECODER].graph)
    assert len(branches) == 6
    saved = set()
    for branch in branches:
        assert not is_read_behind(program.components[DECODER], branch)
        left = component_cost(cut("llava_llama", (branch.name,)).components[DECODER], program.dims)
        saved.add((branch.kind, whole.macs - left.macs, whole.parameters - left.parameters))
    assert len(saved) == 2  # all attentions alike, and all FFNs


def test_a_cut_decoder_is_stored_and_read_back(tmp_path: Path) -> None:
    program = cut("llava_llama", CUTS["the first attention"])
    write_program(program, tmp_path, name="cut")
    again = read_program(tmp_path, name="cut")
    ids, mask, pixels = prompts(program, n_images=(1,), n_padding=0)
    with torch.no_grad():
        found, wanted = (answer(one, ids, mask, pixels, is_cached=True) for one in (again, program))
    assert torch.equal(found[1], wanted[1])
    assert component_cost(again.components[DECODER], again.dims) == component_cost(
        program.components[DECODER], program.dims
    )
