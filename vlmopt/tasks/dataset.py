"""A task: its specification and its samples by split, with the test split sealed until the final evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmopt.core.errors import SealedSplitError, TaskError
from vlmopt.tasks.combining import check_members, combined_hashes, combined_samples, qualified, refuse_leaks_between
from vlmopt.tasks.folder import SPLIT_NAMES, SPLITS, Row, column, read_folder
from vlmopt.tasks.hub import read_hub
from vlmopt.tasks.images import content_hashes
from vlmopt.tasks.references import merged_captions, references_of, rejected_of
from vlmopt.tasks.specification import (
    ROLES,
    TASK_FILE,
    TaskKind,
    TaskSpecification,
    as_text,
    closest,
    read_specification,
)
from vlmopt.tasks.splits import Sample, divided, refuse_leaks, subsample

OPEN_SPLITS = ("profile", "validation")
_ROLE_OF_LABEL = {
    TaskKind.VISUAL_QUESTION_ANSWERING: "answer",
    TaskKind.IMAGE_TEXT_TO_TEXT: "answer",
    TaskKind.IMAGE_CAPTIONING: "caption",
}


class Task:
    """What the user wants the model to do, as data.

    `labels` are the classes in order (empty where the model has them); `fingerprint` changes with every record, image,
    label and split. `samples` gives the splits that may be looked at; `open_test` gives the test split and seals the
    others, so that nothing can be chosen after the test was seen. `members` are the tasks that a multi-task is made of.
    """

    def __init__(
        self,
        path: Path,
        specification: TaskSpecification,
        splits: Mapping[str, tuple[Sample, ...]],
        *,
        hashes: Mapping[str, str],
        members: Sequence[Task] = (),
    ) -> None:
        self.path = path
        self.specification = specification
        self.members = tuple(members)
        self.labels = _labels(specification, splits)
        if members:
            self.labels = tuple(qualified(member, label) for member in members for label in member.labels)
        self._splits = splits
        self._hashes = hashes
        self._is_test_open = False
        self._check_size()
        if self.labels:
            self.check_labels(self.labels)
        self.fingerprint = self._hash([sample for split in SPLITS for sample in splits[split]], self._sizes())

    @property
    def has_groups(self) -> bool:
        return self.specification.columns.group is not None or any(member.has_groups for member in self.members)

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples by split, the test split included."""
        return {split: len(self._splits[split]) for split in SPLITS}

    def samples(self, split: str, *, limit: int | None = None, seed: int = 0) -> tuple[Sample, ...]:
        """The samples of "profile" or "validation", or at most `limit` of them: classes in proportion, groups whole.

        Raises:
            SealedSplitError: `split` is the test split, or the test split was opened already.
            TaskError: there is no such split, or the limit is below one.
        """
        if split == "test":
            remedy = "use profile or validation; `open_test` is for the final evaluation"
            raise SealedSplitError(str(self.path), "the test split is sealed", remedy=remedy)
        if split not in OPEN_SPLITS:
            raise TaskError(str(self.path), f"there is no split {split!r}", expected=" or ".join(OPEN_SPLITS))
        if self._is_test_open:
            raise SealedSplitError(
                str(self.path),
                f"the {split} split is sealed, since the test split was opened",
                remedy="load the task anew to start over",
            )
        if limit is not None and limit < 1:
            raise TaskError(str(self.path), f"a limit of {limit} samples", expected="at least 1")
        samples = self._splits[split]
        return samples if limit is None else subsample(samples, limit, seed=seed, has_groups=self.has_groups)

    def open_test(self) -> tuple[Sample, ...]:
        """The test samples. From now on nothing else can be read, so nothing can be tuned on what is seen here."""
        self._is_test_open = True
        return self._splits["test"]

    def all_samples(self, split: str) -> tuple[Sample, ...]:
        """Any split's samples, for a task that this one is a member of and which keeps its own seal."""
        return self._splits[split]

    def image_hashes(self) -> Mapping[str, str]:
        """sha256 of every image by its name."""
        return self._hashes

    def fingerprint_of(self, samples: Sequence[Sample]) -> str:
        """sha256 over these samples in order and the bytes of their images."""
        return self._hash(samples, [])

    def check_labels(self, labels: Sequence[str]) -> None:
        """Makes sure that every label or answer of every split is in the list.

        Raises:
            TaskError: one is not; names its place, its value and the closest of the list.
        """
        known = set(labels)
        for sample in (sample for split in SPLITS for sample in self._splits[split]):
            if sample.label not in known:
                expected = f"one of {', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}"
                found = f"{self._label_role} {sample.label!r} is not in the list"
                raise TaskError(sample.origin, found, expected=expected, remedy=closest(sample.label, labels))

    @property
    def _label_role(self) -> str:
        return _ROLE_OF_LABEL.get(self.specification.kind, "label")

    def _sizes(self) -> list[object]:
        specification = self.specification
        settings: list[object] = [
            specification.kind.value,
            list(self.labels),
            list(specification.prompts),
            specification.headline,
        ]
        if specification.kind.is_written:
            settings += [specification.prompt, specification.max_new_tokens]
        if self.members:
            settings += [specification.combine, list(specification.weights)]
        return [*settings, *self.counts.values()]

    def _hash(self, samples: Sequence[Sample], settings: list[object]) -> str:
        digest = hashlib.sha256(json.dumps(settings).encode())
        for sample in samples:
            name, references = sample.image.name, [list(sample.references)] if sample.references else []
            rejected = [sample.rejected] if sample.rejected else []
            fields = [name, self._hashes[name], sample.label, sample.text, sample.group, *references, *rejected]
            digest.update(json.dumps(fields).encode() + b"\n")
        return digest.hexdigest()

    def _check_size(self) -> None:
        empty = [split for split in SPLITS if not self._splits[split]]
        if empty:
            counts = ", ".join(f"{split} {count}" for split, count in self.counts.items())
            remedy = "add data, or change `splits:` (its fractions or its seed)"
            raise TaskError(str(self.path), f"the {empty[0]} split is empty ({counts})", remedy=remedy)
        is_retrieval = self.specification.kind is TaskKind.IMAGE_TEXT_RETRIEVAL
        role = "text" if is_retrieval else self._label_role
        values = {getattr(s, "text" if is_retrieval else "label") for split in SPLITS for s in self._splits[split]}
        if len(values) < 2:
            raise TaskError(
                str(self.path), f"every sample has the {role} {values.pop()!r}", expected="two or more classes"
            )


