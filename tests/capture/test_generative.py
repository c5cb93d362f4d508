"""Models that write text: three components that answer as eager does, step by step."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import toys
from vlmopt.capture import capture, capture_model
from vlmopt.cli import entry
from vlmopt.core.errors import CaptureError, VlmoptError
from vlmopt.core.program import NO_WORD, Assembly, ModelSource, Program
from vlmopt.graph.assembled import DECODER, EMBEDDING, ENCODER, VISION, embedded, grid_positions, opened, placed, step
from vlmopt.graph.branches import find_branches
from vlmopt.graph.stored import read_program, write_program
from vlmopt.graph.text import component_text

N_NEW = 8
ALONE = ("git", "blip", "florence2")


def quick(*names: str) -> tuple[Any, ...]:
    """All toys as parameters, but for these marked as slow."""
    return (*names, *(pytest.param(name, marks=pytest.mark.slow) for name in toys.GENERATIVE if name not in names))


# plain, tied, typed tokens with windows, a grid, an image in front, cross attention to a prompt
FAMILIES = quick("llava_llama", "llava_tied", "gemma3", "qwen2_5_vl", "git", "blip_vqa")


@cache
def captured_toy(family: str) -> tuple[Any, Program]:
    model = toys.make(family)
    return model, capture_model(model, source_of(model), image=toys.IMAGE_SIZES.get(family))


def source_of(model: Any) -> ModelSource:
    return ModelSource("toy", str(model.config.model_type), type(model).__name__, "")


@pytest.fixture(scope="module", params=FAMILIES)
def toy(request: pytest.FixtureRequest) -> tuple[Any, Program]:
    return captured_toy(request.param)


def prompts(program: Program, *, n_images: tuple[int, ...], n_padding: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, mask and pixels of prompts with so many images each; all but the last are padded on the left."""
    assert program.generation is not None
    mark, n_features = program.generation.image_token, program.generation.image_tokens
    generator = torch.Generator().manual_seed(len(n_images) + n_padding)
    rows = []
    for count in n_images:
        words = torch.randint(4, 60, (6,), generator=generator)
        if mark == NO_WORD:
            start = () if program.generation.reads_across else program.generation.start_tokens
            rows.append(torch.cat([torch.tensor([*[mark] * n_features, *start], dtype=torch.int64), words[count:]]))
            continue
        images = [torch.cat([word[None], torch.full((n_features,), mark)]) for word in words[:count]]
        rows.append(torch.cat([words[:1], *images, words[2:]]))
    length = max(map(len, rows)) + n_padding * (len(rows) > 1)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    shape = [sum(n_images), *program.components[VISION].inputs[0].shape[1:]]
    pixels = torch.randn(shape, generator=generator) if sum(n_images) else None  # type: ignore[arg-type]
    return ids, mask, pixels


def answer(
    program: Program, ids: Tensor, mask: Tensor, pixels: Tensor | None, *, is_cached: bool
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, N_NEW] and their logits; without the cache each is computed from the whole text before it."""
    first = opened(program, ids, mask, pixels)
    ids, mask, embeds, cache_ = first.input_ids, first.attention_mask, first.inputs_embeds, first.cache
    found = list[Tensor]()
    prompt, is_answer = embeds, torch.zeros_like(ids, dtype=torch.bool)
    for _ in range(N_NEW):
        feed = {"input_ids": ids} if is_cached else {"input_ids": ids, "is_answer": is_answer}
        logits, cache_ = step(program, prompt, mask, cache_ if is_cached else first.cache, **feed)
        found.append(logits[:, -1])
        token = found[-1].argmax(-1, keepdim=True)
        ids, is_answer = torch.cat([ids, token], 1), torch.cat([is_answer, torch.ones_like(token).bool()], 1)
        embeds = torch.cat([embeds, embedded(program, token)], 1)
        prompt = embedded(program, token) if is_cached else embeds
        mask = torch.cat([mask, torch.ones_like(token)], 1)
    every = torch.stack(found, 1)
    return every.argmax(-1), every


def for_eager(
    model: Any, ids: Tensor, pixels: Tensor | None, n_images: tuple[int, ...], image: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Images and types of tokens as the processor of the model hands them over; `image` is their size where tiles
    follow from it, by default that of the toys."""
    is_image = (ids == toys.IMAGE_TOKEN).long()
    given: dict[str, Tensor] = {} if pixels is None else {"pixel_values": pixels}
    kind = model.config.model_type
    if kind in ("paligemma", "gemma3"):
        given["token_type_ids"] = is_image if kind == "gemma3" else torch.zeros_like(ids)
    if kind.startswith("qwen") and pixels is not None:
        given |= {"pixel_values": pixels.flatten(0, 1), "mm_token_type_ids": is_image}
        given["image_grid_thw"] = torch.tensor([[1, 4, 6]] * len(pixels))
    if kind in ("llava_next", "llava_onevision") and pixels is not None:
        given["image_sizes"] = torch.tensor([image or toys.IMAGE_SIZES[kind]] * len(pixels))
    if kind in ("smolvlm", "idefics3") and pixels is not None:
        filled = torch.zeros(len(ids), max(n_images), *pixels.shape[1:])
        filled[torch.arange(max(n_images)) < torch.tensor(n_images)[:, None]] = pixels
        given["pixel_values"] = filled
    return given


