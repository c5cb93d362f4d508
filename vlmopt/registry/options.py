"""The options of a pass: its dataclass fields, checked by name and by type."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmopt.core.contract import Pass
from vlmopt.core.errors import PassError
from vlmopt.core.guarding import Owner, guarded_call
from vlmopt.registry.suggestions import suggest

_ENTRY = re.compile(r"(\w+)(?: \([^)]*\))?: *(.*)")


@dataclass(frozen=True)
class Option:
    """One option of a pass. `default` is None with `is_required`; `help` is what the class docstring says of it."""

    name: str
    type: str
    default: object
    is_required: bool
    help: str = ""


def instantiate(pass_class: type[Pass], options: Mapping[str, object]) -> Pass:
    """An instance of a pass class with options from YAML: lists become tuples and strings enums where a field says so.

    Raises: PassError for an option that does not exist, has the wrong type or is missing, or that the pass refuses.
    """
    place = f"pass {pass_class.name!r}"
    fields = {f.name: f for f in dataclasses.fields(pass_class) if f.init}  # type: ignore[arg-type]
    for key in options:
        if key not in fields:
            raise PassError(place, f"has no option {key!r}", remedy=suggest(key, fields))
    hints = _field_types(pass_class)
    values = {key: _checked(place, key, value, hints[key]) for key, value in options.items()}
    missing = [f.name for f in fields.values() if _is_required(f) and f.name not in values]
    if missing:
        raise PassError(place, f"needs the option {missing[0]!r}", expected=_type_name(hints[missing[0]]))
    return guarded_call(
        lambda: _made(pass_class, values, place), place=f"{place}, options", owner=Owner.of(pass_class, pass_class.name)
    )


def _made(pass_class: type[Pass], values: Mapping[str, object], place: str) -> Pass:
    try:
        return pass_class(**values)
    except (ValueError, TypeError) as error:
        raise PassError(place, f"refuses its options: {error}") from error


def _field_types(pass_class: type[Pass]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(pass_class)
    except Exception as error:
        raise PassError(
            f"pass {pass_class.name!r}",
            f"the type of an option is unknown: {error}",
            remedy="import it at module level",
        ) from error


def _checked(place: str, key: str, value: object, hint: Any) -> object:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise PassError(
            place, f"option {key!r} is {value!r}: {detail}", expected=_type_name(hint), remedy="correct the recipe"
        ) from error


def options_of(pass_class: type[Pass]) -> tuple[Option, ...]:
    """The options of a pass, in the order of its fields."""
    hints, helps = _field_types(pass_class), argument_helps(inspect.getdoc(pass_class) or "")
    return tuple(
        Option(f.name, _type_name(hints[f.name]), _default(f, pass_class), _is_required(f), helps.get(f.name, ""))
        for f in dataclasses.fields(pass_class)  # type: ignore[arg-type]
        if f.init
    )


def argument_helps(docstring: str) -> dict[str, str]:
    """What the `Args:` of a docstring says of each argument, on one line each."""
    lines = docstring.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Args:"), None)
    helps: dict[str, str] = {}
    name, depth = "", 0
    for line in lines[start + 1 :] if start is not None else []:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            break  # the next section
        entry = _ENTRY.fullmatch(line.strip())
        if entry and (not name or indent <= depth):
            name, depth = entry.group(1), indent
            helps[name] = entry.group(2)
        elif name and line.strip():
            helps[name] = f"{helps[name]} {line.strip()}".strip()
    return helps


def _is_required(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[object], pass_class: type[Pass]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is dataclasses.MISSING:
        return None
    place = f"pass {pass_class.name!r}, default of {field.name}"
    return guarded_call(field.default_factory, place=place, owner=Owner.of(pass_class, pass_class.name))


def _type_name(hint: object) -> str:
    text = inspect.formatannotation(hint)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
