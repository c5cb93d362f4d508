"""Small artifacts of every assembly, emitted once a session."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from tests.emit.toy import DIMS, dual_program
from vlmopt.core.program import Assembly, Component, ModelSource, Program, TensorSpec
from vlmopt.core.progress import Silent
from vlmopt.emit import build_manifest, emit_program, write_manifest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "what", "colour"]
LABELS = ("red", "green", "blue")


def write_processor(folder: Path) -> None:
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    tokenizer = {"tokenizer_class": "BertTokenizer", "model_max_length": 16}
    contents = {"preprocessor_config": processor, "tokenizer_config": tokenizer, "config": {"model_type": "bert"}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")


def publish(program: Program, folder: Path, *, prompts: Sequence[str] = ()) -> Path:
    folder.mkdir()
    write_processor(folder)
    emitted = emit_program(program, ("onnx",), folder, progress=Silent())
    write_manifest(build_manifest(program, emitted, folder, files=list(folder.iterdir()), prompts=prompts), folder)
    return folder


class Colours(nn.Module):
    """Scores of red, green and blue: the mean of each channel, times twice the text's length where there is a text."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor]:
        scores = pixel_values.mean(dim=[2, 3])
        if input_ids is not None:
            scores = scores * (input_ids.shape[1] * 2) + (input_ids.sum(dim=1, keepdim=True) * 0).to(scores.dtype)
        return (scores,)


def fused_program(*, has_text: bool) -> Program:
    batch, text = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("text", min=2, max=16)
    pixels, ids = torch.ones(2, 3, 16, 16), torch.ones(2, 5, dtype=torch.int64)
    args, shapes = ((pixels, ids), ({0: batch}, {0: batch, 1: text})) if has_text else ((pixels,), ({0: batch},))
    graph = torch.export.export(Colours(), args, dynamic_shapes=shapes).module(check_guards=False)
    specs = (
        TensorSpec("pixel_values", ("batch", 3, 16, 16), "float32"),
        TensorSpec("input_ids", ("batch", "text"), "int64"),
    )
    outputs = (TensorSpec("logits", ("batch", 3), "float32"),)
    component = Component("model", graph, specs[: len(args)], outputs)
    source = ModelSource("toy", "toy", "Colours", "0" * 64)
    return Program(Assembly.FUSED, {"model": component}, DIMS, source, labels=LABELS)


def prompted_program() -> Program:
    return replace(dual_program(), labels=("red", "blue"))


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (20, 12), colour)
