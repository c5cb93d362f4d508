"""The graphs of a model that writes text, in ONNX Runtime: a prompt, steps behind it, and weights written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.capture.test_generative import captured_toy, prompts, quick
from vlmopt.core.program import NO_WORD, Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.emit.genai_graphs import runs_in_genai
from vlmopt.emit.onnx_file import SharedWeights, emit_onnx
from vlmopt.graph.assembled import (
    DECODER,
    EMBEDDING,
    ENCODER,
    VISION,
    Cache,
    Opening,
    embedded,
    empty_cache,
    on_the_right,
    opened,
    placed,
    step,
)

EMBEDDING_BYTES = 64 * 32 * 4  # vocabulary times width, float32


@dataclass(frozen=True)
class Emitted:
    program: Program
    folder: Path
    files: Mapping[str, Mapping[str, str]]
    sessions: dict[str, onnxruntime.InferenceSession] = field(default_factory=dict)

    def run(self, component: str, feed: Mapping[str, Tensor]) -> list[Tensor]:
        if component not in self.sessions:
            file = self.folder / self.files[component]["onnx"]
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = 1
            self.sessions[component] = onnxruntime.InferenceSession(
                str(file), settings, providers=["CPUExecutionProvider"]
            )
        names = {spec.name: spec.name_in_files for spec in self.program.components[component].inputs}
        arrays = {names[key]: np.ascontiguousarray(value) for key, value in feed.items() if key in names}
        return [torch.from_numpy(value) for value in self.sessions[component].run(None, arrays)]

    def crossed(self, component: str, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the decoder attends to across, by the names of its inputs."""
        outputs = zip(self.program.components[component].outputs, self.run(component, feed), strict=True)
        return {spec.name.replace("present", "past_key_values"): value for spec, value in outputs if spec.is_cross}


@pytest.fixture(scope="module", params=quick("llava_llama", "llava_tied", "gemma3", "qwen2_5_vl", "blip_vqa"))
def emitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emitted:
    _, program = captured_toy(request.param)
    folder = tmp_path_factory.mktemp("emitted")
    return Emitted(program, folder, emit_program(program, ("onnx",), folder, progress=Silent()))


@pytest.mark.parametrize(("n_images", "n_padding"), [((1,), 0), ((1, 2), 2), ((0,), 0)])
def test_prompt_and_cached_steps_equal_the_program(emitted: Emitted, n_images: tuple[int, ...], n_padding: int) -> None:
    program = emitted.program
    assert program.generation is not None
    if program.generation.image_token == NO_WORD:
        n_images = (1,) * len(n_images)
    ids, mask, pixels = prompts(program, n_images=n_images, n_padding=n_padding)
    with torch.no_grad():
        first, own = opened(program, ids, mask, pixels), opened_in_files(emitted, ids, mask, pixels)
        ids, mask, embeds, cache = first.input_ids, first.attention_mask, first.inputs_embeds, first.cache
        assert torch.allclose(own.inputs_embeds, embeds, atol=1e-5)
        assert own.cache.keys() == cache.keys()
        assert all(torch.allclose(*_seen(own.cache, cache, name), atol=1e-5) for name in cache)
        for _ in range(3):
            logits, after = step(program, embeds, mask, cache, input_ids=ids)
            feed = {"inputs_embeds": embeds, **placed(program, mask, embeds.shape[1], input_ids=ids), **cache}
            found, *present = emitted.run(DECODER, feed)
            seen = mask[:, -embeds.shape[1] :].bool()
            assert torch.allclose(found[seen], logits[seen], atol=1e-4)
            for one, other in zip(present, after.values(), strict=False):
                filled = mask.bool()[:, None, :, None].expand_as(other)
                assert torch.allclose(one[filled], other[filled], atol=1e-4)
            token = logits[:, -1:].argmax(-1)
            embeds, cache = embedded(program, token), after
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)


def _seen(one: Cache, other: Cache, name: str) -> tuple[Tensor, Tensor]:
    """An entry of both without what is padded, and then never read."""
    if "_encoder_" not in name or "encoder_attention_mask" not in one:
        return one[name], other[name]
    filled = one["encoder_attention_mask"].bool()[:, None, :, None]
    return one[name] * filled, other[name] * filled


