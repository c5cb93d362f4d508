"""The arithmetic of comparing embeddings, in one place for programs, tasks and folding."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.core.program import Similarity


def normalized(embeddings: Tensor) -> Tensor:
    """Rows of length one, [n, D]."""
    lengths: Tensor = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    return embeddings / lengths


def class_embeddings(embeddings: Tensor, n_classes: int) -> Tensor:
    """One unit vector a class, [n_classes, D], from the embeddings of its prompts.

    Several prompts a class are averaged after normalisation.

    Shapes: embeddings [n_classes * prompts, D], class by class.

    Source: Radford et al., "Learning Transferable Visual Models" (arXiv 2103.00020), section 3.1.4.
    """
    prompts = normalized(embeddings).reshape(n_classes, -1, embeddings.shape[-1])
    return prompts[:, 0] if prompts.shape[1] == 1 else normalized(prompts.mean(dim=1))


def similarity_logits(images: Tensor, texts: Tensor, similarity: Similarity) -> Tensor:
    """`scale * cos(image, text) + bias`, [n_images, n_texts]."""
    return similarity.scale * (normalized(images) @ normalized(texts).T) + similarity.bias
