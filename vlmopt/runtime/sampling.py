"""The next token from logits: the most probable one, or one drawn, those read before less probable where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmopt.core.errors import ArtifactError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. At temperature 0 the most probable token is taken; above it one is drawn from the softmax
    of `logits / temperature`, among the `top_k` most probable (0: all) and of those the fewest whose probabilities sum
    to `top_p` or more. The same seed draws the same tokens. Before all that, the logit of every token of prompt and
    answer so far is divided by `repetition_penalty` if positive, else multiplied (arXiv 1909.05858); None takes what
    the model's generation configuration states.

    Raises:
        ArtifactError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0 and np.isfinite(self.temperature), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self._penalty < np.inf, "above 0"),
        }
        for name, (is_right, expected) in ranges.items():
            if not is_right:
                raise ArtifactError(name, f"is {getattr(self, name)}", expected=expected)

    @cached_property
    def _random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @property
    def _penalty(self) -> float:
        return 1.0 if self.repetition_penalty is None else self.repetition_penalty

    def choose(self, logits: NDArray[Any], read: Sequence[NDArray[np.int64]] = ()) -> NDArray[np.int64]:
        """A token for every row of logits [B, V].

        Args:
            read: the tokens of every row's prompt and answer so far.
        """
        if self._penalty != 1.0:
            logits = np.array([self._penalized(*row) for row in zip(logits, read, strict=True)])
        if self.temperature == 0:
            return np.asarray(logits.argmax(axis=-1), dtype=np.int64)
        return np.array([self._drawn(row) for row in logits.astype(np.float64)], dtype=np.int64)

    def _penalized(self, logits: NDArray[Any], read: NDArray[np.int64]) -> NDArray[Any]:
        found, tokens = logits.copy(), np.unique(read[read < len(logits)])
        found[tokens] = np.where(found[tokens] > 0, found[tokens] / self._penalty, found[tokens] * self._penalty)
        return found

    def _drawn(self, logits: NDArray[np.float64]) -> int:
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        weights = np.exp((logits[order] - logits[order[0]]) / self.temperature)
        probabilities = weights / weights.sum()
        n_kept = int(np.searchsorted(probabilities.cumsum(), self.top_p - 1e-12)) + 1
        kept = probabilities[:n_kept]
        return int(order[self._random.choice(len(kept), p=kept / kept.sum())])
