"""The operations that ONNX Runtime really executes of a graph: after its own fusions, at real sizes.

A signature says what decides the time of an operation: its type, its attributes, type and shape of what goes in and
comes out, and which inputs are constants. Operations of one signature take one time.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmopt.core.errors import ProfileError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray
    from onnxruntime import InferenceSession, SessionOptions

Level = Literal["all", "extended"]
SMALL_BYTES = 4096  # constants up to here stay what they are: axes, shapes, scales, biases
_SHOWN_VALUES = 8  # constant integers up to so many are part of a signature: axes and bounds decide what is computed
_NO_TENSOR = "no tensor"  # the type of sequences and the like
_DATA = "weights.data"
_VALUES = "values.onnx"


@dataclass(frozen=True)
class Operand:
    """An input of an operation: a constant (`weight`, with its content where it is small) or a value of the run, of
    which small integers are kept and of larger ones the lowest and highest."""

    dtype: str
    shape: tuple[int, ...]
    is_constant: bool
    content: onnx.TensorProto | None = None
    values: tuple[int, ...] | None = None
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True)
class Operation:
    """One node as an example of all nodes of its signature. `operands` has None where an optional input is left out."""

    signature: str
    node: onnx.NodeProto
    operands: tuple[Operand | None, ...]
    opsets: Mapping[str, int]

    @property
    def stands_alone(self) -> bool:
        """Whether the node says by itself what it computes: one with graphs inside reads values from around it."""
        has_graphs = any(attribute.HasField("g") or attribute.graphs for attribute in self.node.attribute)
        return not has_graphs and all(one is None or one.dtype != _NO_TENSOR for one in self.operands)


@dataclass(frozen=True)
class GraphOperations:
    """All operations of a graph: how often each signature occurs, an example of each, and the nodes of each by name."""

    counts: Counter[str]
    examples: Mapping[str, Operation]
    nodes: Mapping[str, str] = field(default_factory=dict)  # name of the node -> signature


def operations_of(path: Path, feed: Mapping[str, NDArray[Any]], *, level: Level = "all") -> GraphOperations:
    """What ONNX Runtime makes of the file, run once on the feed to learn the sizes of all values.

    Args:
        level: how far the runtime optimizes: `all` it does on this machine, or what runs on any processor.

    Raises:
        ProfileError: the runtime cannot load or run the graph.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="vlmopt-operations-") as place:
        optimized = Path(place) / "optimized.onnx"
        try:
            _optimize(path, optimized, level)
            model = onnx.load(optimized, load_external_data=False)
            values = _values(model, Path(place), feed)
        except Exception as problem:  # ONNX Runtime's own exceptions share no public base class
            reason = " ".join(str(problem).split())[:200]
            raise ProfileError(str(path), f"ONNX Runtime cannot run it ({reason})") from problem
    return _collected(model, values)


def _optimize(path: Path, target: Path, level: Level) -> None:
    import onnxruntime

    options = session_options(level, threads=1)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _DATA)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(SMALL_BYTES + 1)
    )
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_options(level: Level | Literal["none"], *, threads: int) -> SessionOptions:
    """How far graphs are optimized; silent, since the runtime warns that an optimized graph fits this machine only."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    chosen = {"all": levels.ORT_ENABLE_ALL, "extended": levels.ORT_ENABLE_EXTENDED, "none": levels.ORT_DISABLE_ALL}
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    options.graph_optimization_level = chosen[level]
    return options


def given_inputs(session: InferenceSession, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What a session reads of a feed, named with dots or without."""
    by_name = {name.replace(".", "_"): value for name, value in feed.items()}
    return {value.name: by_name[value.name.replace(".", "_")] for value in session.get_inputs()}


