"""Numbers as a person reads them: sizes, shares, drops, factors and times, rounded so that nothing looks like zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

from vlmopt.report.schema import MetricSection

_SAME = 0.005  # a factor this near to one is called no change
_SPACE = "\N{NO-BREAK SPACE}"


def points(fraction: float) -> str:
    """A fraction in percent, without the sign: 0.7154 -> 71.5."""
    return f"{100 * fraction:.1f}"


def percents(fractions: Iterable[float]) -> str:
    """(0.25, 0.75) -> 25.0 75.0."""
    return " ".join(points(fraction) for fraction in fractions)


def percent(fraction: float) -> str:
    """0.7154 -> 71.5 %."""
    return f"{points(fraction)}{_SPACE}%"


def count(number: float) -> str:
    """A count with a decimal prefix: 1234567 -> 1.23 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g}"


def byte_size(number: float) -> str:
    """1234567 -> 1.23 MB (decimal prefixes)."""
    text = count(number)
    return f"{text}B" if " " in text else f"{text} B"


def milliseconds(value: float) -> str:
    """Three digits: 0.0123 -> 0.0123 ms, 12.34 -> 12.3 ms, 1234.5 -> 1234 ms."""
    return f"{value:.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def energy(joules: float) -> str:
    """Three digits: 0.00123 J -> 1.23 mJ, 12.34 J -> 12.3 J."""
    return f"{joules:.3g} J" if joules >= 1 else f"{1e3 * joules:.3g} mJ"


def drop_text(drop_points: float) -> str:
    """Points to one digit; a small drop keeps the digit that makes it more than nothing, and zero has no sign."""
    rounded = round(drop_points, 1)
    if rounded == 0 and drop_points != 0:
        return f"{drop_points:.1g}" if abs(drop_points) >= 1e-4 else "0.0"
    return f"{rounded + 0.0:.1f}"


def signed(value: float) -> str:
    """`drop_text` with a sign that typesetters use."""
    text = drop_text(value)
    if text.startswith("-"):
        return f"−{text[1:]}"
    return text if float(text) == 0 else f"+{text}"


def p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def factor(before: float, after: float) -> float | None:
    """How many times smaller; None where that cannot be said."""
    return before / after if before > 0 and after > 0 else None


def factor_words(before: float, after: float, *, less: str = "smaller", more: str = "larger") -> str:
    """`2.10 times smaller`, `unchanged`, `gone`; empty where there was nothing before."""
    if before <= 0:
        return "" if after <= 0 else "new"
    if after <= 0:
        return "gone"
    if abs(before / after - 1) < _SAME:
        return "unchanged"
    return f"{before / after:.2f} times {less}" if before > after else f"{after / before:.2f} times {more}"


def ratio_words(ratio: float) -> str:
    """A ratio of times in words: 2 -> 2.00 times faster."""
    return factor_words(ratio, 1.0, less="faster", more="slower") if ratio > 0 else ""


def value_text(value: float | str | None) -> str:
    """What a gate found or allowed."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def share(part: float, whole: float) -> str:
    """62 % of something; `less than 1 %` rather than 0 %."""
    if whole <= 0:
        return ""
    value = 100 * part / whole
    if 0 < value < 1:
        return f"less than 1{_SPACE}%"
    shown = math.floor(value) if 99 < value < 100 else round(value)
    return f"{shown}{_SPACE}%"


def duration(seconds: float) -> str:
    """0.4 s, 75 s -> 1 min 15 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plural(n: int, noun: str, nouns: str = "") -> str:
    """`1 branch`, `2 branches`."""
    return f"{n:,} {noun if n == 1 else nouns or noun + 's'}".replace(",", _SPACE if n >= 10_000 else "")


def other_metrics(metric: MetricSection) -> dict[str, tuple[float, float]]:
    """The metrics beside the one that decides, as fractions; version 0.1.0 wrote them in percent."""
    head = metric.all.get(metric.name)
    values = [value for pair in metric.all.values() for value in pair]
    is_percent = any(value > 1 for value in values)
    if not is_percent and head is not None and metric.original > 0:
        is_percent = math.isclose(head[0], 100 * metric.original, rel_tol=1e-6)
    scale = 0.01 if is_percent else 1.0
    return {
        name: (before * scale, after * scale) for name, (before, after) in metric.all.items() if name != metric.name
    }
