"""What a decoder reads of tokens beside their embeddings: where they are and of which type, in numpy.

The same as `vlmopt.graph.assembled.placed`, which says what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmopt.core.manifest import GenerationEntry

Ids = NDArray[np.int64]


def placed(generation: GenerationEntry, mask: Ids, input_ids: Ids, n_new: int) -> Mapping[str, NDArray[Any]]:
    """Mask, positions and types of the last `n_new` tokens.

    Args:
        mask, input_ids: [B, P + S], all tokens so far; those behind the prompt are the model's own.
    """
    found = {"attention_mask": mask}
    if generation.image_grid is None:
        found["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -n_new:] + generation.first_position
    else:
        found["position_ids"] = _grid_positions(generation, generation.image_grid, mask, input_ids)[:, :, -n_new:]
    if generation.token_types is not None:
        text, image, answer = generation.token_types
        is_prompt = mask.shape[1] == n_new
        of_prompt = np.where(input_ids == generation.image_token, image, text)
        found["token_type_ids"] = of_prompt if is_prompt else np.full((len(mask), n_new), answer, dtype=np.int64)
    return found


def _grid_positions(generation: GenerationEntry, grid: tuple[int, int], mask: Ids, input_ids: Ids) -> Ids:
    rows, columns = grid
    size = rows * columns
    is_image = (input_ids == generation.image_token) & (mask == 1)
    count = is_image.cumsum(axis=1)
    is_image &= count <= count[:, -1:] // size * size
    within = (count - 1) % size
    moves = np.where(is_image, (within == size - 1) * max(rows, columns), mask)
    start = moves.cumsum(axis=1) - moves
    places = np.stack([np.zeros_like(within), within // columns, within % columns])
    return np.asarray(start + np.where(is_image, places, 0), dtype=np.int64)