def written(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    pixels: Tensor | None,
    n_images: tuple[int, ...],
    *,
    n_new: int = N_NEW,
    image: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """What eager's own loop writes, tokens [B, n_new] and their logits; where its way with padding is not ours, it is
    asked prompt by prompt."""
    settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "eos_token_id": None}
    if model.config.model_type not in ALONE:
        feeds = [{"input_ids": ids, "attention_mask": mask, **for_eager(model, ids, pixels, n_images, image)}]
    else:
        if model.config.model_type == "blip":
            del settings["eos_token_id"]  # it gives its own
        shares = torch.split(pixels, n_images) if pixels is not None else [None] * len(ids)
        feeds = [alone(model, row[seen == 1], own) for row, seen, own in zip(ids, mask, shares, strict=True)]
    found = [model.generate(**f, **settings, return_dict_in_generate=True, output_logits=True) for f in feeds]
    tokens = torch.cat([one.sequences[:, -n_new:] for one in found])
    return tokens, torch.cat([torch.stack(one.logits, 1) for one in found])


def alone(model: Any, ids: Tensor, pixels: Tensor | None) -> dict[str, Tensor]:
    """A prompt by itself, as its processor hands it over: without places for an image, if none are words."""
    words = ids[ids >= 0][None]
    if type(model).__name__ == "BlipForConditionalGeneration":
        words = torch.cat([words, torch.tensor([[3]])], 1)  # what ends a text for its tokenizer; the model takes it off
    given = {} if pixels is None or not len(pixels) else {"pixel_values": pixels}
    return {"input_ids": words, "attention_mask": torch.ones_like(words), **given}


