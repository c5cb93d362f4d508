"""What every row of the comparison starts from: the real dual encoder at 112 pixels, its head fitted, and arrays.

The original is what `vlmopt optimize` compares with: the image tower with a head fitted in closed form on the profile
split (classification), or its own projection (retrieval). `plain` is the same in PyTorch as its authors wrote it,
compared with the captured program before anything is made of it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from tests.benchmarks import towers
from tests.benchmarks.cutting import SEED
from tests.benchmarks.peer_plain import PlainTower
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.graph.head import head_module
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.tasks.kinds.image_text_retrieval import ImageTextRetrieval
from vlmopt.verify.parity import difference
from vlmopt.workflow.answering import program_outputs
from vlmopt.workflow.opening import OpenedModel, OpenedTask, open_model, open_task, with_fitted_head

TOWER, PIXELS = "image_encoder", 112
N_CALIBRATED = 300
TOLERANCE = 1e-3  # of the largest output; another order of sums gives 1e-5


@dataclass(frozen=True)
class Given:
    """A task at 112 pixels; `is_short` for a quick trial, with few pictures and one epoch where weights are trained."""

    task: str
    opened: OpenedModel
    bound: OpenedTask
    original: Program
    is_short: bool = False

    def test(self) -> TaskWorkload:
        """The test split, read through a source of its own."""
        source = open_task(self.opened, str(self.bound.task.path), seed=SEED, progress=Silent()).source
        return source.open_test(self.original)

    @property
    def key(self) -> list[str]:
        """What decides all that is made of it."""
        return [self.original.source.fingerprint, self.bound.task.fingerprint, str(PIXELS), str(self.is_short)]


def given(task: str, *, n_samples: int | None = None) -> Given:
    """The model at 112 pixels bound to the task, its head fitted.

    Args:
        n_samples: pictures of every split, for a quick trial.
    """
    place = towers.places(task)[1] if n_samples is None else few_pictures(task, n_samples)
    opened = open_model(str(model_folder()), device="cpu", dtype="float32", allow_pickle=False, progress=Silent())
    bound = open_task(opened, str(place), seed=SEED, progress=Silent())
    fit = bound.source.workload(bound.program, "profile")
    original = with_fitted_head(bound.program, fit, seed=SEED, progress=Silent())
    return Given(task, opened, bound, original, n_samples is not None)


def few_pictures(task: str, n: int) -> Path:
    """The task with so many pictures of every split, drawn once."""
    source, target = towers.places(task)[1], towers.cache() / "benchmarks" / "peers" / f"few-{task}-{n}"
    settings = yaml.safe_load((source / "task.yaml").read_text(encoding="utf-8"))
    images, split = (source / settings["data"]).resolve(), settings["columns"]["split"]
    lines = (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(SEED).shuffle(lines)
    by_split: dict[str, list[str]] = {}
    for line in lines:
        by_split.setdefault(json.loads(line)[split], []).append(line)
    (target / "images").mkdir(parents=True, exist_ok=True)
    for style in {json.loads(line)["style"] for line in lines}:
        if not (target / "images" / style).exists():
            (target / "images" / style).symlink_to(images / style)
    kept = [line for own in by_split.values() for line in own[:n]]
    (target / "images" / "metadata.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    (target / "task.yaml").write_text(yaml.safe_dump({**settings, "data": "images"}), encoding="utf-8")
    return target


def model_folder() -> Path:
    """The example's model with a processor of 112 pixels, weights linked."""
    source, target = towers.places("style")[0], towers.cache() / "benchmarks" / "peers" / f"model-{PIXELS}"
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        place = target / file.name
        if file.name in ("preprocessor_config.json", "processor_config.json"):
            place.write_text(json.dumps(_resized(json.loads(file.read_text(encoding="utf-8"))), indent=2))
        elif not place.exists():
            place.symlink_to(file.resolve())
    return target


def _resized(content: Any) -> Any:
    """The configuration with images of 112 pixels."""
    if not isinstance(content, dict):
        return content
    if content.keys() == {"height", "width"}:
        return {"height": PIXELS, "width": PIXELS}
    return {key: _resized(value) for key, value in content.items()}


def write_plain(one: Given, folder: Path) -> None:
    """`tower.pt` and one picture, `sample.npy`.

    Raises:
        ValueError: the module computes something else than the captured program.
    """
    from transformers import VisionTextDualEncoderModel

    model = VisionTextDualEncoderModel.from_pretrained(one.opened.folder).eval()
    component = one.original.components[TOWER]
    head = head_module(component, one.original.heads[TOWER])
    tower = PlainTower(model.vision_model, head).eval().requires_grad_(False)
    check = one.bound.source.workload(one.original, "validation", limit=8)
    batch = check.feeds[TOWER][0]["pixel_values"]
    with torch.inference_mode():
        found = difference(tower(batch), program_outputs(one.original, check, what="", progress=Silent())[TOWER][:8])
    if found > TOLERANCE:
        raise ValueError(f"the plain tower differs from the program by {found:.2g} of the largest output")
    torch.save(tower, folder / "tower.pt")
    np.save(folder / "sample.npy", batch[:1].numpy())


@contextmanager
def arrays(one: Given, folder: Path) -> Iterator[TaskWorkload]:
    """The pictures of all splits as files while rows are made, and what the validation split scores them by.

    `calibration.npy`, `validation.npy` and `test.npy` are [n, 3, h, w]; `validation.npz` holds `labels`, or for
    retrieval the original's embeddings `texts` and the name `text_of` every picture.
    """
    test = one.test()
    profile = one.bound.source.workload(one.original, "profile", limit=N_CALIBRATED)
    check = one.bound.source.workload(one.original, "validation")
    files = {"calibration": profile, "validation": check, "test": test}
    for name, split in files.items():
        np.save(folder / f"{name}.npy", torch.cat([feed["pixel_values"] for feed in split.feeds[TOWER]]).numpy())
    np.savez(folder / "validation.npz", **_facts(one, check))
    try:
        yield test
    finally:
        for name in files:
            (folder / f"{name}.npy").unlink()
        (folder / "validation.npz").unlink()


def _facts(one: Given, check: TaskWorkload) -> dict[str, Any]:
    if not isinstance(check, ImageTextRetrieval):
        return {"labels": check.targets.numpy()}  # type: ignore[attr-defined]
    text_of = torch.zeros(check.pairs.n_images, dtype=torch.long)
    text_of[check.pairs.image] = check.pairs.text
    texts = program_outputs(one.original, check, what="", progress=Silent())[check.text_component]
    return {"texts": texts.numpy(), "text_of": text_of.numpy()}


def original_outputs(one: Given, test: TaskWorkload, folder: Path) -> dict[str, Tensor]:
    """What the original makes of the test split, computed once."""
    file = folder / "original.pt"
    if not file.is_file():
        torch.save(program_outputs(one.original, test, what="the original", progress=Silent()), file)
    found: dict[str, Tensor] = torch.load(file, weights_only=True)
    return found


def link_or_copy(source: Path, target: Path) -> None:
    """The file under another name; a hard link where the file system has them."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy(source, target)
