"""Configuration files of an artifact: they say of the graphs beside them what other runtimes must know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.capture.test_generative import captured_toy
from tests.emit.toy import dual_program
from vlmopt.core.program import Generation, Program
from vlmopt.emit.configuration import copy_processor
from vlmopt.emit.genai_graphs import runs_in_genai

CONFIGURATION = {"model_type": "toy", "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}}


def program(**fields: Any) -> Program:
    generation = Generation(image_token=61, image_tokens=4, **fields)
    return replace(captured_toy("llava_llama")[1], generation=generation)


def copied(folder: Path, files: dict[str, Any], program: Program, graphs: tuple[str, ...] = ()) -> dict[str, Any]:
    """What lies in the artifact's folder by file name."""
    source, target = folder / "source", folder / "artifact"
    (target / "onnx").mkdir(parents=True)
    source.mkdir()
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    for name in graphs:
        (target / "onnx" / name).touch()
    copy_processor(sorted(source.iterdir()), program, target)
    return {path.name: json.loads(path.read_text()) for path in target.glob("*.json")}


def test_the_decoder_has_the_layers_that_its_cache_has_entries_for(tmp_path: Path) -> None:
    found = copied(tmp_path, {"config.json": CONFIGURATION}, program(cache_layers=(0, 2)))["config.json"]
    assert found["text_config"] == {"num_hidden_layers": 2, "layer_types": ["a", "c"]}
    assert "num_hidden_layers" not in found


def test_a_configuration_without_a_part_for_texts_is_the_decoders(tmp_path: Path) -> None:
    found = copied(tmp_path, {"config.json": {"num_hidden_layers": 3}}, program(cache_layers=(1,)))["config.json"]
    assert found["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("graphs", "external"),
    [
        (("embed_tokens.onnx", "decoder_model_merged.onnx"), None),
        (("embed_tokens.onnx", "embed_tokens.onnx_data", "decoder_model_merged.onnx"), {"embed_tokens.onnx": 1}),
    ],
)
def test_javascript_learns_the_type_of_the_files_and_which_have_data(
    tmp_path: Path, graphs: tuple[str, ...], external: dict[str, int] | None
) -> None:
    found = copied(tmp_path, {"config.json": CONFIGURATION}, program(), graphs)["config.json"]["transformers.js_config"]
    assert found["dtype"] == "fp32"
    assert found.get("use_external_data_format") == external


@pytest.mark.parametrize(
    ("stated", "stops", "expected"),
    [
        (None, (2, 5), {"eos_token_id": [2, 5]}),
        ({"temperature": 0.5}, (2,), {"temperature": 0.5, "eos_token_id": [2]}),
        ({"eos_token_id": 7}, (2,), {"eos_token_id": 7}),
        (None, (), None),
    ],
)
def test_the_tokens_that_end_an_answer_are_stated(
    tmp_path: Path, stated: Any, stops: tuple[int, ...], expected: Any
) -> None:
    files = {"config.json": CONFIGURATION} | ({} if stated is None else {"generation_config.json": stated})
    assert copied(tmp_path, files, program(stop_tokens=stops)).get("generation_config.json") == expected


def test_an_image_processor_inside_another_file_gets_its_own(tmp_path: Path) -> None:
    nested = {"processor_class": "ToyProcessor", "image_processor": {"crop_size": 32}, "patch_size": 8}
    found = copied(tmp_path, {"processor_config.json": nested}, program())
    assert found["preprocessor_config.json"] == {"processor_class": "ToyProcessor", "crop_size": 32}
    assert found["processor_config.json"] == nested


