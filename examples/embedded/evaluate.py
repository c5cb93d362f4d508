"""Measures the embedded model on the test split of the four tasks, through plain transformers code.

    python examples/embedded/make_tasks.py TASKS
    python examples/embedded/evaluate.py TASKS

Why: training measures itself on a rearranged form of the model. This script uses only what a user has:
`from_pretrained` on the model folder, the saved processor, and the files of the tasks.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image
from transformers import ViltForQuestionAnswering, ViltProcessor

KINDS = ("colour", "shape", "count", "relation")


def main() -> int:
    """Print one row of a table per task."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path, metavar="TASKS", help="folder that make_tasks.py wrote")
    parser.add_argument("--model", type=Path, default=here / "model", help="model folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = ViltForQuestionAnswering.from_pretrained(options.model).eval()
    processor = ViltProcessor.from_pretrained(options.model, backend="pil")
    print("| task | n | accuracy | majority answer | answer guessed from the wording |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        rows = [json.loads(line) for line in (options.tasks / kind / "metadata.jsonl").read_text("utf-8").splitlines()]
        test = [row for row in rows if row["split"] == "test"]
        given = predict(model, processor, options.tasks / kind, test)
        right = sum(row["answer"] == answer for row, answer in zip(test, given, strict=True)) / len(test)
        most = Counter(row["answer"] for row in test).most_common(1)[0][1] / len(test)
        blind = blind_accuracy([row for row in rows if row["split"] == "profile"], test)
        print(f"| {kind} | {len(test)} | {right:.3f} | {most:.3f} | {blind:.3f} |", flush=True)
    return 0


@torch.inference_mode()
def predict(
    model: ViltForQuestionAnswering, processor: ViltProcessor, folder: Path, rows: list[dict[str, str]]
) -> list[str]:
    """The model's answer to each row."""
    answers: list[str] = []
    for start in range(0, len(rows), 100):
        some = rows[start : start + 100]
        images = [Image.open(folder / row["file_name"]) for row in some]
        inputs = processor(images, [row["question"] for row in some], padding=True, return_tensors="pt")
        answers.extend(model.config.id2label[index] for index in model(**inputs).logits.argmax(-1).tolist())
    return answers


def blind_accuracy(known: list[dict[str, str]], test: list[dict[str, str]]) -> float:
    """How often the commonest answer to the same wording, or failing that to its first two words, is right."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in known:
        seen[row["question"]][row["answer"]] += 1
        seen[_opening(row)][row["answer"]] += 1
    guesses = [(seen[row["question"]] or seen[_opening(row)]).most_common(1)[0][0] for row in test]
    return sum(row["answer"] == guess for row, guess in zip(test, guesses, strict=True)) / len(test)


def _opening(row: dict[str, str]) -> str:
    return " ".join(row["question"].split()[:2])


if __name__ == "__main__":
    raise SystemExit(main())
