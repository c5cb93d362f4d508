"""What passes there are, read from their sources: nothing is imported, so a listing needs no torch.

A plugin that cannot be used is set aside with the reason: `vlmopt passes list` shows it, whoever names it is told, and
everything else works on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path

from vlmopt.core.errors import PassError
from vlmopt.registry.source import PassInfo, claimed_names, read_source, source_of
from vlmopt.registry.suggestions import suggest
from vlmopt.registry.versions import check_needs, check_requirements

GROUP = "vlmopt.passes"
_US = "vlmopt"


@dataclass(frozen=True)
class BrokenPass:
    """A plugin that cannot be used. `names`: what it may be asked for by, the most likely one first."""

    names: tuple[str, ...]
    origin: str
    file: Path | None
    error: PassError

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Survey:
    """All passes that there are: those that can be used, by name in alphabetical order, and those that cannot."""

    passes: dict[str, PassInfo]
    broken: tuple[BrokenPass, ...]


def survey(pass_dirs: Sequence[Path] = ()) -> Survey:
    """Every pass that is installed or lies in one of the folders; nothing is imported.

    Raises:
        PassError: one of the folders is none.
    """
    found: dict[str, list[PassInfo]] = {}
    broken: list[BrokenPass] = []
    for entry in (*_from_entry_points(), *_from_folders(pass_dirs)):
        if isinstance(entry, BrokenPass):
            broken.append(entry)
        elif entry.file not in [rival.file for rival in found.get(entry.name, ())]:
            found.setdefault(entry.name, []).append(entry)
    for name, rivals in found.items():
        if len(rivals) > 1:
            broken.append(_contested(name, rivals))
    passes = {name: rivals[0] for name, rivals in sorted(found.items()) if len(rivals) == 1}
    return Survey(passes, tuple(sorted(broken, key=lambda entry: (entry.name, str(entry.file)))))


def find_passes(pass_dirs: Sequence[Path] = ()) -> dict[str, PassInfo]:
    """Every pass that can be used, by name in alphabetical order; nothing is imported."""
    return survey(pass_dirs).passes


def find_broken(pass_dirs: Sequence[Path] = ()) -> tuple[BrokenPass, ...]:
    """Every plugin that cannot be used, with the reason; nothing is imported."""
    return survey(pass_dirs).broken


def producers(pass_dirs: Sequence[Path] = ()) -> dict[str, tuple[PassInfo, ...]]:
    """For every fact, the passes that produce it."""
    by_fact: dict[str, tuple[PassInfo, ...]] = {}
    for info in find_passes(pass_dirs).values():
        for fact in info.produces:
            by_fact[fact] = (*by_fact.get(fact, ()), info)
    return by_fact


def find_pass(name: str, pass_dirs: Sequence[Path] = ()) -> PassInfo:
    """The pass of this name, or of this file (a path that ends in `.py`).

    Raises:
        PassError: there is none, with the closest name; or it cannot be used, with the reason.
    """
    if name.endswith(".py"):
        return _find_file(Path(name), pass_dirs)
    found = survey(pass_dirs)
    for entry in found.broken:
        if name in entry.names:
            raise entry.error
    if name in found.passes:
        return found.passes[name]
    if not found.passes:
        raise PassError(f"pass {name!r}", "no passes are installed", remedy="install vlmopt (pip install -e .)")
    remedy = suggest(name, found.passes)
    if found.broken:
        remedy += f" ({len(found.broken)} more cannot be used: `vlmopt passes list` says why)"
    raise PassError(f"pass {name!r}", "there is no pass of that name", remedy=remedy)


def _find_file(file: Path, pass_dirs: Sequence[Path]) -> PassInfo:
    file = file.resolve()
    if not file.is_file():
        raise PassError(str(file), "there is no such file", expected="the name of a pass, or its .py file")
    for info in find_passes(pass_dirs).values():
        if info.file == file:
            return info
    return _checked(read_source(file, origin=str(file), module=""))


def _checked(info: PassInfo) -> PassInfo:
    check_needs(str(info.file), info.needs_vlmopt)
    return info


def _contested(name: str, rivals: Sequence[PassInfo]) -> BrokenPass:
    first, second = rivals[:2]
    remedy = "rename one of them" if not second.module else f"rename one of them, or uninstall {second.origin}"
    found = f"claims the name {name!r}, which {_spelled(first)} has already"
    return BrokenPass((name,), second.origin, second.file, PassError(_spelled(second), found, remedy=remedy))


def _spelled(info: PassInfo) -> str:
    return f"{info.file} ({info.origin})" if info.module else str(info.file)


def _from_entry_points() -> Iterator[PassInfo | BrokenPass]:
    points, broken = _entry_points()
    yield from broken
    seen = set()
    known: dict[int, _Origin] = {}
    for point in points:
        if (point.name, point.value) in seen:
            continue
        seen.add((point.name, point.value))
        if id(point.dist) not in known:
            known[id(point.dist)] = _Origin.of(point.dist)
        origin = known[id(point.dist)]
        try:
            yield _read_entry_point(point, origin)
        except PassError as error:
            yield BrokenPass((point.name,), origin.text, _file_of(point), error)


@dataclass(frozen=True)
class _Origin:
    """The distribution of entry points; its metadata, which is parsed anew for every question, is asked once."""

    text: str
    requirements: tuple[str, ...]

    @classmethod
    def of(cls, dist: Distribution | None) -> _Origin:
        if dist is None:
            return cls("an installed package", ())
        name = dist.name
        return cls(f"{name} {dist.version}", () if name == _US else tuple(dist.requires or ()))


def _entry_points() -> tuple[list[EntryPoint], list[BrokenPass]]:
    try:
        return list(entry_points(group=GROUP)), []
    except Exception:  # noqa: BLE001 - one distribution with damaged metadata; which one is found below
        points: list[EntryPoint] = []
        broken = []
        for distribution in distributions():
            try:
                points += distribution.entry_points.select(group=GROUP)
            except Exception as error:  # noqa: BLE001 - see above
                broken.append(_damaged(distribution, error))
        return points, broken


def _damaged(distribution: Distribution, error: Exception) -> BrokenPass:
    name = str(distribution.metadata["Name"])
    found = f"its entry points cannot be read ({type(error).__name__}: {error})"
    problem = PassError(f"distribution {name}", found, remedy=f"reinstall or remove {name}")
    return BrokenPass((name,), name, None, problem)


def _read_entry_point(point: EntryPoint, source: _Origin) -> PassInfo:
    origin = source.text
    place = f"entry point {point.name!r} of {origin}"
    try:
        module, class_name = point.module, point.attr
    except AttributeError as error:
        found = f"points to {point.value!r}"
        raise PassError(place, found, expected="MODULE:CLASS", remedy=f"reinstall or remove {origin}") from error
    file = source_of(module)
    if file is None or file.suffix != ".py":
        raise PassError(place, f"there is no source file for {module}", remedy=f"reinstall or remove {origin}")
    if source.requirements:  # what reads them takes a while to load
        check_requirements(f"{file} ({origin})", source.requirements)
    info = read_source(file, origin=origin, module=module)
    if info.name != point.name:
        raise PassError(str(file), f"is named {info.name!r} but registered as {point.name!r} by {origin}")
    if class_name != info.class_name:
        raise PassError(place, f"points to {point.value!r}", expected=f"{module}:{info.class_name}")
    return _checked(info)


def _file_of(point: EntryPoint) -> Path | None:
    try:
        return source_of(point.module)
    except AttributeError:
        return None


def _from_folders(pass_dirs: Sequence[Path]) -> Iterator[PassInfo | BrokenPass]:
    for folder in pass_dirs:
        if not folder.is_dir():
            raise PassError(
                str(folder), "is not a folder", expected="a folder of pass files (one pass in each .py file)"
            )
        for file in sorted(folder.glob("*.py")):
            if file.name.startswith(("_", "test_")) or file.name == "conftest.py":
                continue
            try:
                yield _checked(read_source(file.resolve(), origin=str(file), module=""))
            except PassError as error:
                yield BrokenPass(claimed_names(file), str(file), file.resolve(), error)
