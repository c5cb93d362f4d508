"""Tiny task folders, tiny programs that solve them, and processors of transformers to feed them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from transformers import BertTokenizer, CLIPImageProcessorPil

from vlmopt.core.program import Assembly, Component, Dim, ModelSource, Program, Similarity, TensorSpec
from vlmopt.graph.head import find_head
from vlmopt.graph.raising import raise_program

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, "a", "dot", "what", "colour", "big"]
DIMS = {"batch": Dim("batch", 1, 1024, 1), "length": Dim("length", 2, 12, 5)}

WriteTask = Callable[..., Path]


def draw(path: Path, colour: str, *, side: int = 8, shade: int = 0) -> None:
    """A plain image; `shade` makes its bytes differ from others of the same colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side, 3), COLOURS[colour], dtype=np.uint8)
    pixels[0, 0] = (shade % 256, shade // 256, 7)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Writes task.yaml, metadata.jsonl and one image for each file name; the first colour in a row is drawn."""

    def write(specification: Mapping[str, Any] | str, rows: Sequence[Mapping[str, Any]], *, name: str = "task") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        text = specification if isinstance(specification, str) else yaml.safe_dump(dict(specification))
        (folder / "task.yaml").write_text(text)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number, row in enumerate(rows):
            colour = next((word for word in " ".join(map(str, row.values())).split() if word in COLOURS), "red")
            if "file_name" in row and not (folder / row["file_name"]).exists():
                draw(folder / row["file_name"], colour, shade=number)
        return folder

    return write


def colour_rows(n: int, **columns: Any) -> list[dict[str, Any]]:
    names = list(COLOURS)
    return [{"file_name": f"{i:03d}.png", "label": names[i % 3], **columns} for i in range(n)]


class SmallPreprocessor:
    """Processors of transformers, for 8 x 8 pixels and the words of these tests."""

    def __init__(self) -> None:
        self.n_images = 0
        square = {"height": 8, "width": 8}
        self._images = CLIPImageProcessorPil(size=square, crop_size=square, image_mean=[0.0] * 3, image_std=[1.0] * 3)
        self._texts = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})

    def images(self, images: Sequence[Image.Image]) -> dict[str, NDArray[Any]]:
        self.n_images += len(images)
        return {"pixel_values": self._images(images=list(images), return_tensors="np")["pixel_values"]}

    def texts(self, texts: Sequence[str], length: int | None = None) -> dict[str, NDArray[Any]]:
        padding = {"padding": True} if length is None else {"padding": "max_length", "max_length": length}
        made = self._texts(list(texts), truncation=length is not None, return_tensors="np", **padding)
        return {name: made[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def preprocessor() -> SmallPreprocessor:
    return SmallPreprocessor()


class _ImageEncoder(nn.Module):
    """The mean colour, projected to four numbers."""

    def __init__(self, *, has_projection: bool = True) -> None:
        super().__init__()
        self.visual_projection = nn.Linear(3, 4, bias=False) if has_projection else nn.Identity()
        if has_projection:
            self.visual_projection.weight = nn.Parameter(torch.eye(4, 3))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.visual_projection(pixel_values.mean((2, 3)))


class _TextEncoder(nn.Module):
    """The sum of word vectors, of which the colours have one each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 4)
        weight = torch.zeros(len(WORDS), 4)
        for axis, colour in enumerate(COLOURS):
            weight[WORDS.index(colour), axis] = 1
        weight[WORDS.index("big"), 3] = 2
        self.embedding.weight = nn.Parameter(weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (self.embedding(input_ids) * attention_mask[..., None]).sum(1)


class _Fused(nn.Module):
    """Logits of the colours, from the image and nothing of the question."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = _ImageEncoder(has_projection=False), _TextEncoder()
        self.classifier = nn.Linear(3, 3)
        self.classifier.weight, self.classifier.bias = nn.Parameter(torch.eye(3)), nn.Parameter(torch.zeros(3))

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        asked = self.text(input_ids, attention_mask)[:, :3]
        return self.classifier(self.image(pixel_values) + 0 * asked)


PIXELS = TensorSpec("pixel_values", ("batch", 3, 8, 8), "float32")
TOKENS = (
    TensorSpec("input_ids", ("batch", "length"), "int64"),
    TensorSpec("attention_mask", ("batch", "length"), "int64"),
)


def component(name: str, model: nn.Module, inputs: Sequence[TensorSpec], output: TensorSpec) -> Component:
    sizes = {"batch": 2, "length": 5}
    examples, dynamic = [], []
    for spec in inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        examples.append(torch.ones(shape, dtype=getattr(torch, spec.dtype)))
        dynamic.append({i: torch.export.Dim.AUTO for i, size in enumerate(spec.shape) if isinstance(size, str)})
    exported = torch.export.export(model.eval(), tuple(examples), dynamic_shapes=tuple(dynamic))
    return Component(name, raise_program(exported), tuple(inputs), (output,))


def _program(assembly: Assembly, components: Sequence[Component], **more: Any) -> Program:
    heads = {part.name: head for part in components if (head := find_head(part)) is not None}
    source = ModelSource("small", "small", "Small", "0" * 64)
    return Program(assembly, {part.name: part for part in components}, DIMS, source, heads=heads, **more)


@pytest.fixture(scope="session")
def dual() -> Program:
    image = component("image_encoder", _ImageEncoder(), [PIXELS], TensorSpec("image_embeds", ("batch", 4), "float32"))
    text = component("text_encoder", _TextEncoder(), TOKENS, TensorSpec("text_embeds", ("batch", 4), "float32"))
    return _program(Assembly.DUAL, [image, text], similarity=Similarity(10.0))


@pytest.fixture(scope="session")
def headless() -> Program:
    output = TensorSpec("image_embeds", ("batch", 3), "float32")
    image = component("image_encoder", _ImageEncoder(has_projection=False), [PIXELS], output)
    return _program(Assembly.FUSED, [image])


@pytest.fixture(scope="session")
def fused() -> Program:
    model = component("model", _Fused(), [PIXELS, *TOKENS], TensorSpec("logits", ("batch", 3), "float32"))
    return _program(Assembly.FUSED, [model], labels=tuple(COLOURS))


def outputs_of(program: Program, workload: Any) -> dict[str, torch.Tensor]:
    """The first output of every component over all feeds."""
    result = {}
    for name, feeds in workload.feeds.items():
        part = program.components[name]
        rows = [part.graph(*(feed[spec.name] for spec in part.inputs))[0] for feed in feeds]
        result[name] = torch.cat(rows).detach()
    return result
