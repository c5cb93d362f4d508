"""One wrapped part of a model -> one verified `Component`."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlmopt
from vlmopt.capture.kept import folder, keep, kept_component, key_of
from vlmopt.capture.wrappers import PREFIX, Wrapper
from vlmopt.core.errors import CaptureError
from vlmopt.core.program import Component, Dim, TensorSpec
from vlmopt.graph.modules import output_values, placeholders
from vlmopt.graph.raising import raise_program
from vlmopt.graph.sizes import export_dims, size_text, symbols_of

# Worst difference to eager, relative to the largest output, that another order of additions explains.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_FIXED = re.compile(r"marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_NOT_A_MODEL = (Path(torch.__file__).parent, Path(vlmopt.__file__).parent)


def capture_component(
    name: str,
    module: Wrapper,
    samples: list[dict[str, Tensor]],
    *,
    dims: Mapping[str, Dim],
    shapes: Mapping[str, tuple[int | str, ...]],
    image: tuple[int, int],
    rewrite: AbstractContextManager[None] | None = None,
    is_checked: bool = True,
) -> Component:
    """The component, compared with eager at every sample's shape; exported unless its graph is kept from before.

    Args:
        samples: inputs at two sizes or more; the first is exported.
        shapes: for each input its dimensions, numbers or names of `dims`.
        image: (height, width) that the model is captured for.
        rewrite: a context in which the model can be exported (see `rewrites/`); eager runs outside of it.

    Raises:
        CaptureError: the model cannot be exported, a dimension came out fixed, or the graph computes something else.
    """
    key = None
    if is_checked and folder() is not None:
        key = key_of(name, module, samples[0], dims=dims, shapes=shapes, image=image, rewrite=rewrite)
    known = None if key is None else kept_component(key, name, module, dims)
    if known is not None and _agrees(known, module, samples):
        return known
    exported = _export(name, module, samples[0], dims, shapes, rewrite or nullcontext())
    component = _component(name, module, exported, samples[0], dims, shapes)
    if is_checked:
        for sample in samples:
            _check_parity(component, module, sample)
    if key is not None:
        keep(key, component, module, dims)
    return component


def _agrees(component: Component, module: Wrapper, samples: list[dict[str, Tensor]]) -> bool:
    """Whether a graph that was kept computes what this model does."""
    try:
        for sample in samples:
            _check_parity(component, module, sample)
    except Exception:  # noqa: BLE001  it is made anew, which says what is wrong if anything is
        return False
    return True


def _component(
    name: str,
    module: Wrapper,
    exported: torch.export.ExportedProgram,
    sample: dict[str, Tensor],
    dims: Mapping[str, Dim],
    shapes: Mapping[str, tuple[int | str, ...]],
) -> Component:
    graph = raise_program(exported, prefix=PREFIX)
    _name_inputs(name, module, graph)
    outputs = []
    for wanted, node in zip(module.outputs, output_values(graph), strict=True):
        value = node.meta["val"]
        outputs.append(
            TensorSpec(wanted, _spec_shape(graph, value, shapes, dims), str(value.dtype).removeprefix("torch."))
        )
    inputs = tuple(TensorSpec(key, tuple(shapes[key]), str(sample[key].dtype).removeprefix("torch.")) for key in shapes)
    component = Component(name, graph, inputs, tuple(outputs))
    _check_dims(component)
    return component


def _export(
    name: str,
    module: Wrapper,
    sample: dict[str, Tensor],
    dims: Mapping[str, Dim],
    shapes: Mapping[str, tuple[int | str, ...]],
    rewrite: AbstractContextManager[None],
) -> torch.export.ExportedProgram:
    made = export_dims(dims)
    dynamic = {
        key: {axis: made[dim] for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for key, shape in shapes.items()
    }
    try:
        with rewrite, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                module, (), kwargs=module.arguments(sample), dynamic_shapes=module.arguments(dynamic), strict=False
            )
    except CaptureError as error:  # the wrapper knows what is wrong
        raise CaptureError(
            f"{error.place} of {type(module.model).__name__}", error.found, expected=error.expected, remedy=error.remedy
        ) from error
    except Exception as error:
        place = f"{name} of {type(module.model).__name__}"
        if fixed := dict(_FIXED.findall(str(error))):
            sizes = " and ".join(f"{dim} to {size}" for dim, size in fixed.items())
            raise CaptureError(
                place, f"the model fixes {sizes}", expected=f"free dimensions {sorted(fixed)}"
            ) from error
        raise CaptureError(
            place,
            f"torch.export stopped at {_where(error, module)}: {_reason(error)}",
            expected="a model whose control flow and sizes do not depend on the data",
            remedy="a rewrite of that module (see vlmopt/capture/README.md) can make it exportable",
        ) from error


def _name_inputs(name: str, module: Wrapper, graph: torch.fx.GraphModule) -> None:
    """Gives the graph's inputs the names that they have in the wrapper; torch numbers those that come in a tuple."""
    found, own = placeholders(graph), module.arguments({key: key for key in module.inputs})
    for node, wanted in zip(found, module.inputs, strict=True):
        if node.name == wanted:
            continue
        if node.name in module.inputs or wanted in own:
            raise CaptureError(name, f"input {node.name!r} came first", expected=f"input {wanted!r}")
        node.target = wanted
        node.name = graph.graph._graph_namespace.create_name(wanted, node)
    graph.recompile()


