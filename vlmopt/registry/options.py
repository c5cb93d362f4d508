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
from vlmopt.registry.suggestions import suggest


@dataclass(frozen=True)
class Option:
    """One option of a pass. `default` is None with `is_required`."""

    name: str
    type: str
    default: object
    is_required: bool


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
    try:
        return pass_class(**values)
    except (ValueError, TypeError) as error:
        raise PassError(place, f"refuses its options: {error}") from error


def _field_types(pass_class: type[Pass]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(pass_class)
    except NameError as error:
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
    hints = _field_types(pass_class)
    return tuple(
        Option(f.name, _type_name(hints[f.name]), _default(f), _is_required(f))
        for f in dataclasses.fields(pass_class)  # type: ignore[arg-type]
        if f.init
    )


def _is_required(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[object]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _type_name(hint: object) -> str:
    text = inspect.formatannotation(hint)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
