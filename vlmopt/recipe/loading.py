"""Recipes from files and from the command line, and back to files. A loaded recipe holds absolute paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlmopt.core.adapter_file import is_adapter_file
from vlmopt.core.budgets import RESOURCES
from vlmopt.core.errors import RecipeError
from vlmopt.recipe.schema import (
    DEFAULT_MAX_DROP,
    DEFAULT_PASSES,
    FOLD_ADAPTERS,
    FOLD_CROSS_MODAL,
    PLAIN_PASSES,
    VERSION,
    Recipe,
    known_keys,
    parse_adapter,
)
from vlmopt.recipe.yaml_file import read_yaml, write_yaml
from vlmopt.registry import suggest, survey


def load_recipe(path: str | Path, changes: Mapping[str, object] | None = None) -> Recipe:
    """The recipe in a YAML file, its relative paths taken from the file's folder.

    Args:
        changes: values that replace those of the file, by dotted key ("budgets.max_drop"); their relative paths are
            taken from the current folder, since the user typed them there.

    Raises: RecipeError for a file that cannot be read, a misspelled key or pass, or a value that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    content = read_yaml(path)
    version = content.get("version", VERSION)
    if version != VERSION:
        remedy = "use the vlmopt that wrote it"
        raise RecipeError(f"{path}: version", f"is {version!r}", expected=str(VERSION), remedy=remedy)
    content = _resolve(content, path.absolute().parent)
    return _build(_with_folding(_changed(content, changes or {})), place=str(path))


def default_recipe(model: str, task: str | None = None, changes: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of a run that names only a model and a task; `changes` as for `load_recipe`.

    With a task at most one point of its metric may be lost, unless another budget says how far to cut; without one
    nothing is cut that a task would have to judge.
    """
    given: dict[str, Any] = {"model": model, "task": task, "budgets": {"max_drop": DEFAULT_MAX_DROP}}
    if any((changes or {}).get(f"budgets.{quantity.value}") is not None for quantity in RESOURCES):
        given["budgets"] = {}
    if task is None and not (changes or {}).get("task"):
        given = {"model": model, "passes": list(PLAIN_PASSES)}
    passes = given.pop("passes", None)
    content = _changed(_resolve(given, Path.cwd()), changes or {})
    if passes is not None:
        content.setdefault("passes", _folding(passes, content.get("adapters")))
    return _build(_with_folding(content), place="recipe")


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes a recipe with every value spelled out, so that a later version with other defaults runs the same."""
    write_yaml(path, recipe.as_dict())


def recipe_digest(recipe: Recipe) -> str:
    """sha256 over everything that the recipe says; a resumed run compares it."""
    return hashlib.sha256(json.dumps(recipe.as_dict(), sort_keys=True).encode()).hexdigest()


def _build(content: Mapping[str, object], *, place: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error, place) from error
    found = survey([Path(folder) for folder in recipe.pass_dirs])
    known = found.passes
    for step in recipe.passes:
        for broken in found.broken:
            if step.name in broken.names:
                raise broken.error
        if step.name not in known:
            remedy = suggest(step.name, known) if known else "no passes are installed: install vlmopt with pip"
            raise RecipeError(f"{place}: passes", f"there is no pass {step.name!r}", remedy=remedy)
    return recipe


def _explain(error: ValidationError, place: str) -> RecipeError:
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = first["loc"]
    spelled = ".".join(str(part) for part in location)
    where = f"{place}: {spelled}"
    if first["type"] == "extra_forbidden":
        return RecipeError(where, "is no key of a recipe", remedy=suggest(str(location[-1]), known_keys(location[:-1])))
    if first["type"] == "missing":
        return RecipeError(where, "is missing", expected=f"a line `{location[-1]}: ...`")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").replace("tuple", "list")
    message = message.partition(" or instance of ")[0].replace("dictionary", "mapping (`key: value` lines)")
    kind = "expected" if first["msg"].startswith("Input should be ") else "found"
    message, _, wanted = message.partition("; expected ") if kind == "found" else (message, "", "")
    found = f"found {first['input']!r}" + (f" ({message})" if kind == "found" else "")
    return RecipeError(where, found, expected=message if kind == "expected" else wanted)


def _changed(content: Mapping[str, Any], changes: Mapping[str, object]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in _flat(_resolve(_nested(changes), Path.cwd())):
        section = merged
        for part in key[:-1]:
            inner = section.get(part)
            section[part] = dict(inner) if isinstance(inner, Mapping) else {}
            section = section[part]
        section[key[-1]] = value
    return merged


def _with_folding(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe with adapters that names no passes folds them before anything else is done."""
    if content.get("adapters") and "passes" not in content:
        content["passes"] = _folding(DEFAULT_PASSES, content["adapters"])
    return content


def _folding(passes: Sequence[str], adapters: object) -> list[str]:
    """The passes, with those that fold adapters behind the first; of several files each is to be had later on, so they
    stay apart.
    """
    entries = adapters if isinstance(adapters, (list, tuple)) else ()
    files = [one for one in entries if isinstance(one, Mapping) and is_adapter_file(str(one.get("path")))]
    first, *others = passes
    if not entries or len(files) > 1:
        return list(passes)
    return [first, FOLD_ADAPTERS, *([FOLD_CROSS_MODAL] if files else []), *others]


def _nested(changes: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        section = nested
        *parents, last = key.split(".")
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    return nested


def _flat(nested: Mapping[str, object], above: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], object]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, (*above, key))
        else:
            yield (*above, key), value


def _resolve(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    resolved = dict(content)
    for key in ("model", "task"):
        if isinstance(resolved.get(key), str):
            resolved[key] = _path_or_hub_id(resolved[key], folder)
    profile = resolved.get("profile")
    if isinstance(profile, Mapping) and isinstance(profile.get("file"), str):
        resolved["profile"] = {**profile, "file": _absolute(profile["file"], folder)}
    if isinstance(resolved.get("device_profile"), str):
        resolved["device_profile"] = _absolute(resolved["device_profile"], folder)
    if isinstance(resolved.get("adapters"), (list, tuple)):
        resolved["adapters"] = [_adapter(entry, folder) for entry in resolved["adapters"]]
    if isinstance(resolved.get("pass_dirs"), (list, tuple)):
        resolved["pass_dirs"] = [_absolute(d, folder) if isinstance(d, str) else d for d in resolved["pass_dirs"]]
    return resolved


def _adapter(entry: object, folder: Path) -> object:
    """The entry with an absolute path; one that cannot be read as it is, for the check that follows."""
    try:
        parsed = parse_adapter(entry) if isinstance(entry, str) else entry
    except ValueError:
        return entry
    if isinstance(parsed, Mapping) and isinstance(parsed.get("path"), str):
        return {**parsed, "path": _absolute(parsed["path"], folder)}
    return parsed


def _path_or_hub_id(text: str, folder: Path) -> str:
    """A hub id looks like a relative path, so only what exists, or what only a path can look like, becomes one."""
    looks_like_path = text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1
    path = Path(_absolute(text, folder))
    return str(path) if looks_like_path or path.exists() else text


def _absolute(text: str, folder: Path) -> str:
    path = Path(text).expanduser()
    return str((folder / path).resolve()) if text else text
