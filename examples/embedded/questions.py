"""Asks questions about a scene: four kinds, each with one true answer out of one closed list.

Why a file of its own: training and `make_tasks.py` must ask in the same way. A question is only asked where the scene
leaves no doubt: a named thing is the only one that fits its name, and a place decides only beyond `MARGIN` pixels.

`first` and `second` are the things a question talks about (indices into `scene.things`). Training uses them as a hint;
a task never shows them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from scenes import COLOURS, SHAPES, Scene, Thing

KINDS = ("colour", "shape", "count", "relation")
NUMBERS = ("zero", "one", "two", "three", "four")
ANSWERS = (*COLOURS, *SHAPES, *NUMBERS, "yes", "no")
SIDES = ("left of", "right of", "above", "below")
MARGIN = 5
"""Pixels by which two centres must differ along an axis before left/right or above/below is asked."""

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}


@dataclass(frozen=True)
class Question:
    """One question with its answer; `first` and `second` name the things it is about."""

    kind: str
    text: str
    answer: str
    first: tuple[int, ...]
    second: tuple[int, ...] = ()


class Picker:
    """Chooses questions so that the answers of each kind stay balanced.

    A scene offers many questions of a kind; taken at random, "one" and "no" would be most of the answers. The picker
    takes the offered answer that is furthest behind its share.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: Counter[tuple[str, str]] = Counter()

    def pick(self, scene: Scene, kind: str, n_questions: int) -> list[Question]:
        """At most `n_questions` different questions of `kind`; fewer where the scene offers fewer."""
        offered: dict[str, list[Question]] = {}
        for question in _ask(scene, kind, self._rng):
            offered.setdefault(question.answer, []).append(question)
        chosen: list[Question] = []
        while offered and len(chosen) < n_questions:
            answer = min(offered, key=lambda a: ((self._used[kind, a] + 1) / _share(kind, a), self._rng.random()))
            questions = offered[answer]
            chosen.append(questions.pop(self._rng.randrange(len(questions))))
            self._used[kind, answer] += 1
            if not questions:
                del offered[answer]
        return chosen


def vocabulary() -> list[str]:
    """Every word a question can hold, sorted, the question mark first."""
    words = {word for side in SIDES for word in side.split()} | set(COLOURS) | set(SHAPES) | set(PLURALS.values())
    words |= {"what", "which", "how", "many", "is", "are", "does", "have", "there", "the"}
    words |= {"colour", "shape", "thing", "things"}
    return ["?", *sorted(words)]


def _share(kind: str, answer: str) -> float:
    """The share of `answer` aimed at within `kind`; a fifth each for yes and no of the relation questions."""
    if kind == "relation":
        return 0.2 if answer in ("yes", "no") else 0.6 / (len(COLOURS) + len(SHAPES))
    return 1.0 / {"colour": len(COLOURS), "shape": len(SHAPES), "count": len(NUMBERS)}[kind]


def _ask(scene: Scene, kind: str, rng: random.Random) -> Iterator[Question]:
    if kind == "colour":
        return _ask_colours(scene, rng)
    if kind == "shape":
        return _ask_shapes(scene, rng)
    if kind == "count":
        return _ask_counts(scene, rng)
    if kind == "relation":
        return _ask_relations(scene, rng)
    raise ValueError(f"question kind {kind!r} is unknown; known: {', '.join(KINDS)}")


def _ask_colours(scene: Scene, rng: random.Random) -> Iterator[Question]:
    shapes = Counter(thing.shape for thing in scene.things)
    for index, thing in enumerate(scene.things):
        if shapes[thing.shape] == 1:
            pattern = rng.choice(("what colour is the {}?", "which colour does the {} have?"))
            yield Question("colour", pattern.format(thing.shape), thing.colour, (index,))


