"""Fewer tokens of an image: what each method computes, counted everywhere, right in cached decoding and in ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vlmopt_passes.prune_tokens import PruneTokens

from tests.capture.test_generative import answer, captured_toy, prompts
from vlmopt.core.contract import Context
from vlmopt.core.errors import PassError, VlmoptError
from vlmopt.core.program import Assembly, Generation, Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.graph.assembled import DECODER, VISION, embedded, step
from vlmopt.graph.branches import find_branches
from vlmopt.graph.example import component_of, eyes_and_words, program_from
from vlmopt.graph.image_tokens import token_place
from vlmopt.graph.joined import MODEL, joined
from vlmopt.graph.replay import run_outputs
from vlmopt.registry import make_pass
from vlmopt.rewrite.pipeline import StepResult, run_step
from vlmopt.verify.parity import check_file
from vlmopt.workflow.samples import sample_shapes

METHODS = ("pool", "merge", "select-positions", "select-salient")


class _Eyes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.5


def seeing(n_tokens: int, *, grid: tuple[int, int] | None = None) -> Program:
    """Tokens [B, T, 6] of an image, times 1.5."""
    eyes = component_of(_Eyes(), torch.ones(2, n_tokens, 6).double(), name=VISION, output="image_features")
    program = program_from({VISION: eyes}, Assembly.GENERATIVE)
    program.generation = Generation(image_token=9, image_tokens=n_tokens, image_grid=grid)
    return program


def pruned(program: Program, keep: float, method: str, *, spread: Tensor | None = None, **more: Any) -> StepResult:
    pass_ = PruneTokens(keep, method, **more)  # type: ignore[arg-type]
    known = dict.fromkeys(pass_.wants(program), spread) if spread is not None else {}
    return run_step(program, pass_, Context(statistics=known), step=1)


def spread_of(program: Program) -> Tensor:
    assert program.generation is not None
    return torch.randn(program.generation.image_tokens, generator=torch.Generator().manual_seed(4)).double()


def seen(n_tokens: int) -> Tensor:
    return torch.randn(3, n_tokens, 6, generator=torch.Generator().manual_seed(n_tokens), dtype=torch.float64)


def run(result: StepResult, x: Tensor) -> Tensor:
    assert len(result.applied) == 1, result.refusals
    assert result.predicted == result.counted
    (found,) = run_outputs(result.program.components[VISION], {"x": x})
    return found


@pytest.mark.parametrize(("keep", "block"), [(18, (1, 2)), (9, (2, 2)), (6, (2, 3)), (4, (3, 3)), (1, (6, 6))])
def test_pooled_tokens_are_the_means_of_blocks(keep: int, block: tuple[int, int]) -> None:
    x, (rows, columns) = seen(36), block
    wanted = F.avg_pool2d((1.5 * x).mT.unflatten(2, (6, 6)), (rows, columns)).flatten(2).mT
    assert float((run(pruned(seeing(36), keep, "pool"), x) - wanted).abs().max()) < 1e-12


def by_hand(tokens: list[Tensor], keep: int) -> Tensor:
    """The tokens of one image merged pair by pair."""
    sizes = [1.0] * len(tokens)
    while len(tokens) > keep:
        n_merged = len(tokens) - max(keep, len(tokens) // 2)
        even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
        pairs = []
        for i in even:
            like = [float(F.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in odd]
            pairs.append((-max(like), i, odd[like.index(max(like))]))
        goes = {i: j for _, i, j in sorted(pairs)[:n_merged]}
        sums = [token * size for token, size in zip(tokens, sizes, strict=True)]
        counts = list(sizes)
        for i, j in goes.items():
            sums[j], counts[j] = sums[j] + sums[i], counts[j] + sizes[i]
        left = [i for i in range(len(tokens)) if i not in goes]
        tokens, sizes = [sums[i] / counts[i] for i in left], [counts[i] for i in left]
    return torch.stack(tokens)


@pytest.mark.parametrize(("n_tokens", "keep"), [(36, 18), (36, 35), (36, 23), (36, 4), (9, 4), (9, 5), (7, 2), (5, 1)])
def test_merged_tokens_are_those_that_are_merged_by_hand(n_tokens: int, keep: int) -> None:
    x = seen(n_tokens)
    wanted = torch.stack([by_hand(list(1.5 * image), keep) for image in x])
    assert float((run(pruned(seeing(n_tokens), keep, "merge"), x) - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("keep", [1, 5, 18, 35])
def test_salient_tokens_are_those_farthest_from_the_mean_of_their_image(keep: int) -> None:
    x = seen(36)
    far = (x - x.mean(1, keepdim=True)).norm(dim=-1).topk(keep).indices.sort().values
    wanted = torch.stack([image[places] for image, places in zip(1.5 * x, far, strict=True)])
    assert torch.equal(run(pruned(seeing(36), keep, "select-salient"), x), wanted)
    assert keep == 35 or len({tuple(row) for row in far.tolist()}) == 3  # each image has its own


def test_positions_are_those_where_the_task_varies_most_for_every_image() -> None:
    x, spread = seen(9), torch.tensor([0.0, 3, 1, 9, 2, 2, 8, 0, 1]).double()
    assert torch.equal(run(pruned(seeing(9), 4, "select-positions", spread=spread), x), 1.5 * x[:, [1, 3, 4, 6]])


def test_of_equals_the_first_are_kept() -> None:
    x = torch.ones(1, 8, 6, dtype=torch.float64)
    x[0, 2], x[0, 5], x[0, 7] = 0.0, 0.0, 4.0
    assert torch.equal(run(pruned(seeing(8), 2, "select-salient"), x), 1.5 * x[:, [2, 7]])
    plain = torch.ones(1, 8, 6, dtype=torch.float64)
    plain[0, :, 0] = torch.arange(8)
    even = torch.ones(1, 8, 6, dtype=torch.float64)
    assert torch.equal(run(pruned(seeing(8), 3, "merge"), even), torch.full((1, 3, 6), 1.5, dtype=torch.float64))


def test_a_share_leaves_what_it_says_and_blocks_the_most_below_it() -> None:
    for method, keep, n_left in (("merge", 0.25, 9), ("merge", 0.01, 1), ("pool", 0.49, 12), ("pool", 0.01, 1)):
        found = pruned(seeing(36), keep, method).program.generation
        assert found is not None
        assert (found.image_tokens, found.processor_tokens) == (n_left, 36)
    for keep in (0.0, 1.5, -3, 0):
        with pytest.raises(PassError, match="expected a number of tokens, or a share"):
            make_pass("prune-tokens", {"keep": keep})


def test_pruned_again_the_processor_still_makes_the_places_of_the_original() -> None:
    once = pruned(seeing(36), 18, "merge")
    twice = pruned(once.program, 9, "select-salient").program
    assert twice.generation == Generation(image_token=9, image_tokens=9, processor_tokens=36)
    assert twice.components[VISION].outputs[0].shape == ("batch", 9, 6)


def reasons(result: StepResult) -> list[str]:
    assert not result.applied
    return [refusal.reason for refusal in result.refusals]


def test_what_has_no_grid_or_no_places_is_refused() -> None:
    assert reasons(pruned(seeing(8), 4, "pool")) == ["its 8 tokens do not fill a grid: there are no patches"]
    assert reasons(pruned(seeing(4), 9, "merge")) == ["an image has 4 tokens, which are no more than are to be kept"]
    assert "writes no text about images" in reasons(pruned(eyes_and_words(), 2, "merge"))[0]


@pytest.mark.parametrize(
    ("family", "method", "told"),
    [
        ("llava_llama", "pool", "its 16 tokens lie"),
        ("blip_vqa", "merge", "attends to images across"),
        ("qwen2_5_vl", "merge", "only `pool` leaves whole ones"),
        pytest.param("blip_caption", "pool", "attends to images across", marks=pytest.mark.slow),
        pytest.param("blip2", "pool", "queries that look at the whole image", marks=pytest.mark.slow),
        pytest.param("llava_next", "pool", "do not fill a grid", marks=pytest.mark.slow),
    ],
)
def test_families_that_cannot_be_pruned_say_why(family: str, method: str, told: str) -> None:
    _, program = captured_toy(family)
    keep = 1 if family != "llava_llama" else 5
    if family == "llava_llama":
        told = "blocks of one size leave 1, 2, 4, 8 of the 4 x 4 tokens"
    assert told in reasons(pruned(program, keep, method))[0]


FAMILIES = [
    ("llava_llama", "merge", 7),
    ("llava_tied", "pool", 7),
    ("gemma3", "select-salient", 3),
    ("qwen2_5_vl", "pool", 2),
    ("qwen3_vl", "pool", 3),
    ("git", "select-positions", 5),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("llava_qwen2", "select-positions", 5), ("internvl", "merge", 3), ("paligemma", "pool", 4),
        ("smolvlm", "pool", 1), ("blip2", "merge", 2), ("llava_next", "select-salient", 9), ("florence2", "merge", 1),
        ("deepseek_vl", "merge", 5), ("llava_onevision", "merge", 20), ("qwen2_vl", "pool", 1),
    )),
]  # fmt: skip


@pytest.mark.parametrize("place", ["encoded", "projected"])
@pytest.mark.parametrize(("family", "method", "keep"), FAMILIES)
def test_cached_decoding_is_uncached_decoding_with_fewer_tokens(
    family: str, method: str, keep: int, place: str
) -> None:
    _, program = captured_toy(family)
    assert program.generation is not None
    result = pruned(program, keep, method, spread=spread_of(program), place=place)
    assert len(result.applied) == 1, result.refusals
    left = result.program
    assert result.predicted == result.counted
    assert left.generation is not None
    assert (left.generation.image_tokens, left.generation.processor_tokens) == (keep, program.generation.image_tokens)
    assert left.components[VISION].outputs[0].shape[1] == keep
    n_images = [(1,), (1, 1)] if left.generation.image_token < 0 else [(1,), (2, 1), (0, 1)]
    for counts in n_images:
        ids, mask, pixels = prompts(left, n_images=counts, n_padding=2)
        cached, found = answer(left, ids, mask, pixels, is_cached=True)
        whole, others = answer(left, ids, mask, pixels, is_cached=False)
        assert torch.equal(cached, whole)
        assert float((found - others).abs().max()) < 1e-4


def test_the_reduction_lies_in_front_of_the_projector_or_behind_it() -> None:
    _, program = captured_toy("llava_llama")
    vision = program.components[VISION]
    encoded, projected = (token_place(vision, is_encoded=is_encoded) for is_encoded in (True, False))
    assert [str(reader.target) for reader in encoded.readers] == ["model.multi_modal_projector.linear_1"]
    assert [reader.op for reader in projected.readers] == ["output"]
    assert (encoded.n_tokens, projected.n_tokens) == (16, 16)
    spread = spread_of(program)
    early, late = (
        pruned(program, 5, "select-positions", spread=spread, place=place).program for place in ("encoded", "projected")
    )
    ids, mask, pixels = prompts(early, n_images=(1, 1), n_padding=2)
    found = [step(one, embedded(one, ids, pixels), mask)[0] for one in (early, late)]
    assert float((found[0] - found[1]).abs().max()) < 1e-5
    assert [branch.name for branch in find_branches(early.components[VISION].graph)] == [
        branch.name for branch in find_branches(vision.graph)
    ]


def test_a_prompt_with_the_places_of_the_original_is_refused() -> None:
    _, program = captured_toy("llava_llama")
    left = pruned(program, 5, "merge").program
    ids, mask, pixels = prompts(program, n_images=(1,), n_padding=0)
    with pytest.raises(VlmoptError, match="have 16 places for features of images, and the images have 5"):
        embedded(left, ids, pixels)
    labels = torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100)
    with pytest.raises(VlmoptError, match="have 16 places for features of images, and the images have 5"):
        joined(left).program.components[MODEL].graph(ids, mask, labels, pixels)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_tower_through_what_is_left(method: str) -> None:
    _, program = captured_toy("llava_llama")
    left = pruned(program, 4, method, spread=spread_of(program)).program
    ids, mask, pixels = prompts(left, n_images=(1,), n_padding=0)
    labels = torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100)
    whole = joined(left).program.components[MODEL].graph
    weight = next(
        value for name, value in whole.named_parameters() if name.endswith("layers.0.self_attn.q_proj.weight")
    )
    weight.requires_grad_(True)
    try:
        (gradient,) = torch.autograd.grad(-whole(ids, mask, labels, pixels)[0][..., 0].sum(), [weight])
        assert float(gradient.abs().max()) > 0
    finally:
        weight.requires_grad_(False)


@pytest.mark.parametrize("method", METHODS)
def test_onnx_computes_what_the_program_does(method: str, tmp_path: Path) -> None:
    _, program = captured_toy("llava_llama")
    left = pruned(program, 4, method, spread=spread_of(program)).program
    alone = replace(left, components={VISION: left.components[VISION]})
    files = emit_program(alone, ("onnx",), tmp_path, progress=Silent())
    feeds = sample_shapes(left, None, seed=0)
    cases = [(feed, run_outputs(alone.components[VISION], feed)) for feed in feeds[VISION]]
    assert [len(feed["pixel_values"]) for feed, _ in cases] == [1, 2]
    assert feeds[DECODER][0]["inputs_embeds"].shape[1] == 8 + 4
    assert check_file(VISION, tmp_path / files[VISION]["onnx"], "onnx", cases, dtype="float32").passed