def test_an_image_processor_that_has_its_file_keeps_it(tmp_path: Path) -> None:
    files = {"preprocessor_config.json": {"crop_size": 16}, "processor_config.json": {"image_processor": {}}}
    assert copied(tmp_path, files, program())["preprocessor_config.json"] == {"crop_size": 16}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}, (0, "full")),
        ({"num_additional_image_tokens": 1, "vision_feature_select_strategy": "full"}, (1, "full")),
        ({"num_additional_image_tokens": 0, "vision_feature_select_strategy": "default"}, (0, "default")),
    ],
)
def test_a_class_token_that_is_dropped_is_not_counted_at_all(
    tmp_path: Path, stated: dict[str, Any], expected: tuple[int, str]
) -> None:
    found = copied(tmp_path, {"processor_config.json": stated}, program())["processor_config.json"]
    assert (found["num_additional_image_tokens"], found["vision_feature_select_strategy"]) == expected


@pytest.mark.parametrize(
    ("file", "stated", "expected"),
    [
        (
            "processor_config.json",
            {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
            {"patch_size": 14, "num_additional_image_tokens": -32, "vision_feature_select_strategy": "full"},
        ),
        (
            "processor_config.json",
            {"patch_size": 14, "vision_feature_select_strategy": "full"},
            {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": -32},
        ),
        ("processor_config.json", {"image_seq_len": 36}, {"image_seq_len": 4}),
        ("processor_config.json", {"image_seq_length": 7}, {"image_seq_length": 7}),
        ("preprocessor_config.json", {"image_seq_length": 36, "size": 84}, {"image_seq_length": 4, "size": 84}),
        ("config.json", {"image_seq_length": 36}, {"image_seq_length": 4}),
    ],
)
def test_processors_are_told_of_images_with_fewer_places(
    tmp_path: Path, file: str, stated: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = copied(tmp_path, {file: stated}, program(processor_tokens=36))[file]
    assert {key: value for key, value in found.items() if key != "transformers.js_config"} == expected


def test_an_image_processor_inside_another_file_is_told_too(tmp_path: Path) -> None:
    nested = {"image_processor": {"image_seq_length": 36}, "processor_class": "ToyProcessor"}
    found = copied(tmp_path, {"processor_config.json": nested}, program(processor_tokens=36))
    assert found["processor_config.json"] == {**nested, "image_processor": {"image_seq_length": 4}}
    assert found["preprocessor_config.json"] == {"image_seq_length": 4, "processor_class": "ToyProcessor"}


def test_files_for_genai_are_left_out_where_images_have_fewer_places() -> None:
    gemma = captured_toy("gemma3")[1]
    assert gemma.generation is not None
    assert runs_in_genai(gemma)
    assert not runs_in_genai(replace(gemma, generation=replace(gemma.generation, image_tokens=2, processor_tokens=4)))


def test_other_programs_take_the_files_as_they_are(tmp_path: Path) -> None:
    files = {"config.json": CONFIGURATION, "processor_config.json": {"image_processor": {"crop_size": 1}}}
    assert copied(tmp_path, files, dual_program()) == files


def with_key_heads(*counts: int) -> Program:
    """The toy as if passes had left so many heads of keys in its layers."""
    made = program()
    decoder = made.components["decoder_model_merged"]
    heads = dict(enumerate(counts))
    inputs = tuple(
        spec
        if spec.cache_layer is None
        else replace(spec, shape=(spec.shape[0], heads[spec.cache_layer], *spec.shape[2:]))
        for spec in decoder.inputs
    )
    return made.with_components({**made.components, decoder.name: replace(decoder, inputs=inputs)})


@pytest.mark.parametrize(("counts", "told"), [((2, 2, 2), 2), ((1, 1, 1), 1)])
def test_the_decoder_has_the_heads_of_keys_that_its_cache_has(
    tmp_path: Path, counts: tuple[int, ...], told: int
) -> None:
    text = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = copied(tmp_path, {"config.json": {"text_config": text}}, with_key_heads(*counts))["config.json"]
    assert found["text_config"] == {"num_attention_heads": 4, "num_key_value_heads": told}
    assert "transformers.js_config" in found


def test_javascript_is_told_nothing_of_layers_that_differ_in_heads(tmp_path: Path) -> None:
    text = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = copied(tmp_path, {"config.json": {"text_config": text}}, with_key_heads(2, 1, 2))["config.json"]
    assert found == {"text_config": text}
