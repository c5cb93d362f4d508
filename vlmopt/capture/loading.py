"""Loads a Hugging Face folder or hub id, refusing what would make the model silently wrong."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmopt.core.errors import ModelError
from vlmopt.core.program import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logging.getLogger("transformers").setLevel(logging.ERROR)

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SAFE = ("model.safetensors", "model.safetensors.index.json")


def resolve_folder(model: str) -> Path:
    """The folder that holds the model; a hub id is downloaded into the hub's own cache first.

    Raises:
        ModelError: no such folder, and no such model on the hub or no way to reach it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path or folder.exists():
        found = "is a file" if folder.exists() else "no such folder"
        raise ModelError(model, found, expected="a Hugging Face model folder (config.json beside model.safetensors)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.bin"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        found = f"neither a folder nor a model that could be fetched from the hub ({type(error).__name__})"
        raise ModelError(
            model, found, remedy="give the path of a model folder, or check the id and the network"
        ) from error


def read_config(model: str, folder: Path) -> PretrainedConfig:
    """The configuration of the model.

    Raises:
        ModelError: config.json is missing, malformed, or of a model that transformers does not know.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(str(folder), "has no config.json", expected="a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(str(path), f"is not JSON ({error})", remedy="fetch the model again") from error
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        found = f"model_type {kind!r} cannot be read by transformers ({_first_line(error)})"
        raise ModelError(str(path), found, remedy="check model_type, or upgrade transformers") from error


def model_class(config: PretrainedConfig, place: str) -> type[PreTrainedModel]:
    """The class that `architectures` names; without one, the plain model of the model type."""
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    if names:
        named = getattr(transformers, str(names[0]), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
        found = f"architecture {names[0]!r} is unknown to transformers {transformers.__version__}"
        raise ModelError(place, found, expected="a model class of transformers")
    try:
        return transformers.AutoModel._model_mapping[type(config)]  # type: ignore[no-any-return]
    except KeyError as error:
        raise ModelError(place, f"no model class for model_type {config.model_type!r}") from error


def load_model(
    model: str, *, device: str = "cpu", dtype: str = "float32", allow_pickle: bool = False, with_weights: bool = True
) -> tuple[PreTrainedModel, ModelSource, Path]:
    """The model in evaluation mode, where it came from, and its folder.

    Without weights the model is built from config.json alone, its tensors fake, in the caller's fake-tensor mode.

    Raises:
        ModelError: configuration or weights are missing, corrupt, incomplete or pickled.
    """
    folder = resolve_folder(model)
    config = read_config(model, folder)
    cls = model_class(config, str(folder / "config.json"))
    if with_weights:
        weights = check_weights(folder, allow_pickle=allow_pickle)
        built = _from_pretrained(cls, folder, config, getattr(torch, dtype), weights)
        built = built.to(device)
    else:
        weights = []
        built = _without_weights(cls, config, getattr(torch, dtype))
    fingerprint = _fingerprint([folder / "config.json", *weights])
    return built.eval(), ModelSource(model, str(config.model_type), cls.__name__, fingerprint), folder


def check_weights(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """The weight files, each opened and found whole.

    Raises:
        ModelError: none, a truncated or corrupt one, or only pickles while these are not allowed.
    """
    present = [folder / name for name in _SAFE if (folder / name).is_file()]
    if not present:
        pickles = [folder / name for name in _PICKLES if (folder / name).is_file()]
        if pickles and not allow_pickle:
            raise ModelError(
                str(pickles[0]),
                "is a pickle, which can run any code when it is loaded",
                expected="model.safetensors",
                remedy="convert it to safetensors, or pass --allow-pickle if you trust its origin",
            )
        if not pickles:
            raise ModelError(str(folder), "has no weights", expected="model.safetensors beside config.json")
        return pickles
    files = _shards(present[0]) if present[0].suffix == ".json" else [present[0]]
    for path in files:
        _check_safetensors(path)
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(str(index), "is not a safetensors index", remedy="fetch the model again") from error
    return [index.parent / name for name in names]


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelError(str(path), "is missing", expected="the shard that the index names", remedy="fetch it again")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        found = f"is truncated or no safetensors file ({size} bytes: {_first_line(error)})"
        raise ModelError(str(path), found, remedy="fetch the file again") from error


def _from_pretrained(
    cls: type[PreTrainedModel], folder: Path, config: PretrainedConfig, dtype: torch.dtype, weights: list[Path]
) -> PreTrainedModel:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # progress is the caller's to show
    use_safetensors = weights[0].suffix == ".safetensors"
    try:
        model, info = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=use_safetensors,
            ignore_mismatched_sizes=True,  # so that they come back in `info`, with their names
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(str(weights[0]), f"cannot be loaded into {cls.__name__} ({_first_line(error)})") from error
    _check_complete(weights[0], cls, info)
    return model


def _without_weights(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with tensors that have a shape and no memory; modules that share a tensor go on sharing it."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):  # where every model of transformers can be built
            model = cls(config)
    except Exception as error:
        place = f"config.json of {config.model_type}"
        raise ModelError(place, f"{cls.__name__} cannot be built from it ({_first_line(error)})") from error
    finally:
        torch.set_default_dtype(usual)
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    owned[name] = made.setdefault(id(tensor), _on_cpu(tensor))
    return model


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    return torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty


def _check_complete(path: Path, cls: type, info: dict[str, Any]) -> None:
    """Weights that the file lacks would be random numbers: the model would run and mean nothing."""
    wrong = [f"{name} {tuple(stored)} for {tuple(needed)}" for name, stored, needed in info.get("mismatched_keys", ())]
    problems = sorted(wrong or info.get("missing_keys", ()))
    if problems:
        what = "has other shapes for" if wrong else "lacks"
        names = ", ".join(problems[:3]) + (", ..." if len(problems) > 3 else "")
        raise ModelError(
            str(path),
            f"{what} {len(problems)} tensors of {cls.__name__} ({names})",
            remedy="they would be random: use the weights that belong to config.json",
        )


def _fingerprint(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    """The first line of the message, and the next one where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]