def opened_in_files(emitted: Emitted, ids: Tensor, mask: Tensor, pixels: Tensor | None) -> Opening:
    """As `opened`, from the graphs in front of the decoder."""
    program = emitted.program
    generation, cache = program.generation, empty_cache(program.components[DECODER], len(ids))
    assert generation is not None
    if generation.cross_source is None:
        return Opening(ids, mask, read_prompt(emitted, ids, pixels), cache)
    if not generation.reads_across:
        assert pixels is not None
        cache |= emitted.crossed(VISION, {"pixel_values": pixels})
        return Opening(ids, mask, read_prompt(emitted, ids, None), cache)
    ids, mask = on_the_right(ids, mask)
    feed = {"input_ids": ids, "attention_mask": mask}
    taken = {spec.name for spec in program.components[ENCODER].inputs}
    if "inputs_embeds" in taken:
        feed["inputs_embeds"] = read_prompt(emitted, ids, pixels)
    if "image_features" in taken:
        assert pixels is not None
        (feed["image_features"],) = emitted.run(VISION, {"pixel_values": pixels})
    cache |= emitted.crossed(ENCODER, feed) | {"encoder_attention_mask": mask}
    ids = torch.tensor([generation.start_tokens] * len(ids))
    return Opening(ids, torch.ones_like(ids), read_prompt(emitted, ids, None), cache)


def read_prompt(emitted: Emitted, ids: Tensor, pixels: Tensor | None) -> Tensor:
    """The prompt as the decoder reads it, from the two graphs in front of it."""
    (embeds,) = emitted.run(EMBEDDING, {"input_ids": ids})
    if pixels is None:
        return embeds
    (features,) = emitted.run(VISION, {"pixel_values": pixels})
    assert emitted.program.generation is not None
    return embeds.masked_scatter((ids == emitted.program.generation.image_token).unsqueeze(-1), features)


def test_names_and_folder_are_those_that_runtimes_expect(emitted: Emitted) -> None:
    names = tuple(emitted.program.components)
    kind = ".decoder" if any(spec.is_cross for spec in emitted.program.components[DECODER].inputs) else ""
    assert {name: files["onnx"] for name, files in emitted.files.items()} == {n: f"onnx/{n}.onnx" for n in names}
    graph = onnx.load(emitted.folder / emitted.files[DECODER]["onnx"], load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["attention_mask"] == ["batch_size", "total"]
    heads = next(spec.shape[1] for spec in emitted.program.components[DECODER].inputs if spec.name.endswith("key"))
    assert shapes[f"past_key_values.0{kind}.key"] == ["batch_size", heads, "past", 8]
    assert shapes[f"present.2{kind}.value"] == ["batch_size", heads, "total", 8]
    assert shapes["logits"] == ["batch_size", "sequence", 64]


def test_a_weight_that_two_graphs_read_is_written_once(emitted: Emitted) -> None:
    program, files = emitted.program, emitted.files
    graphs = {n: onnx.load(emitted.folder / files[n]["onnx"], load_external_data=False).graph for n in files}
    outside = {name: [t for t in graph.initializer if t.external_data] for name, graph in graphs.items()}
    read = [{part.data_ptr() for part in program.components[n].graph.parameters()} for n in (EMBEDDING, DECODER)]
    if not read[0] & read[1]:
        assert not any(outside.values())
        return
    first, second = ({entry.key: entry.value for entry in outside[n][0].external_data} for n in (EMBEDDING, DECODER))
    assert first == second == {"location": "embed_tokens.onnx_data", "offset": "0", "length": str(EMBEDDING_BYTES)}
    assert (emitted.folder / "onnx" / "embed_tokens.onnx_data").stat().st_size == EMBEDDING_BYTES
    assert [len(outside[n]) for n in (VISION, EMBEDDING)] == [0, 1]
    places = [entry.value for weight in outside[DECODER] for entry in weight.external_data if entry.key == "location"]
    assert places.count("embed_tokens.onnx_data") == 1
    assert (len(places) > 1) is runs_in_genai(program)  # a second decoder then reads the others too


def test_only_weights_that_the_program_holds_are_pointed_to(tmp_path: Path) -> None:
    _, program = captured_toy("llava_tied")
    tied = next(program.components[EMBEDDING].graph.parameters()).data_ptr()
    for addresses in (frozenset[int](), frozenset({tied})):
        shared = SharedWeights(addresses)
        for name in (EMBEDDING, DECODER):
            path = tmp_path / f"{name}.onnx"
            emit_onnx(program.components[name], program.dims, path, external_from_bytes=1, shared=shared)
        assert shared.places.keys() == addresses
