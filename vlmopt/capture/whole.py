"""The assembled model beside the answer that the original writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmopt.capture.export import TOLERANCE, run_eager
from vlmopt.capture.plan import CapturePlan
from vlmopt.capture.samples import text_config
from vlmopt.capture.wrappers import VisionEncoder, Wrapper
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import NO_WORD, Generation, Program
from vlmopt.graph.assembled import VISION, embedded, opened, step

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Asked = Callable[[Tensor, Tensor], dict[str, Tensor]]
MARGIN = 10  # the whole model may depart from eager so many times further than one of its parts


def compare_whole(model: nn.Module, program: Program, plan: CapturePlan, vision: VisionEncoder) -> None:
    """Two prompts with an image each, one padded, and one more token: the logits of the program and of `generate`.

    Raises:
        CaptureError: they differ, so the model does more than its parts show.
    """
    assert program.generation is not None
    ids, mask = _prompts(program.generation, plan)
    pixels = _pixels(program, plan, len(ids))
    eager = _generated(model, _fed(program.generation, ids, mask, vision.images(pixels)))
    _compare(program, (ids, mask, pixels), eager.logits, eager.sequences[:, -2:-1])


def compare_alone(model: nn.Module, program: Program, plan: CapturePlan, asked: Asked) -> None:
    """As `compare_whole`, for models that take an image in another way: each prompt is asked alone, without padding.

    Args:
        asked: what `generate` takes for the words of a prompt [1, S] and its image.
    """
    assert program.generation is not None
    ids, mask = _prompts(program.generation, plan)
    pixels = _pixels(program, plan, len(ids))
    rows = []
    for row in range(len(ids)):
        words = ids[row][(mask[row] == 1) & (ids[row] != NO_WORD)][None]
        rows.append(_generated(model, asked(words, pixels[row : row + 1])))
    logits = [torch.cat(each) for each in zip(*(row.logits for row in rows), strict=True)]
    _compare(program, (ids, mask, pixels), logits, torch.cat([row.sequences[:, -2:-1] for row in rows]))


def _compare(program: Program, given: tuple[Tensor, Tensor, Tensor], wanted: Sequence[Tensor], more: Tensor) -> None:
    """Prompts, mask and pixels through the program, then the token that the model itself wrote first."""
    first = opened(program, *given)
    ids, mask = first.input_ids, first.attention_mask
    logits, cache = step(program, first.inputs_embeds, mask, first.cache, input_ids=ids)
    _require(logits[:, -1], wanted[0], "a prompt with an image")
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    logits, _ = step(program, embedded(program, more), mask, cache, input_ids=ids)
    _require(logits[:, -1], wanted[1], "the step behind it")


def _pixels(program: Program, plan: CapturePlan, n_images: int) -> Tensor:
    shape = [n_images, *(int(size) for size in program.components[VISION].inputs[0].shape[1:])]
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return pixels.to(plan.device, getattr(torch, plan.dtype))


def _prompts(generation: Generation, plan: CapturePlan) -> tuple[Tensor, Tensor]:
    """Words around an image, [2, N], and their mask. Tokens that the configuration names are among the words, for they
    are what a model may treat apart. Where no word stands for images they come first, and then what a text begins with.
    """
    mark, n = generation.image_token, generation.image_tokens
    vocabulary = int(text_config(plan.config).vocab_size)
    words = torch.randint(0, vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
    words[words == mark] = mark - 1 if mark else 1
    if mark == NO_WORD:
        return _behind_images(generation, words.to(plan.device))
    named = torch.tensor([_named_tokens(plan.config, vocabulary, mark)] * 2, dtype=words.dtype)
    ids = torch.cat([words[:, :2], torch.full((2, n), mark), words[:, 2:4], named, words[:, 4:]], 1).to(plan.device)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    return ids, mask


def _behind_images(generation: Generation, words: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of an image and words; one of them is shorter, and padded on its left."""
    start = () if generation.reads_across else generation.start_tokens
    front = words.new_tensor([*[NO_WORD] * generation.image_tokens, *start])
    first, second = torch.cat([front, words[0]]), torch.cat([words.new_zeros(1), front, words[1, :-1]])
    mask = torch.ones(2, len(first), dtype=words.dtype, device=words.device)
    mask[1, 0] = 0
    return torch.stack([first, second]), mask


def _named_tokens(config: PretrainedConfig, vocabulary: int, mark: int) -> list[int]:
    """The tokens under names such as `vision_start_token_id`, but for those that stand for what is seen or heard."""
    found: set[int] = set()
    for name, value in config.to_dict().items():
        if re.search(r"token_(id|index)(e?s)?$", name) and not re.search(r"video|audio", name):
            found |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    return sorted(token for token in found if 0 <= token < vocabulary and token != mark)


def _fed(generation: Generation, ids: Tensor, mask: Tensor, images: dict[str, Tensor]) -> dict[str, Tensor]:
    types = {}
    if generation.token_types is not None:
        text, image, _ = generation.token_types
        types["token_type_ids"] = torch.where(ids == generation.image_token, image, text)
    if generation.image_grid is not None:
        types["mm_token_type_ids"] = (ids == generation.image_token).to(ids.dtype)
    return {"input_ids": ids, "attention_mask": mask, **images, **types}


def _generated(model: Any, feed: dict[str, Tensor]) -> Any:
    """Two tokens of an answer with their logits, from the model's own loop."""
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1}
    outputs = {"return_dict_in_generate": True, "output_logits": True, "use_cache": True}
    whole = Wrapper(model)
    return run_eager("the model", whole, feed, call=lambda **given: model.generate(**given, **settings, **outputs))


def _require(found: Tensor, wanted: Tensor, what: str) -> None:
    scale = wanted.double().abs().max().clamp(min=1e-6)
    worst = float((found.double() - wanted.double()).abs().max() / scale)
    allowed = MARGIN * TOLERANCE.get(wanted.dtype, 1e-5)
    if not worst <= allowed:
        raise CaptureError(
            "the assembled model",
            f"differs from eager by {worst:.2g} of the largest logit at {what}",
            expected=f"at most {allowed:.0e}",
            remedy="what this family does beside its parts belongs into vlmopt/capture/generative.py",
        )
