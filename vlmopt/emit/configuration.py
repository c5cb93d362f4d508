"""The files of the model's folder that an artifact carries: its processor, and a configuration that fits the graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vlmopt.core.program import Generation, Program
from vlmopt.emit.genai import write_genai_files
from vlmopt.emit.genai_graphs import GENAI_EMBEDDING
from vlmopt.graph.assembled import DECODER
from vlmopt.rundir import write_json

CONFIGURATION, GENERATION = "config.json", "generation_config.json"
IMAGE_PROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# what processors call the number of places that they write for an image
STATED_PLACES = ("image_seq_length", "image_seq_len", "num_image_tokens", "num_query_tokens")
JAVASCRIPT = "transformers.js_config"  # where transformers.js looks in config.json


def copy_processor(files: Sequence[Path], program: Program, folder: Path) -> None:
    """Copies the files to `folder`, where the graphs lie; those of a generative program are fitted to its graphs.

    Other runtimes read there how large the empty cache is, which files hold the graphs, which tokens end an answer, and
    how images are prepared.
    """
    for source in files:
        shutil.copyfile(source, folder / source.name)
    if program.generation is not None:
        _fit(folder, program.generation, _key_heads(program))
    if any(folder.rglob(f"{GENAI_EMBEDDING}.onnx")):
        write_genai_files(
            program,
            folder,
            configuration=_read(folder / CONFIGURATION),
            generation=_read(folder / GENERATION),
            image_processor=_read(folder / IMAGE_PROCESSOR),
        )


def _key_heads(program: Program) -> set[int | str]:
    """How many heads of keys the decoder's layers have; none where it attends across, or is not there."""
    generation = program.generation
    if generation is None or generation.cross_source or DECODER not in program.components:
        return set()
    keys = (spec for spec in program.components[DECODER].inputs if spec.name.endswith("_key"))
    return {spec.shape[1] for spec in keys if spec.cache_layer is not None}


def _fit(folder: Path, generation: Generation, key_heads: Collection[int | str]) -> None:
    configuration = _read(folder / CONFIGURATION)
    if configuration:
        # where a decoder attends across, no number of layers says which of its attentions are left
        fitted = _with_layers(configuration, () if generation.cross_source else generation.cache_layers)
        # one number of heads is all that transformers.js can be told, so it is told of no graphs that have several
        told = {JAVASCRIPT: _javascript(folder)} if len(key_heads) < 2 else {}
        fitted = _with_key_heads(_with_places(fitted, generation), key_heads)
        write_json(folder / CONFIGURATION, {**fitted, **told})
    ends = _read(folder / GENERATION)
    if generation.stop_tokens and ends.get("eos_token_id") is None:
        write_json(folder / GENERATION, {**ends, "eos_token_id": list(generation.stop_tokens)})
    processor = _read(folder / PROCESSOR)
    if processor:
        processor = _with_places(_without_dropped_token(processor), generation)
        write_json(folder / PROCESSOR, processor)
    if "image_processor" in processor and not (folder / IMAGE_PROCESSOR).exists():
        named = {key: value for key, value in processor.items() if key == "processor_class"}
        write_json(folder / IMAGE_PROCESSOR, {**processor["image_processor"], **named})
    elif generation.processor_tokens and (images := _read(folder / IMAGE_PROCESSOR)):
        write_json(folder / IMAGE_PROCESSOR, _with_places(images, generation))


def _with_layers(content: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The decoder's configuration with as many layers as its cache has entries; what is stated per layer follows."""
    if not layers:
        return content
    text = content.get("text_config")
    if isinstance(text, dict):
        return {**content, "text_config": _with_layers(text, layers)}
    kinds = content.get("layer_types")
    kept = {"layer_types": [kinds[layer] for layer in layers]} if isinstance(kinds, list) else {}
    return {**content, "num_hidden_layers": len(layers), **kept}


def _with_key_heads(content: dict[str, Any], key_heads: Collection[int | str]) -> dict[str, Any]:
    """The decoder's configuration with as many heads of keys as its cache has, where passes pruned some."""
    text = content.get("text_config")
    if isinstance(text, dict):
        return {**content, "text_config": _with_key_heads(text, key_heads)}
    stated = content.get("num_key_value_heads", content.get("num_attention_heads"))
    if len(key_heads) != 1 or stated is None or stated in key_heads:
        return content
    return {**content, "num_key_value_heads": next(iter(key_heads))}


def _without_dropped_token(processor: dict[str, Any]) -> dict[str, Any]:
    """The same number of places for an image, said otherwise: transformers counts a class token and takes it off again,
    transformers.js only counts it."""
    n_more = processor.get("num_additional_image_tokens")
    if not n_more or processor.get("vision_feature_select_strategy") != "default":
        return processor
    return {**processor, "num_additional_image_tokens": n_more - 1, "vision_feature_select_strategy": "full"}


def _with_places(content: dict[str, Any], generation: Generation) -> dict[str, Any]:
    """Makes a processor that is told how many places an image has write fewer, where passes left fewer features. One
    that counts patches is told so many less beside them."""
    n_before, n = generation.processor_tokens, generation.image_tokens
    if not n_before:
        return content
    found = {key: n for key in STATED_PLACES if content.get(key) == n_before}
    if not found and {"patch_size", "vision_feature_select_strategy"} <= content.keys():
        found["num_additional_image_tokens"] = content.get("num_additional_image_tokens", 0) + n - n_before
    inner = content.get("image_processor")
    nested = {"image_processor": _with_places(inner, generation)} if isinstance(inner, dict) else {}
    return {**content, **nested, **found}


def _javascript(folder: Path) -> dict[str, Any]:
    """What transformers.js must know of the ONNX files: none has a suffix for its type, which browsers look for unless
    told, and those with weights beside them, which browsers do not find by themselves."""
    external = {path.name.removesuffix("_data"): 1 for path in sorted(folder.rglob("*.onnx_data"))}
    return {"dtype": "fp32", **({"use_external_data_format": external} if external else {})}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
