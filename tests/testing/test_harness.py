"""The harness itself: what it says, and that no pass can bring it down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.testing import honest
from tests.testing.catching import bad_pass
from tests.testing.good.drop_scaling import DropScaling
from vlmopt.core.contract import Case, Context, Pass, Plan, Promise, Refusal, Site
from vlmopt.core.errors import PassError
from vlmopt.core.program import Program
from vlmopt.testing import CHECKS, CheckResult, Settings, Verdict, check_on, check_pass
from vlmopt.testing.harness import CATALOGUE, subject_of


def test_checks_have_stable_names_and_say_what_they_hold_a_pass_to() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and " " not in name for name in names)
    assert all(len(check.description) > 10 and "\n" not in check.description for check in CHECKS)


def test_every_need_of_a_check_is_a_check_of_cases() -> None:
    assert {need for check in CHECKS for need in check.needs} <= set(CATALOGUE)


def test_checks_that_build_on_a_failed_one_are_not_run_and_say_why() -> None:
    report = check_pass(bad_pass("runs-to-the-end"), checks=["runs-to-the-end", "keeps-its-promise"])
    assert [result.verdict for result in report.results] == [Verdict.FAILED, Verdict.NOT_RUN]
    assert "not run, since runs-to-the-end failed" in report.results[1].found
    only = check_pass(bad_pass("runs-to-the-end"), checks=["keeps-its-promise"])
    assert not only.passed
    assert only.failures == ()


def test_a_result_reads_as_one_line_with_place_found_expected_and_remedy() -> None:
    (failure,) = check_pass(bad_pass("stays-silent"), checks=["stays-silent"]).failures
    assert failure.one_line() == (
        "pass drop-and-print, case 'by one', stays-silent: apply model/mul printed 'removed model/mul';"
        " expected no output; say it in Site.summary or Refusal.reason, or with logging"
    )
    assert CheckResult("p", "c", "", Verdict.PASSED).one_line() == "pass p, c: passed"


def test_a_check_that_does_not_exist_is_refused_with_the_closest_name() -> None:
    with pytest.raises(PassError, match="did you mean 'keeps-its-promise'"):
        check_pass(DropScaling, checks=["keeps-its-promises"])


@dataclass(frozen=True)
class BringDown(Pass):
    """Raises what `except Exception` does not catch."""

    name: ClassVar[str] = "bring-down"
    promise: ClassVar[Promise] = Promise.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        raise SystemExit(3)

    def apply(self, program: Program, site: Site, context: Context) -> None:
        raise RecursionError

    @classmethod
    def cases(cls) -> Iterable[Case]:
        return honest.cases()


@dataclass(frozen=True)
class LoseCases(BringDown):
    """Cannot even list its cases."""

    name: ClassVar[str] = "lose-cases"

    @classmethod
    def cases(cls) -> Iterable[Case]:
        raise MemoryError("no room")


def test_no_pass_brings_the_harness_down() -> None:
    report = check_pass(BringDown, settings=Settings(n_programs=1))
    assert report.failed_checks == {"runs-to-the-end"}
    line = BringDown.plan.__code__.co_firstlineno + 1
    assert report.failures[0].found == f"plan raised SystemExit: 3 (test_harness.py:{line})"
    report = check_pass(LoseCases)
    assert report.failed_checks >= {"has-a-firing-case"}
    assert "MemoryError: no room" in report.failures[0].found


def test_what_a_bad_pass_does_harms_no_other_check_and_no_program() -> None:
    program = honest.scaled(1.0)
    weight = program.components["model"].graph.get_parameter("linear.weight")
    before, version = weight.clone(), weight._version
    assert not check_on(bad_pass("writes-no-weight"), program).passed
    assert torch.equal(weight, before)
    assert weight._version == version


def test_a_pass_is_checked_on_any_program_with_options() -> None:
    program = honest.scaled(1.0, 2.0)
    assert check_on(DropScaling, program).passed
    assert check_on("skip-branches", program, options={"branches": []}).passed
    report = check_on("skip-branches", program, options={"branches": ["nowhere"]})
    assert report.failed_checks == {"runs-to-the-end"}


def test_a_seed_gives_the_same_inputs_and_another_gives_others() -> None:
    feeds = [subject_of(DropScaling, settings=Settings(seed=seed)).trials[0].feeds for seed in (1, 1, 2)]
    same, again, other = (feed["random"]["model"]["x"] for feed in feeds)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert float(feeds[0]["large"]["model"]["x"].abs().max()) > 500
    assert float(feeds[0]["zero"]["model"]["x"].abs().max()) == 0.0


def test_a_pass_without_cases_fails() -> None:
    @dataclass(frozen=True)
    class ClaimNothing(DropScaling):
        name: ClassVar[str] = "claim-nothing"

        @classmethod
        def cases(cls) -> Iterable[Case]:
            return ()

    report = check_pass(ClaimNothing)
    assert not report.passed
    assert report.failures[0].found == "it has no cases"


@dataclass(frozen=True)
class DropOnlyFloat32(DropScaling):
    """Its one case holds float32 weights whatever torch's default is."""

    name: ClassVar[str] = "drop-only-float32"

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("fixed", lambda: honest.in_dtype(torch.float32, 1.0), n_sites=1)


def test_a_pass_none_of_whose_cases_can_be_bfloat16_fails_and_is_told_why() -> None:
    (failure,) = check_pass(DropOnlyFloat32, checks=["works-in-bfloat16"]).failures
    assert "no case that fires can be built in bfloat16 (fixed: holds no bfloat16 numbers)" in failure.found


@dataclass(frozen=True)
class RefuseBfloat16(DropScaling):
    """Drops in float32, and says why not in bfloat16."""

    name: ClassVar[str] = "drop-refusing-bfloat16"

    def plan(self, program: Program, context: Context) -> Plan:
        plan = super().plan(program, context)
        values = [node.meta["val"] for node in program.components["model"].graph.graph.nodes if "val" in node.meta]
        if all(value.dtype is not torch.bfloat16 for value in values):
            return plan
        return Plan(refusals=tuple(Refusal(site.name, site.component, "is too coarse") for site in plan.sites))

    @classmethod
    def cases(cls) -> Iterable[Case]:
        yield Case("plain", lambda: honest.in_dtype(torch.get_default_dtype(), 1.0), n_sites=1)


def test_a_pass_may_refuse_bfloat16_with_a_reason() -> None:
    (result,) = check_pass(RefuseBfloat16, checks=["works-in-bfloat16"]).results
    assert result.verdict is Verdict.NOT_APPLICABLE
    assert "it refuses bfloat16: is too coarse" in result.found
