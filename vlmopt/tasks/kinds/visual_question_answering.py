"""Visual question answering over a closed list of answers: a fused model as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmopt.core.errors import TaskError
from vlmopt.core.program import Assembly, Program
from vlmopt.core.workload import Outputs
from vlmopt.tasks.answers import Slice, question_slices
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Feeder, reads_images, reads_texts
from vlmopt.tasks.labelled_items import LabelledItems
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


class VisualQuestionAnswering(LabelledItems):
    """One split; an item is a question about an image. A head is fitted to what the original answers."""

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        return reference[component].double() if component == self.component else None

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
