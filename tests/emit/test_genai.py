"""What onnxruntime-genai reads of an artifact: graphs that compute what the program does, files that say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests import toys
from tests.capture.test_generative import captured_toy, prompts
from vlmopt.core.program import Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.emit.configuration import copy_processor
from vlmopt.emit.genai_graphs import runs_in_genai
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION, embedded, placed, step

DECODER_BYTES = 122_880  # three layers of 32 by 64, each weight on a page of its own
PROCESSOR = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 0.25,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


@pytest.fixture(scope="module")
def program() -> Program:
    return captured_toy("gemma3")[1]


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emitted")
    assert emit_program(program, ("onnx",), folder, progress=Silent()).keys() == {VISION, EMBEDDING, DECODER}
    return folder / "onnx"


def run(file: Path, feed: Mapping[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: np.ascontiguousarray(value) for name, value in feed.items()})
    return [torch.from_numpy(value) for value in found]


@pytest.mark.parametrize("n_images", [(1,), (2, 1), (0, 2), (0,)])
def test_its_embedding_puts_features_in_their_places(program: Program, folder: Path, n_images: tuple[int, ...]) -> None:
    ids, _, pixels = prompts(program, n_images=n_images, n_padding=1)
    features = torch.zeros(0, 32) if pixels is None else run(folder / f"{VISION}.onnx", {"pixel_values": pixels})[0]
    (found,) = run(folder / "genai_embedding.onnx", {"input_ids": ids, "image_features": features})
    with torch.no_grad():
        assert torch.allclose(found, embedded(program, ids, pixels), atol=1e-5)


def test_an_image_token_without_a_feature_keeps_its_own_embedding(program: Program, folder: Path) -> None:
    ids = torch.tensor([[5, toys.IMAGE_TOKEN, toys.IMAGE_TOKEN, 6]])
    features = torch.full((1, 32), 7.0)
    (found,) = run(folder / "genai_embedding.onnx", {"input_ids": ids, "image_features": features})
    with torch.no_grad():
        wanted = embedded(program, ids)
    wanted[0, 1] = 7.0
    assert torch.allclose(found, wanted, atol=1e-5)


def test_its_decoder_finds_the_types_of_tokens_itself(program: Program, folder: Path) -> None:
    ids, mask, pixels = prompts(program, n_images=(1, 1), n_padding=2)
    names = {spec.name: spec.name_in_files for spec in program.components[DECODER].inputs}
    with torch.no_grad():
        embeds = embedded(program, ids, pixels)
        cache = None
        for _ in range(3):
            place = placed(program, mask, embeds.shape[1], input_ids=ids)
            past = {name: torch.zeros(2, 2, 0, 8) for name in names if "past" in name} if cache is None else cache
            feed = {"inputs_embeds": embeds, **place, **past}
            given = {names[name]: value for name, value in feed.items() if name != "token_type_ids"}
            found = run(folder / "genai_decoder.onnx", {**given, "input_ids": ids[:, -embeds.shape[1] :]})[0]
            logits, cache = step(program, embeds, mask, cache, input_ids=ids)
            seen = mask[:, -embeds.shape[1] :].bool()
            assert torch.allclose(found[seen], logits[seen], atol=1e-4)
            token = torch.full((2, 1), toys.IMAGE_TOKEN)  # an answer may hold any token
            embeds = embedded(program, token)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)


def test_weights_lie_on_disk_once(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes["embed_tokens.onnx_data"] == 64 * 32 * 4
    assert sizes["decoder_model_merged.onnx_data"] == DECODER_BYTES
    assert sizes["genai_decoder.onnx"] - sizes["decoder_model_merged.onnx"] < 1000
    assert sizes["genai_embedding.onnx"] < 4000


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"source": "llava"}, False),
        ({"types": (0, 0, 1)}, False),  # an answer's own type is not in its ids
        ({"heads": 1}, False),  # of one layer, where all have two
        ({"name": "past_key_values_1_query"}, False),
        ({"components": [VISION, EMBEDDING]}, False),
    ],
)
def test_programs_that_it_cannot_run_get_nothing(program: Program, change: dict[str, Any], expected: bool) -> None:
    assert program.generation is not None
    if "source" in change:
        program = replace(program, source=replace(program.source, model_type=change["source"]))
    if "types" in change:
        program = replace(program, generation=replace(program.generation, token_types=change["types"]))
    if "heads" in change or "name" in change:
        decoder = program.components[DECODER]
        key = next(spec for spec in decoder.inputs if spec.name == "past_key_values_1_key")
        heads = change.get("heads", key.shape[1])
        cut = replace(key, name=change.get("name", key.name), shape=(key.shape[0], heads, *key.shape[2:]))
        inputs = tuple(cut if spec is key else spec for spec in decoder.inputs)
        program = program.with_components({**program.components, DECODER: replace(decoder, inputs=inputs)})
    if "components" in change:
        program = program.with_components({name: program.components[name] for name in change["components"]})
    assert runs_in_genai(program) is expected


def test_other_families_and_formats_have_none_of_its_graphs(program: Program, tmp_path: Path) -> None:
    emit_program(captured_toy("llava_llama")[1], ("onnx",), tmp_path, progress=Silent())
    emit_program(program, ("pt2",), tmp_path, progress=Silent())
    assert not list(tmp_path.rglob("genai*"))


def written(program: Program, folder: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    """What lies in an artifact's folder, by file name."""
    source, target = folder / "source", folder / "artifact"
    source.mkdir()
    (target / "onnx").mkdir(parents=True)
    (target / "onnx" / "genai_embedding.onnx").touch()
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    copy_processor(sorted(source.iterdir()), program, target)
    return {path.name: json.loads(path.read_text()) for path in target.glob("*.json")}


