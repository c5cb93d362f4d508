"""Render every emoji once, and say which split it belongs to.

Two splits, both over families of look-alike concepts and never over images. `split_concept` (profile 50 %, validation
20 %, test 30 %) serves the questions "which style?" and "what kind of thing?". `split_style` serves retrieval by
name: every twemoji drawing is test, so that the test asks for an unseen style, and of the other three styles 85 % of
the concepts are profile, 15 % validation. The same concept in the unseen style is a look-alike of nothing in profile,
so `family_style`, the group of that split, keeps the two apart.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from concepts import FRACTIONS, SEED, Concept, Row, load_concepts, split_families
from PIL import Image
from resvg_py import svg_to_bytes
from tqdm import tqdm

SIDE = 84
HELD_OUT_STYLE = "twemoji"
STYLE_FRACTIONS = {"profile": 0.85, "validation": 0.15}
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{left} {top} {width} {height}" width="{side}" height="{side}">{body}</svg>'
)


def render(icons: Mapping[str, Any], icon: str) -> Image.Image:
    """One icon of an Iconify set on white; a drawing that is not square is centred."""
    drawing = icons["icons"][icon]
    box = {name: drawing.get(name, icons.get(name, fallback)) for name, fallback in _BOX.items()}
    svg = _SVG.format(side=SIDE, body=drawing["body"], **box)
    png = svg_to_bytes(svg_string=svg, background="#ffffff", width=SIDE, height=SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def image_rows(concepts: Iterable[Concept]) -> list[Row]:
    """The rows of `metadata.jsonl`, ordered by concept and style."""
    known = list(concepts)
    groups = {concept.family: concept.group for concept in reversed(known)}
    sizes = Counter(concept.family for concept in known)
    by_concept = split_families(groups, sizes, FRACTIONS, seed=SEED)
    by_style = split_families(groups, sizes, STYLE_FRACTIONS, seed=SEED + 1)
    return [
        {
            "file_name": f"{style}/{concept.key}.png",
            "name": concept.name,
            "concept": concept.key,
            "style": style,
            "group": concept.group,
            "family": concept.family,
            "split_concept": by_concept[concept.family],
            "family_style": f"{style}/{concept.family}" if style == HELD_OUT_STYLE else concept.family,
            "split_style": "test" if style == HELD_OUT_STYLE else by_style[concept.family],
        }
        for concept in known
        for style in sorted(concept.icons)
    ]


def build_emoji(folder: Path, *, sets: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Render every drawing; returns the rows of `metadata.jsonl`."""
    concepts = load_concepts(sets)
    drawings = [(style, concept) for concept in concepts for style in concept.icons]
    for style in sets:
        (folder / style).mkdir()
    for style, concept in tqdm(drawings, desc="rendering", delay=2, disable=None):
        render(sets[style]["icons"], concept.icons[style]).save(folder / style / f"{concept.key}.png")
    return image_rows(concepts)
