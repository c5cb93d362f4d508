"""Draws small scenes of coloured shapes: the images of the embedded example.

Why: an example that needs no download still needs real data. A scene is a list of things whose shape, colour, place and
size are known, so every question about it has exactly one answer. The same seed gives the same scenes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
    "purple": (155, 50, 180),
    "cyan": (50, 205, 215),
}
SIZES = (12, 15, 18)
MOST_THINGS = 5
GAP = 2
"""Pixels kept free between the bounding boxes of two things, so that no shape hides another."""


@dataclass(frozen=True)
class Thing:
    """One drawn shape; `x` and `y` are the centre, `size` the side of the bounding box, all in pixels."""

    shape: str
    colour: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """Things, and the picture of them as a (64, 64, 3) uint8 array."""

    things: tuple[Thing, ...]
    pixels: np.ndarray


def make_scene(rng: random.Random) -> Scene:
    """One random scene of 1 to `MOST_THINGS` things.

    Half of the scenes draw from a short list of colours or shapes: without repeats no count would exceed one. A
    scene of one thing answers most questions by itself, so a draw of one is drawn again.
    """
    colours = _palette(rng, tuple(COLOURS))
    shapes = _palette(rng, SHAPES)
    things: list[Thing] = []
    n_things = rng.randint(1, MOST_THINGS)
    if n_things == 1:
        n_things = rng.randint(1, MOST_THINGS)
    for _ in range(n_things):
        place = _free_place(rng, things)
        if place is None:
            continue
        things.append(Thing(rng.choice(shapes), rng.choice(colours), *place))
    return Scene(tuple(things), _draw(things, rng))


def owner_map(scene: Scene, patch: int) -> np.ndarray:
    """For each patch the index of the thing that covers most of it (at least a tenth), or -1.

    Shapes: (64 / patch, 64 / patch), int64.
    """
    n_side = IMAGE_SIZE // patch
    cover = np.zeros((len(scene.things), n_side, n_side))
    for index, thing in enumerate(scene.things):
        across = _overlaps(thing.x, thing.size, patch)
        down = _overlaps(thing.y, thing.size, patch)
        cover[index] = np.outer(down, across) / patch**2
    return np.where(cover.max(axis=0) >= 0.1, cover.argmax(axis=0), -1)


def _overlaps(centre: int, size: int, patch: int) -> np.ndarray:
    starts = np.arange(0, IMAGE_SIZE, patch)
    low, high = centre - size / 2, centre + size / 2
    return np.clip(np.minimum(high, starts + patch) - np.maximum(low, starts), 0, None)


def _palette(rng: random.Random, names: tuple[str, ...]) -> list[str]:
    if rng.random() < 0.5:
        return list(names)
    return rng.sample(names, rng.randint(1, 3))


def _free_place(rng: random.Random, things: list[Thing]) -> tuple[int, int, int] | None:
    for _ in range(60):
        size = rng.choice(SIZES)
        margin = size // 2 + 1
        x = rng.randint(margin, IMAGE_SIZE - 1 - margin)
        y = rng.randint(margin, IMAGE_SIZE - 1 - margin)
        if all(max(abs(x - t.x), abs(y - t.y)) >= (size + t.size) // 2 + GAP for t in things):
            return x, y, size
    return None


def _draw(things: list[Thing], rng: random.Random) -> np.ndarray:
    """Pixels on a dark or light grey ground, with colour jitter and noise of a random strength."""
    ground = rng.choice((rng.randint(10, 60), rng.randint(190, 245)))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (ground, ground, ground))
    pen = ImageDraw.Draw(image)
    for thing in things:
        red, green, blue = (max(0, min(255, c + rng.randint(-15, 15))) for c in COLOURS[thing.colour])
        _draw_thing(pen, thing, (red, green, blue))
    strength = rng.choice((0.0, 4.0, 8.0))
    noise_seed = rng.getrandbits(32)
    if strength == 0:
        return np.asarray(image)
    noise = np.random.RandomState(noise_seed).standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3))
    return np.clip(np.rint(np.asarray(image) + strength * noise), 0, 255).astype(np.uint8)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, int, int]) -> None:
    left, top = thing.x - thing.size // 2, thing.y - thing.size // 2
    right, bottom = left + thing.size - 1, top + thing.size - 1
    third = thing.size // 3
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon([(thing.x, top), (right, bottom), (left, bottom)], fill=fill)
    elif thing.shape == "cross":
        pen.rectangle((left + third, top, right - third, bottom), fill=fill)
        pen.rectangle((left, top + third, right, bottom - third), fill=fill)
    elif thing.shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=fill, width=max(2, thing.size // 5))
    else:
        raise ValueError(f"shape {thing.shape!r} has no drawing; known: {', '.join(SHAPES)}")
