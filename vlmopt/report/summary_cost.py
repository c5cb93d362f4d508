"""What the summary says about cost: what becomes faster and smaller, what does not, how steady the times are."""

from __future__ import annotations

from vlmopt.report import naming
from vlmopt.report.quantities import byte_size, count, factor_words, milliseconds
from vlmopt.report.schema import Report

_RESTLESS = 2.0  # 90th over 10th percentile of the times of one graph


def total_latency(report: Report) -> tuple[float, float]:
    """Median time of one call of every component in turn, before and after, in ms; zeros where a part was not timed."""
    pairs = report.result.latency_ms
    if any(pair.optimized is None and not naming.is_gone(report, name, pair) for name, pair in pairs.items()):
        return 0.0, 0.0
    before = sum(pair.original.median_ms for pair in pairs.values())
    return before, sum(pair.optimized.median_ms for pair in pairs.values() if pair.optimized)


def gains(report: Report) -> list[str]:
    return [text for text, is_gain in _changes_of_cost(report) if is_gain] or ["Nothing that was measured."]


def losses(report: Report) -> list[str]:
    return [text for text, is_gain in _changes_of_cost(report) if not is_gain]


def _changes_of_cost(report: Report) -> list[tuple[str, bool]]:
    """A sentence for every cost that changed, and whether it is a gain."""
    found: list[tuple[str, bool]] = []
    result = report.result
    for name, pair in result.latency_ms.items():
        subject = naming.component_words(name).capitalize()
        before = milliseconds(pair.original.median_ms)
        if naming.is_gone(report, name, pair):
            found.append((f"{subject} took {before} and is not run any more.", True))
        elif pair.optimized is not None:
            after = pair.optimized.median_ms
            words = factor_words(pair.original.median_ms, after, less="faster", more="slower")
            if words != "unchanged":
                text = f"{subject} is {words}: {milliseconds(after)} instead of {before} (median)."
                found.append((text, after < pair.original.median_ms))
    size = result.size_bytes
    if size is not None and factor_words(size.original, size.optimized) not in ("unchanged", ""):
        words = factor_words(size.original, size.optimized)
        text = f"Files are {words}: {byte_size(size.optimized)} instead of {byte_size(size.original)}."
        found.append((text, size.optimized < size.original))
    old, new = result.cost.original, result.cost.optimized
    for label, before_n, after_n, unit in (
        ("Computation for one sample", old.macs, new.macs, " multiply-accumulates"),
        ("Memory traffic of intermediate results", old.activation_bytes, new.activation_bytes, ""),
        ("The cache of keys and values", old.kv_cache_bytes_per_token, new.kv_cache_bytes_per_token, " bytes a token"),
    ):
        words, shown = factor_words(before_n, after_n), count if unit else byte_size
        if words not in ("unchanged", ""):
            found.append(
                (f"{label} is {words}: {shown(after_n)}{unit} instead of {shown(before_n)}.", after_n < before_n)
            )
    return found


def restless(report: Report) -> str:
    """The widest spread of times, in words, where calls of one graph differ more than a quiet machine lets them."""
    sides = [side for pair in report.result.latency_ms.values() for side in (pair.original, pair.optimized) if side]
    widest = max(sides, key=lambda side: side.p90_ms / max(side.p10_ms, 1e-9), default=None)
    if widest is None or widest.p90_ms <= _RESTLESS * widest.p10_ms:
        return ""
    return f"{milliseconds(widest.p10_ms)} and {milliseconds(widest.p90_ms)}"
