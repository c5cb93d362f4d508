"""Plugins as files and as installed distributions, good and faulty ones."""

from __future__ import annotations

from pathlib import Path

from vlmopt.core.contract import Promise
from vlmopt.registry.scaffolding import new_files

NAME = "drop-scaling"
GOOD = next(iter(new_files(NAME, promise=Promise.EXACT, is_package=False).values()))
PLAN = "        sites: list[Site] = []\n"
APPLY = "        graph = program.components[site.component].graph\n"
CASES = '        yield Case("by one"'
IMPORT = "from collections.abc import Iterable\n"


def write_pass(folder: Path, *changes: tuple[str, str], name: str = "drop_scaling.py") -> Path:
    """The file of a good pass, with these changes."""
    text = GOOD
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def before(place: str, *lines: str, indent: int = 8) -> tuple[str, str]:
    """The change that puts lines before a place of the good pass."""
    return place, "".join(f"{' ' * indent}{line}\n" for line in lines) + place


def install(site: Path, distribution: str, *changes: tuple[str, str], entry: str = "", requires: str = "") -> Path:
    """A distribution with the good pass, changed, as pip leaves it in a folder of installed packages.

    Args:
        entry: the line of entry_points.txt, if it is not the right one.
    """
    package = distribution.replace("-", "_")
    file = write_pass(site / package, *changes)
    (site / package / "__init__.py").touch()
    info = site / f"{package}-1.2.dist-info"
    info.mkdir(parents=True)
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n{needs}")
    entry = entry or f"{NAME} = {package}.drop_scaling:DropScaling"
    (info / "entry_points.txt").write_text(f"[vlmopt.passes]\n{entry}\n")
    return file
