"""An artifact as a model: images and texts in, labels, answers or similarities out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmopt.core.errors import ArtifactError
from vlmopt.core.labels import label_blocks
from vlmopt.core.manifest import MULTI_TASK, Manifest, read_manifest, size_problems
from vlmopt.core.session_choice import Optimization, choice_for_here
from vlmopt.preprocess import Preprocessor
from vlmopt.runtime.adapters import Weights, adapter_weights
from vlmopt.runtime.answering import Answer, Answering, Picture, Request, answered
from vlmopt.runtime.sampling import Sampling
from vlmopt.runtime.session import Session, open_session

Scores = list[list[tuple[str, float]]]  # for every item: labels with probabilities, the most probable first

IMAGE_INPUTS = frozenset({"pixel_values", "pixel_mask", "pixel_attention_mask", "spatial_shapes"})
BATCH = 32


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """The artifact in a directory, ready to be called; its graphs are opened on first use.

    Args:
        adapter: which of its adapters to use, by name, or the file of another one; `none` for the model without any. By
            default the one that its graphs hold.
        threads: threads of ONNX Runtime; by default it takes one for each core, or as many as `vlmopt device tune`
            found fastest for the artifact on this machine.
        providers: execution providers of ONNX Runtime, by their own names; by default the CPU.

    Raises:
        ArtifactError: the directory is no artifact, a file in it is missing or has another size, or it cannot take the
            adapter.
        ModelError: the adapter's file is corrupt.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    problems = size_problems(folder, manifest.files)
    if problems:
        raise ArtifactError(f"{folder}/{problems[0]}", "the artifact is damaged", remedy="emit or copy it again")
    weights = {} if adapter is None else adapter_weights(folder, manifest, adapter)
    tuned = choice_for_here(folder) if threads is None and providers is None else None
    model = Model(folder, manifest, threads, None if providers is None else tuple(providers), weights)
    return model if tuned is None else replace(model, threads=tuned.threads, optimization=tuned.optimization)


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded artifact."""

    folder: Path
    manifest: Manifest
    threads: int | None = None
    providers: tuple[str, ...] | None = None
    weights: Weights = field(default_factory=dict, repr=False)  # of another adapter than the one in the graphs
    optimization: Optimization = "all"
    _sessions: dict[str, Session] = field(default_factory=dict, repr=False)

    def __call__(
        self, images: Sequence[Picture] | None = None, texts: Sequence[str] | None = None
    ) -> Scores | NDArray[Any]:
        """What the artifact says of the inputs: labels for images, answers to questions, similarities, or embeddings.

        Raises:
            ArtifactError: the artifact needs another combination of inputs.
        """
        if self.manifest.generation is not None:
            remedy = "call generate(prompt, images)"
            raise ArtifactError(str(self.folder), "writes its answers token by token", remedy=remedy)
        if images and texts:
            if self._is_dual:
                return self.similarity(images, texts)
            return self.answer(images, texts) if self.manifest.labels else self.match(images, texts)
        if images:
            return self.classify(images) if self.manifest.labels else self._only(images=images)
        if texts:
            return self._only(texts=texts)
        raise ArtifactError(str(self.folder), "nothing to run on", expected="images, texts, or both")

    def classify(self, images: Sequence[Picture]) -> Scores:
        """For every image, the labels with their probabilities, the most probable first.

        An artifact for several tasks answers each: first the most probable label of every task, then the seconds.
        """
        if not self.manifest.labels:
            raise ArtifactError(str(self.folder), "has no labels", remedy="ask for similarity with texts of your own")
        if self._is_dual:
            return self._ranked(self._compared(self._embedded(images=images), self._classes))
        return self._ranked(self._first(self._component(has_images=True, has_texts=False), images=images))

    def answer(self, images: Sequence[Picture], questions: Sequence[str]) -> Scores:
        """For every image and its question, the answers with their probabilities, the most probable first.

        One image may come with several questions, or one question with several images.
        """
        if not self.manifest.labels:
            raise ArtifactError(str(self.folder), "has no answer list")
        return self._ranked(self.match(images, questions))

    def similarity(self, images: Sequence[Picture], texts: Sequence[str]) -> NDArray[Any]:
        """Logits of every image with every text, [n_images, n_texts]."""
        if not self._is_dual:
            raise ArtifactError(
                str(self.folder), f"is {self.manifest.assembly}", expected="an artifact of two encoders"
            )
        return self._compared(self._embedded(images=images), self._embedded(texts=texts))

    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> NDArray[Any]:
        """Logits of every image with the text at the same place, [n, n_classes]."""
        n = max(len(images), len(texts))
        if not (len(images) in (1, n) and len(texts) in (1, n)):
            raise ArtifactError(
                "inputs", f"{len(images)} images and {len(texts)} texts", expected="as many, or one of either"
            )
        pictures = list(images) * (n if len(images) == 1 else 1)
        sentences = list(texts) * (n if len(texts) == 1 else 1)
        return self._first(self._component(has_images=True, has_texts=True), images=pictures, texts=sentences)

    def generate(
        self,
        prompt: str = "",
        images: Sequence[Picture] | Picture = (),
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        repetition_penalty: float | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """What the model writes behind a prompt with images, greedy unless a temperature is given (`Sampling`).

        Args:
            prompt: may be left out for a model that describes images unasked.
            max_new_tokens: 128 by default, or as many as the model has room for.
            on_text: is given every piece of the answer as it comes.

        Raises:
            ArtifactError: the artifact writes no answers, or the prompt is empty or too long.
            TaskError: an image does not decode, or the prompt has places for another number of images.
        """
        pictures = [images] if isinstance(images, Image.Image | str | Path) else images
        sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty)
        answering = self.answering([Request(prompt, pictures, system)], sampling, max_new_tokens)
        (answer,) = answered(answering, None if on_text is None else lambda _, piece: on_text(piece))
        return answer

    def answering(
        self, requests: Sequence[Request], sampling: Sampling | None = None, max_new_tokens: int | None = None
    ) -> Answering:
        """A batch of requests, to be answered side by side, step by step.

        Raises:
            ArtifactError: the artifact writes no answers.
        """
        generation = self.manifest.generation
        if generation is None:
            found = f"is {self.manifest.assembly}, and writes no text"
            raise ArtifactError(str(self.folder), found, expected="an artifact of a generative model")
        return Answering(self._session, generation, self.preprocessor, requests, sampling or Sampling(), max_new_tokens)

    def warm_up(self) -> None:
        """Loads graphs, tokenizer and image processor, so that the first call takes no longer than others."""
        for name in self.manifest.components:
            self._session(name)
        self.preprocessor.warm_up()

    def outputs(self, component: str, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The named outputs of one graph on arrays, unpreprocessed.

        Raises:
            ArtifactError: no such graph, or an input is missing or of the wrong type or shape.
        """
        return self._session(component).run(feed)

    @cached_property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor.load(self.folder)

    @property
    def _is_dual(self) -> bool:
        return self.manifest.assembly == "dual" and self.manifest.similarity is not None

    def _session(self, name: str) -> Session:
        if name in self._sessions:
            return self._sessions[name]
        entry = self.manifest.components.get(name)
        if entry is None:
            raise ArtifactError(
                str(self.folder), f"has no graph {name!r}", expected=", ".join(self.manifest.components)
            )
        if "onnx" not in entry.files:
            formats = ", ".join(entry.files)
            raise ArtifactError(str(self.folder), f"holds {name} as {formats} only", remedy="emit it with --emit onnx")
        opened = open_session(
            self.folder / entry.files["onnx"],
            threads=self.threads,
            providers=self.providers,
            weights=self.weights.get(name),
            optimization=self.optimization,
        )
        return self._sessions.setdefault(name, Session(name, entry, self.manifest.dims, opened))

    def _component(self, *, has_images: bool, has_texts: bool) -> str:
        for name, entry in self.manifest.components.items():
            names = {spec.name for spec in entry.inputs}
            if bool(names & IMAGE_INPUTS) == has_images and bool(names - IMAGE_INPUTS) == has_texts:
                return name
        wanted = " and ".join(word for word, is_wanted in (("images", has_images), ("texts", has_texts)) if is_wanted)
        raise ArtifactError(str(self.folder), f"no graph takes {wanted} alone", expected=self._what_it_takes())

    def _what_it_takes(self) -> str:
        return "; ".join(
            f"{name}: {', '.join(spec.name for spec in entry.inputs)}"
            for name, entry in self.manifest.components.items()
        )

    def _only(self, *, images: Sequence[Picture] = (), texts: Sequence[str] = ()) -> NDArray[Any]:
        return self._first(self._component(has_images=bool(images), has_texts=bool(texts)), images=images, texts=texts)

    def _embedded(self, *, images: Sequence[Picture] = (), texts: Sequence[str] = ()) -> NDArray[Any]:
        return _normalized(self._only(images=images, texts=texts))

    def _first(self, component: str, *, images: Sequence[Picture] = (), texts: Sequence[str] = ()) -> NDArray[Any]:
        """The first output, in batches: memory stays bounded however many images there are."""
        session, n = self._session(component), max(len(images), len(texts))
        if n == 0:
            raise ArtifactError("inputs", "there are none", expected="at least one")
        encoded = self._encoded(session, texts)
        step = min(BATCH, self._largest_batch(session))
        found = []
        for start in range(0, n, step):
            feed = {name: array[start : start + step] for name, array in encoded.items()}
            if images:
                feed.update(self.preprocessor.images(list(images[start : start + step])))
            found.append(session.run(feed)[session.entry.outputs[0].name])
        return np.concatenate(found)

    def _encoded(self, session: Session, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Token arrays at a length that the graph takes."""
        if not texts:
            return {}
        arrays = self.preprocessor.texts(texts)
        sizes = [
            spec.shape[1] for spec in session.entry.inputs if spec.name not in IMAGE_INPUTS and len(spec.shape) > 1
        ]
        if not sizes:
            return arrays
        low, high = self._bounds(sizes[0])
        found = int(arrays["input_ids"].shape[1])
        return arrays if low <= found <= high else self.preprocessor.texts(texts, length=min(max(found, low), high))

    def _largest_batch(self, session: Session) -> int:
        return min(self._bounds(spec.shape[0])[1] for spec in session.entry.inputs)

    def _bounds(self, size: int | str) -> tuple[int, int]:
        if isinstance(size, int):
            return size, size
        return self.manifest.dims[size].minimum, self.manifest.dims[size].maximum

    @cached_property
    def _classes(self) -> NDArray[Any]:
        """One unit vector a label, the mean over its prompts."""
        prompts, n = self.manifest.prompts, len(self.manifest.labels)
        if not prompts or len(prompts) % n:
            raise ArtifactError(
                str(self.folder), f"{len(prompts)} prompts for {n} labels", expected="as many for each label"
            )
        embedded = self._embedded(texts=prompts)
        return _normalized(embedded.reshape(n, -1, embedded.shape[-1]).mean(axis=1))

    def _compared(self, images: NDArray[Any], texts: NDArray[Any]) -> NDArray[Any]:
        similarity = self.manifest.similarity
        if similarity is None:
            raise ArtifactError(str(self.folder), "states no similarity", remedy="emit the artifact again")
        return np.asarray(similarity.scale * (images @ texts.T) + similarity.bias, dtype=images.dtype)

    def _ranked(self, logits: NDArray[Any]) -> Scores:
        labels = self.manifest.labels
        if logits.shape[-1] != len(labels):
            raise ArtifactError(str(self.folder), f"{logits.shape[-1]} scores for {len(labels)} labels")
        blocks = list(label_blocks(labels).values()) if self.manifest.task == MULTI_TASK else [range(len(labels))]
        return [_of_all_tasks([_ranked_block(labels, row, block) for block in blocks]) for row in logits]


def _ranked_block(labels: Sequence[str], logits: NDArray[Any], block: range) -> list[tuple[str, float]]:
    """The labels of one task with their probabilities among themselves, the most probable first."""
    scores = logits[block.start : block.stop].astype(np.float64)
    scores = np.exp(scores - scores.max())
    probabilities = scores / scores.sum()
    return [
        (labels[block.start + i], float(probabilities[i])) for i in np.argsort(-probabilities, kind="stable").tolist()
    ]


def _of_all_tasks(ranked: Sequence[Sequence[tuple[str, float]]]) -> list[tuple[str, float]]:
    """The answer to every task, then every task's second label, and so on."""
    return [pair for places in zip_longest(*ranked) for pair in places if pair is not None]


def _normalized(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of length one, [n, D]."""
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=rows.dtype)
