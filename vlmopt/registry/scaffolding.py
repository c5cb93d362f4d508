"""The files of a new pass: one that works, with its cases and its test, to be changed into the one that is wanted."""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePosixPath
from string import Template

import vlmopt
from vlmopt.core.contract import Promise
from vlmopt.core.errors import PassError
from vlmopt.registry.source import class_name_of, is_kebab_case
from vlmopt.registry.suggestions import suggest

VERBS = (
    "canonicalize",
    "drop",
    "fold",
    "fuse",
    "hoist",
    "insert",
    "merge",
    "prune",
    "quantize",
    "replace",
    "share",
    "skip",
    "split",
)


def check_new_name(name: str) -> None:
    """Raises PassError unless the name is verb-object in kebab-case, with one of the verbs that passes have."""
    place = f"name {name!r}"
    if not is_kebab_case(name):
        raise PassError(place, "is not kebab-case", expected="verb-object, such as 'drop-scaling'")
    verb, _, thing = name.partition("-")
    if verb not in VERBS:
        close = suggest(verb, VERBS)
        remedy = close if close.startswith("did") else ""
        raise PassError(place, f"{verb!r} is no verb of passes", expected=f"one of {', '.join(VERBS)}", remedy=remedy)
    if not thing and verb != "canonicalize":
        raise PassError(place, "has no object", expected=f"verb-object, such as '{verb}-scaling'")


def new_files(name: str, *, promise: Promise, is_package: bool) -> dict[PurePosixPath, str]:
    """The texts of a new pass by their paths.

    Args:
        is_package: a distribution of its own with an entry point, instead of a file for a pass folder.

    Raises:
        PassError: the name is none for a pass.
    """
    check_new_name(name)
    module = name.replace("-", "_")
    words = {
        "name": name,
        "module": module,
        "class_name": class_name_of(name),
        "distribution": f"vlmopt-{name}",
        "package": f"vlmopt_{module}",
        "needs": _needs(vlmopt.__version__),
    }
    source = _filled(f"{promise.value}.py.txt", words)
    if not is_package:
        test = _filled("test_file.py.txt", words)
        return {PurePosixPath(f"{module}.py"): source, PurePosixPath(f"test_{module}.py"): test}
    root = PurePosixPath(words["distribution"])
    inside = root / "src" / words["package"]
    return {
        root / "pyproject.toml": _filled("pyproject.toml.txt", words),
        root / "README.md": _filled("README.md.txt", words),
        inside / "__init__.py": f'"""The pass {name} for vlmopt."""\n',
        inside / "py.typed": "",
        inside / f"{module}.py": source,
        root / "tests" / f"test_{module}.py": _filled("test_package.py.txt", words),
    }


def _needs(version: str) -> str:
    """Versions that a pass written for this one can be expected to work with: until the next that may break it."""
    major, minor, *_ = version.split(".")
    following = f"{int(major) + 1}" if major != "0" else f"0.{int(minor) + 1}"
    return f">={major}.{minor},<{following}"


def _filled(template: str, words: dict[str, str]) -> str:
    text = files("vlmopt.registry").joinpath("templates", template).read_text(encoding="utf-8")
    return Template(text).substitute(words)
