"""What the drawings show: one `Concept` for each emoji that all four styles draw, with its name, group and
family.

The styles are joined by Unicode sequence and not by icon name, since 33 of the 1,594 names differ between the sets.
Sequences with a skin tone are left out: they are the same drawing in another colour. A *family* is the unit every
split is made of: the man, woman and person variants of one emoji, and its mirrored variant, look alike and must not
end up on both sides.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]

SEED = 0
FRACTIONS = {"profile": 0.5, "validation": 0.2, "test": 0.3}
_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
# joiner, presentation selector, female and male sign, rightwards arrow: they vary an emoji, they do not make another
_VARIATION = {"200d", "fe0f", "2640", "2642", "27a1"}
_NEUTRAL = {
    "1f468": "1f9d1",  # man
    "1f469": "1f9d1",  # woman
    "1f466": "1f9d2",  # boy
    "1f467": "1f9d2",  # girl
    "1f474": "1f9d3",  # old man
    "1f475": "1f9d3",  # old woman
    "1f930": "1fac4",  # pregnant woman
    "1fac3": "1fac4",  # pregnant man
    "1f478": "1fac5",  # princess
    "1f934": "1fac5",  # prince
    "1f57a": "1f483",  # man dancing
    "1f936": "1f385",  # Mrs. Claus
}
_CLAUS = ("1f9d1-1f384", "1f385")


@dataclass(frozen=True)
class Concept:
    """One emoji; `icons` maps a style to the name the style's set gives it."""

    key: str
    name: str
    group: str
    family: str
    icons: Mapping[str, str]


def spoken(identifier: str) -> str:
    """`red-apple` as a person says it: `red apple`."""
    return identifier.replace("-", " ")


def load_sets(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The tables of each style's package: `icons`, `chars` (sequence to icon), `categories` (icon to group)."""
    sets = {}
    for style, folder in folders.items():
        read = {
            name: json.loads((folder / "package" / f"{name}.json").read_text())
            for name in ("icons", "chars", "metadata")
        }
        categories = {icon: group for group, icons in read["metadata"]["categories"].items() for icon in icons}
        sets[style] = {"icons": read["icons"], "chars": read["chars"], "categories": categories}
    return sets


def load_concepts(sets: Mapping[str, Mapping[str, Any]]) -> list[Concept]:
    """Every concept that all sets draw, in the order of their keys."""
    tables = {style: _by_sequence(content["chars"]) for style, content in sets.items()}
    shared = set.intersection(*(set(table) for table in tables.values()))
    concepts = []
    for sequence in sorted(shared):
        if _TONES & set(sequence.split("-")):
            continue
        icons = {style: table[sequence] for style, table in tables.items()}
        key = _most_common(icons.values())
        group = _most_common(_group(sets[style]["categories"].get(icon, "")) for style, icon in icons.items())
        concepts.append(Concept(key=key, name=spoken(key), group=group, family=family(sequence), icons=icons))
    return sorted(concepts, key=lambda concept: concept.key)


def family(sequence: str) -> str:
    """The sequence without what only varies an emoji; a sequence of nothing else is its own family."""
    parts = [part for part in sequence.split("-") if part not in _VARIATION] or [sequence]
    neutral = "-".join(_NEUTRAL.get(part, part) for part in parts)
    return _CLAUS[1] if neutral == _CLAUS[0] else neutral


def _by_sequence(chars: Mapping[str, str]) -> dict[str, str]:
    table: dict[str, str] = {}
    for sequence, icon in chars.items():
        table.setdefault("-".join(part for part in sequence.split("-") if part != "fe0f"), icon)
    return table


def _group(category: str) -> str:
    """One spelling for "Food & Drink" and "Food Drink"; the sets' own extra categories are no group."""
    words = [word for word in category.lower().split() if word != "&"]
    return "" if "openmoji" in words or "unicode" in words else " and ".join(words)


def _most_common(values: Iterable[str]) -> str:
    """The value most sets agree on, the first of them on a tie; empty values do not count."""
    return Counter(value for value in values if value).most_common(1)[0][0]


def split_families(
    families: Mapping[str, str], sizes: Mapping[str, int], fractions: Mapping[str, float], *, seed: int
) -> dict[str, str]:
    """Assign whole families to splits so that every stratum is divided in the given proportions.

    Families are taken in the order of a hash of seed and name, so that one more family in a later version of the data
    does not reshuffle the others, and each goes to the split that lacks most.

    Args:
        families: family to stratum.
        sizes: family to its number of members.
        fractions: split to its share; the shares add up to 1.
    """
    assigned: dict[str, str] = {}
    filled: dict[str, Counter[str]] = {stratum: Counter() for stratum in families.values()}
    for name in sorted(families, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()):
        counts = filled[families[name]]
        total = counts.total() + sizes[name]
        chosen = max(fractions, key=lambda split: fractions[split] * total - counts[split])
        counts[chosen] += sizes[name]
        assigned[name] = chosen
    return assigned
