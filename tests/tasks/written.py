"""A toy LLaVA with its processor, half trained to answer rows about colours, and those rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests import toys
from tests.tasks.conftest import COLOURS, draw
from vlmopt.capture import capture_model
from vlmopt.core.program import ModelSource, Program
from vlmopt.preprocess import Preprocessor

PAD, START, END, UNKNOWN = range(4)
SPOKEN = ["red", "green", "blue", "a", "square", "what", "colour", "is", "it", "?", "big", "small", "shape", "which"]
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *SPOKEN]
VOCABULARY += [f"word{i}" for i in range(len(VOCABULARY), 64)]
VOCABULARY[toys.IMAGE_TOKEN] = "<image>"
SIDE, N_FEATURES = 32, 16
N_STEPS = 10  # enough for some of the answers and not for all of them
QUESTIONS = ("what colour is it ?", "shape ?")
ASKED: dict[str, Any] = {"kind": "image-text-to-text"}
CAPTIONED: dict[str, Any] = {"kind": "image-captioning"}


@dataclass(frozen=True)
class Toy:
    model: Any  # LlavaForConditionalGeneration, half trained on the rows of `question_rows`
    program: Program
    preprocessor: Preprocessor


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<image>"], **named)


def question_rows(n: int = 24) -> list[dict[str, Any]]:
    """Colours and their shape, in every split; questions and answers are of two lengths."""
    rows = []
    for i in range(n):
        colour, split = list(COLOURS)[i % 3], ("train", "validation", "test")[i // 3 % 3]
        row = {"file_name": f"{i:02d}.png", "drawn": colour, "split": split}
        rows.append({**row, "question": QUESTIONS[i % 2], "answer": f"a {colour} square" if i % 2 else colour})
    return rows


def caption_rows(n: int = 18) -> list[dict[str, Any]]:
    kept = ("file_name", "drawn", "split")
    return [
        {**{name: row[name] for name in kept}, "text": [f"a {row['drawn']} square", f"it is {row['drawn']}"]}
        for row in question_rows(n)
    ]


def ids_of(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]


def half_trained(folder: Path, images: Path) -> Toy:
    """The toy in this folder; its training draws into the other."""
    model: Any = toys.make("llava_llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    size = {"height": SIDE, "width": SIDE}
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer(), **options).save_pretrained(folder)
    model.save_pretrained(folder)
    preprocessor = Preprocessor.load(folder)
    train(model, preprocessor, images)
    program = capture_model(model, ModelSource("toy", "llava", type(model).__name__, ""))
    return Toy(model, program, preprocessor)


def train(model: Any, preprocessor: Preprocessor, folder: Path) -> None:
    """Half-heartedly, on rows that are put together here by hand."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        samples = []
        for i, row in enumerate(question_rows()):
            draw(folder / row["file_name"], list(COLOURS)[i % 3], shade=i)
            pixels = torch.from_numpy(preprocessor.images([folder / row["file_name"]])["pixel_values"])
            prompt = [START, *[toys.IMAGE_TOKEN] * N_FEATURES, *ids_of(row["question"])]
            samples.append((prompt, [*ids_of(row["answer"]), END], pixels))
        for _ in range(N_STEPS):
            loss = sum(lone_losses(model, *sample).mean() for sample in samples) / len(samples)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
    model.eval()


def lone_losses(model: Any, prompt: list[int], answer: list[int], pixels: Tensor) -> Tensor:
    """Of every token of one answer, without padding and batch."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids, pixel_values=pixels).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
