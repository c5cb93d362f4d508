"""What the source of a pass says, read as a syntax tree: nothing of it runs."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vlmopt.core import facts as fact_module
from vlmopt.core.contract import Promise
from vlmopt.core.errors import PassError
from vlmopt.core.facts import Fact

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_CONTRACT = "vlmopt.core.contract"


@dataclass(frozen=True)
class PassInfo:
    """What the source of a pass says, read without running it. `origin`: the distribution or the file it comes from.

    The facts are those whose names the source spells out; `load_pass` knows them for certain.
    """

    name: str
    summary: str
    promise: Promise
    requires: tuple[str, ...]
    produces: tuple[str, ...]
    breaks: tuple[str, ...]
    needs_vlmopt: str
    origin: str
    file: Path
    class_name: str
    module: str  # import name; empty for a file of a pass folder


def read_source(file: Path, *, origin: str, module: str) -> PassInfo:
    """The one pass in a file.

    Raises:
        PassError: the file holds no pass or several, or the pass breaks a rule that its source shows.
    """
    tree = _parse(file)
    classes = _pass_classes(tree)
    if len(classes) != 1:
        found = ", ".join(node.name for node in classes) or "none"
        expected = "one class that inherits from Pass of vlmopt.core.contract"
        raise PassError(str(file), f"{len(classes)} passes in one file ({found})", expected=expected)
    body = _class_body(classes[0])
    name = _literal_name(file, body)
    _check_name(file, name, classes[0].name)
    facts = _facts_in_reach(tree)
    return PassInfo(
        name=name,
        summary=_summary(classes[0], tree),
        promise=_literal_promise(file, body),
        requires=_literal_facts(body.get("requires"), facts),
        produces=_literal_facts(body.get("produces"), facts),
        breaks=_literal_facts(body.get("breaks"), facts),
        needs_vlmopt=_literal_needs(file, body),
        origin=origin,
        file=file,
        class_name=classes[0].name,
        module=module,
    )


def claimed_names(file: Path) -> tuple[str, ...]:
    """The names that whoever wants the pass of this file may use, though it cannot be used: its own and its file's."""
    names = [_name_of(file)]
    with contextlib.suppress(PassError):  # the file's name may be all there is
        names[:0] = [_literal_name(file, _class_body(node)) for node in _pass_classes(_parse(file))]
    return tuple(dict.fromkeys(names))


def source_of(module: str) -> Path | None:
    """The file of a module, found without running its parent packages, as find_spec of a dotted name would."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin).resolve() if spec.origin and Path(spec.origin).is_file() else None
    for folder in spec.submodule_search_locations or ():
        inner = Path(folder).joinpath(*rest)
        for file in (inner.with_suffix(".py"), inner / "__init__.py"):
            if file.is_file():
                return file.resolve()
    return None


def _name_of(file: Path) -> str:
    return file.stem.replace("_", "-")


def _parse(file: Path) -> ast.Module:
    try:
        return _parsed(file, file.stat().st_mtime_ns)
    except OSError as error:
        raise PassError(str(file), f"cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=256)
def _parsed(file: Path, _modified_ns: int) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except SyntaxError as error:
        raise PassError(f"{file}:{error.lineno}", f"is not Python: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise PassError(str(file), "is not UTF-8 text") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise PassError(str(file), f"is not Python: {error}") from error


def _pass_classes(tree: ast.Module) -> list[ast.ClassDef]:
    """The classes that inherit from Pass, under whatever name it was imported, or from one of them."""
    names, statements = {"Pass"}, list(_statements(tree))
    for node in statements:
        if isinstance(node, ast.ImportFrom) and node.module == _CONTRACT:
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "Pass"}
    found = []
    for node in statements:
        if isinstance(node, ast.ClassDef) and _base_names(node) & names:
            names.add(node.name)
            found.append(node)
    return found


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements, the outer ones first; expressions, of which there are many more, hold none."""
    pending = deque[ast.AST]([tree])
    while pending:
        node = pending.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            inner = getattr(node, name, ())
            pending.extend(inner if isinstance(inner, list) else ())  # of a lambda it is an expression


def _base_names(node: ast.ClassDef) -> set[str]:
    return {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases}


def _class_body(node: ast.ClassDef) -> dict[str, ast.expr]:
    return dict(_assignments(node.body))


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            yield statement.targets[0].id, statement.value


def _literal_name(file: Path, body: Mapping[str, ast.expr]) -> str:
    value = body.get("name")
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    raise PassError(str(file), "the pass has no literal name", expected='`name = "verb-object"` in the class body')


def _check_name(file: Path, name: str, class_name: str) -> None:
    if not is_kebab_case(name):
        raise PassError(str(file), f"the name {name!r} is not kebab-case", expected="a name such as 'skip-branches'")
    if file.stem != name.replace("-", "_"):
        raise PassError(str(file), f"holds the pass {name!r}", expected=f"the file name {name.replace('-', '_')}.py")
    if class_name != class_name_of(name):
        raise PassError(str(file), f"the class of {name!r} is called {class_name}", expected=class_name_of(name))


def is_kebab_case(name: str) -> bool:
    return _KEBAB.fullmatch(name) is not None


def class_name_of(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))


def _literal_promise(file: Path, body: Mapping[str, ast.expr]) -> Promise:
    value = body.get("promise")
    if isinstance(value, ast.Attribute) and value.attr in Promise.__members__:
        return Promise[value.attr]
    members = ", ".join(f"Promise.{name}" for name in Promise.__members__)
    raise PassError(
        str(file), "the pass makes no promise", expected=f"`promise = ...` in the class body, one of {members}"
    )


def _literal_needs(file: Path, body: Mapping[str, ast.expr]) -> str:
    value = body.get("needs_vlmopt")
    if value is None:
        return ""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    raise PassError(str(file), "needs_vlmopt is no literal text", expected='versions such as ">=0.1,<1"')


def _literal_facts(value: ast.expr | None, known: Mapping[str, str]) -> tuple[str, ...]:
    if value is None:
        return ()
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(value)
        if isinstance(node, (ast.Name, ast.Attribute))
    }
    return tuple(sorted({known[name] for name in names if name in known}))


def _facts_in_reach(tree: ast.Module) -> dict[str, str]:
    """The names of facts by the variables that hold them: ours, and those the file makes or imports."""
    found = {name: value.name for name, value in vars(fact_module).items() if isinstance(value, Fact)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            made = _facts_of_module(node.module)
            found |= {alias.asname or alias.name: made[alias.name] for alias in node.names if alias.name in made}
    return found | _facts_made(tree)


def _facts_of_module(module: str) -> dict[str, str]:
    if module == fact_module.__name__:
        return {name: value.name for name, value in vars(fact_module).items() if isinstance(value, Fact)}
    if module.partition(".")[0] in ("torch", "__future__", "vlmopt"):
        return {}
    file = source_of(module)
    try:
        return _facts_made(_parse(file)) if file is not None and file.suffix == ".py" else {}
    except PassError:
        return {}  # whoever imports it says what is wrong with it


def _facts_made(tree: ast.Module) -> dict[str, str]:
    """Facts that a file registers, as in `TIDY = register_fact("tidy", "no loose ends")`."""
    made = {}
    for name, value in _assignments(tree.body):
        if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "register_fact" and value.args:
            first = value.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                made[name] = first.value
    return made


def _summary(node: ast.ClassDef, tree: ast.Module) -> str:
    text = ast.get_docstring(node) or ast.get_docstring(tree) or ""
    return " ".join(text.split("\n\n")[0].split())
