"""Toys with an image in front of their text, or with attention across to image or prompt, trained on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests import toys
from tests.capture.test_generative import source_of
from vlmopt.capture import capture_model
from vlmopt.graph.joined import MODEL, joined
from vlmopt.preprocess import Preprocessor
from vlmopt.tasks.binding import TaskSource, bind
from vlmopt.tasks.dataset import load_task

N_STEPS, RATE = 30, 3e-3


def write_writer(family: str, folder: Path, task: Path) -> Path:
    """Writes the folder of a toy that was trained on the profile split, as its joined program reads it: the graph's
    weights are those of the model."""
    toys.write_model(family, folder)
    model = _loaded(folder)
    preprocessor, known = Preprocessor.load(folder), load_task(str(task))
    program = bind(capture_model(model, source_of(model), image=toys.IMAGE_SIZES.get(family)), known, preprocessor)
    whole = joined(program).program.components[MODEL]
    (feed,) = TaskSource(known, preprocessor).workload(program, "profile").feeds[MODEL]
    taught = feed["labels"] >= 0
    weights = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(weights, lr=RATE)
    for _ in range(N_STEPS):
        (scores,) = whole.graph(*(feed[spec.name] for spec in whole.inputs))
        optimizer.zero_grad()
        (-scores[..., 0][taught].mean()).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def _loaded(folder: Path) -> Any:
    """By the class that its configuration names, which the automatic choice does not know for all of them."""
    import transformers

    names = AutoConfig.from_pretrained(folder).architectures or []
    kind: Any = getattr(transformers, names[0]) if names else AutoModelForImageTextToText
    return kind.from_pretrained(folder).eval()
