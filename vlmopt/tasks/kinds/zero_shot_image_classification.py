"""Zero-shot image classification: the class whose prompts are nearest to the image; the task fixes the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmopt.core.program import Program, Similarity
from vlmopt.core.workload import Outputs
from vlmopt.graph.similarity import class_embeddings, similarity_logits
from vlmopt.tasks.answers import Answer, Query, Slice, label_answers, label_queries, label_slices
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Batches, Feeder, reads_images
from vlmopt.tasks.kinds.image_text_retrieval import encoders
from vlmopt.tasks.mislabelling import mislabelled
from vlmopt.tasks.scoring import cross_entropy, is_right, percent, unit
from vlmopt.tasks.splits import Sample


def prompts(task: Task) -> list[str]:
    """Every prompt of every label, label-major: all prompts of the first label come first."""
    return [prompt.replace("{}", label) for label in task.labels for prompt in task.specification.class_prompts]


def bind(program: Program, task: Task, feeder: Feeder) -> Program:
    """The program with the inputs of its text encoder fixed to the tokens of all prompts, [L * P, Nt].

    Raises:
        TaskError: the model is not made of two encoders.
    """
    _, name, _ = encoders(program, task)
    component = program.components[name]
    feeds = feeder.feeds(program, component, images=(), texts=prompts(task))
    fixed = {spec.name: torch.cat([feed[spec.name] for feed in feeds]) for spec in component.inputs}
    bound = program.with_components(program.components)
    return replace(bound, fixed_inputs={**program.fixed_inputs, name: fixed}, labels=task.labels)


@dataclass(eq=False)
class ZeroShotImageClassification:
    """One split; an item is an image. Rows are images, and prompts as long as the program has a text encoder.

    Outputs of two components are embeddings, joined here by the similarity to each label's mean embedding; the output
    of one component (the text encoder is folded away) is the logits.
    """

    fingerprint: str
    n_items: int
    feeds: Mapping[str, Batches]
    image_component: str
    text_component: str | None
    similarity: Similarity
    targets: Tensor  # [n]
    labels: Sequence[str]
    samples: Sequence[Sample]
    item_groups: Sequence[str]
    text_groups: Sequence[str]
    metric: str = "accuracy"

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(self._logits(outputs), self.targets)

    def item_scores(self, outputs: Outputs) -> Tensor:
        return is_right(self._logits(outputs), self.targets)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        return {self.metric: percent(self.item_scores(outputs))}

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        if component not in self.feeds:
            return None
        is_folded = self.text_component is None  # then the component's output is logits, whose size matters
        return reference[component].double() if is_folded else unit(reference[component])

    def groups(self, component: str) -> Sequence[str]:
        return self.text_groups if component == self.text_component else self.item_groups

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        return items if component == self.image_component else range(len(self.text_groups))

    def part(self, items: Sequence[int]) -> ZeroShotImageClassification:
        feeds = {name: feeds.part(self.rows(name, items)) for name, feeds in self.feeds.items()}
        samples = [self.samples[item] for item in items]
        groups = [self.item_groups[item] for item in items]
        targets = self.targets[list(items)]
        return replace(self, n_items=len(items), feeds=feeds, targets=targets, samples=samples, item_groups=groups)

    def with_wrong_labels(self, share: float, *, seed: int) -> ZeroShotImageClassification:
        return replace(self, targets=mislabelled(self.targets, len(self.labels), share, seed=seed))

    def queries(self) -> Sequence[Query]:
        return label_queries(self.samples)

    def answers(self, outputs: Outputs) -> Sequence[Answer]:
        return label_answers(self._logits(outputs), self.targets, self.labels)

    def slices(self, outputs: Outputs) -> Sequence[Slice]:
        return label_slices(self.samples, self.item_scores(outputs))

    def _logits(self, outputs: Outputs) -> Tensor:
        if len(outputs) == 1:
            (logits,) = outputs.values()
            return logits.double()
        others = [value for name, value in outputs.items() if name != self.image_component]
        classes = class_embeddings(others[0].double(), len(self.labels))
        return similarity_logits(outputs[self.image_component].double(), classes, self.similarity)


def workload(program: Program, task: Task, samples: Sequence[Sample], feeder: Feeder) -> ZeroShotImageClassification:
    """The workload of these samples; `program` comes from `bind`, with or without its text encoder."""
    image_component = next(name for name, part in program.components.items() if reads_images(part))
    text_component = next((name for name in program.components if name != image_component), None)
    images = [sample.image for sample in samples]
    feeds = {image_component: feeder.feeds(program, program.components[image_component], images=images, texts=())}
    n_prompts = 0
    if text_component is not None:
        fixed = program.fixed_inputs.get(text_component)  # an artifact that kept its text encoder does not hold them
        if fixed is None:
            texts = prompts(task)
            feeds[text_component] = feeder.feeds(program, program.components[text_component], images=(), texts=texts)
        else:
            feeds[text_component] = _fixed_feeds(fixed)
        n_prompts = feeds[text_component].n_rows // len(program.labels)
    return ZeroShotImageClassification(
        fingerprint=task.fingerprint_of(samples),
        n_items=len(samples),
        feeds=feeds,
        image_component=image_component,
        text_component=text_component,
        similarity=program.similarity or Similarity(1.0),
        targets=torch.tensor([program.labels.index(sample.label) for sample in samples]),
        labels=program.labels,
        samples=samples,
        item_groups=[sample.group for sample in samples],
        text_groups=[label for label in program.labels for _ in range(n_prompts)],
    )


def _fixed_feeds(inputs: Mapping[str, Tensor]) -> Batches:
    n_rows = len(next(iter(inputs.values())))
    return Batches(n_rows, lambda rows: {name: value[list(rows)] for name, value in inputs.items()})
