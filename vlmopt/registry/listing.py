"""What passes there are, read from their sources: nothing is imported, so a listing needs no torch."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from vlmopt.core import facts as fact_module
from vlmopt.core.contract import Promise
from vlmopt.core.errors import PassError
from vlmopt.core.facts import Fact
from vlmopt.registry.suggestions import suggest

GROUP = "vlmopt.passes"
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class PassInfo:
    """What the source of a pass says, read without running it. `origin`: the distribution or the file it comes from."""

    name: str
    summary: str
    promise: Promise
    produces: tuple[str, ...]
    origin: str
    file: Path
    class_name: str
    module: str  # import name; empty for a file of a pass folder


def find_passes(pass_dirs: Sequence[Path] = ()) -> dict[str, PassInfo]:
    """Every pass there is, by name in alphabetical order; nothing is imported.

    Raises: PassError for a pass that breaks one of the rules that its source shows.
    """
    found: dict[str, PassInfo] = {}
    for info in (*_from_entry_points(), *_from_folders(pass_dirs)):
        rival = found.get(info.name)
        if rival is not None and rival.file != info.file:
            raise PassError(
                str(info.file),
                f"claims the name {info.name!r}, which {rival.file} has already",
                remedy="rename one of them",
            )
        found.setdefault(info.name, info)
    return dict(sorted(found.items()))


def producers(pass_dirs: Sequence[Path] = ()) -> dict[str, tuple[str, ...]]:
    """For every fact, the names of the passes that produce it."""
    by_fact: dict[str, tuple[str, ...]] = {}
    for info in find_passes(pass_dirs).values():
        for fact in info.produces:
            by_fact[fact] = (*by_fact.get(fact, ()), info.name)
    return by_fact


def find_pass(name: str, pass_dirs: Sequence[Path] = ()) -> PassInfo:
    """The pass of this name; PassError with the closest name when there is none."""
    known = find_passes(pass_dirs)
    if name in known:
        return known[name]
    if not known:
        raise PassError(f"pass {name!r}", "no passes are installed", remedy="install vlmopt (pip install -e .)")
    raise PassError(f"pass {name!r}", "there is no pass of that name", remedy=suggest(name, known))


def _from_entry_points() -> list[PassInfo]:
    infos = {}
    for point in entry_points(group=GROUP):
        infos[point.name, point.value] = _read_entry_point(point)
    return list(infos.values())


def _read_entry_point(point: EntryPoint) -> PassInfo:
    distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "an installed package"
    file = _source_of(point.module)
    if file is None:
        raise PassError(
            f"entry point {point.name!r} of {distribution}",
            f"there is no source file for {point.module}",
            remedy=f"reinstall or remove {distribution}",
        )
    info = _read_source(file, origin=distribution, module=point.module)
    if info.name != point.name:
        raise PassError(str(file), f"is named {info.name!r} but registered as {point.name!r} by {distribution}")
    return info


def _source_of(module: str) -> Path | None:
    """The file of a module, found without running its parent packages, as find_spec of a dotted name would."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        file = Path(folder).joinpath(*rest).with_suffix(".py")
        if file.is_file():
            return file.resolve()
    return None


def _from_folders(pass_dirs: Sequence[Path]) -> list[PassInfo]:
    infos = []
    for folder in pass_dirs:
        if not folder.is_dir():
            raise PassError(
                str(folder), "is not a folder", expected="a folder of pass files (one pass in each .py file)"
            )
        for file in sorted(folder.glob("*.py")):
            if not file.name.startswith("_"):
                infos.append(_read_source(file.resolve(), origin=str(file), module=""))
    return infos


def _read_source(file: Path, *, origin: str, module: str) -> PassInfo:
    tree = _parse(file, file.stat().st_mtime_ns)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and _has_pass_base(node)]
    if len(classes) != 1:
        found = ", ".join(node.name for node in classes) or "none"
        raise PassError(str(file), f"{len(classes)} passes in one file ({found})", expected="one")
    body = _class_body(classes[0])
    name = _literal_name(file, body)
    _check_name(file, name, classes[0].name)
    return PassInfo(
        name=name,
        summary=_summary(classes[0], tree),
        promise=_literal_promise(file, body),
        produces=_literal_facts(body.get("produces")),
        origin=origin,
        file=file,
        class_name=classes[0].name,
        module=module,
    )


@lru_cache(maxsize=256)
def _parse(file: Path, _modified_ns: int) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except SyntaxError as error:
        raise PassError(f"{file}:{error.lineno}", f"is not Python: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise PassError(str(file), "is not UTF-8 text") from error


def _has_pass_base(node: ast.ClassDef) -> bool:
    names = [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases]
    return "Pass" in names


def _class_body(node: ast.ClassDef) -> dict[str, ast.expr]:
    assigned: dict[str, ast.expr] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            assigned[statement.target.id] = statement.value
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            assigned[statement.targets[0].id] = statement.value
    return assigned


def _literal_name(file: Path, body: Mapping[str, ast.expr]) -> str:
    value = body.get("name")
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    raise PassError(str(file), "the pass has no literal name", expected='`name = "verb-object"` in the class body')


def _check_name(file: Path, name: str, class_name: str) -> None:
    if not _KEBAB.fullmatch(name):
        raise PassError(str(file), f"the name {name!r} is not kebab-case", expected="a name such as 'skip-branches'")
    if file.stem != name.replace("-", "_"):
        raise PassError(str(file), f"holds the pass {name!r}", expected=f"the file name {name.replace('-', '_')}.py")
    camel = "".join(part.capitalize() for part in name.split("-"))
    if class_name != camel:
        raise PassError(str(file), f"the class of {name!r} is called {class_name}", expected=camel)


def _literal_promise(file: Path, body: Mapping[str, ast.expr]) -> Promise:
    value = body.get("promise")
    if isinstance(value, ast.Attribute) and value.attr in Promise.__members__:
        return Promise[value.attr]
    members = ", ".join(f"Promise.{name}" for name in Promise.__members__)
    raise PassError(
        str(file), "the pass makes no promise", expected=f"`promise = ...` in the class body, one of {members}"
    )


def _literal_facts(value: ast.expr | None) -> tuple[str, ...]:
    if value is None:
        return ()
    names = [
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(value)
        if isinstance(n, (ast.Name, ast.Attribute))
    ]
    known = (getattr(fact_module, name, None) for name in names)
    return tuple(sorted({fact.name for fact in known if isinstance(fact, Fact)}))


def _summary(node: ast.ClassDef, tree: ast.Module) -> str:
    text = ast.get_docstring(node) or ast.get_docstring(tree) or ""
    return " ".join(text.split("\n\n")[0].split())
