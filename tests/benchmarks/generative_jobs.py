"""One job of the benchmark `generative` in a process of its own; prints what it found as JSON in the last line.

usage: python -m tests.benchmarks.generative_jobs
    family NAME | real NAME | structure [NAME] | example | vlmopt | exporter

`seconds` begin when everything is imported and the model is built; `cpu_seconds` are those of the process, which other
jobs of a shared machine change less; `peak_gb` is the process's own.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from tests import toys
from tests.benchmarks import families, real_sizes
from tests.capture.test_generative import prompts, source_of, written
from tests.emit.test_generative import Emitted, opened_in_files, read_prompt
from vlmopt.capture import capture, capture_model
from vlmopt.core.errors import VlmoptError
from vlmopt.core.program import PAST, PRESENT, Assembly, Program
from vlmopt.core.progress import Silent
from vlmopt.emit import emit_program
from vlmopt.graph.assembled import DECODER, embedded, opened, placed, step

Found = dict[str, float | str]
SHAPES = (((1,), 0), ((1, 1), 3))  # images of each prompt, and padding in front of all but the last
N_NEW = 4  # tokens of an answer: one behind the prompt, three with a cache


def main() -> None:
    """Runs the job that is named."""
    job, *arguments = sys.argv[1:]
    jobs: dict[str, Callable[..., Found]] = {
        "family": _family,
        "real": _real,
        "structure": _structure,
        "example": _example,
        "vlmopt": _vlmopt,
        "exporter": _exporter,
    }
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(jobs[job](Path(folder), *arguments)))


def _family(folder: Path, name: str) -> Found:
    """Whether the toy is captured, and how far program and files are from what eager writes; or why it is refused."""
    return _tried(folder, families.make(name), families.IMAGE_SIZES.get(name))


def _real(folder: Path, name: str) -> Found:
    """The same of a published configuration, with what it holds and what its files weigh."""
    model: Any = real_sizes.make(name)
    unique = sum(each.numel() * each.element_size() for each in model.parameters())
    found = _tried(folder, model, real_sizes.REAL[name].image)
    return found | {"parameters": unique / 4, "size_over_unique_params": _bytes(folder) / unique}


def _tried(folder: Path, model: Any, image: tuple[int, int] | None) -> Found:
    start = _now()
    try:
        program = capture_model(model, source_of(model), image=image)
    except VlmoptError as problem:
        return _cost(start) | {"refusal": " ".join(f"{problem.place}: {problem.found}".split())}
    if program.assembly is not Assembly.GENERATIVE:
        return _cost(start) | {"refusal": f"captured as one {program.assembly.value} graph, which writes no text"}
    emitted = Emitted(program, folder, emit_program(program, ("onnx",), folder, progress=Silent()))
    cost = _cost(start)
    with torch.no_grad():
        rows = [_departures(model, program, emitted, *shape, image) for shape in SHAPES]
    return cost | {key: max(row[key] for row in rows) for key in rows[0]}


def _departures(
    model: Any,
    program: Program,
    emitted: Emitted,
    n_images: tuple[int, ...],
    n_padding: int,
    image: tuple[int, int] | None,
) -> dict[str, float]:
    """Largest differences from the logits of the model's own loop, as a share of the largest of them."""
    ids, mask, pixels = prompts(program, n_images=n_images, n_padding=n_padding)
    tokens, logits = written(model, ids, mask, pixels, n_images, n_new=N_NEW, image=image)
    graphs, files = _replayed(program, emitted, tokens, (ids, mask, pixels))
    wanted = logits.unbind(1)
    return {
        "parity_capture": max(map(_departure, graphs, wanted)),
        "parity_prefill": _departure(files[0], wanted[0]),
        "parity_decode": max(map(_departure, files[1:], wanted[1:])),
    }


def _replayed(
    program: Program, emitted: Emitted, tokens: Tensor, given: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the last token behind the prompt and behind each new token, [B, V]: of the graphs, and of the files.
    Each has its own cache and reads the tokens that eager wrote.
    """
    graphs, files = list[Tensor](), list[Tensor]()
    first, read = opened(program, *given), opened_in_files(emitted, *given)
    ids, mask, own, cache = first.input_ids, first.attention_mask, first.cache, dict(read.cache)
    embeds, in_files = first.inputs_embeds, read.inputs_embeds
    names = [spec.name.replace(PRESENT, PAST) for spec in program.components[DECODER].outputs[1:]]
    for token in tokens.split(1, 1):
        logits, own = step(program, embeds, mask, own, input_ids=ids)
        feed = {"inputs_embeds": in_files, **placed(program, mask, embeds.shape[1], input_ids=ids), **cache}
        found, *present = emitted.run(DECODER, feed)
        cache |= dict(zip(names, present, strict=True))
        graphs.append(logits[:, -1])
        files.append(found[:, -1])
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        embeds, in_files = embedded(program, token), read_prompt(emitted, token, None)
    return graphs, files


def _departure(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def _structure(folder: Path, name: str | None = None) -> Found:
    """A model from its configuration alone, as `vlmopt inspect` reads it; without a name, LLaVA 1.5 7B."""
    image = None
    if name is None:
        _write_llava_7b(folder)
    else:
        image = real_sizes.STRUCTURES[name].image
        with torch.device("meta"):
            model = real_sizes.STRUCTURES[name].build()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    start = _now()
    program = capture(str(folder), with_weights=False, image=image)
    return _cost(start) | {"parameters": float(sum(_unique(program).values()))}


def _write_llava_7b(folder: Path) -> None:
    """CLIP ViT-L/14 at 336 px and Llama 7B."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)  # the other defaults are Llama 7B
    names = ["LlavaForConditionalGeneration"]
    LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000, architectures=names).save_pretrained(
        folder
    )


def _unique(program: Program) -> dict[int, int]:
    """Sizes of the parameters of all components by identity; fake ones have no address."""
    return {id(each): each.numel() for part in program.components.values() for each in part.graph.parameters()}


def _example(folder: Path) -> Found:
    """A DINO ViT-S/14 tower at 112 px in front of SmolLM2-135M, at full size with random weights."""
    vision = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=112, patch_size=14)
    text = LlamaConfig(
        vocab_size=49153, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    more = {"vision_feature_layer": -1, "tie_word_embeddings": True, "image_token_id": 49152}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **more)).eval()
    unique = sum(each.numel() * each.element_size() for each in model.parameters())
    found = _compiled(model, folder)
    return found | {"parameters": unique / 4, "size_over_unique_params": _bytes(folder) / unique}


def _vlmopt(folder: Path) -> Found:
    return _compiled(toys.make("llava_llama"), folder)


def _compiled(model: Any, folder: Path) -> Found:
    """Capture, with every comparison, and the ONNX graphs."""
    start = _now()
    emit_program(capture_model(model, source_of(model)), ("onnx",), folder, progress=Silent())
    return _cost(start)


def _exporter(folder: Path) -> Found:
    """What transformers itself exports for generation, and which graphs it gives."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = toys.make("llava_llama")
    assert isinstance(model, PreTrainedModel)
    ids = torch.randint(4, 60, (2, 22), generator=torch.Generator().manual_seed(0))
    ids[:, 3:19] = toys.IMAGE_TOKEN  # the 16 features of an image
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(2, 3, 32, 32)
    start = _now()
    exported = OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True))
    exported.save_pretrained(folder)
    return _cost(start) | {"graphs": ", ".join(exported.components)}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _cost(start: tuple[float, float]) -> Found:
    seconds, cpu_seconds = (now - then for now, then in zip(_now(), start, strict=True))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak_gb}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
