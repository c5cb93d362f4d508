"""`genai_config.json`, which tells onnxruntime-genai what an artifact's graphs are called and how large they are, and
`genai_processor.json`, which tells it how images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmopt.core.program import Component, Generation, Program
from vlmopt.emit.genai_graphs import GENAI_EMBEDDING, GENAI_TYPES, IDS, cache_shapes, decoder_file
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION
from vlmopt.rundir import write_json

GENAI_CONFIGURATION, GENAI_PROCESSOR = "genai_config.json", "genai_processor.json"
INTERPOLATIONS = {0: "NEAREST", 2: "LINEAR", 3: "CUBIC"}  # by what PIL calls them, and so do processors
# how a token is chosen unless the model's generation configuration says otherwise
SEARCH = {
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}

Json = Mapping[str, Any]


def write_genai_files(
    program: Program, folder: Path, *, configuration: Json, generation: Json, image_processor: Json
) -> None:
    """Writes both files into the artifact's `folder`, whose graphs lie in `onnx/`.

    An image processor that genai has no operations for gets no file, and one whose images are of another size than the
    graph's none either: genai then says that the file is missing when it is asked to prepare an image.

    Args:
        configuration, generation, image_processor: the model's own files.
    """
    write_json(folder / GENAI_CONFIGURATION, _configuration(program, configuration, generation))
    operations = _operations(image_processor, program.components[VISION])
    if operations:
        content = {"processor": {"name": "image_processing", "transforms": operations}}
        write_json(folder / GENAI_PROCESSOR, content)


def _configuration(program: Program, configuration: Json, generation: Json) -> dict[str, Any]:
    assert program.generation is not None
    text = configuration.get("text_config") or configuration
    n_tokens = program.dims["sequence"].maximum
    model = {
        "type": GENAI_TYPES[program.source.model_type],
        "context_length": n_tokens,
        "vocab_size": program.components[DECODER].outputs[0].shape[-1],
        "image_token_id": program.generation.image_token,
        **_special_tokens(program.generation, generation, configuration, text),
        "vision": {
            "filename": f"onnx/{VISION}.onnx",
            "config_filename": GENAI_PROCESSOR,
            "inputs": {"pixel_values": program.components[VISION].inputs[0].name_in_files},
            "outputs": {"image_features": program.components[VISION].outputs[0].name_in_files},
        },
        "embedding": {
            "filename": f"onnx/{GENAI_EMBEDDING}.onnx",
            "inputs": {"input_ids": IDS, "image_features": "image_features"},
            "outputs": {"inputs_embeds": program.components[EMBEDDING].outputs[0].name_in_files},
        },
        "decoder": _decoder(program, program.generation, text),
    }
    search = {key: value if generation.get(key) is None else generation[key] for key, value in SEARCH.items()}
    lengths = {"min_length": 0, "max_length": n_tokens}
    return {"model": model, "search": {**search, **lengths, "past_present_share_buffer": False}}


def _special_tokens(generation: Generation, *stated: Json) -> dict[str, Any]:
    """The first statement counts; tokens that end an answer are those of the program, if it knows them."""
    found: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values = [content[name] for content in stated if content.get(name) is not None]
        if values:
            found[name] = values[0]
    return {**found, "eos_token_id": list(generation.stop_tokens)} if generation.stop_tokens else found


def _decoder(program: Program, generation: Generation, text: Json) -> dict[str, Any]:
    """Names and sizes of the decoder's inputs; as many layers as its cache has entries."""
    decoder = program.components[DECODER]
    ((n_heads, width),) = cache_shapes(program)
    own = ("inputs_embeds", "attention_mask", "position_ids")
    return {
        "filename": f"onnx/{decoder_file(generation)}",
        "session_options": {"provider_options": []},
        "hidden_size": program.components[EMBEDDING].outputs[0].shape[-1],
        "head_size": width,
        "num_attention_heads": text.get("num_attention_heads", n_heads),
        "num_key_value_heads": n_heads,
        "num_hidden_layers": sum(len(spec.shape) == 4 for spec in decoder.inputs) // 2,
        "inputs": {
            **{name: name for name in (*own, IDS)},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": decoder.outputs[0].name_in_files,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _operations(processor: Json, vision: Component) -> list[dict[str, Any]]:
    """The processor's steps as genai's operations; none if it has no operation for one of them, or if they do not end
    at the size [N, C, H, W] of the graph."""
    resized = _size(processor.get("size"))
    kept = _size(processor.get("crop_size")) if processor.get("do_center_crop") else resized
    filter_ = INTERPOLATIONS.get(processor.get("resample", -1))
    must = all(processor.get(name) for name in ("do_resize", "do_rescale"))
    may_not = any(processor.get(name) for name in ("do_pad", "do_pan_and_scan"))
    if resized is None or kept != vision.inputs[0].shape[2:] or filter_ is None or not must or may_not:
        return []
    if min(resized[0] - kept[0], resized[1] - kept[1]) < 0:  # cutting out more than there is would be padding
        return []
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("Resize", {"height": resized[0], "width": resized[1], "keep_aspect_ratio": 0, "interpolation": filter_}),
    ]
    if kept != resized:
        steps.append(("CenterCrop", {"height": kept[0], "width": kept[1]}))
    steps.append(("Rescale", {"rescale_factor": processor.get("rescale_factor", 1 / 255)}))
    if processor.get("do_normalize"):
        steps.append(("Normalize", {"mean": processor["image_mean"], "std": processor["image_std"]}))
    steps.append(("Permute3D", {"dims": [2, 0, 1]}))
    return [{"operation": {"name": kind.lower(), "type": kind, "attrs": attributes}} for kind, attributes in steps]


def _size(stated: Any) -> tuple[int, int] | None:
    """Height and width; None where the image decides one of them."""
    if not isinstance(stated, Mapping) or not {"height", "width"} <= stated.keys():
        return None
    return int(stated["height"]), int(stated["width"])
