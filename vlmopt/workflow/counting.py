"""Whether other clients of an artifact write as many places for an image as it has features."""

from __future__ import annotations

from pathlib import Path

from vlmopt.core.program import Program
from vlmopt.emit.genai_graphs import GENAI_TYPES
from vlmopt.preprocess import Preprocessor
from vlmopt.prompting import Prompter


def uncounted(program: Program, folder: Path) -> list[str]:
    """What a user must know of an artifact whose images have fewer features than those of the original: one line for
    each client that does not follow its files. The processor in the folder is asked, since not every one can be told.
    """
    generation = program.generation
    if generation is None or not generation.processor_tokens:
        return []
    n, lines = generation.image_tokens, list[str]()
    found = Prompter.of(Preprocessor.load(folder), generation).processor_places()
    if found is None:
        lines.append(f"an image has {n} features, and no processor in the artifact writes their places")
    elif found != n:
        lines.append(f"an image has {n} features, and the artifact's processor writes {found} places for them")
    lines = [f"{line}: clients other than vlmopt have to write {n} tokens of an image" for line in lines]
    if program.source.model_type in GENAI_TYPES:
        lines.append(f"no files for onnxruntime-genai: it writes places by itself, and not {n} for an image")
    return lines
