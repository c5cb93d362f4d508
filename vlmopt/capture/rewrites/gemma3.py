"""Masks of Gemma 3 by broadcasting.

Before: the mask of its windows comes from `torch.vmap` over a function of one place, in regions that torch.export keeps
and that have to be taken apart in a second trace of the whole decoder. After: the function gets all places at once, as
transformers calls it for every other mask. The same values, since the function only compares and looks up places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from transformers import masking_utils

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def broadcast_masks(model: nn.Module, image: tuple[int, int]) -> Iterator[None]:
    """Masks by broadcasting, while the context lasts."""
    before = masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex
    masking_utils._vmap_expansion_sdpa = _over_all_places
    masking_utils.TransformGetItemToIndex = nullcontext  # what lets vmap look up a place
    try:
        yield
    finally:
        masking_utils._vmap_expansion_sdpa, masking_utils.TransformGetItemToIndex = before


def _over_all_places(mask: Mask) -> Mask:
    """The mask [B, H, Q, K] from the numbers of samples, heads, queries and keys."""

    def expanded(*places: Tensor) -> Tensor:
        found = mask(*masking_utils._non_vmap_expansion_sdpa(*places))
        return found.expand([each.shape[0] for each in places])

    return expanded
