"""An artifact in onnxruntime-genai, from its folder: its answers are those of our runtime, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Workshop
from tests.runtime.test_generation import ATTENTION, QUESTION, compiled, picture
from vlmopt.prompting import Prompter
from vlmopt.runtime import Model, load

genai: Any = pytest.importorskip("onnxruntime_genai")

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
