"""Adapters that users have already, in peft's folders: put on a model before it is captured, by peft's own code.

The graph then holds them as ordinary operations, and `fold-adapters` folds what is linear. Behind the capture every
layer has its own name again, and all that an adapter brought lies under `adapters.LAYER.NAME`, where tuning finds it.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vlmopt.core.errors import ModelError
from vlmopt.core.program import AdapterSource, Program
from vlmopt.graph.modules import ADAPTERS, drop_unused_modules, get_at, has_path, set_at

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_BASE, _SAVED = "base_layer", "modules_to_save"


def put_adapters(
    model: nn.Module, adapters: Sequence[AdapterSource], *, device: str = "cpu", allow_pickle: bool = False
) -> str:
    """Puts the adapters on the model, in place; returns a digest of all that they are.

    Raises:
        ModelError: a folder that holds no adapter, one of another model, weights that are corrupt, pickled or no finite
            numbers, a rank below 1, or a kind that is no part of the graph.
    """
    peft, digest = _peft(), hashlib.sha256()
    wrapped: Any = None
    for adapter in adapters:
        folder = Path(adapter.path)
        place = f"adapter {adapter.name} ({folder})"
        settings = _settings(folder, place)
        file = _weights(folder, place, allow_pickle=allow_pickle)
        digest.update(json.dumps([adapter.name, adapter.weight, settings], sort_keys=True).encode() + file.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _config(peft, folder, place)
            if wrapped is not None and wrapped.peft_type is not config.peft_type:
                found = f"is of the type {config.peft_type.value}, and the one before is {wrapped.peft_type.value}"
                raise ModelError(place, found, expected="adapters of one type")
            wrapped, result = _loaded(peft, model if wrapped is None else wrapped, config, adapter, device)
        _refuse_partial(result, place)
        _weigh(model, adapter, place)
    if wrapped is not None:
        wrapped.base_model.set_adapter([adapter.name for adapter in adapters])
    model.eval()
    return digest.hexdigest()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        remedy = 'install it: pip install "vlmopt[adapters]"'
        raise ModelError("adapters", "peft is not installed, which reads them", remedy=remedy) from error
    return peft


def _settings(folder: Path, place: str) -> dict[str, Any]:
    if not (folder / _CONFIG).is_file():
        found = f"has no {_CONFIG}" if folder.is_dir() else "is a file" if folder.exists() else "no such folder"
        raise ModelError(place, found, expected=f"a folder that peft wrote ({_CONFIG} beside {_WEIGHTS})")
    try:
        settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(place, f"its {_CONFIG} is not JSON ({error})", remedy="fetch it again") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise ModelError(place, f"its {_CONFIG} names no peft_type", expected="a folder that peft wrote")
    ranks = {"r": settings.get("r", 1), **dict(settings.get("rank_pattern") or {})}
    for name, rank in ranks.items():
        if isinstance(rank, int) and rank < 1:
            raise ModelError(place, f"its rank {name} is {rank}", expected="at least 1")
    return settings


def _weights(folder: Path, place: str, *, allow_pickle: bool) -> Path:
    """The file of weights, opened and found whole and finite."""
    from safetensors import SafetensorError, safe_open

    file = folder / _WEIGHTS
    if not file.is_file():
        if not (folder / _PICKLE).is_file():
            raise ModelError(place, "has no weights", expected=f"{_WEIGHTS} beside {_CONFIG}")
        if not allow_pickle:
            raise ModelError(
                place,
                f"{_PICKLE} is a pickle, which can run any code when it is loaded",
                expected=_WEIGHTS,
                remedy="convert it to safetensors, or pass --allow-pickle if you trust its origin",
            )
        return _finite(folder / _PICKLE, _unpickled(folder / _PICKLE, place), place)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        found = f"{_WEIGHTS} is truncated or no safetensors file ({file.stat().st_size} bytes)"
        raise ModelError(place, found, remedy="fetch the file again") from error
    return _finite(file, tensors, place)


def _unpickled(file: Path, place: str) -> dict[str, Tensor]:
    """Plain tensors, and nothing else that a pickle may hold."""
    try:
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(place, f"{file.name} holds more than tensors, or is corrupt", expected=_WEIGHTS) from error
    return loaded


def _finite(file: Path, tensors: Mapping[str, Tensor], place: str) -> Path:
    if not tensors:
        raise ModelError(place, f"{file.name} holds no tensors", expected="the weights of an adapter")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(place, f"{name} holds numbers that are not finite", remedy="train the adapter again")
    return file


def _config(peft: Any, folder: Path, place: str) -> Any:
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        found = f"its {_CONFIG} cannot be read by peft {peft.__version__} ({_line(error)})"
        raise ModelError(place, found, remedy="upgrade peft, or check the file") from error
    if config.is_prompt_learning:
        found = f"is of the type {config.peft_type.value}, which changes what the model is called with"
        raise ModelError(place, found, expected="one that changes layers, such as LoRA")
    config.inference_mode = True
    return config


def _loaded(peft: Any, model: Any, config: Any, adapter: AdapterSource, device: str) -> tuple[Any, Any]:
    """The model with one adapter more, and which of its tensors found no place."""
    plain: dict[str, Any] = {"autocast_adapter_dtype": False}  # an adapter has the number format of its layer
    try:
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter.name, config, **plain)
        else:
            model = peft.PeftModel(model, config, adapter.name, **plain)
        return model, model.load_adapter(adapter.path, adapter.name, torch_device=device, **plain)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        found = f"does not fit this model ({_line(error)})"
        remedy = "give the model that the adapter was trained on"
        raise ModelError(f"adapter {adapter.name} ({adapter.path})", found, remedy=remedy) from error


def _refuse_partial(result: Any, place: str) -> None:
    """Tensors without a place, or places without a tensor, would silently change less than the adapter does."""
    for names, what in ((result.unexpected_keys, "have no place in this model"), (result.missing_keys, "are missing")):
        if names:
            found = f"{len(names)} of its tensors {what} ({', '.join(sorted(names)[:3])})"
            raise ModelError(place, found, remedy="give the model that the adapter was trained on")


def _weigh(model: nn.Module, adapter: AdapterSource, place: str) -> None:
    if not math.isfinite(adapter.weight):
        raise ModelError(place, f"its weight is {adapter.weight}", expected="a finite number")
    if adapter.weight == 1.0:
        return
    scaled = [module for module in model.modules() if adapter.name in (getattr(module, "scaling", None) or {})]
    if not scaled:
        raise ModelError(place, "has no scale that a weight could change", expected="the weight 1")
    for module in scaled:
        module.scaling[adapter.name] *= adapter.weight  # type: ignore[index, operator]


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:3])[:240]


def name_adapters(program: Program) -> None:
    """Gives layers that carry adapters their own names again, and puts what the adapters brought under `adapters`."""
    for component in program.components.values():
        _rename(component.graph)
    heads = {name: _without_wrapper(path) for name, path in program.heads.items()}
    program.heads.update(heads)


def _rename(module: fx.GraphModule) -> None:
    nodes = [node for node in module.graph.nodes if node.op in ("call_module", "get_attr")]
    layers = {str(node.target).partition(f".{_BASE}")[0] for node in nodes if f".{_BASE}" in str(node.target)}
    found: dict[str, nn.Module | Tensor] = {}
    for node in nodes:
        path, new = str(node.target), _new_path(str(node.target), layers)
        if new != path:
            found[new] = get_at(module, path)
            node.target = new
    for path, value in sorted(found.items(), key=lambda item: isinstance(item[1], Tensor)):
        if not (isinstance(value, Tensor) and has_path(module, path)):  # else the layer that lies there holds it
            set_at(module, path, value)
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (_without_wrapper(path), kind) for key, (path, kind) in stack.items()}
    drop_unused_modules(module)
    module.recompile()


def _new_path(path: str, layers: set[str]) -> str:
    own = _without_wrapper(path)
    if own != path:
        return own
    layer = next((name for name in layers if path.startswith(f"{name}.")), None)
    if layer is None:
        return path
    kind, _, rest = path.removeprefix(f"{layer}.").partition(".")
    name, _, rest = rest.partition(".")
    return ".".join(part for part in (ADAPTERS, layer, name, kind, rest) if part)


def _without_wrapper(path: str) -> str:
    """The path of a layer, or within it, without what peft wraps it in."""
    words = path.split(".")
    if _SAVED in words:
        at = words.index(_SAVED)
        del words[at : at + 2]
    return ".".join(word for word in words if word != _BASE)
