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

    Images and groups of one data set keep their names, so that what belongs together stays together. Where two members
    call different images alike, theirs are other data sets, and their images and groups are qualified too.
    """
    is_apart = _have_clashing_images(members)
    return tuple(_qualified(member, sample, is_apart) for member in members for sample in member.all_samples(split))


def combined_hashes(members: Sequence[Task]) -> dict[str, str]:
    """sha256 of every image by the name that `combined_samples` gives it."""
    is_apart = _have_clashing_images(members)
    return {
        qualified(member, name) if is_apart else name: digest
        for member in members
        for name, digest in member.image_hashes().items()
    }


def _have_clashing_images(members: Sequence[Task]) -> bool:
    known: dict[str, str] = {}
    return any(
        known.setdefault(name, digest) != digest for member in members for name, digest in member.image_hashes().items()
    )


def _qualified(member: Task, sample: Sample, is_apart: bool) -> Sample:
    label = qualified(member, sample.label)
    if not is_apart:
        return replace(sample, label=label)
    image = _OwnImage(qualified(member, sample.image.name), sample.image)
    return replace(sample, label=label, image=image, group=qualified(member, sample.group))


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
