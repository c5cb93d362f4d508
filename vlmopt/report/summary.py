"""What a run means, in words for the person who approves the deployment, every number taken from the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from vlmopt.report import naming
from vlmopt.report.quantities import byte_size, factor, factor_words, milliseconds, percent, plural, value_text
from vlmopt.report.schema import GateSection, Report
from vlmopt.report.summary_cost import gains, losses, restless, total_latency
from vlmopt.report.summary_quality import change_of, costs, is_clear_gain, is_clear_loss, sureness, worse

_N_FAILED = 4  # so many failed checks are named: the summary stays one page


class Status(Enum):
    """What the checks of a run say together."""

    PASSED = "passed"
    FAILED = "failed"
    UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Verdict:
    """The answer in one line, and why."""

    status: Status
    title: str
    detail: str


@dataclass(frozen=True)
class KeyFigure:
    """One number to look at first. `tone` is good, bad or plain."""

    label: str
    value: str
    detail: str
    tone: str = "plain"


@dataclass(frozen=True)
class Statement:
    """The answer to one question of the reader, a sentence each."""

    label: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    verdict: Verdict
    figures: tuple[KeyFigure, ...]
    statements: tuple[Statement, ...]


def summarize(report: Report) -> Summary:
    """The first page of a report."""
    answers = (
        ("What was asked", _asked(report)),
        ("What was cut", _cut(report)),
        ("What it costs", costs(report)),
        ("What gets worse", [*worse(report), *losses(report)]),
        ("What is gained", gains(report)),
        ("How sure this is", sureness(report)),
        ("Where it was measured", _place(report)),
        ("Limits", _limits(report)),
    )
    statements = tuple(Statement(label, tuple(sentences)) for label, sentences in answers if sentences)
    return Summary(_verdict(report), tuple(_figures(report)), statements)


def gate_words(gate: GateSection) -> str:
    """A gate with what was found and allowed."""
    found, allowed = value_text(gate.found), value_text(gate.allowed)
    if found and allowed:
        return f"{gate.name} (found {found}, allowed {allowed})"
    return f"{gate.name} (found {found})" if found else gate.name


def _verdict(report: Report) -> Verdict:
    failed = [gate for gate in report.gates if not gate.passed]
    n = len(report.gates)
    if failed:
        title = f"Do not deploy: {len(failed)} of {plural(n, 'check')} failed"
        words = [gate_words(gate) for gate in failed[:_N_FAILED]]
        more = [f"and {len(failed) - _N_FAILED} more, listed below"] if len(failed) > _N_FAILED else []
        return Verdict(Status.FAILED, title, f"Failed: {'; '.join([*words, *more])}.")
    if not n:
        return Verdict(
            Status.UNCHECKED, "Not checked", "This report holds no check, so nothing vouches for the result."
        )
    if report.result.metric is None:
        detail = "The files compute what the compiled model computes. How well it does a task was not measured."
        return Verdict(Status.PASSED, f"Passed: {plural(n, 'check')} of the files, none of a task", detail)
    is_bounded = naming.drop_gate(report) is not None
    bounded = "and the loss on the test items is within what was allowed" if is_bounded else "no loss bound was checked"
    detail = f"The files compute what the compiled model computes, {bounded}."
    return Verdict(Status.PASSED, f"Passed: all {plural(n, 'check')}" if n > 1 else "Passed: 1 check", detail)


def _figures(report: Report) -> list[KeyFigure]:
    figures = []
    metric, result = report.result.metric, report.result
    if metric is not None:
        tone = "bad" if is_clear_loss(metric) else "good" if is_clear_gain(metric) else "plain"
        detail = f"was {percent(metric.original)} · {change_of(metric)}"
        figures.append(KeyFigure(_capital(metric.name), percent(metric.optimized), detail, tone))
    before, after = total_latency(report)
    figures += _factor_figure(before, after, ("Faster", "Slower", "As fast"), milliseconds)
    if result.size_bytes is not None:
        size = result.size_bytes
        figures += _factor_figure(size.original, size.optimized, ("Smaller", "Larger", "As large"), byte_size)
    if report.branches:
        n_cut = sum(not branch.kept for branch in report.branches)
        figures.append(
            KeyFigure("Branches cut", f"{n_cut} of {len(report.branches)}", "blocks of the network taken out")
        )
    return figures


def _factor_figure(
    before: float, after: float, labels: tuple[str, str, str], shown: Callable[[float], str]
) -> list[KeyFigure]:
    """A factor between two costs, called by what it is; nothing where it cannot be said."""
    ratio = factor(before, after)
    if ratio is None:
        return []
    words = factor_words(before, after)
    label, tone = (
        (labels[2], "plain") if words == "unchanged" else (labels[0], "good") if ratio > 1 else (labels[1], "bad")
    )
    return [KeyFigure(label, f"{max(ratio, 1 / ratio):.2f}×", f"{shown(before)} → {shown(after)}", tone)]


def _asked(report: Report) -> list[str]:
    name = f"“{naming.model_name(report)}” ({report.model.architecture})"
    task = report.task
    if task is None:
        return [
            f"Make the model {name} smaller and faster. No task was given, so its answers were not measured on data."
        ]
    kind = task.kind.replace("-", " ")
    text = f"Keep of the model {name} what the task “{task.name}” needs ({kind}, judged by {task.metric})."
    allowed = naming.allowed_drop(report)
    limits = report.plan.limits if report.plan is not None else ()
    asked = [text, f"The compiled model must stay within {_joined(list(limits))}."] if limits else [text]
    if allowed is None:
        return [*asked, f"No bound was set on how much {task.metric} may fall."]
    return [*asked, f"{_capital(task.metric)} may fall by at most {naming.points_words(allowed)}."]


def _cut(report: Report) -> list[str]:
    groups = naming.by_component(report.branches)
    parts = []
    for component, branches in groups.items():
        cut = [branch for branch in branches if not branch.kept]
        if cut:
            kinds: dict[str, int] = {}
            for branch in cut:
                kinds[naming.kind_words(branch.kind)] = kinds.get(naming.kind_words(branch.kind), 0) + 1
            words = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
            parts.append(f"{len(cut)} of {plural(len(branches), 'branch', 'branches')} of "
                         f"{naming.component_words(component)} ({words})")  # fmt: skip
    sentences = []
    if parts:
        sentences.append(_capital(_joined(parts)) + ".")
        sentences.append("A branch is a block of the network whose result is added to what flows past it.")
        sentences += _certainty(report)
    elif report.branches:
        sentences.append(f"Nothing: all {plural(len(report.branches), 'branch', 'branches')} are still there.")
    gone = [name for name, pair in report.result.latency_ms.items() if naming.is_gone(report, name, pair)]
    for name in gone:
        sentences.append(f"{_capital(naming.component_words(name))} is not needed any more when the model runs.")
    return [*sentences, *_other_changes(report)]


def _certainty(report: Report) -> list[str]:
    """How many cuts other data of the same kind would have made as well."""
    judged = [branch for branch in report.branches if branch.certainty is not None]
    if not judged:
        return []
    n_certain = sum(branch.certainty == "certain" for branch in judged)
    resamples = "at least 95 % of resamples of the profile's items rank the branch among"
    return [f"{n_certain} of {plural(len(judged), 'cut')} are certain: {resamples} the {len(judged)} least needed."]


def _other_changes(report: Report) -> list[str]:
    """Changes beside cut branches, by what they promise."""
    sentences = []
    lossy = [f"{p.name} ({p.n_applied})" for p in report.passes if p.promise == "lossy" and p.n_applied]
    n_cut = sum(not branch.kept for branch in report.branches)
    if sum(step.n_applied for step in report.passes if step.promise == "lossy") != n_cut:
        sentences.append(f"Steps that can change answers, with their number of changes: {', '.join(lossy)}.")
    n_kept = sum(step.n_applied for step in report.passes if step.promise != "lossy")
    if n_kept:
        sentences.append(f"{plural(n_kept, 'other change')} compute the same, apart from rounding."
                         if n_kept > 1 else "1 other change computes the same, apart from rounding.")  # fmt: skip
    return sentences


def _place(report: Report) -> list[str]:
    machine = report.machine
    if machine is None:
        return ["The machine was not recorded."] if report.result.latency_ms else []
    parts = [machine.processor, plural(machine.n_cores, "core"), f"{plural(machine.n_threads, 'thread')} used"]
    parts += [f"{byte_size(machine.memory_bytes)} memory"] if machine.memory_bytes else []
    text = f"{', '.join([*parts, machine.system])}."
    if report.result.latency_ms:
        text += " Original and compiled model were timed there in turns, one sample at a time."
    return [text]


def _limits(report: Report) -> list[str]:
    sentences = []
    if report.task is not None:
        sentences.append("The numbers hold for data like the test items. What else the model could do was not measured "
                         "and may be lost.")  # fmt: skip
        sentences.append("Whoever picks the best of several results by these numbers sees it better than it is.")
    if report.result.latency_ms:
        sentences.append("Speed holds for this machine; on another device, measure again.")
    spread = restless(report)
    if spread:
        sentences.append(
            f"The machine was busy, since times of one graph lie between {spread}: measure on a quiet one."
        )
    if report.warnings:
        sentences.append(f"The run gave {plural(len(report.warnings), 'warning')}, listed below.")
    return sentences


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
