"""Graphs of captured components, kept between runs: the next capture of the same structure needs no `torch.export`.

A file holds the nodes and how each tensor is found in the model, never a weight. Its name is a digest of all that the
export reads: the modules with their settings, the shapes of tensors, the configuration, the inputs' sizes, and the code
and versions that made it. What is read back is compared with eager as every capture is, so a file that does not fit
costs a second and is made anew.

`VLMOPT_CACHE` names the folder, by default `~/.cache/vlmopt`; `off` keeps nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import vlmopt
from vlmopt.capture.wrappers import Wrapper
from vlmopt.core.errors import VlmoptError
from vlmopt.core.machine import versions
from vlmopt.core.program import Component, Dim
from vlmopt.graph.stored import component_from, component_words
from vlmopt.graph.text import component_text
from vlmopt.rundir import atomic_write

VARIABLE = "VLMOPT_CACHE"
MOST_BYTES = 256 << 20  # of all files together
_MOST_CONSTANTS = 1 << 20  # bytes of what a graph holds and the model does not
_GRAPH = "graph"
_STACK = "nn_module_stack"
_NAMES = frozenset({"_name_or_path", "name_or_path"})  # where a model lies says nothing of its graph
_APART = frozenset({"_modules", "_parameters", "_buffers", "config"})  # told of all modules together
_LISTENING = "transformers.utils.output_capturing."  # hooks that come with the first call and change nothing
_CODE = ("capture", "graph", "core")
_log = logging.getLogger(__name__)


def folder() -> Path | None:
    """Where captures are kept; None where they are not."""
    said = os.environ.get(VARIABLE, "")
    if said.lower() == "off":
        return None
    home = Path(said).expanduser() if said else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vlmopt")
    return home.expanduser() / "captures"


def key_of(
    name: str,
    module: Wrapper,
    sample: Mapping[str, Tensor],
    *,
    dims: Mapping[str, Dim],
    shapes: Mapping[str, tuple[int | str, ...]],
    image: tuple[int, int],
    rewrite: object,
) -> str | None:
    """A digest of everything that the graph of the module follows from; None where that cannot be told."""
    try:
        told = _told(module, dims=dims)
        asked = _plain(
            [name, image, getattr(rewrite, "func", rewrite), shapes, {k: _kind(v) for k, v in sample.items()}]
        )
        return hashlib.sha256(json.dumps([asked, told]).encode()).hexdigest()
    except Exception as problem:  # noqa: BLE001  what users' own modules hold may be anything
        _log.debug("%s: its capture is not kept (%s)", name, problem)
        return None


def _told(module: Wrapper, *, dims: Mapping[str, Dim]) -> Any:
    """Of a module, its configurations, its tensors and this code what JSON can hold."""
    modules = list(module.named_modules(remove_duplicate=False))
    known: dict[int, int] = {}  # the same tensor or configuration has the same number
    tensors = [(path, *_kind(value), _number(value, known)) for path, value in _named_tensors(module).items()]
    configs: dict[int, Any] = {id(each.config): each.config for _, each in modules if hasattr(each, "config")}
    said = [
        {**each.to_dict(), "attention": getattr(each, "_attn_implementation", None)}
        for each in configs.values()
        if hasattr(each, "to_dict")
    ]
    settings = [(path, _number(getattr(each, "config", None), known), *_settings(each)) for path, each in modules]
    free = {key: asdict(dim) for key, dim in dims.items()}
    ends = (module.inputs, module.outputs)
    return _plain([free, ends, said, settings, tensors, _code(), torch.get_default_dtype()])


def kept_component(key: str, name: str, module: Wrapper, dims: Mapping[str, Dim]) -> Component | None:
    """The component that was kept under the key, on the tensors of this module; None where there is none to be read."""
    home = folder()
    path = None if home is None else home / f"{key}.safetensors"
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()[_GRAPH])
            # cloned as in `stored.py`: what lies as it does in the file may be rounded another way
            constants = {each: file.get_tensor(each).clone() for each in file.keys()}  # noqa: SIM118  no mapping
        with suppress(OSError):  # a folder that many read may be closed to writing
            os.utime(path)
        return _read(name, words, _Found(_named_tensors(module), constants), dims)
    except Exception as problem:  # noqa: BLE001  whatever is wrong with the file, the capture is made anew
        _log.debug("%s: what was kept of its capture cannot be read (%s)", name, problem)
        return None


def _read(name: str, words: Mapping[str, Any], tensors: Mapping[str, Tensor], dims: Mapping[str, Dim]) -> Component:
    component = component_from(name, words, tensors, dims)
    for node, entry in zip(component.graph.graph.nodes, words["nodes"], strict=True):
        if _STACK in entry:
            node.meta[_STACK] = {call: (place, kind) for call, place, kind in entry[_STACK]}
    return component


def keep(key: str, component: Component, module: Wrapper, dims: Mapping[str, Dim]) -> None:
    """Keeps the component's graph where reading it back gives the very same, its sizes included.

    Where a dimension is the sum of others (a decoder with its cache) torch.export has a symbol of its own for it, which
    does not come back. A disk that is full or cannot be written keeps nothing and stops nothing.
    """
    home = folder()
    if home is None or any(dim.sum_of for dim in dims.values()):
        return
    named = _named_tensors(module)
    places = _Places(named)
    try:
        words = component_words(component, places.key)
        for node, entry in zip(component.graph.graph.nodes, words["nodes"], strict=True):
            if stack := node.meta.get(_STACK):
                entry[_STACK] = [(str(call), str(place), _class_name(kind)) for call, (place, kind) in stack.items()]
        again = _read(component.name, words, _Found(named, places.constants), dims)
        if component_text(again) != component_text(component):
            _log.debug("%s: its capture is not kept, for what would be read back is not the same", component.name)
            return
        home.mkdir(parents=True, exist_ok=True)
        atomic_write(home / f"{key}.safetensors", save(places.constants, metadata={_GRAPH: json.dumps(words)}))
        _drop_oldest(home)
    except Exception as problem:  # noqa: BLE001  a capture that is made needs no copy
        _log.debug("%s: its capture is not kept (%s)", component.name, problem)


def _drop_oldest(home: Path) -> None:
    files = sorted(home.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > MOST_BYTES:
            file.unlink(missing_ok=True)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {path: value for each in named for path, value in each}


class _Places:
    """Says of a tensor of the graph where the model holds it: as it is, as a view of another, or not at all."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.constants: dict[str, Tensor] = {}
        self._whole = {_place(value): path for path, value in named.items() if value.numel()}
        self._named = named

    def key(self, wanted: str, tensor: Tensor) -> str:
        """How the tensor is found when the graph is read back.

        Raises:
            VlmoptError: the graph holds more than small constants beside what the model holds.
        """
        if tensor.numel() and (path := self._whole.get(_place(tensor))) is not None:
            return json.dumps([path])
        if (found := next((path for path, value in self._named.items() if _lies_in(tensor, value)), None)) is not None:
            offset = tensor.storage_offset() - self._named[found].storage_offset()
            return json.dumps([found, list(tensor.shape), list(tensor.stride()), offset])
        self.constants.setdefault(wanted, tensor.detach().clone().contiguous())
        if sum(value.nbytes for value in self.constants.values()) > _MOST_CONSTANTS:
            raise VlmoptError(wanted, "is a large tensor that the model does not hold")
        return wanted


