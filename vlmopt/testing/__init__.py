"""Holds passes to their word: for pytest, for the command line and as functions. Importing it loads no torch.

`check_pass` makes every check of one pass, `check_on` those that hold on any program; `contract_tests` makes a pytest
test of them; `CHECKS` lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmopt.testing.contract import contract_tests
from vlmopt.testing.results import CheckResult, PassReport, Verdict

if TYPE_CHECKING:
    from vlmopt.testing.checks import CHECKS as CHECKS
    from vlmopt.testing.harness import check_on as check_on
    from vlmopt.testing.harness import check_pass as check_pass
    from vlmopt.testing.trial import Settings as Settings

__all__ = ["CHECKS", "CheckResult", "PassReport", "Settings", "Verdict", "check_on", "check_pass", "contract_tests"]

_HOMES = {"CHECKS": "checks", "check_on": "harness", "check_pass": "harness", "Settings": "trial"}


def __getattr__(name: str) -> object:
    # These load torch, and the pytest plugin is imported in every run of every project that has vlmopt installed.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"vlmopt.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlmopt.testing' has no attribute {name!r}")
