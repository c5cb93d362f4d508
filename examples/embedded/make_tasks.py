"""Writes the four tasks of the embedded example: colour, shape, count, relation.

    python examples/embedded/make_tasks.py OUT_DIR

Each task is a folder in the Hugging Face *imagefolder* convention (`metadata.jsonl` beside `images/`) with a
`task.yaml` that names the columns and the closed list of answers. Splits share no scene with each other or with
training; the same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

from PIL import Image
from questions import ANSWERS, KINDS, Picker
from scenes import make_scene

N_ITEMS = {"profile": 800, "validation": 600, "test": 1500}
QUESTIONS_PER_IMAGE = 3


def main() -> int:
    """Write all four folders, with a line of progress once it takes more than two seconds."""
    options = _options()
    folders = {kind: options.out_dir / kind for kind in KINDS}
    taken = [str(folder) for folder in folders.values() if folder.exists()]
    if taken and not options.force:
        print(f"{', '.join(taken)} exist already; give --force to write them anew", file=sys.stderr)
        return 2
    begun = time.perf_counter()
    pictures: set[bytes] = set()
    for kind, folder in folders.items():
        if folder.exists():
            shutil.rmtree(folder)
        n_images = write_task(folder, kind, seed=options.seed, pictures=pictures)
        if time.perf_counter() - begun > 2:
            print(f"{folder}: {sum(N_ITEMS.values())} questions, {n_images} images", flush=True)
    print(f"four tasks in {options.out_dir}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder that receives the four task folders")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--force", action="store_true", help="replace task folders that are already there")
    return parser.parse_args()


def write_task(folder: Path, kind: str, *, seed: int, pictures: set[bytes]) -> int:
    """One task folder; returns its number of images.

    `pictures` holds the pixels of every image written so far. A plain scene of one thing can come up twice; it is then
    drawn again, so that no image is in two splits.
    """
    (folder / "images").mkdir(parents=True)
    lines: list[str] = []
    n_images = 0
    for split, n_items in N_ITEMS.items():
        rng = random.Random(f"{seed}/task/{kind}/{split}")
        picker = Picker(rng)
        n_written = 0
        while n_written < n_items:
            scene = make_scene(rng)
            pixels = scene.pixels.tobytes()
            if pixels in pictures:
                continue
            questions = picker.pick(scene, kind, min(QUESTIONS_PER_IMAGE, n_items - n_written))
            if not questions:
                continue
            pictures.add(pixels)
            n_images += 1
            name = f"images/{n_images:06d}.png"
            Image.fromarray(scene.pixels).save(folder / name, compress_level=1)
            for question in questions:
                row = {"file_name": name, "question": question.text, "answer": question.answer, "split": split}
                lines.append(json.dumps(row))
            n_written += len(questions)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "task.yaml").write_text(_task_yaml(kind), encoding="utf-8")
    return n_images


def _task_yaml(kind: str) -> str:
    """The task file; answers stand in quotes, since a bare `yes` or `no` is a boolean in YAML."""
    return (
        "kind: visual-question-answering\n"
        f"name: {kind}\n"
        "data: .\n"
        "columns: {image: file_name, question: question, answer: answer, split: split}\n"
        f"labels: {json.dumps(list(ANSWERS))}\n"
        "metric: accuracy\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
