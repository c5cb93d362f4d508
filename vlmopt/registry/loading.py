"""A pass as a class: imported, and checked against the contract."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vlmopt.core.contract import Pass
from vlmopt.core.errors import PassError, VlmoptError
from vlmopt.core.facts import Fact, is_registered
from vlmopt.registry.listing import PassInfo, find_pass
from vlmopt.registry.options import Option, instantiate, options_of
from vlmopt.registry.suggestions import suggest

_FACT_SETS = ("requires", "produces", "breaks")


@dataclass(frozen=True)
class PassDescription:
    """Everything about one pass, for `passes show`."""

    info: PassInfo
    options: tuple[Option, ...]
    requires: tuple[str, ...]
    produces: tuple[str, ...]
    breaks: tuple[str, ...]
    specification: str


def load_pass(name: str, pass_dirs: Sequence[Path] = ()) -> type[Pass]:
    """The class of a pass, imported and checked against the contract."""
    info = find_pass(name, pass_dirs)
    module = _import(info)
    pass_class = getattr(module, info.class_name, None)
    if not (isinstance(pass_class, type) and issubclass(pass_class, Pass)):
        raise PassError(str(info.file), f"{info.class_name} is not a subclass of vlmopt.core.contract.Pass")
    _check_class(pass_class, info)
    return pass_class


def make_pass(name: str, options: Mapping[str, object], pass_dirs: Sequence[Path] = ()) -> Pass:
    """A pass with its options, each checked by name and by type."""
    return instantiate(load_pass(name, pass_dirs), options)


def describe_pass(name: str, pass_dirs: Sequence[Path] = ()) -> PassDescription:
    """Options, promise, facts, origin and specification of one pass; imports it."""
    pass_class = load_pass(name, pass_dirs)
    info = find_pass(name, pass_dirs)
    requires, produces, breaks = (tuple(sorted(f.name for f in getattr(pass_class, s))) for s in _FACT_SETS)
    specification = inspect.getdoc(sys.modules[pass_class.__module__]) or inspect.getdoc(pass_class) or ""
    return PassDescription(info, options_of(pass_class), requires, produces, breaks, specification)


def _import(info: PassInfo) -> ModuleType:
    try:
        return importlib.import_module(info.module) if info.module else _import_file(info.file)
    except VlmoptError:
        raise
    except Exception as error:
        raise PassError(
            str(info.file), f"cannot be imported: {type(error).__name__}: {error}", remedy=f"from {info.origin}"
        ) from error


def _import_file(file: Path) -> ModuleType:
    name = f"_vlmopt_pass_{abs(hash(file)):x}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PassError(str(file), "cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the class is made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_class(pass_class: type[Pass], info: PassInfo) -> None:
    parameters = getattr(pass_class, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(pass_class) or parameters is None or not parameters.frozen:
        raise PassError(str(info.file), f"{info.class_name} is no frozen dataclass", expected="@dataclass(frozen=True)")
    fields = {f.name for f in dataclasses.fields(pass_class)}  # type: ignore[arg-type]
    contract = {name for name in (*vars(Pass), *Pass.__annotations__) if not name.startswith("_")}
    for name in _public_names(pass_class):
        if name not in contract | fields:
            raise PassError(
                str(info.file),
                f"{info.class_name} has the public attribute {name!r}, which the contract does not know",
                remedy=f"{suggest(name, contract)} otherwise begin the name with an underscore",
            )
    missing = sorted(getattr(pass_class, "__abstractmethods__", ()))
    if missing:
        raise PassError(
            str(info.file), f"{info.class_name} has no {', '.join(missing)}", expected="every contract method"
        )
    for facts in _FACT_SETS:
        for fact in getattr(pass_class, facts):
            if not (isinstance(fact, Fact) and is_registered(fact)):
                raise PassError(
                    str(info.file),
                    f"{facts} the unregistered fact {fact!r}",
                    remedy="register_fact(name, meaning) makes one",
                )


def _public_names(pass_class: type[Pass]) -> list[str]:
    own = [c for c in pass_class.__mro__ if c is not Pass and issubclass(c, Pass)]
    names = [name for c in own for name in (*vars(c), *vars(c).get("__annotations__", {}))]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]
