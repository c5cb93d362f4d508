"""The trainings of a recipe: one of what its level says, or several in a row of what their stages name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmopt.core.program import Program
from vlmopt.graph.modules import ADAPTERS
from vlmopt.graph.patterns import check_patterns, is_match
from vlmopt.recipe.schema import RecoverySettings
from vlmopt.tuning.gradient import Tuned
from vlmopt.tuning.settings import TuningSettings
from vlmopt.tuning.trainable import Wanted


@dataclass(frozen=True)
class Training:
    """What trains, asked by `component/path`, and how."""

    wanted: Wanted
    settings: TuningSettings


def trainings_of(program: Program, recovery: RecoverySettings, *, seed: int) -> list[Training]:
    """The trainings in their order.

    Raises:
        PassOptionError: a stage names a weight that the program does not have.
    """
    fields = recovery.model_dump(exclude={"level", "headroom", "stages"})
    settings = TuningSettings(**fields, seed=seed)
    if not recovery.stages:
        return [Training(_Level(program, recovery.level), settings)]
    names = [f"{name}/{path}" for name, part in program.components.items() for path, _ in part.graph.named_parameters()]
    found: list[Training] = []
    for number, stage in enumerate(recovery.stages, 1):
        check_patterns(f"recovery: stage {number}", stage.train, names)
        own = {key: value for key in ("epochs", "learning_rate") if (value := getattr(stage, key)) is not None}
        found.append(Training(_Named(stage.train), replace(settings, **own)))
    return found


def followed(first: Tuned, second: Tuned) -> Tuned:
    """Two trainings as one history; the second began where the first was best, which is its epoch 0."""
    last = len(first.history) - 1
    later = (replace(epoch, number=last + epoch.number) for epoch in second.history[1:])
    best = last + second.best if second.best else first.best
    return Tuned(second.program, (*first.history, *later), best, max(first.n_trainable, second.n_trainable))


class _Level:
    """Which weights a level trains: all of them, or adapters; heads always."""

    def __init__(self, program: Program, level: str) -> None:
        self._is_all = level == "weights"
        self._heads = tuple(f"{name}/{path}." for name, path in program.heads.items())

    def __call__(self, key: str) -> bool:
        path = key.partition("/")[2]
        return self._is_all or path.startswith(f"{ADAPTERS}.") or key.startswith(self._heads)


class _Named:
    """The weights that a stage names."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = patterns

    def __call__(self, key: str) -> bool:
        return is_match(key, self._patterns)
