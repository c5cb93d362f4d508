"""An artifact in onnxruntime-genai, from its folder: its answers are those of our runtime, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import toys
from tests.conftest import Workshop
from tests.runtime.test_generation import ATTENTION, QUESTION, compiled, picture
from vlmopt.prompting import Prompter
from vlmopt.runtime import Model, load

genai: Any = pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.slow

N_NEW = 8


def answered_in_genai(artifact: Path, model: Model, colours: tuple[str, ...]) -> list[int]:
    """Behind ids and pixels as our own preprocessing makes them, without the token that ends the answer."""
    generation = model.manifest.generation
    assert generation is not None
    prompter = Prompter(model.preprocessor, generation.image_token, generation.image_tokens)
    ids = np.array([prompter.encode(QUESTION, len(colours))], dtype=np.int32)
    inputs = genai.NamedTensors()
    inputs["input_ids"] = ids
    if colours:
        pixels = model.preprocessor.images([picture(colour) for colour in colours])["pixel_values"]
        inputs["pixel_values"] = np.ascontiguousarray(pixels)
        inputs["num_image_tokens"] = np.array([generation.image_tokens], dtype=np.int64)
    there = genai.Model(str(artifact))
    settings = genai.GeneratorParams(there)
    settings.set_search_options(max_length=ids.shape[1] + N_NEW)
    generator = genai.Generator(there, settings)
    generator.set_inputs(inputs)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[ids.shape[1] :]]


@pytest.mark.parametrize("branches", [[], [ATTENTION]], ids=["whole", "cut"])  # the cache of a cut one is renumbered
def test_answers_in_genai_are_ours_token_by_token(workshop: Workshop, branches: list[str]) -> None:
    artifact = compiled(workshop, "gemma3", branches)
    model = load(artifact, threads=1)
    questions: list[tuple[str, ...]] = [("red",), ("red", "blue"), ()]
    ours = [model.generate(QUESTION, [picture(c) for c in colours], max_new_tokens=N_NEW) for colours in questions]
    found = [answered_in_genai(artifact, model, colours) for colours in questions]
    assert model.manifest.generation is not None
    ends = model.manifest.generation.stop_tokens  # genai stops at one and does not return it
    assert found == [[token for token in answer.token_ids if token not in ends] for answer in ours]
    if not branches:  # what is left of the cut one hardly looks at images
        assert len({answer.token_ids for answer in ours}) == len(questions)


def test_images_prepared_by_genai_are_ours(workshop: Workshop, tmp_path: Path) -> None:
    """Resized ones too: both resize as PIL does."""
    artifact = compiled(workshop, "gemma3", [])
    ours = load(artifact, threads=1).preprocessor
    copy = tmp_path / "artifact"
    shutil.copytree(artifact, copy)
    write_tokenizer(copy)
    model = genai.Model(str(copy))
    process = model.create_multimodal_processor()
    for width, height in ((32, 32), (91, 17)):
        file = tmp_path / f"{width}.png"
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        generator = genai.Generator(model, genai.GeneratorParams(model))
        with pytest.raises(
            RuntimeError, match="exceeds max length"
        ):  # 256 places for an image are more than a toy reads
            generator.set_inputs(process("<start_of_image>what", images=genai.Images.open(str(file))))
        found = generator.get_input("pixel_values")
        assert np.abs(found - ours.images([file])["pixel_values"]).max() < 1e-5


def write_tokenizer(folder: Path) -> None:
    """Single letters and Gemma's tokens around images: genai reads no tokenizer of whole words, such as the toy's."""
    from tokenizers import Tokenizer, models

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_image>", "<end_of_image>", *"abcdefghijklmnopqrstuvwxyz\n"]
    words += [f"w{i}" for i in range(len(words), toys.IMAGE_TOKEN)] + ["<image_soft_token>"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", fuse_unk=True))
    made.add_special_tokens([word for word in words if word.startswith("<")])
    made.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer", **names}))