def load_task(path: str | Path) -> Task:
    """The task in this folder, or described by this YAML file, with every record and image file checked.

    Raises:
        TaskError: something about the specification or the data is wrong; the message names the file and line.
    """
    path = Path(path)
    if not path.exists():
        raise TaskError(str(path), "does not exist", expected=f"a task folder with {TASK_FILE}")
    file = path / TASK_FILE if path.is_dir() else path
    specification = read_specification(file)
    if specification.kind is TaskKind.MULTI_TASK:
        return _combined(file, specification)
    if specification.is_hub:
        rows = read_hub(specification, str(file))
    else:
        rows = read_folder(specification, file.parent / Path(specification.data).expanduser())
    if not rows:
        raise TaskError(str(file), "the task is empty", expected="at least one record", remedy="add data")
    samples = [_sample(specification, row) for row in rows]
    hashes = content_hashes(sample.image for sample in samples)
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    # Without groups, copies of one image under two names stay together.
    keys = [sample.group if specification.columns.group else hashes[sample.image.name] for sample in samples]
    for split, sample in zip(_split_of_rows(specification, rows, keys), samples, strict=True):
        splits[split].append(sample)
    refuse_leaks(str(file), splits, group=specification.columns.group or "")
    if specification.kind is TaskKind.IMAGE_CAPTIONING:
        splits = {name: merged_captions(part) for name, part in splits.items()}
    return Task(file, specification, {name: tuple(part) for name, part in splits.items()}, hashes=hashes)


def _combined(file: Path, specification: TaskSpecification) -> Task:
    """The members' samples together; what is profiled for one must not be tested for another."""
    members = [load_task(file.parent / Path(folder).expanduser()) for folder in specification.tasks]
    check_members(str(file), members)
    splits = {split: combined_samples(members, split) for split in SPLITS}
    refuse_leaks_between(str(file), members, SPLITS)
    refuse_leaks(str(file), splits, group="group" if all(member.has_groups for member in members) else "")
    return Task(file, specification, splits, hashes=combined_hashes(members), members=members)


def _sample(specification: TaskSpecification, row: Row) -> Sample:
    columns = specification.columns
    group = _text(row, columns.group) if columns.group else row.image.name
    if specification.kind.is_written:
        references = references_of(specification, row)
        has_question = "question" in ROLES[specification.kind]
        question = _text(row, columns.question) if has_question else ""
        rejected = rejected_of(specification, row, references)
        return Sample(row.image, references[0], question, group, row.origin, references, rejected)
    found = {role: _text(row, getattr(columns, role)) for role in ROLES[specification.kind]}
    label = found.get("label", found.get("answer", ""))
    return Sample(row.image, label, found.get("text", found.get("question", "")), group, row.origin)


def _text(row: Row, name: str) -> str:
    value = as_text(column(row.values, name, row.origin))
    if not isinstance(value, str) or not value.strip():
        raise TaskError(row.origin, f"column {name!r} is {value!r}", expected="text or a number")
    return value


def _split_of_rows(specification: TaskSpecification, rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """The split of every row: what the split column says, else the sub-folder, else a division by key."""
    name = specification.columns.split or ("split" if all("split" in row.values for row in rows) else None)
    if name is not None:
        return [_named_split(row, name) for row in rows]
    known = [row.split for row in rows]
    if not all(known):
        return divided(keys, specification.splits)
    if "validation" in known:
        return known
    parts = divided(keys, specification.splits, parts=OPEN_SPLITS)  # validation data comes out of the training data
    return [part if split == "profile" else split for split, part in zip(known, parts, strict=True)]


def _named_split(row: Row, name: str) -> str:
    value = str(column(row.values, name, row.origin))
    if value.lower() not in SPLIT_NAMES:
        expected = f"one of {', '.join(SPLITS)}"
        remedy = closest(value.lower(), SPLIT_NAMES)
        raise TaskError(row.origin, f"{name!r} is {value!r}", expected=expected, remedy=remedy)
    return SPLIT_NAMES[value.lower()]


def _labels(specification: TaskSpecification, splits: Mapping[str, Sequence[Sample]]) -> tuple[str, ...]:
    has_own_classes = specification.kind in (TaskKind.IMAGE_CLASSIFICATION, TaskKind.ZERO_SHOT)
    if specification.labels or not has_own_classes:
        return specification.labels
    return tuple(sorted({sample.label for part in splits.values() for sample in part}))