def _values(model: onnx.ModelProto, folder: Path, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All values of the graph but those inside of other operations, by name."""
    import onnx
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in watched.graph.output}
    names = [name for node in watched.graph.node for name in node.output if name and name not in known]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(watched, folder / _VALUES)
    options = session_options("none", threads=1)
    session = onnxruntime.InferenceSession(str(folder / _VALUES), options, providers=["CPUExecutionProvider"])
    given = given_inputs(session, feed)
    outputs = [value.name for value in session.get_outputs()]
    return {**given, **dict(zip(outputs, session.run(outputs, given), strict=True))}


def _collected(model: onnx.ModelProto, values: Mapping[str, NDArray[Any]]) -> GraphOperations:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    counts, examples, nodes = Counter[str](), dict[str, Operation](), dict[str, str]()
    for node in model.graph.node:
        operands = tuple(_operand(name, constants, values) for name in node.input)
        outputs = [values.get(name) for name in node.output]
        signature = _signature(node, operands, outputs)
        counts[signature] += 1
        nodes[node.name] = signature
        examples.setdefault(signature, Operation(signature, node, operands, opsets))
    return GraphOperations(counts, examples, nodes)


def _operand(
    name: str, constants: Mapping[str, onnx.TensorProto], values: Mapping[str, NDArray[Any]]
) -> Operand | None:
    if not name:
        return None
    if name in constants:
        tensor = constants[name]
        is_small = not tensor.external_data
        return Operand(_dtype(tensor), tuple(tensor.dims), True, tensor if is_small else None)
    value = values[name]
    if not hasattr(value, "dtype"):
        return Operand(_NO_TENSOR, (), False)
    dtype, shape = str(value.dtype), tuple(value.shape)
    if value.dtype.kind not in "iub":
        return Operand(dtype, shape, False)
    if value.nbytes <= SMALL_BYTES:
        return Operand(dtype, shape, False, values=tuple(int(one) for one in value.reshape(-1)))
    return Operand(dtype, shape, False, bounds=(int(value.min()), int(value.max())))


def _dtype(tensor: onnx.TensorProto) -> str:
    from onnx import helper

    return str(helper.tensor_dtype_to_np_dtype(tensor.data_type).name)


def _signature(node: onnx.NodeProto, operands: Sequence[Operand | None], outputs: Sequence[NDArray[Any] | None]) -> str:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    read = ", ".join(_shown(operand) for operand in operands)
    made = ", ".join(
        "-" if one is None or not hasattr(one, "dtype") else f"{one.dtype}{_sizes(one.shape)}" for one in outputs
    )
    attributes = ", ".join(sorted(_attributes(node)))
    return f"{name}({read})" + (f" {{{attributes}}}" if attributes else "") + f" -> {made}"


def _shown(operand: Operand | None) -> str:
    if operand is None:
        return "-"
    text = f"{operand.dtype}{_sizes(operand.shape)}"
    if not operand.is_constant:
        return text
    return f"constant {text}{_numbers(operand.content)}"


def _numbers(tensor: onnx.TensorProto | None) -> str:
    """Constant integers, which say what is computed; others are weights, whose numbers take no time."""
    from onnx import TensorProto, numpy_helper

    if tensor is None or tensor.data_type not in (TensorProto.INT64, TensorProto.INT32):
        return ""
    found = numpy_helper.to_array(tensor).reshape(-1)
    if found.size > _SHOWN_VALUES:
        return ""
    return f" = {' '.join(str(int(one)) for one in found)}"


def _sizes(shape: Sequence[int]) -> str:
    return f"[{','.join(str(size) for size in shape)}]"


def _attributes(node: onnx.NodeProto) -> Iterator[str]:
    from onnx import helper

    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            text = value.decode("utf-8", errors="replace")
        elif isinstance(value, int | float):
            text = f"{value:g}" if isinstance(value, float) else str(value)
        elif isinstance(value, list) and all(isinstance(one, int) for one in value):
            text = _sizes(value)
        else:
            text = hashlib.sha256(attribute.SerializeToString(deterministic=True)).hexdigest()[:12]
        yield f"{attribute.name}={text}"
