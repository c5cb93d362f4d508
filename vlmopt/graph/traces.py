"""Traces of small modules, kept: cases and tests build equal ones over and over, and each takes tenths of a second.

A module is traced again wherever anything about it is new: its class, a setting, the code or the closure of a function
that it holds, a number in one of its tensors. What is handed out is a graph of its own around the tensors of the
module that was given, as if it had been traced anew.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

MAX_TRACES = 200
MAX_BYTES = 1 << 20  # of a module: a larger one is built once, if at all, and would only fill memory
_BY_IDENTITY = (type, types.BuiltinFunctionType, types.CodeType, types.ModuleType)


@dataclass(frozen=True)
class _Trace:
    """A traced graph, and the tensors and everything else of the module it was made of.

    Args:
        kept: what the key tells by its address, which must not become another's.
        symbols: what torch knew of the free sizes when the trace was made.
    """

    graph: fx.GraphModule
    tensors: tuple[Tensor, ...]
    kept: tuple[object, ...]
    env: ShapeEnv | None
    symbols: object


_traces: OrderedDict[Hashable, _Trace] = OrderedDict()


def traced_once(
    module: nn.Module, samples: Sequence[Tensor], trace: Callable[[], fx.GraphModule], *, how: Hashable
) -> fx.GraphModule:
    """What `trace` makes of the module, or a copy of what it made of one that is equal in every respect.

    Args:
        how: what else `trace` depends on.
    """
    reading = _Reading.of(module)
    if reading is None:
        return trace()
    key = (reading.digest, _described(samples), torch.get_default_dtype(), how)
    known = _traces.get(key)
    if known is not None and _symbols(known.env) == known.symbols:
        _traces.move_to_end(key)
        return _copied(known.graph, known.tensors, reading.tensors)
    graph = trace()
    if _has_no_other_tensor_of(graph, reading.tensors):
        env = _env(graph)
        stored = _copied(graph, reading.tensors, reading.tensors)
        _traces[key] = _Trace(stored, tuple(reading.tensors), tuple(reading.kept), env, _symbols(env))
        while len(_traces) > MAX_TRACES:
            _traces.popitem(last=False)
    return graph


def _copied(graph: fx.GraphModule, old: Sequence[Tensor], new: Sequence[Tensor]) -> fx.GraphModule:
    """The graph with nodes and leaves of its own, and `new` tensors in the place of the `old`."""
    return copy.deepcopy(graph, {id(before): after for before, after in zip(old, new, strict=True)})


def _has_no_other_tensor_of(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> bool:
    """Whether what the graph shares with the module are whole tensors, which a copy can be given."""
    own = {id(tensor) for tensor in tensors}
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    held = (*graph.parameters(), *graph.buffers())
    return all(id(tensor) in own or tensor.untyped_storage().data_ptr() not in storages for tensor in held)


def _described(samples: Sequence[Tensor]) -> Hashable:
    """A trace reads no number of a sample."""
    first = {id(sample): i for i, sample in reversed(list(enumerate(samples)))}
    return tuple(
        (type(s), s.dtype, tuple(s.shape), s.stride(), s.device, s.requires_grad, first[id(s)]) for s in samples
    )


def _env(graph: fx.GraphModule) -> ShapeEnv | None:
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in graph.graph.nodes)
    return next((mode.shape_env for mode in modes if mode is not None), None)


def _symbols(env: ShapeEnv | None) -> object:
    """All copies share their symbols: one that freezes a size, or learns something of it, has used up the trace."""
    if env is None:
        return None
    return (
        dict(env.replacements),
        dict(env.var_to_range),
        len(env.guards),
        env.num_deferred_runtime_asserts,
        set(env.divisible),
    )


class _Reading(pickle.Pickler):
    """Reads all of a module, as for a file; notes its tensors in order, and what only its address tells apart."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.kept: list[object] = []
        self.digest = b""
        self._n_bytes = 0

    @classmethod
    def of(cls, module: nn.Module) -> _Reading | None:
        """None for what cannot be read to the end, or is large."""
        file = io.BytesIO()
        reading = cls(file)
        try:
            reading.dump(module)
        except Exception:  # noqa: BLE001 - whatever keeps a module from being read only costs its trace
            return None
        reading.digest = hashlib.sha256(file.getbuffer()).digest()
        return reading

    def persistent_id(self, value: object) -> object:
        """Words for what must not be written by name: a name says nothing of what the code behind it does."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, types.FunctionType):
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
            code = (value.__code__, value.__defaults__, value.__kwdefaults__, cells, value.__dict__)
            return ("function", code, self._address(value.__globals__))
        if isinstance(value, _BY_IDENTITY):
            methods = [self._address(kind.__dict__.get("forward")) for kind in getattr(value, "__mro__", ())]
            return ("same", self._address(value), methods)
        return None

    def _address(self, value: object) -> int:
        self.kept.append(value)
        return id(value)

    def _tensor(self, value: Tensor) -> object:
        for i, known in enumerate(self.tensors):
            if known is value:
                return ("tensor", i)
        self._n_bytes += value.untyped_storage().nbytes()
        if self._n_bytes > MAX_BYTES:
            raise ValueError("large")
        self.tensors.append(value)
        starts = [known.untyped_storage().data_ptr() for known in self.tensors]
        numbers = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = (type(value), str(value.dtype), tuple(value.shape), value.stride(), value.storage_offset())
        return ("new tensor", kind, starts.index(starts[-1]), value.requires_grad, value.__dict__, numbers)
