"""Render the emoji once and describe the questions one can ask about them as task folders.

    OUT/images/{style}/{concept}.png, OUT/images/metadata.jsonl     6,376 drawings: 1,594 concepts in four styles
    OUT/tasks/{style,meaning,meaning-by-prompt,retrieval}/task.yaml
    OUT/food, OUT/tasks/food-group          with --with food
    OUT/stamps, OUT/tasks/stamp-captions    with --with stamps

Two splits, both over families of look-alike concepts and never over images. `split_concept` (profile 50 %, validation
20 %, test 30 %) serves the questions "which style?" and "what kind of thing?". `split_style` serves retrieval by
name: every twemoji drawing is test, so that the test asks for an unseen style, and of the other three styles 85 % of
the concepts are profile, 15 % validation. Retrieval chooses among the names of its split: all 1,594 in the test. The
same concept in the unseen style is a look-alike of nothing in profile, so `family_style`, the group of that split,
keeps the two apart.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from concepts import Concept, load_concepts, load_sets, split_families
from extras import FRACTIONS, SEED, Row, build_food, build_stamps
from fetch import EXTRAS, FOOD_PICTURES, FOOD_TABLE, STAMPS, STYLES, UNREACHABLE, FetchError, UnreachableError, fetch
from folders import Existing, publish
from PIL import Image
from resvg_py import svg_to_bytes
from tqdm import tqdm

SIDE = 84
HELD_OUT_STYLE = "twemoji"
STYLE_FRACTIONS = {"profile": 0.85, "validation": 0.15}
PROMPTS = ["an emoji of {}", "a drawing of {}", "{}"]
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


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


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


def task(kind: str, name: str, *, data: str, columns: Row, metric: str, **rest: list[str]) -> dict[str, Any]:
    """One task file as data, in the order a reader wants it."""
    described = {"kind": kind, "name": name, "data": f"../../{data}", "columns": {"image": "file_name"} | columns}
    return described | rest | {"metric": metric}


def emoji_tasks(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Folder name to task, for the questions about emoji."""
    groups = sorted({row["group"] for row in rows})
    by_concept = {"split": "split_concept", "group": "family"}
    return {
        "style": task(
            "image-classification",
            "emoji-style",
            data="images",
            columns={"label": "style"} | by_concept,
            metric="accuracy",
            labels=sorted(STYLES),
        ),
        "meaning": task(
            "image-classification",
            "emoji-meaning",
            data="images",
            columns={"label": "group"} | by_concept,
            metric="accuracy",
            labels=groups,
        ),
        "meaning-by-prompt": task(
            "zero-shot-image-classification",
            "emoji-meaning-by-prompt",
            data="images",
            columns={"label": "group"} | by_concept,
            metric="accuracy",
            labels=groups,
            prompts=PROMPTS,
        ),
        "retrieval": task(
            "image-text-retrieval",
            "emoji-retrieval",
            data="images",
            columns={"text": "name", "split": "split_style", "group": "family_style"},
            metric="recall@1",
        ),
    }


def extra_tasks(extra: str) -> dict[str, dict[str, Any]]:
    """Folder name to task, for an optional data set."""
    columns = {"split": "split", "group": "family"}
    if extra == "food":
        columns = {"label": "group"} | columns
        return {
            "food-group": task("image-classification", "food-group", data=extra, columns=columns, metric="accuracy")
        }
    columns = {"text": "caption"} | columns
    return {
        "stamp-captions": task("image-text-retrieval", "stamp-captions", data=extra, columns=columns, metric="recall@1")
    }


def build_extra(extra: str, folder: Path) -> list[Row]:
    """Write the images of an optional data set; returns the rows of its `metadata.jsonl`."""
    if extra == "food":
        pictures, table = fetch([FOOD_PICTURES, FOOD_TABLE])
        return build_food(folder, pictures=pictures, table=table)
    return build_stamps(folder, package=fetch([STAMPS])[0])


def make_tasks(out: Path, *, extras: Iterable[str] = (), existing: Existing) -> list[Path]:
    """Bring every image folder and task folder under `out` up to date; returns the task folders."""
    folders = fetch(STYLES.values())
    sets: dict[str, dict[str, Any]] = {}

    def emoji(folder: Path) -> list[Row]:
        sets.update(load_sets(dict(zip(STYLES, folders, strict=True))))
        return build_emoji(folder, sets=sets)

    inputs = {package.name: package.sha256 for package in STYLES.values()}
    _publish_images(out / "images", emoji, inputs=inputs, existing=existing)
    tasks = emoji_tasks(read_rows(out / "images"))
    for extra in extras:
        inputs = {package.name: package.sha256 for package in EXTRAS[extra]}
        _publish_images(
            out / extra, lambda folder, extra=extra: build_extra(extra, folder), inputs=inputs, existing=existing
        )
        tasks |= extra_tasks(extra)
    for name, described in tasks.items():
        _publish_task(out / "tasks" / name, yaml.safe_dump(described, sort_keys=False, width=120), existing=existing)
    return [out / "tasks" / name for name in tasks]


def _publish_images(
    target: Path, build: Callable[[Path], list[Row]], *, inputs: Mapping[str, str], existing: Existing
) -> None:
    def write(folder: Path) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in build(folder)]
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

    code = {
        path.name: _sha256(path.read_bytes())
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if path.name in _CODE
    }
    publish(target, write, fingerprint=dict(inputs) | code, existing=existing)


_CODE = {"make_tasks.py", "concepts.py", "extras.py"}


def _publish_task(target: Path, text: str, *, existing: Existing) -> None:
    def write(folder: Path) -> None:
        (folder / "task.yaml").write_text(text, encoding="utf-8")

    publish(target, write, fingerprint={"task.yaml": _sha256(text.encode())}, existing=existing)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder's `metadata.jsonl`."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write images/ and tasks/ under")
    parser.add_argument("--with", dest="extras", action="append", choices=sorted(EXTRAS), default=[])
    parser.add_argument("--force", action="store_true", help="replace folders that are there")
    options = parser.parse_args(arguments)
    try:
        existing = Existing.REPLACE if options.force else Existing.REFUSE
        tasks = make_tasks(options.out, extras=options.extras, existing=existing)
    except (FetchError, FileExistsError) as error:
        print(f"make_tasks: {error}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, UnreachableError) else 1
    print("\n".join(str(folder) for folder in tasks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
