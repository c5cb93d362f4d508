"""task.yaml: what a task is, where its data lies, and which columns play which role."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vlmopt.core.errors import TaskError
from vlmopt.core.manifest import MULTI_TASK
from vlmopt.recipe.yaml_file import read_yaml

TASK_FILE = "task.yaml"
HUB_PREFIX = "hub:"
VQA_ACCURACY = "vqa-accuracy"
QUESTION_PLACE = "{}"


class TaskKind(Enum):
    """What is asked of the model."""

    IMAGE_TEXT_RETRIEVAL = "image-text-retrieval"
    ZERO_SHOT = "zero-shot-image-classification"
    IMAGE_CLASSIFICATION = "image-classification"
    VISUAL_QUESTION_ANSWERING = "visual-question-answering"
    IMAGE_TEXT_TO_TEXT = "image-text-to-text"
    IMAGE_CAPTIONING = "image-captioning"
    MULTI_TASK = MULTI_TASK

    @property
    def is_written(self) -> bool:
        """The answer is a text that the model writes, and may have several references."""
        return self in (TaskKind.IMAGE_TEXT_TO_TEXT, TaskKind.IMAGE_CAPTIONING)


METRICS: Mapping[TaskKind, tuple[str, ...]] = {  # the first is the default
    TaskKind.IMAGE_TEXT_RETRIEVAL: ("recall@1", "recall@5", "recall@10"),
    TaskKind.ZERO_SHOT: ("accuracy",),
    TaskKind.IMAGE_CLASSIFICATION: ("accuracy",),
    TaskKind.VISUAL_QUESTION_ANSWERING: ("accuracy",),
    TaskKind.IMAGE_TEXT_TO_TEXT: ("exact-match", VQA_ACCURACY, "anls", "token-f1"),
    TaskKind.IMAGE_CAPTIONING: ("cider-d", "bleu-4"),
    TaskKind.MULTI_TASK: ("accuracy",),
}
ROLES: Mapping[TaskKind, tuple[str, ...]] = {  # the columns that a kind cannot do without, beside the image
    TaskKind.IMAGE_TEXT_RETRIEVAL: ("text",),
    TaskKind.ZERO_SHOT: ("label",),
    TaskKind.IMAGE_CLASSIFICATION: ("label",),
    TaskKind.VISUAL_QUESTION_ANSWERING: ("question", "answer"),
    TaskKind.IMAGE_TEXT_TO_TEXT: ("question", "answer"),
    TaskKind.IMAGE_CAPTIONING: ("text",),
    TaskKind.MULTI_TASK: (),
}
DEFAULT_PROMPTS = ("a photo of a {}.",)  # the prompt that CLIP was published with


def as_text(value: object) -> object:
    """A label as text: 3 is "3", true is "true"; what is neither text, number nor boolean stays as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def closest(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?` for a misspelled word, or an empty text when nothing known comes near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def _texts(value: object) -> object:
    return tuple(as_text(item) for item in value) if isinstance(value, list | tuple) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Columns(_Strict):
    """The data's own name for every role; `image` is `file_name` in a folder and `image` on the hub when not given.

    `rejected` is a wrong answer beside the expected one, for tuning by preference; rows may leave it empty (null).
    """

    image: str | None = None
    label: str = "label"
    text: str = "text"
    question: str = "question"
    answer: str = "answer"
    rejected: str | None = None
    split: str | None = None
    group: str | None = None


class Splits(_Strict):
    """How data that comes without splits is divided; the fractions are of groups and add up to 1."""

    seed: int = 0
    profile: Fraction = 0.5
    validation: Fraction = 0.2
    test: Fraction = 0.3

    @model_validator(mode="after")
    def _adds_up(self) -> Splits:
        total = self.profile + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"profile + validation + test is {total:g}, expected 1")
        return self


class TaskSpecification(_Strict):
    """The content of task.yaml, checked. `labels` and `prompts` are empty where the file leaves them to the data.

    `prompt` and `max_new_tokens` belong to the kinds whose answers are written: what is asked of an image (around the
    question, at its `{}`), and how many tokens an answer may have.

    `tasks` are the folders of a multi-task's members. With `combine: worst` every member is held to the bound on the
    drop by itself; with `weighted` their weighted mean is.
    """

    kind: Annotated[TaskKind, Field(strict=False)]
    name: str = Field(min_length=1)
    data: str = "."
    columns: Columns = Columns()
    labels: Texts = ()
    prompts: Texts = ()
    prompt: str = ""
    max_new_tokens: PositiveInt | None = None
    metric: str = ""
    splits: Splits = Splits()
    tasks: Texts = ()
    combine: Literal["worst", "weighted"] = "worst"
    weights: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = ()

    @property
    def is_hub(self) -> bool:
        return self.data.startswith(HUB_PREFIX)

    @property
    def headline(self) -> str:
        """The metric that decides."""
        return self.metric or METRICS[self.kind][0]

    @property
    def class_prompts(self) -> tuple[str, ...]:
        return self.prompts or DEFAULT_PROMPTS

    @model_validator(mode="after")
    def _members_fit(self) -> TaskSpecification:
        own = self.model_fields_set
        if self.kind is not TaskKind.MULTI_TASK:
            foreign = sorted(own & {"tasks", "combine", "weights"})
            if foreign:
                raise ValueError(f"{foreign[0]} belongs to {TaskKind.MULTI_TASK.value} only")
            return self
        foreign = sorted(own & {"data", "columns", "labels", "prompts", "splits"})
        if foreign:
            raise ValueError(f"{foreign[0]} belongs to the members of a {TaskKind.MULTI_TASK.value}")
        if len(self.tasks) < 2:
            raise ValueError(f"tasks names {len(self.tasks)} folders, expected two or more")
        if self.weights and self.combine != "weighted":
            raise ValueError("weights need `combine: weighted`")
        if self.weights and len(self.weights) != len(self.tasks):
            raise ValueError(f"{len(self.weights)} weights for {len(self.tasks)} tasks")
        return self

    @model_validator(mode="after")
    def _is_asked_as_its_kind(self) -> TaskSpecification:
        foreign = sorted(self.model_fields_set & {"prompt", "max_new_tokens"})
        if foreign and not self.kind.is_written:
            written = " and ".join(kind.value for kind in TaskKind if kind.is_written)
            raise ValueError(f"{foreign[0]} belongs to {written} only")
        has_place = QUESTION_PLACE in self.prompt
        if self.kind is TaskKind.IMAGE_TEXT_TO_TEXT and self.prompt and not has_place:
            raise ValueError(f"prompt {self.prompt!r} has no {{}} for the question")
        if self.kind is TaskKind.IMAGE_CAPTIONING and has_place:
            raise ValueError(f"prompt {self.prompt!r} has a {{}}, and no question to put there")
        return self

    @model_validator(mode="after")
    def _fits_its_kind(self) -> TaskSpecification:
        known = METRICS[self.kind]
        if self.metric and self.metric not in known:
            raise ValueError(f"metric {self.metric!r} is unknown for this kind, expected {' or '.join(known)}")
        if self.columns.rejected is not None and self.kind is not TaskKind.IMAGE_TEXT_TO_TEXT:
            raise ValueError(f"columns.rejected belongs to {TaskKind.IMAGE_TEXT_TO_TEXT.value} only")
        if self.prompts and self.kind is not TaskKind.ZERO_SHOT:
            raise ValueError(f"prompts belong to {TaskKind.ZERO_SHOT.value} only")
        if self.labels and (self.kind is TaskKind.IMAGE_TEXT_RETRIEVAL or self.kind.is_written):
            raise ValueError(f"labels have no meaning in {self.kind.value}")
        without_place = [prompt for prompt in self.prompts if "{}" not in prompt]
        if without_place:
            raise ValueError(f"prompt {without_place[0]!r} has no {{}} for the label")
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"label {twice[0]!r} is listed twice")
        if len(self.labels) == 1:
            raise ValueError(f"labels has one class ({self.labels[0]!r}), expected two or more")
        return self


def read_specification(path: Path) -> TaskSpecification:
    """The checked content of a task.yaml; a task without `name` is called like its folder.

    Raises:
        TaskError: the file is missing, no YAML, misspells a key or the kind, or gives a value of a wrong type.
    """
    if not path.is_file():
        remedy = f"write a {TASK_FILE} with `kind:` one of {', '.join(kind.value for kind in TaskKind)}"
        raise TaskError(str(path), "does not exist", expected="the description of a task", remedy=remedy)
    content = read_yaml(path, error=TaskError)
    _refuse_unknown_keys(path, content)
    _refuse_unknown_kind(path, content)
    try:
        return TaskSpecification.model_validate({"name": path.resolve().parent.name, **content})
    except ValidationError as problem:
        first = problem.errors()[0]
        place = f"{path}: {'.'.join(str(part) for part in first['loc'])}" if first["loc"] else str(path)
        found = "" if first["type"] == "value_error" else f" (found {first['input']!r})"
        raise TaskError(place, first["msg"].removeprefix("Value error, ") + found) from problem


def _refuse_unknown_keys(path: Path, content: Mapping[str, Any]) -> None:
    nested: dict[str, type[BaseModel]] = {"columns": Columns, "splits": Splits}
    _refuse_keys(str(path), content, TaskSpecification)
    for name, model in nested.items():
        if isinstance(content.get(name), Mapping):
            _refuse_keys(f"{path}: {name}", content[name], model)


def _refuse_keys(place: str, content: Mapping[Any, Any], model: type[BaseModel]) -> None:
    known = list(model.model_fields)
    for key in content:
        if key not in known:
            hint = closest(str(key), known)
            raise TaskError(place, f"the key {key!r} is unknown", expected=f"one of {', '.join(known)}", remedy=hint)


def _refuse_unknown_kind(path: Path, content: Mapping[str, Any]) -> None:
    known = [kind.value for kind in TaskKind]
    if "kind" not in content:
        raise TaskError(str(path), "has no `kind:`", expected=f"one of {', '.join(known)}")
    kind = content["kind"]
    if kind not in known:
        expected = f"one of {', '.join(known)}"
        raise TaskError(f"{path}: kind", f"{kind!r} is unknown", expected=expected, remedy=closest(str(kind), known))
