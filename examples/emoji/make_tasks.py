"""Render the emoji once and describe the questions one can ask about them as task folders.

    OUT/images/{style}/{concept}.png, OUT/images/metadata.jsonl     6,376 drawings: 1,594 concepts in four styles
    OUT/tasks/{style,meaning,style-and-meaning,meaning-by-prompt,retrieval}/task.yaml
    OUT/food, OUT/tasks/food-group          with --with food
    OUT/stamps, OUT/tasks/stamp-captions    with --with stamps

Images are rebuilt when the packages or the code that draws them change; the splits are explained in `drawings.py`.
Retrieval chooses among the names of its split: all 1,594 in the test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from concepts import Row, load_sets
from drawings import build_emoji
from extras import build_food, build_stamps
from fetch import (
    EXTRAS,
    FOOD_PICTURES,
    FOOD_TABLE,
    STAMPS,
    STYLES,
    UNREACHABLE,
    FetchError,
    Package,
    UnreachableError,
    fetch,
)
from folders import Existing, publish

PROMPTS = ["an emoji of {}", "a drawing of {}", "{}"]
_DRAWN_BY = ("concepts.py", "drawings.py")
_EXTRA_DRAWN_BY = ("concepts.py", "extras.py")


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
        "style-and-meaning": {
            "kind": "multi-task",
            "name": "emoji-style-and-meaning",
            "tasks": ["../style", "../meaning"],
            "combine": "worst",
        },
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
    folders = dict(zip(STYLES, fetch(STYLES.values()), strict=True))
    _publish_images(
        out / "images",
        lambda folder: build_emoji(folder, sets=load_sets(folders)),
        fingerprint=_hashes(STYLES.values(), _DRAWN_BY),
        existing=existing,
    )
    tasks = _publish_tasks(out, emoji_tasks(read_rows(out / "images")), existing=existing)
    for extra in extras:
        _publish_images(
            out / extra,
            lambda folder, extra=extra: build_extra(extra, folder),
            fingerprint=_hashes(EXTRAS[extra], _EXTRA_DRAWN_BY),
            existing=existing,
        )
        tasks += _publish_tasks(out, extra_tasks(extra), existing=existing)
    return tasks


def _publish_images(
    target: Path, build: Callable[[Path], list[Row]], *, fingerprint: Mapping[str, str], existing: Existing
) -> None:
    def write(folder: Path) -> None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in build(folder)]
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

    publish(target, write, fingerprint=fingerprint, existing=existing)


def _publish_tasks(out: Path, tasks: Mapping[str, dict[str, Any]], *, existing: Existing) -> list[Path]:
    for name, described in tasks.items():
        _publish_task(out / "tasks" / name, yaml.safe_dump(described, sort_keys=False, width=120), existing=existing)
    return [out / "tasks" / name for name in tasks]


def _publish_task(target: Path, text: str, *, existing: Existing) -> None:
    def write(folder: Path) -> None:
        (folder / "task.yaml").write_text(text, encoding="utf-8")

    publish(target, write, fingerprint={"task.yaml": _sha256(text.encode())}, existing=existing)


def _hashes(packages: Iterable[Package], code: Iterable[str]) -> dict[str, str]:
    """What an image folder depends on: the packages and the files of this example that draw it."""
    inputs = {package.name: package.sha256 for package in packages}
    return inputs | {name: _sha256(Path(__file__).with_name(name).read_bytes()) for name in code}


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
