"""Writes an ONNX model straight from the tensors' own memory.

Serializing through protobuf holds every weight three times (tensor, message, bytes) and takes longer than exporting.
Here protobuf writes everything but the weights, and the weights follow as they lie in memory. The wire format allows
the fields of a message in any order, so the result is an ordinary file: ModelProto.graph is field 7,
GraphProto.initializer is field 5 and TensorProto.raw_data is field 9, all length-delimited (onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_ir as ir
import torch

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_ALIGNMENT_BYTES = 4096  # a page, so that a runtime can map the weights
SMALL_BYTES = 1024  # smaller tensors stay in the graph file: shapes must be known without the data file


def detach_weights(model: ir.Model) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """The model as a message without its initializers, and the initializers."""
    values = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    return ir.to_proto(model), values


@dataclass(frozen=True)
class Place:
    """Where a weight lies in a data file."""

    file: str
    offset: int
    length: int


Places = Mapping[int, Place]  # by the address of the weight's memory


def address(value: ir.Value) -> int | None:
    """Where the weight lies in memory; None for one that is made while it is written."""
    raw = getattr(value.const_value, "raw", None)
    return raw.data_ptr() if isinstance(raw, torch.Tensor) else None


def write_single_file(
    message: onnx.ModelProto, values: Sequence[ir.Value], path: Path, known: Places | None = None
) -> None:
    """One file that holds the graph and every weight once, but for those that lie in another data file."""
    message, values = _with_pointers(message, values, known or {})
    headers = [_header(value).SerializeToString() for value in values]
    sizes = [_raw_bytes(value) for value in values]
    lengths = [
        len(header) + _prefix_length(_RAW_DATA, size) + size for header, size in zip(headers, sizes, strict=True)
    ]
    graph = message.graph.SerializeToString()
    total = len(graph) + sum(_prefix_length(_INITIALIZER, length) + length for length in lengths)
    with path.open("wb") as stream:
        stream.write(_without_graph(message))
        stream.write(_prefix(_GRAPH, total) + graph)
        for value, header, size, length in zip(values, headers, sizes, lengths, strict=True):
            stream.write(_prefix(_INITIALIZER, length) + header + _prefix(_RAW_DATA, size))
            _write_raw(value, stream)


def write_with_data_file(
    message: onnx.ModelProto,
    values: Sequence[ir.Value],
    path: Path,
    data_path: Path,
    data_name: str,
    known: Places | None = None,
    apart: Collection[int] = (),
) -> dict[int, Place]:
    """The graph in `path`; tensors above a kilobyte, and those at the addresses `apart`, in `data_path`, which the
    graph calls `data_name`, and not again if they lie in another data file. Returns where those are that were written.
    """
    written = dict[int, Place]()
    complete, values = _with_pointers(message, values, known or {})
    with data_path.open("wb") as stream:
        for value in values:
            tensor = _header(value)
            if _raw_bytes(value) < SMALL_BYTES and address(value) not in apart:
                tensor.raw_data = _tensor(value).tobytes()
            else:
                stream.write(b"\0" * (-stream.tell() % _ALIGNMENT_BYTES))
                place = Place(data_name, stream.tell(), _raw_bytes(value))
                _point_to(tensor, place)
                _write_raw(value, stream)
                if (where := address(value)) is not None:
                    written[where] = place
            complete.graph.initializer.append(tensor)
    path.write_bytes(complete.SerializeToString())
    return written


def _with_pointers(
    message: onnx.ModelProto, values: Sequence[ir.Value], places: Places
) -> tuple[onnx.ModelProto, list[ir.Value]]:
    """A copy of the message that reads the weights with a place there, and the weights that have none."""
    complete = onnx.ModelProto()
    complete.CopyFrom(message)
    others: list[ir.Value] = []
    for value in values:
        place = None if (where := address(value)) is None else places.get(where)
        if place is None or place.length != _raw_bytes(value):
            others.append(value)
        else:
            tensor = _header(value)
            _point_to(tensor, place)
            complete.graph.initializer.append(tensor)
    return complete, others


def check_structure(message: onnx.ModelProto, values: Iterable[ir.Value]) -> None:
    """Runs the ONNX checker on the graph, with the weights stated as inputs since their bytes are not in the message.

    Raises:
        onnx.checker.ValidationError: the graph breaks a rule of ONNX.
    """
    stated = onnx.ModelProto()
    stated.CopyFrom(message)
    for value in values:
        tensor = _tensor(value)
        stated.graph.input.append(
            onnx.helper.make_tensor_value_info(str(value.name), int(tensor.dtype), list(tensor.shape.numpy()))
        )
    onnx.checker.check_model(stated)


def weight_bytes(values: Iterable[ir.Value]) -> int:
    return sum(_raw_bytes(value) for value in values)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"initializer {value.name} has no value")
    return value.const_value


def _raw_bytes(value: ir.Value) -> int:
    return int(_tensor(value).nbytes)


def _header(value: ir.Value) -> onnx.TensorProto:
    tensor = _tensor(value)
    return onnx.TensorProto(name=value.name, dims=list(tensor.shape.numpy()), data_type=int(tensor.dtype))


def _point_to(tensor: onnx.TensorProto, place: Place) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", place.file), ("offset", str(place.offset)), ("length", str(place.length))):
        tensor.external_data.add(key=key, value=text)


def _write_raw(value: ir.Value, stream: IO[bytes]) -> None:
    array = _tensor(value).numpy()
    if array.nbytes != _raw_bytes(value):  # sub-byte types are packed by their own class
        stream.write(_tensor(value).tobytes())
    elif array.nbytes:
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _without_graph(message: onnx.ModelProto) -> bytes:
    frame = onnx.ModelProto()
    for field, content in message.ListFields():
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(frame, field.name).extend(content)
        else:
            setattr(frame, field.name, content)
    return bytes(frame.SerializeToString())


def _prefix(field: int, length: int) -> bytes:
    """Key and length of a length-delimited field."""
    return _varint(field << 3 | 2) + _varint(length)


def _prefix_length(field: int, length: int) -> int:
    return len(_prefix(field, length))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
