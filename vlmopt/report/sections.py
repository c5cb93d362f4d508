"""What the page shows beside the summary, prepared for its templates: plots, the ledger of passes, groups and items."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from vlmopt.report import naming, plots
from vlmopt.report.quantities import (
    byte_size,
    count,
    drop_text,
    energy,
    factor_words,
    milliseconds,
    other_metrics,
    percent,
    plural,
    points,
    ratio_words,
    signed,
)
from vlmopt.report.schema import ChangedItem, CostSection, LatencyPair, PassSection, Report

# Nothing else may become the source of an image: what a report says is not trusted.
_IMAGE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SEED = re.compile(r"^seed:\s*(\d+)\s*$", re.MULTILINE)
_COSTS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (  # in words, short, field, how it is shown
    ("parameters", "parameters", "parameters", count),
    ("weights", "weights", "parameters_bytes", byte_size),
    ("computation (MACs)", "MACs", "macs", count),
    ("activations written", "activations", "activation_bytes", byte_size),
)


@dataclass(frozen=True)
class Row:
    """A quantity before and after. `tone` is good, bad or plain."""

    label: str
    before: str
    after: str
    change: str
    tone: str = "plain"


@dataclass(frozen=True)
class Saving:
    """What a pass said it would save beside what it saved."""

    label: str
    predicted: str
    measured: str
    is_same: bool


@dataclass(frozen=True)
class LedgerStep:
    """A pass with its refusals grouped by reason: (reason, names)."""

    step: PassSection
    savings: tuple[Saving, ...]
    refusals: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def is_as_predicted(self) -> bool:
        return all(saving.is_same for saving in self.savings)


@dataclass(frozen=True)
class GroupRow:
    name: str
    n: int
    before: str
    after: str
    drop: str
    interval: str
    picture: Markup


@dataclass(frozen=True)
class ItemCard:
    """A test item whose answer changed. `kind` is lost, gained or other; `image` is empty where there is none."""

    item: ChangedItem
    kind: str
    image: str


def metric_rows(report: Report) -> list[Row]:
    """All metrics of the task, the one that decides first."""
    metric = report.result.metric
    if metric is None:
        return []
    rows = [(metric.name, metric.original, metric.optimized), *((n, *v) for n, v in other_metrics(metric).items())]
    return [Row(n, percent(b), percent(a), f"{signed(100 * (a - b))} points", _tone(a - b)) for n, b, a in rows]


def cost_rows(report: Report) -> list[Row]:
    """Sizes, parameters, MACs, activations, and median latency and mean energy of every component."""
    old, new = report.result.cost.original, report.result.cost.optimized
    rows = []
    if report.result.size_bytes is not None:
        size = report.result.size_bytes
        rows.append(_cost_row("size of the files", size.original, size.optimized, byte_size))
    for label, _, field, shown in _COSTS:
        before, after = getattr(old, field), getattr(new, field)
        if before or after:
            rows.append(_cost_row(label, before, after, shown))
    for name, pair in report.result.latency_ms.items():
        rows.append(_latency_row(report, name, pair))
    for name, pair in report.result.latency_ms.items():
        if pair.original.joules is not None and pair.optimized is not None and pair.optimized.joules is not None:
            label = f"energy of {name} (mean)"
            rows.append(_cost_row(label, pair.original.joules, pair.optimized.joules, energy))
    return rows


def ledger(report: Report) -> list[LedgerStep]:
    """Every pass, predicted beside measured."""
    steps = []
    for step in report.passes:
        reasons: dict[str, list[str]] = {}
        for refusal in step.refusals:
            reasons.setdefault(refusal.reason, []).append(_place(refusal.component, refusal.name))
        refusals = tuple((reason, tuple(names)) for reason, names in reasons.items())
        steps.append(LedgerStep(step, _savings(step.predicted, step.counted), refusals))
    return steps


def group_rows(report: Report) -> list[GroupRow]:
    """The metric by group, largest drop first, with a small picture of the drop."""
    metric = report.result.metric
    if metric is None or not metric.groups:
        return []
    bounds = [v for g in metric.groups for v in (g.drop_points, *(g.drop_interval95 or ()))]
    scale = plots.Scale.over([*bounds, 0.0])
    rows = []
    for group in sorted(metric.groups, key=lambda g: -g.drop_points):
        spread = group.drop_interval95
        interval = f"{drop_text(spread[0])} to {drop_text(spread[1])}".replace("-", "−") if spread else "too few items"
        drop = drop_text(group.drop_points).replace("-", "−")
        picture = plots.small_whisker(group.drop_points, spread, scale, title=f"drop {drop} points, {interval}")
        before, after = points(group.original), points(group.optimized)
        rows.append(GroupRow(group.name, group.n, before, after, drop, interval, picture))
    return rows


def item_cards(report: Report) -> list[ItemCard]:
    """Items that changed their answer, lost ones first."""
    metric = report.result.metric
    if metric is None or metric.changes is None:
        return []
    return [ItemCard(item, item_kind(item), safe_image(item.image)) for item in metric.changes.items]


def item_kind(item: ChangedItem) -> str:
    if item.original_is_right and not item.optimized_is_right:
        return "lost"
    return "gained" if item.optimized_is_right and not item.original_is_right else "other"


def facts(report: Report) -> list[tuple[str, str]]:
    """Where a result comes from: model, data, versions, machine, seed, with the fingerprints that tell others apart."""
    model, task, machine = report.model, report.task, report.machine
    rows = [("model", model.path), ("architecture", f"{model.architecture} ({model.model_type})")]
    rows.append(("fingerprint of the model", model.fingerprint))
    if task is not None:
        sizes = f"{task.n_profile} profile, {task.n_validation} validation, {task.n_test} test"
        rows += [("task", f"{task.name} ({task.kind}, {task.metric})"), ("items", sizes)]
        rows.append(("fingerprint of the data", task.fingerprint))
    seed = _SEED.search(report.recipe)
    if seed:
        rows.append(("seed", seed[1]))
    rows += [("vlmopt", report.vlmopt), ("made", report.created)]
    if machine is not None:
        cores = f"{plural(machine.n_cores, 'core')}, {plural(machine.n_threads, 'thread')} used"
        cores += f", {byte_size(machine.memory_bytes)} memory" if machine.memory_bytes else ""
        rows += [("processor", machine.processor), ("machine", cores), ("system", machine.system)]
        rows += [("energy", report.result.energy)] if report.result.energy else []
        rows.append(("Python", machine.python))
        rows += [(name, version) for name, version in machine.versions.items() if name != "vlmopt"]
    return rows


def safe_image(source: str) -> str:
    """The source where it is a picture as a data URI, else nothing."""
    return source if _IMAGE.fullmatch(source) else ""


def _place(component: str, name: str) -> str:
    return name if name.startswith(f"{component}/") else f"{component}/{name}"


def _tone(gain: float) -> str:
    return "plain" if gain == 0 else "good" if gain > 0 else "bad"


def _cost_row(label: str, before: float, after: float, shown: Callable[[float], str]) -> Row:
    words = factor_words(before, after)
    tone = "plain" if words == "unchanged" else _tone(before - after)
    return Row(label, shown(before), shown(after), _short(words), tone)


def _latency_row(report: Report, name: str, pair: LatencyPair) -> Row:
    label, before = f"latency of {name} (median)", milliseconds(pair.original.median_ms)
    if pair.optimized is None:
        is_gone = naming.is_gone(report, name, pair)
        return Row(label, before, "gone" if is_gone else "not timed", "", "good" if is_gone else "plain")
    words = ratio_words(pair.ratio) if pair.ratio else ""
    tone = "plain" if words in ("", "unchanged") else _tone((pair.ratio or 1.0) - 1.0)
    return Row(label, before, milliseconds(pair.optimized.median_ms), _short(words), tone)


def _short(words: str) -> str:
    return words.replace(" times ", "× ")


def _savings(predicted: CostSection, counted: CostSection) -> tuple[Saving, ...]:
    savings = []
    for _, label, field, shown in _COSTS:
        said, found = getattr(predicted, field), getattr(counted, field)
        words = [shown(value).replace("-", "−") if value else "0" for value in (said, found)]
        savings.append(Saving(label, words[0], words[1], bool(said == found)))
    return tuple(savings)
