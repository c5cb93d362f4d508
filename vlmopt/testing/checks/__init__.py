"""Every check of a pass, in the order in which they are made: what runs at all, plans, graphs, numbers, the whole."""

from __future__ import annotations

from vlmopt.testing.checks.check import CaseCheck, Check, PassCheck
from vlmopt.testing.checks.graphs import CHECKS as _GRAPHS
from vlmopt.testing.checks.numbers import CHECKS as _NUMBERS
from vlmopt.testing.checks.planning import CHECKS as _PLANNING
from vlmopt.testing.checks.running import CHECKS as _RUNNING
from vlmopt.testing.checks.whole import FIRST as _FIRST
from vlmopt.testing.checks.whole import LAST as _LAST

CHECKS: tuple[Check, ...] = (*_FIRST, *_RUNNING, *_PLANNING, *_GRAPHS, *_NUMBERS, *_LAST)

__all__ = ["CHECKS", "CaseCheck", "Check", "PassCheck"]
