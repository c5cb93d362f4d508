"""A pass as a class: imported under guard, and checked against the contract."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vlmopt.core.contract import Pass
from vlmopt.core.errors import PassError
from vlmopt.core.guarding import DEFAULT_TIME_LIMIT_S, Owner, guarded_call
from vlmopt.registry.checking import FACT_SETS, check_class, check_module
from vlmopt.registry.listing import find_pass
from vlmopt.registry.options import Option, instantiate, options_of
from vlmopt.registry.source import PassInfo
from vlmopt.registry.suggestions import suggest

_UNKNOWN_NAME = re.compile(r"cannot import name '(\w+)' from '(vlmopt[\w.]*)'")


@dataclass(frozen=True)
class PassDescription:
    """Everything about one pass, for `passes show`. Facts are pairs of name and meaning."""

    info: PassInfo
    options: tuple[Option, ...]
    requires: tuple[str, ...]
    produces: tuple[str, ...]
    breaks: tuple[str, ...]
    meanings: Mapping[str, str]
    specification: str


def load_pass(name: str, pass_dirs: Sequence[Path] = (), *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> type[Pass]:
    """The class of a pass, imported and checked against the contract.

    Args:
        name: of the pass, or the path of its `.py` file.
        time_limit_s: for the import.
    """
    return load_class(find_pass(name, pass_dirs), time_limit_s=time_limit_s)


def load_class(info: PassInfo, *, time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> type[Pass]:
    """The class of a pass that was found before."""
    module = _import(info, time_limit_s)
    pass_class = getattr(module, info.class_name, None)
    if not (isinstance(pass_class, type) and issubclass(pass_class, Pass)):
        raise PassError(str(info.file), f"{info.class_name} is not a subclass of vlmopt.core.contract.Pass")
    check_class(pass_class, info)
    check_module(module, pass_class, info)
    return pass_class


def make_pass(
    name: str,
    options: Mapping[str, object],
    pass_dirs: Sequence[Path] = (),
    *,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> Pass:
    """A pass with its options, each checked by name and by type; `name` and `time_limit_s` as for `load_pass`."""
    return instantiate(load_pass(name, pass_dirs, time_limit_s=time_limit_s), options)


def describe_pass(
    name: str, pass_dirs: Sequence[Path] = (), *, time_limit_s: float = DEFAULT_TIME_LIMIT_S
) -> PassDescription:
    """Options, promise, facts, origin and specification of one pass; imports it. Arguments as for `load_pass`."""
    info = find_pass(name, pass_dirs)
    pass_class = load_class(info, time_limit_s=time_limit_s)
    facts = {which: sorted(getattr(pass_class, which), key=lambda fact: fact.name) for which in FACT_SETS}
    requires, produces, breaks = (tuple(fact.name for fact in facts[which]) for which in FACT_SETS)
    meanings = {fact.name: fact.meaning for which in FACT_SETS for fact in facts[which]}
    specification = inspect.getdoc(sys.modules[pass_class.__module__]) or inspect.getdoc(pass_class) or ""
    return PassDescription(info, options_of(pass_class), requires, produces, breaks, meanings, specification)


def _import(info: PassInfo, time_limit_s: float) -> ModuleType:
    name = info.module or _module_name(info.file)
    if name in sys.modules:
        return sys.modules[name]
    place = f"{info.file} (from {info.origin})" if info.module else str(info.file)
    try:
        return guarded_call(
            lambda: importlib.import_module(name) if info.module else _import_file(name, info.file),
            place=f"{place}, import",
            owner=Owner(str(info.file), info.file),
            time_limit_s=time_limit_s,
            is_import=True,
        )
    except PassError as error:
        sys.modules.pop(name, None)  # it must not pass as imported the next time
        raise _with_suggestion(error) from error.__cause__
    except BaseException:
        sys.modules.pop(name, None)
        raise


def _with_suggestion(error: PassError) -> PassError:
    """The error with the closest name, where the file imports a name of ours that does not exist."""
    unknown = _UNKNOWN_NAME.search(str(error.__cause__))
    if unknown is None:
        return error
    name, module = unknown.groups()
    known = [word for word in vars(sys.modules[module]) if not word.startswith("_")] if module in sys.modules else []
    return PassError(error.place, f"{module} has no {name!r}{_line(error.found)}", remedy=suggest(name, known))


def _line(found: str) -> str:
    place = re.search(r" \(line \d+\)$", found)
    return place.group() if place else ""


def _module_name(file: Path) -> str:
    """Another name for every content of a file: one that was edited is imported anew."""
    return f"_vlmopt_pass_{abs(hash(file)):x}_{file.stat().st_mtime_ns:x}_{file.stem}"


def _import_file(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PassError(str(file), "cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while the class is made
    spec.loader.exec_module(module)
    return module