def test_the_configuration_states_names_sizes_tokens_and_search(program: Program, tmp_path: Path) -> None:
    assert program.generation is not None
    stops = replace(program, generation=replace(program.generation, stop_tokens=(1, 5)))
    files = {
        "config.json": {"pad_token_id": 9, "text_config": {"bos_token_id": 2, "num_attention_heads": 4}},
        "generation_config.json": {"do_sample": True, "top_k": 64, "pad_token_id": 0, "temperature": None},
    }
    found = written(stops, tmp_path, files)["genai_config.json"]
    model, search = found["model"], found["search"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("gemma3", 128, 64)
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([1, 5], 2, 0)
    decoder = model["decoder"]
    assert decoder["filename"] == "onnx/genai_decoder.onnx"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (3, 2, 8)
    assert (decoder["hidden_size"], decoder["num_attention_heads"]) == (32, 4)
    assert (search["do_sample"], search["top_k"], search["temperature"], search["max_length"]) == (True, 64, 1.0, 128)
    assert search["past_present_share_buffer"] is False  # the graphs return a cache of its own


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, ["DecodeImage", "Resize", "Rescale", "Normalize", "Permute3D"]),
        ({"do_normalize": False}, ["DecodeImage", "Resize", "Rescale", "Permute3D"]),
        (
            {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            ["DecodeImage", "Resize", "CenterCrop", "Rescale", "Normalize", "Permute3D"],
        ),
        ({"size": {"shortest_edge": 32}}, None),
        ({"size": {"height": 40, "width": 40}}, None),  # the graph takes 32
        ({"size": {"height": 20, "width": 20}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, None),
        ({"resample": 5}, None),
        ({"do_rescale": False}, None),
        ({"do_pan_and_scan": True}, None),
    ],
)
def test_images_are_prepared_by_its_operations_or_by_none(
    program: Program, tmp_path: Path, change: dict[str, Any], kinds: list[str] | None
) -> None:
    files = written(program, tmp_path, {"config.json": {}, "preprocessor_config.json": {**PROCESSOR, **change}})
    assert "genai_config.json" in files
    if kinds is None:
        assert "genai_processor.json" not in files
        return
    steps = [entry["operation"] for entry in files["genai_processor.json"]["processor"]["transforms"]]
    assert [step["type"] for step in steps] == kinds
    attributes = {step["type"]: step["attrs"] for step in steps}
    assert attributes["Resize"]["interpolation"] == "LINEAR"
    assert attributes["Rescale"] == {"rescale_factor": 0.25}
    assert attributes.get("Normalize", {"mean": [0.1, 0.2, 0.3]})["mean"] == [0.1, 0.2, 0.3]
