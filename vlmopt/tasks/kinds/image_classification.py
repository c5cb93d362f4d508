"""Image classification: a linear head on the image encoder, fitted in closed form by whoever consumes the workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.core.errors import TaskError
from vlmopt.core.program import Assembly, Component, Program
from vlmopt.core.workload import Outputs
from vlmopt.graph.head import append_head, find_head, fitted_linear, head_module, replace_head
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Feeder, reads_images, reads_texts
from vlmopt.tasks.labelled_items import LabelledItems
from vlmopt.tasks.splits import Sample

HEAD = "task_head"
LOGITS = "logits"


def bind(program: Program, task: Task, feeder: Feeder) -> Program:
    """The image encoder alone, with a Linear of zeros from its features to the labels.

    The head takes the place of the projection into the shared embedding space where there is one: a linear map behind a
    linear map can only lose.

    Raises:
        TaskError: the model writes text, no component reads images alone, or its output is no vector an image.
    """
    if program.assembly is Assembly.GENERATIVE:
        found = f"image-classification chooses among labels, and this {program.source.model_type} model writes text"
        raise TaskError(str(task.path), found, remedy="ask it as image-text-to-text")
    name = _image_encoder(program, task)
    component = program.components[name]
    head = program.heads.get(name)
    if head is not None:
        linear = _zeros(len(task.labels), head_module(component, head).in_features)
        bound = replace_head(component, head, HEAD, linear, LOGITS)
    else:
        bound = append_head(component, HEAD, _zeros(len(task.labels), _width(component, task)), LOGITS)
    used = {size for spec in (*bound.inputs, *bound.outputs) for size in spec.shape}
    return replace(
        program,
        assembly=Assembly.FUSED,
        components={name: bound},
        dims={size: dim for size, dim in program.dims.items() if size in used},
        similarity=None,
        heads={name: find_head(bound) or HEAD},
        fixed_inputs={},
        labels=task.labels,
    )


def _image_encoder(program: Program, task: Task) -> str:
    for name, component in program.components.items():
        if reads_images(component) and not reads_texts(component):
            return name
    found = f"image-classification needs an encoder of images alone, and this {program.source.model_type} has none"
    raise TaskError(str(task.path), found, remedy="choose a model of two encoders, or ask it as questions")


def _width(component: Component, task: Task) -> int:
    shape = component.outputs[0].shape
    if len(shape) == 2 and isinstance(shape[1], int):
        return shape[1]
    found = f"the first output of {component.name} has shape {list(shape)}"
    raise TaskError(str(task.path), found, expected="one vector of fixed width an image")


def _zeros(n_labels: int, width: int) -> torch.nn.Linear:
    return fitted_linear(torch.zeros(n_labels, width), torch.zeros(n_labels), like=torch.zeros(0))


class ImageClassification(LabelledItems):
    """One split; an item is an image, and its label is what the head is fitted to."""

    def head_targets(self, component: str, reference: Outputs) -> Tensor | None:
        return F.one_hot(self.targets, len(self.labels)).double() if component == self.component else None


def workload(program: Program, task: Task, samples: Sequence[Sample], feeder: Feeder) -> ImageClassification:
    """The workload of these samples; `program` comes from `bind`, whatever passes did to it since."""
    (name,) = program.components
    images = [sample.image for sample in samples]
    return ImageClassification(
        fingerprint=task.fingerprint_of(samples),
        n_items=len(samples),
        feeds={name: feeder.feeds(program, program.components[name], images=images, texts=())},
        component=name,
        targets=torch.tensor([program.labels.index(sample.label) for sample in samples]),
        labels=program.labels,
        samples=samples,
        item_groups=[sample.group for sample in samples],
    )
