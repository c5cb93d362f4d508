"""The graphs that onnxruntime-genai reads, on what the emitted ones were compared on: once emitted, and again later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from vlmopt.core.manifest import ComponentEntry, GenerationEntry
from vlmopt.core.program import Component, Generation
from vlmopt.emit.genai_graphs import GENAI_DECODER, GENAI_EMBEDDING, IDS, TYPES
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION
from vlmopt.verify.parity import Gate, Recorded, check_file

Components = Mapping[str, Component] | Mapping[str, ComponentEntry]


def check_genai_graphs(
    generation: Generation | GenerationEntry | None,
    components: Components,
    cases: Mapping[str, Sequence[Recorded]],
    folder: Path,
    *,
    claim: str,
    limits: Mapping[str, float] = MappingProxyType({}),
) -> list[Gate]:
    """A gate for each of its graphs that lies in `folder`; none where there are none.

    Args:
        components: of the program, or of the manifest of its artifact.
        cases: inputs and wanted outputs of every component: of the embedding first a prompt with the image that is the
            first case of the vision encoder, then a token.
        limits: what a component's files are held to, where that is not what its type allows.
        claim: what each of the files is said to do, such as "equals the program".
    """
    if generation is None:
        return []
    made: dict[tuple[str, str], Callable[[], list[Recorded]]] = {
        (GENAI_EMBEDDING, EMBEDDING): lambda: _with_features(cases, generation.image_token),
        (GENAI_DECODER, DECODER): lambda: _with_ids(components[DECODER], generation, cases[DECODER]),
    }
    gates: list[Gate] = []
    for (name, component), given in made.items():
        file = folder / "onnx" / f"{name}.onnx"
        if file.is_file():
            dtype = components[component].outputs[0].dtype
            title, limit = f"onnx/{file.name} {claim}", limits.get(component)
            gates.append(check_file(title, file, "onnx", given(), dtype=dtype, limit=limit))
    return gates


def _with_features(cases: Mapping[str, Sequence[Recorded]], mark: int) -> list[Recorded]:
    """Image tokens of a case [B, S] have the features [N, F, D]; a case without them has none, [0, D]."""
    features = cases[VISION][0][1][0]
    found: list[Recorded] = []
    for feed, (embeds, *_) in cases[EMBEDDING]:
        places = (feed[IDS] == mark).unsqueeze(-1)
        image = features if bool(places.any()) else features.new_zeros(0, features.shape[-1])
        wanted = embeds.masked_scatter(places, image.to(embeds.dtype))
        found.append(({IDS: feed[IDS], "image_features": image}, [wanted]))
    return found


def _with_ids(
    decoder: Component | ComponentEntry, generation: Generation | GenerationEntry, cases: Sequence[Recorded]
) -> list[Recorded]:
    """Ids of which the types of tokens follow, in the place of the types."""
    assert generation.token_types is not None
    _, image, _ = generation.token_types
    mark, word = generation.image_token, 0 if generation.image_token else 1
    names = [spec.name for spec in decoder.inputs if spec.name != TYPES]
    return [
        ({**{name: feed[name] for name in names}, IDS: torch.where(feed[TYPES] == image, mark, word)}, wanted)
        for feed, wanted in cases
    ]
