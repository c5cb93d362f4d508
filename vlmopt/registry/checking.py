"""What the contract asks of the class of a pass, beyond what its source shows."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

from vlmopt.core.contract import Pass, Promise
from vlmopt.core.errors import PassError
from vlmopt.core.facts import Fact, is_registered, registered_facts
from vlmopt.registry.source import PassInfo
from vlmopt.registry.suggestions import suggest

FACT_SETS = ("requires", "produces", "breaks")


def check_class(pass_class: type[Pass], info: PassInfo) -> None:
    """Raises PassError, naming the file, for the first thing that the contract does not allow."""
    place = str(info.file)
    parameters = getattr(pass_class, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(pass_class) or parameters is None or not parameters.frozen:
        raise PassError(place, f"{info.class_name} is no frozen dataclass", expected="@dataclass(frozen=True)")
    _check_attributes(pass_class, info)
    missing = sorted(getattr(pass_class, "__abstractmethods__", ()))
    if missing:
        raise PassError(place, f"{info.class_name} has no {', '.join(missing)}", expected="every contract method")
    _check_values(pass_class, info)
    for which in FACT_SETS:
        _check_facts(which, getattr(pass_class, which), place)
    both = sorted(fact.name for fact in pass_class.produces & pass_class.breaks)
    if both:
        raise PassError(place, f"produces and breaks {both[0]!r}", expected="one of the two")


def check_module(module: ModuleType, pass_class: type[Pass], info: PassInfo) -> None:
    """Raises PassError when importing the file made another pass that its source does not show."""
    for value in list(vars(module).values()):
        is_pass = isinstance(value, type) and issubclass(value, Pass) and value not in (Pass, pass_class)
        if is_pass and not _is_imported(value, module):
            raise PassError(str(info.file), f"2 passes in one file ({info.class_name}, {value.__name__})", expected="1")


def _is_imported(value: type[Pass], module: ModuleType) -> bool:
    """Whether a class was made by another module, which holds it (a class made by a call may name any module)."""
    origin = sys.modules.get(value.__module__)
    return origin is not None and origin is not module and getattr(origin, value.__name__, None) is value


def _check_attributes(pass_class: type[Pass], info: PassInfo) -> None:
    fields = {field.name for field in dataclasses.fields(pass_class)}  # type: ignore[arg-type]
    contract = {name for name in (*vars(Pass), *Pass.__annotations__) if not name.startswith("_")}
    for name in _public_names(pass_class):
        if name not in contract | fields:
            raise PassError(
                str(info.file),
                f"{info.class_name} has the public attribute {name!r}, which the contract does not know",
                remedy=f"{suggest(name, contract)} otherwise begin the name with an underscore",
            )
    clash = sorted(fields & contract)
    if clash:
        found = f"the option {clash[0]!r} has the name of a part of the contract"
        raise PassError(str(info.file), found, remedy=f"rename it, or write `{clash[0]}: ClassVar[...]`")


def _public_names(pass_class: type[Pass]) -> list[str]:
    own = [c for c in pass_class.__mro__ if c is not Pass and issubclass(c, Pass)]
    names = [name for c in own for name in (*vars(c), *vars(c).get("__annotations__", {}))]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def _check_values(pass_class: type[Pass], info: PassInfo) -> None:
    """What the listing read from the source must be what the class holds."""
    place = str(info.file)
    for what, wanted in (("name", info.name), ("promise", info.promise), ("needs_vlmopt", info.needs_vlmopt)):
        found = getattr(pass_class, what)
        if found != wanted:
            shown = f"{type(found).__name__}.{found.name}" if isinstance(found, Promise) else repr(found)
            raise PassError(place, f"{what} is {shown} once it is imported", expected="what its class body says")
    if not isinstance(pass_class.changes_signature, bool):
        raise PassError(place, f"changes_signature is {pass_class.changes_signature!r}", expected="True or False")


def _check_facts(which: str, facts: object, place: str) -> None:
    if not isinstance(facts, (frozenset, set)):
        raise PassError(place, f"{which} is {facts!r}", expected="a frozenset of facts: frozenset({CAPTURED})")
    known = registered_facts()
    for fact in sorted(facts, key=str):
        if isinstance(fact, Fact) and is_registered(fact):
            continue
        if isinstance(fact, Fact) and fact.name in known:
            found = f"{which} the fact {fact.name!r} with another meaning than the registered one"
            raise PassError(place, found, expected=repr(known[fact.name].meaning), remedy="import the fact")
        name = fact.name if isinstance(fact, Fact) else str(fact)
        remedy = f"{suggest(name, known)}; facts are imported, and register_fact(name, meaning) makes a new one"
        raise PassError(place, f"{which} the unregistered fact {fact!r}", remedy=remedy)
