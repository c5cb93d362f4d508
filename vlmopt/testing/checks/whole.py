"""Does the pass as a whole hold: cases, facts, options, other number formats, programs it was not made for?"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from vlmopt.core.contract import Case, Context, Pass
from vlmopt.core.errors import PassError
from vlmopt.core.facts import CANONICAL, CAPTURED, Fact, is_registered
from vlmopt.core.program import Program
from vlmopt.recipe.schema import PassStep
from vlmopt.recipe.yaml_file import read_yaml, write_yaml
from vlmopt.registry import instantiate
from vlmopt.testing.checks.check import RESULT, CaseCheck, PassCheck
from vlmopt.testing.golden import UPDATE_OPTION, golden_path, golden_paths, golden_text, orphaned_golden_texts
from vlmopt.testing.graphs import fitting, random_blueprint
from vlmopt.testing.trial import Blocked, Finding, Inapplicable, Outcome, Subject, Trial

Catalogue = Mapping[str, CaseCheck]
# Both run a case several times over. Numbers have no part in the first; what runs that stop between sites leave is held
# to the promise in float32, and what all sites leave in bfloat16 too.
_OF_ANY_FORMAT = frozenset({"is-deterministic", "is-sound-after-every-site"})


def has_a_firing_case(subject: Subject, catalogue: Catalogue) -> Outcome:
    if subject.listing_error is not None:
        return Finding.of(subject.listing_error)
    if not any(trial.case.n_sites > 0 for trial in subject.trials):
        n = len(subject.trials)
        return Finding(f"none of its {n} cases fires" if n else "it has no cases", expected="one with n_sites above 0")
    return None


def knows_its_facts(subject: Subject, catalogue: Catalogue) -> Outcome:
    for which in ("requires", "produces", "breaks"):
        for fact in sorted(getattr(subject.pass_class, which), key=str):
            if not (isinstance(fact, Fact) and is_registered(fact)):
                name = fact.name if isinstance(fact, Fact) else fact
                remedy = "import the fact, or make it with vlmopt.core.facts.register_fact"
                return Finding(f"{which} {name!r}", expected="a registered fact", remedy=remedy)
    return None


def keeps_its_options(subject: Subject, catalogue: Catalogue) -> Outcome:
    """What a run writes into its recipe must make the same pass again."""
    for place, options in {"defaults": {}, **{f"case {t.case.name!r}": t.case.options for t in subject.trials}}.items():
        try:
            pass_ = instantiate(subject.pass_class, options)
        except PassError as error:
            if place == "defaults" and "needs the option" in error.found:
                continue
            return Finding(f"{place}: {error.found}", error.expected, error.remedy)
        try:
            again = _from_recipe(pass_)
        except Exception as error:  # noqa: BLE001 - whatever keeps options out of a recipe is the finding
            return Finding(f"{place}: cannot be written into a recipe ({error})", expected="options of plain types")
        if again != pass_:
            return Finding(f"{place}: {pass_} comes back from a recipe as {again}", expected="an equal pass")
    return None


def _from_recipe(pass_: Pass) -> Pass:
    """The pass, written into the YAML of a recipe and read from it."""
    names = [field.name for field in dataclasses.fields(pass_) if field.init]  # type: ignore[arg-type]
    step = PassStep(name=pass_.name, options={name: getattr(pass_, name) for name in names})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        write_yaml(path, {"passes": [step.model_dump(mode="json")]})
        (words,) = read_yaml(path)["passes"]
    return instantiate(type(pass_), PassStep.model_validate(words).options)


def works_in_bfloat16(subject: Subject, catalogue: Catalogue) -> Outcome:
    """Counts may differ in another number format; everything that holds on any program must hold."""
    firing = {trial.case.name for trial in subject.trials if trial.attempt.applied}
    if not firing:
        return Inapplicable("no case fires")
    reasons: list[str] = []
    refused: list[str] = []
    has_fired = False
    for trial in (one for one in subject.bfloat16_trials if one.case.name in firing):
        try:
            is_narrow = _holds_bfloat16(trial.program)
        except PassError as error:
            reasons.append(f"{trial.case.name}: {error.found}")
            continue
        if not is_narrow:
            reasons.append(f"{trial.case.name}: holds no bfloat16 numbers")
            continue
        finding = _first_finding(trial, subject, catalogue, but=_OF_ANY_FORMAT)
        if finding is not None:
            return dataclasses.replace(finding, found=f"case {trial.case.name!r}, {finding.found}")
        has_fired |= bool(trial.attempt.applied)
        refused += [refusal.reason for refusal in trial.attempt.plan.refusals]
    if has_fired:
        return None
    if refused and not reasons:
        return Inapplicable(f"it refuses bfloat16: {refused[0]}")
    found = "no case that fires can be built in bfloat16" + (f" ({'; '.join(reasons)})" if reasons else "")
    remedy = "let cases make samples and weights in torch's default dtype, as torch.ones(2, 4) does"
    return Finding(found, expected="at least one", remedy=remedy)


def _holds_bfloat16(program: Program) -> bool:
    return any(
        isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
        for part in program.components.values()
        for node in part.graph.graph.nodes
        if (value := node.meta.get("val")) is not None
    )


def holds_on_random_programs(subject: Subject, catalogue: Catalogue) -> Outcome:
    more = sorted(fact.name for fact in subject.pass_class.requires - {CAPTURED, CANONICAL})
    if more:
        return Inapplicable(f"it requires {', '.join(more)}, which random programs have not")
    options = _options(subject)
    if options is None:
        return Inapplicable("it needs options, which none of its cases gives")
    settings = subject.settings
    for number in range(settings.n_programs):
        source = random.Random(f"{settings.seed} {number}")
        blueprint = fitting(random_blueprint(source), subject.pass_class)
        program = subject.memory.program(blueprint)
        case = Case(str(blueprint), lambda made=program: made, 0, (), options, Context(seed=settings.seed))  # type: ignore[misc]
        trial = Trial(subject, case)
        if options and "matches nothing" in str(trial.attempt.planning.error):
            continue  # its options name what other programs have not
        finding = _first_finding(trial, subject, catalogue)
        if finding is not None:
            return dataclasses.replace(finding, found=f"{blueprint}, {finding.found}")
    return None


def _options(subject: Subject) -> Mapping[str, object] | None:
    """Options to use on any program: none if that is possible, or else those of a case."""
    for options in ({}, *(trial.case.options for trial in subject.trials)):
        try:
            instantiate(subject.pass_class, options)
        except PassError:
            continue
        return options
    return None


def _first_finding(
    trial: Trial, subject: Subject, catalogue: Catalogue, *, but: frozenset[str] = frozenset()
) -> Finding | None:
    """The first general check that fails here, though it held on all of the pass's own cases."""
    for check in catalogue.values():
        if not check.is_general or check.name in but:
            continue
        if any(isinstance(check.outcome(own, catalogue), Finding | Blocked) for own in subject.trials):
            continue
        outcome = check.outcome(trial, catalogue)
        if isinstance(outcome, Finding):
            return dataclasses.replace(outcome, found=f"{check.name}: {outcome.found}")
    return None


