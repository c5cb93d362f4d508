"""A task bound to a program: the program that the task needs, and the workloads of its splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vlmopt.core.program import Program
from vlmopt.core.workload import Outputs, TrainableWorkload
from vlmopt.tasks.answers import Answer, Query, Slice
from vlmopt.tasks.dataset import Task
from vlmopt.tasks.feeding import Feeder
from vlmopt.tasks.kinds import (
    image_classification,
    image_text_retrieval,
    multi_task,
    text_generation,
    visual_question_answering,
    zero_shot_image_classification,
)
from vlmopt.tasks.specification import TaskKind
from vlmopt.tasks.splits import Sample

if TYPE_CHECKING:
    from vlmopt.preprocess import Preprocessor


class TaskWorkload(TrainableWorkload, Protocol):
    """A workload that can also report: what the final evaluation needs beside what profiling needs."""

    @property
    def metric(self) -> str:
        """The metric that decides; 100 times the mean of `item_scores`."""
        ...

    @property
    def item_groups(self) -> Sequence[str]:
        """The group of every item, for statistics that draw whole groups."""
        ...

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        """All metrics of the kind by name, in percent."""
        ...

    def queries(self) -> Sequence[Query]:
        """What is asked of the model, as a person reads it: a query an item, but for retrieval one for every image and
        one for every text."""
        ...

    def answers(self, outputs: Outputs) -> Sequence[Answer]:
        """The answer to every query."""
        ...

    def slices(self, outputs: Outputs) -> Sequence[Slice]:
        """Scores of the items that are alike, such as those of one label; slices may overlap."""
        ...


@dataclass(frozen=True)
class Kind:
    """What makes a kind of task: how a program is bound to it, and its workload."""

    bind: Callable[[Program, Task, Feeder], Program]
    workload: Callable[[Program, Task, Sequence[Sample], Feeder], TaskWorkload]


KINDS: Mapping[TaskKind, Kind] = {
    TaskKind.IMAGE_CLASSIFICATION: Kind(image_classification.bind, image_classification.workload),
    TaskKind.ZERO_SHOT: Kind(zero_shot_image_classification.bind, zero_shot_image_classification.workload),
    TaskKind.IMAGE_TEXT_RETRIEVAL: Kind(image_text_retrieval.bind, image_text_retrieval.workload),
    TaskKind.VISUAL_QUESTION_ANSWERING: Kind(visual_question_answering.bind, visual_question_answering.workload),
    TaskKind.IMAGE_TEXT_TO_TEXT: Kind(text_generation.bind, text_generation.workload),
    TaskKind.IMAGE_CAPTIONING: Kind(text_generation.bind, text_generation.workload),
    TaskKind.MULTI_TASK: Kind(image_classification.bind, multi_task.workload),
}


def bind(program: Program, task: Task, preprocessor: Preprocessor) -> Program:
    """The program of this task: only the components it needs, its head, its labels and the inputs it fixes.

    Image classification gets a head of zeros, which is to be fitted on the profile split (`head_targets`).

    Raises:
        TaskError: the model cannot do this kind of task, or the task's labels are not the model's.
    """
    return KINDS[task.specification.kind].bind(program, task, Feeder(preprocessor))


class TaskSource:
    """Gives the workloads of a task (a `WorkloadSource`); preprocessed images are shared among them."""

    def __init__(self, task: Task, preprocessor: Preprocessor, *, seed: int = 0) -> None:
        self.task = task
        self._feeder = Feeder(preprocessor)
        self._seed = seed

    def workload(self, program: Program, split: str, *, limit: int | None = None) -> TaskWorkload:
        """The workload of "profile" or "validation" for a bound program.

        Raises:
            SealedSplitError: the test split was asked for, or was opened before.
            TaskError: there is no such split, or an image does not decode.
        """
        samples = self.task.samples(split, limit=limit, seed=self._seed)
        return KINDS[self.task.specification.kind].workload(program, self.task, samples, self._feeder)

    def open_test(self, program: Program) -> TaskWorkload:
        """The workload of the test split, for the final evaluation; it seals the other splits."""
        samples = self.task.open_test()
        return KINDS[self.task.specification.kind].workload(program, self.task, samples, self._feeder)
