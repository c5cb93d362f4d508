"""Phantom dimensions: bit-equal at eta 0, the paper's formula and counts, right in cached decoding, removed without a
trace, in ONNX as in the program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import toys
from tests.benchmarks.adapter_counts import PHANTOMS, attentive, counted
from tests.passes.test_low_rank import run
from vlmopt.capture import capture
from vlmopt.core.contract import Context
from vlmopt.core.errors import PassError, VlmoptError
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.graph.adapters import adapter_parameters
from vlmopt.graph.assembled import DECODER, embedded, opened, step
from vlmopt.graph.example import GroupedHeads, program_of
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.phantom_removal import find_phantoms, without_phantoms
from vlmopt.graph.replay import run_outputs
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, program_text, run_step
from vlmopt.verify.parity import check_file
from vlmopt.workflow.samples import sample_shapes

FORMS: list[dict[str, Any]] = [{}, {"key_heads": 4}, {"is_fused": False}, {"is_fused": False, "key_heads": 1}]


def made(program: Program, name: str, options: dict[str, Any] | None = None) -> StepResult:
    return run_step(program, make_pass(name, options or {}), Context(), step=1)


def heads(**form: Any) -> Program:
    return program_of(GroupedHeads(**form).double(), torch.ones(2, 3, 8, dtype=torch.float64))


def batch() -> Tensor:
    return torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_at_eta_zero_no_bit_changes_and_removed_nothing_is_left(form: dict[str, Any]) -> None:
    before = heads(**form)
    done = made(before, "insert-phantom", {"eta": 0.0})
    assert len(done.applied) == 2
    assert done.predicted == done.counted
    assert torch.equal(run(done.program, batch()), run(before, batch()))
    gone = made(done.program, "drop-phantom")
    assert gone.text_after == program_text(before)
    assert gone.predicted == gone.counted
    assert adapter_parameters(gone.program) == {}


def across(u: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """y of u [B, H, N, d] and of its token 0, head by head."""
    q, k, v, o = (weights[f"{name}.{leaf}.weight"] for leaf in ("query", "key", "value", "out"))
    found = torch.zeros_like(u)
    for b in range(u.shape[0]):
        source = u[b, :, 0]
        for n in range(u.shape[2]):
            wanted, keys, values = F.gelu(u[b, :, n] @ q.T), F.gelu(source @ k.T), F.gelu(source @ v.T)
            mixed = (wanted @ keys.T / u.shape[-1] ** 0.5).softmax(-1) @ values
            found[b, :, n] = F.gelu(mixed @ o.T)
    return found


class ByHand(nn.Module):
    """One block as the paper writes it, scores of doubled heads and bare exponentials."""

    def __init__(self, block: Any, weights: dict[str, Tensor], eta: float) -> None:
        super().__init__()
        self.block, self.weights, self.eta = block, weights, eta

    def forward(self, x: Tensor) -> Tensor:
        block, w = self.block, self.weights
        n = block.norm(x)
        names = ("query", "key", "value")
        q, k, v = (block.attention[m](n).unflatten(-1, (-1, block.width)).transpose(1, 2) for m in names)
        more = {m: self.eta * across(t, w, m) for m, t in zip(names, (q, k, v), strict=True)}
        wide_q, wide_k = torch.cat([q, more["query"]], -1), torch.cat([k, more["key"]], -1)
        wide_k, v, other = (t.repeat_interleave(block.n_groups, 1) for t in (wide_k, v, v + more["value"]))
        scores = wide_q @ wide_k.transpose(-2, -1) / block.width**0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        o1, o2 = weights @ v, weights @ other
        first = (o1 @ w["weigh_plain.weight"].T + w["weigh_plain.bias"]).exp()
        second = (o2 @ w["weigh_phantom.weight"].T + w["weigh_phantom.bias"]).exp()
        mixed = (first * o1 + second * o2) / (first + second)
        total: Tensor = x + block.attention["out"](mixed.transpose(1, 2).flatten(2))
        return total


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_trained_one_computes_the_papers_formula(form: dict[str, Any]) -> None:
    done = made(heads(blocks=1, **form), "insert-phantom", {"eta": 0.7, "learn_eta": False})
    generator = torch.Generator().manual_seed(7)
    weights: dict[str, Tensor] = {}
    for name, parameter in adapter_parameters(done.program).items():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        weights[name.partition(".phantom.")[2]] = parameter.data
    model = GroupedHeads(blocks=1, **form).double()
    with torch.no_grad():
        wanted = model.head(ByHand(model.layers[0], weights, 0.7)(batch()))
    found = run(done.program, batch())
    assert float((found - run(heads(blocks=1, **form), batch())).abs().max()) > 1e-2
    assert float((found - wanted).abs().max()) < 1e-12


def test_large_weights_of_the_average_do_not_overflow() -> None:
    done = made(heads(), "insert-phantom", {"eta": 0.1})
    for name, parameter in adapter_parameters(done.program).items():
        if "weigh_" in name:
            parameter.data = torch.full_like(parameter, 1e4)
    assert bool(torch.isfinite(run(done.program, batch())).all())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0_5b", "7b"])
def test_at_real_size_there_are_as_many_parameters_as_published(size: str) -> None:
    width, _, _, n_layers, published = PHANTOMS[size]
    program = attentive(size)
    n_sites, found = counted(program, "insert-phantom", learn_eta=False)
    assert n_sites == n_layers
    assert found == 12 * width**2 * n_layers + 2 * (width + 1) * n_layers
    assert abs(found - published) < 0.05 * published
    assert counted(program, "insert-phantom") == (n_layers, found + n_layers)


def test_what_has_no_heads_and_what_has_a_phantom_dimension_is_refused() -> None:
    once = made(heads(), "insert-phantom", {"branches": ["*layers.0.*"]})
    assert [one.reason for one in once.refusals] == ["not named in `branches`"]
    again = made(once.program, "insert-phantom")
    assert len(again.applied) == 1
    assert [one.reason for one in again.refusals] == ["has a phantom dimension already"]
    with pytest.raises(PassError, match="expected a finite number"):
        make_pass("insert-phantom", {"eta": float("nan")})
    with pytest.raises(PassError, match="matches nothing"):
        made(heads(), "insert-phantom", {"branches": ["layers.0.attend"]})


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Program]:
    """A toy LLaVA, and the same with phantom dimensions that count, in its decoder."""
    folder = tmp_path_factory.mktemp("model")
    toys.make("llava_llama").save_pretrained(folder)  # type: ignore[operator]
    program = made(capture(str(folder)), "canonicalize").program
    options = {"eta": 0.5, "branches": [f"{DECODER}/*"]}
    return program, made(program, "insert-phantom", options).program


def prompts(program: Program, *, has_image: bool, n_rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prompts, the second one padded on the left."""
    assert program.generation is not None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (n_rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    if not has_image:
        return ids, mask, None
    places = torch.full((n_rows, program.generation.image_tokens), program.generation.image_token)
    pixels = torch.randn(n_rows, 3, 32, 32, generator=generator)
    seen = torch.cat([mask[:, :4], torch.ones_like(places), mask[:, 4:]], 1)
    return torch.cat([ids[:, :4], places, ids[:, 4:]], 1), seen, pixels


def logits(program: Program, given: tuple[Tensor, Tensor, Tensor | None], *, is_cached: bool) -> tuple[Tensor, Tensor]:
    """Logits of five greedy steps [5, B, V], and the tokens chosen [5, B]."""
    ids, mask, pixels = given
    found, tokens = [], []
    with torch.no_grad():
        opening = opened(program, ids, mask, pixels)
        last, cache = step(program, opening.inputs_embeds, mask, opening.cache, input_ids=ids)
        while True:
            found.append(last[:, -1])
            tokens.append(last[:, -1].argmax(-1))
            if len(found) == 5:
                return torch.stack(found), torch.stack(tokens)
            ids = torch.cat([ids, tokens[-1][:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if is_cached:
                last, cache = step(program, embedded(program, ids[:, -1:]), mask, cache, input_ids=ids)
            else:
                opening = opened(program, ids, mask, pixels)
                last, _ = step(program, opening.inputs_embeds, mask, opening.cache, input_ids=ids)


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("has_image", [True, False])
def test_cached_decoding_is_uncached_decoding(
    decoders: tuple[Program, Program], n_rows: int, *, has_image: bool
) -> None:
    plain, phantom = decoders
    given = prompts(phantom, has_image=has_image, n_rows=n_rows)
    cached, tokens = logits(phantom, given, is_cached=True)
    whole, others = logits(phantom, given, is_cached=False)
    assert torch.equal(tokens, others)
    assert float((cached - whole).abs().max()) < 1e-5
    assert float((cached - logits(plain, given, is_cached=True)[0]).abs().max()) > 1e-2


def test_padding_is_not_token_0(decoders: tuple[Program, Program]) -> None:
    _, phantom = decoders
    ids, mask, _ = prompts(phantom, has_image=False, n_rows=2)
    alone, _ = logits(phantom, (ids[1:, 2:], mask[1:, 2:], None), is_cached=True)
    padded, _ = logits(phantom, (ids, mask, None), is_cached=True)
    assert float((padded[:, 1] - alone[:, 0]).abs().max()) < 1e-5


def test_a_decoder_at_eta_zero_and_without_the_modules_is_the_original(decoders: tuple[Program, Program]) -> None:
    plain, phantom = decoders
    zero = made(plain, "insert-phantom", {"eta": 0.0, "branches": [f"{DECODER}/*"]}).program
    given = prompts(plain, has_image=True, n_rows=2)
    assert torch.equal(logits(zero, given, is_cached=True)[0], logits(plain, given, is_cached=True)[0])
    gone = made(phantom, "drop-phantom")
    assert gone.text_after == program_text(plain)
    assert gone.program.components[DECODER].inputs == plain.components[DECODER].inputs
    assert program_text(without_phantoms(phantom)) == program_text(plain)
    assert len(find_phantoms(phantom.components[DECODER].graph)) == 3  # the copy was edited, not the program


def test_skipping_an_attention_takes_its_phantom_dimension_along(decoders: tuple[Program, Program]) -> None:
    _, phantom = decoders
    cut = made(phantom, "skip-branches", {"branches": ["*layers.1.self_attn"]}).program
    names = [spec.name for spec in cut.components[DECODER].inputs]
    assert "past_key_values_1_query" not in names
    assert {"past_key_values_0_query", "past_key_values_2_query"} <= set(names)
    assert len(find_phantoms(cut.components[DECODER].graph)) == 2


def test_training_reaches_every_weight(decoders: tuple[Program, Program]) -> None:
    _, phantom = decoders
    whole = joined(phantom).program
    ids, mask, pixels = prompts(phantom, has_image=True, n_rows=2)
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 2, ids, -100)
    weights = adapter_parameters(whole)
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    (-whole.components[MODEL].graph(ids, mask, labels, pixels)[0][..., 0].sum()).backward()
    assert len(weights) == 3 * (12 + 4 + 1)
    assert all(weight.grad is not None and bool(torch.isfinite(weight.grad).all()) for weight in weights.values())
    assert all(float(weight.grad.abs().max()) > 0 for weight in weights.values() if weight.grad is not None)


FIRST = 7


@pytest.fixture(scope="module")
def frozen(decoders: tuple[Program, Program]) -> StepResult:
    return made(decoders[1], "freeze-first-token", {"token": FIRST})


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("has_image", [True, False])
def test_constants_of_the_first_token_are_what_the_phantom_dimension_finds_in_the_prompt(
    decoders: tuple[Program, Program], frozen: StepResult, n_rows: int, *, has_image: bool
) -> None:
    _, phantom = decoders
    ids, mask, pixels = prompts(phantom, has_image=has_image, n_rows=n_rows)
    ids.scatter_(1, mask.argmax(1, keepdim=True), FIRST)
    assert [site.summary for site in frozen.applied] == [f"for prompts that begin with {FIRST}"] * 3
    assert frozen.predicted == frozen.counted
    wanted, tokens = logits(phantom, (ids, mask, pixels), is_cached=True)
    for is_cached in (True, False):
        found, others = logits(frozen.program, (ids, mask, pixels), is_cached=is_cached)
        assert torch.equal(tokens, others)
        assert float((found - wanted).abs().max()) < 1e-5


def test_with_constants_the_cache_is_an_ordinary_one_and_other_prompts_are_refused(
    decoders: tuple[Program, Program], frozen: StepResult
) -> None:
    plain, _ = decoders
    assert frozen.program.components[DECODER].inputs == plain.components[DECODER].inputs
    assert frozen.program.components[DECODER].outputs == plain.components[DECODER].outputs
    ids, mask, _ = prompts(plain, has_image=False, n_rows=2)
    with pytest.raises(VlmoptError, match=f"begins with token .*; expected {FIRST}, of which the program holds"):
        opened(frozen.program, ids, mask)
    folded = made(frozen.program, "fold-constants").program
    counts = [
        sum(node.op == "call_module" for node in program.components[DECODER].graph.graph.nodes)
        for program in (frozen.program, folded)
    ]
    assert counts[0] - counts[1] == 3 * 3 * 2  # of three layers, three parts: what is made of token 0 twice
    for program, original in ((frozen.program, plain), (folded, made(plain, "fold-constants").program)):
        assert program_text(without_phantoms(program)) == program_text(original)
        again = made(program, "freeze-first-token", {"token": FIRST})
        assert {refusal.reason for refusal in again.refusals} == {"holds constants already"}


@pytest.mark.slow
def test_onnx_computes_what_the_program_does(decoders: tuple[Program, Program], tmp_path: Path) -> None:
    _, phantom = decoders
    alone = replace(phantom, components={DECODER: phantom.components[DECODER]})
    files = emit_program(alone, ("onnx",), tmp_path, progress=Silent())
    feeds = sample_shapes(phantom, None, seed=0)[DECODER]
    cases = [(feed, run_outputs(alone.components[DECODER], feed)) for feed in feeds]
    gate = check_file("decoder", tmp_path / files[DECODER]["onnx"], "onnx", cases, dtype="float32")
    assert gate.passed
