"""Which process of a run tests which files: those that capture the same toys in one, and the dearest first.

A capture takes seconds and is kept by the process that made it, so a second process would make it again. And a run ends
when its last process does: what takes a minute must not begin when the other processes have nothing left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ROOT = Path(__file__).parents[1]
TOGETHER = {  # by what a file imports
    "captured writers": re.compile(r"from tests\.capture\.test_generative import .*captured_toy"),
    "captured encoders": re.compile(r"from tests\.zoo\.conftest import .*captured_toy"),
}
MAKERS = {"tests/capture/test_generative.py": "captured writers"}
APART = ("tests/workflow/", "tests/runtime/")  # where captures are the smaller part of the work
DEAREST = (
    "captured writers",
    "tests/passes/test_contract.py",
    "tests/workflow/test_recovering.py",
    "tests/workflow/test_adapter_files.py",
    "tests/runtime/test_generation.py",
    "tests/workflow/test_generative.py",
    "tests/workflow/test_publishing.py",
    "tests/capture/test_adapters.py",
    "tests/workflow/test_profiling.py",
    "tests/workflow/test_artifacts.py",
    "tests/workflow/test_budgets.py",
    "captured encoders",
    "tests/workflow/test_rechecking.py",
    "tests/workflow/test_refusals.py",
    "tests/workflow/test_evidence.py",
    "tests/testing/test_random_programs.py",
    "tests/passes/test_phantom.py",
    "tests/workflow/test_multi_task.py",
    "tests/passes/test_routers.py",
    "tests/passes/test_low_rank.py",
    "tests/workflow/test_optimizing.py",
    "tests/graph/test_parallel.py",
    "tests/plugins/test_new.py",
    "tests/tuning/test_preference.py",
)


class Shares(LoadFileScheduling):  # type: ignore[misc, unused-ignore]
    """Hands out whole shares, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return share_of(nodeid.split("::", 1)[0])

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        # A process begins its last test once it knows what follows: with one alone it would wait, and we for it.
        if not node.shutting_down and self._pending_of(self.assigned_work[node]) == 1:
            super()._reschedule(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """What a process was running when it died; what it had left goes to the others.

        xdist hands on what was finished as well, and then waits for it to finish again, and runs anew what the process
        died of.
        """
        left = {share: tests for share, tests in self.assigned_work.pop(node).items() if not all(tests.values())}
        if not left:
            return None
        share, tests = next(iter(left.items()))
        died_of = next(name for name, is_done in tests.items() if not is_done)
        tests[died_of] = True
        if all(tests.values()):
            del left[share]
        self.workqueue.update(left)
        for other in self.assigned_work:
            self._reschedule(other)
        return died_of


@cache
def share_of(file: str) -> str:
    """The name that this file (a path below the root) shares with all files that go to the same process."""
    if file in MAKERS:
        return MAKERS[file]
    if file.startswith(APART):
        return file
    text = (ROOT / file).read_text(encoding="utf-8")
    return next((name for name, imports in TOGETHER.items() if imports.search(text)), file)


def dearest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests share after share, each in its own order: those known to take longest, then those with most tests."""
    shares: dict[str, list[pytest.Item]] = {}
    for item in items:
        shares.setdefault(share_of(item.nodeid.split("::", 1)[0]), []).append(item)
    place = {name: i for i, name in enumerate(DEAREST)}
    names = sorted(shares, key=lambda name: (place.get(name, len(place)), -len(shares[name])))
    return [item for name in names for item in shares[name]]