CASES = {
    "an image": ((1,), 0),
    "two images": ((2,), 0),
    "no image": ((0,), 0),
    "two prompts, padded": ((1, 1), 3),
    "with and without": ((0, 2), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_eager_does_token_by_token(toy: tuple[Any, Program], case: str) -> None:
    model, program = toy
    n_images, n_padding = CASES[case]
    ids, mask, pixels = prompts(program, n_images=n_images, n_padding=n_padding)
    if pixels is None and model.config.model_type == "blip-2":
        pytest.skip("eager takes no prompt without an image")
    assert program.generation is not None
    if program.generation.image_token == NO_WORD and set(n_images) != {1}:
        pytest.skip("a prompt has one image")
    with torch.no_grad():
        wanted, wanted_logits = written(model, ids, mask, pixels, n_images)
        for is_cached in (True, False):
            tokens, logits = answer(program, ids, mask, pixels, is_cached=is_cached)
            assert torch.equal(tokens, wanted)
            assert torch.allclose(logits, wanted_logits, atol=1e-4)


def test_the_components_are_those_that_runtimes_expect(toy: tuple[Any, Program]) -> None:
    model, program = toy
    assert program.assembly is Assembly.GENERATIVE
    decoder, generation = program.components[DECODER], program.generation
    assert generation is not None
    encoder = [ENCODER] if generation.reads_across else []
    assert list(program.components) == [VISION, EMBEDDING, *encoder, DECODER]
    types = ["token_type_ids"] if generation.token_types else []
    masks = ["encoder_attention_mask"] if generation.reads_across else []
    own = ["inputs_embeds", "attention_mask", "position_ids", *types, *masks]
    kind = "" if generation.cross_source is None else "decoder_"
    assert [spec.name for spec in decoder.inputs[: len(own) + 1]] == [*own, f"past_key_values_0_{kind}key"]
    assert len(decoder.inputs) == len(own) + 2 * 3 * (1 if generation.cross_source is None else 2)
    n_heads = 4 if model.config.model_type in ("blip-2", *ALONE) else 2
    assert decoder.inputs[len(own)].shape == ("batch", n_heads, "past", 8)
    assert decoder.outputs[0].shape == ("batch", "sequence", 64)
    assert [spec.name for spec in decoder.outputs[1:3]] == [f"present_0_{kind}key", f"present_0_{kind}value"]


@pytest.mark.parametrize(
    ("family", "length"),
    [
        pytest.param("blip_caption", 17, marks=pytest.mark.slow),
        ("blip_vqa", "encoder"),
        pytest.param("florence2", "encoder", marks=pytest.mark.slow),
    ],
)
def test_what_is_attended_to_across_goes_from_one_component_into_the_other(family: str, length: int | str) -> None:
    _, program = captured_toy(family)
    assert program.generation is not None
    assert program.generation.cross_source is not None
    source, decoder = program.components[program.generation.cross_source], program.components[DECODER]
    given = [(spec.name.replace("present", "past_key_values"), spec.shape[1:]) for spec in source.outputs]
    assert given == [(spec.name, spec.shape[1:]) for spec in decoder.inputs if spec.is_cross]
    names = [f"past_key_values_{layer}_encoder_{side}" for layer in range(3) for side in ("key", "value")]
    assert given == [(name, (4, length, 8)) for name in names]
    assert decoder.inputs[-1].name_in_files == "past_key_values.2.encoder.value"


def test_every_branch_of_tower_and_decoder_is_found(toy: tuple[Any, Program]) -> None:
    _, program = toy
    decoder = find_branches(program.components[DECODER].graph)
    assert program.generation is not None
    across = [] if program.generation.cross_source is None else ["cross_attention"]
    assert [branch.kind.value for branch in decoder] == ["attention", *across, "ffn"] * 3
    tower = [branch.kind.value for branch in find_branches(program.components[VISION].graph)]
    if "cross_attention" in tower:  # queries read the image behind the encoder, in every other layer
        tower, former = tower[:6], tower[6:]
        assert former == ["attention", "cross_attention", "ffn", "attention", "ffn"]
    if "other" in tower:  # convolutions with a stream around them
        assert tower == ["other", "attention", "other", "ffn"] * 8
        return
    assert tower == ["attention", "ffn"] * (len(tower) // 2)
    assert len(tower) >= 4


@pytest.mark.parametrize("family", ["llava_tied", "gemma3", "qwen2_5_vl", "git", "blip_vqa"])
def test_it_is_read_back_as_it_was_written(family: str, tmp_path: Path) -> None:
    _, program = captured_toy(family)
    write_program(program, tmp_path, name="toy")
    again = read_program(tmp_path, name="toy")
    assert again.generation == program.generation
    assert again.dims == program.dims
    ids, mask, pixels = prompts(program, n_images=(1,), n_padding=0)
    assert torch.equal(*(answer(one, ids, mask, pixels, is_cached=True)[1] for one in (program, again)))


def test_it_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.write_model("llava_llama", tmp_path / "model")
    assert entry.run(["inspect", str(tmp_path / "model")]) == 0
    assert "assembly generative" in capsys.readouterr().out


def test_gradients_reach_the_projector_through_the_whole_program() -> None:
    _, program = captured_toy("llava_llama")
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=2)
    weight = program.components[VISION].graph.get_parameter("model.multi_modal_projector.linear_2.weight")
    weight.requires_grad_(True)
    try:
        logits, _ = step(program, embedded(program, ids, pixels), mask)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, [weight])
        assert float(gradient.abs().max()) > 0
    finally:
        weight.requires_grad_(False)


def test_a_model_that_does_more_than_its_parts_is_refused() -> None:
    model: Any = toys.make("llava_llama")
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.logits = found.logits * 1.01
        return found

    model.forward = functools.update_wrapper(scaled, forward)
    with pytest.raises(CaptureError, match=r"differs from eager by 0\.0099 of the largest logit at a prompt with an"):
        capture_model(model, source_of(model))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("paligemma", {"token_types": (1, 1, 1)}),
        ("gemma3", {"token_types": (0, 0, 0)}),
        ("qwen2_vl", {"image_grid": (3, 2)}),
    ],
)
def test_what_joins_the_parts_decides_the_logits(family: str, change: dict[str, Any]) -> None:
    _, program = captured_toy(family)
    assert program.generation is not None
    other = replace(program, generation=replace(program.generation, **change))
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=2)
    right, wrong = (step(one, embedded(one, ids, pixels), mask, input_ids=ids)[0][:, -1] for one in (program, other))
    assert float((right - wrong).abs().max()) > 1e-3


