"""Visual question answering over a closed list of answers: a fused model as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmopt.core.errors import TaskError
from vlmopt.core.program import Assembly, Program
from vlmopt.core.workload import Outputs
from vlmopt.tasks.answers import Answer, Query, Slice, label_answers, label_queries, question_slices
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Batches, Feeder, reads_images, reads_texts
from vlmopt.tasks.mislabelling import mislabelled
from vlmopt.tasks.scoring import cross_entropy, is_right, percent
from vlmopt.tasks.splits import Sample

_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named


def bind(program: Program, task: Task, feeder: Feeder) -> Program:
    """The program with its answers named.

    Raises:
        TaskError: the model is not one fused graph, the answers are not its classes, or a sample has another answer.
    """
    readers = [part for part in program.components.values() if reads_images(part) and reads_texts(part)]
    if program.assembly is not Assembly.FUSED or len(program.components) != 1 or not readers:
        found = f"visual-question-answering needs a fused model, and this {program.source.model_type} model is not one"
        raise TaskError(str(task.path), found, remedy="choose a model that reads image and question together")
    labels = _answers(program, task, n_classes=readers[0].outputs[0].shape[-1])
    task.check_labels(labels)
    return replace(program.with_components(program.components), labels=labels)


def _answers(program: Program, task: Task, *, n_classes: int | str) -> tuple[str, ...]:
    names = tuple(label for label in program.labels if not _UNNAMED.fullmatch(label))
    place = f"{task.path}: labels"
    if not task.labels and not names:
        remedy = "list them in the order of the model's classes"
        raise TaskError(place, "neither the task nor the model's configuration names the answers", remedy=remedy)
    labels = task.labels or names
    if len(labels) != n_classes:
        raise TaskError(place, f"{len(labels)} answers", expected=f"{n_classes}, one for each class of the model")
    if names and labels != names:
        at = next(index for index, (ours, its) in enumerate(zip(labels, names, strict=False)) if ours != its)
        remedy = "leave `labels:` out to take the model's own"
        raise TaskError(
            place, f"answer {at} is {labels[at]!r}", expected=f"{names[at]!r}, as in the model", remedy=remedy
        )
    return labels


@dataclass(eq=False)
class VisualQuestionAnswering:
    """One split; an item is a question about an image, and so is a row of the only component."""

    fingerprint: str
    n_items: int
    feeds: Mapping[str, Batches]
    component: str
    targets: Tensor  # [n]
    labels: Sequence[str]
    samples: Sequence[Sample]
    item_groups: Sequence[str]
    metric: str = "accuracy"

    def losses(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs[self.component], self.targets)

    def item_scores(self, outputs: Outputs) -> Tensor:
        return is_right(outputs[self.component], self.targets)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        return {self.metric: percent(self.item_scores(outputs))}

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        return reference[component].double() if component == self.component else None

    def groups(self, component: str) -> Sequence[str]:
        return self.item_groups

    def rows(self, component: str, items: Sequence[int]) -> Sequence[int]:
        return items

    def part(self, items: Sequence[int]) -> VisualQuestionAnswering:
        feeds = {name: feeds.part(items) for name, feeds in self.feeds.items()}
        samples = [self.samples[item] for item in items]
        groups = [self.item_groups[item] for item in items]
        targets = self.targets[list(items)]
        return replace(self, n_items=len(items), feeds=feeds, targets=targets, samples=samples, item_groups=groups)

    def with_wrong_labels(self, share: float, *, seed: int) -> VisualQuestionAnswering:
        return replace(self, targets=mislabelled(self.targets, len(self.labels), share, seed=seed))

    def queries(self) -> Sequence[Query]:
        return label_queries(self.samples)

    def answers(self, outputs: Outputs) -> Sequence[Answer]:
        return label_answers(outputs[self.component], self.targets, self.labels)

    def slices(self, outputs: Outputs) -> Sequence[Slice]:
        return question_slices(self.samples, self.item_scores(outputs))


def workload(program: Program, task: Task, samples: Sequence[Sample], feeder: Feeder) -> VisualQuestionAnswering:
    """The workload of these samples; `program` comes from `bind`, whatever passes did to it since."""
    (name,) = program.components
    images, questions = [sample.image for sample in samples], [sample.text for sample in samples]
    return VisualQuestionAnswering(
        fingerprint=task.fingerprint_of(samples),
        n_items=len(samples),
        feeds={name: feeder.feeds(program, program.components[name], images=images, texts=questions)},
        component=name,
        targets=torch.tensor([program.labels.index(sample.label) for sample in samples]),
        labels=program.labels,
        samples=samples,
        item_groups=[sample.group for sample in samples],
    )
