"""A toy LLaVA that was trained to say the colour of a square, in a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tests import toys
from vlmopt.preprocess import Preprocessor
from vlmopt.prompting import Prompter
from vlmopt.tasks.dataset import load_task
from vlmopt.tasks.images import open_image

QUESTION = "what colour is it ?"
N_STEPS, RATE = 60, 3e-3


def write_answerer(folder: Path, task: Path) -> Path:
    """Trains on the profile split of the task and writes the folder."""
    from transformers import AutoModelForImageTextToText

    toys.write_model("llava_llama", folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    preprocessor = Preprocessor.load(folder)
    prompter = Prompter(preprocessor, toys.IMAGE_TOKEN, 16)
    samples = load_task(task).samples("profile")
    prompt = prompter.encode(QUESTION, 1)
    rows = [[*prompt, *prompter.encode_answer(sample.label)] for sample in samples]
    ids = torch.tensor(rows)
    pixels = torch.from_numpy(preprocessor.images([open_image(sample.image) for sample in samples])["pixel_values"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        for _ in range(N_STEPS):
            logits = model(input_ids=ids, pixel_values=pixels).logits[:, len(prompt) - 1 : -1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, len(prompt) :].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval().save_pretrained(folder)
    return folder
