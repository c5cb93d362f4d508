"""What a program loses on the task against the original, heads fitted behind its edits as behind a cut."""

from __future__ import annotations

from vlmopt.core.program import Program
from vlmopt.core.workload import Workload
from vlmopt.graph.joined import joined
from vlmopt.planning.cuts import Measurement
from vlmopt.planning.meter import CutMeter
from vlmopt.workflow.opening import OpenedTask
from vlmopt.workflow.run_state import RunState


class Judge:
    """Measures programs on so many items of the profile and validation splits each; the original is run once.

    A program that was trained (`is_trained`) keeps its heads, and only the validation split can tell: halves of it are
    both splits.
    """

    def __init__(self, state: RunState, bound: OpenedTask, n_samples: int, *, is_trained: bool = False) -> None:
        self._state, self._bound, self._is_trained = state, bound, is_trained
        self._limit = min(n for n in (n_samples, state.recipe.num_samples) if n is not None)
        self._original = self._meter(state.original, None)

    @property
    def n_items(self) -> int:
        return self._original.fit.n_items + self._original.check.n_items

    @property
    def reference_points(self) -> float:
        """The original's metric, in points."""
        return self._original.reference_points

    def measure(self, program: Program) -> Measurement:
        """The drop of the program against the original, and the growth of its loss."""
        meter = self._meter(program, self._original)
        found = meter.measure_all([frozenset()])[0]
        return Measurement(found.drop_points, found.standard_error, meter.mean_loss - self._original.mean_loss)

    def loss(self, program: Program) -> float:
        return self._meter(program, self._original).mean_loss

    def _meter(self, program: Program, original: CutMeter | None) -> CutMeter:
        """A meter of a program on both splits, as it reads them."""
        state, source = self._state, self._bound.source
        fit, check = self._splits(program)
        reference = state.outputs_of(state.reference, source.workload(state.reference, "profile", limit=self._limit))
        return CutMeter(
            joined(program).program,
            fit,
            check,
            reference,
            progress=state.progress,
            seed=state.recipe.seed,
            original=original,
            prefix_bytes=0,
            fits_heads=not self._is_trained,
        )

    def _splits(self, program: Program) -> tuple[Workload, Workload]:
        source = self._bound.source
        if not self._is_trained:
            fit, check = (source.workload(program, split, limit=self._limit) for split in ("profile", "validation"))
            return fit, check
        whole = source.workload(program, "validation", limit=2 * self._limit)
        return whole.part(range(0, whole.n_items, 2)), whole.part(range(1, whole.n_items, 2))
