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
_CACHE = re.compile(r"^(past_key_values|present)_(\d+)_(key|value)$")
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
        return _CACHE.sub(r"\1.\2.\3", self.name)

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
    """

    image_token: int  # the token that stands for one feature
    image_tokens: int  # features of one image
    stop_tokens: tuple[int, ...] = ()  # an answer ends with any of them
    first_position: int = 0  # what `position_ids` count from
    token_types: tuple[int, int, int] | None = None  # `token_type_ids` of a prompt's text, images, answer
    image_grid: tuple[int, int] | None = None  # rows and columns of an image's features, for 3-row positions
    cache_layers: tuple[int, ...] = ()  # of an emitted program: the decoder's layer of every entry of the cache


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
