"""Answers of a generative artifact: prompt and images in, tokens out one after another, with a cache between steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmopt.core.errors import ArtifactError
from vlmopt.core.manifest import GenerationEntry, TensorEntry
from vlmopt.runtime.placing import placed
from vlmopt.runtime.sampling import Sampling
from vlmopt.runtime.session import Session

if TYPE_CHECKING:
    from onnxruntime import OrtValue

VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
ENCODER, ENCODER_MASK = "encoder_model", "encoder_attention_mask"
CROSS = ".encoder."  # in the names of what a decoder attends to across
PAST, PRESENT = "past_key_values.", "present."
DEFAULT_NEW_TOKENS = 128

Array = NDArray[Any]
Ids = NDArray[np.int64]


class Graphs(Protocol):
    """The sessions of an artifact by the names of its components."""

    def __call__(self, name: str, /) -> Session: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, every image in the places of its features, and the pixels of those images [N, ...]."""

    token_ids: tuple[int, ...]
    pixels: Mapping[str, Array] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds to the first token of an answer (images and prompt included), and for each of those behind it."""

    first_token_s: float
    later_tokens_s: float
    n_later: int

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens behind the first; None where there are none."""
        return self.n_later / self.later_tokens_s if self.n_later and self.later_tokens_s > 0 else None