class _Found(dict[str, Tensor]):
    """Tensors by what `_Places` said."""

    def __init__(self, named: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
        super().__init__(constants)
        self._named = named

    def __missing__(self, key: str) -> Tensor:
        path, *view = json.loads(key)
        found = self._named[path]
        if view:
            shape, stride, offset = view
            found = found.as_strided(shape, stride, found.storage_offset() + offset)
        self[key] = found
        return found


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _lies_in(tensor: Tensor, other: Tensor) -> bool:
    """Whether a tensor is part of another one, or the same numbers in another shape."""
    if not tensor.numel() or tensor.dtype != other.dtype or not other.is_contiguous():
        return False
    first = tensor.storage_offset() - other.storage_offset()
    last = first + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    is_same_memory = tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return is_same_memory and first >= 0 and last < other.numel()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.stride(), str(tensor.device), type(tensor).__name__


def _number(value: object, known: dict[int, int]) -> int:
    return known.setdefault(id(value), len(known))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Class and plain attributes of a module, and the functions that are hung on its calls."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hung = [_class_name(hook) if inspect.isroutine(hook) else _class_name(type(hook)) for hook in hooks]
    own = {key: value for key, value in vars(module).items() if key not in _APART and "_hooks" not in key}
    return _class_name(type(module)), own, [each for each in hung if not each.startswith(_LISTENING)]


def _plain(value: Any) -> Any:
    """Of a value what JSON can hold: numbers, words and what is made of them; of others the class, or the function."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items() if key not in _NAMES}
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(each)) for each in value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [*map(str, _kind(value)), hashlib.sha256(content).hexdigest()]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if inspect.isroutine(value) or isinstance(value, type):
        return _class_name(value)
    return _class_name(type(value))


def _class_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


@cache
def _code() -> list[Any]:
    """Versions of the libraries and a digest of the code of capture itself."""
    root = Path(vlmopt.__file__).parent
    files = [file for part in _CODE for file in sorted((root / part).rglob("*.py"))]
    return [versions(), hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()]
