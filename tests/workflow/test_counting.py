"""Processors of an artifact whose images have fewer features: they write as many places, or the user is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from transformers import LlavaProcessor

from tests.capture.test_generative import captured_toy
from tests.test_prompting import IMAGE, N_FEATURES, llava_folder, pictures, plain_folder
from vlmopt.core.program import Generation, Program
from vlmopt.emit.configuration import copy_processor
from vlmopt.workflow.counting import uncounted


def program(family: str = "llava_llama", n: int = 5) -> Program:
    generation = Generation(image_token=IMAGE, image_tokens=n, processor_tokens=N_FEATURES)
    return replace(captured_toy(family)[1], generation=generation)


def test_the_processor_of_transformers_writes_the_places_that_are_left(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    source = llava_folder(tmp_path / "model")
    copy_processor([path for path in source.iterdir() if path.is_file()], program(), target)
    made = LlavaProcessor.from_pretrained(target)(text=["<image> what"], images=pictures(1))["input_ids"][0]
    assert made.count(IMAGE) == 5
    assert uncounted(program(), target) == []
    stated = json.loads((target / "processor_config.json").read_text())
    assert stated["num_additional_image_tokens"] == 5 - N_FEATURES
    assert stated["vision_feature_select_strategy"] == "full"


def test_a_processor_that_writes_others_is_named(tmp_path: Path) -> None:
    (line,) = uncounted(program(), llava_folder(tmp_path / "model"))
    assert "has 5 features, and the artifact's processor writes 16 places" in line
    (line,) = uncounted(program(), plain_folder(tmp_path / "plain"))
    assert "no processor in the artifact writes their places: clients other than vlmopt have to write 5 tokens" in line
    whole = replace(program(), generation=Generation(image_token=IMAGE, image_tokens=N_FEATURES))
    assert uncounted(whole, tmp_path / "plain") == []


def test_genai_is_named_where_it_would_run_the_original(tmp_path: Path) -> None:
    lines = uncounted(program("gemma3"), plain_folder(tmp_path))
    assert any("no files for onnxruntime-genai: it writes places by itself, and not 5" in line for line in lines)