def test_places_begin_where_the_model_begins_to_count() -> None:
    _, program = captured_toy("paligemma")
    found = placed(program, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), 4)
    assert found["position_ids"].tolist() == [[1, 1, 2, 3], [1, 2, 3, 4]]


def test_places_of_images_are_those_of_the_model() -> None:
    model, program = captured_toy("qwen2_vl")
    assert program.generation is not None
    ids, mask, _ = prompts(program, n_images=(0, 2, 1), n_padding=2)
    grid, types = torch.tensor([[1, 4, 6]] * 3), (ids == toys.IMAGE_TOKEN).long()
    wanted, _ = model.model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)
    found = grid_positions(program.generation, mask, ids)
    assert torch.equal(found[:, mask.bool()], wanted[:, mask.bool()])


def test_a_model_that_must_know_its_tokens_says_so() -> None:
    _, program = captured_toy("qwen2_vl")
    ids, mask, pixels = prompts(program, n_images=(1,), n_padding=0)
    with pytest.raises(VlmoptError, match="places and types of its tokens depend on where the images are"):
        step(program, embedded(program, ids, pixels), mask)


def test_tokens_that_a_model_treats_apart_are_among_those_compared() -> None:
    """Ovis 2 puts learned features in the places of five tokens beside the images, which no part shows."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config

    vision = {**toys.VISION, "vocab_size": 64, "hidden_stride": 2}
    config = Ovis2Config(
        vision_config={key: value for key, value in vision.items() if key != "projection_dim"},
        text_config=Qwen2Config(**toys.DECODER),
        image_token_id=toys.IMAGE_TOKEN,
        visual_indicator_token_ids=[50, 51, 52, 53, 54],
        vocab_size=64,
        hidden_size=32,
    )
    model = Ovis2ForConditionalGeneration(config).eval()
    with pytest.raises(CaptureError, match="of the largest logit at a prompt with an image"):
        capture_model(model, source_of(model))


def test_kinds_of_tokens_that_no_step_gives_are_refused() -> None:
    model: Any = toys.make("llava_llama")
    forward = model.forward

    def reading(*args: Any, mm_token_type_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = reading
    with pytest.raises(CaptureError, match=r"reads kinds of tokens \(mm_token_type_ids\) beside their places"):
        capture_model(model, source_of(model))


def test_windows_of_one_size_are_taken_as_a_batch() -> None:
    def n_attentions(program: Program) -> int:
        nodes = program.components[VISION].graph.graph.nodes
        return sum("scaled_dot_product" in str(node.target) for node in nodes)

    model: Any = toys.make("qwen2_5_vl")
    even = capture_model(model, source_of(model), image=(16, 32))
    assert n_attentions(even) == 4  # two windows of 2 x 2 in each of three layers, and one layer over all
    assert n_attentions(captured_toy("qwen2_5_vl")[1]) == 7  # of 16 x 24


def test_an_image_of_half_a_patch_is_refused() -> None:
    model: Any = toys.make("qwen2_vl")
    with pytest.raises(CaptureError, match=r"image size \(16, 20\) of Qwen2VL\w+: is no multiple of 8"):
        capture_model(model, source_of(model), image=(16, 20))


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "qwen3_vl")]


@pytest.mark.parametrize("family", ["qwen2_5_vl", *SLOWER])
def test_the_structure_needs_no_weights(family: str, tmp_path: Path) -> None:
    toys.make(family).save_pretrained(tmp_path)
    found = capture(str(tmp_path), image=toys.IMAGE_SIZES.get(family), with_weights=False)
    _, program = captured_toy(family)
    assert found.generation == program.generation
    for name, part in program.components.items():
        assert component_text(found.components[name]) == component_text(part)


def test_a_decoder_that_reads_an_encoder_is_refused() -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

    former = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)
    config = Blip2Config(
        vision_config=toys.VISION,
        qformer_config={**former, "encoder_hidden_size": 32, "vocab_size": 64},
        text_config=text,
        num_query_tokens=4,
        image_token_index=5,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    with pytest.raises(CaptureError, match="writes its answer from the states of an encoder"):
        capture_model(model, source_of(model))
