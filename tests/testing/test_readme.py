"""The table of the room's README is the list of checks."""

from __future__ import annotations

import re
from pathlib import Path

import vlmopt.testing
from vlmopt.testing import CHECKS

README = Path(vlmopt.testing.__file__).with_name("README.md")


def test_the_readme_lists_every_check_with_its_description() -> None:
    rows = re.findall(r"^\| `([a-z][a-z0-9-]+)` \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(check.name, check.description) for check in CHECKS]