def _ask_shapes(scene: Scene, rng: random.Random) -> Iterator[Question]:
    colours = Counter(thing.colour for thing in scene.things)
    for index, thing in enumerate(scene.things):
        if colours[thing.colour] == 1:
            pattern = rng.choice(("what shape is the {} thing?", "which shape does the {} thing have?"))
            yield Question("shape", pattern.format(thing.colour), thing.shape, (index,))


def _ask_counts(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """How many things of a colour, a shape, both, or at all.

    Most pairs of colour and shape are absent from a scene; only four pairs are offered where nothing fits, or
    the wording alone would give "zero" away.
    """
    groups: list[tuple[str, tuple[int, ...]]] = [("things", tuple(range(len(scene.things))))]
    groups.extend((f"{colour} things", _matching(scene, colour=colour)) for colour in COLOURS)
    groups.extend((PLURALS[shape], _matching(scene, shape=shape)) for shape in SHAPES)
    pairs = [(f"{c} {PLURALS[s]}", _matching(scene, colour=c, shape=s)) for c in COLOURS for s in SHAPES]
    groups.extend(pair for pair in pairs if pair[1])
    groups.extend(rng.sample([pair for pair in pairs if not pair[1]], 4))
    for name, members in groups:
        if len(members) < len(NUMBERS):
            yield Question("count", f"how many {name} are there?", NUMBERS[len(members)], members)


def _matching(scene: Scene, *, colour: str | None = None, shape: str | None = None) -> tuple[int, ...]:
    return tuple(
        index
        for index, thing in enumerate(scene.things)
        if colour in (None, thing.colour) and shape in (None, thing.shape)
    )


def _ask_relations(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for index in range(len(scene.things)):
        names = _names(scene, index)
        if not names:
            continue
        for side in SIDES:
            yield from _ask_who(scene, index, side, rng.choice(names))
            yield from _ask_whether(scene, index, side, rng)


def _ask_who(scene: Scene, index: int, side: str, name: str) -> Iterator[Question]:
    """What lies on one side of a thing, asked only where exactly one thing does and none is in doubt."""
    others = [i for i in range(len(scene.things)) if i != index]
    offsets = {i: _offset(scene.things[i], scene.things[index], side) for i in others}
    there = [i for i in others if offsets[i] >= MARGIN]
    if len(there) != 1 or any(abs(offset) < MARGIN for offset in offsets.values()):
        return
    thing = scene.things[there[0]]
    yield Question("relation", f"what shape is {side} the {name}?", thing.shape, (index,), (there[0],))
    yield Question("relation", f"what colour is {side} the {name}?", thing.colour, (index,), (there[0],))


def _ask_whether(scene: Scene, index: int, side: str, rng: random.Random) -> Iterator[Question]:
    """Whether one thing lies on one side of another."""
    for other in range(len(scene.things)):
        names = _names(scene, other)
        offset = _offset(scene.things[other], scene.things[index], side)
        if other == index or not names or abs(offset) < MARGIN:
            continue
        text = f"is the {rng.choice(names)} {side} the {rng.choice(_names(scene, index))}?"
        yield Question("relation", text, "yes" if offset > 0 else "no", (index,), (other,))


def _offset(thing: Thing, anchor: Thing, side: str) -> int:
    """How far `thing` lies on `side` of `anchor`, in pixels; negative on the other side."""
    return {
        "left of": anchor.x - thing.x,
        "right of": thing.x - anchor.x,
        "above": anchor.y - thing.y,
        "below": thing.y - anchor.y,
    }[side]


def _names(scene: Scene, index: int) -> list[str]:
    """The names that fit this thing and no other."""
    thing = scene.things[index]
    names = []
    if len(_matching(scene, shape=thing.shape)) == 1:
        names.append(thing.shape)
    if len(_matching(scene, colour=thing.colour)) == 1:
        names.append(f"{thing.colour} thing")
    if len(_matching(scene, colour=thing.colour, shape=thing.shape)) == 1:
        names.append(f"{thing.colour} {thing.shape}")
    return names
