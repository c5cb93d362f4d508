"""What one run of `vlmopt optimize` knows, passed from stage to stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmopt.core.facts import ADAPTERS_INSERTED
from vlmopt.core.ledger import Ledger
from vlmopt.core.program import Program
from vlmopt.core.progress import Progress
from vlmopt.core.workload import Feed
from vlmopt.planning.cuts import Choice
from vlmopt.profiling.document import Profile
from vlmopt.recipe.schema import SHORTENING_PASSES, PassStep, Recipe
from vlmopt.registry import make_pass
from vlmopt.rundir import RunDirectory
from vlmopt.tasks.binding import TaskWorkload
from vlmopt.tuning.gradient import Tuned
from vlmopt.verify.parity import Gate
from vlmopt.workflow.attaching import AttachedAdapter
from vlmopt.workflow.opening import LazyOutputs, OpenedModel, OpenedTask
from vlmopt.workflow.samples import sample_feeds

if TYPE_CHECKING:
    from vlmopt.workflow.measuring import ExpertMixture, TraversalGate


@dataclass
class RunState:
    """`original` is the program everything is compared with, and `fit` the profile split for it.

    `reference` is the original as exact and close passes left it before the first cut: what heads without labels are
    fitted to reproduce. `choice` is what the planner chose last, measured on `choice_items` items; None where the
    recipe names every site. `choice_max_drop` is what it was allowed to drop, in points, `headroom` included: what a
    cut may lose on top of the budget because training follows. `step` is the number of the pass that
    runs. `tuned` is how that training went, and `trained` the adapter that it made, as a file holds it;
    `through` is what a cross-modal one lets through (`letting_through.py`).
    `mixtures` is how layers of adapters mix their experts, as trained or given.
    `traversal_gates` is what the gates of traversed layers let through, by component, layer and pass.
    `together` says what each pass of a plan over several saves and loses.
    `profile_folder` is where the profile is kept for the next try, when this run measured it.
    """

    recipe: Recipe
    run: RunDirectory
    opened: OpenedModel
    bound: OpenedTask | None
    ledger: Ledger
    progress: Progress
    fit: TaskWorkload | None = None
    profile: Profile | None = None
    importance: dict[str, float] = field(default_factory=dict)
    choice: Choice | None = None
    choice_items: int = 0
    headroom: float = 0.0
    step: int = 0
    tuned: Tuned | None = None
    trained: AttachedAdapter | None = None
    through: dict[str, Any] | None = None
    choice_max_drop: float | None = None
    together: dict[str, Any] | None = None
    profile_folder: Path | None = None
    gates: list[Gate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mixtures: list[ExpertMixture] = field(default_factory=list)
    traversal_gates: dict[tuple[str, str, int], TraversalGate] = field(default_factory=dict)
    known_outputs: dict[tuple[int, str], LazyOutputs] = field(default_factory=dict)
    _original: Program | None = None
    _reference: Program | None = None
    _optimized: Program | None = None

    @property
    def original(self) -> Program:
        assert self._original is not None, "set up first"
        return self._original

    @original.setter
    def original(self, program: Program) -> None:
        self._original = program

    @property
    def reference(self) -> Program:
        assert self._reference is not None, "set up first"
        return self._reference

    @reference.setter
    def reference(self, program: Program) -> None:
        self._reference = program

    @property
    def optimized(self) -> Program:
        assert self._optimized is not None, "run the passes first"
        return self._optimized

    @optimized.setter
    def optimized(self, program: Program) -> None:
        self._optimized = program

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows a stage, and notes in the ledger how long it took."""
        with self.progress.stage(name), self.ledger.timed(name):
            yield

    def outputs_of(self, program: Program, workload: TaskWorkload) -> LazyOutputs:
        """What a program that does not change computes on the workload: run once, whoever asks."""
        made = LazyOutputs(program, workload, progress=self.progress)  # holds the program, so that its id stays its own
        return self.known_outputs.setdefault((id(program), workload.fingerprint), made)

    def sample_feeds(self, program: Program) -> dict[str, Feed]:
        """A few real samples for every component; random inputs of the right shapes where there is no task."""
        return sample_feeds(program, self.fit, seed=self.recipe.seed)


def later_steps(state: RunState) -> list[PassStep]:
    """The recipe's steps behind the present one that insert adapters or fold them, and those that leave fewer products
    to the same function."""
    folders = [Path(folder) for folder in state.recipe.pass_dirs]
    later = state.recipe.passes[state.step :]
    made = [(step, make_pass(step.name, step.options, folders)) for step in later]
    adapting = {step.name for step, pass_ in made if ADAPTERS_INSERTED in pass_.produces | pass_.requires}
    return [step for step in later if step.name in adapting or step.name in SHORTENING_PASSES]
