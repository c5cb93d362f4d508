"""What edits are to lose on the task, before any plan is measured."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

from vlmopt.core.program import Program
from vlmopt.core.workload import Feed
from vlmopt.graph.branch_distortions import BranchDistortions
from vlmopt.workflow.run_state import RunState

_LEAST_NEED = 0.05  # of the median score
_FEW = 16  # items that distortions are seen on


class Losses:
    """What edits of a component are to lose, from how far they move its features beside what a skip moves and loses.

    A branch whose score says that it is not needed is taken for one that is needed a little: scores are noisy.
    """

    def __init__(self, state: RunState, program: Program, component: str) -> None:
        self._state, self._component = state, component
        self.feed = _few(state, program)[component]
        self._distortions = BranchDistortions(program.components[component], program.heads.get(component), self.feed)
        scores = {name: state.importance.get(f"{component}/{name}", 0.0) for name in self._distortions.names}
        least = _LEAST_NEED * statistics.median([score for score in scores.values() if score > 0] or [0.0])
        moved = self._distortions.skipped()
        self._prices = {name: max(score, least) / moved[name] for name, score in scores.items() if moved[name] > 0}
        self._price = statistics.median(self._prices.values()) if self._prices else 1.0

    def in_branches(self, edited: Program, places: Collection[str]) -> dict[str, float]:
        """Of the edits in each of these branches by itself."""
        names = [place.partition("/")[2] for place in places]
        feed = self.feed if self._state.original.generation is None else _few(self._state, edited)[self._component]
        found = self._distortions.edited(edited.components[self._component], feed, names)
        return {f"{self._component}/{name}": self._prices.get(name, self._price) * d for name, d in found.items()}

    def of_all(self, edited: Program) -> float:
        """Of edits outside of all branches."""
        feed = self.feed if self._state.original.generation is None else _few(self._state, edited)[self._component]
        return self._price * self._distortions.whole(edited.components[self._component], feed)


def _few(state: RunState, program: Program) -> Mapping[str, Feed]:
    """A few items of every component's inputs."""
    feeds = state.sample_feeds(program)
    if program.generation is not None or state.fit is None:
        return feeds
    known = {name: own[0] for name, own in state.fit.feeds.items() if name in feeds}
    return feeds | {name: {key: value[:_FEW] for key, value in feed.items()} for name, feed in known.items()}
