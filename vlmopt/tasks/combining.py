"""Several classification tasks as one: samples and labels of the members, each label qualified by its task's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmopt.core.errors import TaskError
from vlmopt.core.labels import SEPARATOR, qualified_label
from vlmopt.tasks.images import ImageSource
from vlmopt.tasks.specification import TaskKind
from vlmopt.tasks.splits import Sample

if TYPE_CHECKING:
    from vlmopt.tasks.dataset import Task


def qualified(task: Task, label: str) -> str:
    """A label (or a name) of this task that no other task has."""
    return qualified_label(task.specification.name, label)


def combined_samples(members: Sequence[Task], split: str) -> tuple[Sample, ...]:
    """The members' samples of a split, labels qualified.

    An image keeps its name, so that members on the same images share it; only where two members call different images
    alike is each named after its task, and so is a group that is such an image's name.
    """
    clashing = _clashing_names(members)
    return tuple(_qualified(member, sample, clashing) for member in members for sample in member.all_samples(split))


def combined_hashes(members: Sequence[Task]) -> dict[str, str]:
    """sha256 of every image by the name that `combined_samples` gives it."""
    clashing = _clashing_names(members)
    return {
        qualified(member, name) if name in clashing else name: digest
        for member in members
        for name, digest in member.image_hashes().items()
    }


def refuse_leaks_between(place: str, members: Sequence[Task], splits: Sequence[str]) -> None:
    """Makes sure that no image, under whatever name, is in one split of one member and in another split of another.

    Raises:
        TaskError: one is; names it, both members and both splits.
    """
    homes: dict[str, tuple[Task, dict[str, str]]] = {}
    for member in members:
        own: dict[str, dict[str, str]] = {}
        for split in splits:
            for sample in member.all_samples(split):
                own.setdefault(member.image_hashes()[sample.image.name], {})[split] = sample.image.name
        for digest, where in own.items():
            other, known = homes.setdefault(digest, (member, where))
            if known.keys() != where.keys():
                sides = ((other, known), (member, where))
                first, second = (f"{'/'.join(found)} of {task.specification.name}" for task, found in sides)
                raise TaskError(
                    place,
                    f"image {next(iter(where.values()))!r} is in {first} and in {second}",
                    expected="splits that share nothing",
                    remedy="divide all members alike, by one column or one seed",
                )


def _clashing_names(members: Sequence[Task]) -> frozenset[str]:
    """Names that stand for different images in different members."""
    known: dict[str, str] = {}
    return frozenset(
        name
        for member in members
        for name, digest in member.image_hashes().items()
        if known.setdefault(name, digest) != digest
    )


def _qualified(member: Task, sample: Sample, clashing: frozenset[str]) -> Sample:
    made, name = replace(sample, label=qualified(member, sample.label)), sample.image.name
    if name not in clashing:
        return made
    group = qualified(member, name) if sample.group == name else sample.group
    return replace(made, image=_OwnImage(qualified(member, name), sample.image), group=group)


@dataclass(frozen=True)
class _OwnImage:
    """An image under a name that no other member's image has."""

    name: str
    image: ImageSource

    def read_bytes(self) -> bytes:
        return self.image.read_bytes()


def check_members(place: str, members: Sequence[Task]) -> None:
    """Makes sure that the members can share one program.

    Raises:
        TaskError: one is of another kind, two have one name, or a name cannot be told from a label.
    """
    names: set[str] = set()
    for member in members:
        kind, name = member.specification.kind, member.specification.name
        if kind is not TaskKind.IMAGE_CLASSIFICATION:
            found = f"{member.path} is a task of kind {kind.value}"
            raise TaskError(place, found, expected=f"members of kind {TaskKind.IMAGE_CLASSIFICATION.value}")
        if name in names:
            raise TaskError(place, f"two members are called {name!r}", expected="a name of its own for each")
        if SEPARATOR in name:
            raise TaskError(str(member.path), f"the name {name!r} holds {SEPARATOR!r}", expected="a name without it")
        names.add(name)
