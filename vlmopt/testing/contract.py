"""The checks as pytest tests, one item for every pass, case and check. Importing it loads neither torch nor pytest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmopt.core.errors import VlmoptError
from vlmopt.testing.results import CheckResult, Verdict

if TYPE_CHECKING:
    import pytest

    from vlmopt.testing.trial import Memory, Subject

GOLDEN_CHECKS = ("matches-its-golden-text", "has-no-orphaned-golden-text")
LOADING = "can-be-loaded"


@dataclass(frozen=True)
class ContractItem:
    """One check of one pass, on one of its cases or (where `case` is empty) on the whole.

    Args:
        golden: the pass with its folder of golden texts, for checks that may write these anew.
    """

    pass_name: str
    case: str
    check: str
    run: Callable[[], CheckResult]
    golden: tuple[Subject, Path] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for word in (self.pass_name, self.case, self.check) if word)


def contract_tests(
    *names: str,
    pass_dirs: Sequence[Path] = (),
    golden: Path | None = None,
    checks: Sequence[str] = (),
    seed: int = 0,
    time_limit_s: float = 60.0,
) -> Callable[..., None]:
    """A pytest test of every check of these passes; assign it to a name that begins with `test_`.

    `test_contract = contract_tests("drop-scaling", pass_dirs=[Path(__file__).parent])`

    Args:
        names: of passes, or paths of their files; none: every pass that is installed.
        golden: folder of golden texts; `pytest --vlmopt-update-golden` writes them.
        checks: names of checks; none: all of them.
    """
    import pytest

    items = contract_items(
        names, pass_dirs=pass_dirs, golden=golden, checks=checks, seed=seed, time_limit_s=time_limit_s
    )

    @pytest.mark.parametrize("item", [pytest.param(item, id="-".join(item.words)) for item in items])
    def test_contract(item: ContractItem, request: pytest.FixtureRequest) -> None:
        judge(item, request.config)

    return test_contract


def contract_items(
    names: Sequence[str],
    *,
    pass_dirs: Sequence[Path] = (),
    golden: Path | None = None,
    checks: Sequence[str] = (),
    seed: int = 0,
    time_limit_s: float = 60.0,
) -> list[ContractItem]:
    """Every check of these passes, none of them made yet. A pass that cannot be loaded is one item, which fails."""
    from vlmopt.registry import find_passes
    from vlmopt.testing.harness import select
    from vlmopt.testing.trial import Settings, Subject

    settings = Settings(seed=seed, time_limit_s=time_limit_s, golden=golden)
    chosen = select(checks)
    items: list[ContractItem] = []
    for name in names or find_passes(pass_dirs):
        subject = _loaded(name, pass_dirs, settings)
        if isinstance(subject, Subject):
            items += [item for check in chosen for item in _items_of(check, subject, golden)]
        else:
            items.append(ContractItem(Path(name).name, "", LOADING, lambda failed=subject: failed))  # type: ignore[misc]
    return items


def judge(item: ContractItem, config: pytest.Config) -> None:
    """Makes the check, and fails or skips the test that runs."""
    import pytest

    if item.golden is not None and config.getoption("--vlmopt-update-golden", default=False):
        from vlmopt.testing.golden import update_golden

        config.stash.setdefault(touched_key(), []).extend(update_golden(*item.golden))
    result = item.run()
    if result.verdict is Verdict.NOT_APPLICABLE:
        pytest.skip(result.found)
    if not result.is_fine:
        pytest.fail(result.one_line(), pytrace=False)


def _items_of(check: Any, subject: Subject, golden: Path | None) -> list[ContractItem]:
    from vlmopt.testing.checks import CaseCheck
    from vlmopt.testing.harness import result_on, results_of

    texts = (subject, golden) if golden is not None and check.name in GOLDEN_CHECKS else None
    if isinstance(check, CaseCheck):
        return [
            ContractItem(subject.name, trial.case.name, check.name, lambda t=trial: result_on(check, subject, t), texts)  # type: ignore[misc]
            for trial in subject.trials
        ]
    return [ContractItem(subject.name, "", check.name, lambda: next(results_of(check, subject)), texts)]


def _loaded(name: str, pass_dirs: Sequence[Path], settings: Any) -> Subject | CheckResult:
    from vlmopt.testing.harness import subject_of

    try:
        return subject_of(name, pass_dirs=pass_dirs, settings=settings, memory=_memory())
    except VlmoptError as error:
        found = f"{error.place}: {error.found}"
        return CheckResult(name, LOADING, "", Verdict.FAILED, found, error.expected, error.remedy)


@cache
def touched_key() -> pytest.StashKey[list[Path]]:
    """Where a run of pytest keeps the golden texts that it wrote or removed."""
    import pytest

    return pytest.StashKey[list[Path]]()


@cache
def _memory() -> Memory:
    """One for the whole process: random programs are the same for every pass."""
    from vlmopt.testing.trial import Memory

    return Memory()
