from __future__ import annotations

import re
import tomllib
from typing import Any

from tests.architecture.rules import ROOT


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_on_disk_is_shipped() -> None:
    files = [file for file in (ROOT / "vlmopt").rglob("*.py") if "__pycache__" not in file.parts]
    on_disk = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    assert set(project()["tool"]["setuptools"]["packages"]) == on_disk | {"vlmopt_passes"}


def test_every_pass_file_is_registered_under_its_own_name() -> None:
    registered = project()["project"]["entry-points"]["vlmopt.passes"]
    expected = {}
    for file in (ROOT / "passes").glob("*.py"):
        if not file.name.startswith("_"):
            class_name = "".join(part.capitalize() for part in file.stem.split("_"))
            expected[file.stem.replace("_", "-")] = f"vlmopt_passes.{file.stem}:{class_name}"
    assert registered == expected


def test_tested_versions_are_pinned_for_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    settings = project()["project"]
    extras = settings["optional-dependencies"]
    needed = [*settings["dependencies"], *extras["dev"], *extras["examples"]]
    names = {re.split(r"[<>=!~ ]", text)[0].lower() for text in needed}
    assert names - pinned == set()
    assert "torch==2.13.0" in lines