def run_eager(name: str, module: Wrapper, sample: Mapping[str, Any], *, call: Callable[..., Any] | None = None) -> Any:
    """What the wrapped model itself, or another `call` of it, returns for a sample.

    Raises:
        CaptureError: it cannot be called with these inputs.
    """
    try:
        with torch.no_grad():
            return (call or module.model)(**sample)
    except Exception as error:
        sizes = {key: tuple(value.shape) for key, value in sample.items() if isinstance(value, Tensor)}
        raise CaptureError(
            f"{name} of {type(module.model).__name__}",
            f"stopped at {_where(error, module)} when called with {sizes}: {_reason(error)}",
            expected="a model that takes these inputs",
        ) from error


def _where(error: BaseException, module: Wrapper) -> str:
    """Module path, file and line of the innermost frame that belongs to the model."""
    paths = {id(child): path.removeprefix(PREFIX) for path, child in module.named_modules()}
    place, owner = "an unknown place", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        this = frame.f_locals.get("self")
        if isinstance(this, nn.Module) and id(this) in paths and not any(map(file.is_relative_to, _NOT_A_MODEL)):
            owner = f"module {paths[id(this)] or PREFIX.removesuffix('.')} ({type(this).__name__}), "
            place = f"{file.name}:{line} in {frame.f_code.co_name}"
    return owner + place


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first[:300]}"


def _spec_shape(
    graph: torch.fx.GraphModule,
    value: Tensor,
    shapes: Mapping[str, tuple[int | str, ...]],
    dims: Mapping[str, Dim],
) -> tuple[int | str, ...]:
    """Dimensions of an output in the names of the input dimensions (`batch`, `text + 17`); a sum by its own name."""
    names: dict[str, str] = {}
    for node, shape in zip(placeholders(graph), shapes.values(), strict=True):
        for wanted, actual in zip(shape, node.meta["val"].shape, strict=True):
            if isinstance(wanted, str):
                names.update(dict.fromkeys(symbols_of(actual), wanted))
    sums = {" + ".join(order): key for key, dim in dims.items() for order in permutations(dim.sum_of) if dim.sum_of}
    return tuple(dim if isinstance(dim, int) else sums.get(text := size_text(dim, names), text) for dim in value.shape)


def _check_dims(component: Component) -> None:
    """A dimension that was asked to vary and came out as a number would fail, or lie, at the next size."""
    for spec, node in zip(component.inputs, placeholders(component.graph), strict=True):
        for axis, (wanted, actual) in enumerate(zip(spec.shape, node.meta["val"].shape, strict=True)):
            if isinstance(wanted, str) and isinstance(actual, int):
                raise CaptureError(
                    f"{component.name} input {spec.name} axis {axis}",
                    f"was fixed to {actual} by the model",
                    expected=f"the free dimension {wanted!r}",
                )
            if isinstance(wanted, int) and wanted != actual:
                raise CaptureError(
                    f"{component.name} input {spec.name} axis {axis}", f"is {actual}", expected=str(wanted)
                )


def _check_parity(component: Component, module: Wrapper, sample: dict[str, Tensor]) -> None:
    with torch.no_grad():
        every = module(**module.arguments(sample))
        made = component.graph(*(sample[spec.name] for spec in component.inputs))
    for spec, found, wanted in zip(component.outputs, made, every, strict=True):
        _check_output(component.name, spec.name, found, wanted, sample)


def _check_output(place: str, output: str, found: Tensor, wanted: Tensor, sample: Mapping[str, Tensor]) -> None:
    if found.shape != wanted.shape:
        raise CaptureError(
            place, f"{output} has shape {tuple(found.shape)}", expected=f"{tuple(wanted.shape)} as in eager"
        )
    scale = wanted.double().abs().max().clamp(min=1e-6)
    worst = float((found.double() - wanted.double()).abs().max() / scale)
    allowed = TOLERANCE.get(wanted.dtype, 1e-5)
    if not worst <= allowed:
        sizes = {key: tuple(value.shape) for key, value in sample.items()}
        raise CaptureError(
            place,
            f"the graph differs from eager by {worst:.2g} of the largest value of {output} at {sizes}",
            expected=f"at most {allowed:.0e}",
            remedy="this model needs a rewrite (see vlmopt/capture/README.md)",
        )