def matches_its_golden_text(trial: Trial) -> Outcome:
    folder = trial.settings.golden
    if folder is None:
        return Inapplicable("no folder of golden texts was given")
    path = golden_path(folder, trial.subject.name, trial.case.name)
    others = [name for name in golden_paths(trial.subject, folder)[path] if name != trial.case.name]
    if others:
        return Finding(f"shares {path.name} with the case {others[0]!r}", expected="names of cases that differ more")
    remedy = f"look at the change, then write the text anew with {UPDATE_OPTION}"
    if not path.is_file():
        return Finding(f"there is no {path}", expected="the golden text of the case", remedy=remedy)
    wanted, found = path.read_text(encoding="utf-8").splitlines(), golden_text(trial).splitlines()
    if wanted == found:
        return None
    return Finding(f"{path}, {_first_difference(wanted, found)}", expected="the golden text", remedy=remedy)


def _first_difference(wanted: list[str], found: list[str]) -> str:
    for number, (old, new) in enumerate(zip(wanted, found, strict=False), start=1):
        if old != new:
            return f"line {number}: {new!r} instead of {old!r}"
    return f"{len(found)} lines instead of {len(wanted)}"


def has_no_orphaned_golden_text(subject: Subject, catalogue: Catalogue) -> Outcome:
    folder = subject.settings.golden
    if folder is None:
        return Inapplicable("no folder of golden texts was given")
    orphans = orphaned_golden_texts(subject, folder)
    if orphans:
        return Finding(f"{orphans[0]} belongs to no case", expected="one text a case", remedy="remove it")
    return None


FIRST = (
    PassCheck("has-a-firing-case", "its cases can be listed, and on one at least it fires", has_a_firing_case),
    PassCheck("knows-its-facts", "what it requires, produces and breaks are registered facts", knows_its_facts),
    PassCheck(
        "keeps-its-options",
        "options that are written into a recipe come back and make the same pass",
        keeps_its_options,
    ),
)
LAST = (
    PassCheck(
        "works-in-bfloat16",
        "what holds in float32 holds in bfloat16, on every firing case that can be built in it, all sites applied",
        works_in_bfloat16,
        RESULT,
    ),
    PassCheck(
        "holds-on-random-programs",
        "what holds on its cases holds on small random programs",
        holds_on_random_programs,
        RESULT,
    ),
    CaseCheck(
        "matches-its-golden-text", "the graphs before and after read as the golden text says", matches_its_golden_text,
        RESULT,
    ),
    PassCheck(
        "has-no-orphaned-golden-text", "every golden text of the pass belongs to a case", has_no_orphaned_golden_text
    ),
)  # fmt: skip
