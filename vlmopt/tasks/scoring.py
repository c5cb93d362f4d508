"""Losses, ranks and accuracies on outputs, in float64. Numbers that are not finite never count as right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.core.program import Similarity

_CHUNK = 1024  # rows of a similarity matrix that are held at once


def unit(embeddings: Tensor) -> Tensor:
    """Embeddings [n, d] at length 1, float64."""
    return F.normalize(embeddings.double(), dim=-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of every row [n] for logits [n, K] and classes [n], float64."""
    return F.cross_entropy(logits.double(), targets, reduction="none")


def is_right(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the greatest logit is the target's, else 0; [n], float64."""
    is_hit = (logits.argmax(-1) == targets) & torch.isfinite(logits).all(-1)
    return is_hit.double()


def percent(scores: Tensor) -> float:
    return 100 * float(scores.mean())


@dataclass(frozen=True)
class Pairs:
    """Which of the unique images and unique texts belong together.

    Shapes: `image` and `text` hold the rows of every pair, [n_pairs].
    """

    image: Tensor
    text: Tensor
    n_images: int
    n_texts: int

    @classmethod
    def of(cls, names: Sequence[tuple[str, str]]) -> Pairs:
        """The pairs (image name, text) with rows numbered in order of first appearance."""
        images = {image: row for row, image in enumerate(dict.fromkeys(image for image, _ in names))}
        texts = {text: row for row, text in enumerate(dict.fromkeys(text for _, text in names))}
        rows = torch.tensor([(images[image], texts[text]) for image, text in names])
        return cls(rows[:, 0], rows[:, 1], len(images), len(texts))


def _chunks(images: Tensor, texts: Tensor, pairs: Pairs, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, similarities [rows, n_texts] and which of them belong together, a chunk of images at a time."""
    left, right = unit(images), unit(texts)
    for start in range(0, len(left), _CHUNK):
        rows = slice(start, start + _CHUNK)
        similarity = scale * left[rows] @ right.T
        belongs = torch.zeros_like(similarity, dtype=torch.bool)
        inside = (pairs.image >= start) & (pairs.image < start + _CHUNK)
        belongs[pairs.image[inside] - start, pairs.text[inside]] = True
        yield rows, similarity, belongs


def ranks(images: Tensor, texts: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """How many wrong texts come before the best right one of every image [n_images], and the same for texts [n_texts].

    Rank 0 is a hit at 1. A tie counts as wrong first, so that a model which embeds everything alike scores nothing.
    """
    lowest = float("-inf")
    image_ranks = torch.zeros(pairs.n_images)
    text_best = torch.full((pairs.n_texts,), lowest, dtype=torch.float64)
    for rows, similarity, belongs in _chunks(images, texts, pairs, 1.0):
        similarity = similarity.nan_to_num(nan=lowest)
        best = similarity.masked_fill(~belongs, lowest).amax(1)
        image_ranks[rows] = ((similarity >= best[:, None]) & ~belongs).sum(1).float()
        text_best = torch.maximum(text_best, similarity.masked_fill(~belongs, lowest).amax(0))
    text_ranks = torch.zeros(pairs.n_texts)
    for _, similarity, belongs in _chunks(images, texts, pairs, 1.0):
        similarity = similarity.nan_to_num(nan=lowest)
        text_ranks += ((similarity >= text_best) & ~belongs).sum(0).float()
    return image_ranks, text_ranks


def nearest(images: Tensor, texts: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The row of the text nearest to every image [n_images], and of the image nearest to every text [n_texts].

    Of several that are equally near a wrong one counts, as it does for `ranks`; -1 where no similarity is a number.
    """
    lowest = float("-inf")
    text_rows = torch.full((pairs.n_images,), -1)
    text_best = torch.full((pairs.n_texts,), lowest, dtype=torch.float64)
    for rows, similarity, belongs in _chunks(images, texts, pairs, 1.0):
        similarity = similarity.nan_to_num(nan=lowest)
        text_rows[rows] = _first_of_best(similarity, belongs, similarity.amax(1, keepdim=True), dim=1)
        text_best = torch.maximum(text_best, similarity.amax(0))
    image_rows, is_wrong = torch.full((pairs.n_texts,), -1), torch.zeros(pairs.n_texts, dtype=torch.bool)
    for rows, similarity, belongs in _chunks(images, texts, pairs, 1.0):
        similarity = similarity.nan_to_num(nan=lowest)
        found = _first_of_best(similarity, belongs, text_best[None], dim=0)
        is_wrong_here = (found >= 0) & ~belongs[found.clamp(min=0), torch.arange(pairs.n_texts)]
        is_better = (found >= 0) & ((image_rows < 0) | (is_wrong_here & ~is_wrong))
        image_rows[is_better] = found[is_better] + rows.start
        is_wrong |= is_wrong_here
    return text_rows, image_rows


def _first_of_best(similarity: Tensor, belongs: Tensor, best: Tensor, *, dim: int) -> Tensor:
    """The first index along `dim` whose similarity is the best and which is wrong, else the first of the best.

    -1 where the best is not there, or no number.
    """
    is_best = (similarity == best) & torch.isfinite(best)
    index = (2 * (is_best & ~belongs).int() + is_best.int()).argmax(dim)
    return torch.where(is_best.any(dim), index, -1)


def contrastive_losses(images: Tensor, texts: Tensor, pairs: Pairs, similarity: Similarity) -> Tensor:
    """Symmetric contrastive cross-entropy of every pair [n_pairs] over the whole pool.

    Source: Radford et al. 2021 (CLIP), figure 3. What differs: all texts of an image (and images of a text) count as
    right together, since a name may belong to several drawings.
    """
    lowest = float("-inf")
    by_image = torch.zeros(pairs.n_images, dtype=torch.float64)
    text_all = torch.full((pairs.n_texts,), lowest, dtype=torch.float64)
    text_right = text_all.clone()
    for rows, logits, belongs in _chunks(images, texts, pairs, similarity.scale):
        right = logits.masked_fill(~belongs, lowest)
        by_image[rows] = logits.logsumexp(1) - right.logsumexp(1)
        text_all = torch.logaddexp(text_all, logits.logsumexp(0))
        text_right = torch.logaddexp(text_right, right.logsumexp(0))
    by_text = text_all - text_right
    return (by_image[pairs.image] + by_text[pairs.text]) / 2
