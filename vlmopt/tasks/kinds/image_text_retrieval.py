"""Image-text retrieval: find the text of an image among all texts, and the image of a text among all images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from vlmopt.core.errors import TaskError
from vlmopt.core.program import Assembly, Program, Similarity
from vlmopt.core.workload import Outputs
from vlmopt.tasks.answers import NO_ANSWER, Answer, Query, Slice
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Batches, Feeder, reads_images, reads_texts
from vlmopt.tasks.mislabelling import chosen_items
from vlmopt.tasks.scoring import Pairs, contrastive_losses, nearest, percent, ranks, unit
from vlmopt.tasks.splits import Sample

CUTS = (1, 5, 10)
_FIND_TEXT, _FIND_IMAGE = "image to text", "text to image"


def encoders(program: Program, task: Task) -> tuple[str, str, Similarity]:
    """Names of the component that reads images and of the one that reads texts, and how they are joined.

    Raises:
        TaskError: the model is not made of two encoders.
    """
    images = [name for name, part in program.components.items() if reads_images(part) and not reads_texts(part)]
    texts = [name for name, part in program.components.items() if reads_texts(part) and not reads_images(part)]
    if program.assembly is Assembly.DUAL and images and texts and program.similarity is not None:
        return images[0], texts[0], program.similarity
    kind = task.specification.kind.value
    found = f"{kind} needs two encoders in one space, and this {program.source.model_type} model is no such model"
    raise TaskError(str(task.path), found, remedy="choose a dual encoder (CLIP, SigLIP, VisionTextDualEncoder)")


def bind(program: Program, task: Task, feeder: Feeder) -> Program:
    """The program as it is, for a model of two encoders.

    Raises:
        TaskError: the model is not made of two encoders.
    """
    encoders(program, task)
    return program.with_components(program.components)


@dataclass(eq=False)
class ImageTextRetrieval:
    """One split. Rows are the unique images and the unique texts; an item is a pair of an image and its text.

    An image is a hit when any of its texts is among the first k of all texts, a text when any of its images is. A pair
    scores the mean of its image's hit and its text's hit. Where every image has as many texts as the others, and every
    text as many images, the mean over pairs is the mean of both recalls.
    """

    fingerprint: str
    n_items: int
    feeds: Mapping[str, Batches]
    image_component: str
    text_component: str
    similarity: Similarity
    pairs: Pairs
    item_groups: Sequence[str]
    row_groups: Mapping[str, Sequence[str]]
    metric: str
    samples: Sequence[Sample]  # one a pair

    def losses(self, outputs: Outputs) -> Tensor:
        return contrastive_losses(*self._embeddings(outputs), self.pairs, self.similarity)

    def item_scores(self, outputs: Outputs) -> Tensor:
        return self._scores(*ranks(*self._embeddings(outputs), self.pairs), k=self._cut)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        image_ranks, text_ranks = ranks(*self._embeddings(outputs), self.pairs)
        result = {f"recall@{k}": percent(self._scores(image_ranks, text_ranks, k=k)) for k in CUTS}
        for direction, found in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
            result |= {f"{direction}_recall@{k}": percent((found < k).double()) for k in CUTS}
        return result

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        return unit(reference[component]) if component in self.row_groups else None

    def groups(self, component: str) -> Sequence[str]:
        return self.row_groups[component]

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        known = self.pairs.image if component == self.image_component else self.pairs.text
        return list(dict.fromkeys(known[list(items)].tolist()))

    def part(self, items: Sequence[int]) -> ImageTextRetrieval:
        samples = [self.samples[item] for item in items]
        rows = {name: self.rows(name, items) for name in self.feeds}
        return replace(
            self,
            n_items=len(items),
            feeds={name: feeds.part(rows[name]) for name, feeds in self.feeds.items()},
            pairs=Pairs.of([(sample.image.name, sample.text) for sample in samples]),
            item_groups=[self.item_groups[item] for item in items],
            row_groups={name: [self.row_groups[name][row] for row in own] for name, own in rows.items()},
            samples=samples,
        )

    def with_wrong_labels(self, share: float, *, seed: int) -> ImageTextRetrieval:
        """The texts of the chosen pairs change places among them."""
        items = chosen_items(self.n_items, share, seed=seed)
        texts = self.pairs.text.index_copy(0, items, self.pairs.text[items.roll(1)])
        return replace(self, pairs=replace(self.pairs, text=texts))

    def queries(self) -> Sequence[Query]:
        """Every image asks for its text, then every text for its image."""
        by_image = _partners((sample.image.name, sample.text) for sample in self.samples)
        by_text = _partners((sample.text, sample.image.name) for sample in self.samples)
        pictures = {sample.image.name: sample.image for sample in self.samples}
        groups = self.row_groups[self.image_component], self.row_groups[self.text_component]
        queries = [
            Query(name, "", _listed(texts), pictures[name], _FIND_TEXT, group)
            for (name, texts), group in zip(by_image.items(), groups[0], strict=True)
        ]
        return queries + [
            Query(text, text, _listed(names), pictures[names[0]], _FIND_IMAGE, group)
            for (text, names), group in zip(by_text.items(), groups[1], strict=True)
        ]

    def answers(self, outputs: Outputs) -> Sequence[Answer]:
        """The first match of every query; it is right where a right one is among the first k."""
        embeddings = self._embeddings(outputs)
        images = list(dict.fromkeys(sample.image.name for sample in self.samples))
        texts = list(dict.fromkeys(sample.text for sample in self.samples))
        directions = zip(ranks(*embeddings, self.pairs), nearest(*embeddings, self.pairs), (texts, images), strict=True)
        return [
            self._answer(names[first] if first >= 0 else NO_ANSWER, rank)
            for found, firsts, names in directions
            for rank, first in zip(found.int().tolist(), firsts.tolist(), strict=True)
        ]

    def slices(self, outputs: Outputs) -> Sequence[Slice]:
        """Both directions of the search, every pair in each."""
        image_ranks, text_ranks = ranks(*self._embeddings(outputs), self.pairs)
        rows = range(self.n_items)
        return [
            Slice(_FIND_TEXT, rows, (image_ranks < self._cut).double()[self.pairs.image]),
            Slice(_FIND_IMAGE, rows, (text_ranks < self._cut).double()[self.pairs.text]),
        ]

    @property
    def _cut(self) -> int:
        return int(self.metric.partition("@")[2])

    def _answer(self, first: str, rank: int) -> Answer:
        note = "" if self._cut == 1 else f"the first right one comes at place {rank + 1}"
        return Answer(first, rank < self._cut, note)

    def _embeddings(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        return outputs[self.image_component], outputs[self.text_component]

    def _scores(self, image_ranks: Tensor, text_ranks: Tensor, *, k: int) -> Tensor:
        hits = (image_ranks < k).double()[self.pairs.image] + (text_ranks < k).double()[self.pairs.text]
        return hits / 2


def _partners(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for first, second in pairs:
        found.setdefault(first, []).append(second)
    return found


def _listed(names: Sequence[str]) -> str:
    """The first name, and how many more are right."""
    return names[0] if len(names) == 1 else f"{names[0]} (or one of {len(names) - 1} more)"


def workload(program: Program, task: Task, samples: Sequence[Sample], feeder: Feeder) -> ImageTextRetrieval:
    """The workload of these samples; a pair that is listed twice counts once."""
    image_component, text_component, similarity = encoders(program, task)
    unique = list({(sample.image.name, sample.text): sample for sample in reversed(samples)}.values())[::-1]
    by_image = {sample.image.name: sample for sample in reversed(unique)}
    by_text = {sample.text: sample for sample in reversed(unique)}
    image_names = list(dict.fromkeys(sample.image.name for sample in unique))
    texts = list(dict.fromkeys(sample.text for sample in unique))
    images = [by_image[name].image for name in image_names]
    parts = program.components
    return ImageTextRetrieval(
        fingerprint=task.fingerprint_of(samples),
        n_items=len(unique),
        feeds={
            image_component: feeder.feeds(program, parts[image_component], images=images, texts=()),
            text_component: feeder.feeds(program, parts[text_component], images=(), texts=texts),
        },
        image_component=image_component,
        text_component=text_component,
        similarity=similarity,
        pairs=Pairs.of([(sample.image.name, sample.text) for sample in unique]),
        item_groups=[sample.group for sample in unique],
        row_groups={
            image_component: [by_image[name].group for name in image_names],
            text_component: [by_text[text].group for text in texts],
        },
        metric=task.specification.headline,
        samples=unique,
    )
