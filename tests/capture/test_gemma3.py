"""Masks of Gemma 3 by broadcasting beside those of vmap."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from tests import toys
from vlmopt.capture.rewrites.gemma3 import broadcast_masks


def windowed_mask(blocks: torch.Tensor) -> torch.Tensor:
    """Causal within a window of three, where places of one block see each other."""
    total = blocks.shape[1]
    found = masking_utils.create_causal_mask(
        config=toys.make("gemma3").config.text_config,
        inputs_embeds=torch.zeros(blocks.shape[0], total, 4),
        attention_mask=torch.ones_like(blocks),
        past_key_values=None,
        position_ids=torch.arange(total)[None].expand(blocks.shape[0], -1),
        or_mask_function=masking_utils.blockwise_overlay(blocks),
        and_mask_function=masking_utils.sliding_window_overlay(3),
    )
    assert isinstance(found, torch.Tensor)
    return found


def test_masks_are_those_of_vmap_and_the_library_is_as_it_was_afterwards() -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1], [-1, -1, -1, -1, -1, -1, -1], [0, 0, 0, 0, 0, -1, -1]])
    before = masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex
    wanted = windowed_mask(blocks)
    with broadcast_masks(toys.make("gemma3"), (32, 32)):
        assert masking_utils._vmap_expansion_sdpa is not before[0]
        found = windowed_mask(blocks)
    assert found.shape == wanted.shape == (3, 1, 7, 7)
    assert torch.equal(found, wanted)
    assert (masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex) == before


def test_it_is_gone_after_an_error() -> None:
    before = masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex
    with pytest.raises(KeyError), broadcast_masks(toys.make("gemma3"), (32, 32)):
        raise KeyError
    assert (masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex) == before
