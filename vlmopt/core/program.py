"""Program and Component: the intermediate representation, which is ordinary PyTorch (fx graphs, torch.nn leaves)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule


PAST, PRESENT = "past_key_values_", "present_"  # inputs and outputs of a decoder that hold its cache
NO_WORD = -1  # stands for images in the prompts of models that have no token for them
_CACHE = re.compile(r"^(past_key_values|present)_(\d+)_(?:(decoder|encoder)_)?(key|value|query)$")
_DIMS_IN_FILES = {"batch": "batch_size"}


class Assembly(Enum):
    """How components make a model."""

    DUAL = "dual"  # similarity of two encoders
    FUSED = "fused"  # one graph with a classification head
    GENERATIVE = "generative"  # vision, merge, decoder with a KV cache


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a component's input or output. A dimension is a number, or the name of a `Dim`."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str  # "float32", "int64", ...

    @property
    def name_in_files(self) -> str:
        """The name that runtimes know: those of a cache have dots there (`past_key_values.0.key`)."""
        found = _CACHE.match(self.name)
        return self.name if found is None else ".".join(part for part in found.groups() if part)

    @property
    def cache_layer(self) -> int | None:
        """The layer whose keys or values these are; None where they are no entry of a cache."""
        found = _CACHE.match(self.name)
        return None if found is None else int(found[2])

    @property
    def is_cross(self) -> bool:
        """Keys or values of what the decoder attends to across, made once for a prompt (`..._N_encoder_key`)."""
        found = _CACHE.match(self.name)
        return found is not None and found[3] == "encoder"

    @property
    def shape_in_files(self) -> tuple[int | str, ...]:
        """The shape with the names that runtimes know: transformers.js makes an empty cache of `batch_size` rows, and
        of none where a graph calls that size anything else."""
        return tuple(size if isinstance(size, int) else _DIMS_IN_FILES.get(size, size) for size in self.shape)


@dataclass(frozen=True)
class Dim:
    """A dimension that may vary from call to call, with its inclusive bounds and the size that costs are counted at.

    One that is always the sum of others names them in `sum_of`.
    """

    name: str
    minimum: int
    maximum: int
    typical: int
    sum_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Component:
    """One graph of the model. `graph` takes the inputs in order and returns a tuple of the outputs in order."""

    name: str
    graph: GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Similarity:
    """The join of a dual assembly: `logits = scale * normalize(image) @ normalize(text).T + bias`."""

    scale: float
    bias: float = 0.0


@dataclass(frozen=True)
class Generation:
    """The join of a generative assembly: features of images take the places of `image_token` in the embedded prompt, in
    order, and what the decoder returns as `present_N_*` is its `past_key_values_N_*` in the next step.

    Where no word of the vocabulary stands for images, `image_token` is `NO_WORD`: the features of the one image lie in
    front of the text.

    With a `cross_source` the decoder attends to an image, or to a prompt, across: this component returns the keys and
    values for it, `present_N_encoder_*`, once for a prompt. Is it the encoder of images, the prompt is the decoder's;
    is it an encoder of prompts, that one reads the prompt, and the decoder begins with `start_tokens` alone.
    """

    image_token: int  # the token that stands for one feature; below zero it is no word, and a prompt has one image
    image_tokens: int  # features of one image
    stop_tokens: tuple[int, ...] = ()  # an answer ends with any of them
    start_tokens: tuple[int, ...] = ()  # what text begins with, in place of what the tokenizer would put around it
    first_token: int | None = None  # what every prompt has to begin with, where constants were made of it
    first_position: int = 0  # what `position_ids` count from
    token_types: tuple[int, int, int] | None = None  # `token_type_ids` of a prompt's text, images, answer
    image_grid: tuple[int, int] | None = None  # rows and columns of an image's features, for 3-row positions
    cross_source: str | None = None  # the component that returns what the decoder attends to across
    cache_layers: tuple[int, ...] = ()  # of an emitted program: the decoder's layer of every entry of the cache
    cross_layers: tuple[int, ...] = ()  # ... and of every entry that it attends to across
    processor_tokens: int = 0  # places that the model's processor makes of an image, where passes left fewer features

    @property
    def reads_across(self) -> bool:
        """Whether an encoder reads the prompt, and the decoder attends to it."""
        return self.cross_source == "encoder_model"

    @property
    def writes_unasked(self) -> bool:
        """Whether it describes an image without a prompt: text begins with tokens of its own."""
        return bool(self.start_tokens) and not self.reads_across


@dataclass(frozen=True)
class ModelSource:
    """Where the program came from."""

    path: str  # folder or hub id, as the user gave it
    model_type: str  # `model_type` of config.json
    architecture: str  # class that was instantiated
    fingerprint: str  # sha256 over configuration and weights


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that the model is opened with: its name, the folder it lies in, and how much of it counts."""

    name: str
    path: str
    weight: float = 1.0


@dataclass
class Program:
    """The whole model as components plus the assembly that joins them.

    `components` may be edited by a pass (dropped, replaced); tensors are shared between a program and its clones and
    are never written in place. `heads` names, for each component, the Linear that is its task head (the last linear
    map), if it ends in one; `fitted_heads` are the components whose head was fitted on the task's own data.
    `fixed_inputs` holds inputs that the task gives the same value in every call. `labels` are the classes of the output
    `logits`, in order.
    """

    assembly: Assembly
    components: dict[str, Component]
    dims: Mapping[str, Dim]
    source: ModelSource
    similarity: Similarity | None = None
    heads: dict[str, str] = field(default_factory=dict)
    fitted_heads: frozenset[str] = frozenset()
    fixed_inputs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    generation: Generation | None = None

    def with_components(self, components: dict[str, Component]) -> Program:
        """The same program around other components; every container is new, tensors are shared."""
        return replace(self, components=dict(components), heads=dict(self.heads))