class Decoding:
    """One batch of prompts being answered. Iterating gives the next token of every prompt, [B] int64, -1 where the
    answer has ended, until all have; `timing` is that of the steps so far.

    Raises:
        ArtifactError: a prompt is empty, or longer with its answer than the model takes.
    """

    def __init__(
        self,
        graphs: Graphs,
        generation: GenerationEntry,
        prompts: Sequence[Prompt],
        *,
        stop_tokens: frozenset[int],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self._graphs, self._generation, self._prompts = graphs, generation, prompts
        self._stops = stop_tokens | frozenset(generation.stop_tokens)
        self._sampling = sampling or Sampling()
        self._decoder = graphs(DECODER)
        self._limit = self._checked_limit(max_new_tokens)
        self.timing = Timing(0.0, 0.0, 0)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        start = time.perf_counter()
        ids, mask, embeds, across = self._opened()
        logits, cache = self._step(embeds, ids, mask, across)
        has_ended = np.zeros(len(ids), dtype=bool)
        for n_made in range(1, self._limit + 1):
            chosen = self._sampling.choose(logits, [row[seen == 1] for row, seen in zip(ids, mask, strict=True)])
            self._note(time.perf_counter() - start, n_made)
            yield np.where(has_ended, -1, chosen)
            has_ended |= np.isin(chosen, list(self._stops))
            if has_ended.all() or n_made == self._limit:
                return
            mask = np.concatenate([mask, np.ones((len(mask), 1), dtype=np.int64)], axis=1)
            ids = np.concatenate([ids, chosen[:, None]], axis=1)
            embeds = self._graphs(EMBEDDING).run({"input_ids": chosen[:, None]})["inputs_embeds"]
            logits, cache = self._step(embeds, ids, mask, {**across, **cache})

    def _note(self, elapsed: float, n_made: int) -> None:
        first = elapsed if n_made == 1 else self.timing.first_token_s
        self.timing = Timing(first, elapsed - first, n_made - 1)

    def _checked_limit(self, wanted: int | None) -> int:
        longest = max((len(prompt.token_ids) for prompt in self._prompts), default=0)
        if self._generation.reads_across and longest <= self._graphs(ENCODER).dims["encoder"].maximum:
            longest = min(longest, len(self._generation.start_tokens))  # the prompt itself lies before the encoder
        if not longest or any(not prompt.token_ids for prompt in self._prompts):
            raise ArtifactError("the prompt", "is empty", expected="a question or an instruction")
        wanted_first = self._generation.first_token
        others = [p.token_ids[0] for p in self._prompts if wanted_first is not None and p.token_ids[0] != wanted_first]
        if others:
            expected = f"token {wanted_first}, of which the artifact holds constants"
            raise ArtifactError("the prompt", f"begins with token {others[0]}", expected=expected)
        room = self._decoder.dims["sequence"].maximum - longest
        if room < 1 or (wanted is not None and wanted > room):
            found = f"has {longest} tokens" + ("" if room < 1 else f", and {wanted} new ones were asked for")
            expected = f"at most {self._decoder.dims['sequence'].maximum} in all, as the model was built for"
            remedy = "shorten it, or ask for a shorter answer"
            raise ArtifactError("the prompt", found, expected=expected, remedy=remedy)
        return min(DEFAULT_NEW_TOKENS, room) if wanted is None else wanted

    def _opened(self) -> tuple[Ids, Ids, Array, dict[str, OrtValue]]:
        """Tokens that the decoder reads first with their mask [B, S] and embeddings, and what it attends to across."""
        seen = self._seen()
        entry = self._generation
        if not entry.reads_across:
            ids, mask = _padded([prompt.token_ids for prompt in self._prompts])
            across = {name: value for name, value in seen.items() if CROSS in name}
            return ids, mask, self._embedded(ids, mask, seen), self._kept(across)
        encoder = self._graphs(ENCODER)
        ids, mask = _padded([prompt.token_ids for prompt in self._prompts], is_left=False)
        feed = {"input_ids": ids, "attention_mask": mask, **seen}
        if "inputs_embeds" in {spec.name for spec in encoder.entry.inputs}:
            feed["inputs_embeds"] = self._embedded(ids, mask, seen)
        found = encoder.run(feed)
        ids = np.tile(np.array(entry.start_tokens, np.int64), (len(ids), 1))
        return ids, np.ones_like(ids), self._embedded(ids, mask, {}), self._kept({**found, ENCODER_MASK: mask})

    def _kept(self, across: Mapping[str, Array]) -> dict[str, OrtValue]:
        """What the decoder reads in every step, by the names of its inputs, in ONNX Runtime's own memory."""
        from onnxruntime import OrtValue

        named = {name.replace(PRESENT, PAST, 1): value for name, value in across.items()}
        taken = {spec.name for spec in self._decoder.entry.inputs}
        return {name: OrtValue.ortvalue_from_numpy(value) for name, value in named.items() if name in taken}

    def _seen(self) -> dict[str, Array]:
        """What the encoder of images gives for all of them, in order; nothing where there are none."""
        pixels = [prompt.pixels for prompt in self._prompts if prompt.pixels is not None]
        if not pixels:
            return {}
        session = self._graphs(VISION)
        spec = session.entry.inputs[0]
        # The same numbers in the same order, whether the processor lays an image out as patches or as tiles.
        images = np.concatenate([one[spec.name].reshape(-1, *map(int, spec.shape[1:])) for one in pixels])
        return session.run({spec.name: images})

    def _embedded(self, ids: Ids, mask: Ids, seen: Mapping[str, Array]) -> Array:
        """Tokens as the decoder reads them, [B, S, D]: features of the images in their places."""
        embeds = self._graphs(EMBEDDING).run({"input_ids": ids})["inputs_embeds"]
        if not self._generation.image_tokens or "image_features" not in seen:
            return embeds
        features = seen["image_features"]
        places = (ids == self._generation.image_token) & (mask == 1)
        rows = features.reshape(-1, features.shape[-1])
        if len(rows) != int(places.sum()):
            found = f"has {int(places.sum())} places for features of images, and the images have {len(rows)}"
            raise ArtifactError("the prompt", found, expected="as many of either")
        embeds = embeds.copy()
        embeds[places] = rows.astype(embeds.dtype)
        return embeds

    def _step(
        self, embeds: Array, ids: Ids, mask: Ids, cache: Mapping[str, OrtValue]
    ) -> tuple[Array, dict[str, OrtValue]]:
        """Logits of the last token [B, V], and the cache for the next step."""
        from onnxruntime import OrtValue

        entry = self._decoder.entry
        taken = {spec.name for spec in entry.inputs}
        arrays = {"inputs_embeds": embeds, **placed(self._generation, mask, ids, embeds.shape[1])}
        arrays = {name: value for name, value in arrays.items() if name in taken}
        feed = {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        if embeds.shape[1] == mask.shape[1]:
            own = [spec for spec in entry.inputs if spec.name.startswith(PAST) and CROSS not in spec.name]
            feed |= {spec.name: OrtValue.ortvalue_from_numpy(_nothing(spec, len(mask))) for spec in own}
        logits, *present = self._decoder.session.run_with_ort_values(
            [spec.name for spec in entry.outputs], {**feed, **cache}
        )
        names = (spec.name.replace(PRESENT, PAST, 1) for spec in entry.outputs[1:])
        return np.asarray(logits.numpy())[:, -1], dict(zip(names, present, strict=True))


def _padded(rows: Sequence[Sequence[int]], *, is_left: bool = True) -> tuple[Ids, Ids]:
    """Token ids and their mask, [B, S]; shorter rows have zeros on their left, or for an encoder on their right."""
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        own = slice(length - len(row), None) if is_left else slice(len(row))
        ids[i, own], mask[i, own] = row, 1
    return ids, mask


def _nothing(spec: TensorEntry, batch: int) -> Array:
    """An entry of the cache before the first step."""
    sizes = {"batch": batch, "past": 0}
    shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
    return np.zeros(shape, dtype=np.dtype(spec.dtype))
